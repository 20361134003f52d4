"""Which transformed weights become sites, of which kind, and why others stay dense."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import srigl_fx as sx
from srigl_fx.errors import SparsifyError
from srigl_fx.masks.records import sparse_weights
from srigl_fx.passes.discover import Discover
from srigl_fx.passes.draft import Draft, Finding

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")


def discover(model: nn.Module, example_inputs: Any = None) -> dict[str, Finding]:
    draft = Discover(example_inputs).run(Draft(model)).subject
    return {finding.site.fqn: finding for finding in draft.findings}


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.sign()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


rounded: Callable[[Tensor], Tensor] = Rounded.apply


class Binary(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return rounded(w)


class Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).transpose(-1, -2)


class LowRank(nn.Module):
    """As adapters do it: a second, dense, weight beside the first."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(8, 2))
        self.b = nn.Parameter(torch.randn(2, 8))

    def forward(self, w: Tensor) -> Tensor:
        return w + self.a @ self.b


class Holder(nn.Module):
    def __init__(self, use: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 8))
        self.gain = nn.Parameter(torch.rand(8, 1) + 0.5)
        self.a = nn.Parameter(torch.randn(8, 2))
        self.b = nn.Parameter(torch.randn(2, 8))
        self.squash = nn.Tanh()
        fake_quantize: Any = torch.ao.quantization.FakeQuantize
        self.quantise = fake_quantize()
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x)


def parametrised(parametrization: nn.Module) -> nn.Module:
    return parametrize.register_parametrization(nn.Linear(8, 8), "weight", parametrization)


@pytest.mark.parametrize(
    ("use", "kind", "elementwise", "zero_dims"),
    [
        (lambda m, x: F.linear(x, torch.tanh(m.w)), "linear", True, ()),
        (lambda m, x: F.linear(x, m.squash(m.w)), "linear", True, ()),
        (lambda m, x: F.linear(x, m.quantise(m.w)), "linear", True, ()),
        (lambda m, x: F.linear(x, m.w + (m.w.round() - m.w).detach()), "linear", True, ()),
        (lambda m, x: F.linear(x, torch.where(m.w.abs() > 0.5, m.w, 0.0)), "linear", True, ()),
        (lambda m, x: F.linear(x, m.gain * F.normalize(m.w, dim=1)), "linear", False, (1,)),
        (lambda m, x: F.linear(x, m.w / m.w.norm()), "linear", False, (1,)),
        (lambda m, x: x @ (m.w / m.w.std(0)), "linear_in_out", False, (0,)),
        (lambda m, x: x @ F.layer_norm(m.w, (8,)).t(), "linear", False, (1,)),
        (lambda m, x: F.linear(x, m.w.softmax(1)), "linear", False, ()),
        (lambda m, x: torch.einsum("bi,oi->bo", x, m.w - m.w.mean(1, keepdim=True)), "einsum", False, (1,)),
        (lambda m, x: F.linear(x, (m.w.view(m.w.size(0), -1) + 1).view_as(m.w)), "linear", True, ()),
        (lambda m, x: F.linear(x, m.w + torch.randn_like(m.w) if m.training else m.w), "linear", True, ()),
        (lambda m, x: F.conv2d(x, m.w.view(8, 8, 1, 1).tanh()), "", True, ()),
    ],
)
def test_transforms_that_are_masked(
    use: Callable[[Any, Tensor], Tensor], kind: str, elementwise: bool, zero_dims: tuple[int, ...]
) -> None:
    finding = discover(Holder(use))["w"]
    if not kind:  # one value for each, but not of the weight's shape
        assert "not of its shape" in finding.reason
        return
    assert finding.reason == ""
    assert finding.site.kind == kind
    (transform,) = finding.transforms
    for masking in (transform.evaluation, transform.training):
        assert (masking.elementwise, masking.zero_dims) == (elementwise, zero_dims)


def no_grad_scale(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = m.w.abs().max()
    return F.linear(x, torch.tanh(m.w / scale))


@pytest.mark.parametrize(
    ("use", "reason"),
    [
        (lambda m, x: F.linear(x, m.w + m.a @ m.b), "made of two weights, the other one is 'a'"),
        (lambda m, x: F.linear(x, torch.matrix_exp(m.w)), "matrix_exp does not keep each value in its place"),
        (lambda m, x: F.linear(x, m.w.triu() + m.w.triu(1).t()), "triu does not keep each value in its place"),
        (lambda m, x: F.linear(x, m.w + m.w.swapaxes(0, 1)), "combines values of different places"),
        (lambda m, x: F.linear(x, m.w.t().reshape(-1).tanh().reshape(8, 8).t()), "reshape does not keep each value"),
        (lambda m, x: F.linear(x, rounded(m.w)), "a gradient of its own"),
        (no_grad_scale, "no_grad"),
        (lambda m, x: F.linear(x, m.w / m.w.norm(dim=0)), "divides by zero where inputs are pruned"),
        (lambda m, x: F.linear(x, m.w.tanh()) + x @ m.w.exp(), "no one value that takes its place"),
    ],
)
def test_transforms_that_cannot_be_masked_stay_dense(use: Callable[[Any, Tensor], Tensor], reason: str) -> None:
    finding = discover(Holder(use))["w"]
    assert reason in finding.reason
    assert not finding.reached


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (lambda: parametrizations.weight_norm(nn.Linear(8, 8)), "parametrizations.weight.original1"),
        (
            lambda: parametrizations.weight_norm(nn.Conv1d(8, 8, 3, groups=2), dim=2),
            "parametrizations.weight.original1",
        ),
        (lambda: parametrizations.spectral_norm(nn.Conv2d(8, 8, 3)), "parametrizations.weight.original"),
        (lambda: nn.utils.weight_norm(nn.ConvTranspose1d(8, 8, 3)), "weight_v"),
        (lambda: nn.utils.spectral_norm(nn.Linear(8, 8)), "weight_orig"),
        (lambda: parametrised(nn.Softplus()), "parametrizations.weight.original"),
        (lambda: parametrised(Binary()), "parametrizations.weight.original"),
    ],
)
def test_parametrised_weights_are_of_their_modules_kind(layer: Callable[[], nn.Module], name: str) -> None:
    plain = {nn.Linear: "linear", nn.Conv1d: "conv1d", nn.Conv2d: "conv2d", nn.ConvTranspose1d: "conv_transpose1d"}
    module = layer()
    found = discover(nn.ModuleDict({"layer": module}))
    finding = found.pop(f"layer.{name}")
    assert finding.reason == ""
    assert finding.site.kind == next(kind for cls, kind in plain.items() if isinstance(module, cls))
    assert finding.site.groups == getattr(module, "groups", 1)
    assert finding.owner is module  # so that rules by type meet it
    assert all(other.reached and "not a contraction weight" in other.reason for other in found.values())


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (
            lambda: parametrizations.orthogonal(nn.Linear(8, 8)),
            "come from Orthogonal, which fills pruned weights again",
        ),
        (lambda: parametrised(Symmetric()), "come from Symmetric, which fills pruned weights again: triu"),
        (lambda: parametrised(LowRank()), "the other one is '0.parametrizations.weight.0.a'"),
    ],
)
def test_parametrisations_that_fill_pruned_weights_stay_dense(layer: Callable[[], nn.Module], reason: str) -> None:
    model = nn.Sequential(layer(), nn.Linear(8, 8))
    finding = discover(model)["0.parametrizations.weight.original"]
    assert reason in finding.reason
    sx.sparsify(model, sparsity=0.5)
    assert [handle.fqn for handle in sparse_weights(model)] == ["1.weight"]
    with pytest.raises(SparsifyError, match="strict=True"):
        sx.sparsify(sx.finalize(model), sparsity=0.5, strict=True)


class ReadsOthers(nn.Module):
    """Reads computed weights of its children and its own by function."""

    def __init__(self) -> None:
        super().__init__()
        self.new = parametrizations.weight_norm(nn.Linear(8, 8))
        self.old = nn.utils.weight_norm(nn.Linear(8, 8))
        self.w = nn.Parameter(torch.randn(8, 8))
        parametrizations.spectral_norm(self, "w")

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = F.linear(x, self.new.weight) + x @ self.w + self.old(x)
        return y


@pytest.mark.parametrize("with_inputs", [False, True])
def test_computed_weights_read_by_function(with_inputs: bool) -> None:
    found = discover(ReadsOthers(), (torch.randn(2, 8),) if with_inputs else None)
    kinds = {name: finding.site.kind for name, finding in found.items() if not finding.reason}
    assert kinds == {
        "new.parametrizations.weight.original1": "linear",
        "old.weight_v": "linear",
        "parametrizations.w.original": "linear_in_out",
    }


def test_a_gain_is_no_weight() -> None:
    finding = discover(Holder(lambda m, x: F.linear(x, m.gain.view(-1, 1) * F.normalize(m.w, dim=1))))["gain"]
    assert finding.reason == "not a contraction weight: it scales or shifts the weight 'w'"


def test_rules_and_distributions_cover_parametrised_layers() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(16, 16)), nn.Linear(16, 16), WSConv(2, 2, 2))
    sx.sparsify(model, sparsity=0.5, rules={nn.Linear: 0.75, "2": 0.5})
    density = {handle.fqn: float(handle.mask.float().mean()) for handle in sparse_weights(model)}
    assert density == {"0.parametrizations.weight.original1": 0.25, "1.weight": 0.25, "2.weight": 0.5}


class WSConv(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        w = self.weight
        y: Tensor = self._conv_forward(input, (w - w.mean((1, 2, 3), keepdim=True)).tanh(), self.bias)
        return y


def test_shared_weights_that_one_of_several_modules_transforms() -> None:
    first, second, plain = WSConv(4, 4, 2), WSConv(4, 4, 2), nn.Conv2d(4, 4, 2)
    second.weight = first.weight
    found = discover(nn.Sequential(first, second))["0.weight"]
    assert found.reason.endswith("modules share it, and the one that transforms it is not the first of them")
    plain.weight = first.weight = nn.Parameter(torch.randn(4, 4, 2, 2))
    assert discover(nn.Sequential(plain, first))["0.weight"].reason
    found = discover(nn.Sequential(first, first, plain))["0.weight"]
    assert found.reason == ""
    assert len(found.transforms) == 1
    model = sx.sparsify(nn.Sequential(first, plain), sparsity=0.5)
    with torch.no_grad():
        model[0].weight_mask[1] = False  # type: ignore[operator]
        sx.masks.apply(model)
    y = first(torch.randn(2, 4, 3, 3))
    assert first.bias is not None
    assert torch.equal(y[:, 1], first.bias[1].expand(2, 2, 2))


def test_nothing_is_run_on_the_users_module_while_it_is_looked_at() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 8))
            self.register_buffer("count", torch.zeros(()))
            self.mode = "fresh"

        def forward(self, x: Tensor) -> Tensor:
            self.mode = "used"
            return F.linear(x, self.w.tanh())

    model = Counts()
    finding = discover(model)["w"]
    assert "writes to 'mode'" in finding.reason
    assert model.mode == "fresh"


TURNED: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {  # and back; whether it is element by element
    "swapaxes": (lambda w: torch.swapaxes(torch.tanh(w.swapaxes(0, 1)), 1, 0), True),
    "t": (lambda w: (w.t() * 2).t(), True),
    "T": (lambda w: (w.T * 2).T, True),
    "mT": (lambda w: (w.mT / 2).mT, True),
    "transpose": (lambda w: w.transpose(0, -1).exp().transpose(-2, -1), True),
    "moveaxis": (lambda w: torch.moveaxis(torch.moveaxis(w, 0, 1) * 3, 0, 1), True),
    "permute, with a norm": (lambda w: (w.permute(1, 0) / (1 + w.permute(1, 0).norm(dim=0))).permute(1, 0), False),
}


class Turned(nn.Module):
    def __init__(self, transform: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.transform = transform

    def forward(self, w: Tensor) -> Tensor:
        return self.transform(w)


@pytest.mark.parametrize("name", TURNED)
@pytest.mark.parametrize("shape", [(8, 8), (6, 8)])
def test_a_transform_may_change_axes_and_change_them_back(name: str, shape: tuple[int, int]) -> None:
    transform, elementwise = TURNED[name]
    layer = nn.Linear(shape[1], shape[0])
    parametrize.register_parametrization(layer, "weight", Turned(transform))
    (finding,) = discover(nn.Sequential(layer, nn.ReLU())).values()
    assert finding.reason == ""
    assert finding.transforms[0].evaluation.elementwise == elementwise
    model = nn.Sequential(layer, nn.ReLU())
    sx.sparsify(model, sparsity=0.5)
    (handle,) = sparse_weights(model)
    expected = transform(handle.weight.detach() * handle.mask) * handle.mask
    torch.testing.assert_close(layer.weight.detach(), expected)


def test_a_transform_that_returns_a_square_weight_turned_is_none() -> None:
    layer = nn.Linear(8, 8)
    parametrize.register_parametrization(layer, "weight", Turned(lambda w: w.swapaxes(0, 1) * 2))
    with pytest.raises(SparsifyError, match="its axes change places"):
        sx.sparsify(nn.Sequential(layer), sparsity=0.5)
