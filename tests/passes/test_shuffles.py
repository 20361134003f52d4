"""Which reshapes and transpositions are a shuffle of channels, on graphs that are written by hand."""

from collections.abc import Callable

import pytest
import torch
from channels_support import Builder
from torch import fx

from srigl_fx.passes.base import run
from srigl_fx.passes.normalize import Normalize

aten = torch.ops.aten
Turn = Callable[[Builder, fx.Node], fx.Node]


def transposed(one: int, other: int) -> Turn:
    return lambda b, x: b.call(aten.transpose.int, x, one, other)


def permuted(*order: int) -> Turn:
    return lambda b, x: b.call(aten.permute.default, x, list(order))


@pytest.mark.parametrize(
    ("data", "apart", "turn", "after", "groups"),
    [
        ([2, 8, 3], [2, 2, 4, 3], transposed(1, 2), [2, 8, 3], 2),
        ([2, 8, 3], [2, 4, 2, 3], transposed(-2, 1), [2, 8, 3], 4),
        ([2, 8, 3], [2, 2, 4, 3], permuted(0, 2, 1, 3), [2, 8, 3], 2),
        ([2, 8, 3], [2, 2, 4, 3], permuted(0, -2, 1, -1), [2, 8, 3], 2),
        ([2, 8, 3], [2, 2, 4, 3], lambda b, x: b.call(aten.clone.default, transposed(1, 2)(b, x)), [2, 8, 3], 2),
        ([2, 6, 3, 5], [2, 3, 2, 3, 5], transposed(1, 2), [2, 6, 3, 5], 3),
        # The right sizes, but other axes.
        ([2, 9, 3], [2, 3, 3, 3], transposed(1, 3), [2, 9, 3], None),
        ([2, 9, 3], [2, 3, 3, 3], transposed(2, 3), [2, 9, 3], None),
        ([2, 9, 3], [2, 3, 3, 3], permuted(0, 3, 2, 1), [2, 9, 3], None),
        ([2, 9, 3], [2, 3, 3, 3], permuted(0, 1, 2, 3), [2, 9, 3], None),
        ([3, 9, 3], [3, 3, 3, 3], permuted(1, 2, 0, 3), [3, 9, 3], None),
        ([2, 8, 3], [2, 2, 4, 3], transposed(2, 3), [2, 8, 3], None),
        # One group, or one place in each, is no shuffle.
        ([2, 8, 3], [2, 1, 8, 3], transposed(1, 2), [2, 8, 3], None),
        ([2, 8, 3], [2, 8, 1, 3], transposed(1, 2), [2, 8, 3], None),
        # Other sizes before, between or behind.
        ([2, 4, 6], [2, 2, 4, 3], transposed(1, 2), [2, 8, 3], None),
        ([2, 8, 3], [4, 2, 2, 3], transposed(1, 2), [2, 8, 3], None),
        ([2, 8, 3], [2, 2, 4, 3], transposed(1, 2), [2, 4, 6], None),
        ([2, 8, 3], [2, 2, 4, 3], transposed(1, 2), [2, 4, 2, 3], None),
        ([2, 8, 4], [2, 2, 4, 2, 2], transposed(1, 2), [2, 8, 4], None),
        ([2, 8], [2, 2, 4], transposed(1, 2), [2, 8], None),  # a shuffle takes three axes
    ],
)
def test_rule_9_a_shuffle_and_what_nearly_is_one(
    data: list[int], apart: list[int], turn: Turn, after: list[int], groups: int | None
) -> None:
    b = Builder()
    x = b.input(torch.arange(float(torch.Size(data).numel())).view(data))
    turned = turn(b, b.call(aten.reshape.default, x, apart))
    program = b.finish(b.call(aten.reshape.default, turned, after))
    expected = program.module(*program.args)
    module = run((Normalize(),), program).subject.module
    assert torch.equal(module(*program.args), expected)
    shuffles = module.graph.find_nodes(op="call_function", target=aten.channel_shuffle.default)
    assert [node.args[1] for node in shuffles] == ([] if groups is None else [groups])
    if groups is not None:
        assert len(module.graph.find_nodes(op="call_function", target=aten.reshape.default)) == 0
