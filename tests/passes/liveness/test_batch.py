"""What may change with the batch size: each rule, asked of one operator on values whose batch axes are symbolic."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from liveness_support import Batched
from torch import fx

from srigl_fx.passes.liveness.batch import batch_axes, depends_on_batch_size, regrouped_axes, sample_axes

aten = torch.ops.aten


Make = Callable[[Batched], fx.Node]

CASES: dict[str, tuple[Make, bool]] = {
    "rule 1: a size as a factor": (lambda b: b.call(aten.mul.Tensor, b.x, b.size), True),
    "rule 1: a size as a size": (lambda b: b.call(aten.reshape.default, b.x, [b.size, 24]), False),
    "rule 1: as many zeros": (lambda b: b.call(aten.new_zeros.default, b.x, [b.size, 2]), False),
    "rule 1: filled with the size": (lambda b: b.call(aten.new_full.default, b.x, [2], b.size), True),
    "rule 1: as many of a number": (lambda b: b.call(aten.new_full.default, b.x, [b.size], 3.0), False),
    "rule 1: a list of sizes with the size": (lambda b: b.call(aten.full.default, [b.size, 2], 1.0), False),
    "rule 1: all samples": (lambda b: b.call(aten.slice.Tensor, b.x, 0, 0, b.size), False),
    "rule 1: all samples, from behind": (lambda b: b.call(aten.slice.Tensor, b.x, -3, 0, b.size), False),
    "rule 1: as many channels": (lambda b: b.call(aten.slice.Tensor, b.x, 1, 0, b.size), True),
    "rule 1: the channel of that number": (
        lambda b: b.call(aten.select.int, b.input(8, 9, axis=None), 0, b.size),
        True,
    ),
    "rule 1: numbers up to the size": (lambda b: b.call(aten.arange.default, b.size), True),
    "rule 2: no batch at all": (lambda b: b.call(aten.sum.default, b.input(3, 4, axis=None)), False),
    "rule 4: samples times a matrix": (lambda b: b.call(aten.matmul.default, b.x, b.input(6, 2, axis=None)), False),
    "rule 4: samples behind other axes": (
        lambda b: b.call(aten.matmul.default, b.input(3, 5, 6, axis=1), b.input(6, 2, axis=None)),
        False,
    ),
    "rule 4: a sum over samples": (
        lambda b: b.call(aten.matmul.default, b.input(3, 5, axis=1), b.input(5, 2, axis=None)),
        True,
    ),
    "rule 4: a sum over samples, with an addend": (
        lambda b: b.call(aten.addmm.default, b.input(2, axis=None), b.input(3, 5, axis=1), b.input(5, 2, axis=None)),
        True,
    ),
    "rule 4: an addend that is batched": (
        lambda b: b.call(aten.addmm.default, b.input(5, 2), b.input(5, 3), b.input(3, 2, axis=None)),
        False,
    ),
    "rule 4: a stack of products": (
        lambda b: b.call(aten.baddbmm.default, b.input(5, 2, 3), b.input(5, 2, 4), b.input(5, 4, 3)),
        False,
    ),
    "rule 4: linear": (lambda b: b.call(aten.linear.default, b.x, b.input(7, 6, axis=None)), False),
    "rule 4: linear over samples": (
        lambda b: b.call(aten.linear.default, b.samples_last(), b.input(7, 5, axis=1)),
        True,
    ),
    "rule 5: attention within samples": (lambda b: attention(b, b.input(5, 2, 4, 6)), False),
    "rule 5: attention within samples behind other axes": (lambda b: attention(b, b.input(2, 5, 4, 6, axis=1)), False),
    "rule 5: attention over samples": (lambda b: attention(b, b.input(2, 5, 6, axis=1)), True),
    "rule 5: attention with samples as channels": (lambda b: attention(b, b.input(2, 4, 5, axis=2)), True),
    "rule 6: stored statistics": (lambda b: batch_norm(b, training=False), False),
    "rule 6: statistics of the batch": (lambda b: batch_norm(b, training=True), True),
    "rule 6: stored statistics, three results": (
        lambda b: b.call(aten._native_batch_norm_legit_no_training.default, b.x, None, None, *vectors(b), 0.1, 1e-5),
        False,
    ),
    "rule 6: statistics of the batch, without stored ones": (
        lambda b: b.call(aten._native_batch_norm_legit.no_stats, b.x, None, None, True, 0.1, 1e-5),
        True,
    ),
    "rule 7: a part of the samples": (lambda b: b.call(aten.slice.Tensor, b.x, 0, 0, 2), False),
    "rule 7: a part of what merges samples": (lambda b: b.call(aten.slice.Tensor, b.merged(), 0, 0, 2), True),
    "rule 7: every other one of what merges samples": (
        lambda b: b.call(aten.slice.Tensor, b.merged(), 0, 0, 1 << 62, 2),
        True,
    ),
    "rule 7: one of what merges samples": (lambda b: b.call(aten.select.int, b.merged(), 0, 1), True),
    "rule 7: rows by number of what merges samples": (
        lambda b: b.call(aten.index_select.default, b.merged(), 0, b.input(2, axis=None, dtype=torch.int64)),
        True,
    ),
    "rule 7: rows by number of samples": (
        lambda b: b.call(aten.index_select.default, b.x, 0, b.input(2, axis=None, dtype=torch.int64)),
        False,
    ),
    "rule 7: channels beside merged samples": (lambda b: b.call(aten.slice.Tensor, b.merged(), 1, 0, 2), False),
    "rule 7: channels beside merged samples, from behind": (
        lambda b: b.call(aten.slice.Tensor, b.merged(), -1, 0, 2),
        False,
    ),
    "rule 8: element by element": (lambda b: b.call(aten.mul.Tensor, b.x, b.x), False),
    "rule 8: element by element, samples last": (lambda b: b.call(aten.relu.default, b.samples_last()), False),
    "rule 8: reversed along the samples": (lambda b: b.call(aten.flip.default, b.x, [0]), False),
    "rule 8: joined along the samples": (lambda b: b.call(aten.cat.default, [b.x, b.x], 0), False),
    "rule 9: a mean of channels": (lambda b: b.call(aten.mean.dim, b.x, [1]), False),
    "rule 9: a mean of samples": (lambda b: b.call(aten.mean.dim, b.x, [0]), True),
    "rule 9: a mean of samples, among others": (lambda b: b.call(aten.mean.dim, b.x, [2, -3]), True),
    "rule 9: a softmax of samples": (lambda b: b.call(aten.softmax.int, b.samples_last(), -1), True),
    "rule 9: a softmax of channels": (lambda b: b.call(aten.softmax.int, b.samples_last(), 1), False),
    "rule 10: a sum of all": (lambda b: b.call(aten.sum.default, b.x), True),
    "rule 10: pooled": (lambda b: b.call(aten.avg_pool1d.default, b.x, [2]), False),
    "rule 10: pooled over samples": (lambda b: b.call(aten.avg_pool1d.default, b.samples_last(), [1]), True),
    "rule 9: tokens normalised by channels": (
        lambda b: b.call(aten.layer_norm.default, b.input(5, 7, 6, axis=(0, 1)), [6]),
        False,
    ),
    "rule 9: samples normalised by tokens": (
        lambda b: b.call(aten.layer_norm.default, b.input(5, 7, axis=(0, 1)), [7]),
        True,
    ),
    "rule 10: normalised by sample": (lambda b: b.call(aten.layer_norm.default, b.x, [6]), False),
    "rule 1: normalised over as many": (
        lambda b: b.call(aten.layer_norm.default, b.input(3, 5, axis=1), [b.size]),
        True,
    ),
    "rule 10: convolved": (lambda b: b.call(aten.conv1d.default, b.x, b.input(3, 4, 3, axis=None)), False),
    "rule 10: convolved over samples": (
        lambda b: b.call(aten.conv1d.default, b.input(2, 4, 7, axis=2), b.input(3, 4, 3, axis=None)),
        True,
    ),
}


def vectors(b: Batched) -> tuple[fx.Node, fx.Node]:
    return b.input(4, axis=None), b.input(4, axis=None)


def batch_norm(b: Batched, *, training: bool) -> fx.Node:
    return b.call(aten.batch_norm.default, b.x, None, None, *vectors(b), training, 0.1, 1e-5, False)


def attention(b: Batched, x: fx.Node) -> fx.Node:
    node = b.graph.call_function(aten.scaled_dot_product_attention.default, (x, x, x))
    node.meta["val"] = x.meta["val"]
    return node


@pytest.mark.parametrize("name", CASES)
def test_each_rule(name: str) -> None:
    make, expected = CASES[name]
    assert depends_on_batch_size(make(Batched())) is expected


@pytest.mark.parametrize(
    ("equation", "axes", "expected"),
    [
        ("bi,ij->bj", (0, None), False),
        ("bi,ij->j", (0, None), True),
        ("b i , i j -> b j", (0, None), False),
        ("bi,ij", (0, None), True),
        ("...i,ij->...j", (0, None), False),
        ("i...,ij->...j", (1, None), False),
        ("i...b,ij->...j", (1, None), True),
        ("...b,ij->ij", (1, None), True),
        ("ij,bi->bj", (None, 0), False),
        ("ij,bi->j", (None, 0), True),
    ],
)
def test_rule_3_a_sum_over_samples_in_an_einsum(equation: str, axes: tuple[int | None, ...], expected: bool) -> None:
    b = Batched()
    tensors = [b.input(5, 5, axis=axis) for axis in axes]
    node = b.graph.call_function(aten.einsum.default, (equation, tensors))
    assert depends_on_batch_size(node) is expected


def test_what_is_no_operator_does_not_depend_on_it() -> None:
    b = Batched()
    assert not depends_on_batch_size(b.x)
    assert not depends_on_batch_size(b.graph.call_function(len, (b.size,)))


def test_batch_axes_are_symbolic_and_sample_axes_count_nothing_else() -> None:
    b = Batched()
    assert batch_axes(b.x) == sample_axes(b.x) == (0,)
    assert batch_axes(b.samples_last()) == sample_axes(b.samples_last()) == (2,)
    assert (batch_axes(b.merged()), sample_axes(b.merged())) == ((0,), ())
    one_more = b.call(aten.cat.default, [b.x, b.input(1, 4, 6, axis=None)], 0)
    assert batch_axes(one_more) == sample_axes(one_more) == (0,)
    assert batch_axes(b.size) == batch_axes(3) == ()


@pytest.mark.parametrize(
    ("axis", "sizes", "to", "axes"),
    [
        (0, (5, 4, 6), [-1, 24], ()),  # rule 11: nothing stands before the samples, nor will
        (1, (3, 5, 4), [3, -1, 2, 2], ()),
        (1, (4, 5, 6), [2, 2, -1, 6], ()),
        (1, (3, 5, 4), [-1, 4], (0, 1)),  # rule 12: four numbers that repeat do so still
        (1, (3, 5, 4), [-1, 2, 2], (0, 1)),
        (1, (3, 5, 4), [-1, 2], (0, 1)),  # (6 B, 2): 12 is a multiple of 4
        (1, (3, 5, 4), [-1], (0, 1)),
        (1, (3, 5), [-1], (0, 1)),
        (0, (5, 4, 6), [4, -1, 6], (0, 1, 2)),  # rule 14: B has no coefficient of its own there
        (1, (3, 5, 4), [2, -1, 3], (0, 1, 2)),
        (0, (5, 4, 6), [-1, 4, 6], ()),  # no change
        (None, (3, 4), [12], ()),  # no batch
    ],
)
def test_what_a_reshape_may_mix(axis: int | None, sizes: tuple[int, ...], to: list[int], axes: tuple[int, ...]) -> None:
    b = Batched()
    assert regrouped_axes(b.call(aten.reshape.default, b.input(*sizes, axis=axis), to)) == axes


@pytest.mark.parametrize(
    ("free", "sizes", "to", "axes"),
    [
        ((0, 1), (5, 7, 6), lambda one, other: [one, other, 2, 3], ()),  # rule 11: heads of a token
        ((0, 1), (5, 7, 2, 3), lambda one, other: [one, other, 6], ()),
        ((0, 3), (5, 2, 2, 7, 6), lambda one, other: [one, 4, other, 6], ()),  # as many places between them
        ((0, 1), (5, 7, 6), lambda one, other: [-1, 6], (0, 1)),  # rule 13: tokens of all samples
        ((0, 1), (5, 7, 6), lambda one, other: [other, one, 6], (0, 1)),
        ((0, 1), (5, 7, 6), lambda one, _: [one, -1, 3], (0, 1, 2)),  # rule 14: tokens and channels
        ((0, 1), (5, 7, 6), lambda one, other: [one, 6, other], (0, 1, 2)),
        ((0, 2), (5, 4, 7, 6), lambda one, _: [one, 2, -1, 6], (0, 1, 2)),
    ],
)
def test_what_a_reshape_of_samples_and_tokens_may_mix(
    free: tuple[int, ...], sizes: tuple[int, ...], to: Callable[[Any, Any], list[Any]], axes: tuple[int, ...]
) -> None:
    b = Batched()
    x = b.input(*sizes, axis=free)
    one, other = (b.call(aten.sym_size.int, x, axis) for axis in free)
    assert regrouped_axes(b.call(aten.reshape.default, x, to(one, other))) == axes


def test_only_reshapes_regroup() -> None:
    b = Batched()
    assert regrouped_axes(b.samples_last()) == ()
    assert regrouped_axes(b.x) == ()
