"""Whether what a graph makes of a weight can be masked: each role by hand, on graphs of a few nodes."""

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from srigl_fx.passes.sites.value_transforms import (
    CompanionError,
    UnfitError,
    attribute,
    check_values,
    is_elementwise,
    zero_dims,
)
from srigl_fx.passes.sites.weight_layout import Layout

WEIGHT = torch.randn(3, 4)
Build = Callable[[fx.Graph, fx.Node], fx.Node]


class Root(nn.Module):
    """What the graphs read besides the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.row, self.other = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(3, 4))
        self.large, self.constant = nn.Parameter(torch.randn(9, 9)), torch.randn(3, 4)
        self.tanh, self.softmax, self.lstm = nn.Tanh(), nn.Softmax(1), nn.LSTMCell(4, 4)
        self.flipped, self.pair, self.observed = Flipped(), Pair(), FakeQuantizeBase()
        self.trained = Trained()


class Flipped(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.flip(0)


class Pair(nn.Module):
    def forward(self, w: Tensor) -> tuple[Tensor, Tensor]:
        return w + 1, w - 1


class Trained(nn.Module):
    """Takes the weight in place in evaluation, and normalises it in training."""

    def forward(self, w: Tensor) -> Tensor:
        return w.softmax(1) if self.training else w.tanh()


class FakeQuantizeBase(nn.Module):
    """Goes by its name, as the modules of torch's quantisation do."""

    def forward(self, w: Tensor) -> Tensor:
        return w.sort().values


def judged(build: Build, weight: Tensor = WEIGHT) -> bool:
    graph = fx.Graph()
    source = graph.get_attr("w")
    end = build(graph, source)
    graph.output(end)
    return is_elementwise(Root(), source, end, weight, "fc")


def f(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Build:
    """A function of the weight and of constants."""
    return lambda g, w: g.call_function(function, (w, *args), kwargs)


def m(method: str, *args: Any, **kwargs: Any) -> Build:
    """A method of the weight."""
    return lambda g, w: g.call_method(method, (w, *args), kwargs)


def then(*steps: Build) -> Build:
    """One after the other."""

    def build(graph: fx.Graph, node: fx.Node) -> fx.Node:
        for step in steps:
            node = step(graph, node)
        return node

    return build


def both(function: Callable[..., Any], one: Build, other: Build) -> Build:
    """A function of two things that are made of the weight."""
    return lambda g, w: g.call_function(function, (one(g, w), other(g, w)))


def read(name: str) -> Build:
    """Something that is not made of the weight."""
    return lambda g, _: g.get_attr(name)


def child(name: str, *more: Any, **kwargs: Any) -> Build:
    """A child that is called on the weight."""
    return lambda g, w: g.call_module(name, (w, *more), kwargs)


def the_weight(graph: fx.Graph, weight: fx.Node) -> fx.Node:
    """Itself."""
    return weight


MEAN = m("mean", 1, keepdim=True)

ELEMENTWISE: dict[str, tuple[Build, bool]] = {
    "itself": (the_weight, True),
    "a: constants and a row of its own": (both(operator.mul, m("tanh"), read("row")), True),
    "a: a size": (both(operator.truediv, the_weight, m("size", 1)), True),
    "b: reshaped alike": (m("reshape", 3, 4), True),
    "b: an index into statistics": (
        both(operator.sub, the_weight, then(m("mean", 1), f(operator.getitem, (slice(None), None)))),
        False,
    ),
    "b: reshaped statistics": (both(operator.sub, the_weight, then(m("mean", 1), m("reshape", 3, 1))), False),
    "c: element by element": (both(operator.mul, m("tanh"), m("abs")), True),
    "c: with statistics": (both(operator.sub, the_weight, MEAN), False),
    "c: statistics of statistics": (both(operator.sub, the_weight, then(MEAN, m("exp"))), False),
    "d: turned and back": (then(m("t"), m("tanh"), m("transpose", 0, 1)), True),
    "d: turned as function": (then(f(torch.permute, (1, 0)), f(torch.permute, (1, 0))), True),
    "d: statistics that are turned": (both(operator.sub, the_weight, then(MEAN, m("transpose", 0, 1), m("t"))), False),
    "f: softmax": (m("softmax", 1), False),
    "f: a normalisation": (f(torch.nn.functional.layer_norm, (4,)), False),
    "g: a child": (child("tanh"), True),
    "g: a child with statistics": (child("softmax"), False),
    "g: a child that has them in training": (child("trained"), False),
    "g: a fake quantisation": (child("observed"), True),
    "by the name of an attribute": (then(f(getattr, "T"), f(getattr, "T")), True),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_rule_1_what_stays_in_its_place(name: str) -> None:
    build, elementwise = ELEMENTWISE[name]
    assert judged(build) == elementwise


UNFIT: dict[str, tuple[Build, str]] = {
    "data": (
        both(operator.mul, the_weight, lambda g, _: g.placeholder("x")),
        "its effective value depends on the data",
    ),
    "b: cut": (f(operator.getitem, 0), "it is cut in pieces"),
    "b: reshaped in another order": (then(m("t"), m("reshape", 3, 4)), "reshape does not keep each value in its place"),
    "d: turned": (m("t"), "its axes change places"),
    "d: one turned, one not": (both(operator.add, the_weight, m("t")), "add combines values of different places"),
    "d: turned by what is computed": (
        lambda g, w: g.call_method("transpose", (w, g.call_method("size", (w, 0)), 1)),
        "transpose does not keep each value in its place",
    ),
    "d: another number of axes": (m("permute", 0, 1, 2), "permute does not keep each value in its place"),
    "e: a statistic alone": (m("mean", 1), "what is used is not of its shape"),
    "g: a child that moves values": (child("flipped"), "flip does not keep each value in its place"),
    "g: a child that takes it turned": (then(m("t"), child("tanh"), m("t")), "the child 'tanh' takes it turned"),
    "g: a child with more arguments": (child("tanh", 1), "the child 'tanh' does not take it alone"),
    "g: a child with keywords": (child("tanh", alpha=1), "the child 'tanh' does not take it alone"),
    "g: a child with several results": (child("pair"), "the child 'pair' gives several values"),
    "h: sorted": (m("sort"), "sort does not keep each value in its place"),
    "h: a product": (both(operator.matmul, the_weight, m("t")), ""),
    "two weights": (both(operator.mul, the_weight, read("large")), "it is made of two weights, the other one is 'fc.l"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_rule_1_what_does_not(name: str) -> None:
    build, reason = UNFIT[name]
    with pytest.raises(UnfitError, match=f"^{reason}"):
        judged(build)


def test_rule_1_other_parameters_may_be_as_large_as_one_dimension() -> None:
    scaled = both(operator.mul, the_weight, read("other"))
    with pytest.raises(UnfitError, match=r"two weights, the other one is 'fc.other'"):
        judged(scaled)
    assert judged(both(operator.mul, the_weight, read("constant")))  # it is no parameter
    assert judged(scaled, torch.randn(12, 2))
    assert judged(both(operator.mul, the_weight, read("row")), torch.randn(4, 1))


def test_a_parameter_that_another_one_scales_is_no_weight() -> None:
    small = torch.randn(2, 1)
    with pytest.raises(CompanionError, match=r"^it scales or shifts the weight 'fc.large'$"):
        judged(both(operator.mul, the_weight, read("large")), small)
    with pytest.raises(CompanionError, match=r"^it is data, which the weight 'fc.large' multiplies$"):
        judged(both(torch.matmul, the_weight, read("large")), small)


def test_what_does_not_go_into_the_value_does_not_matter() -> None:
    def build(graph: fx.Graph, weight: fx.Node) -> fx.Node:
        graph.call_method("sort", (weight,))
        graph.placeholder("x")
        return graph.call_method("tanh", (weight,))

    assert judged(build)


def test_attributes_by_their_paths() -> None:
    root = nn.Sequential(nn.Linear(2, 2))
    assert attribute(root, "0.weight") is root[0].weight
    assert attribute(root, "1.weight") is None


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (lambda w: w.mean(1), r"not of its shape but \(3,\)"),
        (lambda w: [w], "not of its shape but list"),
        (lambda w: w.reshape(5), "it could not be computed \\(RuntimeError"),
    ],
)
def test_the_shape_of_what_is_used(transform: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises(UnfitError, match=message):
        check_values(transform, WEIGHT)


def test_a_look_at_values_leaves_random_numbers_and_gradients_alone() -> None:
    weight = nn.Parameter(torch.randn(3, 4))
    state = torch.random.get_rng_state()
    check_values(torch.nn.functional.dropout, weight)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert weight.grad is None


def _per_row(w: Tensor) -> Tensor:
    norms: Tensor = w.norm(dim=1, keepdim=True)
    return w / norms


def _per_column(w: Tensor) -> Tensor:
    norms: Tensor = w.norm(dim=0, keepdim=True)
    return w / norms


def test_rule_2_where_a_neuron_of_zeros_is_looked_for() -> None:
    rows, columns = Layout.usual("linear", (3, 4)), Layout.usual("linear_in_out", (3, 4))
    kernel = Layout.usual("conv2d", (3, 2, 2, 2))
    assert zero_dims(_per_row, WEIGHT, rows, elementwise=False) == (1,)
    assert zero_dims(_per_column, WEIGHT, columns, elementwise=False) == (0,)
    assert zero_dims(lambda w: w - w.mean((1, 2, 3), keepdim=True), torch.randn(3, 2, 2, 2), kernel, elementwise=False)
    assert zero_dims(_per_row, WEIGHT, rows, elementwise=True) == ()
    # It gets values all the same.
    assert zero_dims(lambda w: w.softmax(1), WEIGHT, rows, elementwise=False) == ()
    assert zero_dims(lambda w: w - w.mean(), WEIGHT, rows, elementwise=False) == ()


def test_rule_2_what_divides_by_the_length_of_an_input_is_unfit() -> None:
    rows = Layout.usual("linear", (3, 4))
    with pytest.raises(UnfitError, match="it divides by zero where inputs are pruned"):
        zero_dims(_per_column, WEIGHT, rows, elementwise=False)


def test_rule_2_neurons_must_lie_along_dimensions() -> None:
    grouped = Layout.usual("conv_transpose1d", (4, 3, 2), groups=2)
    with pytest.raises(UnfitError, match="its neurons do not lie along its dimensions"):
        zero_dims(lambda w: w - w.mean(), torch.randn(4, 3, 2), grouped, elementwise=False)
