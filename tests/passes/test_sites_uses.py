"""How weights travel through one operation: views, what is computed from them, data; and what is reported of a use."""

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from srigl_fx.passes.sites.weight_uses import (
    Data,
    Derived,
    ParameterUse,
    Views,
    after,
    initial,
    is_copy,
    uses_in,
)


def whole(parameter: nn.Parameter) -> Views:
    value = initial(parameter)
    assert isinstance(value, Views)
    return value


WEIGHT, OTHER = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(6, 4))
W, V = whole(WEIGHT), whole(OTHER)
BOTH = frozenset({id(WEIGHT), id(OTHER)})
CONSTANT, X = initial(torch.ones(4)), Data(2)
MADE = Derived(frozenset({id(WEIGHT)}), alone=True)
MIXED = Derived(frozenset({id(WEIGHT)}), alone=False)

Uses = list[tuple[int, ParameterUse]]


def step(name: str, *args: Any, function: Callable[..., Any] = torch.relu, **kwargs: Any) -> tuple[Any, Uses]:
    """What one operation makes of its arguments, and what it reports."""
    reported: Uses = []
    made = after(name, function, args, kwargs, lambda source, use: reported.append((source, use)))
    return made, reported


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (WEIGHT, W),
        (nn.Parameter(torch.ones(3)), Derived(frozenset(), alone=True, rank=1)),
        (nn.Parameter(torch.ones(0, 3)), Derived(frozenset(), alone=True, rank=2)),
        (torch.ones(3, 3), Derived(frozenset(), alone=True, rank=2)),
        (5, Data()),
    ],
)
def test_what_a_models_own_tensors_are_at_first(value: object, expected: Any) -> None:
    assert initial(value) == expected


COPIES: list[tuple[str, tuple[Any, ...], Any]] = [
    ("clone", (W,), W),
    ("half", (W,), W),
    ("flip", (W, [0]), W),
    ("neg", (W,), W),
    ("__neg__", (W,), W),
    ("mul", (W, 0.5), W),
    ("mul", (0.5, W), W),
    ("mul", (W, CONSTANT), W),
    ("mul", (X, W), W),
    ("div", (W, X), W),
    ("div", (1.0, W), MADE),  # zeros do not stay zeros
    ("div", (X, W), MIXED),
    ("mul", (W, V), Derived(BOTH, alone=True)),  # the scale is a weight
    ("mul", (W, MADE), MADE),
    ("mul", (CONSTANT, X), Derived(frozenset(), alone=False)),
    ("mul", (W,), MADE),
    ("add", (W, CONSTANT), MADE),
    ("add", (W, X), MIXED),
    ("add", (W, MIXED), MIXED),
    ("dropout", (W, 0.5), MADE),
    ("softmax", (W,), MADE),
    ("cat", ([W, V],), Views((*W.views, *V.views))),
    ("cat", ([W, X],), MIXED),
    ("cat", ([W, CONSTANT],), MADE),
    ("stack", ([W, V], "later"), Derived(BOTH, alone=True)),
    ("index_select", (W, X, 0), MIXED),  # its arguments are in no order that it takes
]


@pytest.mark.parametrize(
    ("name", "args", "expected"), COPIES, ids=[f"{name}-{i}" for i, (name, *_) in enumerate(COPIES)]
)
def test_rule_2_what_keeps_zeros_where_they_are_is_the_weight(name: str, args: tuple[Any, ...], expected: Any) -> None:
    assert step(name, *args) == (expected, [])


def test_rule_1_weights_that_are_stacked_or_joined_by_name() -> None:
    joined, _ = step("concatenate", tensors=[W, V], dim=1)
    assert joined == Views((*W.views, *V.views))
    calls: list[tuple[tuple[Any, ...], dict[str, Any], int]]
    calls = [(([W, V],), {}, 0), (([W, V], 2), {}, 2), (([W, V],), {"dim": 1}, 1)]
    for args, kwargs, dim in calls:
        stacked, _ = step("stack", *args, **kwargs)
        assert [view.shape for view in stacked.views] == [tuple(torch.empty(6, 4).unsqueeze(dim).shape)] * 2


@pytest.mark.parametrize(
    ("index", "shape"),
    [
        (0, (4,)),
        (slice(1, 3), (2, 4)),
        ((slice(None), 2), (6,)),
        (torch.tensor([1, 0, 2]), (1, 4)),
        (Data(1), (1, 4)),
        (CONSTANT, (1, 4)),
        ([1, 0], (1, 4)),
        (Data(2), (1, 1, 4)),
        (Data(0), (4,)),
        (Data(), (4,)),  # the leading dimensions are unknown
        ((slice(None), Data(1)), (6, 4)),  # columns that are picked lie as a slice does
        ((slice(None), [0, 1]), (6, 4)),
        ((Data(1), Data(1)), None),  # paired up
        ((0, Data(1)), None),
        ((None, Data(1)), None),
        ((slice(None), Data()), None),
        ((Data(1), slice(1, 3)), None),  # only whole dimensions beside it are kept track of
        ((Data(1), slice(None)), (1, 4)),
        (7, None),
    ],
    ids=repr,
)
def test_rule_1_rows_and_columns_that_are_picked(index: Any, shape: tuple[int, ...] | None) -> None:
    made, reported = step("getitem", W, index, function=operator.getitem)
    assert reported == []
    if shape is None:
        assert made == MADE or made == Views(W.views)
    else:
        assert [view.shape for view in made.views] == [shape]


@pytest.mark.parametrize(
    ("name", "args", "shapes"),
    [
        ("t", (), [(4, 6)]),
        ("reshape", (2, 12), [(2, 12)]),
        ("chunk", (3,), [(2, 4)] * 3),
        ("unbind", (1,), [(6,)] * 4),
        ("index_select", (0, Data(1)), [(1, 4)]),
        ("index_select", (-1, Data(1)), [(6, 4)]),
    ],
)
def test_rule_1_views_are_followed(name: str, args: tuple[Any, ...], shapes: list[tuple[int, ...]]) -> None:
    made, _ = step(name, W, *args, function=getattr(Tensor, name))
    parts = made if isinstance(made, list) else [made]
    assert [part.views[0].shape for part in parts] == shapes


def test_views_with_sizes_that_are_known_later_are_not() -> None:
    assert step("reshape", W, Data(0), 12, function=Tensor.reshape)[0] == MADE
    assert step("reshape", W, (2, Data(0)), function=Tensor.reshape)[0] == MADE
    assert step("reshape", W, 5, 5, function=Tensor.reshape)[0] == MADE


def test_parts_of_weights_side_by_side_are_parts_of_each() -> None:
    joined, _ = step("cat", [W, V], 0)
    first, second = step("chunk", joined, 2, function=torch.chunk)[0]
    assert first.sources == second.sources == BOTH


READS: dict[str, tuple[tuple[str, tuple[Any, ...]], list[str], Any]] = {
    "rule 1": (("linear", (X, W)), ["weight"], Data()),
    "rule 1, either side": (("matmul", (W, X)), ["weight"], Data()),
    "rule 1, of two side by side": (("linear", (X, Views((*W.views, *V.views)))), ["weight", "weight"], Data()),
    "rule 3": (("linear", (X, MADE)), ["transformed"], Data()),
    "rule 3, with data in it": (("linear", (X, MIXED)), ["transformed"], Data()),
    "rule 3, with data in it, an activation": (("matmul", (X, MIXED)), ["none"], Data()),
    "rule 3, alone": (("matmul", (X, MADE)), ["transformed"], Data()),
    "rule 3, two weights": (("matmul", (W, V)), ["transformed", "transformed"], Derived(BOTH, alone=True)),
    "two weights of which one can only be one": (("linear", (V, W)), ["none", "weight"], Data()),
    "a weight and a constant": (("matmul", (W, CONSTANT)), ["weight"], Data()),
    "rule 4": (("embedding", (X, W)), ["lookup"], Data()),
    "rule 5, as data": (("linear", (W, X)), ["none"], Data()),
    "rule 5, a bias": (("linear", (X, X, W)), ["none"], Data()),
    "a bilinear form": (("bilinear", (X, X, W)), ["none"], Data()),
    "a view that is not understood": (("conv1d", (X, step("t", W, function=Tensor.t)[0])), ["unsupported"], Data()),
    "element by element": (("einsum", ("bnc,nc->bnc", Data(3), W)), ["unsupported"], Data()),
    "picked rows that are contracted": (("matmul", (X, step("getitem", W, Data(0))[0])), ["none"], Data()),
}


@pytest.mark.parametrize("name", READS)
def test_uses_of_weights(name: str) -> None:
    (operation, args), kinds, result = READS[name]
    made, reported = step(operation, *args)
    assert made == result
    assert sorted(use.kind for _, use in reported) == kinds
    assert {source for source, _ in reported} <= BOTH
    assert len(reported) == len({source for source, _ in reported})
    assert all((use.layout is not None) == (use.kind == "weight") for _, use in reported)


@pytest.mark.parametrize(
    ("operation", "args", "detail"),
    [
        ("linear", (X, MADE), "the weight is transformed before linear reads it"),
        ("matmul", (W, V), "it is multiplied with another parameter before any data is"),
        ("bilinear", (X, X, W), "a bilinear form contracts two inputs"),
        ("multi_dot", ([W, X],), "it stands in a chain of products"),
        ("embedding", (X, W), ""),
        ("matmul", (X, step("getitem", W, Data(0))[0]), "its rows are looked up by index"),
    ],
)
def test_what_is_said_of_uses(operation: str, args: tuple[Any, ...], detail: str) -> None:
    assert {use.detail for _, use in step(operation, *args)[1]} == {detail}


@pytest.mark.parametrize(
    ("name", "copies"),
    [("to", True), ("contiguous", True), ("flipud", True), ("negative", True), ("neg_", True), ("dropout", False)],
)
def test_operations_that_give_a_weight_back(name: str, copies: bool) -> None:
    assert is_copy(name) == copies


def uses(build: Callable[[fx.Graph, fx.Node, fx.Node], Any]) -> list[tuple[str, str | None]]:
    """The uses of one weight in a graph: their kinds, and the nodes."""
    graph = fx.Graph()
    x, w = graph.placeholder("x"), graph.get_attr("w")
    graph.output(build(graph, x, w))
    found = uses_in(graph, lambda name: {"w": WEIGHT, "scale": torch.ones(4)}[name])
    return [(use.kind, use.node.name if use.node else None) for use in found.get(id(WEIGHT), [])]


def test_attributes_of_a_weight_in_a_graph() -> None:
    def attribute(g: fx.Graph, w: fx.Node, *names: Any) -> fx.Node:
        return g.call_function(getattr, (w, *names))

    linear = torch.nn.functional.linear
    assert uses(lambda g, x, w: g.call_function(torch.mm, (x, attribute(g, w, "T")))) == [("weight", "mm")]
    assert uses(lambda g, x, w: g.call_function(linear, (x, attribute(g, w, "data")))) != []
    assert uses(lambda g, x, w: g.call_function(linear, (x, attribute(g, w, "shape")))) == []
    assert uses(lambda g, x, w: g.call_function(linear, (x, attribute(g, w, "grad")))) == []
    assert uses(lambda g, x, w: g.call_function(linear, (x, attribute(g, w, x)))) == []


def test_parts_of_a_split_weight_in_a_graph() -> None:
    linear = torch.nn.functional.linear

    def read(index: Any) -> Callable[[fx.Graph, fx.Node, fx.Node], Any]:
        def build(g: fx.Graph, x: fx.Node, w: fx.Node) -> Any:
            parts = g.call_method("chunk", (w, 3))
            part = g.call_function(operator.getitem, (parts, x if index == "data" else index))
            part = g.call_function(operator.getitem, (part, 0)) if isinstance(index, slice) else part
            return g.call_function(linear, (x, part))

        return build

    assert uses(read(1)) == [("weight", "linear")]
    assert uses(read(slice(1, None))) == [("weight", "linear")]
    assert uses(read("data")) == []


def test_rule_5_what_is_returned_or_handed_to_a_child() -> None:
    assert uses(lambda g, x, w: w) == [("none", "output")]
    assert uses(lambda g, x, w: (x, [g.call_method("t", (w,))])) == [("none", "output")]
    assert uses(lambda g, x, w: g.call_module("child", (x, w))) == [("none", "child")]
    assert uses(lambda g, x, w: g.call_module("child", (x, g.call_method("chunk", (w, 2))))) == [("none", "child")]
    assert uses(lambda g, x, w: g.call_module("child", (x, g.get_attr("scale")))) == []
