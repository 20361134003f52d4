"""How far two results may lie apart, and how far they do.

Owns the one measure that lowering and export verify with; it must not know what is compared.
"""

import math
from typing import Any

import torch
from torch import Tensor

TOLERANCE = 1e-4  # of the largest output, for float32


def tolerance(value_dtype: torch.dtype, layers: int) -> float:
    """The largest error allowed of a model, ``layers`` of whose weights are rounded to ``value_dtype``.

    A weight is off by at most 3.9e-3 of itself in bfloat16, 4.9e-4 in float16. The layers' errors are independent, so
    they add up as their squares do: whole networks are off by a third of that bound times the root of the number of
    layers, small ones with few outputs by up to all of it. Twice as much is allowed.

    Example:
        >>> tolerance(torch.float32, 50), tolerance(torch.bfloat16, 1), tolerance(torch.bfloat16, 16)
        (0.0001, 0.0078125, 0.03125)
    """
    if value_dtype is torch.float32:
        return TOLERANCE
    return max(TOLERANCE, torch.finfo(value_dtype).eps * math.sqrt(layers))


def relative_error(expected: Any, got: Any) -> float:
    """The largest difference over the largest expected value; infinite where type, shape or NaNs differ.

    Numbers that are not whole are compared as tensors are, complex ones by their absolute values; all else is equal or
    not.

    Example:
        >>> relative_error(torch.tensor([1.0, -4.0]), torch.tensor([2.0, -4.0]))
        0.25
        >>> relative_error(2.0, 2.5), relative_error(2, 3)
        (0.25, inf)
    """
    if isinstance(expected, float | complex) and isinstance(got, float | complex):
        expected, got = (torch.tensor(number, dtype=torch.complex128) for number in (expected, got))
    if not isinstance(expected, Tensor):
        return 0.0 if not isinstance(got, Tensor) and expected == got else float("inf")
    if not isinstance(got, Tensor) or got.shape != expected.shape or got.dtype != expected.dtype:
        return float("inf")
    if not expected.is_floating_point() and not expected.is_complex():
        return 0.0 if torch.equal(expected, got) else float("inf")
    finite = expected.isfinite()
    same = (expected == got) | (expected.isnan() & got.isnan())
    if not bool(same[~finite].all()) or not bool(got[finite].isfinite().all()):
        return float("inf")
    if not finite.any():
        return 0.0
    difference, scale = float((expected[finite] - got[finite]).abs().max()), float(expected[finite].abs().max())
    return difference / scale if scale else (float("inf") if difference else 0.0)
