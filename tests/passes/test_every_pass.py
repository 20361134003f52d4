"""What holds for every pass of the lowering pipeline, on graphs that are awkward in as many ways as possible."""

import functools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lowering_support import mask_by_hand, randomise
from torch import Tensor, fx, nn

from srigl_fx.errors import PassError
from srigl_fx.passes.arrange_samples import ArrangeSamples
from srigl_fx.passes.base import Pass, PassResult, run
from srigl_fx.passes.capture import capture
from srigl_fx.passes.condense import Condense
from srigl_fx.passes.feature_major import FeatureMajor
from srigl_fx.passes.fuse_epilogues import FuseEpilogues
from srigl_fx.passes.match import MatchWeights
from srigl_fx.passes.pipelines import LOWERING
from srigl_fx.passes.program import Program
from srigl_fx.passes.select import Select
from srigl_fx.passes.verify_program import verifier

AFTERWARDS: tuple[Pass[Program], ...] = (
    Condense(),
    FuseEpilogues(),
    FeatureMajor(min_samples=1),
    ArrangeSamples(min_samples=1),
)
PIPELINE: tuple[Pass[Program], ...] = (*LOWERING, MatchWeights(), Select(), *AFTERWARDS)
OPERATIONS = ("call_function", "call_module")
CONTRACTIONS = ("linear", "conv", "matmul", "addmm", "bmm", "condensed")


class Residual(nn.Module):
    """Convolutions with batch norms, a dead branch in a residual stream, gates, and two outputs of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.branch = nn.Sequential(nn.Conv2d(8, 12, 1), nn.BatchNorm2d(12), nn.Hardswish(), nn.Conv2d(12, 8, 3, 1, 1))
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.gate, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        x = x + self.branch(x)
        y = F.relu(self.depthwise(x)) * torch.sigmoid(self.gate(x.mean((2, 3))))[:, :, None, None]
        out = self.head(torch.cat([y[:, 4:], x[:, :4]], 1).amax((2, 3)))
        return out, out.view(-1).clone()


class Attention(nn.Module):
    """A packed projection, a mask from the input, RMS norm, a gated feed-forward layer and a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(12)
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12, bias=False)
        self.up, self.down = nn.Linear(12, 32), nn.Linear(16, 12)
        self.head = nn.Linear(12, 12, bias=False)
        self.head.weight = self.out.weight

    def forward(self, x: Tensor, seen: Tensor) -> dict[str, Tensor]:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, seen[:, None, None, :])
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        gate, value = self.up(F.dropout(x, 0.1, self.training)).chunk(2, -1)
        return {"logits": self.head(x + self.down(F.silu(gate) * value)), "last": x[:, -1].detach()}


class Functional(nn.Module):
    """Weights that are transformed, transposed and shared before anything contracts with them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.utils.parametrizations.weight_norm(nn.Linear(6, 10))
        self.shared, self.other = nn.Linear(10, 10), nn.Linear(5, 4)
        self.scale = nn.Parameter(torch.rand(10))

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.first(x)) @ self.shared.weight.t()
        x = torch.addmm(self.shared.bias, torch.relu(x), self.shared.weight * self.scale)
        return self.other(x.view(-1, 5)).view(x.shape[0], -1)  # type: ignore[no-any-return]


def residual() -> tuple[nn.Module, tuple[Tensor, ...]]:
    model = randomise(Residual())
    ablated = {"stem.0.weight": 2, "branch.0.weight": 4, "branch.3.weight": 2, "gate.weight": 2}
    return mask_by_hand(model, 0.3, ablated=ablated, skip=("depthwise.weight",)), (torch.randn(2, 3, 6, 6),)


def attention() -> tuple[nn.Module, tuple[Tensor, ...]]:
    model = randomise(Attention())
    ablated = {"qkv.weight": 9, "up.weight": 10, "down.weight": 3}
    mask_by_hand(model, 0.3, ablated=ablated, skip=("head.weight",))
    return model, (torch.randn(2, 5, 12), torch.rand(2, 5) > 0.2)


def functional() -> tuple[nn.Module, tuple[Tensor, ...]]:
    model = randomise(Functional())
    return mask_by_hand(model, 0.4, ablated={"shared.weight": 3, "other.weight": 1}), (torch.randn(2, 6),)


GRAPHS: list[Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]] = [residual, attention, functional]


def captured(make: Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]) -> Program:
    model, inputs = make()
    return capture(model.eval(), (inputs, {}))


def prefixes() -> list[Any]:
    """The pipeline up to each pass before Condense, which makes pieces of a layer whose values are not recorded."""
    return [pytest.param(PIPELINE[: i + 1], id=step.name) for i, step in enumerate(PIPELINE[: -len(AFTERWARDS)])]


@pytest.fixture(params=GRAPHS, ids=lambda make: make.__name__)
def program(request: pytest.FixtureRequest) -> Program:
    return captured(request.param)


@pytest.mark.long
def test_every_pass_keeps_the_outputs(program: Program) -> None:
    result = run(PIPELINE, program, check=verifier(program, tolerance=1e-5))
    assert result.changed


@pytest.mark.long
@pytest.mark.parametrize("passes", prefixes())
def test_every_pass_keeps_values_and_provenance_and_is_idempotent(
    program: Program, passes: tuple[Pass[Program], ...]
) -> None:
    result = run(passes, program)
    program = result.subject
    operators = [node for node in program.module.graph.nodes if node.op in OPERATIONS]
    for node in operators:
        assert "val" in node.meta or node.op == "call_module" or returns_several(node), node.format_node()
        if any(name in str(node.target) for name in CONTRACTIONS):
            assert node.meta.get("nn_module_stack"), node.format_node()
    assert all(note.where and note.reason and note.by for note in result.notes)
    if passes[-1] in LOWERING:
        before = [str(node.target) for node in operators]
        again = run(passes[-1:], program)
        assert not again.changed
        assert [str(node.target) for node in again.subject.module.graph.nodes if node.op in OPERATIONS] == before


@pytest.mark.long
def test_what_runs_after_condensing_keeps_provenance_and_is_idempotent(program: Program) -> None:
    program = run(PIPELINE, program).subject
    for node in program.module.graph.nodes:
        if "condensed" in str(node.target):
            assert node.meta.get("nn_module_stack"), node.format_node()
    before = [node.format_node() for node in program.module.graph.nodes]
    again = run(AFTERWARDS[1:], program)
    assert not again.changed
    assert [node.format_node() for node in again.subject.module.graph.nodes] == before


def returns_several(node: fx.Node) -> bool:
    """Whether a node's value is a tuple: export records a value for each of its items."""
    return any("getitem" in str(user.target) for user in node.users)


@pytest.mark.parametrize("step", PIPELINE, ids=lambda step: step.name)
def test_every_pass_says_what_it_does(step: Pass[Program]) -> None:
    assert type(step).__doc__
    assert "1. " in str(type(step).__doc__)


class Breaks(Pass[Program]):
    """Multiplies the first output by 1.001, or drops it."""

    def __init__(self, drop: bool) -> None:
        self.drop = drop

    def run(self, subject: Program) -> PassResult[Program]:
        graph = subject.module.graph
        output = next(node for node in graph.nodes if node.op == "output")
        first, *rest = output.args[0]
        if not self.drop:
            with graph.inserting_before(output):
                rest = [graph.call_function(torch.ops.aten.mul.Tensor, (first, 1.001)), *rest]
            rest[0].meta["val"] = first.meta["val"]
        output.args = (tuple(rest),)
        if self.drop:
            graph._codegen.pytree_info = graph._codegen.pytree_info._replace(  # type: ignore[attr-defined]
                out_spec=torch.utils._pytree.tree_structure(tuple(rest))
            )
        subject.module.recompile()
        return PassResult(subject=subject, changed=True)


@pytest.mark.long
@pytest.mark.parametrize(("drop", "said"), [(False, "is off by 1.00e-03 of its largest value"), (True, "1 outputs")])
def test_the_check_names_the_pass_that_broke_the_graph(drop: bool, said: str) -> None:
    program = captured(residual)
    with pytest.raises(PassError, match=f"after the pass Breaks.*{said}"):
        run((Breaks(drop),), program, check=verifier(program))


def deep(depth: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    blocks = [nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.ReLU()) for _ in range(depth)]
    model = randomise(nn.Sequential(*blocks))
    return mask_by_hand(model, 0.5, ablated=1), (torch.randn(2, 6, 2, 2),)


def calls_of(passes: tuple[Pass[Program], ...], program: Program) -> int:
    """How many Python functions a pipeline calls: its time, on a machine without noise."""
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event == "call"

    previous = sys.getprofile()
    sys.setprofile(count)
    try:
        run(passes, program)
    finally:
        sys.setprofile(previous)
    return calls


@pytest.mark.long
def test_work_grows_with_the_depth_and_no_faster() -> None:
    short, middle, long = (calls_of(PIPELINE, captured(functools.partial(deep, depth))) for depth in (6, 12, 24))
    assert long - middle < 2.5 * (middle - short)
