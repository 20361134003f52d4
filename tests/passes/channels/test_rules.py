"""The table of rules covers the table of operators, and each rule gives labels that were written by hand."""

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from channels_support import Builder, aten, flat, partition, pinned, run_flow
from torch import fx

from srigl_fx.passes.channels.rules import KEEPS_ALL, RULES, rule_of
from srigl_fx.passes.operators import OPERATORS, operator_of

CHANNELS = [[[1], [2], [3], [4]]]  # along axis 1 of (2, 4, 3)
MORE = [[[5], [6], [7], [8]]]
LAST = [[[1, 2, 3]]]  # along axis 2
TABLE = [[[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12]]]  # along both


def test_every_family_has_a_rule_or_keeps_all() -> None:
    families = {row.family for row in OPERATORS.values() if row.does != "pointwise"}
    assert families == set(RULES) | KEEPS_ALL
    assert not set(RULES) & KEEPS_ALL


def test_pointwise_operators_share_one_rule_tagged_or_not() -> None:
    names = [name for name, row in OPERATORS.items() if row.does == "pointwise"]
    targets = [getattr(getattr(aten, name), getattr(aten, name).overloads()[0]) for name in names]
    rules = {rule_of(target) for target in [*targets, aten.gelu.default, aten.cosh.default]}
    assert len(rules) == 1


def test_what_is_no_operator_of_the_table_has_no_rule() -> None:
    assert [rule_of(target) for target in (len, aten.svd.default, aten.scatter.reduce, aten.col2im.default)] == [
        None
    ] * 4
    assert rule_of(operator.getitem) is not None


def test_no_operator_reaches_a_function_by_its_own_name() -> None:
    """A rule is found by the row, so that an operator called ``padded`` or ``reduced`` would find nothing."""
    assert {name for name in OPERATORS if name in {"padded", "reduced", "indexed", "moved", "made"}} == set()


def x(b: Builder, labels: Any = CHANNELS, shape: tuple[int, ...] = (2, 4, 3)) -> fx.Node:
    return b.input(torch.rand(shape) + 0.5, labels)


Build = Callable[[Builder], fx.Node]
KEPT = [1, 2, 3, 4]

# What is called, the labels of its result, and which labels are coupled by it.
CASES: dict[str, tuple[Build, list[Any], list[list[int]]]] = {
    # copies, creates
    "clone": (lambda b: b.call(aten.clone.default, x(b)), KEPT, []),
    "a cast": (lambda b: b.call(aten.type_as.default, x(b), b.constant(torch.zeros(1))), KEPT, []),
    "zeros_like": (lambda b: b.call(aten.zeros_like.default, x(b)), KEPT, []),
    "new_zeros": (lambda b: b.call(aten.new_zeros.default, x(b), [2, 4]), [0], []),
    "zeros": (lambda b: b.call(aten.zeros.default, [2, 4]), [0], []),
    # element by element
    "relu": (lambda b: b.call(aten.relu.default, x(b)), KEPT, []),
    "a sum": (lambda b: b.call(aten.add.Tensor, x(b), x(b, MORE)), KEPT, [[1, 5], [2, 6], [3, 7], [4, 8]]),
    "a sum with one number a sample": (lambda b: b.call(aten.add.Tensor, x(b), x(b, None, (2, 1, 1))), KEPT, []),
    "a sum broadcast over channels": (
        lambda b: b.call(aten.add.Tensor, x(b), x(b, [[5], [6], [7], [8]], (4, 1))),
        KEPT,
        [[1, 5], [2, 6], [3, 7], [4, 8]],
    ),
    "a choice": (
        lambda b: b.call(aten.where.self, b.call(aten.gt.Scalar, x(b), 0.7), x(b, MORE), b.constant(torch.zeros(()))),
        KEPT,
        [[1, 5], [2, 6], [3, 7], [4, 8]],
    ),
    "a sum over two axes with channels": (
        lambda b: b.call(aten.mul.Tensor, x(b), x(b, [[[5, 6, 7]]])),
        KEPT,
        [[1, 2, 3, 4, 5, 6, 7]],
    ),
    "detach": (lambda b: b.call(aten.detach.default, x(b)), KEPT, []),
    "dropout": (lambda b: b.call(aten.dropout.default, x(b), 0.5, False), KEPT, []),
    "fill": (lambda b: b.call(aten.fill.Scalar, x(b), 2.0), KEPT, []),
    # moves
    "unsqueeze": (lambda b: b.call(aten.unsqueeze.default, x(b), 1), KEPT, []),
    "transpose": (lambda b: b.call(aten.transpose.int, x(b), 1, 2), KEPT, []),
    "reshape": (lambda b: b.call(aten.reshape.default, x(b), [2, 12]), [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3, []),
    "reshape into groups": (lambda b: b.call(aten.reshape.default, x(b), [2, 2, 2, 3]), KEPT, []),
    "expand": (lambda b: b.call(aten.expand.default, x(b, [[[1], [2]]], (2, 2, 1)), [2, 2, 5]), [1, 2], []),
    "repeat": (lambda b: b.call(aten.repeat.default, x(b), [1, 2, 1]), KEPT * 2, []),
    "repeat_interleave": (
        lambda b: b.call(aten.repeat_interleave.self_int, x(b), 2, 1),
        [1, 1, 2, 2, 3, 3, 4, 4],
        [],
    ),
    "slice": (lambda b: b.call(aten.slice.Tensor, x(b), 1, 1, 4, 2), [2, 4], []),
    "select": (lambda b: b.call(aten.select.int, x(b), 1, 2), [3], []),
    "split": (lambda b: b.call(aten.split_with_sizes.default, x(b), [1, 3], 1), [[1], [2, 3, 4]], []),
    "an item": (
        lambda b: b.call(operator.getitem, b.call(aten.unbind.int, x(b), 1), 3),
        [4],
        [],
    ),
    "flip": (lambda b: b.call(aten.flip.default, x(b), [1]), [4, 3, 2, 1], []),
    "roll": (lambda b: b.call(aten.roll.default, x(b), [1], [1]), [4, 1, 2, 3], []),
    "channel_shuffle": (lambda b: b.call(aten.channel_shuffle.default, x(b), 2), [1, 3, 2, 4], []),
    "unfold": (lambda b: b.call(aten.unfold.default, x(b), 1, 2, 1), [1, 2, 2, 3, 3, 4], []),
    "triu": (lambda b: b.call(aten.triu.default, x(b, LAST, (2, 3, 3))), [1, 2, 3, 0, 2, 3, 0, 0, 3], []),
    "meshgrid": (
        lambda b: b.call(aten.meshgrid.indexing, [x(b, [1, 2], (2,)), x(b, [3, 4], (2,))], indexing="ij"),
        [[1, 2], [3, 4]],
        [],
    ),
    "cat of channels": (
        lambda b: b.call(aten.cat.default, [x(b), x(b, MORE)], 1),
        [1, 2, 3, 4, 5, 6, 7, 8],
        [],
    ),
    "cat of positions": (
        lambda b: b.call(aten.cat.default, [x(b), x(b, MORE)], 2),
        KEPT,
        [[1, 5], [2, 6], [3, 7], [4, 8]],
    ),
    "stack": (lambda b: b.call(aten.stack.default, [x(b), x(b, MORE)], 1), [1, 2, 3, 4, 5, 6, 7, 8], []),
    "index": (
        lambda b: b.call(aten.index.Tensor, x(b), [None, b.constant(torch.tensor([3, 0, 0]))]),
        [4, 1, 1],
        [],
    ),
    "index over positions": (
        lambda b: b.call(aten.index.Tensor, x(b), [None, None, b.input(torch.tensor([1, 0]))]),
        KEPT,
        [],
    ),
    "index_select": (lambda b: b.call(aten.index_select.default, x(b), 1, b.constant(torch.tensor([2]))), [3], []),
    # pads
    "zeros beside positions": (lambda b: b.call(aten.constant_pad_nd.default, x(b), [1, 1]), KEPT, []),
    "zeros beside channels": (
        lambda b: b.call(aten.constant_pad_nd.default, x(b), [0, 0, 1, 2]),
        [0, 1, 2, 3, 4, 0, 0],
        [],
    ),
    "reflected positions": (lambda b: b.call(aten.reflection_pad1d.default, x(b), [1, 1]), KEPT, []),
    # neighbours, axes
    "pool": (lambda b: b.call(aten.max_pool1d.default, x(b), [2]), KEPT, []),
    "pool over channels": (lambda b: b.call(aten.avg_pool1d.default, x(b, LAST), [2]), [1], [[1, 2, 3]]),
    "pool of a table": (
        lambda b: b.call(aten.avg_pool1d.default, x(b, TABLE), [2]),
        [1, 4, 7, 10],
        [[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12]],
    ),
    "nearest": (lambda b: b.call(aten.upsample_nearest1d.default, x(b), [6]), KEPT, []),
    "a grid": (
        lambda b: b.call(
            aten.grid_sampler.default,
            x(b, [[[[1]], [[2]]]], (2, 2, 3, 3)),
            b.input(torch.zeros(2, 3, 3, 2)),
            0,
            0,
            False,
        ),
        [1, 2],
        [],
    ),
    "softmax over positions": (lambda b: b.call(aten.softmax.int, x(b), 2), KEPT, []),
    "softmax over channels": (lambda b: b.call(aten.softmax.int, x(b), -2), [1], [[1, 2, 3, 4]]),
    "cumsum over channels": (lambda b: b.call(aten.cumsum.default, x(b), 1), [1], [[1, 2, 3, 4]]),
    "sort over channels": (lambda b: b.call(aten.sort.default, x(b), 1), [[1], [1]], [[1, 2, 3, 4]]),
    "sum over positions": (lambda b: b.call(aten.sum.dim_IntList, x(b), [2]), KEPT, []),
    "sum over channels": (lambda b: b.call(aten.sum.dim_IntList, x(b), [1]), [0], []),
    "mean over channels, kept": (lambda b: b.call(aten.mean.dim, x(b), [1], True), [0], []),
    "amax over channels": (lambda b: b.call(aten.amax.default, x(b), [1]), [1], [[1, 2, 3, 4]]),
    "amax over positions": (lambda b: b.call(aten.amax.default, x(b), [-1]), KEPT, []),
    "var_mean over positions": (lambda b: b.call(aten.var_mean.correction, x(b), [2]), [KEPT, KEPT], []),
    "prod over channels": (lambda b: b.call(aten.prod.dim_int, x(b), 1), [1], [[1, 2, 3, 4]]),
    "sum of a table": (
        lambda b: b.call(aten.sum.dim_IntList, x(b, TABLE), [2]),
        [1, 4, 7, 10],
        [[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12]],
    ),
    # norms
    "layer norm of positions": (lambda b: b.call(aten.layer_norm.default, x(b), [3]), KEPT, []),
    "layer norm of channels": (lambda b: b.call(aten.layer_norm.default, x(b, LAST), [3]), [1], [[1, 2, 3]]),
    "rms norm of channels": (lambda b: b.call(aten.rms_norm.default, x(b, LAST), [3]), [1, 2, 3], []),
    "rms norm of both": (
        lambda b: b.call(aten.rms_norm.default, x(b, TABLE), [4, 3]),
        [1],
        [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]],
    ),
    "group norm": (lambda b: b.call(aten.group_norm.default, x(b), 2), [1, 1, 3, 3], [[1, 2], [3, 4]]),
    "batch norm": (
        lambda b: b.call(
            aten.batch_norm.default,
            *(x(b), *(b.constant(torch.ones(4)) for _ in range(4)), False, 0.1, 1e-5, False),
        ),
        KEPT,
        [],
    ),
    "instance norm": (
        lambda b: b.call(aten.instance_norm.default, x(b), None, None, None, None, True, 0.1, 1e-5, False),
        KEPT,
        [],
    ),
    "prelu": (lambda b: b.call(aten.prelu.default, x(b), b.constant(torch.ones(4))), KEPT, []),
    "glu": (lambda b: b.call(aten.glu.default, x(b), 1), [1, 2], [[1, 3], [2, 4]]),
    "im2col": (
        lambda b: b.call(aten.im2col.default, x(b, [[[[1]], [[2]]]], (2, 2, 3, 3)), [1, 2], [1, 1], [0, 0], [1, 1]),
        [1, 1, 2, 2],
        [],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_rule_gives_the_labels_that_were_written_by_hand(name: str) -> None:
    build, expected, coupled = CASES[name]
    node, propagation = run_flow(build)
    assert flat(propagation.flow.labels[node]) == expected
    assert partition(propagation.flow, propagation.count) == coupled
    assert pinned(propagation.flow, propagation.count) == []


def test_every_rule_without_a_weight_has_a_case() -> None:
    seen = set()
    for build, _, _ in CASES.values():
        _, propagation = run_flow(build)
        seen |= {operator_of(each.target).family for each in propagation.program.module.graph.nodes}
    with_weights = {"linear", "convolution", "transposed convolution", "product", "sum of products", "einsum"}
    assert set(RULES) - with_weights - {"attention", "lookup", "size", "put"} - seen == set()


ALL_KEPT: dict[str, Build] = {
    "an unknown operator": lambda b: b.call(aten.kron.default, x(b), b.constant(torch.eye(2))),
    "a fold": lambda b: b.call(
        aten.col2im.default, x(b, [[[1, 2, 3, 4, 5, 6, 7, 8, 9]]], (2, 4, 9)), [4, 4], [2, 2], [1, 1], [0, 0], [1, 1]
    ),
    "a matrix norm": lambda b: b.call(aten.linalg_norm.ord_str, x(b), "fro", [1, 2]),
    "a sum with what has none": lambda b: b.call(
        aten.mul.Tensor, b.call(aten.add.Tensor, x(b), x(b, None)), b.constant(torch.ones(()))
    ),
    "a table of pairs": lambda b: b.call(aten.mul.Tensor, x(b, shape=(2, 4, 1)), x(b, [[[5, 6, 7]]], (2, 1, 3))),
    "gather": lambda b: b.call(aten.gather.default, x(b), 1, b.constant(torch.zeros(2, 2, 3, dtype=torch.long))),
    "an index that varies": lambda b: b.call(aten.index.Tensor, x(b), [None, b.input(torch.tensor([1, 0]))]),
    "reflected channels": lambda b: b.call(aten.reflection_pad1d.default, x(b, LAST), [1, 1]),
    "channels that are cut": lambda b: b.call(aten.constant_pad_nd.default, x(b), [0, 0, -1, 1]),
    "a scatter": lambda b: b.call(aten.slice_scatter.default, x(b), x(b, MORE), 1),
    "statistics": lambda b: b.call(
        aten.native_layer_norm.default, x(b), [3], b.constant(torch.ones(3)), b.constant(torch.ones(3)), 1e-5
    ),
    "nothing left": lambda b: b.call(aten.slice.Tensor, x(b), 1, 0, 0),
}


@pytest.mark.parametrize("name", ALL_KEPT)
def test_what_no_rule_can_tell_stays(name: str) -> None:
    node, propagation = run_flow(ALL_KEPT[name])
    assert pinned(propagation.flow, propagation.count) == list(range(1, propagation.count + 1))
    if name != "a sum with what has none":  # there, labels say with which others they stay
        assert not any(any(part) if isinstance(part, list) else part for part in flat(propagation.flow.labels[node]))
