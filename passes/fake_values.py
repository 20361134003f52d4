"""What operators return, by shape and dtype alone: they run on fake tensors.

Owns how they are run so that no size becomes fixed. It must not know graphs or passes.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses import FakeTensorMode

from srigl_fx.passes.recurrences import RECURRENT, whole_recurrences


def _whole(function: Callable[..., Any]) -> AbstractContextManager[None]:
    return whole_recurrences() if function in RECURRENT else nullcontext()


def fake_result(
    mode: FakeTensorMode,
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """What ``function`` returns for operands that are fake tensors of ``mode``.

    Example:
        >>> mode = FakeTensorMode()
        >>> x = mode.from_tensor(torch.ones(2, 3))
        >>> fake_result(mode, torch.ops.aten.mul.Tensor, (x, 2.0)).shape
        torch.Size([2, 3])
    """
    # An operator's own checks would decide on a free size, and operators composed in C++ may not be able to read one.
    unguarded = nullcontext() if mode.shape_env is None else mode.shape_env.suppress_guards()
    with unguarded, _whole(function), mode, enable_python_dispatcher(), torch.no_grad():
        return function(*args, **(kwargs or {}))
