"""Caches of Hugging Face transformers as inputs and outputs of a graph.

Owns making them known to PyTorch, with what transformers offers for that. It must not know graphs. Nothing is imported
where transformers is not: who has a cache has imported it.
"""

import importlib
import logging
import sys
from typing import Any

from torch import nn

_LOG = logging.getLogger(__name__)

# Modules of transformers, what each offers to register caches, and whether that takes the model.
_OFFERED = (
    ("transformers.integrations.executorch", "register_dynamic_cache_export_support", False),
    ("transformers.exporters.exporter_dynamo", "register_cache_pytrees_for_model", True),
)


def register_caches(model: nn.Module, leaves: list[Any]) -> bool:
    """Register the caches of transformers as containers of tensors, if one of ``leaves`` is an object of its; whether.

    Registered once, they are known for the rest of the process, to everything in PyTorch.

    Example:
        >>> register_caches(nn.Linear(2, 2), [1, "text"])
        False
    """
    if "transformers" not in sys.modules or not any(_is_theirs(type(leaf)) for leaf in leaves):
        return False
    for module, function, takes_model in _OFFERED:
        try:
            register = getattr(importlib.import_module(module), function)
            register(model) if takes_model else register()
        except Exception as error:  # another release: it may lack one of them, or what that imports
            _LOG.debug("%s.%s: %s", module, function, error)
    return True


def _is_theirs(kind: type) -> bool:
    return any(base.__module__.partition(".")[0] == "transformers" for base in kind.__mro__)
