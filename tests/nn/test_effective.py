"""Effective weights: values, gradients, dead neurons, copies, compilation, export and the way back."""

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import srigl_fx as sx
from srigl_fx.errors import SparsifyError
from srigl_fx.masks.records import SparseWeight, sparse_weights
from srigl_fx.nn import weight_norm
from srigl_fx.nn.effective import Masking, masked

IN, OUT = 16, 24


def standardise(w: Tensor) -> Tensor:
    dims = tuple(range(1, w.dim()))
    centred: Tensor = w - w.mean(dims, keepdim=True)
    standardised: Tensor = centred / w.std(dims, keepdim=True)
    return standardised


def l2(w: Tensor) -> Tensor:
    normed: Tensor = w / w.norm(dim=1, keepdim=True)
    return normed


class Functional(nn.Module):
    """A linear layer of its own, with a transformed weight; one subclass for each transform, so that it pickles."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(OUT, IN))
        self.bias = nn.Parameter(torch.randn(OUT))
        self.scale = nn.Parameter(torch.rand(OUT, 1) + 0.5)


class Tanh(Functional):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, torch.tanh(self.w), self.bias)


class Normed(Functional):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, l2(self.w) * self.scale, self.bias)


class InOut(Functional):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(IN, OUT))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.w - self.w.mean(0)) + self.bias


class Softmax(Functional):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w.softmax(1), self.bias)


class Dropped(Functional):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.dropout(torch.tanh(self.w), 0.5, self.training), self.bias)


class ReadsChild(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(IN, OUT)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, standardise(self.inner.weight), self.inner.bias)


class Standardisation(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return standardise(w)


class WSConv(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        y: Tensor = self._conv_forward(input, standardise(self.weight), self.bias)
        return y


def _conv() -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (4, 2, 2)), WSConv(4, OUT, 2), nn.Flatten())


def _parametrised(parametrization: nn.Module) -> nn.Module:
    return parametrize.register_parametrization(nn.Linear(IN, OUT), "weight", parametrization)


def _old_weight_norm() -> nn.Module:
    return nn.utils.weight_norm(nn.Linear(IN, OUT))


# name -> (the layer, what its effective weight is made of its stored weight)
Make = Callable[[Any, Tensor], Tensor]
LAYERS: dict[str, tuple[Callable[[], nn.Module], Make]] = {
    "weight_norm": (
        lambda: parametrizations.weight_norm(nn.Linear(IN, OUT)),
        lambda layer, v: layer.parametrizations.weight.original0 * l2(v),
    ),
    "weight_norm of all": (
        lambda: parametrizations.weight_norm(nn.Linear(IN, OUT), dim=None),  # type: ignore[arg-type]
        lambda layer, v: layer.parametrizations.weight.original0 * v / v.norm(),
    ),
    "old weight_norm": (_old_weight_norm, lambda layer, v: layer.weight_g * l2(v)),
    "standardising parametrisation": (lambda: _parametrised(Standardisation()), lambda _, w: standardise(w)),
    "softplus parametrisation": (lambda: _parametrised(nn.Softplus()), lambda _, w: F.softplus(w)),
    "tanh": (Tanh, lambda _, w: torch.tanh(w)),
    "normed": (Normed, lambda layer, w: l2(w) * layer.scale),
    "in-out": (InOut, lambda _, w: w - w.mean(0)),
    "softmax": (Softmax, lambda _, w: w.softmax(1)),
    "child": (ReadsChild, lambda _, w: standardise(w)),
    "conv": (_conv, lambda _, w: standardise(w)),
    "dropped": (Dropped, lambda _, w: torch.tanh(w)),
}
EXACT = {"weight_norm", "weight_norm of all", "old weight_norm", "tanh", "dropped"}  # zeros stay zeros

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The tensor attribute .* was assigned during export:UserWarning"),
]


def build(name: str, sparsity: float = 0.5) -> tuple[nn.Sequential, SparseWeight]:
    torch.manual_seed(0)
    layer = LAYERS[name][0]()
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.dim() == 1:
                parameter.normal_()
    model = sx.sparsify(nn.Sequential(layer), sparsity=sparsity, distribution="uniform")
    (handle,) = sparse_weights(model)
    return model, handle


def kill(handle: SparseWeight, row: int) -> None:
    with torch.no_grad():
        handle.record.site.to_matrix(handle.mask)[row] = False
        handle.weight.mul_(handle.mask)


def reference(name: str, model: nn.Sequential, handle: SparseWeight, x: Tensor, weight: Tensor) -> Tensor:
    """The output, in plain torch: the transform of ``weight``, masked."""
    effective = LAYERS[name][1](model[0], weight)
    effective = torch.where(handle.mask, effective.nan_to_num(), 0.0)
    matrix = handle.record.site.to_matrix(effective)
    bias = next(p for n, p in model.named_parameters() if n.endswith("bias"))
    return F.linear(x, matrix, bias)


@pytest.mark.parametrize("name", LAYERS)
def test_values_and_gradients_are_those_of_the_masked_function(name: str) -> None:
    model, handle = build(name)
    model.eval()
    x, cotangent = torch.randn(5, IN), torch.randn(5, OUT)
    output = model(x)
    expected = reference(name, model, handle, x, handle.weight)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    others = [p for p in model.parameters() if p is not handle.weight]
    grads = torch.autograd.grad((output * cotangent).sum(), [handle.weight, *others], allow_unused=True)
    wanted = torch.autograd.grad((expected * cotangent).sum(), [handle.weight, *others], allow_unused=True)
    torch.testing.assert_close(grads[0] * handle.mask, wanted[0] * handle.mask, rtol=1e-4, atol=1e-5)
    for grad, want in zip(grads[1:], wanted[1:], strict=True):
        assert (grad is None) == (want is None)
        if grad is not None:
            torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LAYERS)
def test_a_dead_neuron_is_zero_and_all_gradients_stay_finite(name: str) -> None:
    model, handle = build(name)
    for row in (3, 7):
        kill(handle, row)
    x = torch.randn(5, IN)
    output = model(x)
    bias = next(p for n, p in model.named_parameters() if n.endswith("bias"))
    assert torch.equal(output[:, [3, 7]], bias[[3, 7]].expand(5, 2))
    assert output[:, 4].ne(bias[4]).all()
    output.square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_compute_the_same_and_stand_alone(name: str, how: str) -> None:
    model, handle = build(name)
    kill(handle, 3)
    model.eval()
    x = torch.randn(5, IN)
    expected = model(x)  # old weight_norm leaves a computed weight behind
    if how == "pickle" and parametrize.is_parametrized(model[0]):
        with pytest.raises(RuntimeError, match="Serialization of parametrized modules"):
            pickle.dumps(model)
        assert torch.equal(model(x), expected)
        return
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(x), expected)
    assert twin.state_dict().keys() == model.state_dict().keys()
    (other,) = sparse_weights(twin)
    with torch.no_grad():
        other.mask.zero_()
        other.weight.zero_()
    assert torch.equal(model(x), expected)
    assert not torch.equal(twin(x), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_export_and_compilation_see_the_mask(name: str) -> None:
    model, handle = build(name)
    kill(handle, 3)
    x = torch.randn(5, IN)
    model.eval()
    expected = model(x)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), expected, rtol=1e-6, atol=1e-6)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", LAYERS)
def test_finalize_keeps_the_outputs_or_refuses(name: str) -> None:
    model, handle = build(name)
    kill(handle, 3)
    model.eval()
    x, names = torch.randn(5, IN), set(model.state_dict()) - {handle.mask_fqn}
    expected = model(x)
    if name in EXACT:
        sx.finalize(model)
        torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-6)
        assert set(model.state_dict()) == names
        assert not any("srigl" in key for module in model.modules() for key in vars(module))
        assert not any(type(module).__name__.startswith("Sparse") for module in model.modules())
        sx.sparsify(model, sparsity=0.5)
    else:
        state = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(SparsifyError, match="finalize would change the outputs"):
            sx.finalize(model)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert torch.equal(model(x), expected)


def test_training_mode_keeps_its_own_transform() -> None:
    model, handle = build("dropped")
    x = torch.eye(IN)
    kept = handle.mask.t()
    model.train()
    noisy = model(x) - model[0].bias
    assert not noisy[~kept].abs().gt(1e-6).any()
    share = noisy[kept].abs().gt(1e-6).double().mean()
    assert 0.3 < share < 0.7
    model.eval()
    assert (model(x) - model[0].bias)[kept].ne(0).all()


def test_the_state_dict_loads_back_and_dense_ones_are_projected() -> None:
    model, handle = build("standardising parametrisation")
    twin, other = build("standardising parametrisation", sparsity=0.25)
    assert handle.mask_fqn == "0.parametrizations.weight.original_mask"
    twin.load_state_dict(model.state_dict())
    x = torch.randn(3, IN)
    assert torch.equal(twin(x), model(x))
    dense = sx.masks.strip(model.state_dict()) | {handle.fqn: torch.randn(OUT, IN)}
    model.load_state_dict(dense)
    assert not handle.weight[~handle.mask].any()
    assert other.mask.shape == handle.mask.shape


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    transform=st.sampled_from([standardise, l2, functools.partial(torch.softmax, dim=1)]),
    dead=st.sets(st.integers(0, 5), max_size=3),
)
def test_dense_gradients_off_the_mask_and_true_ones_on_it(
    seed: int, transform: Callable[[Tensor], Tensor], dead: set[int]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(6, 8, generator=generator) < 0.5
    mask[:, 0] = True
    mask[list(dead)] = False
    weight = (torch.randn(6, 8, generator=generator, dtype=torch.float64) * mask).requires_grad_()
    cotangent = torch.randn(6, 8, generator=generator, dtype=torch.float64)
    masking = Masking(elementwise=False, zero_dims=(1,))
    live = torch.tensor([row not in dead for row in range(6)])

    def gradient(output: Tensor) -> Tensor:
        return torch.autograd.grad((output * cotangent)[live].sum(), weight, retain_graph=True)[0][live]

    plain = masked(weight, mask, transform, masking)
    dense = masked(weight, mask, transform, masking, dense_gradient=True)
    assert torch.equal(plain, dense)
    assert not plain[~mask].any()
    true = gradient(torch.where(mask, transform(weight), 0.0))
    whole = gradient(transform(weight))
    torch.testing.assert_close(gradient(plain), true)
    torch.testing.assert_close(gradient(dense), torch.where(mask[live], true, whole))
    # A dead neuron has the gradient of its effective weights.
    (grad,) = torch.autograd.grad((dense * cotangent).sum(), weight)
    torch.testing.assert_close(grad[~live], cotangent[~live])


def test_an_elementwise_transform_is_computed_once() -> None:
    calls = []

    def noisy(weight: Tensor) -> Tensor:
        calls.append(weight)
        return weight * torch.rand_like(weight)

    weight, mask = torch.randn(4, 4, requires_grad=True), torch.eye(4, dtype=torch.bool)
    masked(weight, mask, noisy, Masking(elementwise=True), dense_gradient=True)
    assert len(calls) == 1


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_weight_norm_is_that_of_torch_where_there_is_a_norm(dim: int) -> None:
    v = torch.randn(4, 6, 5, requires_grad=True)
    g = torch.norm_except_dim(v, 2, dim).detach() + 0.5
    assert torch.equal(weight_norm.weight_norm(v, g, dim), torch._weight_norm(v, g, dim))
    with torch.no_grad():
        v.select(max(dim, 0), 2).zero_()
        v.mul_(0.0 if dim == -1 else 1.0)
    cotangent = torch.randn(4, 6, 5)
    value = weight_norm.weight_norm(v, g, dim)
    (grad,) = torch.autograd.grad((value * cotangent).sum(), v)
    assert value.isfinite().all()
    assert grad.isfinite().all()
    at = torch.zeros(4, 6, 5, dtype=torch.bool)
    at.select(max(dim, 0), 2).fill_(True)
    assert not value[at].any()
    dead = at if dim != -1 else torch.ones_like(at)
    torch.testing.assert_close(grad[dead], (g * cotangent)[dead])
