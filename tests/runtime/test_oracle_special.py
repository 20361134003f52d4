"""NaN, infinities, huge and denormal numbers in the condensed operators: as the oracle, which reads kept inputs only.

Values of eight bits have another rule, and a file of their own, ``test_oracle_int8_special.py``.
Run as they are for this CPU's best instruction set, and by ``test_oracle_isas.py`` for each of them.
"""

import math

import numpy as np
import pytest
import torch
from kernel_support import (
    ACTIVATIONS,
    PATTERNS,
    Convolution,
    check_conv,
    check_linear,
    condensed,
    operands,
    tensor,
)
from torch import Tensor

from srigl_fx.runtime.format import CondensedWeight, ValueDtype
from srigl_fx.runtime.value_types import FLOATS

dtypes = pytest.mark.parametrize("dtype", FLOATS)
specials = pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
batches = pytest.mark.parametrize("batch", [1, 5, 16, 24, 70])
CONVOLUTIONS = {
    "1d": Convolution(kernel=(3,), size=(11,), padding=(1,)),
    "2d": Convolution(padding=(1, 1), size=(5, 6)),
    "2d strided": Convolution(groups=2, stride=(2, 1), dilation=(1, 2), padding=(1, 2), size=(6, 5)),
    "2d pointwise": Convolution(kernel=(1, 1), size=(4, 8)),
    "3d": Convolution(kernel=(2, 2, 2), padding=(1, 0, 1), size=(3, 4, 3)),
    "2d transposed": Convolution(padding=(1, 1), stride=(2, 1), output_padding=(1, 0), size=(4, 5), transposed=True),
}
convolutions = pytest.mark.parametrize("shape", CONVOLUTIONS.values(), ids=CONVOLUTIONS)


def unread(weight: CondensedWeight) -> Tensor:
    """The inputs that no kept weight meets."""
    return torch.from_numpy(np.setdiff1d(np.arange(weight.in_features), weight.indices))


@dtypes
@specials
@batches
def test_every_input_of_a_linear_layer(batch: int, special: float, dtype: ValueDtype) -> None:
    weight = condensed(37, 150, 3, n_active=35, dtype=dtype)
    touched = torch.zeros(37, 150, dtype=torch.bool)
    touched[tensor(weight.rows).long()[:, None], tensor(weight.row_indices).long()] = True
    columns = range(150) if batch in (1, 24) else range(0, 150, 7)
    for column in columns:
        x = torch.randn(batch, 150)
        x[column % batch, column] = special
        y = check_linear(weight, x)
        assert torch.equal(~y[column % batch].isfinite(), touched[:, column])
        assert y.isfinite().sum() == y.numel() - touched[:, column].sum()


@dtypes
@batches
@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_only_pruned_weights_meet_is_never_read(pattern: str, batch: int, dtype: ValueDtype) -> None:
    weight = condensed(19, 200, 5, n_active=17, dtype=dtype, pattern=pattern)
    x = torch.randn(batch, 200)
    y = check_linear(weight, x)
    for special in (math.nan, math.inf):
        x[:, unread(weight)] = special
        for same in (x, x.t().contiguous().t()):
            torch.testing.assert_close(check_linear(weight, same), y, rtol=1e-6, atol=1e-6)


@batches
def test_samples_do_not_touch_each_other(batch: int) -> None:
    weight = condensed(20, 60, 9)
    x = torch.randn(batch, 60)
    y = check_linear(weight, x)
    x[batch // 2] = math.nan
    with_nan = check_linear(weight, x)
    others = torch.arange(batch) != batch // 2
    assert with_nan[batch // 2].isnan().all()
    torch.testing.assert_close(with_nan[others], y[others], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("batch", [1, 5, 40])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_through_the_epilogue(activation: str, batch: int) -> None:
    weight = condensed(37, 40, 4, n_active=30)
    for special in (math.nan, math.inf, -math.inf):
        x = torch.randn(batch, 40)
        x[batch // 2, 7] = special
        check_linear(weight, x, activation=activation)
        residual = torch.randn(batch, 37)
        residual[0, ::3] = special
        check_linear(weight, torch.randn(batch, 40), residual=residual, activation=activation)
        check_linear(weight, x, residual=residual, activation=activation)


@batches
def test_infinities_that_meet_are_not_a_number(batch: int) -> None:
    weight = condensed(20, 8, 8)
    x = torch.randn(batch, 8)
    x[:, 0], x[:, 5] = math.inf, -math.inf
    check_linear(weight, x)
    weight.values[:, 3] = 0  # a kept weight of zero reads its input all the same
    x = torch.randn(batch, 8)
    x[:, 3] = math.inf
    assert check_linear(weight, x).isnan().all()


@dtypes
@batches
def test_weights_and_biases_that_are_not_finite(batch: int, dtype: ValueDtype) -> None:
    for special in (math.nan, math.inf, -math.inf):
        weight = condensed(20, 50, 6, n_active=18, dtype=dtype)
        weight.values[3, 2] = special
        weight.bias[1] = special
        y = check_linear(weight, torch.randn(batch, 50))
        assert (~y.isfinite()).sum() == 2 * batch
        x = torch.randn(batch, 50)
        x[:, weight.indices[3, 2]] = 0  # zero times infinity
        check_linear(weight, x)


@dtypes
@batches
def test_huge_and_denormal_numbers(batch: int, dtype: ValueDtype) -> None:
    weight = condensed(37, 60, 7, n_active=33, dtype=dtype)
    x = torch.randn(batch, 60)
    for scale in (1e30, 1e-30, 1e-38, 1e-41):
        check_linear(weight, x * scale)
    info = torch.finfo(operands(weight)[0].dtype)
    smallest = info.tiny * info.eps
    for special in (info.max, -info.max, info.tiny, -info.tiny, info.tiny / 2, smallest, -3 * smallest, 0.0, -0.0):
        weight.values[:] = special
        weight.values[:, ::2] *= 0.5
        # Of one sign, as the order of the sum decides whether one of both signs overflows on its way.
        check_linear(weight, x.abs())
        check_linear(weight, x.abs() * 0.1)


@batches
def test_every_value_of_sixteen_bits(batch: int) -> None:
    """Each finite value, denormal ones too, reaches the result exactly."""
    patterns = np.arange(2**16, dtype=np.uint16)
    for dtype in ("float16", "bfloat16"):
        values = tensor(patterns.view(np.int16)).view(getattr(torch, dtype))
        values = values[values.isfinite()]
        indices = torch.zeros(len(values), 1, dtype=torch.uint16)
        active, bias = torch.arange(len(values), dtype=torch.int32), torch.zeros(len(values))
        y = torch.ops.srigl_fx.condensed_linear(
            torch.ones(batch, 1), values[:, None].contiguous(), indices, active, bias, 1
        )
        assert torch.equal(y, values.float().expand(batch, -1))


@specials
@convolutions
def test_every_input_of_a_convolution(shape: Convolution, special: float) -> None:
    weight = shape.condensed(3, n_active=shape.n - 1)
    x = torch.randn(2, shape.channels, *shape.size)
    clean = check_conv(shape, weight, x)
    for position in range(0, x.numel(), 1 if x[0].numel() < 60 else 3):
        changed = x.clone()
        changed.view(-1)[position] = special
        y = check_conv(shape, weight, changed)
        finite = y.isfinite()
        torch.testing.assert_close(y[finite], clean[finite], rtol=1e-6, atol=1e-6)


@dtypes
@convolutions
def test_channels_that_only_pruned_weights_meet(shape: Convolution, dtype: ValueDtype) -> None:
    taps = math.prod(shape.kernel)
    weight = shape.condensed(1, n_active=shape.n - 1, dtype=dtype, pattern="first")
    x = shape.input(2)
    y = check_conv(shape, weight, x)
    group = shape.channels // shape.groups
    dead = [channel for channel in range(shape.channels) if channel % group not in set(weight.indices.ravel() // taps)]
    assert dead
    for special in (math.nan, math.inf):
        x[:, dead] = special
        torch.testing.assert_close(check_conv(shape, weight, x), y, rtol=1e-6, atol=1e-6)


@convolutions
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_convolution_through_the_epilogue(activation: str, shape: Convolution) -> None:
    weight = shape.condensed(3, n_active=shape.n - 1)
    for special in (math.nan, math.inf, -math.inf):
        x = shape.input(2)
        y = check_conv(shape, weight, x, activation=activation)
        residual = torch.randn(y.shape)
        residual.view(-1)[::5] = special
        check_conv(shape, weight, x, residual=residual, activation=activation)
        x.view(-1)[::11] = special
        check_conv(shape, weight, x, activation=activation)


@dtypes
@convolutions
def test_huge_and_denormal_numbers_in_a_convolution(shape: Convolution, dtype: ValueDtype) -> None:
    weight = shape.condensed(3, n_active=shape.n - 1, dtype=dtype)
    x = shape.input(2)
    for scale in (1e30, 1e-30, 1e-38, 1e-41):
        check_conv(shape, weight, x * scale)
    info = torch.finfo(operands(weight)[0].dtype)
    for special in (info.max, info.tiny, info.tiny * info.eps, 3 * info.tiny * info.eps, 0.0):
        weight.values[:] = special
        check_conv(shape, weight, x.abs())
