"""Gradients of the condensed operators against dense autograd, and the products that they are made of."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_support import condensed
from lowering_support import operands, random_condensed
from torch import Tensor

from srigl_fx.errors import FormatError
from srigl_fx.runtime import gradients, ops
from srigl_fx.runtime.cpu.threads import torch_threads
from srigl_fx.runtime.cpu.training_products import Pattern, pack
from srigl_fx.runtime.dense import FUNCTIONS
from srigl_fx.runtime.format import is_padding

linear = torch.ops.srigl_fx.condensed_linear
conv = torch.ops.srigl_fx.condensed_conv


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    with torch_threads(request.param):
        yield


def exact(first: Tensor, second: Tensor) -> Tensor:
    """A product in float64."""
    return (first.double() @ second.double()).float()


def check_products(mask: Tensor, x: Tensor, g: Tensor) -> None:
    """All three products of a pattern."""
    weight, bias = torch.randn(mask.shape) * mask, torch.randn(mask.shape[0])
    pattern, values = Pattern.of_mask(mask), weight[mask]
    packed, packed_gradient = pack(x), pack(g)
    for got, expected in (
        (pattern.multiply(values, packed, bias), exact(x, weight.t()) + bias),
        (pattern.multiply(values, packed), exact(x, weight.t())),
        (pattern.multiply_transposed(values, packed_gradient), exact(g, weight)),
        (pattern.value_gradient(packed, packed_gradient), exact(g.t(), x)[mask]),
    ):
        longest = max(*mask.shape, x.shape[0], 100)  # the sums' rounding errors add up like random steps
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-6 * longest**0.5)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 33), (40, 17), (33, 2100), (1030, 48)])
@pytest.mark.parametrize("batch", [0, 1, 15, 64, 67, 200])
def test_products_match_dense_ones(rows: int, columns: int, batch: int) -> None:
    mask = torch.rand(rows, columns) < 0.3
    mask[rows // 2] = False
    mask[:, columns // 2] = False
    x, g = torch.randn(batch, columns), torch.randn(batch, rows)
    check_products(mask, x, g)
    check_products(mask, x.t().contiguous().t(), torch.stack((g, g), 1)[:, 0])


@pytest.mark.long
@given(rows=st.integers(1, 40), columns=st.integers(1, 40), batch=st.integers(0, 70), density=st.floats(0, 1))
def test_products_of_any_pattern(rows: int, columns: int, batch: int, density: float) -> None:
    check_products(torch.rand(rows, columns) < density, torch.randn(batch, columns), torch.randn(batch, rows))


def test_products_carry_what_is_not_finite() -> None:
    mask = torch.zeros(20, 20, dtype=torch.bool)
    mask[3, [1, 2, 4, 5, 9]] = True
    pattern, values = Pattern.of_mask(mask), torch.ones(5)
    x, g = torch.randn(70, 20), torch.randn(70, 20)
    x[66, 2], g[65, 3] = torch.inf, torch.nan
    assert pattern.multiply(values, pack(x)).isinf().nonzero().tolist() == [[66, 3]]
    assert pattern.multiply_transposed(values, pack(g)).isnan().nonzero().tolist() == [[65, i] for i in (1, 2, 4, 5, 9)]
    assert pattern.value_gradient(pack(x), pack(g)).isfinite().tolist() == [False] * 5
    g[65, 3] = 1.0
    assert pattern.value_gradient(pack(x), pack(g)).isfinite().tolist() == [True, False, True, True, True]


def test_products_are_deterministic() -> None:
    mask = torch.rand(300, 1500) < 0.05
    pattern, x, g = Pattern.of_mask(mask), pack(torch.randn(130, 1500)), pack(torch.randn(130, 300))
    values = torch.randn(int(mask.sum()))

    def results() -> list[Tensor]:
        return [pattern.multiply(values, x), pattern.multiply_transposed(values, g), pattern.value_gradient(x, g)]

    assert all(torch.equal(a, b) for a, b in zip(results(), results(), strict=True))


@pytest.mark.parametrize("x", [torch.ones(2, 3, dtype=torch.float64), torch.ones(3), torch.ones(2, 3, device="meta")])
def test_pack_refuses(x: Tensor) -> None:
    with pytest.raises(FormatError, match="float32 matrix on the CPU"):
        pack(x)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", FUNCTIONS)
@pytest.mark.parametrize(("leading", "k"), [((0,), 2), ((3,), 20), ((2, 40), 2), ((67,), 1), ((), 3)])
def test_linear_gradients_match_dense_autograd(
    activation: str, residual: bool, leading: tuple[int, ...], k: int
) -> None:
    weight = random_condensed(19, 37, k, 4)
    values, indices, active, bias = operands(weight)
    dense = torch.from_numpy(weight.to_dense()[0])
    x, more = torch.randn(*leading, 37), torch.randn(*leading, 19)
    leaves = [leaf.requires_grad_() for leaf in (x, values, bias, more)]
    wanted = leaves if residual else leaves[:3]
    y = linear(x, values, indices, active, bias, 37, more if residual else None, activation)
    grad = torch.randn_like(y)
    got = torch.autograd.grad(y, wanted, grad)
    dense.requires_grad_()
    before = torch.nn.functional.linear(x, dense, bias)
    expected = torch.autograd.grad(
        FUNCTIONS[activation](before + more if residual else before), [x, dense, *wanted[2:]], grad
    )
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[1], expected[1][active.long()].gather(1, indices.long()), rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(got[2:], expected[2:], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [3, 100])
def test_padding_of_a_linear_layer_has_no_gradient(batch: int) -> None:
    weight = condensed(19, 37, 5, n_active=15, pattern="uneven")
    values, indices, active, bias = operands(weight)
    x, dense = torch.randn(batch, 37).requires_grad_(), torch.from_numpy(weight.to_dense()[0]).requires_grad_()
    y = linear(x, values.requires_grad_(), indices, active, bias, 37)
    grad = torch.randn_like(y)
    got = torch.autograd.grad(y, [x, values], grad)
    expected = torch.autograd.grad(torch.nn.functional.linear(x, dense, bias), [x, dense], grad)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-5)
    kept = torch.from_numpy(~is_padding(weight.indices))
    entries = expected[1][active.long()].gather(1, indices.long())
    torch.testing.assert_close(got[1], entries * kept, rtol=1e-5, atol=1e-5)
    assert not kept.all()


def test_padding_of_a_convolution_has_no_gradient() -> None:
    weight = condensed(6, 36, 5, n_active=5, pattern="uneven")
    values, indices, active, bias = operands(weight)
    x = torch.randn(2, 4, 7, 7).requires_grad_()
    dense = torch.from_numpy(weight.to_dense()[0]).reshape(6, 4, 3, 3).requires_grad_()
    y = conv(x, values.requires_grad_(), indices, active, bias, [6, 4, 3, 3], [1, 1], [1, 1], [1, 1], 1)
    grad = torch.randn_like(y)
    got = torch.autograd.grad(y, [x, values], grad)
    expected = torch.autograd.grad(torch.nn.functional.conv2d(x, dense, bias, padding=1), [x, dense], grad)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-4, atol=1e-4)
    kept = torch.from_numpy(~is_padding(weight.indices))
    entries = expected[1].reshape(6, 36)[active.long()].gather(1, indices.long())
    torch.testing.assert_close(got[1], entries * kept, rtol=1e-4, atol=1e-4)
    assert not kept.all()


def test_both_ways_are_taken() -> None:
    pattern = Pattern.of_mask(torch.rand(100, 100) < 0.1)
    assert [pattern.pays(batch) for batch in (1, 33, 64, 256)] == [False, True, True, True]
    assert not Pattern.of_mask(torch.rand(100, 100) < 0.5).pays(256)


@pytest.mark.parametrize(("batch", "k"), [(100, 2), (3, 30)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_16_bit_values(dtype: torch.dtype, batch: int, k: int) -> None:
    values, indices, active, bias = operands(random_condensed(19, 37, k, 4))
    x, grad = torch.randn(batch, 37), torch.randn(batch, 19)
    stored = values.to(dtype).requires_grad_()
    (got,) = torch.autograd.grad(linear(x, stored, indices, active, bias, 37), stored, grad)
    wide = stored.detach().float().requires_grad_()
    (expected,) = torch.autograd.grad(linear(x, wide, indices, active, bias, 37), wide, grad)
    assert got.dtype is dtype
    torch.testing.assert_close(got, expected.to(dtype))


@pytest.mark.parametrize("feature_major", [False, True])
def test_gradients_of_feature_major_activations(feature_major: bool) -> None:
    values, indices, active, bias = operands(random_condensed(19, 37, 2))
    x = torch.randn(37, 70).t().requires_grad_()
    y = linear(x, values.requires_grad_(), indices, active, bias, 37, None, "relu", True, feature_major)
    grad = torch.randn(19, 70).t()
    got = torch.autograd.grad(y, (x, values), grad)
    expected = torch.autograd.grad(
        linear(x.contiguous(), values, indices, active, bias, 37, None, "relu"), (x, values), grad
    )
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    ("activation", "residual", "transposed"), list(itertools.product(["none", "gelu"], [False, True], [False, True]))
)
def test_conv_gradients_match_dense_autograd(activation: str, residual: bool, transposed: bool) -> None:
    values, indices, active, bias = operands(random_condensed(6, 18, 5, 1))
    x = torch.randn(2, 2, 7, 6, requires_grad=True)
    settings = ([6, 2, 3, 3], [2, 1], [1, 0], [1, 1], 1)
    shape = conv(x, values, indices, active, bias, *settings, None, "none", transposed).shape
    more = torch.randn(shape, requires_grad=True)
    leaves = [x, values.requires_grad_(), bias.requires_grad_(), *([more] if residual else [])]
    y = conv(x, values, indices, active, bias, *settings, more if residual else None, activation, transposed)
    grad = torch.randn_like(y)
    got = torch.autograd.grad(y, leaves, grad)
    positions = active.long()[:, None] * 18 + indices.long()
    dense = torch.zeros(6 * 18).index_put((positions,), values).reshape(6, 18)
    before = ops.dense_conv(x, dense, bias, *settings, transposed, [])
    expected = torch.autograd.grad(FUNCTIONS[activation](before + more if residual else before), leaves, grad)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_second_derivatives_are_refused() -> None:
    values, indices, active, bias = operands(random_condensed(6, 18, 5, 1))
    x, image = torch.randn(3, 18, requires_grad=True), torch.randn(2, 2, 5, 5, requires_grad=True)
    outputs = (
        (linear(x, values, indices, active, bias, 18, None, "silu"), x),
        (conv(image, values, indices, active, bias, [6, 2, 3, 3], [1, 1], [1, 1], [1, 1], 1), image),
    )
    for y, leaf in outputs:
        with pytest.raises(FormatError, match="second derivatives are not supported"):
            torch.autograd.grad(y.sum(), leaf, create_graph=True)


def _jacobian(call: Callable[[Tensor], Tensor], at: tuple[Tensor], _: tuple[Tensor]) -> Tensor:
    return torch.func.jacfwd(call)(*at)  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")  # torch's own, in jvp
@pytest.mark.parametrize("derive", [torch.func.jvp, _jacobian])
def test_forward_mode_is_refused(derive: Callable[..., Any]) -> None:
    """torch would give zeros."""
    weight = operands(random_condensed(6, 18, 5, 1))
    calls: tuple[tuple[Callable[[Tensor], Tensor], Tensor], ...] = (
        (lambda x: linear(x, *weight, 18), torch.randn(3, 18)),
        (lambda x: conv(x, *weight, [6, 2, 3, 3], [1, 1], [1, 1], [1, 1], 1), torch.randn(2, 2, 5, 5)),
    )
    for call, x in calls:
        with pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
            derive(call, (x,), (x,))
        assert call(x).isfinite().all()


def test_gradients_follow_indices_that_change() -> None:
    values, indices, active, bias = operands(random_condensed(4, 50, 2))
    x, grad = torch.randn(64, 50), torch.randn(64, 4)
    values.requires_grad_()
    indices.copy_(torch.tensor([[0, 1]] * 4).to(indices.dtype))
    for columns in ([0, 1], [7, 9]):
        indices.copy_(torch.tensor([columns] * 4).to(indices.dtype))
        (got,) = torch.autograd.grad(linear(x, values, indices, active, bias, 50), values, grad)
        torch.testing.assert_close(got, (grad.t() @ x)[active.long()][:, columns])


def test_patterns_live_as_long_as_their_indices() -> None:
    before = len(gradients._patterns)
    weight = operands(random_condensed(4, 50, 2))
    x = torch.randn(64, 50, requires_grad=True)
    linear(x, *weight, 50).sum().backward()
    assert len(gradients._patterns) == before + 1
    del weight, x
    assert len(gradients._patterns) == before


def test_a_lowered_layer_is_fine_tuned() -> None:
    torch.manual_seed(0)
    values, indices, active, bias = operands(random_condensed(8, 40, 3))
    target, x = linear(torch.eye(40), values + 1, indices, active, bias, 40), torch.eye(40)
    parameters = [torch.nn.Parameter(values), torch.nn.Parameter(bias)]
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    for _ in range(30):
        optimizer.zero_grad()
        (linear(x, parameters[0], indices, active, parameters[1], 40) - target).square().sum().mul(0.5).backward()
        optimizer.step()
        with torch.no_grad():
            parameters[1].copy_(bias)
    np.testing.assert_allclose(parameters[0].detach(), values + 1, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 20])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.Adagrad])
def test_fused_optimizers_are_followed(optimizer: Callable[..., torch.optim.Optimizer], batch: int) -> None:
    """They write to the values without counting it."""
    weight = random_condensed(37, 70, 9, 30)
    values, indices, active, bias = operands(weight)
    parameter, x = torch.nn.Parameter(values), torch.randn(batch, 70)
    stepping = optimizer([parameter], lr=0.1, fused=True)
    for _ in range(3):
        stepping.zero_grad()
        linear(x, parameter, indices, active, bias, 70).square().mean().backward()
        stepping.step()
        with torch.no_grad():
            expected = linear(x, parameter.detach().clone(), indices, active, bias, 70)
            torch.testing.assert_close(linear(x, parameter, indices, active, bias, 70), expected)
            parameter.requires_grad_(False)
            torch.testing.assert_close(linear(x, parameter, indices, active, bias, 70), expected)
            parameter.requires_grad_()
