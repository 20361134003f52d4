"""``dynamic_shapes`` as it is read: forms, containers, and what does not fit."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from srigl_fx.errors import LoweringError
from srigl_fx.passes.asked_sizes import wishes

X, Y = torch.ones(2, 5, 6), torch.ones(2, 5)
DIM = Dim("t", min=2, max=9)


class Takes(nn.Module):
    def forward(self, x: Any, y: Any = None, *, z: Any = None) -> Any:
        return x, y, z


def asked(shapes: Any, *args: Any, **kwargs: Any) -> dict[int, dict[int, Any]]:
    found = wishes(Takes(), args, kwargs, shapes)
    return {
        leaf: {axis: str(wish.size) if wish.size else wish.required for axis, wish in axes.items()}
        for leaf, axes in found.axes.items()
    }


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ({"x": {0: "b", 1: "t"}}, {0: {0: "b", 1: "t"}}),
        ({"x": ["b", None, None], "y": ("b", Dim.STATIC)}, {0: {0: "b"}, 1: {0: "b"}}),
        ({"x": None, "y": {1: DIM}}, {1: {1: "t"}}),
        (({1: DIM + 1}, {1: DIM + 1}), {0: {1: "t + 1"}, 1: {1: "t + 1"}}),
        (({0: Dim("h") * 2}, None), {0: {0: "2*h"}}),
        (({0: Dim.AUTO, 1: Dim.DYNAMIC, 2: 6}, None), {0: {0: False, 1: True}}),
        ("auto", {0: {0: False, 1: False, 2: False}, 1: {0: False, 1: False}}),
        ({}, {}),
    ],
)
def test_forms(shapes: Any, expected: dict[int, dict[int, Any]]) -> None:
    assert asked(shapes, X, Y) == expected


def test_containers_are_gone_through() -> None:
    both = {"a": X, "b": [Y, 3]}
    by_name = {"x": {"b": [{0: "n"}, None]}, "z": {0: "n"}}
    assert asked(by_name, both, z=Y) == {1: {0: "n"}, 3: {0: "n"}}
    assert asked({"x": {0: "n"}}, both) == {0: {0: "n"}, 1: {0: "n"}}  # for all tensors in it
    assert wishes(Takes(), (both,), {}, "auto").paths == ("x.a", "x.b.0", "x.b.1")


def test_ranges_are_kept_by_name() -> None:
    found = wishes(Takes(), (X, Y), {}, {"x": {1: DIM}, "y": {1: Dim("t", min=1, max=9)}})
    assert found.limits == {"t": (1, 9)}


def test_inputs_behind_a_star_have_numbers() -> None:
    class Star(nn.Module):
        def forward(self, *inputs: Tensor) -> Tensor:
            return inputs[0]

    assert wishes(Star(), (X, Y), {}, ({0: "n"}, None)).axes[0][0].size is not None


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"x": {"c": {0: "n"}}}, "names 'c' in the input 'x', which holds a, b: name one of these"),
        ({"x": [{0: "n"}]}, r"of the input 'x', which holds 2 values \(a, b\)"),
        ({"x": {"b": [None, {0: "n"}]}}, r"the input 'x.b.1', which is 3 and no tensor"),
        ({"x": {"a": {True: "n"}}}, "names axis True of the input 'x.a'"),
        (7, "dynamic_shapes is a int"),
    ],
)
def test_what_does_not_fit_a_container(shapes: Any, words: str) -> None:
    with pytest.raises(LoweringError, match=words):
        wishes(Takes(), ({"a": X, "b": [Y, 3]},), {}, shapes)


def test_a_sum_must_be_so_in_the_example() -> None:
    with pytest.raises(
        LoweringError, match=r"axis 2 of the input 'x' is a \+ b, which is 7 in the example, and it is 6"
    ):
        asked({"x": {0: "a", 1: "b", 2: "a + b"}}, X)


def test_an_empty_axis_cannot_be_free() -> None:
    with pytest.raises(LoweringError, match="axis 0 of the input 'x' has size 0 in the example"):
        asked({"x": {0: "n"}}, X[:0])
