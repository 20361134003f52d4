"""Eight bits: how weights and activations are rounded, and what a product of them is, to the last bit.

Owns the arithmetic, in NumPy: the rounding of weights when they are condensed, and the reference of what kernels do
with the activations of a call. It must not know torch, ONNX or any kernel.

Weights are symmetric, one scale for each output row: ``weight = scale * value`` with values of -127 to 127.
Activations are rounded anew at each call, with one scale for each sample: where nothing in the sample is negative, to
0 ... 255, else to -127 ... 127, which is stored as 1 ... 255 with 128 for zero (the sample's offset). Sums of products
are whole numbers and exact. A sample whose largest number is below 2**-100 counts as zeros. In a sample that holds a
NaN or an infinity no number is known: every output that has weights is NaN.

Or they are rounded with a given scale and offset, the same for all samples and calls. What is beyond 0 ... 255 is
clipped then, infinities too, and a NaN becomes zero.
"""

import math
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
LARGEST_VALUE: Final = 127  # of a weight, and of a sample with negative numbers
LARGEST_UNSIGNED: Final = 255  # of a sample without
OFFSET: Final = 128  # what is added to numbers that may be negative
SMALLEST: Final = 2.0**-100  # a largest number below it counts as zero: the quotients of smaller ones are no floats
LARGEST_FAN_IN: Final = (2**31 - 1) // (LARGEST_UNSIGNED * 128)  # whose sums all are int32, those of -128 too
LARGEST_FILTER: Final = 1 << 16  # inputs of a filter, kept or not: kernels of eight bits count them in uint16


def quantise_weights(values: Array) -> tuple[Array, Array]:
    """Round the kept weights of each row to eight bits.

    Args:
        values: float32 (n_active, k), finite.

    Returns:
        int8 (n_active, k), and float32 (n_active,): what one of them is worth in its row. A row whose weights are all
        below 2**-100 becomes zeros with a scale of zero.

    Example:
        >>> rounded, scales = quantise_weights(np.array([[1.0, -0.5, 0.1]], np.float32))
        >>> rounded.tolist(), round(float(scales[0] * 127), 6)
        ([[127, -64, 13]], 1.0)
    """
    largest = np.abs(values).max(axis=1, initial=0)
    scales = np.where(largest < SMALLEST, 0, largest / np.float32(LARGEST_VALUE)).astype(np.float32)
    divisors = np.where(scales > 0, scales, np.inf).astype(np.float64)[:, None]
    return np.rint(values / divisors).clip(-LARGEST_VALUE, LARGEST_VALUE).astype(np.int8), scales


def quantise_samples(x: Array) -> tuple[Array, Array, Array]:
    """Round activations to eight bits, each sample with a scale of its own.

    Args:
        x: float32 (batch, ...).

    Returns:
        uint8 like ``x``; float32 (batch,): the scales, NaN for a sample that is not finite; int32 (batch,): the
        offsets, 0 or 128. What ``x`` was is about ``scale * (rounded - offset)``.

    Example:
        >>> rounded, scales, offsets = quantise_samples(np.array([[0, 1.0], [-1.0, 0.25]], np.float32))
        >>> rounded.tolist(), offsets.tolist()
        ([[0, 255], [1, 160]], [0, 128])
        >>> (scales * [255, 127]).round(6).tolist()
        [1.0, 1.0]
    """
    flat = x.reshape(len(x), math.prod(x.shape[1:]))
    largest = np.abs(flat).max(axis=1, initial=0).astype(np.float32)
    offsets = np.where((flat < 0).any(axis=1), OFFSET, 0).astype(np.int32)
    limits = np.where(offsets > 0, LARGEST_VALUE, LARGEST_UNSIGNED).astype(np.float32)
    finite, counted = np.isfinite(largest), np.isfinite(largest) & (largest >= SMALLEST)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        inverses = np.where(counted, limits / largest, 0).astype(np.float32)
        scales = np.where(finite, np.where(counted, largest / limits, 0), np.nan).astype(np.float32)
        steps = np.rint(np.where(finite[:, None], flat, 0) * inverses[:, None])
    return (steps + offsets[:, None]).astype(np.uint8).reshape(x.shape), scales, offsets


def given_scale(largest: float, negative: bool) -> tuple[float, int]:
    """The scale and the offset of a tensor whose numbers are known: to round it as :func:`quantise_samples` does.

    Args:
        largest: The largest magnitude in it; at least 2**-100, and finite.
        negative: Whether anything in it is negative.

    Returns:
        The scale, a float32, and the offset.

    Example:
        >>> given_scale(255.0, False), given_scale(254.0, True)
        ((1.0, 0), (2.0, 128))
    """
    limit = LARGEST_VALUE if negative else LARGEST_UNSIGNED
    return float(np.float32(largest) / np.float32(limit)), OFFSET if negative else 0


def given_problem(scale: float, offset: int) -> str:
    """What is wrong with a given scale and its offset; "" where nothing is.

    Example:
        >>> given_problem(0.1, 128), given_problem(0.0, 0)
        ('', 'scale must be a finite number of at least 2**-100, not 0.0')
    """
    if not SMALLEST <= scale <= float(np.finfo(np.float32).max):
        return f"scale must be a finite number of at least 2**-100, not {scale}"
    return "" if offset in (0, OFFSET) else f"offset must be 0 or {OFFSET}, not {offset}"


def round_with(x: Array, scale: float, offset: int) -> Array:
    """Round activations to eight bits with a given scale.

    Each becomes the whole number nearest to ``x * (1 / scale)``, of two the even one, plus the offset, clipped to
    0 ... 255.

    Args:
        x: float32, of any shape.
        scale: What one step is worth; at least 2**-100.
        offset: 0 or 128.

    Returns:
        uint8 like ``x``. What ``x`` was is about ``scale * (rounded - offset)``, if it was within reach. A NaN counts
        as zero.

    Example:
        >>> round_with(np.array([-9, 0.25, 0.75, 2, np.inf, np.nan], np.float32), 0.5, 128).tolist()
        [110, 128, 130, 132, 255, 128]
    """
    with np.errstate(over="ignore"):
        steps = np.rint(x * (np.float32(1) / np.float32(scale)))
    return (np.where(np.isnan(steps), 0, steps) + np.float32(offset)).clip(0, 255).astype(np.uint8)


def sums(rounded: Array, offsets: Array, weight: Array) -> Array:
    """The exact sums of a dense (n, F) weight of whole numbers: int64 (batch, n).

    Example:
        >>> sums(np.array([[130, 128]], np.uint8), np.array([128]), np.array([[3, 9]])).tolist()
        [[6]]
    """
    return (rounded.astype(np.int64) - offsets.astype(np.int64)[:, None]) @ weight.astype(np.int64).T
