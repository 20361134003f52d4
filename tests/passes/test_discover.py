"""One small module for each rule of discovery."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import srigl_fx as sx
from srigl_fx.errors import SparsifyError
from srigl_fx.passes.base import run
from srigl_fx.passes.discover import Discover
from srigl_fx.passes.draft import Draft, Finding


def discover(model: nn.Module, example_inputs: object = None) -> dict[str, Finding]:
    return {f.site.fqn: f for f in run((Discover(example_inputs),), Draft(model)).subject.findings}


class Functional(nn.Module):
    """Owns one (8, 16) parameter and uses it as the test says."""

    def __init__(self, use: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...] = (8, 16)) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(shape))
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(x, self.w)


@pytest.mark.parametrize(
    ("module", "kind", "matrix_shape"),
    [
        (nn.Linear(6, 4), "linear", (4, 6)),
        (nn.Conv1d(4, 8, 3), "conv1d", (8, 12)),
        (nn.Conv2d(4, 8, 3, groups=2), "conv2d", (8, 18)),
        (nn.Conv3d(2, 4, 3), "conv3d", (4, 54)),
        (nn.ConvTranspose1d(4, 6, 3), "conv_transpose1d", (6, 12)),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), "conv_transpose2d", (6, 18)),
        (nn.ConvTranspose3d(4, 2, 2), "conv_transpose3d", (2, 32)),
    ],
)
def test_registered_types(module: nn.Module, kind: str, matrix_shape: tuple[int, int]) -> None:
    site = discover(nn.Sequential(module))["0.weight"].site
    assert (site.kind, site.matrix_shape) == (kind, matrix_shape)
    values = torch.randn(site.shape)
    assert torch.equal(site.from_matrix(site.to_matrix(values)), values)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_matrix_view_of_a_transposed_convolution_has_one_row_an_output_channel(groups: int) -> None:
    module = nn.ConvTranspose2d(8, 12, 3, groups=groups, bias=False)
    site = discover(nn.Sequential(module))["0.weight"].site
    matrix = torch.ones(site.matrix_shape)
    matrix[5] = 0
    with torch.no_grad():
        module.weight.copy_(site.from_matrix(matrix))
        y = module(torch.rand(1, 8, 4, 4) + 1)
    assert (y.amax((0, 2, 3)) == 0).nonzero().flatten().tolist() == [5]


def test_packed_attention_is_one_weight_with_three_blocks() -> None:
    found = discover(nn.MultiheadAttention(8, 2))
    assert [(b.name, b.start, b.stop, b.ablatable) for b in found["in_proj_weight"].site.blocks] == [
        ("q", 0, 8, False),
        ("k", 8, 16, False),
        ("v", 16, 24, False),
    ]
    assert found["out_proj.weight"].site.kind == "linear"


def test_separate_attention_projections_are_three_weights() -> None:
    found = discover(nn.MultiheadAttention(8, 2, kdim=6, vdim=4))
    shapes = {name: found[f"{name}_proj_weight"].site.matrix_shape for name in "qkv"}
    assert shapes == {"q": (8, 8), "k": (8, 6), "v": (8, 4)}
    assert not any(found[f"{name}_proj_weight"].site.blocks[0].ablatable for name in "qkv")


@pytest.mark.parametrize(
    ("use", "kind"),
    [
        (lambda x, w: F.linear(x, w), "linear"),
        (lambda x, w: x @ w.t(), "linear"),
        (lambda x, w: x @ w.T, "linear"),
        (lambda x, w: torch.matmul(x, w.transpose(0, 1)), "linear"),
        (lambda x, w: x.matmul(w.permute(1, 0).contiguous()), "linear"),
        (lambda x, w: w @ x, "linear"),
        (lambda x, w: x @ w, "linear_in_out"),
        (lambda x, w: torch.addmm(x, x, w), "linear_in_out"),
        (lambda x, w: F.linear(x, w.t()), "linear_in_out"),
        (lambda x, w: F.linear(x, w.to(torch.float32)), "linear"),
    ],
)
def test_functional_uses_of_an_own_parameter(use: Callable[[Tensor, Tensor], Tensor], kind: str) -> None:
    assert discover(Functional(use))["w"].site.kind == kind


@pytest.mark.parametrize(
    ("use", "reason", "reached"),
    [
        (lambda x, w: F.linear(x, torch.linalg.qr(w)[0]), "qr", False),
        (lambda x, w: x + w, "not a contraction weight", True),
        (lambda x, w: F.linear(w, x), "not a contraction weight", True),
        (lambda x, w: F.embedding(x, w), "looked up", True),
        (lambda x, w: torch.einsum("bi,oi->boi", x, w), "element by element", False),
        (lambda x, w: F.linear(x, w) + x @ w, "different layouts", False),
        (lambda x, w: F.linear(x, torch.from_numpy(w.numpy())), "cannot be traced by torch.fx", False),
    ],
)
def test_uses_that_keep_a_weight_dense(use: Callable[[Tensor, Tensor], Tensor], reason: str, reached: bool) -> None:
    finding = discover(Functional(use))["w"]
    assert reason in finding.reason
    assert finding.reached is reached


def test_a_subclass_with_its_own_forward_is_looked_at_and_not_trusted() -> None:
    class Transposed(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return input @ self.weight

    class Renamed(nn.Linear):
        pass

    assert discover(nn.Sequential(Transposed(4, 4)))["0.weight"].site.kind == "linear_in_out"
    assert discover(nn.Sequential(Renamed(4, 4)))["0.weight"].site.kind == "linear"


def test_a_weight_read_by_the_parent_is_found_in_the_parents_graph() -> None:
    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.holder = nn.Module()
            self.holder.kernel = nn.Parameter(torch.randn(8, 4))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.holder.kernel)  # type: ignore[arg-type]

    finding = discover(nn.Sequential(Parent()))["0.holder.kernel"]
    assert (finding.site.kind, finding.reason) == ("linear", "")


def test_tied_linear_layers_are_one_weight() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    found = discover(model)
    assert list(found) == ["0.weight"]
    assert found["0.weight"].site.aliases == ("1.weight",)


def test_a_weight_tied_with_an_embedding_stays_dense() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(9, 4), "head": nn.Linear(4, 9, bias=False)})
    model["head"].weight = model["embedding"].weight
    assert "tied with an embedding" in discover(model)["embedding.weight"].reason


def test_depthwise_convolutions_stay_dense_and_grouped_ones_do_not() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 4, 3, groups=4), nn.ConvTranspose2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 3, groups=2)
    )
    found = discover(model)
    assert "depthwise" in found["0.weight"].reason
    assert "depthwise" in found["1.weight"].reason
    assert found["2.weight"].reason == ""


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_an_empty_weight_stays_dense_and_is_not_made_up_for() -> None:
    model = nn.ModuleList([nn.Linear(8, 16), nn.Linear(0, 3), nn.Conv2d(4, 4, 3, groups=4)])
    found = {name: (finding.reason, finding.compensated) for name, finding in discover(model).items()}
    assert found == {
        "0.weight": ("", False),
        "1.weight": ("an empty weight of shape (3, 0)", False),
        "2.weight": ("depthwise convolution: its fan-in is the kernel alone", True),
    }
    sx.sparsify(model, sparsity=0.5, distribution="uniform")
    assert [name for name, _ in sx.masks.named_masks(model)] == ["0.weight"]


def test_looking_changes_nothing() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4))
            self.calls = 0
            self.seen: Tensor
            self.register_buffer("seen", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.seen = self.seen + 1
            return F.linear(x + torch.rand(1), self.w)

    model = Counting()
    before, state = model.state_dict(), torch.random.get_rng_state()
    discover(model)
    assert model.calls == 0
    assert model.state_dict().keys() == before.keys()
    assert isinstance(model.seen, Tensor)
    assert not isinstance(model.seen, fx.Proxy)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_graph_module_names_the_nodes_of_each_weight() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 4))
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.fc(x), self.w) + F.linear(self.fc(x), self.w)

    found = discover(fx.symbolic_trace(Net()))
    assert found["w"].site.nodes == ("linear", "linear_1")
    assert found["fc.weight"].site.nodes == ("fc", "fc_1")


def test_an_exported_graph_is_understood_too() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 5))
    exported = torch.export.export(model, (torch.randn(2, 3, 8, 8),)).module()
    kinds = {name: finding.site.kind for name, finding in discover(exported).items()}
    assert kinds == {"0.weight": "conv2d", "2.weight": "linear"}


def test_a_lazy_module_must_have_run() -> None:
    with pytest.raises(SparsifyError, match=r"'0.weight'.*run the model once"):
        discover(nn.Sequential(nn.LazyLinear(4)))


def test_the_census_finds_what_feeds_the_outputs_whatever_the_order_of_registration() -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 3)
            self.other = nn.Linear(8, 2, bias=False)
            self.body = nn.Linear(4, 8, bias=False)
            self.norm = nn.BatchNorm1d(8)

        def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
            hidden = self.norm(self.body(x)).relu()
            return {"a": self.head(hidden).softmax(-1) * scale, "b": self.other(hidden)}

    model = TwoHeads()
    model.other.weight.requires_grad_(False)
    running = model.norm.get_buffer("running_mean").clone()
    found = discover(model, ((torch.randn(3, 4),), {"scale": 2.0}))
    feeding = {name: finding.site.feeds_output for name, finding in found.items()}
    assert feeding == {"head.weight": True, "other.weight": True, "body.weight": False}
    assert model.training
    assert not model.other.weight.requires_grad
    assert torch.equal(model.norm.get_buffer("running_mean"), running)


def test_example_inputs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(SparsifyError, match="does not run on the example inputs"):
        discover(nn.Sequential(nn.Linear(4, 2)), (torch.randn(3, 5),))


def test_a_tied_head_is_the_last_contraction_though_it_stays_dense() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(9, 4), "fc": nn.Linear(4, 4), "head": nn.Linear(4, 9, bias=False)})
    model["head"].weight = model["embedding"].weight
    finding = discover(model)["embedding.weight"]
    assert (finding.site.kind, finding.compensated) == ("linear", False)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
def test_a_scripted_child_is_opaque_and_keeps_its_record() -> None:
    model = nn.Sequential(nn.Linear(32, 32), torch.jit.script(nn.Linear(32, 32)))
    finding = discover(model)["1.weight"]
    assert "scripted" in finding.reason
    assert not finding.reached
    sx.sparsify(model, sparsity=0.5)
    assert [row.status for row in sx.summary(model).rows] == ["masked (dense compute)", "dense"]
