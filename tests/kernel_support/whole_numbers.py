"""Weights and samples of eight bits that are whole numbers, so that results can be compared by ``==``."""

import dataclasses
import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernel_support import Convolution, operands, scales_of
from srigl_fx.runtime.format import CondensedWeight, is_padding

Array = NDArray[Any]


def whole(weight: CondensedWeight, seed: int = 0) -> CondensedWeight:
    """The same places with any values of -127 to 127, scales that are powers of two, and a bias that adds exactly."""
    rng = np.random.default_rng(seed)
    values = rng.integers(-127, 128, weight.values.shape).astype(np.int8)
    values[is_padding(weight.row_indices)] = 0
    scales = 2.0 ** rng.integers(-3, 4, weight.n_active)
    bias = 64.0 * rng.integers(-999, 1000, weight.out_features)
    parts: dict[str, Any] = {"values": values, "scales": scales.astype(np.float32), "bias": bias.astype(np.float32)}
    return dataclasses.replace(weight, **parts)


def without_bias(weight: CondensedWeight) -> CondensedWeight:
    return dataclasses.replace(weight, bias=np.zeros_like(weight.bias))


def whole_samples(batch: int, *shape: int, seed: int = 0) -> tuple[Array, Array]:
    """Whole numbers, float64 (batch, ...), and what one of them is worth in its sample, a power of two.

    Every other sample has negative numbers; the largest magnitude in each is the one that needs no rounding.
    """
    rng = np.random.default_rng(seed)
    steps = np.empty((batch, math.prod(shape)))
    for sample in range(batch):
        signed = sample % 2
        steps[sample] = rng.integers(-127 if signed else 0, 128 if signed else 256, steps.shape[1])
        steps[sample, rng.integers(steps.shape[1])] = -127 if signed else 255
    return steps.reshape(batch, *shape), 2.0 ** rng.integers(-3, 4, batch)


def samples_of(steps: Array, scales: Array) -> Tensor:
    return torch.from_numpy((steps * scales.reshape(-1, *[1] * (steps.ndim - 1))).astype(np.float32))


def run_linear(weight: CondensedWeight, x: Tensor, **settings: Any) -> Tensor:
    y: Tensor = torch.ops.srigl_fx.condensed_linear(
        x, *operands(weight), weight.in_features, scales=scales_of(weight), **settings
    )
    return y


def run_conv(shape: Convolution, weight: CondensedWeight, x: Tensor, **settings: Any) -> Tensor:
    stride, padding, dilation = shape.steps
    settings |= {"transposed": shape.transposed, "output_padding": shape.output_padding}
    geometry = shape.weight_shape, stride, padding, dilation, shape.groups
    y: Tensor = torch.ops.srigl_fx.condensed_conv(x, *operands(weight), *geometry, scales=scales_of(weight), **settings)
    return y


def exactly(weight: CondensedWeight, steps: Array, scales: Array) -> Array:
    """What sums of whole numbers give, in float64, before anything is rounded."""
    indices = weight.row_indices
    values = np.where(is_padding(indices), 0, weight.values.astype(np.int64))
    y = np.tile(weight.bias.astype(np.float64), (len(steps), 1))
    assert weight.scales is not None
    for i, row in enumerate(weight.rows):
        sums = steps.astype(np.int64)[:, indices[i].astype(np.int64)] @ values[i]
        y[:, row] += sums * (scales * np.float64(weight.scales[i]))
    return y


def check_exactly(weight: CondensedWeight, batch: int, **settings: Any) -> None:
    steps, scales = whole_samples(batch, weight.in_features)
    y, expected = run_linear(weight, samples_of(steps, scales), **settings), exactly(weight, steps, scales)
    np.testing.assert_array_equal(y.double().numpy(), expected)
