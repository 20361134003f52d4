"""Single steps of passes: readers of constants, metadata anew, rows that become one operator, samples of a layer."""

from typing import Any

import pytest
import torch
from channels_support import Builder
from liveness_support import Batched
from torch import Tensor, fx

from srigl_fx.errors import PassError
from srigl_fx.passes.condense import _runs, _same, can_shrink, condensed_rows
from srigl_fx.passes.feature_major import _samples
from srigl_fx.passes.program import Geometry, Program, Use
from srigl_fx.passes.removal import Removal
from srigl_fx.passes.remove_dead import _merge_readers, _notes, _refresh, _size, one_user_each
from srigl_fx.passes.sizes import Sizes

aten = torch.ops.aten


def names(program: Program) -> list[tuple[str, list[str]]]:
    """The target of each node that reads a constant, and who reads that."""
    return [
        (str(node.target), sorted(user.name for user in node.users))
        for node in program.module.graph.find_nodes(op="get_attr")
    ]


def test_each_use_of_a_constant_has_a_reader_until_they_are_merged() -> None:
    b = Builder()
    x = b.input(torch.ones(3))
    constant = b.constant(torch.ones(3))
    one = b.call(aten.add.Tensor, x, constant)
    program = b.finish(b.call(aten.mul.Tensor, one, constant))
    one_user_each(program.module)
    assert sorted(names(program)) == [("c", ["add_tensor"]), ("c", ["mul_tensor"])]
    assert all(node.meta["val"] is constant.meta["val"] for node in program.module.graph.find_nodes(op="get_attr"))
    (last,) = one.users
    one.append(last.all_input_nodes[1])  # read just before it is used
    program.module.graph.lint()
    _merge_readers(program.module)
    assert names(program) == [("c", ["add_tensor", "mul_tensor"])]
    assert next(iter(program.module.graph.nodes)).op == "get_attr"
    program.module.graph.lint()


def test_numbers_that_are_read_count_once() -> None:
    b = Builder()
    x = b.input(torch.ones(3))
    two = [b.constant(torch.ones(3)), b.constant(torch.ones(2, 3))]
    b.module.register_buffer("again", b.module.get_buffer("c"))
    again = b.module.graph.get_attr("again")
    again.meta["val"] = b.module.get_buffer("c")
    b.constant(torch.ones(100))  # nobody reads it
    y = b.call(aten.add.Tensor, b.call(aten.add.Tensor, x, two[0]), again)
    assert _size(b.finish(b.call(aten.add.Tensor, y, two[1]))) == 9


def smaller(weight: Tensor, *, fixed: bool = False) -> tuple[Program, dict[fx.Node, Any]]:
    """x (B, 4, 6) times a (3, 6) weight, in whose place another one was put; with the shapes that are right then."""
    b = Batched()
    read = b.constant(torch.ones(3, 6))
    linear = b.call(aten.linear.default, b.x, read)
    flat = b.call(aten.reshape.default, linear, [b.size, 12])
    beside = b.call(aten.relu.default, b.x)
    flat.args = (linear, [-1, 4 * weight.shape[0]])
    if fixed:
        flat.target, flat.args = aten.new_zeros.default, (linear, [5, 4 * weight.shape[0]])
    read.meta["val"] = weight
    program = b.finish(flat, beside)
    beside.meta["val"] = "not looked at"
    return program, {linear: [[2, 4, weight.shape[0]]], flat: [[2, 4 * weight.shape[0]]]}


def test_metadata_is_computed_anew_from_what_changed_on() -> None:
    program, expected = smaller(torch.ones(2, 6))
    _refresh(program, expected)
    linear, flat = expected
    assert list(linear.meta["val"].shape[1:]) == [4, 2]
    assert isinstance(linear.meta["val"].shape[0], torch.SymInt)
    assert flat.meta["val"].shape[1] == 8
    assert (
        program.module.graph.find_nodes(op="call_function", target=aten.relu.default)[0].meta["val"] == "not looked at"
    )


@pytest.mark.parametrize(
    ("weight", "fixed", "off", "words"),
    [
        (torch.ones(2, 5), False, False, "left linear_default .aten.linear.default. with operands it cannot take"),
        (torch.ones(2, 6), True, False, "fixed the batch size of reshape_default"),
        (torch.ones(2, 6), False, True, r"gave linear_default .* the shape \[\[2, 4, 2\]\], not \[\[2, 4, 1\]\]"),
    ],
    ids=["operands", "batch size", "shape"],
)
def test_a_removal_that_went_wrong_is_told_with_the_node(weight: Tensor, fixed: bool, off: bool, words: str) -> None:
    program, expected = smaller(weight, fixed=fixed)
    if off:
        expected[next(iter(expected))] = [[2, 4, 1]]
    with pytest.raises(PassError, match=words):
        _refresh(program, expected)


def test_ablated_rows_that_stay_are_noted_with_their_reasons() -> None:
    sizes: dict[str, Any] = {"rows": 8, "rows_removed": 0, "columns": 4, "columns_removed": 0}
    entries = [
        Removal(fqn="a", ablated=5, kept={"one": 2, "other": 1}, **sizes),
        Removal(fqn="b", ablated=3, **sizes),
    ]
    assert [(note.where, note.reason) for note in _notes(entries)] == [
        ("a", "3 of 5 ablated rows stay in the graph: 2 because one; 1 because other")
    ]


@pytest.mark.parametrize(
    ("counts", "runs"),
    [
        ([3, 3, 2, 2], [(0, 2), (2, 4)]),
        ([3, 0, 3], [(0, 3)]),  # rows that keep none belong to any run
        ([0, 0, 3, 2, 0], [(0, 3), (3, 5)]),
        ([3, 0, 2, 3], [(0, 2), (2, 3), (3, 4)]),
        ([0, 0], [(0, 2)]),
        ([], [(0, 0)]),
    ],
)
def test_runs_of_rows_with_one_fan_in(counts: list[int], runs: list[tuple[int, int]]) -> None:
    assert _runs(torch.tensor(counts, dtype=torch.int64).numpy()) == runs


def use_of(counts: list[int], width: int = 12, groups: int = 0) -> Use:
    """A use whose rows keep that many weights; of a convolution where there are groups."""
    mask = torch.arange(width).expand(len(counts), width) < torch.tensor(counts)[:, None]
    one = (1,)
    geometry = Geometry(kernel=one, stride=one, padding=(0,), dilation=one, groups=groups) if groups else None
    node = fx.Graph().placeholder("node")
    return Use(node=node, target="weight", weight=mask.float(), mask=mask, geometry=geometry)


@pytest.mark.parametrize(
    ("counts", "groups", "pieces"),
    [
        ([8, 8, 4, 4], 0, [(0, 2), (2, 4)]),
        ([12, 8, 4, 2], 0, [(0, 1), (1, 2), (2, 3), (3, 4)]),
        ([12, 8, 4, 2, 1], 0, [(0, 5)] * 4),  # too many runs, and padded more than the dense weight: by length
        ([6, 6, 2, 2, 1], 0, [(0, 2), (2, 4), (4, 5)]),
        ([6, 2, 6, 2, 6, 1], 0, [(0, 6)]),  # padded they are less
        ([8, 8, 4, 4], 1, [(0, 4)] * 2),  # a convolution is not cut along its filters, but it may be two that are added
        ([6, 6, 4, 4], 1, [(0, 4)]),
        ([11, 9], 0, [(0, 1), (1, 2)]),  # padding adds a tenth
        ([12, 11], 0, [(0, 2)]),
        ([12, 0, 11, 0], 0, [(0, 4)]),  # rows that keep none are not padded
        ([0, 0], 0, [(0, 2)]),
    ],
)
def test_rows_are_cut_where_padding_would_add_much(
    counts: list[int], groups: int, pieces: list[tuple[int, int]]
) -> None:
    use = use_of(counts, groups=groups)
    found = condensed_rows(use)
    assert [(first, last) for first, last, _ in found] == pieces
    assert sum(weight.n_active for _, _, weight in found) == sum(count > 0 for count in counts)


@pytest.mark.parametrize(
    ("counts", "groups", "can"),
    [([2, 0], 0, True), ([2, 0], 1, True), ([2, 0], 2, False), ([2, 1], 0, False), ([0, 0], 0, False)],
)
def test_where_active_rows_alone_would_spare_work(counts: list[int], groups: int, can: bool) -> None:
    assert can_shrink(use_of(counts, groups=groups)) is can


@pytest.mark.parametrize(
    ("held", "same"),
    [
        (torch.tensor([1.0, torch.nan]), True),
        (torch.tensor([1.0, 2.0]), False),
        (torch.tensor([1.0, torch.nan], dtype=torch.float64), False),
        (torch.tensor([[1.0, torch.nan]]), False),
        ("a name that is taken", False),
    ],
    ids=["equal", "other numbers", "another type", "another shape", "no tensor"],
)
def test_a_buffer_that_holds_the_numbers_already_is_read(held: object, same: bool) -> None:
    assert _same(held, torch.tensor([1.0, torch.nan])) is same


def test_the_samples_of_a_layer_at_a_batch_size() -> None:
    b = Batched()
    static, vector = b.input(3, 7, 6, axis=None), b.input(6, axis=None)
    middle = b.input(2, 5, 6, axis=1)
    program = b.finish(b.x)
    assert program.batch_size == 5
    assert [_samples(b.x, program, batch) for batch in (5, 10, 1)] == [20, 40, 4]
    assert _samples(middle, program, 10) == 20
    assert [_samples(node, program, 10) for node in (static, vector, b.size)] == [21, 0, 0]
    program.sizes = Sizes()
    assert _samples(b.x, program, 10) == 20
