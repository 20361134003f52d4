"""Caches of Hugging Face transformers as inputs and outputs of a graph.

Owns making them known to PyTorch, with what transformers offers for that, and which of them no graph can hold. It must
not know graphs. Nothing is imported where transformers is not: who has a cache has imported it.
"""

import importlib
import logging
import sys
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

_LOG = logging.getLogger(__name__)

# Modules of transformers, what each offers to register caches, and whether that takes the model.
_OFFERED = (
    ("transformers.integrations.executorch", "register_dynamic_cache_export_support", False),
    ("transformers.exporters.exporter_dynamo", "register_cache_pytrees_for_model", True),
)


def knows_caches() -> bool:
    """Whether transformers is imported, without which there are no caches of its.

    Example:
        >>> import sys
        >>> knows_caches() == ("transformers" in sys.modules)
        True
    """
    return "transformers" in sys.modules


def register_caches(model: nn.Module, leaves: list[Any]) -> bool:
    """Register the caches of transformers as containers of tensors, if one of ``leaves`` is an object of its; whether.

    Registered once, they are known for the rest of the process, to everything in PyTorch.

    Example:
        >>> register_caches(nn.Linear(2, 2), [1, "text"])
        False
    """
    if not knows_caches() or not any(_is_theirs(type(leaf)) for leaf in leaves):
        return False
    for module, function, takes_model in _OFFERED:
        try:
            register = getattr(importlib.import_module(module), function)
            register(model) if takes_model else register()
        except Exception as error:  # another release: it may lack one of them, or what that imports
            _LOG.debug("%s.%s: %s", module, function, error)
    return True


def untold(values: Any, *, given: bool) -> str:
    """How a cache among ``values`` keeps positions where no tensor tells them, in words; "" where none does.

    A cache with a sliding window counts them in a number. A graph would have the number of the example built in, and
    no other cache of the same sizes would be told from it: of one that is ``given`` this is so once its window is full.
    One of a decoder with an encoder marks which layers are to be filled anew, as those are that were reset.

    Example:
        >>> untold([1, {"x": "text"}], given=True)
        ''
    """
    if not knows_caches():
        return ""
    for value in pytree.tree_leaves(values, is_leaf=lambda one: _is_theirs(type(one)) and _layers(one) is not None):
        if given and (number := _to_be_filled_anew(value)) is not None:
            return f"a {type(value).__name__} whose layer {number} is full and marked as one that is to be filled"
        for number, layer in enumerate(_layers(value) or ()):
            keys, seen = getattr(layer, "keys", None), getattr(layer, "cumulative_length", None)
            window = getattr(layer, "sliding_window", None)
            moved = isinstance(seen, int) and isinstance(keys, Tensor) and keys.dim() > 2 and seen != keys.shape[-2]
            full = given and isinstance(seen, int) and isinstance(window, int) and seen >= window - 1
            if moved or full or isinstance(getattr(layer, "cumulative_length_int", None), int):
                return (
                    f"a {type(value).__name__} whose layer {number} ({type(layer).__name__}) counts its positions in a "
                    "number that is in no tensor"
                )
    return ""


def _layers(value: Any) -> list[Any] | None:
    """The layers of a cache, of both parts of one with two; None of anything else."""
    parts = [getattr(value, name, None) for name in ("self_attention_cache", "cross_attention_cache")]
    layers = [one for part in (value, *parts) for one in getattr(part, "layers", None) or () if part is not None]
    return layers if layers and hasattr(value, "get_seq_length") else None


def _to_be_filled_anew(value: Any) -> int | None:
    """The first layer of a cache of an encoder's keys and values that has some which the next call does not take."""
    marks, cross = getattr(value, "is_updated", None), getattr(value, "cross_attention_cache", None)
    if isinstance(marks, dict):
        for number, layer in enumerate(getattr(cross, "layers", ())):
            keys = getattr(layer, "keys", None)
            if isinstance(keys, Tensor) and keys.numel() and not marks.get(number):
                return number
    return None


def _is_theirs(kind: type) -> bool:
    return any(base.__module__.partition(".")[0] == "transformers" for base in kind.__mro__)
