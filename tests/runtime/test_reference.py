"""The NumPy oracle itself, against torch's dense operators in float64."""

from typing import Any

import numpy as np
import pytest
import torch
from lowering_support import random_condensed

from srigl_fx.runtime import ops, reference
from srigl_fx.runtime.dense import FUNCTIONS
from srigl_fx.runtime.format import CondensedWeight, ValueDtype
from srigl_fx.runtime.quantisation import quantise_samples
from srigl_fx.runtime.value_types import FLOATS


@pytest.mark.parametrize("leading", [(), (1,), (0,), (5,), (2, 3)])
@pytest.mark.parametrize("ablated", [0, 3, 7])
def test_linear(leading: tuple[int, ...], ablated: int) -> None:
    weight = random_condensed(7, 11, 4, ablated)
    x = np.random.default_rng(0).standard_normal((*leading, 11)).astype(np.float32)
    y = reference.condensed_linear(x, weight.values, weight.indices, weight.active, weight.bias)
    dense = weight.to_dense()[0].astype(np.float64)
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, x.astype(np.float64) @ dense.T + weight.bias, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize(("stride", "pad", "dilation"), [(1, 0, 1), (2, 1, 1), (1, 2, 2), (3, 0, 2)])
def test_conv(rank: int, group: int, stride: int, pad: int, dilation: int) -> None:
    kernel = (3, 2, 1)[:rank]
    weight_shape = (6, 2, *kernel)
    weight = random_condensed(6, 2 * int(np.prod(kernel)), 3, ablated=2)
    x = np.random.default_rng(0).standard_normal((2, 2 * group, 9, 8, 7)[: rank + 2]).astype(np.float32)
    y = reference.condensed_conv(
        x,
        weight.values,
        weight.indices,
        weight.active,
        weight.bias,
        weight_shape=weight_shape,
        strides=(stride,) * rank,
        pads=(pad,) * (2 * rank),
        dilations=(dilation,) * rank,
        group=group,
    )
    convolve = (torch.conv1d, torch.conv2d, torch.conv3d)[rank - 1]
    dense = torch.from_numpy(weight.to_dense()[0]).double().reshape(weight_shape)
    expected = convolve(
        torch.from_numpy(x).double(), dense, torch.from_numpy(weight.bias).double(), stride, pad, dilation, group
    )
    np.testing.assert_allclose(y, expected.numpy(), rtol=1e-6, atol=1e-6)


def test_conv_with_uneven_pads() -> None:
    weight = random_condensed(3, 8, 3)
    x = np.random.default_rng(0).standard_normal((1, 2, 5, 5)).astype(np.float32)
    y = reference.condensed_conv(
        x, weight.values, weight.indices, weight.active, weight.bias, weight_shape=(3, 2, 2, 2), pads=(1, 0, 0, 2)
    )
    padded = torch.nn.functional.pad(torch.from_numpy(x), (0, 2, 1, 0))
    expected = torch.conv2d(
        padded, torch.from_numpy(weight.to_dense()[0]).reshape(3, 2, 2, 2), torch.from_numpy(weight.bias)
    )
    np.testing.assert_allclose(y, expected.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize(
    ("stride", "pad", "dilation", "extra"), [(1, 0, 1, 0), (2, 1, 1, 1), (1, 2, 2, 1), (3, 0, 2, 2)]
)
def test_transposed_conv(rank: int, group: int, stride: int, pad: int, dilation: int, extra: int) -> None:
    kernel = (3, 2, 4)[:rank]
    weight_shape = (6, 2, *kernel)
    weight = random_condensed(6, 2 * int(np.prod(kernel)), 3, ablated=2)
    x = np.random.default_rng(0).standard_normal((2, 2 * group, 5, 4, 3)[: rank + 2]).astype(np.float32)
    y = reference.condensed_conv(
        x,
        weight.values,
        weight.indices,
        weight.active,
        weight.bias,
        weight_shape=weight_shape,
        strides=(stride,) * rank,
        pads=(pad,) * (2 * rank),
        dilations=(dilation,) * rank,
        group=group,
        transposed=True,
        output_padding=(extra,) * rank,
    )
    convolve: Any = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)[rank - 1]
    dense = ops.dense_weight(torch.from_numpy(weight.to_dense()[0]), weight_shape, group, True).double()
    bias = torch.from_numpy(weight.bias).double()
    expected = convolve(torch.from_numpy(x).double(), dense, bias, stride, pad, extra, group, dilation)
    np.testing.assert_allclose(y, expected.numpy(), rtol=1e-6, atol=1e-6)


def test_transposed_conv_with_uneven_pads() -> None:
    weight = random_condensed(3, 8, 3)
    x = np.random.default_rng(0).standard_normal((1, 2, 5, 5)).astype(np.float32)
    given = (x, weight.values, weight.indices, weight.active, weight.bias)
    settings: dict[str, Any] = {"weight_shape": (3, 2, 2, 2), "transposed": True, "strides": (2, 2)}
    whole = reference.condensed_conv(*given, **settings)
    np.testing.assert_array_equal(reference.condensed_conv(*given, **settings, pads=(1, 0, 0, 2)), whole[:, :, 1:, :-2])


@pytest.mark.parametrize("activation", FUNCTIONS)
@pytest.mark.parametrize("conv", [False, True])
def test_residual_and_activation(activation: str, conv: bool) -> None:
    weight = random_condensed(6, 12, 4, ablated=2)
    rng = np.random.default_rng(0)
    x = 4 * rng.standard_normal((3, 3, 6, 5) if conv else (3, 12)).astype(np.float32)
    given = (weight.values, weight.indices, weight.active, weight.bias)
    settings: dict[str, Any] = {"weight_shape": (6, 3, 2, 2)} if conv else {}
    compute: Any = reference.condensed_conv if conv else reference.condensed_linear
    plain = compute(x.astype(np.float64), *given, **settings)
    residual = rng.standard_normal(plain.shape).astype(np.float32)
    y = compute(x, *given, **settings, residual=residual, activation=activation)
    expected = FUNCTIONS[activation](torch.from_numpy(plain) + torch.from_numpy(residual))
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, expected.numpy(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", FLOATS)
def test_values_of_16_bits_are_taken_exactly(dtype: ValueDtype) -> None:
    plain = random_condensed(7, 11, 4, 2)
    dense, mask = plain.to_dense()
    weight = CondensedWeight.from_dense(dense, mask, plain.bias, dtype=dtype)
    x = np.random.default_rng(0).standard_normal((5, 11)).astype(np.float32)
    y = reference.condensed_linear(x, weight.values, weight.indices, weight.active, weight.bias)
    rounded = torch.from_numpy(dense).to(getattr(torch, dtype)).double().numpy()
    np.testing.assert_allclose(y, x.astype(np.float64) @ rounded.T + plain.bias, rtol=1e-6, atol=1e-6)


def _of_eight_bits(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples as whole numbers in float64, and their scales, each beside what it belongs to."""
    rounded, scales, offsets = quantise_samples(x.numpy())
    along = (-1, *[1] * (x.dim() - 1))
    steps = rounded.astype(np.float64) - offsets.reshape(along)
    return torch.from_numpy(steps), torch.from_numpy(scales.astype(np.float64)).reshape(along)


@pytest.mark.parametrize("leading", [(), (0,), (5,), (2, 3)])
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_linear_of_eight_bits(activation: str, leading: tuple[int, ...]) -> None:
    dense, mask = random_condensed(7, 11, 4, 2).to_dense()
    weight = CondensedWeight.from_dense(dense, mask, np.arange(7.0), dtype="int8")
    x, residual = torch.randn(*leading, 11), torch.randn(*leading, 7)
    parts = weight.values, weight.indices, weight.active, weight.bias
    y = reference.condensed_linear(
        x.numpy(), *parts, scales=weight.scales, residual=residual.numpy(), activation=activation
    )
    steps, scales = _of_eight_bits(x.reshape(-1, 11))
    plain = steps @ torch.from_numpy(weight.to_dense()[0]).double().t() * scales + torch.from_numpy(weight.bias)
    expected = FUNCTIONS[activation](plain.reshape(*leading, 7) + residual)
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, expected.numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(plain.numpy(), x.reshape(-1, 11).numpy() @ dense.T + weight.bias, atol=0.1)


@pytest.mark.parametrize("transposed", [False, True])
def test_conv_of_eight_bits(transposed: bool) -> None:
    dense, mask = random_condensed(6, 18, 5, ablated=2).to_dense()
    weight = CondensedWeight.from_dense(dense, mask, np.arange(6.0), dtype="int8")
    x, shape = torch.randn(3, 4, 6, 7), (6, 2, 3, 3)
    parts = weight.values, weight.indices, weight.active, weight.bias
    settings: dict[str, Any] = {"strides": (2, 1), "pads": (1, 0, 1, 0), "group": 2, "transposed": transposed}
    y = reference.condensed_conv(x.numpy(), *parts, scales=weight.scales, weight_shape=shape, **settings)
    steps, scales = _of_eight_bits(x)
    matrix, none = torch.from_numpy(weight.to_dense()[0]).double(), torch.zeros(6, dtype=torch.float64)
    plain = ops.dense_conv(steps, matrix, none, shape, [2, 1], [1, 0], [1, 1], 2, transposed, [])
    expected = plain * scales + torch.from_numpy(weight.bias).reshape(6, 1, 1)
    np.testing.assert_allclose(y, expected.numpy(), rtol=1e-5, atol=1e-6)
