"""Neurons in another order: the same function, more kept, and a word where nothing may move."""

import copy
from typing import Any

import pytest
import torch
from lowering_support import randomise
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree
from zoo import ZOO

import srigl_fx as sx
from srigl_fx.comparison import relative_error
from srigl_fx.errors import CaptureError, RuleError, SparsifyError
from srigl_fx.passes.channels.exchange import find_exchanges
from srigl_fx.passes.model_runs import run_model
from srigl_fx.reordering import Reordering, reorder_neurons


def reordered(model: nn.Module, *inputs: Any, size: int = 4) -> tuple[Reordering, nn.Module]:
    """What became of it; outputs on other inputs than the example's are the same, and parameters only moved."""
    model = randomise(model).eval()
    before = copy.deepcopy(model)
    report = reorder_neurons(model, inputs, group_size=size, sparsity=0.75)
    others = [torch.randn_like(one) if one.is_floating_point() else one for one in inputs]
    with torch.no_grad():
        torch.testing.assert_close(model(*others), before(*others), rtol=1e-4, atol=1e-5)
    for name, tensor in before.state_dict().items():
        assert torch.equal(tensor.flatten().sort().values, model.state_dict()[name].flatten().sort().values), name
    changed = {name for name, tensor in before.named_parameters() if not torch.equal(tensor, model.get_parameter(name))}
    assert {weight.name for weight in report.weights if weight.moved} <= changed
    for weight in report.weights:
        assert 0 < weight.before <= 1
        assert 0 < weight.after <= 1
    return report, model


def names(report: Reordering) -> list[str]:
    return [weight.name for weight in report.weights]


def test_hidden_units_of_an_mlp() -> None:
    model = nn.Sequential(nn.Linear(12, 32), nn.GELU(), nn.Dropout(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 8))
    report, _ = reordered(model, torch.randn(5, 12))
    assert names(report) == ["0.weight", "3.weight"]
    assert report.left == {"5.weight": "it is an output of the model"}
    assert all(weight.after > weight.before for weight in report.weights)
    assert "0.weight" in str(report)
    assert "5.weight: left as it is; it is an output of the model" in str(report)


def test_channels_between_convolutions() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16),  # depthwise
        nn.PReLU(16),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 12, 1),
        nn.Hardswish(),
        nn.Flatten(),
        nn.Linear(12 * 16, 5),
    )
    report, _ = reordered(model, torch.randn(2, 3, 8, 8))
    assert names(report) == ["0.weight", "3.weight", "6.weight"]
    assert list(report.left) == ["9.weight"]


class Residual(nn.Module):
    """A stream that is normalised over its channels, and an MLP beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(6, 16), nn.LayerNorm(16)
        self.up, self.down, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.down(functional.gelu(self.up(self.norm(x))))
        out: Tensor = self.head(x)
        return out


def test_a_stream_under_a_normalisation_stays() -> None:
    report, _ = reordered(Residual(), torch.randn(3, 6))
    assert names(report) == ["up.weight"]
    assert report.left["down.weight"] == report.left["embed.weight"]
    assert "belong together" in report.left["down.weight"]


class Gated(nn.Module):
    """SwiGLU: the halves of one layer's neurons meet one by one, and move together."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(8, 24), nn.Linear(8, 24), nn.Linear(24, 4)
        self.both, self.last = nn.Linear(4, 32), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(functional.silu(self.gate(x)) * self.up(x))
        out: Tensor = self.last(functional.glu(self.both(x)))
        return out


def test_gates_move_with_what_they_gate() -> None:
    report, model = reordered(Gated(), torch.randn(3, 8))
    assert sorted(names(report)) == ["both.weight", "down.weight", "gate.weight", "up.weight"]
    assert model.get_parameter("both.weight").shape == (32, 4)


class Parts(nn.Module):
    """What is cut apart and put together: each part keeps its own channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.left, self.right = nn.Conv2d(3, 16, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.last = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.first(x).relu().chunk(2, dim=1)
        both = torch.cat([self.left(one), self.right(other)], dim=1).relu()
        out: Tensor = self.last(functional.channel_shuffle(both, 2))
        return out


def test_parts_keep_their_own_channels() -> None:
    before = Parts()
    report, after = reordered(copy.deepcopy(before), torch.randn(2, 3, 4, 4))
    randomise(before)  # as the other one was
    assert {"first.weight", "left.weight", "right.weight"} == set(names(report))
    for half in (slice(0, 8), slice(8, 16)):
        rows = [{tuple(row) for row in m.get_parameter("first.bias")[half, None].tolist()} for m in (before, after)]
        assert rows[0] == rows[1]


class Shared(nn.Module):
    """One bias for two layers: what moves in one moves in the other."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.last = nn.Linear(6, 16, False), nn.Linear(6, 16, False), nn.Linear(16, 2)
        self.offset = nn.Parameter(torch.randn(16))
        self.last_again = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last((self.one(x) + self.offset).relu()) + self.last_again(
            (self.other(x) + self.offset).tanh()
        )
        return out


def test_what_two_layers_share_moves_once() -> None:
    report, _ = reordered(Shared(), torch.randn(3, 6))
    assert names(report) == ["one.weight", "other.weight"]


class Constant(nn.Module):
    """Channels that meet a constant of the forward, which no parameter or buffer holds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.first(x).relu() * torch.tensor([1.0, 2.0, 3.0, 4.0]))
        return out


def test_what_meets_a_constant_of_the_code_stays() -> None:
    report, _ = reordered(Constant(), torch.randn(3, 6), size=2)
    assert names(report) == []
    assert "first.weight" in report.left


class Unread(nn.Module):
    """A layer that only training uses reads the hidden units, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.auxiliary = nn.Linear(6, 16), nn.Linear(16, 2), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).relu()
        out: Tensor = self.last(hidden)
        return out + self.auxiliary(hidden) if self.training else out


def test_a_model_with_parameters_that_the_graph_does_not_read_stays() -> None:
    report, _ = reordered(Unread(), torch.randn(3, 6))
    assert not report.weights
    assert "the graph does not read auxiliary.weight" in report.left["first.weight"]


@pytest.mark.long
def test_heads_of_attention_stay() -> None:
    report, _ = reordered(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), torch.randn(2, 5, 16))
    assert names(report) == ["linear1.weight"]
    assert {"self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear2.weight"} == set(report.left)


def test_what_cannot_be_done_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2))
    for size in (0, 3, 4.0):
        with pytest.raises(RuleError, match="reorder_neurons: group_size"):
            reorder_neurons(model, (torch.randn(2, 6),), group_size=size)  # type: ignore[arg-type]
    with pytest.raises(RuleError, match="reorder_neurons: sparsity"):
        reorder_neurons(model, (torch.randn(2, 6),), group_size=4, sparsity=1.0)
    with pytest.raises(CaptureError):
        reorder_neurons(model, (torch.randn(2, 5),), group_size=4)
    assert model.training
    sx.sparsify(model, sparsity=0.5)
    with pytest.raises(SparsifyError, match="has masks already"):
        reorder_neurons(model, (torch.randn(2, 6),), group_size=4)


def test_modes_stay_and_a_model_can_be_in_training() -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 2))
    model[1].eval()
    reorder_neurons(model, (torch.randn(4, 6),), group_size=4)
    assert [part.training for part in model] == [True, False, True]


def test_an_order_that_shows_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Had the analysis a fault, the comparison finds it: here, the reader of the hidden units is forgotten."""

    def faulty(program: Any, flow: Any) -> Any:
        exchange = find_exchanges(program, flow)
        wrong = exchange.free[0]
        object.__setattr__(wrong, "axes", tuple(one for one in wrong.axes if one.axis == 0))
        return exchange

    monkeypatch.setattr("srigl_fx.reordering.find_exchanges", faulty)
    model = randomise(nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2)))
    before = copy.deepcopy(model.state_dict())
    report = reorder_neurons(model, (torch.randn(4, 6),), group_size=4)
    assert names(report) == ["2.weight"]
    assert report.left["0.weight"] == "another order of its neurons shows in the outputs"
    assert torch.equal(model.get_parameter("0.weight"), before["0.weight"])
    assert not torch.equal(model.get_parameter("2.weight"), before["2.weight"])


def test_more_is_kept_by_the_masks_that_follow() -> None:
    torch.manual_seed(0)
    kinds = (torch.rand(16, 64) < 0.2).repeat_interleave(4, 0)[torch.randperm(64)]
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    with torch.no_grad():
        model.get_parameter("0.weight").mul_(0.05 + kinds)
    kept = []
    for reorder in (False, True):
        one = copy.deepcopy(model)
        if reorder:
            report = reorder_neurons(one, (torch.randn(2, 64),), group_size=4, sparsity=0.8)
        rules: dict[Any, Any] = {"2": None}
        sx.sparsify(one, sparsity=0.8, distribution="uniform", rules=rules, group_size=4)
        sums = [float(each.get_parameter("0.weight").detach().abs().sum()) for each in (one, model)]
        kept.append(sums[0] / sums[1])
    assert kept[1] > 1.5 * kept[0]
    # The report says what the masks then do; a fan-in is rounded there, and cut off here.
    assert (report.weights[0].before, report.weights[0].after) == pytest.approx(kept, abs=0.03)


QUICK = ("nasty_varargs", "nasty_nested_seq", "nasty_groups", "nasty_fused_qkv", "nasty_tied")
# Of the others, one of each way in which channels travel: each takes twenty seconds, and liveness has tests on all.
LONG = (
    *("tv_resnet18", "tv_shufflenet_v2_x0_5", "tv_densenet", "tv_swin", "timm_mixer", "hf_bert", "hf_mixtral"),
    *("hf_t5", "hf_convnext", "nasty_mha", "nasty_fconv", "nasty_shared_twice"),
)


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.long) for name in LONG)])
@pytest.mark.filterwarnings("ignore")  # of the libraries that the models come from
def test_models_of_the_zoo_stay_the_same_function(name: str) -> None:
    entry = ZOO[name]
    torch.manual_seed(0)
    try:
        model = randomise(entry.make()).eval()
    except ImportError as error:
        pytest.skip(str(error))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    others = entry.inputs(2)
    expected = pytree.tree_leaves(run_model(model, *others))
    try:
        report = reorder_neurons(model, entry.inputs(2), group_size=4, sparsity=0.5)
    except CaptureError:  # it is not one graph
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items() if name in state)
        return
    assert "another order of its neurons shows in the outputs" not in report.left.values()
    got = pytree.tree_leaves(run_model(model, *others))
    assert all(relative_error(*pair) <= 1e-4 for pair in zip(expected, got, strict=True))
    print(f"\n{name}: {len(report.weights)} weights in another order, {len(report.left)} as they were")
