"""The NumPy oracle of both condensed operators: plain, slow and right.

Owns what the operators mean. It must not know how they are executed; every kernel is compared with it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from srigl_fx.runtime.activations import ACTIVATIONS
from srigl_fx.runtime.quantisation import quantise_samples, round_with

Array = NDArray[Any]

REFERENCES: dict[str, Callable[[Array], Array]] = {row.name: row.reference for row in ACTIVATIONS}


def condensed_linear(
    x: Array,
    values: Array,
    indices: Array,
    active: Array,
    bias: Array,
    *,
    scales: Array | None = None,
    x_scale: float | None = None,
    x_offset: int = 0,
    y_scale: float | None = None,
    y_offset: int = 0,
    residual: Array | None = None,
    activation: str = "none",
    accumulate: DTypeLike = np.float64,
) -> Array:
    """The condensed linear layer.

    ``y[..., active] = sum_j values[:, j] * x[..., indices[:, j]] + bias``, the bias alone in every other column; then
    the residual is added and the activation applied, in every column. An index that repeats the one before it is
    padding, and adds nothing. With ``scales``, the samples are rounded to eight bits before they are multiplied, each
    with a scale of its own or all with ``x_scale``: :mod:`srigl_fx.runtime.quantisation`.

    Args:
        x: float32 (..., in_features); with an ``x_scale`` also uint8, which is rounded already.
        values: float32, bfloat16, float16 or, with ``scales``, int8 (n_active, k).
        indices: Integers (n_active, k), or fewer rows where rows share theirs.
        active: Integers (n_active,), or (2, n_active) with the row of ``indices`` that each reads.
        bias: float32 (n,).
        scales: float32 (n_active,), or None.
        x_scale: The scale to round all samples with, or None.
        x_offset: What belongs to it: 0 or 128.
        y_scale: With ``scales``, the scale to round finished outputs with, or None.
        y_offset: What belongs to it: 0 or 128.
        residual: float32 (..., n), or None.
        activation: One of :data:`srigl_fx.runtime.activations.NAMES`.
        accumulate: The dtype sums are formed in; the result has ``x``'s dtype, float32 with ``scales``, or uint8 with a
            ``y_scale``.

    Returns:
        (..., n).

    Example:
        >>> one = np.ones((1, 3), np.float32)
        >>> bias = np.array([0.5, 7.0], np.float32)
        >>> condensed_linear(one, 2 * one, np.array([[0, 1, 2]]), np.array([0]), bias).tolist()
        [[6.5, 7.0]]
    """
    indices, active = _of_each_row(indices, active)
    if scales is not None:
        rows = x.reshape(-1, x.shape[-1])
        y = _of_eight_bits(
            *_rounded(rows, x_scale, x_offset),
            *(active, bias, scales),
            lambda steps, none: condensed_linear(steps, values, indices, active, none),
        )
        y = y.reshape(*x.shape[:-1], bias.shape[0])
        return _stored(_finish(y, residual, activation).astype(np.float32), y_scale, y_offset)
    y = np.broadcast_to(bias.astype(accumulate), (*x.shape[:-1], bias.shape[0])).copy()
    gathered = x.astype(accumulate)[..., indices.astype(np.int64)]
    products = np.where(_kept(indices), gathered * values.astype(accumulate), 0)
    y[..., active.astype(np.int64)] += products.sum(axis=-1)
    return _finish(y, residual, activation).astype(x.dtype)


def _rounded(x: Array, scale: float | None, offset: int) -> tuple[Array, Array, Array]:
    """Samples as bytes, their scales and their offsets: found here, or given."""
    if scale is None:
        return quantise_samples(x)
    rounded = x if x.dtype == np.uint8 else round_with(x, scale, offset)
    return rounded, np.full(len(x), scale, np.float32), np.full(len(x), offset, np.int32)


def _stored(y: Array, scale: float | None, offset: int) -> Array:
    """Finished outputs as they are, or as bytes."""
    return y if scale is None else round_with(y, scale, offset)


def _of_eight_bits(
    rounded: Array,
    of_samples: Array,
    offsets: Array,
    active: Array,
    bias: Array,
    scales: Array,
    sums: Callable[[Array, Array], Array],
) -> Array:
    """``scale * sum + bias`` in float64; ``sums`` gives the sums of whole numbers, and takes a bias, which is zero."""
    shape = (-1, *([1] * (rounded.ndim - 1)))
    exact = sums(rounded.astype(np.float64) - offsets.reshape(shape), np.zeros(bias.shape))
    # The product of both scales is rounded to float32, as kernels have it; it may be too small for one.
    factors = of_samples[:, None] * scales.astype(np.float32)
    along = (1, -1, *([1] * (rounded.ndim - 2)))
    y = np.broadcast_to(bias.astype(np.float64).reshape(along), exact.shape).copy()
    y[:, active.astype(np.int64)] += exact[:, active.astype(np.int64)] * factors.reshape(*factors.shape, *along[2:])
    return y


def _of_each_row(indices: Array, active: Array) -> tuple[Array, Array]:
    """Indices and active rows as if no row shared any: (n_active, k) and (n_active,)."""
    if active.ndim == 1:
        return indices, active
    return np.stack([indices[int(row)] for row in active[1]]) if active.size else indices, active[0]


def _kept(indices: Array) -> Array:
    """Which entries are no padding: bool (n_active, k)."""
    kept = np.ones(indices.shape, np.bool_)
    kept[:, 1:] = indices[:, 1:] != indices[:, :-1]
    return kept


def _finish(y: Array, residual: Array | None, activation: str) -> Array:
    with np.errstate(over="ignore"):  # of exp, where the quotient is zero all the same
        return REFERENCES[activation](y if residual is None else y + residual)


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
    transposed: bool = False,
    output_padding: Sequence[int] | None = None,
    scales: Array | None = None,
    x_scale: float | None = None,
    x_offset: int = 0,
    y_scale: float | None = None,
    y_offset: int = 0,
    residual: Array | None = None,
    activation: str = "none",
    accumulate: DTypeLike = np.float64,
) -> Array:
    """The condensed convolution for any number of spatial dimensions, with the attributes of ONNX's convolutions.

    Args:
        x: float32 (N, C, spatial...); with an ``x_scale`` also uint8, which is rounded already.
        values: float32, bfloat16 or float16 (n_active, k).
        indices: (n_active, k), each a flat tap into C / group * prod(kernel); fewer rows where filters share theirs.
        active: (n_active,) filters that are not ablated, or (2, n_active) as for :func:`condensed_linear`.
        bias: float32 (n,).
        weight_shape: The dense shape (n, C / group, kernel...), of a transposed convolution too.
        strides: One for each spatial dimension; ones by default.
        pads: Zeros before every dimension, then after every dimension; none by default. A transposed convolution
            leaves out as much of its output.
        dilations: One for each spatial dimension; ones by default.
        group: The number of groups.
        transposed: Whether each input is spread over the outputs that the kernel reaches from it.
        output_padding: What a transposed convolution's output has more, after every dimension; none by default.
        scales: float32 (n_active,) with values of int8, or None, as for :func:`condensed_linear`.
        x_scale: As for :func:`condensed_linear`.
        x_offset: As for :func:`condensed_linear`.
        y_scale: As for :func:`condensed_linear`.
        y_offset: As for :func:`condensed_linear`.
        residual: float32 of the output's shape, or None.
        activation: One of :data:`srigl_fx.runtime.activations.NAMES`.
        accumulate: The dtype sums are formed in; the result has ``x``'s dtype, float32 with ``scales``, or uint8 with a
            ``y_scale``.

    Returns:
        (N, n, spatial...).

    Example:
        >>> x = np.arange(4, dtype=np.float32).reshape(1, 1, 4)
        >>> one, zero = np.ones((1, 1), np.float32), np.zeros(1, np.float32)
        >>> condensed_conv(x, one, np.array([[1]]), np.array([0]), zero, weight_shape=(1, 1, 2)).tolist()
        [[[1.0, 2.0, 3.0]]]
    """
    indices, active = _of_each_row(indices, active)
    if scales is not None:

        def sums(steps: Array, none: Array) -> Array:
            geometry: dict[str, Any] = {"strides": strides, "pads": pads, "dilations": dilations, "group": group}
            geometry |= {"transposed": transposed, "output_padding": output_padding, "weight_shape": weight_shape}
            return condensed_conv(steps, values, indices, active, none, **geometry)

        y = _of_eight_bits(*_rounded(x, x_scale, x_offset), active, bias, scales, sums)
        return _stored(_finish(y, residual, activation).astype(np.float32), y_scale, y_offset)
    rank = x.ndim - 2
    strides = strides or (1,) * rank
    dilations = dilations or (1,) * rank
    before, after = (pads[:rank], pads[rank:]) if pads else ((0,) * rank, (0,) * rank)
    filters, group_channels, *kernel = weight_shape
    reach = [dilation * (taps - 1) + 1 for dilation, taps in zip(dilations, kernel, strict=True)]
    data = x.astype(accumulate)
    if transposed:
        extra = output_padding or (0,) * rank
        steps = list(x.shape[2:])
        sizes = [(n - 1) * s + r + e for n, s, r, e in zip(steps, strides, reach, extra, strict=True)]
    else:
        data = np.pad(data, [(0, 0), (0, 0), *zip(before, after, strict=True)])
        steps = sizes = [(n - r) // s + 1 for n, s, r in zip(data.shape[2:], strides, reach, strict=True)]
    y = np.empty((x.shape[0], filters, *sizes), accumulate)
    y[:] = bias.astype(accumulate).reshape(-1, *([1] * rank))
    kept = _kept(indices)
    places = np.stack(np.unravel_index(indices.astype(np.int64), (group_channels, *kernel)), axis=-1)
    for row, filter_ in enumerate(active.tolist()):
        first_channel = filter_ // (filters // group) * group_channels
        taps_of_row = places[row][kept[row]].tolist()
        for value, (channel, *offsets) in zip(values[row].astype(accumulate)[kept[row]], taps_of_row, strict=True):
            window = tuple(
                slice(offset * dilation, offset * dilation + (size - 1) * stride + 1, stride)
                for offset, dilation, size, stride in zip(offsets, dilations, steps, strides, strict=True)
            )
            if transposed:
                y[:, filter_][:, *window] += value * data[:, first_channel + channel]
            else:
                y[:, filter_] += value * data[:, first_channel + channel][:, *window]
    if transposed:
        y = y[:, :, *(slice(b, size - a) for b, a, size in zip(before, after, sizes, strict=True))]
    return _finish(y, residual, activation).astype(x.dtype)
