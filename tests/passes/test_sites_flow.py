"""The joined graph of a whole model, value by value; and the ways through a forward that it is joined from."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from srigl_fx.passes.sites import data_flow
from srigl_fx.passes.sites.data_flow import Flow, TooLargeError
from srigl_fx.passes.sites.local_trace import Trace, traces_of
from srigl_fx.passes.sites.roles import roles_of


class Model(nn.Module):
    """Two layers, a gate and a norm, in a forward that the test says."""

    def __init__(self, use: Callable[..., Any]) -> None:
        super().__init__()
        self.one, self.two, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)
        self.scale, self.table = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(5, 4))
        self.use = use

    def forward(self, x: Tensor) -> Any:
        return self.use(self, x)


LAYERS = ["input", "contraction", "contraction"]
IN_ALL: dict[str, tuple[Callable[[Model, Tensor], Any], list[str]]] = {
    "one operation each": (lambda m, x: m.norm(m.two(m.one(x))), [*LAYERS, "norm"]),
    "rule 6: one value stays what it is": (lambda m, x: m.norm(m.two(m.one(x).relu() * 2 + 1)), [*LAYERS, "norm"]),
    "rule 4: sizes are no data": (lambda m, x: m.norm(m.two(m.one(x) * x.shape[0])), [*LAYERS, "norm"]),
    "rule 4: what parameters make is none": (lambda m, x: m.norm(m.two(m.one(x) * (m.scale + 1))), [*LAYERS, "norm"]),
    "a sum": (lambda m, x: m.norm(m.one(x) + m.two(x)), [*LAYERS, "sum", "norm"]),
    "a sum with a factor": (
        lambda m, x: m.norm(torch.add(m.one(x), m.two(x), alpha=2)),
        [*LAYERS, "sum", "norm"],
    ),
    "a sum between two": (lambda m, x: m.norm(torch.lerp(m.one(x), m.two(x), 0.5)), [*LAYERS, "sum", "norm"]),
    "a sum between two by a third": (
        lambda m, x: m.norm(torch.lerp(m.one(x), m.two(x), x)),
        [*LAYERS, "sum", "elementwise", "norm"],
    ),
    "a scaled sum": (
        lambda m, x: m.norm(torch.addcmul(m.one(x), m.two(x), x)),
        [*LAYERS, "elementwise", "sum", "norm"],
    ),
    "a gate": (lambda m, x: m.norm(m.one(x) * m.two(x)), [*LAYERS, "elementwise", "norm"]),
    "a sum of a stack": (
        lambda m, x: m.norm(torch.stack([m.one(x), m.two(x)]).sum(0)),
        [*LAYERS, "elementwise", "sum", "norm"],
    ),
    "a mean of a stack": (
        lambda m, x: m.norm(torch.stack([m.one(x), m.two(x)]).mean(0)),
        [*LAYERS, "elementwise", "sum", "norm"],
    ),
    "no sum of what was joined": (
        lambda m, x: m.norm(torch.cat([m.one(x), m.two(x)]).sum(0)),
        [*LAYERS, "elementwise", "norm"],
    ),
    "data with data": (lambda m, x: m.norm(m.one(x) @ m.two(x)), [*LAYERS, "product", "norm"]),
    "attention": (
        lambda m, x: m.norm(nn.functional.scaled_dot_product_attention(m.one(x), m.two(x), x)),
        [*LAYERS, "product", "norm"],
    ),
    "a weight of its own": (
        lambda m, x: m.norm(m.two(m.one(x) @ m.table.t())),
        ["input", "contraction", "contraction", "contraction", "norm"],
    ),
    "a norm by function": (
        lambda m, x: m.norm(nn.functional.layer_norm(m.two(m.one(x)), (4,))),
        [*LAYERS, "norm", "norm"],
    ),
    "a norm of each neuron": (
        lambda m, x: m.norm(nn.functional.batch_norm(m.two(m.one(x)), m.scale, m.scale)),
        [*LAYERS, "norm"],
    ),
    "a written place": (lambda m, x: m.norm(_written(m.one(x), m.two(x))), [*LAYERS, "elementwise", "norm"]),
    "in place": (lambda m, x: m.norm(_in_place(m.one(x), m.two(x))), [*LAYERS, "sum", "norm"]),
}


def _written(y: Tensor, z: Tensor) -> Tensor:
    y[0] = z
    return y


def _in_place(y: Tensor, z: Tensor) -> Tensor:
    y.add_(z)
    return y


@pytest.mark.parametrize("name", IN_ALL)
def test_sorts_of_values(name: str) -> None:
    use, expected = IN_ALL[name]
    assert [value.sort for value in Flow(Model(use), traces_of).values] == expected


def test_values_stand_behind_those_they_are_made_from() -> None:
    flow = Flow(Model(IN_ALL["a scaled sum"][0]), traces_of)
    for place, value in enumerate(flow.values):
        assert value.place == place
        assert all(each.place < place and value in each.users for each in value.inputs)


PARTS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], Any]]] = {
    "index": (lambda y, z: (y, z), lambda parts: parts[1]),
    "index from behind": (lambda y, z: [y, z], lambda parts: parts[-1]),
    "slice": (lambda y, z: (y, z), lambda parts: parts[1:][0]),
    "key": (lambda y, z: {"y": y, "z": z}, lambda parts: parts["z"]),
    "nested": (lambda y, z: {"both": (y, z)}, lambda parts: parts["both"][1]),
}


@pytest.mark.parametrize("name", PARTS)
def test_rule_3_what_a_forward_returns_is_taken_apart(name: str) -> None:
    make, take = PARTS[name]

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Any:
            return make(self.one(x), self.two(x))

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.norm = Inner(), nn.LayerNorm(4)

        def forward(self, x: Tensor) -> Any:
            return self.norm(take(self.inner(x)))

    model = Outer()
    roles = roles_of(model, traces_of)
    assert (roles[id(model.inner.two.weight)], roles[id(model.inner.one.weight)]) == ("normalised", "width")


def test_a_flow_that_is_too_large_tells_no_roles(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    monkeypatch.setattr(data_flow, "_MOST_VALUES", 3)
    assert len(Flow(model, traces_of).values) == 3
    monkeypatch.setattr(data_flow, "_MOST_VALUES", 2)
    with pytest.raises(TooLargeError):
        Flow(model, traces_of)
    with caplog.at_level(logging.DEBUG, logger="srigl_fx"):
        assert roles_of(model, traces_of) == {}
    assert "Sequential is too large" in caplog.text


def test_rule_1_the_first_complete_way_that_takes_all_values() -> None:
    def way(failure: str, *placeholders: str) -> Trace:
        graph = fx.Graph()
        nodes = [graph.placeholder(name) for name in placeholders]
        graph.output(nodes[0])
        return Trace(graph, failure, {})

    stopped, short, full, later = way("stopped", "x", "y"), way("", "x"), way("", "x", "y"), way("", "x", "y")

    class Two(nn.Module):
        def forward(self, x: Any, y: Any = None) -> Any:
            return x

    def chosen(*ways: Trace, both: bool = True) -> Trace | None:
        flow = Flow(nn.Identity(), traces_of)
        flow._ways = lambda module: iter(ways)
        values = [flow._make("input", ()), flow._make("input", ())]
        return flow._trace(Two(), tuple(values if both else values[:1]), {})

    assert chosen(stopped, short, full, later) is full
    assert chosen(stopped, short, full, both=False) is short
    assert chosen(stopped, short) is short  # none takes both
    assert chosen(way("early", "x"), stopped) is stopped  # the one that came furthest
    assert chosen() is None
    assert chosen(Trace(fx.Graph(), "at once", {})) is None


def ways(forward: Callable[..., Any], **members: Any) -> list[Trace]:
    module = type("Made", (nn.Module,), {"forward": forward})()
    for name, value in members.items():
        setattr(module, name, value)
    return list(traces_of(module))


def operations(trace: Trace) -> list[str]:
    """Without those in which torch.fx notes what was left out."""
    calls = [str(node.name) for node in trace.graph.nodes if node.op.startswith("call")]
    return [name for name in calls if not name.startswith("_assert_is_none")]


def test_rule_2_conditions_are_false_first_and_then_true() -> None:
    def forward(self: Any, x: Any) -> Any:
        return x.relu() if x.sum() > 0 else x.tanh()

    assert ["relu" in operations(trace) for trace in ways(forward)] == [False, True]
    assert len(ways(lambda self, x: x.relu())) == 1


def test_rule_2_a_loop_without_an_end_is_stopped() -> None:
    def forward(self: Any, x: Any) -> Any:
        while x.sum() > 0:
            x = x - 1
        return x

    never, always = ways(forward)
    assert never.failure == ""
    assert always.failure == "TraceError: a loop on data has no end under the tracer"
    assert len(operations(always)) > 200


def test_rule_3_optional_arguments_are_left_out_and_then_given() -> None:
    def some(self: Any, x: Any, y: Any = None) -> Any:
        return x.relu() if y is None else x + y

    def all_optional(self: Any, x: Any = None, y: Any = None) -> Any:
        return [each.relu() for each in (x, y) if each is not None]

    assert [operations(trace) for trace in ways(some)] == [["relu"], ["add"]]
    assert [operations(trace) for trace in ways(all_optional)] == [["relu"], [], ["relu", "relu_1"]]
    assert [operations(trace) for trace in ways(lambda self, x, *more, **named: x.relu())] == [["relu"]]


def test_rule_4_a_symbol_is_one_where_python_wants_a_number() -> None:
    def forward(self: Any, x: Any) -> Any:
        for part in x:
            x = part * float(x) + len(x) + int(x) + [5, 7][x]
        return x

    (trace,) = ways(forward)
    constants = [node.args[1] for node in trace.graph.nodes if node.op == "call_function"]
    assert trace.failure == ""
    assert constants == [0, 1.0, 1, 1, 7]


def test_a_symbol_has_dtype_and_device_of_the_weights() -> None:
    def forward(self: Any, x: Any) -> Any:
        return x + torch.zeros(2, dtype=x.dtype, device=x.device)

    (trace,) = ways(forward, fc=nn.Linear(2, 2, dtype=torch.float64))
    (constant,) = trace.constants.values()
    assert constant.dtype == torch.float64


def test_rule_1_modules_made_on_the_spot_and_rule_5_what_stops_the_tracer() -> None:
    def made(self: Any, x: Any) -> Any:
        return nn.Dropout()(x).relu()

    (trace,) = ways(made)
    assert (trace.failure, operations(trace)) == ("", ["_outside", "relu"])

    def stops(self: Any, x: Any) -> Any:
        x = x.relu()
        raise KeyError("gone\nsecond line")

    (trace,) = ways(stops)
    assert (trace.failure, operations(trace)) == ("KeyError: 'gone\\nsecond line'", ["relu"])

    def says_nothing(self: Any, x: Any) -> Any:
        raise ValueError

    assert [trace.failure for trace in ways(says_nothing)] == ["ValueError: "]


def test_rule_6_what_a_forward_writes_is_undone_and_what_it_says_kept_back(caplog: pytest.LogCaptureFixture) -> None:
    class Plain:
        kind = "class"

        def __init__(self) -> None:
            self.kind = "before"

    def forward(self: Any, x: Any) -> Any:
        logging.getLogger("users").warning("about symbols")
        self.seen, self.plain.kind, self.table["x"], self.buffer = x, x, x, self.buffer + 1
        self.several.append(x)
        self.names.add("x")
        return x

    members: dict[str, Any] = {"plain": Plain(), "table": {"a": 1}, "several": [1], "names": {"a"}}
    kept = dict(members)
    module = type("Made", (nn.Module,), {"forward": forward})()
    module.register_buffer("buffer", torch.zeros(2))
    for name, value in members.items():
        setattr(module, name, value)
    assert [trace.failure for trace in traces_of(module)] == [""]
    assert not hasattr(module, "seen")
    assert all(getattr(module, name) is value for name, value in kept.items())
    assert (module.plain.kind, module.table, module.several, module.names) == ("before", {"a": 1}, [1], {"a"})
    assert module.buffer.tolist() == [0, 0]
    assert caplog.records == []
    logging.getLogger("users").warning("afterwards")
    assert [record.message for record in caplog.records] == ["afterwards"]


def test_ways_are_traced_when_they_are_asked_for() -> None:
    calls: list[int] = []

    def forward(self: Any, x: Any, y: Any = None) -> Any:
        calls.append(1)
        return x

    found: Iterator[Trace] = traces_of(type("Made", (nn.Module,), {"forward": forward})())
    assert calls == []
    next(found)
    assert calls == [1]
