"""A pass that only improves costs nobody his model: where it fails, it is undone, and the reports say so."""

import itertools
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from lowering_support import mask_by_hand, randomise
from torch import Tensor, nn

import srigl_fx as sx
from srigl_fx.errors import LoweringError, PassError
from srigl_fx.lowering.lowered import LoweringReport
from srigl_fx.passes.arrange_samples import ArrangeSamples
from srigl_fx.passes.base import Note, Pass, PassResult, run
from srigl_fx.passes.capture import capture
from srigl_fx.passes.condense import Condense
from srigl_fx.passes.feature_major import FeatureMajor
from srigl_fx.passes.fuse_epilogues import FuseEpilogues
from srigl_fx.passes.match import MatchWeights
from srigl_fx.passes.pipelines import LOWERING
from srigl_fx.passes.program import Program, new_buffer


class Breaks(Pass[Program]):
    """Takes a ReLU away, and then fails in some way."""

    only_improves = True

    def __init__(self, how: str) -> None:
        self.how = how

    def run(self, subject: Program) -> PassResult[Program]:
        graph = subject.module.graph
        node = graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)[0]
        node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)
        subject.module.recompile()
        if self.how == "raises":
            raise ZeroDivisionError("half-way")
        return PassResult(subject=subject, changed=True)

    def ensures(self, subject: Program) -> None:
        assert self.how != "does not ensure"


class Stubborn(Breaks):
    only_improves = False


class Branches(nn.Module):
    """A model of two graphs."""

    second: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y: Tensor = self.second(x) if x.sum() > -1e9 else x
        return y


def simple() -> nn.Module:
    layers = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))
    return mask_by_hand(randomise(layers), 0.4, ablated=2).eval()


def branches() -> nn.Module:
    return mask_by_hand(randomise(Branches()), 0.4).eval()


X = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))


@pytest.mark.long
@pytest.mark.parametrize("how", ["raises", "does not ensure", "is wrong"])
@pytest.mark.parametrize("verify", [True, "each pass"])
@pytest.mark.parametrize(("make", "parts"), [(simple, {""}), (branches, {"first", "second"})])
def test_a_failing_pass_is_undone(
    how: str, verify: bool | Literal["each pass"], make: Callable[[], nn.Module], parts: set[str]
) -> None:
    model = make()
    lowered = sx.lower(model, (X,), min_speedup=0, verify=verify, passes=(*LOWERING, Breaks(how)))
    torch.testing.assert_close(lowered(X), model(X))
    report = lowered.report
    assert {layer.decision for layer in report.layers} == {"condensed"}
    assert report.undone
    assert {note.by for note in report.undone} == {"Breaks"}
    assert all(note.reason.startswith("undone: ") for note in report.undone)
    assert {note.where.rpartition(": ")[0] for note in report.undone} == parts
    assert f"Breaks: {report.undone[0].where}: {report.undone[0].reason}" in str(report)
    assert LoweringReport.from_dict(report.as_dict()) == report


@pytest.mark.slow
def test_without_verification_a_pass_that_raises_is_undone_too() -> None:
    model = simple()
    lowered = sx.lower(model, (X,), min_speedup=0, verify=False, passes=(Breaks("raises"), *LOWERING))
    torch.testing.assert_close(lowered(X), model(X))
    (note,) = lowered.report.undone
    assert "ZeroDivisionError: half-way" in note.reason


class Shuffles(nn.Module):
    """Draws the same order at each call, which a graph of it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 16), nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
        y: Tensor = self.b(torch.relu(self.a(x))[:, order])
        return y


class Restless(nn.Module):
    """Gives something else at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.calls = nn.Linear(12, 12), [0]

    def forward(self, x: Tensor) -> Tensor:
        self.calls[0] += 1
        y: Tensor = self.layers(x) * self.calls[0]
        return y


class Remembers(Shuffles):
    """Keeps what it counts where no verb looks."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = itertools.count()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.a(x)) * next(self.calls)
        return y


@pytest.mark.slow
@pytest.mark.parametrize("verify", [True, "each pass"])
@pytest.mark.parametrize(
    ("make", "in_parts", "why"),
    [
        (Shuffles, False, r"draws from a torch\.Generator \(randperm\), .*register_buffer"),
        (Shuffles, True, r"draws from a torch\.Generator \(randperm\), .*register_buffer"),
        (Restless, False, r"keeps state in calls, .*register_buffer"),
        (Remembers, False, r"no pass has run yet\. A model whose outputs depend on more than its inputs"),
    ],
)
def test_no_pass_is_named_where_the_graph_differs_as_captured(
    make: type[nn.Module], in_parts: bool, why: str, verify: bool | Literal["each pass"]
) -> None:
    model: nn.Module = make()
    if in_parts:
        parts = Branches()
        parts.second = make()
        model = parts
    model = mask_by_hand(randomise(model), 0.4).eval()
    region = "in the region second: " if in_parts else ""
    with pytest.raises(LoweringError, match=rf"^{region}output 0 of the graph as captured is off by .*; .*{why}"):
        sx.lower(model, (X,), min_speedup=0, verify=verify)


@pytest.mark.long
def test_a_pass_that_does_more_than_improve_is_fatal() -> None:
    with pytest.raises(PassError, match=r"Stubborn failed \(ZeroDivisionError: half-way\); the pass is yours"):
        sx.lower(simple(), (X,), min_speedup=0, passes=(*LOWERING, Stubborn("raises")))
    with pytest.raises(PassError, match=r"^after the pass Stubborn, output 0 at batch 3 is off by"):
        sx.lower(simple(), (X,), min_speedup=0, passes=(*LOWERING, Stubborn("is wrong")))


@pytest.mark.long
@pytest.mark.parametrize("verify", [True, "each pass"])
@pytest.mark.parametrize("how", ["raises", "is wrong"])
def test_the_part_in_which_a_pass_is_wrong_is_named(how: str, verify: bool | Literal["each pass"]) -> None:
    with pytest.raises(PassError, match=r"^in the region first: .*the pass Stubborn"):
        sx.lower(branches(), (X,), min_speedup=0, verify=verify, passes=(*LOWERING, Stubborn(how)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "step", [*LOWERING, FuseEpilogues(), FeatureMajor(), ArrangeSamples()], ids=lambda step: step.name
)
def test_each_pass_of_the_library_that_improves_may_fail(step: Pass[Program], monkeypatch: pytest.MonkeyPatch) -> None:
    inner = type(step).run

    def half(self: Pass[Program], subject: Program) -> PassResult[Program]:
        inner(self, subject)
        first = next(iter(subject.module.graph.nodes))
        first.graph.erase_node(first)  # it has users
        raise AssertionError("unreachable")

    monkeypatch.setattr(type(step), "run", half)
    model = simple()
    lowered = sx.lower(model, (X,), min_speedup=0)
    torch.testing.assert_close(lowered(X), model(X))
    (note,) = lowered.report.undone
    assert note.by == step.name
    assert "please report it with the model" in note.reason
    assert note.reason in str(lowered.report)
    assert note.reason in lowered.report.to_html().replace("&#39;", "'").replace("&gt;", ">").replace("&lt;", "<")


@pytest.mark.slow
@pytest.mark.parametrize("step", [MatchWeights(), Condense()], ids=lambda step: step.name)
def test_without_match_and_condense_there_is_nothing_lowered(
    step: Pass[Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Pass[Program], subject: Program) -> PassResult[Program]:
        raise ZeroDivisionError

    monkeypatch.setattr(type(step), "run", fail)
    with pytest.raises(PassError, match=f"{step.name} failed"):
        sx.lower(simple(), (X,), min_speedup=0)


@pytest.mark.parametrize("step", [Breaks("raises"), Stubborn("raises"), Breaks("is wrong")], ids=lambda one: one.how)
def test_the_program_of_the_caller_stays_as_it_is(step: Breaks) -> None:
    program = capture(simple(), (X,))
    module, masked = program.module, dict(program.masked)
    before = [node.format_node() for node in module.graph.nodes]
    expected = module(X)
    try:
        result = run((step,), program)
    except PassError:
        pass
    else:
        assert (result.subject is program) == (step.how == "raises")
    assert program.module is module
    assert program.masked == masked
    assert [node.format_node() for node in module.graph.nodes] == before
    assert torch.equal(module(X), expected)


@pytest.mark.long
def test_the_report_of_an_export_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Pass[Program], subject: Program) -> PassResult[Program]:
        raise ZeroDivisionError("half-way")

    monkeypatch.setattr(FuseEpilogues, "run", fail)
    report = sx.export_onnx(simple(), tmp_path / "model.onnx", (X,), verify=False, min_speedup=0)
    assert [note for note in report.notes if "FuseEpilogues" in note and "half-way" in note]
    assert "half-way" in str(report)


@pytest.mark.long
def test_notes_of_all_passes_reach_the_report() -> None:
    model = simple()
    lowered = sx.lower(model, (X,), min_speedup=0, passes=(*LOWERING, Says()))
    assert Note(where="here", reason="this", by="Says") in lowered.report.notes
    assert "Says: here: this" in str(lowered.report)
    uneven: Any = mask_by_hand(randomise(nn.Linear(12, 4)), 0.4, structure="unstructured").eval()
    with torch.no_grad():
        uneven.weight_mask[:] = torch.arange(12) < torch.tensor([12, 11, 10, 9])[:, None]
        uneven.weight *= uneven.weight_mask
    report = sx.lower(uneven, (X,), min_speedup=0).report
    why = "padded to the longest, they take as many bytes as the dense weight"
    assert [note.by for note in report.notes if note.reason.endswith(why)] == ["MatchWeights"]
    assert str(report).count(why) == 1  # the table tells it already


class Says(Pass[Program]):
    """Has something to say."""

    def run(self, subject: Program) -> PassResult[Program]:
        return PassResult(subject=subject, changed=False, notes=(Note(where="here", reason="this"),))


class FailsElsewhere(Pass[Program]):
    """Multiplies by ones, as many as the example inputs have samples: that runs at no other batch size."""

    only_improves = True

    def run(self, subject: Program) -> PassResult[Program]:
        graph = subject.module.graph
        relu = graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)[0]
        with graph.inserting_before(relu):
            product = graph.call_function(
                torch.ops.aten.mul.Tensor, (relu.args[0], new_buffer(subject.module, "ones", torch.ones(len(X), 1)))
            )
        product.meta["val"] = relu.meta["val"]
        relu.update_arg(0, product)
        subject.module.recompile()
        return PassResult(subject=subject, changed=True)


@pytest.mark.long
@pytest.mark.parametrize("make", [simple, branches], ids=["one graph", "two"])
def test_a_graph_that_runs_at_one_batch_size_alone_is_found_out(make: Callable[[], nn.Module]) -> None:
    model = make()
    lowered = sx.lower(model, (X,), min_speedup=0, passes=(*LOWERING, FailsElsewhere()))
    more = torch.randn(5, 12)
    torch.testing.assert_close(lowered(more), model(more))
    assert {note.by for note in lowered.report.undone} == {"FailsElsewhere"}
    assert all("RuntimeError" in note.reason for note in lowered.report.undone)


class WrongElsewhere(Stubborn):
    """Right at the batch size of the example inputs, and at no other."""

    def __init__(self) -> None:
        super().__init__("is wrong elsewhere")

    def run(self, subject: Program) -> PassResult[Program]:
        graph = subject.module.graph
        relu = graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)[0]
        before = relu.args[0]
        with graph.inserting_before(relu):
            size = graph.call_function(torch.ops.aten.sym_size.int, (before, 0))
            more = graph.call_function(operator.sub, (size, len(X)))
            moved = graph.call_function(torch.ops.aten.add.Scalar, (before, more))
        size.meta["val"] = relu.meta["val"].shape[0]
        more.meta["val"], moved.meta["val"] = size.meta["val"] - len(X), relu.meta["val"]
        relu.replace_input_with(before, moved)
        subject.module.recompile()
        return PassResult(subject=subject, changed=True)


@pytest.mark.long
@pytest.mark.parametrize("make", [simple, branches], ids=["one graph", "two"])
def test_a_graph_that_is_right_at_one_batch_size_alone_is_refused(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(PassError, match=r"after the pass WrongElsewhere, output 0 at batch 5 is off by"):
        sx.lower(make(), (X,), min_speedup=0, passes=(*LOWERING, WrongElsewhere()))
