"""Hooks that ``torch.compile`` leaves alone.

Owns the mark that keeps our hooks out of compiled code. It must not know what any hook does.

A hook looks at what no compiler guards: versions of tensors, whether a gradient arrived, which step it is. Traced, it
would see for ever what it saw while it was compiled. Where a whole training step is compiled, the compiler therefore
stops before each of our hooks and goes on behind it.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

_Hook = TypeVar("_Hook", bound=Callable[..., Any])

_REASON = (
    "hooks of a srigl_fx trainer cannot be compiled, since they follow masks that change: compile without "
    "fullgraph=True, or compile the model alone"
)


def untraced(hook: _Hook) -> _Hook:
    """``hook``, called as it is also where the code around it is compiled.

    Under ``fullgraph=True`` the compiler refuses the code around it, and gives the reason.

    Example:
        >>> untraced(lambda gradient: 2 * gradient)(3)
        6
    """
    return cast(_Hook, torch.compiler.disable(hook, reason=_REASON))  # type: ignore[no-untyped-call]
