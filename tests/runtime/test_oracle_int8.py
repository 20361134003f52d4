"""Values of eight bits in the condensed operators: whole numbers exactly, in each kernel.

Where scales are powers of two nothing but the last step rounds, and results are compared by ``==``. Each kernel is
forced on every size, whatever the plan has for it. Run as they are for this CPU's best target, and by
``test_oracle_isas.py`` for each of them.
"""

import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from kernel_support import PATTERNS, SHAPES, Convolution, bits, check_conv, check_linear, condensed
from kernel_support.whole_numbers import (
    Array,
    check_exactly,
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
from srigl_fx.runtime.cpu.kernels import plan
from srigl_fx.runtime.cpu.threads import torch_threads
from srigl_fx.runtime.format import CondensedWeight
from srigl_fx.runtime.quantisation import LARGEST_FAN_IN

WIDEST_TILE = 65535
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@pytest.mark.parametrize("k", [*range(1, 10), 63, 64, 65])
def test_fan_ins(k: int, int8_kernel: int) -> None:
    for n, in_features in ((1, k), (19, k), (35, k + 70), (1, 3 * k + 1)):
        weight = whole(condensed(n, in_features, k, n_active=max(1, n - 2)))
        for batch in (1, 2, 7, 66):
            check_exactly(weight, batch)


def test_batches(int8_kernel: int) -> None:
    weight = whole(condensed(21, 150, 9, n_active=18))
    for batch in (*range(68), 81, 129):
        check_exactly(weight, batch)


@pytest.mark.parametrize("groups", [(4,), (16,), (4, 1, 3)], ids=str)
def test_rows_that_share_their_inputs(groups: tuple[int, ...], int8_kernel: int) -> None:
    """Fours of inputs are laid out 32 at a time: 129 kept weights are 33 of them."""
    for k in (1, 9, 129):
        weight = whole(condensed(37, 150, k, n_active=33, groups=groups))
        for batch in (1, 2, 7, 16, 17, 33, 49, 64, 85):
            check_exactly(weight, batch)


@pytest.mark.parametrize("in_features", [63, 64, 65, 127, 128, 129, 255, 256, 257, 4095, 65535, 65536, 65537])
def test_inputs(in_features: int, int8_kernel: int) -> None:
    if int8_kernel == plan.INT8_TILE and in_features > WIDEST_TILE:
        assert plan.int8_linear_kernel(True, in_features, 17, 5, 33, True) == plan.INT8_DOT
        return
    for pattern in ("random", "last", "ends"):
        weight = whole(condensed(17, in_features, 5, n_active=16, pattern=pattern))
        for batch in (1, 3):
            check_exactly(weight, batch)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_masks(pattern: str, int8_kernel: int) -> None:
    for in_features, k in ((40, 40), (700, 1), (700, 65)):
        check_exactly(whole(condensed(37, in_features, k, n_active=35, pattern=pattern)), 5)


@pytest.mark.parametrize("x_feature_major", [False, True])
@pytest.mark.parametrize("y_feature_major", [False, True])
def test_layouts(y_feature_major: bool, x_feature_major: bool) -> None:
    weight = whole(condensed(37, 70, 9, n_active=33))
    for batch in (1, 5, 16, 17, 33, 48, 49, 63, 64, 65, 100):
        steps, scales = whole_samples(batch, 70)
        x, expected = samples_of(steps, scales), exactly(weight, steps, scales)
        x = x.t().contiguous().t() if x_feature_major else x
        np.testing.assert_array_equal(run_linear(weight, x, y_feature_major=y_feature_major).double(), expected)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("largest", [127, -127, -128])
def test_the_largest_sums(largest: int, shared: bool, int8_kernel: int) -> None:
    """The format has no -128, but an operator that is given one computes with it."""
    k = WIDEST_TILE if int8_kernel == plan.INT8_TILE else LARGEST_FAN_IN
    weight = without_bias(whole(condensed(3, k, k if shared else k - 9, n_active=2)))
    assert (len(weight.indices) < weight.n_active) is shared
    weight.values[:] = largest
    steps = np.full((3, k), 255.0)
    steps[1] = -127
    steps[2] = np.where(np.arange(k) % 2, 127, -127)
    weight.scales[:] = 1  # type: ignore[index]
    y, expected = (
        run_linear(weight, samples_of(steps, np.ones(3))),
        exactly(weight, steps, np.ones(3)),
    )
    assert (np.abs(expected[0]) > 0.95 * 2**31).sum() == 2
    np.testing.assert_array_equal(y.numpy(), expected.astype(np.float32))


@every_shape
def test_geometries(shape: Convolution) -> None:
    for k, n_active in ((1, 1), (3, shape.n - 1), (shape.in_features, shape.n)):
        weight = whole(shape.condensed(min(k, shape.in_features), n_active=n_active))
        for batch in (1, 3):
            _check_geometry(shape, weight, batch)


def _check_geometry(shape: Convolution, weight: CondensedWeight, batch: int) -> None:
    steps, scales = whole_samples(batch, shape.channels, *shape.size)
    sums = _sums(shape, weight, steps)
    shape_of_y = (-1, shape.n, *[1] * shape.rank)
    worth = np.ones(shape.n)
    worth[weight.rows] = weight.scales
    sizes = scales.reshape(-1, *[1] * (shape.rank + 1)) * worth.reshape(shape_of_y)
    expected = sums * sizes + weight.bias.astype(np.float64).reshape(shape_of_y)
    x = samples_of(steps, scales)
    np.testing.assert_array_equal(run_conv(shape, weight, x).double(), expected)
    residual = 64.0 * torch.randint(-99, 100, expected.shape)
    y = run_conv(shape, weight, x, residual=residual, activation="relu")
    np.testing.assert_array_equal(y.double(), np.maximum(expected + residual.numpy(), 0))


@st.composite
def _any_geometry(draw: st.DrawFn) -> Convolution:
    rank, groups = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    largest = (140, 40, 9)[rank - 1]

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(rank))

    shape = Convolution(
        n=groups * draw(st.integers(1, 20)),
        channels=groups * draw(st.integers(1, 3)),
        groups=groups,
        kernel=each(1, 3),
        stride=each(1, 3),
        padding=each(0, 3),
        dilation=each(1, 2),
        size=each(1, largest),
    )
    assume(min(shape.output_size) > 0)
    return shape


@pytest.mark.slow
@given(shape=_any_geometry(), batch=st.integers(1, 3), kept=st.floats(0, 1), active=st.floats(0, 1))
@settings(max_examples=150, deadline=None)
def test_any_geometry(shape: Convolution, batch: int, kept: float, active: float) -> None:
    """Rows and planes end anywhere in a vector, and columns that no tap reads may follow."""
    k, n_active = max(1, round(kept * shape.in_features)), max(1, round(active * shape.n))
    _check_geometry(shape, whole(shape.condensed(k, n_active=n_active)), batch)


def _sums(shape: Convolution, weight: CondensedWeight, steps: Array) -> Array:
    stride, padding, dilation = shape.steps
    return reference.condensed_conv(
        steps,
        weight.values,
        weight.indices,
        weight.active,
        np.zeros(shape.n),
        weight_shape=shape.weight_shape,
        strides=stride,
        pads=padding * 2,
        dilations=dilation,
        group=shape.groups,
        transposed=shape.transposed,
        output_padding=shape.output_padding or None,
    )


def test_many_channels() -> None:
    """More filters than a block of them has, and several tiles of positions."""
    shape = Convolution(n=300, channels=130, kernel=(1, 3), groups=1, padding=(0, 1), size=(5, 29))
    weight = without_bias(whole(shape.condensed(65, n_active=283)))
    steps, scales = whole_samples(2, shape.channels, *shape.size)
    y = run_conv(shape, weight, samples_of(steps, scales))
    worth = np.ones(300)
    worth[weight.rows] = weight.scales
    expected = _sums(shape, weight, steps) * scales.reshape(2, 1, 1, 1) * worth.reshape(300, 1, 1)
    np.testing.assert_array_equal(y.double(), expected)


def _some_linear(batch: int, columns: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    weight = condensed(300, 500, 60, n_active=277, dtype="int8")
    x, residual = (torch.randn(batch, size, generator=generator) for size in (500, 300))
    if columns:
        x = x.t().contiguous().t()
    return check_linear(weight, x, residual=residual, activation="silu", x_feature_major=columns)


def _some_conv(shape: Convolution) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, shape.channels, *shape.size, generator=generator)
    return check_conv(shape, shape.condensed(4, n_active=shape.n - 3, dtype="int8"), x, activation="tanh")


RUNS: dict[str, Callable[[], Tensor]] = {
    **{f"linear, {batch}": functools.partial(_some_linear, batch) for batch in (1, 5, 16, 33, 70, 130, 150)},
    **{f"feature-major, {batch}": functools.partial(_some_linear, batch, True) for batch in (16, 70, 100, 150)},
    "convolution of few filters": functools.partial(_some_conv, SHAPES["2d tall kernel"]),
    "convolution in groups": functools.partial(_some_conv, SHAPES["3d strided"]),
    "convolution of many filters": functools.partial(_some_conv, Convolution(n=200, channels=40, size=(12, 13))),
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_the_same_bits_for_any_number_of_threads(run: Callable[[], Tensor]) -> None:
    alone = bits(run())
    for threads in (2, 3):
        with torch_threads(threads):
            assert bits(run()) == alone
