"""Runs for comparison: what they tell, and that the model, its inputs and the random state are as before."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from srigl_fx.errors import CaptureError, PassError
from srigl_fx.masks.records import WeightRecord, WeightSite
from srigl_fx.passes.layer_runs import run_uses
from srigl_fx.passes.model_runs import STEPS, run_model, run_steps
from srigl_fx.passes.program import MatchedLayer, Program, Use
from srigl_fx.passes.sizes import Sizes
from srigl_fx.passes.verify_program import verifier

aten = torch.ops.aten


class Counts(nn.Module):
    """Adds its count, which it raises."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.count


class Does(nn.Module):
    """What a function does with the module and its input."""

    def __init__(self, function: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.calls = 0
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def test_what_one_pass_writes_the_next_reads_and_nobody_afterwards() -> None:
    model = Counts()
    runs = run_steps(model, (torch.ones(1),), {})
    assert [run.output.item() for run in runs] == [1.0, 2.0, 3.0]  # outputs are kept apart from the buffer
    assert [run.buffers["count"].item() for run in runs] == [1.0, 2.0, 3.0]
    assert [run.written for run in runs] == [{"count": ""}] * STEPS
    assert all(run.keeps_state for run in runs)
    assert model.count.item() == 0
    assert [value.item() for value in runs[1].results.outputs] == [2.0]
    assert list(runs[1].results.buffers) == ["count"]


@pytest.mark.parametrize(("steps", "expected"), [(None, 1), (1, 1), (2, 2)])
def test_without_state_one_pass_tells_all(steps: int | None, expected: int) -> None:
    runs = run_steps(nn.Linear(2, 2), (torch.ones(1, 2),), {}, steps)
    assert len(runs) == expected
    assert not runs[0].keeps_state


def test_an_attribute_is_state_too() -> None:
    def count(self: Any, x: Tensor) -> Any:
        self.calls += 1
        return x + self.calls

    model = Does(count)
    runs = run_steps(model, (torch.zeros(1),), {})
    assert [(run.output.item(), run.changed) for run in runs] == [(1, ("calls",)), (2, ("calls",)), (3, ("calls",))]
    assert model.calls == 0


def test_inputs_and_the_random_state_are_as_before() -> None:
    x = torch.zeros(2)
    model = Does(lambda self, x: x.add_(1) + torch.rand(2))
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one, other = run_model(model, (x,), {}), run_model(model, (), {"x": x})
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(one, other)  # each run draws the same numbers
    assert x.tolist() == [0, 0]
    assert not run_model(nn.Linear(2, 2), (x,), {}).requires_grad


def test_a_forward_that_writes_to_a_parameter_is_named() -> None:
    model = nn.Sequential(Does(lambda self, x: self.inner.weight.add_(1) + x), nn.ReLU())
    with pytest.raises(CaptureError, match=r"forward of 0\.inner \(Linear\) writes to its parameter 'weight'"):
        run_model(model, (torch.ones(2, 2),), {})


def test_a_forward_that_writes_to_the_models_own_parameter_is_named() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return self.scale.mul_(2) * x

    with pytest.raises(CaptureError, match=r"forward of the model \(Own\) writes to its parameter 'scale'"):
        run_model(Own(), (torch.ones(2, 2),), {})


def written_by_hand(model: nn.Module, build: Callable[[fx.Graph, fx.Node], Any], *, batched: bool = True) -> Program:
    graph = fx.Graph()
    graph.output(build(graph, graph.placeholder("x")))
    module = fx.GraphModule(model, graph)
    sizes = Sizes.of_batch((batched,))
    return Program(module=module, model=model, args=(torch.ones(2, 3),), kwargs={}, sizes=sizes, how="by hand")


class Doubled(nn.Module):
    """Twice its input, and the weight beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(3))

    def forward(self, x: Tensor) -> Tensor:
        return x * 2


@pytest.mark.parametrize(
    ("build", "batched", "words"),
    [
        (lambda g, x: g.call_function(aten.add.Tensor, (x, x)), True, ""),
        (
            lambda g, x: g.call_function(aten.mul.Tensor, (x, 2.1)),
            True,
            "after the pass Mine, output 0 at batch 2 is off by 5.00e-02",
        ),
        # Ones in a batch of two as in a batch of three, but for the third sample.
        (
            lambda g, x: g.call_function(aten.mul.Tensor, (x, g.call_function(aten.sym_size.int, (x, 0)))),
            True,
            "output 0 at batch 3 is off by 5.00e-01",
        ),
        (lambda g, x: g.call_function(aten.mul.Tensor, (x, g.call_function(aten.sym_size.int, (x, 0)))), False, ""),
        (
            lambda g, x: (g.call_function(aten.add.Tensor, (x, x)), x),
            True,
            "after the pass Mine the graph gives 2 outputs at batch 2, the model 1",
        ),
    ],
    ids=["right", "off", "off at the other size", "at the size of the example alone", "one output more"],
)
def test_the_check_between_passes(build: Any, batched: bool, words: str) -> None:
    model = Doubled()
    program = written_by_hand(model, build, batched=batched)
    check = verifier(program)
    if not words:
        check("Mine", program)
        return
    with pytest.raises(PassError) as error:
        check("Mine", program)
    assert words in str(error.value)


def test_the_check_allows_what_it_is_told_to() -> None:
    program = written_by_hand(Doubled(), lambda g, x: g.call_function(aten.mul.Tensor, (x, 2.1)))
    verifier(program, tolerance=0.06)("Mine", program)
    with pytest.raises(PassError, match=r"allowed: 4\.00e-02"):
        verifier(program, tolerance=0.04)("Mine", program)


def test_the_check_runs_the_graph_that_a_pass_left_without_compiling_it() -> None:
    program = written_by_hand(Doubled(), lambda g, x: g.call_function(aten.add.Tensor, (x, x)))
    check = verifier(program)
    (node,) = program.module.graph.find_nodes(op="call_function", target=aten.add.Tensor)
    node.target = aten.sub.Tensor
    with pytest.raises(PassError, match="output 0"):
        check("Mine", program)


def layer_of(*uses: fx.Node) -> MatchedLayer:
    weight: Any = WeightRecord(
        site=WeightSite(owner="", attr="weight", kind="linear", shape=(3, 3), groups=1), structure="constant_fan_in"
    )
    eye = torch.eye(3)
    return MatchedLayer(weight=weight, uses=[Use(node=n, target="weight", weight=eye, mask=eye > 0) for n in uses])


@pytest.mark.parametrize(("batch", "size"), [(None, 2), (5, 5)])
def test_each_use_is_seen_with_what_it_takes_and_gives(batch: int | None, size: int) -> None:
    nodes: list[fx.Node] = []

    def build(graph: fx.Graph, x: fx.Node) -> fx.Node:
        weight = graph.get_attr("weight")
        nodes.append(graph.call_function(aten.linear.default, (x, weight)))
        doubled = graph.call_function(aten.mul.Tensor, (nodes[0], 2))
        nodes.append(graph.call_function(aten.linear.default, (doubled, weight)))
        return nodes[1]

    program = written_by_hand(Doubled(), build)
    program.layers = [layer_of(*nodes)]
    seen: list[tuple[fx.Node, float, tuple[int, ...], float]] = []
    run_uses(
        program, lambda use, x, y: seen.append((use.node, x.mean().item(), tuple(x.shape), y.mean().item())), batch
    )
    assert seen == [(nodes[0], 1, (size, 3), 1), (nodes[1], 2, (size, 3), 2)]


def test_a_run_that_looks_at_layers_writes_no_buffer() -> None:
    model = Doubled()
    model.register_buffer("state", torch.zeros(2, 3))

    def build(graph: fx.Graph, x: fx.Node) -> fx.Node:
        linear = graph.call_function(aten.linear.default, (x, graph.get_attr("weight")))
        return graph.call_function(aten.copy_.default, (graph.get_attr("state"), linear))

    program = written_by_hand(model, build)
    (node,) = program.module.graph.find_nodes(op="call_function", target=aten.linear.default)
    program.layers = [layer_of(node)]
    seen: list[bool] = []
    torch.manual_seed(3)
    run_uses(program, lambda use, x, y: seen.append(torch.rand(1).item() > 2 or y.requires_grad))
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))
    assert seen == [False]
    assert not bool(program.module.get_buffer("state").any())
