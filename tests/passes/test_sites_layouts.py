"""From an operand to the axes of a matrix view, and from an operation to strides: every refusal and every odd size."""

from typing import Any

import pytest
import torch
from torch import Tensor

from srigl_fx.passes.sites.contractions import Operand
from srigl_fx.passes.sites.weight_layout import LOOKED_UP, Layout, equal_blocks, layout_of
from srigl_fx.passes.sites.weight_views import Factor, WeightView, is_view


def view(shape: tuple[int, ...], *calls: tuple[Any, ...]) -> WeightView:
    """A parameter of this shape, through methods of tensors."""
    found = WeightView.whole(torch.empty(shape))
    for name, *args in calls:
        found = found.through(getattr(Tensor, name), *args)
        assert isinstance(found, WeightView)
    return found


def layout(shape: tuple[int, ...], roles: str, *calls: tuple[Any, ...], **operand: Any) -> Layout | str:
    return layout_of(view(shape, *calls), Operand(value=None, roles=roles, **operand))


# Shape, calls, roles; and what comes of it: kind, view, neuron axes, input axes, blocks.
AXES: dict[str, tuple[Any, ...]] = {
    "whole": ((6, 4), [], "ni", "linear", (6, 4), (0,), (1,), 1),
    "the other way": ((6, 4), [], "in", "linear_in_out", (6, 4), (1,), (0,), 1),
    "rule 2: two heads of an axis": (
        (6, 4),
        [("reshape", (2, 3, 4))],
        "nin",
        "einsum",
        (2, 3, 4),
        (0, 2),
        (1,),
        1,
    ),
    "rule 2: cut in another order": (
        (4, 6),
        [("reshape", (4, 2, 3)), ("permute", (1, 0, 2))],
        "bin",
        "stack",
        (4, 2, 3),
        (1, 2),
        (0,),
        2,
    ),
    "rule 3: one of a stack": ((3, 5, 4), [("select", 0, 1)], "ni", "stack", (3, 5, 4), (0, 1), (2,), 3),
    "rule 3: one of a stack along the inputs": (
        (5, 4, 3),
        [("select", 2, 1)],
        "ni",
        "stack",
        (5, 4, 3),
        (2, 0),
        (1,),
        3,
    ),
    "rule 3: one of a stack of stacks": (
        (2, 3, 5, 4),
        [("select", 0, 1), ("select", 0, 1)],
        "ni",
        "stack",
        (2, 3, 5, 4),
        (0, 1, 2),
        (3,),
        6,
    ),
    "rule 6: neighbours of one role in one axis": (
        (12, 4),
        [("reshape", (2, 6, 4))],
        "nni",
        "linear",
        (12, 4),
        (0,),
        (1,),
        1,
    ),
    "rule 6: neighbours of one role in two axes": ((2, 6, 4), [], "nni", "einsum", (2, 6, 4), (0, 1), (2,), 1),
    "rule 7: a neuron of size 1": ((1, 4), [], "ni", "linear", (1, 4), (0,), (1,), 1),
    "rule 7: a stack of one": ((1, 6, 4), [], "bni", "einsum", (1, 6, 4), (0, 1), (2,), 1),
    "rule 7: in the middle": ((6, 1, 4), [], "nni", "einsum", (6, 1, 4), (0, 1), (2,), 1),
    "rule 8: a batch of matrices": ((3, 5, 4), [], "bin", "stack", (3, 5, 4), (0, 2), (1,), 3),
    "rule 8: a batch behind": ((5, 4, 3), [], "nib", "stack", (5, 4, 3), (2, 0), (1,), 3),
    "rule 9: only a batch and inputs": ((3, 4), [], "bi", "linear", (3, 4), (0,), (1,), 1),
    "sliced": ((6, 4), [("narrow", 0, 2, 3)], "ni", "linear", (6, 4), (0,), (1,), 1),
    "repeated": ((6, 4), [("expand", 5, 6, 4)], "bni", "linear", (6, 4), (0,), (1,), 1),
}


@pytest.mark.parametrize("name", AXES)
def test_axes_of_what_is_contracted(name: str) -> None:
    shape, calls, roles, kind, axes, neurons, inputs, blocks = AXES[name]
    found = layout(shape, roles, *calls)
    assert isinstance(found, Layout)
    assert (found.kind, found.view, found.neuron_axes, found.input_axes) == (kind, axes, neurons, inputs)
    if blocks == 1:
        assert len(found.blocks) <= 1
    else:
        size = found.rows // blocks
        assert [(b.name, b.start, b.stop) for b in found.blocks] == [
            (str(i), i * size, (i + 1) * size) for i in range(blocks)
        ]


def test_a_layout_that_selects_keeps_its_neurons_apart() -> None:
    """The rows of the first block are those of the first matrix, wherever the stack lies."""
    found = layout((5, 4, 3), "ni", ("select", 2, 1))
    assert isinstance(found, Layout)
    weight = torch.arange(60).reshape(5, 4, 3)
    matrix = weight.reshape(found.view).permute(found.neuron_axes + found.input_axes).reshape(found.rows, -1)
    assert torch.equal(matrix[:5], weight[:, :, 0])


@pytest.mark.parametrize(
    ("shape", "calls", "roles", "reason"),
    [
        ((4, 6), [("unsqueeze", 0), ("unsqueeze", 0)], "ni", "a 4-D view of the weight is contracted in a way"),
        ((5, 4), [("select", 0, 1)], "i", LOOKED_UP),
        ((3, 5, 4), [("select", 1, 1)], "bi", LOOKED_UP),
        ((5, 4), [], "bn", "it is multiplied element by element"),
        ((5, 4), [], "nn", "it is multiplied element by element"),
        ((6, 1), [], "ni", "it is multiplied element by element"),
        ((1, 1), [], "ni", "it is multiplied element by element"),
        ((3, 5, 4), [("select", 0, 1)], "nn", "it is multiplied element by element"),
    ],
)
def test_rules_4_and_5_what_has_no_fan_in(shape: Any, calls: Any, roles: str, reason: str) -> None:
    found = layout(shape, roles, *calls)
    assert isinstance(found, str)
    assert found.startswith(reason)


def test_rule_2_pieces_that_overlap_are_no_axes() -> None:
    """Every second row, and all of them: the two factors run over the same stretch."""
    dims = ((Factor(4, 6, 6),), (Factor(2, 12, 12),))
    overlapping = WeightView(0, (6, 4), dims)
    found = layout_of(overlapping, Operand(value=None, roles="ni"))
    assert found == "its uses cut it in pieces that are no axes"
    across = WeightView(0, (6, 4), ((Factor(8, 2, 2),), (Factor(1, 8, 8),)))  # 2 * 8 is no divisor of 24
    assert layout_of(across, Operand(value=None, roles="ni")) == found


@pytest.mark.parametrize(
    ("kind", "shape", "groups", "expected"),
    [
        ("conv2d", (8, 4, 3, 3), 1, 1),
        ("conv2d", (8, 4, 3, 3), 2, 2),
        ("conv2d", (8, 4, 3, 3), 0, 1),  # known at run time only: rows are rows
        ("conv2d", (8, 1, 3, 3), 0, 8),  # taken for depthwise
    ],
)
def test_rule_1_the_groups_of_a_convolution(kind: Any, shape: Any, groups: int, expected: int) -> None:
    found = layout(shape, "niii", kind=kind, groups=groups)
    assert isinstance(found, Layout)
    assert (found.kind, found.groups, found.view) == (kind, expected, shape)


def test_rule_1_transposed_convolutions_go_by_their_groups() -> None:
    known = layout((8, 3, 2), "ini", kind="conv_transpose1d", groups=2)
    assert isinstance(known, Layout)
    assert (known.view, known.neuron_axes, known.input_axes, known.rows) == ((2, 4, 3, 2), (0, 2), (1, 3), 6)
    unknown = layout((8, 3, 2), "ini", kind="conv_transpose1d", groups=0)
    assert unknown == "a transposed convolution whose groups are not known statically"
    # A part of the weight does not show where its neurons lie across the groups; without groups it does.
    turned = [("transpose", 0, 1), ("transpose", 0, 1), ("reshape", (2, 4, 3, 2)), ("select", 0, 0)]
    assert isinstance(layout((8, 3, 2), "ini", *turned, kind="conv_transpose1d", groups=2), str)
    assert isinstance(layout((8, 3, 2), "ini", *turned, kind="conv_transpose1d"), Layout)


def test_rule_1_a_convolution_that_reads_a_weight_cut_anew_is_one_still() -> None:
    found = layout((8, 4, 3), "nii", ("reshape", (8, 12)), ("reshape", (4, 2, 4, 3)), ("flatten", 0, 1), kind="conv1d")
    assert isinstance(found, Layout)
    assert found.kind == "conv1d"
    turned = layout((4, 8, 3), "nii", ("transpose", 0, 1), kind="conv1d")
    assert isinstance(turned, Layout)
    assert (turned.kind, turned.neuron_axes) == ("einsum", (1,))


@pytest.mark.parametrize(
    ("blocks", "ablatable", "names", "may_be_ablated"),
    [((), True, [], True), (("a", "b"), True, ["a", "b"], True), ((), False, [""], False)],
)
def test_rule_1_blocks_are_those_of_the_operand(
    blocks: tuple[str, ...], ablatable: bool, names: list[str], may_be_ablated: bool
) -> None:
    found = layout((6, 4), "ni", kind="linear", blocks=blocks, ablatable=ablatable)
    assert isinstance(found, Layout)
    assert [block.name for block in found.blocks] == names
    assert all(block.ablatable == may_be_ablated for block in found.blocks)


def test_blocks_of_rows_that_do_not_divide_are_one() -> None:
    (block,) = equal_blocks(7, ("a", "b"), ablatable=False)
    assert (block.name, block.rows, block.ablatable) == ("", 7, False)


def test_layouts_are_equal_where_their_matrices_are() -> None:
    one = Layout.usual("conv2d", (8, 4, 3, 3), groups=2)
    assert one == Layout.usual("other", (8, 4, 3, 3))
    assert one != Layout.usual("linear_in_out", (8, 4))


def test_a_loose_view_is_told_by_its_last_dimensions() -> None:
    picked = WeightView.whole(torch.empty(3, 5, 4)).indexed(0, rank=None)
    assert picked is not None
    found = layout_of(picked, Operand(value=None, roles="bni"))
    assert isinstance(found, Layout)
    assert (found.view, found.neuron_axes, found.input_axes) == ((3, 5, 4), (0, 1), (2,))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *(
            (name, True)
            for name in ("t", "T", "permute", "reshape", "squeeze", "expand", "unbind", "narrow", "getitem")
        ),
        *((name, False) for name in ("flip", "add", "softmax", "mean", "gather")),
    ],
)
def test_operations_that_strides_tell_all_of(name: str, expected: bool) -> None:
    assert is_view(name) == expected


def slices(tensor: Tensor, *index: Any) -> Tensor:
    return tensor[index]


@pytest.mark.parametrize(
    ("shape", "index", "dims"),
    [
        ((6, 4), (slice(1, 4),), [[(4, 3, 6)], [(1, 4, 4)]]),
        ((6, 4), (slice(None), slice(1, 3)), [[(4, 6, 6)], [(1, 2, 4)]]),
        ((6, 4), (slice(None, None, 2),), [[(4, 3, 6)], [(1, 4, 4)]]),  # in steps: a part of one factor
        ((6, 4), (slice(None), slice(None, None, 3)), [[(4, 6, 6)], [(1, 2, 4)]]),
        ((6, 4), (0,), [[(1, 4, 4)]]),
        ((6, 4), (None, 0), [[], [(1, 4, 4)]]),
        ((6, 4), (slice(2, 3),), [[], [(1, 4, 4)]]),
        ((2, 1, 4), (), [[(4, 2, 2)], [], [(1, 4, 4)]]),
    ],
    ids=repr,
)
def test_what_slices_leave(shape: Any, index: Any, dims: Any) -> None:
    found = WeightView.whole(torch.empty(shape)).through(slices, *index)
    assert [[(f.stride, f.size, f.full) for f in dim] for dim in found.dims] == dims


@pytest.mark.parametrize(
    ("shape", "calls", "whole"),
    [
        ((6, 4), [], True),
        ((6, 1, 4), [], True),
        ((6, 4), [("narrow", 0, 1, 2)], True),
        ((6, 4), [("select", 0, 1)], False),
        ((6, 4), [("transpose", 0, 1)], False),
        ((4, 4), [("transpose", 0, 1)], False),
        ((6, 4), [("unsqueeze", 0)], False),
        ((6, 4), [("reshape", (2, 3, 4)), ("select", 0, 1)], False),
        ((6, 4), [("expand", 1, 6, 4), ("squeeze", 0)], True),
    ],
)
def test_what_is_the_parameter_in_order(shape: Any, calls: Any, whole: bool) -> None:
    assert view(shape, *calls).is_whole == whole


def test_a_reshape_across_what_was_sliced_has_no_axes() -> None:
    part = view((6, 4), ("narrow", 1, 0, 3))
    across = part.through(Tensor.reshape, 9, 2)
    assert across is None or isinstance(layout_of(across, Operand(value=None, roles="ni")), str)
    joined = part.through(Tensor.reshape, 18)
    assert [(f.stride, f.size, f.full) for f in joined.dims[0]] == [(4, 6, 6), (1, 3, 4)]


def test_calls_that_fail_or_give_no_tensors_are_unknown() -> None:
    whole = WeightView.whole(torch.empty(6, 4))
    for call in (lambda t: t.select(2, 0), lambda t: t.expand(3, 3), lambda t: t[7], lambda t: t.split("x")):
        assert whole.through(call) is None
    assert whole.through(lambda t: t.shape[0]) is None
    assert whole.through(lambda t: t + 0) is None  # a copy
    parts = whole.through(lambda t: (t[:2], t + 0))
    assert isinstance(parts[0], WeightView)
    assert parts[1] is None


def test_picks_keep_what_is_known_of_leading_dimensions() -> None:
    loose = WeightView.whole(torch.empty(3, 5, 4)).indexed(0, rank=None)
    assert loose is not None
    again = loose.through(Tensor.t)
    assert again.loose
    picked = loose.indexed(0, rank=0)
    assert picked is not None
    assert (picked.loose, picked.dims) == (True, loose.dims[1:])
    second = WeightView.whole(torch.empty(3, 5, 4)).indexed(1, rank=2)
    assert second is not None
    assert [len(dim) for dim in second.dims] == [1, 0, 0, 1]
