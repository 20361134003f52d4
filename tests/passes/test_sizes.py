"""Free sizes: their sums, inputs of other sizes, and what they are called by the symbols of a graph."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from srigl_fx.errors import LoweringError
from srigl_fx.lowering.inputs import is_description, with_names
from srigl_fx.passes.asked_sizes import wishes
from srigl_fx.passes.capture_sizes import capture_with
from srigl_fx.passes.channels.shapes import concrete_number, sizes_beside_the_batch
from srigl_fx.passes.free_sizes import example_symbols
from srigl_fx.passes.sizes import At, Size, Sizes, resize


@pytest.mark.parametrize(
    ("text", "values", "number"),
    [
        ("a", {"a": 5}, 5),
        ("2*a", {"a": 5}, 10),
        ("a + b + 1", {"a": 2, "b": 3}, 6),
        ("2*half + -1", {"half": 4}, 7),
        ("total + -1*new", {"total": 9, "new": 2}, 7),
    ],
)
def test_sums_are_written_as_they_are_read(text: str, values: dict[str, int], number: int) -> None:
    size = Size.parse(text)
    assert (str(size), size.at(values)) == (text, number)
    assert size.name == (text if text == "a" else None)


@pytest.mark.parametrize(
    "text", ["", "3", "a b", "a+b", "a * 2", "a + ", "2a", "a - 1", "__import__('os')", "0*a", "ä"]
)
def test_what_is_no_sum_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not the size of an axis"):
        Size.parse(text)


def test_other_sizes_go_in_the_place_of_names() -> None:
    size = Size.parse("a + -1*b + 2")
    assert str(size.put({"a": Size.parse("c + b")})) == "c + 0*b + 2"
    assert size.put({"a": Size.parse("3*d + 1"), "b": Size.parse("e")}).at({"d": 2, "e": 4}) == 5


def two_axes() -> Sizes:
    named, total = Size.named("new"), Size.parse("past + new")
    return Sizes(axes=({0: Size.named("n"), 1: named}, {1: total}, {}), batch=("n",), asked=True)


def test_inputs_are_repeated_or_cut_along_their_free_axes() -> None:
    leaves = [torch.arange(6).reshape(2, 3), torch.arange(5)[None], 7]
    sizes = two_axes()
    assert sizes.example(leaves) == {"n": 2, "new": 3, "past": 2}
    made = sizes.resized(leaves, {"new": 4})
    assert made[0].tolist() == [[0, 1, 2, 0], [3, 4, 5, 3]]
    assert made[1].tolist() == [[0, 1, 2, 3, 4, 0]]  # past 2, new 4
    assert made[2] == 7
    assert sizes.resized(leaves, {"past": 0})[1].shape == (1, 3)
    assert sizes.resized(leaves, {"n": 3})[1] is leaves[1]


def test_what_reports_say_of_sizes() -> None:
    from dataclasses import replace

    sizes = replace(two_axes(), limits={"new": (2, 9)}, tried=({"n": 1, "new": 2}, {"n": 3}))
    told = {one.name: one for one in sizes.told([torch.ones(2, 3), torch.ones(1, 5), 7], ["x", "mask", "k"])}
    assert (told["n"].axes, told["n"].tried, told["n"].least, told["n"].most) == (("x axis 0",), (1, 3), 1, None)
    assert told["new"].axes == ("x axis 1", "mask axis 1 (past + new)")
    assert (told["new"].tried, told["new"].least, told["new"].most) == ((2,), 2, 9)
    assert told["past"].axes == ("mask axis 1 (past + new)",)


def test_sizes_that_are_made_one_keep_the_narrower_limits() -> None:
    sizes = Sizes(
        axes=({0: Size.named("a")}, {0: Size.named("b")}, {0: Size.parse("b + c")}),
        batch=("a", "b"),
        limits={"a": (1, 9), "b": (2, None)},
    )
    one = sizes.with_one(["a", "b"])
    assert [str(axes[0]) for axes in one.axes] == ["a", "a", "a + c"]
    assert (one.batch, one.limits) == (("a",), {"a": (2, 9)})


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_tensors_are_resized_along_any_axis(axis: int) -> None:
    x = torch.randn(2, 3, 4)
    made = resize(x, 7, axis)
    assert made.shape[axis] == 7
    for i in range(7):
        torch.testing.assert_close(made.select(axis, i), x.select(axis, i % x.shape[axis]))


class Cached(nn.Module):
    """What a step with a cache does to sizes: a mask over what there was and what is new."""

    def forward(self, new: Tensor, past: Tensor, mask: Tensor) -> Tensor:
        return torch.cat([past, new], 1) * mask


def step(samples: int, past: int, new: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(samples, new), torch.randn(samples, past), torch.randn(samples, past + new)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ({"new": {1: "new"}, "past": {1: "past"}, "mask": {1: "past + new"}}, ["new", "past", "past + new"]),
        (
            {"new": {1: "new"}, "past": {1: "past"}, "mask": {1: torch.export.Dim.DYNAMIC}},
            ["new", "past", "past + new"],
        ),
    ],
    ids=["named", "found"],
)
def test_sizes_that_are_sums_are_found_to_be(shapes: Any, expected: list[str]) -> None:
    model = Cached().eval()
    program = capture_with(model, step(2, 5, 3), {}, wishes(model, step(2, 5, 3), {}, shapes)).program
    assert program is not None
    found = [axes[1] for axes in program.sizes.axes]
    assert [sorted(str(size).split(" + ")) for size in found] == [sorted(one.split(" + ")) for one in expected]
    args, _ = program.inputs_at(At.of({"new": 1, "past": 9}))
    assert [tuple(one.shape) for one in args] == [(2, 1), (2, 9), (2, 10)]


@pytest.mark.slow
def test_a_sum_that_the_model_does_not_form_is_refused() -> None:
    model = Cached().eval()
    shapes = {"new": {1: "new"}, "past": {1: "past"}, "mask": {1: "total"}}
    with pytest.raises(LoweringError, match=r"was to be .*, and the model ties it to"):
        capture_with(model, step(2, 5, 3), {}, wishes(model, step(2, 5, 3), {}, shapes))


def test_symbols_that_are_not_the_batch_stand_for_the_sizes_of_the_example() -> None:
    model = nn.Linear(4, 3).eval()
    x = torch.randn(3, 5, 4)
    shapes = {"input": {0: "batch", 1: "tokens"}}
    program = capture_with(model, (x,), {}, wishes(model, (x,), {}, shapes)).program
    assert program is not None
    (node,) = program.module.graph.find_nodes(op="placeholder")
    samples, tokens = node.meta["val"].shape[:2]
    assert example_symbols(program) == {str(tokens): 5}
    with sizes_beside_the_batch(example_symbols(program)):
        assert (concrete_number(samples), concrete_number(tokens * samples)) == (2, 10)
    assert concrete_number(tokens) == 2


def test_files_of_before_sizes_had_names_tie_batches_by_number() -> None:
    old: list[dict[str, Any] | None] = [
        {"dtype": "float32", "shape": [None, 3], "batch": 0},
        None,
        {"dtype": "int64", "shape": [None], "batch": 2},
        {"value": 3},
    ]
    assert with_names(old) == [
        {"dtype": "float32", "shape": ["batch", 3]},
        None,
        {"dtype": "int64", "shape": ["batch_2"]},
        {"value": 3},
    ]


@pytest.mark.parametrize("shape", [[True], [-1], [1.5], [[2]]])
def test_sizes_in_files_are_numbers_or_names(shape: list[Any]) -> None:
    assert is_description({"dtype": "float32", "shape": ["batch", "past + new", None, 3]})
    assert not is_description({"dtype": "float32", "shape": shape})


@pytest.mark.parametrize("size", ["a b", "", "a;b"])
def test_names_in_files_are_names(size: str) -> None:
    with pytest.raises(ValueError, match="is not the size of an axis"):
        is_description({"dtype": "float32", "shape": [size]})
