"""Samples that are rounded with a given scale: whole numbers exactly, in each kernel, whatever the samples hold.

Weights are whole numbers with scales that are powers of two, and so is the given scale: nothing but the last step
rounds. Run as they are for this CPU's best target, and by ``test_oracle_isas.py`` for each of them.
"""

import math

import numpy as np
import pytest
import torch
from kernel_support import SHAPES, Convolution, bits, condensed
from kernel_support.whole_numbers import (
    Array,
    exactly,
    run_conv,
    run_linear,
    samples_of,
    whole,
    whole_samples,
    without_bias,
)
from torch import Tensor

from srigl_fx.runtime import reference
from srigl_fx.runtime.cpu.threads import torch_threads
from srigl_fx.runtime.format import CondensedWeight
from srigl_fx.runtime.quantisation import SMALLEST, quantise_samples, round_with

LARGEST = float(np.finfo(np.float32).max)
offsets = pytest.mark.parametrize("offset", [0, 128])


def awkward(*shape: int, scale: float = 0.5) -> Tensor:
    """Numbers within reach and beyond, between two steps, at the ends of what floats are, and no numbers."""
    rng = np.random.default_rng(0)
    x = rng.integers(-600, 600, shape) / 2 * scale
    some = [math.nan, math.inf, -math.inf, LARGEST, -LARGEST, 0.0, -0.0, 1e-45, -1e-45, 127.5 * scale, -128.5 * scale]
    x.reshape(-1)[: x.size // 2 : 5] = np.resize(some, len(range(0, x.size // 2, 5)))
    return torch.from_numpy(x.astype(np.float32))


def expected_of(weight: CondensedWeight, x: Tensor, scale: float, offset: int) -> Array:
    steps = round_with(x.numpy(), scale, offset).astype(np.int64) - offset
    return exactly(weight, steps, np.full(len(x), scale))


@offsets
@pytest.mark.parametrize("k", [1, 3, 4, 9, 63, 64, 65])
def test_fan_ins(k: int, offset: int, int8_kernel: int) -> None:
    for n, in_features in ((1, k), (35, k + 70)):
        weight = whole(condensed(n, in_features, k, n_active=max(1, n - 2)))
        for batch in (1, 2, 16, 17, 66):
            x = awkward(batch, in_features)
            y = run_linear(weight, x, x_scale=0.5, x_offset=offset)
            np.testing.assert_array_equal(y.double(), expected_of(weight, x, 0.5, offset))


@offsets
@pytest.mark.parametrize("y_feature_major", [False, True])
def test_feature_major_samples(y_feature_major: bool, offset: int) -> None:
    weight = whole(condensed(37, 70, 9, n_active=33))
    for batch in (1, 5, 63, 64, 130):
        x = awkward(batch, 70)
        y = run_linear(weight, x.t().contiguous().t(), y_feature_major=y_feature_major, x_scale=0.5, x_offset=offset)
        np.testing.assert_array_equal(y.double(), expected_of(weight, x, 0.5, offset))


@offsets
@pytest.mark.parametrize("scale", [SMALLEST, 2.0**-20, 2.0**90])
def test_scales_at_the_ends(scale: float, offset: int, int8_kernel: int) -> None:
    """Of the largest of them the inverse is a denormal float."""
    weight = without_bias(whole(condensed(17, 70, 9, n_active=16)))
    x = awkward(5, 70, scale=scale)
    y = run_linear(weight, x, x_scale=scale, x_offset=offset)
    np.testing.assert_array_equal(y.double(), expected_of(weight, x, scale, offset))


@offsets
@pytest.mark.parametrize("name", ["1d strided", "2d groups", "2d pointwise", "3d", "2d transposed, strided"])
def test_convolutions(name: str, offset: int) -> None:
    """Padding is zero, whatever the offset."""
    shape = SHAPES[name]
    weight = whole(shape.condensed(3, n_active=shape.n - 1))
    for batch in (1, 3):
        x = awkward(batch, shape.channels, *shape.size)
        y = run_conv(shape, weight, x, x_scale=0.5, x_offset=offset)
        np.testing.assert_array_equal(y.double(), _convolved(shape, weight, x, offset))


def _convolved(shape: Convolution, weight: CondensedWeight, x: Tensor, offset: int) -> Array:
    stride, padding, dilation = shape.steps
    values = weight.values.astype(np.float64) * weight.scales[:, None]  # type: ignore[index]
    return reference.condensed_conv(
        0.5 * (round_with(x.numpy(), 0.5, offset).astype(np.float64) - offset),
        values,
        weight.indices,
        weight.active,
        weight.bias,
        weight_shape=shape.weight_shape,
        strides=stride,
        pads=padding * 2,
        dilations=dilation,
        group=shape.groups,
        transposed=shape.transposed,
        output_padding=shape.output_padding or None,
    )


def test_one_sample_does_not_change_another(int8_kernel: int) -> None:
    weight = condensed(37, 70, 9, n_active=33, dtype="int8")
    x = awkward(70, 70)
    y = run_linear(weight, x, x_scale=0.5, x_offset=128)
    assert y.isfinite().all()
    for row in (0, 1, 33, 69):
        assert bits(run_linear(weight, x[row : row + 1], x_scale=0.5, x_offset=128)) == bits(y[row])


@offsets
def test_the_same_bits_for_any_number_of_threads(offset: int) -> None:
    weight, shape = condensed(300, 500, 60, n_active=277, dtype="int8"), Convolution(n=200, channels=40, size=(12, 13))
    filters, images = shape.condensed(9, dtype="int8"), awkward(3, 40, 12, 13)

    def run() -> list[bytes]:
        given = {"x_scale": 0.3, "x_offset": offset}
        results = [run_linear(weight, awkward(batch, 500), **given) for batch in (1, 5, 16, 70, 130)]
        return [bits(y) for y in (*results, run_conv(shape, filters, images, **given))]

    alone = run()
    for threads in (2, 3):
        with torch_threads(threads):
            assert run() == alone


def test_what_is_found_may_be_given(int8_kernel: int) -> None:
    """A sample whose own scale is the given one has the same outputs, bit for bit."""
    weight = condensed(37, 70, 9, n_active=33, dtype="int8")
    x = samples_of(*whole_samples(6, 70))
    rounded, scales, offsets = quantise_samples(x.numpy())
    y = run_linear(weight, x)
    for row, (scale, offset) in enumerate(zip(scales.tolist(), offsets.tolist(), strict=True)):
        given = run_linear(weight, x[row : row + 1], x_scale=scale, x_offset=offset)
        assert bits(given) == bits(y[row])
        np.testing.assert_array_equal(round_with(x[row].numpy(), scale, offset), rounded[row])


def rounded(x: Tensor, scale: float, offset: int) -> Tensor:
    y: Tensor = torch.ops.srigl_fx.round_samples(x, scale, offset)
    return y


@offsets
@pytest.mark.parametrize("size", [*range(1, 18), 31, 32, 33, 63, 64, 65, 4097, 70_001])
def test_rounding_alone(size: int, offset: int) -> None:
    for threads in (1, 3):
        with torch_threads(threads):
            x = awkward(size)
            np.testing.assert_array_equal(rounded(x, 0.5, offset), round_with(x.numpy(), 0.5, offset))


def test_what_is_rounded_lies_as_it_did() -> None:
    x = torch.randn(3, 5, 7)
    for y in (x, x.permute(2, 0, 1), x.permute(2, 0, 1)[:, ::2], x[:, :, 3], x.mT, x[:0], x[0, 0, 0]):
        found = rounded(y, 0.02, 128)
        np.testing.assert_array_equal(found, round_with(y.numpy(), 0.02, 128))
        assert found.stride() == torch.empty_like(y).stride()


@offsets
def test_samples_that_are_rounded_already(offset: int, int8_kernel: int) -> None:
    """Bit for bit what the layer gives that rounds them itself."""
    for n, in_features, k in ((1, 1, 1), (37, 70, 9), (35, 129, 65)):
        weight = condensed(n, in_features, k, dtype="int8")
        for batch in (1, 2, 16, 17, 63, 64, 130):
            x = awkward(batch, in_features)
            expected = run_linear(weight, x, x_scale=0.3, x_offset=offset)
            y = run_linear(weight, rounded(x, 0.3, offset), x_scale=0.3, x_offset=offset)
            assert y.dtype is torch.float32
            assert bits(y) == bits(expected)


@offsets
@pytest.mark.parametrize("y_feature_major", [False, True])
def test_feature_major_samples_that_are_rounded_already(y_feature_major: bool, offset: int) -> None:
    weight = condensed(300, 70, 9, n_active=233, dtype="int8")
    given = {"x_scale": 0.3, "x_offset": offset, "y_feature_major": y_feature_major}
    for threads in (1, 3):
        with torch_threads(threads):
            for batch in (1, 5, 20, 63, 64, 100, 130):
                x = awkward(batch, 70).t().contiguous().t()
                steps = rounded(x, 0.3, offset)
                assert steps.stride() == x.stride()
                assert bits(run_linear(weight, steps, **given)) == bits(run_linear(weight, x, **given))


@offsets
@pytest.mark.parametrize("name", ["1d strided", "2d groups", "2d pointwise", "3d", "2d transposed, strided"])
def test_convolutions_of_what_is_rounded_already(name: str, offset: int) -> None:
    shape = SHAPES[name]
    weight = shape.condensed(3, n_active=shape.n - 1, dtype="int8")
    given = {"x_scale": 0.3, "x_offset": offset}
    for batch in (1, 3):
        x = awkward(batch, shape.channels, *shape.size)
        assert bits(run_conv(shape, weight, rounded(x, 0.3, offset), **given)) == bits(
            run_conv(shape, weight, x, **given)
        )
