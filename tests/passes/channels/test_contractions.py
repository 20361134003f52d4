"""Columns that a contraction reads, rows that it makes, and what it ties together: by hand, on one operator each."""

from typing import Any

import pytest
import torch
from channels_support import Builder, Labelled, aten, flat, partition, pinned, run_flow
from torch import fx

from srigl_fx.passes.channels.flow import Site

LAST = [[[1, 2, 3]]]  # along axis 2 of (2, 4, 3)
IMAGE = [[[[1]], [[2]], [[3]], [[4]]]]  # along axis 1 of (2, 4, 5, 5)


def data(b: Builder, labels: Any = LAST, *shape: int) -> fx.Node:
    return b.input(torch.rand(shape or (2, 4, 3)), labels)


def weight(b: Builder, *shape: int) -> fx.Node:
    return b.constant(torch.rand(shape) + 0.5, "weight")


def sites(propagation: Labelled) -> list[tuple[list[list[int]], list[list[int]], str]]:
    return [(site.rows.tolist(), site.columns.tolist(), site.layout) for site in propagation.flow.sites]


# -- rules 1 and 2: a constant weight ---------------------------------------------------------------------------------


def test_a_linear_layer_reads_the_last_axis_and_makes_new_rows() -> None:
    node, found = run_flow(lambda b: b.call(aten.linear.default, data(b), weight(b, 2, 3), b.constant(torch.ones(2))))
    assert sites(found) == [([[4, 5]], [[1, 2, 3]], "rows first")]
    assert flat(found.flow.labels[node]) == [4, 5]
    assert found.flow.labels[node].shape == (1, 1, 2)
    assert found.flow.sites[0].places == 8  # of a sample, with the batch for one here
    assert partition(found.flow, 5) == []
    assert pinned(found.flow, 5) == []


def test_a_channel_goes_at_all_positions_or_at_none() -> None:
    table = [[[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12]]]
    _, found = run_flow(lambda b: b.call(aten.linear.default, data(b, table), weight(b, 2, 3)))
    assert partition(found.flow, 12) == [[1, 4, 7, 10], [2, 5, 8, 11], [3, 6, 9, 12]]


@pytest.mark.parametrize(
    ("target", "layout"),
    [
        (aten.matmul.default, "columns first"),
        (aten.einsum.default, "rows first"),
        (aten.addmm.default, "columns first"),
    ],
)
def test_other_spellings_of_a_linear_layer(target: Any, layout: str) -> None:
    def build(b: Builder) -> fx.Node:
        if target is aten.einsum.default:
            return b.call(target, "bsc,oc->bso", [data(b), weight(b, 2, 3)])
        if target is aten.addmm.default:
            return b.call(target, b.constant(torch.ones(2)), data(b, [[1, 2, 3]], 4, 3), weight(b, 3, 2))
        return b.call(target, data(b), weight(b, 3, 2))

    node, found = run_flow(build)
    assert sites(found) == [([[4, 5]], [[1, 2, 3]], layout)]
    assert flat(found.flow.labels[node]) == [4, 5]


def test_a_convolution_reads_the_axis_in_front_of_the_kernel() -> None:
    node, found = run_flow(lambda b: b.call(aten.conv2d.default, data(b, IMAGE, 2, 4, 5, 5), weight(b, 3, 4, 2, 2)))
    assert sites(found) == [([[5, 6, 7]], [[1, 2, 3, 4]], "rows first")]
    assert found.flow.labels[node].shape == (1, 3, 1, 1)
    assert found.flow.sites[0].places == 2 * 4 * 4 * 4  # batch, positions, kernel


def test_groups_of_a_convolution_go_as_a_whole() -> None:
    _, found = run_flow(
        lambda b: b.call(
            aten.conv2d.default, data(b, IMAGE, 2, 4, 5, 5), weight(b, 6, 2, 1, 1), None, [1, 1], [0, 0], [1, 1], 2
        )
    )
    assert sites(found) == [([[5, 6, 7], [8, 9, 10]], [[1, 2], [3, 4]], "rows first")]
    whole = [11, 12]
    assert [(one.tolist(), many.tolist()) for one, many in found.flow.hulls] == [
        (whole, [[5, 6, 7], [8, 9, 10]]),
        (whole, [[1, 2], [3, 4]]),
    ]


def test_rows_of_a_depthwise_convolution_are_its_columns() -> None:
    node, found = run_flow(
        lambda b: b.call(
            aten.conv2d.default, data(b, IMAGE, 2, 4, 5, 5), weight(b, 4, 1, 3, 3), None, [1, 1], [1, 1], [1, 1], 4
        )
    )
    assert sites(found) == [([[1], [2], [3], [4]], [[1], [2], [3], [4]], "rows first")]
    assert found.flow.sites[0].coupled
    assert flat(found.flow.labels[node]) == [1, 2, 3, 4]
    assert found.flow.hulls == []


def test_a_transposed_convolution_stores_columns_first() -> None:
    _, found = run_flow(
        lambda b: b.call(aten.conv_transpose1d.default, data(b, [[[1], [2], [3], [4]]]), weight(b, 4, 2, 2))
    )
    assert sites(found) == [([[5, 6]], [[1, 2, 3, 4]], "groups and columns first")]


@pytest.mark.parametrize("layout", ["rows first", "columns first", "groups and columns first"])
def test_the_matrix_of_a_weight_is_where_it_was(layout: str) -> None:
    groups = 2 if layout == "groups and columns first" else 1
    rows, columns = torch.zeros(groups, 3), torch.zeros(groups, 4)
    site = Site(None, None, None, None, -1, rows, columns, layout)  # type: ignore[arg-type]
    shape = {"rows first": (3, 4, 5), "columns first": (4, 3), "groups and columns first": (8, 3, 5)}[layout]
    stored = torch.rand(shape)
    matrix = site.matrix(stored)
    assert matrix.shape == (groups, 3, 4, 5 if len(shape) == 3 else 1)
    assert torch.equal(site.tensor(matrix, shape[2:]), stored)
    for group in range(groups):
        for row in range(3):
            for column in range(4):
                place = (row, column) if layout == "rows first" else (4 * group + column, row)
                assert torch.equal(matrix[group, row, column], stored[place].reshape(-1))


def test_sums_with_few_digits_keep_their_order() -> None:
    def build(b: Builder) -> fx.Node:
        half = b.input(torch.ones(2, 4, 3).bfloat16(), LAST)
        return b.call(aten.linear.default, half, b.constant(torch.ones(2, 3).bfloat16()))

    _, found = run_flow(build)
    assert pinned(found.flow, 5) == [1, 2, 3]


@pytest.mark.parametrize("name", ["a computed weight", "a scaled sum", "a constant as data", "two uses in an einsum"])
def test_what_is_no_layer_stays(name: str) -> None:
    def build(b: Builder) -> fx.Node:
        if name == "a computed weight":
            return b.call(aten.linear.default, data(b), data(b, None, 2, 3))
        if name == "a scaled sum":
            ones = b.constant(torch.ones(2))
            return b.call(aten.addmm.default, ones, data(b, [[1, 2, 3]], 4, 3), weight(b, 3, 2), beta=2)
        if name == "a constant as data":
            return b.call(aten.linear.default, weight(b, 4, 3), data(b, [[1, 2, 3]], 2, 3))
        h = data(b)
        return b.call(aten.einsum.default, "bsc,bsc->bs", [h, h])

    node, found = run_flow(build)
    assert found.flow.sites == []
    assert pinned(found.flow, 3) == [1, 2, 3]
    assert not any(flat(found.flow.labels[node]))


# -- rules 3 and 4 ----------------------------------------------------------------------------------------------------


def test_two_uses_of_a_weight_lose_the_same() -> None:
    def build(b: Builder) -> fx.Node:
        one, other = data(b), data(b, [[[4, 5, 6]]])
        first = weight(b, 2, 3)
        second = b.module.graph.node_copy(first)
        return b.call(
            aten.cat.default, [b.call(aten.linear.default, one, first), b.call(aten.linear.default, other, second)], -1
        )

    _, found = run_flow(build)
    assert partition(found.flow, 10) == [[1, 4], [2, 5], [3, 6], [7, 9], [8, 10]]


def test_a_weight_read_in_two_directions_loses_the_same_of_each_axis() -> None:
    def build(b: Builder) -> fx.Node:
        first = weight(b, 3, 3)
        second = b.module.graph.node_copy(first)
        return b.call(aten.matmul.default, b.call(aten.linear.default, data(b), first), second)

    _, found = run_flow(build)
    # The rows of the first use (4, 5, 6) are the first axis, and so are the columns of the second, which reads them.
    assert sites(found) == [([[4, 5, 6]], [[1, 2, 3]], "rows first"), ([[7, 8, 9]], [[4, 5, 6]], "columns first")]
    assert partition(found.flow, 9) == [[1, 7], [2, 8], [3, 9]]


def test_a_table_has_one_channel_for_each_column() -> None:
    node, found = run_flow(lambda b: b.call(aten.embedding.default, weight(b, 9, 3), b.input(torch.tensor([[1, 0]]))))
    assert sites(found) == [([[1, 2, 3]], [[0] * 9], "columns first")]
    assert found.flow.labels[node].shape == (1, 1, 3)


# -- rules 5 to 8: products of activations ----------------------------------------------------------------------------


def heads(first: int) -> list[Any]:
    """Two heads of three channels, along axes 1 and 3 of (2, 2, 4, 3)."""
    return [[[[first, first + 1, first + 2]], [[first + 3, first + 4, first + 5]]]]


def test_queries_and_keys_are_coupled_and_a_head_goes_with_all_of_them() -> None:
    def build(b: Builder) -> fx.Node:
        q, k = data(b, heads(1), 2, 2, 4, 3), data(b, heads(7), 2, 2, 4, 3)
        return b.call(aten.matmul.default, q, b.call(aten.transpose.int, k, 2, 3))

    node, found = run_flow(build)
    assert partition(found.flow, 12) == [[1, 7], [2, 8], [3, 9], [4, 10], [5, 11], [6, 12]]
    assert flat(found.flow.labels[node]) == [13, 14]
    assert found.flow.labels[node].shape == (1, 2, 1, 1)
    ((whole, members),) = found.flow.hulls
    assert whole.tolist() == [13, 14]
    assert members.tolist() == [[1, 2, 3], [4, 5, 6]]
    (pairing,) = found.flow.pairings
    assert (pairing.left_axis, pairing.right_axis, pairing.softmax) == (-1, -2, False)


@pytest.mark.parametrize(("dim", "scale", "expected"), [(-1, True, True), (3, False, True), (2, True, False)])
def test_a_softmax_over_the_positions_of_keys_is_seen_through_a_scale(dim: int, scale: bool, expected: bool) -> None:
    def build(b: Builder) -> fx.Node:
        q, k = data(b, heads(1), 2, 2, 4, 3), data(b, heads(7), 2, 2, 4, 3)
        scores = b.call(aten.matmul.default, q, b.call(aten.transpose.int, k, 2, 3))
        return b.call(aten.softmax.int, b.call(aten.mul.Tensor, scores, 0.5) if scale else scores, dim)

    _, found = run_flow(build)
    assert [pairing.softmax for pairing in found.flow.pairings] == [expected]


def test_values_go_through_and_a_head_of_scores_goes_with_its_values() -> None:
    def build(b: Builder) -> fx.Node:
        scores = data(b, [[[[1]], [[2]]]], 2, 2, 4, 4)
        return b.call(aten.matmul.default, scores, data(b, heads(3), 2, 2, 4, 3))

    node, found = run_flow(build)
    assert flat(found.flow.labels[node]) == [3, 4, 5, 6, 7, 8]
    ((whole, members),) = found.flow.hulls
    assert whole.tolist() == [1, 2]
    assert members.tolist() == [[3, 4, 5], [6, 7, 8]]
    assert partition(found.flow, 8) == []


def test_attention_is_both() -> None:
    def build(b: Builder) -> fx.Node:
        q, k, v = (data(b, heads(first), 2, 2, 4, 3) for first in (1, 7, 13))
        return b.call(aten.scaled_dot_product_attention.default, q, k, v)

    node, found = run_flow(build)
    assert partition(found.flow, 18) == [[1, 7], [2, 8], [3, 9], [4, 10], [5, 11], [6, 12]]
    assert flat(found.flow.labels[node]) == list(range(13, 19))
    assert [(one.tolist(), many.tolist()) for one, many in found.flow.hulls] == [
        ([19, 20], [[1, 2, 3], [4, 5, 6]]),
        ([19, 20], [[13, 14, 15], [16, 17, 18]]),
    ]
    assert found.flow.pairings[0].softmax


def test_heads_of_queries_share_a_head_of_keys_and_values() -> None:
    def build(b: Builder) -> fx.Node:
        q = data(b, heads(1), 2, 2, 4, 3)
        k, v = (data(b, [[[[first, first + 1, first + 2]]]], 2, 1, 4, 3) for first in (7, 10))
        return b.call(aten.scaled_dot_product_attention.default, q, k, v, enable_gqa=True)

    node, found = run_flow(build)
    assert partition(found.flow, 12) == [[1, 4, 7], [2, 5, 8], [3, 6, 9]]
    assert flat(found.flow.labels[node]) == [10, 11, 12]  # the same for both heads


def test_a_mask_with_channels_along_positions_stays() -> None:
    def build(b: Builder) -> fx.Node:
        q, k, v = (data(b, heads(first), 2, 2, 4, 3) for first in (1, 7, 13))
        return b.call(aten.scaled_dot_product_attention.default, q, k, v, data(b, [[[[19, 20, 21, 22]]]], 2, 2, 4, 4))

    _, found = run_flow(build)
    assert {19, 20, 21, 22} <= set(pinned(found.flow, 22))


def test_what_is_added_to_scores_follows_their_heads() -> None:
    def build(b: Builder) -> fx.Node:
        q, k = data(b, [[[1, 2, 3]]], 2, 4, 3), data(b, [[[4], [5], [6]]], 2, 3, 4)
        return b.call(aten.baddbmm.default, b.constant(torch.ones(2, 4, 4)), q, k)

    node, found = run_flow(build)
    assert partition(found.flow, 6) == [[1, 4], [2, 5], [3, 6]]
    assert [labels.tolist() for _, reader, labels in found.flow.adopted if reader is node] == [[[[7]]]]


def test_constants_follow_what_they_meet() -> None:
    def build(b: Builder) -> fx.Node:
        return b.call(aten.mul.Tensor, data(b), b.constant(torch.rand(3), "scale"))

    node, found = run_flow(build)
    ((constant, reader, labels),) = found.flow.adopted
    assert (constant.target, reader, flat(labels)) == ("scale", node, [1, 2, 3])


def test_a_size_that_is_computed_with_keeps_its_axis_alone() -> None:
    builder = Builder()
    h = data(builder)
    for axis in (1, 2):
        node = builder.module.graph.call_function(aten.sym_size.int, (h, axis))
        node.meta["val"] = 3
    found = builder.propagate()
    assert pinned(found.flow, 3) == [1, 2, 3]
    builder = Builder()
    h = data(builder)
    node = builder.module.graph.call_function(aten.sym_size.int, (h, 1))
    node.meta["val"] = 4
    assert pinned(builder.propagate().flow, 3) == []


def test_what_is_returned_stays() -> None:
    builder = Builder()
    h = data(builder)
    assert pinned(builder.propagate(builder.call(aten.relu.default, h)).flow, 3) == [1, 2, 3]
