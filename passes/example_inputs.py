"""Example inputs: what they may be, and what of a model's values a graph can hold.

Owns the form (args, kwargs), and the words for what is wrong with them. It must not know what the inputs are for.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from srigl_fx.errors import CaptureError, SriglError

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def normalise_inputs(example_inputs: Any) -> Inputs:
    """Example inputs as (args, kwargs).

    Raises:
        CaptureError: They are neither a tuple nor (args, kwargs).

    Example:
        >>> normalise_inputs((1, 2)), normalise_inputs(((1,), {"mask": 2}))
        (((1, 2), {}), ((1,), {'mask': 2}))
    """
    if not isinstance(example_inputs, tuple):
        raise CaptureError(
            f"example inputs must be a tuple of arguments, or (args, kwargs), not {type(example_inputs).__name__}: "
            "pass (x,) for one tensor, ((), inputs) for keyword arguments only"
        )
    if len(example_inputs) == 2 and isinstance(example_inputs[0], tuple) and isinstance(example_inputs[1], dict):
        return example_inputs
    return example_inputs, {}


def several_inputs(given: Any, what: str, error: type[SriglError], *, hint: str = "") -> tuple[Inputs, ...]:
    """Many inputs as (args, kwargs), all of them: an iterable may give them only once.

    Args:
        given: An iterable of tensors, each the model's one argument; of tuples of arguments, or lists, as loaders make
            them; or of (args, kwargs).
        what: The argument that holds them, for errors.
        error: The class of these errors.
        hint: What else can be done where there are none.

    Raises:
        SriglError: Of the class ``error``: it is no such iterable, or empty.

    Example:
        >>> several_inputs([torch.ones(2), [1, 2], ((), {"x": 3})], "calibration", CaptureError)
        (((tensor([1., 1.]),), {}), ((1, 2), {}), ((), {'x': 3}))
    """
    if isinstance(given, Tensor | str | dict) or not isinstance(given, Iterable):
        raise error(f"{what} must be an iterable of inputs, not {type(given).__name__}: pass [(x,)] for one tensor")
    found = []
    for i, item in enumerate(given):
        try:
            found.append(one_input(item))
        except CaptureError as odd:
            raise error(f"{what} input {i}: {odd}") from odd
    if not found:
        raise error(f"{what} is empty: give at least one input{hint}")
    return tuple(found)


def one_input(item: Any) -> Inputs:
    """What stands for one input in an iterable of many, as (args, kwargs).

    Raises:
        CaptureError: It is neither a tensor, a tuple or list of arguments, nor (args, kwargs).

    Example:
        >>> one_input(["tokens", "mask"]), one_input(((), {"x": 3}))
        ((('tokens', 'mask'), {}), ((), {'x': 3}))
    """
    if isinstance(item, list):  # of arguments alone, whatever they are
        return tuple(item), {}
    return normalise_inputs((item,) if isinstance(item, Tensor) else item)


def foreign_types(inputs: Any, output: Any) -> str:
    """What a module takes or returns that a captured graph cannot, in words; "" where there is no such thing.

    Example:
        >>> foreign_types({"x": torch.ones(1), "n": 3}, [None]), foreign_types((), [object()])
        ('', 'it returns a value of type object')
    """
    for verb, value in (("takes", inputs), ("returns", output)):
        leaves = pytree.tree_leaves(value)
        names = sorted({type(leaf).__name__ for leaf in leaves if not _in_graphs(leaf)})
        if names:
            hint = _about_caches(verb, inputs) if any("Cache" in name for name in names) else ""
            return f"it {verb} a value of type {', '.join(names)}{hint}"
    return ""


def _about_caches(verb: str, inputs: Any) -> str:
    """What to do about a cache that no graph takes or returns, without what has been done already."""
    _, given = inputs if isinstance(inputs, tuple) and len(inputs) == 2 else ((), {})
    if verb == "returns" and not (isinstance(given, dict) and given.get("use_cache") is False):
        return ": set model.config.use_cache = False, or give use_cache=False in the example inputs"
    leave_out = ", or leave it out of the example inputs" if verb == "takes" else ""
    return f": register its class with torch.utils._pytree.register_pytree_node{leave_out}"


def _in_graphs(leaf: Any) -> bool:
    """Whether a captured graph can take or return a value: constants and ordinary, strided tensors."""
    if isinstance(leaf, Tensor):
        return leaf.layout is torch.strided and not leaf.is_nested
    return isinstance(leaf, bool | int | float | str | None)


def describe(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """The types and sizes of inputs, in words."""

    def one(value: Any) -> str:
        if isinstance(value, Tensor):
            return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
        return type(value).__name__

    return "(" + ", ".join([*map(one, args), *(f"{name}={one(value)}" for name, value in kwargs.items())]) + ")"
