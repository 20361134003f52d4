"""Operators for what is left: each plan, run on what is left of its operand, gives what is left of its result."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from channels_support import Builder, Removal, aten
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

CHANNELS = 8
LABELS = [[[c] for c in range(1, CHANNELS + 1)]]

# Of x (2, 8, 3), with channels along axis 1; whether any set of channels may go.
MOVES: dict[str, tuple[Callable[[Builder, fx.Node], fx.Node], bool]] = {
    "reshape": (lambda b, x: b.call(aten.reshape.default, x, [2, 24]), True),
    "reshape with -1": (lambda b, x: b.call(aten.reshape.default, x, [2, -1]), True),
    "flatten": (lambda b, x: b.call(aten.flatten.using_ints, x, 1), True),
    "transpose": (lambda b, x: b.call(aten.transpose.int, x, 1, 2), True),
    "permute": (lambda b, x: b.call(aten.permute.default, x, [2, 1, 0]), True),
    "movedim": (lambda b, x: b.call(aten.movedim.int, x, 1, 0), True),
    "unsqueeze": (lambda b, x: b.call(aten.unsqueeze.default, x, 1), True),
    "expand": (lambda b, x: b.call(aten.expand.default, b.call(aten.unsqueeze.default, x, 0), [4, 2, 8, 3]), True),
    "repeat": (lambda b, x: b.call(aten.repeat.default, x, [1, 2, 1]), True),
    "repeat_interleave": (lambda b, x: b.call(aten.repeat_interleave.self_int, x, 3, 1), True),
    "slice": (lambda b, x: b.call(aten.slice.Tensor, x, 1, 2, 6), False),
    "slice from behind": (lambda b, x: b.call(aten.slice.Tensor, x, 1, -5), False),
    "slice with steps": (lambda b, x: b.call(aten.slice.Tensor, x, 1, 1, 8, 3), False),
    "slice of positions": (lambda b, x: b.call(aten.slice.Tensor, x, 2, 1, 3), True),
    "narrow": (lambda b, x: b.call(aten.narrow.default, x, 1, 3, 4), False),
    "select": (lambda b, x: b.call(aten.select.int, x, 1, -3), False),
    "split": (lambda b, x: b.call(aten.split.Tensor, x, 4, 1), False),
    "chunk": (lambda b, x: b.call(aten.chunk.default, x, 2, 1), False),
    "split of positions": (lambda b, x: b.call(aten.split.Tensor, x, 1, 2), True),
    "cat": (lambda b, x: b.call(aten.cat.default, [x, b.call(aten.flip.default, x, [1])], 1), True),
    "stack": (lambda b, x: b.call(aten.stack.default, [x, x], 1), True),
    "flip": (lambda b, x: b.call(aten.flip.default, x, [1, 2]), True),
    "roll": (lambda b, x: b.call(aten.roll.default, x, [3], [1]), True),
    "roll of channels and positions": (lambda b, x: b.call(aten.roll.default, x, [3, 1], [1, 2]), False),
    "shuffle": (lambda b, x: b.call(aten.channel_shuffle.default, x, 2), True),
    "index": (
        lambda b, x: b.call(aten.index.Tensor, x, [None, b.constant(torch.tensor([5, 0, 0, 7, 2, 1, 3, 4, 6]))]),
        True,
    ),
    "index_select": (
        lambda b, x: b.call(aten.index_select.default, x, 1, b.constant(torch.tensor([7, 6, 5, 4, 3, 2, 1, 0]))),
        True,
    ),
    "index of positions": (
        lambda b, x: b.call(aten.index.Tensor, x, [None, None, b.constant(torch.tensor([2, 2, 0]))]),
        True,
    ),
    "zeros beside channels": (lambda b, x: b.call(aten.constant_pad_nd.default, x, [0, 0, 2, 1]), True),
    "zeros beside positions": (lambda b, x: b.call(aten.constant_pad_nd.default, x, [1, 1], 3.0), True),
    "unfold of positions": (lambda b, x: b.call(aten.unfold.default, x, 2, 2, 1), True),
}


def parts(value: Any) -> list[Tensor]:
    return list(value) if isinstance(value, list | tuple) else [value]


def check(name: str, gone: list[int]) -> bool:
    """Whether the operator has a plan once these channels are gone; the plan is right."""
    build, _ = MOVES[name]
    builder = Builder()
    x = builder.input(torch.randn(2, CHANNELS, 3), LABELS)
    node = build(builder, x)
    removal = Removal(builder.propagate(builder.constant(torch.zeros(1), "nothing")))
    removal.force(gone)
    if node in removal.moves.conflicts():
        return False
    # Every operator on the way is run for what is left, as the graph would be.
    left: dict[fx.Node, Any] = {x: removal.left(x)}
    for each in removal.program.module.graph.nodes:
        if each.op == "get_attr":
            left[each] = each.meta["val"]
        elif each.op == "call_function":
            target, args, kwargs = removal.moves.plans.get(each, (each.target, each.args, each.kwargs))
            args, kwargs = fx.node.map_arg((args, kwargs), lambda operand: left[operand])
            left[each] = target(*args, **kwargs)
    labels = parts(removal.flow.labels[node])
    for found, value, label in zip(parts(left[node]), parts(node.meta["val"]), labels, strict=True):
        kept = removal.moves.kept(label).expand(value.shape)
        expected = value[kept].reshape(removal.moves.shape(list(value.shape), label))
        assert torch.equal(found, expected)
    return True


@pytest.mark.parametrize("name", MOVES)
@given(gone=st.sets(st.integers(1, CHANNELS), min_size=1, max_size=CHANNELS - 1))
@settings(deadline=None, max_examples=15, derandomize=True)
def test_a_plan_moves_what_is_left_as_before(name: str, gone: set[int]) -> None:
    assert check(name, sorted(gone)) or not MOVES[name][1]


@pytest.mark.parametrize(
    ("name", "gone", "planned"),
    [
        ("select", [6], False),  # what it selects is gone
        ("select", [1, 2, 8], True),
        ("slice", [1, 2, 5], True),
        ("slice", [3, 4, 5, 6], False),  # nothing of it is left
        ("slice with steps", [1, 3, 5], True),
        ("split", [1, 6, 7], True),  # three and two
        ("split", [1, 2, 3, 4], False),
        ("roll of channels and positions", [1, 2], True),
        ("roll of channels and positions", [1, 7], False),  # two go around where three did
    ],
)
def test_rule_7_what_cannot_be_written_is_told(name: str, gone: list[int], planned: bool) -> None:
    assert check(name, gone) == planned


def plan(build: Callable[[Builder, fx.Node], fx.Node], gone: list[int]) -> tuple[Any, tuple[Any, ...]]:
    builder = Builder()
    x = builder.input(torch.randn(2, CHANNELS, 3), LABELS)
    node = build(builder, x)
    removal = Removal(builder.propagate(builder.constant(torch.zeros(1), "nothing")))
    removal.force(gone)
    assert removal.moves.conflicts() == []
    target, args, _ = removal.moves.plans[node]
    return target, args[1:]


def test_rule_1_sizes_that_are_left() -> None:
    assert plan(MOVES["reshape"][0], [2, 3]) == (aten.reshape.default, ([2, 18],))
    assert plan(MOVES["reshape with -1"][0], [2, 3]) == (aten.reshape.default, ([2, 18],))
    assert plan(MOVES["expand"][0], [2, 3]) == (aten.expand.default, ([4, 2, 6, 3],))


def test_rule_2_parts_that_were_equal_need_not_be() -> None:
    assert plan(MOVES["split"][0], [1, 2, 6]) == (aten.split_with_sizes.default, ([2, 3], 1))


def test_rule_3_as_many_are_left_in_front() -> None:
    assert plan(MOVES["slice"][0], [1, 5]) == (aten.slice.Tensor, (1, 1, 4, 1))
    assert plan(MOVES["narrow"][0], [1, 2, 5]) == (aten.narrow.default, (1, 1, 3))
    assert plan(MOVES["select"][0], [1, 2, 8]) == (aten.select.int, (1, 3))


def test_rule_4_an_operator_that_still_does_it_stays() -> None:
    assert plan(MOVES["shuffle"][0], [1, 5]) == (aten.channel_shuffle.default, (2,))
    assert plan(MOVES["flip"][0], [1, 4]) == (aten.flip.default, ([1, 2],))


def test_rule_6_positions_among_those_that_are_left() -> None:
    """Of channels a to h, shuffled to a e b f c g d h; a, b and g go."""
    target, (axis, index) = plan(MOVES["shuffle"][0], [1, 2, 7])
    assert (target, axis) == (aten.index_select.default, 1)
    assert index.tolist() == [2, 3, 0, 1, 4]  # e f c d h, of c d e f h


def test_rule_6_is_not_for_what_zeros_stand_between() -> None:
    """The triangle has zeros of its own: these are no positions."""
    builder = Builder()
    x = builder.input(torch.randn(2, 3, 3), [[[1, 2, 3]]])
    node = builder.call(aten.triu.default, x)
    removal = Removal(builder.propagate(builder.constant(torch.zeros(1), "nothing")))
    removal.force([2])
    assert removal.moves.conflicts() == [node]


def test_shapes_that_are_no_array_are_conflicts() -> None:
    """Two groups that lose one and two channels."""
    builder = Builder()
    x = builder.input(torch.randn(2, CHANNELS, 3), LABELS)
    node = builder.call(aten.reshape.default, x, [2, 2, 4, 3])
    removal = Removal(builder.propagate(builder.constant(torch.zeros(1), "nothing")))
    removal.force([1, 5, 6])
    assert removal.moves.conflicts() == [node]
    removal.force([1, 6])
    assert removal.moves.conflicts() == []
    assert removal.moves.plans[node][1][1] == [2, 2, 3, 3]


def test_what_loses_nothing_is_not_touched() -> None:
    builder = Builder()
    node = builder.call(aten.flip.default, builder.input(torch.randn(2, CHANNELS, 3), LABELS), [1])
    removal = Removal(builder.propagate(builder.constant(torch.zeros(1), "nothing")))
    removal.force([])
    assert removal.moves.conflicts() == []
    assert node not in removal.moves.plans
