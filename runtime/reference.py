"""The NumPy oracle of both condensed operators: plain, slow and right.

Owns what the operators mean. It must not know how they are executed; every kernel is compared with it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

Array = NDArray[Any]


def condensed_linear(
    x: Array, values: Array, indices: Array, active: Array, bias: Array, *, accumulate: DTypeLike = np.float64
) -> Array:
    """``y[..., active] = sum_j values[:, j] * x[..., indices[:, j]] + bias``, and the bias in every other column.

    Args:
        x: float32 (..., in_features).
        values: float32 (n_active, k).
        indices: Integers (n_active, k).
        active: Integers (n_active,).
        bias: float32 (n,).
        accumulate: The dtype sums are formed in; the result has ``x``'s dtype.

    Returns:
        (..., n).

    Example:
        >>> one = np.ones((1, 3), np.float32)
        >>> bias = np.array([0.5, 7.0], np.float32)
        >>> condensed_linear(one, 2 * one, np.array([[0, 1, 2]]), np.array([0]), bias).tolist()
        [[6.5, 7.0]]
    """
    y = np.broadcast_to(bias.astype(accumulate), (*x.shape[:-1], bias.shape[0])).copy()
    gathered = x.astype(accumulate)[..., indices.astype(np.int64)]
    y[..., active.astype(np.int64)] += (gathered * values.astype(accumulate)).sum(axis=-1)
    return y.astype(x.dtype)


def condensed_conv(
    x: Array,
    values: Array,
    indices: Array,
    active: Array,
    bias: Array,
    *,
    weight_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    group: int = 1,
    accumulate: DTypeLike = np.float64,
) -> Array:
    """The condensed convolution for any number of spatial dimensions, with ONNX Conv's attributes.

    Args:
        x: float32 (N, C, spatial...).
        values: float32 (n_active, k).
        indices: (n_active, k), each a flat tap into C / group * prod(kernel).
        active: (n_active,) filters that are not ablated.
        bias: float32 (n,).
        weight_shape: The dense shape (n, C / group, kernel...).
        strides: One for each spatial dimension; ones by default.
        pads: Zeros before every dimension, then after every dimension; none by default.
        dilations: One for each spatial dimension; ones by default.
        group: The number of groups.
        accumulate: The dtype sums are formed in; the result has ``x``'s dtype.

    Returns:
        (N, n, spatial...).

    Example:
        >>> x = np.arange(4, dtype=np.float32).reshape(1, 1, 4)
        >>> one, zero = np.ones((1, 1), np.float32), np.zeros(1, np.float32)
        >>> condensed_conv(x, one, np.array([[1]]), np.array([0]), zero, weight_shape=(1, 1, 2)).tolist()
        [[[1.0, 2.0, 3.0]]]
    """
    rank = x.ndim - 2
    strides = strides or (1,) * rank
    dilations = dilations or (1,) * rank
    pads = pads or (0,) * (2 * rank)
    filters, group_channels, *kernel = weight_shape
    padded = np.pad(x.astype(accumulate), [(0, 0), (0, 0), *zip(pads[:rank], pads[rank:], strict=True)])
    out = [
        (size - dilation * (taps - 1) - 1) // stride + 1
        for size, taps, stride, dilation in zip(padded.shape[2:], kernel, strides, dilations, strict=True)
    ]
    y = np.empty((x.shape[0], filters, *out), accumulate)
    y[:] = bias.astype(accumulate).reshape(-1, *([1] * rank))
    for row, taps_of_row in enumerate(indices):
        filter_ = int(active[row])
        first_channel = filter_ // (filters // group) * group_channels
        for value, tap in zip(values[row].astype(accumulate), taps_of_row, strict=True):
            channel, *offsets = (int(i) for i in np.unravel_index(int(tap), (group_channels, *kernel)))
            window = tuple(
                slice(offset * dilation, offset * dilation + (size - 1) * stride + 1, stride)
                for offset, dilation, size, stride in zip(offsets, dilations, out, strides, strict=True)
            )
            y[:, filter_] += value * padded[:, first_channel + channel][:, *window]
    return y.astype(x.dtype)
