"""Values of eight bits in the condensed operators: samples at the ends of what floats are, and what is not finite.

Compared with the reference to the last bit, in each kernel. Run as they are for this CPU's best target, and by
``test_oracle_isas.py`` for each of them.
"""

import ctypes
import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from kernel_support import ACTIVATIONS, SHAPES, Convolution, bits, check_conv, check_linear, condensed, tensor
from kernel_support.whole_numbers import Array, check_exactly, run_conv, run_linear, whole, without_bias
from torch import Tensor

from srigl_fx.runtime import reference
from srigl_fx.runtime.format import CondensedWeight
from srigl_fx.runtime.quantisation import SMALLEST

specials = pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
CONVOLUTIONS = [SHAPES[name] for name in ("1d strided", "2d groups", "3d", "2d transposed, strided")]
convolutions = pytest.mark.parametrize("shape", CONVOLUTIONS, ids=str)


def _extremes(in_features: int) -> Iterator[tuple[str, Array]]:
    """Samples at the ends of what rounding knows, finite all."""
    rng = np.random.default_rng(0)
    normal, halves = rng.standard_normal(in_features), rng.integers(0, 255, in_features) + 0.5
    largest = float(np.finfo(np.float32).max)
    tiny = float(np.finfo(np.float32).tiny)
    sign = np.where(rng.random(in_features) < 0.5, -1, 1)
    yield "zeros", np.zeros(in_features)
    yield "zeros with a sign", np.full(in_features, -0.0)
    yield "positive, and zeros with a sign", np.where(sign < 0, -0.0, np.abs(normal))
    for constant in (1.0, -1.0, 0.1, -0.1, largest, -largest, 1 / 3, SMALLEST, -SMALLEST):
        yield f"all {constant}", np.full(in_features, constant)
    yield "all the largest, either sign", largest * sign
    yield "normal", normal
    yield "positive", np.abs(normal)
    for factor in (1e38, 1e30, 1e-28, 1e-30, 1e-31, 1e-38, 1e-41):
        yield f"normal, times {factor}", normal * factor / np.abs(normal).max()
    yield "denormal", tiny * np.abs(normal) / 8
    yield "positive and the smallest negative one", np.where(sign < 0, -1e-45, np.abs(normal))
    yield "just below what counts", np.full(in_features, np.nextafter(np.float32(SMALLEST), np.float32(0)))
    yield "from the tiniest to the largest", np.geomspace(1e-45, largest, in_features)
    yield "the same of either sign", sign * np.geomspace(1e-45, largest, in_features)
    for exponent in (0, -99, 110):
        ties, signed = halves.copy(), sign * np.minimum(halves, 126.5)
        ties[0], signed[-1] = 255, -127
        yield f"ties, times 2 ** {exponent}", ties * 2.0**exponent
        yield f"ties of either sign, times 2 ** {exponent}", signed * 2.0**exponent


NAMES, ROWS = zip(*_extremes(70), strict=True)
EXTREMES = torch.from_numpy(np.array(ROWS).astype(np.float32))


def oracle(weight: CondensedWeight, x: Tensor) -> Array:
    with np.errstate(all="ignore"):
        parts = weight.values, weight.indices, weight.active, weight.bias
        return reference.condensed_linear(x.numpy(), *parts, scales=weight.scales)


def test_extreme_samples_are_rounded_as_the_reference_does(int8_kernel: int) -> None:
    """To the last bit: where a weight's scale is a power of two and there is no bias, both round once."""
    weight = without_bias(whole(condensed(40, 70, 65, n_active=37)))
    assert len(EXTREMES) > 30
    y, expected = run_linear(weight, EXTREMES), oracle(weight, EXTREMES)
    for name, got, wanted in zip(NAMES, y.numpy(), expected, strict=True):
        np.testing.assert_array_equal(got, wanted, name)
    for row in range(len(EXTREMES)):  # whatever else is in the call
        assert bits(run_linear(weight, EXTREMES[row : row + 1])) == bits(y[row]), NAMES[row]


@convolutions
def test_extreme_samples_of_a_convolution(shape: Convolution) -> None:
    weight = without_bias(whole(shape.condensed(5, n_active=shape.n - 1)))
    count = shape.channels * math.prod(shape.size)
    names, rows = zip(*_extremes(count), strict=True)
    x = torch.from_numpy(np.array(rows).astype(np.float32)).reshape(-1, shape.channels, *shape.size)
    y = run_conv(shape, weight, x)
    check_conv(shape, weight, x)
    for row in range(len(names)):
        assert bits(run_conv(shape, weight, x[row : row + 1])) == bits(y[row]), names[row]


def test_ties_go_to_the_even_number(int8_kernel: int) -> None:
    """Hand-computed: one weight of one, so that the output is the rounded input."""
    weight = without_bias(whole(condensed(1, 8, 1, pattern="first")))
    weight.values[:], weight.scales[:] = 1, 1  # type: ignore[index]
    rounded = {0.5: 0, 1.5: 2, 2.5: 2, 3.5: 4, 125.5: 126, 253.5: 254, 254.5: 254, 0.49999: 0, 0.50001: 1}
    for given, expected in rounded.items():
        x = torch.tensor([[given, *[0.0] * 6, 255.0]])
        assert run_linear(weight, x).item() == expected
    for given in (0.5, 1.5, 2.5, 125.5):
        x = torch.tensor([[-given, *[0.0] * 6, 127.0]])
        assert run_linear(weight, x).item() == -rounded[given]
        assert run_linear(weight, -x).item() == rounded[given]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extreme_samples_through_the_epilogue(activation: str, int8_kernel: int) -> None:
    weight = condensed(37, 70, 9, n_active=30, dtype="int8")
    weight.scales[:] *= 0.01  # type: ignore[index] # no output is beyond the largest float before what is added to it
    x = EXTREMES.clone()
    x[5, 3], x[7, 1], x[9, 69] = math.nan, math.inf, -math.inf
    residual = torch.randn(len(x), 37)
    residual[::3, ::5] = math.inf
    residual[1::3, ::7] = math.nan
    check_linear(weight, x, activation=activation)
    check_linear(weight, x, residual=residual, activation=activation)


def test_extreme_scales(int8_kernel: int) -> None:
    """Of weights: zero, denormal, huge; a product of scales may be no float at all."""
    weight = condensed(17, 70, 9, n_active=16, dtype="int8")
    scales = [0, 1e-45, 3e-42, 1.2e-38, 2.0**-107, 1e-30, 1e-20, 1e-3, 1, 1e3, 1e20, 1e30, 1e34, 2.6e36, 1e38, 3e38]
    weight = dataclasses.replace(weight, scales=np.array(scales, np.float32))
    check_linear(weight, EXTREMES)
    check_linear(without_bias(weight), EXTREMES)


@pytest.mark.parametrize("value", [0, 1, 127, -127])
def test_rows_of_one_value(value: int, int8_kernel: int) -> None:
    weight = whole(condensed(37, 70, 9, n_active=30))
    weight.values[::2] = value
    check_exactly(weight, 5)
    dense = np.tile([[0.0], [0.1], [-3e38], [1e-38]], (1, 8))
    rows = CondensedWeight.from_dense(dense, np.ones((4, 8), np.bool_), np.arange(4.0), dtype="int8")
    assert rows.values.tolist() == [[0] * 8, [127] * 8, [-127] * 8, [0] * 8]
    y = check_linear(rows, EXTREMES[:, :8].contiguous())
    assert torch.equal(y[:, [0, 3]], torch.tensor([[0.0, 3.0]]).expand(len(y), 2))


@specials
def test_what_is_not_finite_makes_a_sample_unknown(special: float, int8_kernel: int) -> None:
    """Wherever it is: also in an input that no weight reads."""
    weight = condensed(37, 150, 3, n_active=35, dtype="int8")
    active = tensor(weight.rows).long()
    dead = torch.ones(37, dtype=torch.bool).index_fill(0, active, False)
    unread = np.setdiff1d(np.arange(150), weight.indices)
    assert len(unread) > 30
    for batch in (1, 5, 70):
        x = torch.randn(batch, 150)
        clean = check_linear(weight, x)
        for column in (0, 1, 15, 16, 64, 149, int(unread[7])):
            sample = column % batch
            changed = x.clone()
            changed[sample, column] = special
            y = check_linear(weight, changed)
            assert y[sample, active].isnan().all()
            assert torch.equal(y[sample, dead], clean[sample, dead])
            others = torch.arange(batch) != sample
            assert bits(y[others]) == bits(clean[others])


@specials
@pytest.mark.parametrize("y_feature_major", [False, True])
def test_what_is_not_finite_in_feature_major_samples(y_feature_major: bool, special: float) -> None:
    weight = condensed(37, 150, 3, n_active=35, dtype="int8")
    for batch in (1, 5, 67):
        x = torch.randn(150, batch).t()
        x[batch // 2, 149] = special
        y = check_linear(weight, x, y_feature_major=y_feature_major)
        assert y.isnan().sum() == 35


def test_zeros_do_not_hide_what_is_not_finite(int8_kernel: int) -> None:
    weight = condensed(20, 70, 9, n_active=17, dtype="int8")
    weight.values[:], weight.scales[::2] = 0, 0  # type: ignore[index]
    x = torch.randn(3, 70)
    x[1, 4] = math.inf
    assert check_linear(weight, x).isnan().sum(1).tolist() == [0, 17, 0]


@specials
@convolutions
def test_what_is_not_finite_makes_a_sample_of_a_convolution_unknown(shape: Convolution, special: float) -> None:
    """All its positions, those too that read nothing but padding."""
    weight = shape.condensed(3, n_active=shape.n - 1, dtype="int8")
    active = tensor(weight.rows).long()
    dead = torch.ones(shape.n, dtype=torch.bool).index_fill(0, active, False)
    x = shape.input(3)
    clean = check_conv(shape, weight, x)
    for position in (0, x[0].numel() // 2, x[0].numel() - 1):
        changed = x.clone()
        changed[1].view(-1)[position] = special
        y = check_conv(shape, weight, changed)
        assert y[1, active].isnan().all()
        assert torch.equal(y[1, dead], clean[1, dead])
        assert bits(y[[0, 2]]) == bits(clean[[0, 2]])


def test_no_conversion_is_out_of_range(int8_kernel: int) -> None:
    """The processor notes a conversion of what is no whole number of 32 bits as invalid."""
    libm, invalid = ctypes.CDLL("libm.so.6"), 1
    weight = condensed(20, 70, 9, n_active=17, dtype="int8")
    run_linear(weight, EXTREMES)  # which compiles
    libm.feclearexcept(invalid)
    run_linear(weight, EXTREMES)
    assert libm.fetestexcept(invalid) == 0
