"""What containers are plain, and what their leaves are called."""

from collections import OrderedDict, defaultdict, deque
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils import _pytree as pytree

from srigl_fx.passes.trees import holds_anything, identifiers, is_plain, leaf_paths, steps_of


class Pair(NamedTuple):
    left: Any
    right: Any


class Kept(dict[str, Any]):
    """A dict of a class of its own, as outputs of models are."""


class Held:
    """An object with tensors, which is registered under names of its own, as caches are."""

    def __init__(self, contents: list[Any]) -> None:
        if not all(isinstance(each, torch.Tensor) for each in contents):
            raise TypeError("tensors only")
        self.contents = contents

    def __repr__(self) -> str:
        return "Held"


pytree.register_pytree_node(Kept, lambda kept: ([*kept.values()], [*kept]), lambda v, k: Kept(zip(k, v, strict=True)))
pytree.register_pytree_node(Held, lambda held: (held.contents, [["k", "v"], 3]), lambda v, _: Held([*v]))

TENSORS = [torch.zeros(1), torch.ones(1)]


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (1, True),
        (None, True),
        ((1, [2], {"x": 3}), True),
        (OrderedDict(x=1), True),
        (defaultdict(int, x=1), True),
        (deque([1]), True),
        (Pair(1, 2), True),
        (torch.Size([1, 2]), True),
        (Kept(x=1), True),
        (Held(TENSORS), False),
        ([1, {"x": (Held(TENSORS), 2)}], False),
        ((Held(TENSORS), 1), False),
    ],
    ids=repr,
)
def test_containers_that_hold_whatever_they_are_given(value: Any, plain: bool) -> None:
    assert is_plain(pytree.tree_structure(value)) == plain


def test_types_that_hold_whatever_they_are_given() -> None:
    assert [holds_anything(kind) for kind in (Kept, tuple, deque, Held, str, None)] == [True] * 3 + [False] * 3


@pytest.mark.parametrize(
    ("value", "paths"),
    [
        (1, [()]),
        ([], []),
        ((1, [2, 3]), [("0",), ("1", "0"), ("1", "1")]),
        ({"x": 1, "y": {"z": [2]}}, [("x",), ("y", "z", "0")]),
        (Pair(1, (2, 3)), [("left",), ("right", "0"), ("right", "1")]),
        (Kept(x=1, y=[2]), [("0",), ("1", "0")]),  # registered without paths
        ([Held(TENSORS)], [("0", "k"), ("0", "v")]),  # cannot be made of numbers, but says its keys
    ],
    ids=repr,
)
def test_paths_of_leaves(value: Any, paths: list[tuple[str, ...]]) -> None:
    assert leaf_paths(pytree.tree_structure(value)) == paths


@pytest.mark.parametrize(
    ("context", "steps"),
    [
        ([["k", 7], "more"], ["k", "7"]),
        ((("k", "v"),), ["k", "v"]),
        ([["k"]], ["0", "1"]),  # as many as there are
        ([], ["0", "1"]),
        (None, ["0", "1"]),
        ("kv", ["0", "1"]),
        (["kv"], ["0", "1"]),
    ],
    ids=repr,
)
def test_children_of_what_cannot_be_made_go_by_its_keys_or_numbers(context: Any, steps: list[str]) -> None:
    spec = pytree.tree_structure(Held(TENSORS))
    spec = pytree.TreeSpec(Held, context, spec.children())
    assert steps_of(spec, 2) == steps


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        ([("x",), ("x",), ("x",)], ["x", "x_2", "x_3"]),
        ([("a", "b"), ("a_b",), ("a-b",)], ["a_b", "a_b_2", "a_b_3"]),
        ([("x_2",), ("x",), ("x",)], ["x_2", "x", "x_3"]),
        ([("0",), ("_x",), ("1", "y")], ["input_0", "input__x", "input_1_y"]),
        ([("größe",)], ["größe"]),
    ],
    ids=repr,
)
def test_names_of_python_for_paths(paths: list[tuple[str, ...]], names: list[str]) -> None:
    assert identifiers(paths) == names
