"""``dynamic_shapes``: which sizes of the inputs somebody wants to be free, in the form that ``torch.export`` takes.

Owns that form and its errors. It must not know graphs, nor whether a model can do what is asked.

1. Inputs are named, in a dict, or listed, in a tuple. What is not mentioned keeps the size of the example.
2. Of a tensor, a dict says it by axis, a tuple or list for all axes.
3. Containers are gone through as they are made: dicts by key, lists by place, caches of transformers by their tensors.
   A dict by axis in the place of a container is for all tensors in it.
4. A size is a name, a ``torch.export.Dim`` or what is derived from one; ``Dim.DYNAMIC`` for a name of our own;
   ``Dim.AUTO`` for one that stays as it is where the model cannot do otherwise; or fixed: None, ``Dim.STATIC``, or the
   number that it is. A name may be a sum of names, as in "past + 1".
5. Equal names are equal sizes.
"""

import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from srigl_fx.errors import LoweringError
from srigl_fx.passes.sizes import Size
from srigl_fx.passes.trees import steps_of

DynamicShapes = Mapping[str, Any] | Sequence[Any] | Literal["auto"]

_FORM = (
    'give a dict by input, as {"input_ids": {0: "batch", 1: "tokens"}}, a tuple by position, or "auto" for every size '
    "that the model does not tie"
)
_AXIS = "a name, a torch.export.Dim, Dim.AUTO, Dim.DYNAMIC, or None for a fixed size"


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What is asked of one axis.

    Attributes:
        size: What it is to be called; None where that is for us to choose.
        required: Whether it must be free.
    """

    size: Size | None = None
    required: bool = True


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What is asked of all inputs.

    Attributes:
        axes: By leaf of (args, kwargs) and axis; others keep their sizes.
        limits: Of names, the smallest and the largest number that was given; None where none was.
        paths: What the leaves are called.
        everything: Whether "auto" was asked for.
    """

    axes: Mapping[int, Mapping[int, Wish]]
    limits: Mapping[str, tuple[int | None, int | None]]
    paths: tuple[str, ...]
    everything: bool = False

    def place(self, leaf: int, axis: int) -> str:
        """An axis in words."""
        return f"axis {axis} of the input {self.paths[leaf]!r}"


def wishes(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], given: DynamicShapes) -> Wishes:
    """Read ``dynamic_shapes``.

    Raises:
        LoweringError: It does not fit the inputs; the message names the input and the axis.

    Example:
        >>> import torch
        >>> found = wishes(nn.Linear(3, 2), (torch.ones(4, 3),), {}, {"input": {0: "rows"}})
        >>> found.paths, found.axes[0][0].size.name
        (('input',), 'rows')
    """
    names = [*list(inspect.signature(model.forward).bind(*args, **kwargs).arguments)[: len(args)]]
    names += [f"input_{i}" for i in range(len(names), len(args))]  # those behind *args have no names
    values = dict(zip([*names, *kwargs], [*args, *kwargs.values()], strict=True))
    reader = _Reader()
    if isinstance(given, str):
        if given != "auto":
            raise LoweringError(f"dynamic_shapes is {given!r}: {_FORM}")
        for name, value in values.items():
            reader.read(name, value, None)
        axes = {
            i: {axis: Wish(required=False) for axis in range(leaf.dim())}
            for i, leaf in enumerate(reader.leaves)
            if isinstance(leaf, Tensor) and leaf.dim()
        }
        return Wishes(axes=axes, limits={}, paths=tuple(reader.paths), everything=True)
    if isinstance(given, Mapping):
        unknown = [name for name in given if name not in values]
        if unknown:
            raise LoweringError(
                f"dynamic_shapes names the input {unknown[0]!r}, and the example inputs are {', '.join(values)}: name "
                "one of these"
            )
        by_name = dict(given)
    elif isinstance(given, tuple | list):
        if len(given) != len(values):
            raise LoweringError(
                f"dynamic_shapes lists {len(given)} inputs, and the example inputs are {len(values)} "
                f"({', '.join(values)}): list as many, with None for those that keep their sizes"
            )
        by_name = dict(zip(values, given, strict=True))
    else:
        raise LoweringError(f"dynamic_shapes is a {type(given).__name__}: {_FORM}")
    for name, value in values.items():
        reader.read(name, value, by_name.get(name))
    reader.check()
    return Wishes(axes=reader.axes, limits=reader.limits, paths=tuple(reader.paths))


class _Reader:
    """Goes through inputs and what is said of them, leaf by leaf."""

    def __init__(self) -> None:
        self.axes: dict[int, dict[int, Wish]] = {}
        self.limits: dict[str, tuple[int | None, int | None]] = {}
        self.paths: list[str] = []
        self.leaves: list[Any] = []

    def read(self, path: str, value: Any, said: Any) -> None:
        """One value, and what is said of it."""
        tree = pytree.tree_structure(value)
        if tree.is_leaf():
            self.paths.append(path)
            self.leaves.append(value)
            if said is not None:
                found = self._axes(path, value, said)
                if found:
                    self.axes[len(self.leaves) - 1] = found
            return
        children = pytree.tree_leaves(value, is_leaf=lambda one: one is not value)
        steps = steps_of(tree, len(children))
        if said is None or _is_by_axis(said):  # rule 3
            each: list[Any] = [said if _holds_tensors(child) else None for child in children]
        elif isinstance(said, Mapping):
            unknown = [key for key in said if str(key) not in steps]
            if unknown:
                raise LoweringError(
                    f"dynamic_shapes names {unknown[0]!r} in the input {path!r}, which holds {', '.join(steps)}: name "
                    "one of these"
                )
            named = {str(key): one for key, one in said.items()}
            each = [named.get(step) for step in steps]
        elif isinstance(said, tuple | list) and len(said) == len(children):
            each = list(said)
        else:
            raise LoweringError(
                f"dynamic_shapes says {said!r} of the input {path!r}, which holds {len(children)} values "
                f"({', '.join(steps)}): say it for each, in a list or by name, or for all tensors in it, by axis"
            )
        for step, child, one in zip(steps, children, each, strict=True):
            self.read(f"{path}.{step}", child, one)

    def _axes(self, path: str, value: Any, said: Any) -> dict[int, Wish]:
        """What is asked of one tensor, by axis."""
        if not isinstance(value, Tensor):
            if not said:
                return {}
            raise LoweringError(
                f"dynamic_shapes speaks of the sizes of the input {path!r}, which is {value!r} and no tensor: leave it "
                "out, or give None"
            )
        if isinstance(said, tuple | list):
            if len(said) != value.dim():
                raise LoweringError(
                    f"dynamic_shapes lists {len(said)} axes of the input {path!r}, which has {value.dim()}: give a "
                    "dict by axis, or list all"
                )
            said = dict(enumerate(said))
        if not isinstance(said, Mapping):
            raise LoweringError(
                f"dynamic_shapes says {said!r} of the input {path!r}, which is a tensor: give a dict by axis, as "
                '{0: "batch"}'
            )
        found: dict[int, Wish] = {}
        for axis, one in said.items():
            if type(axis) is not int or not 0 <= axis < value.dim():
                raise LoweringError(
                    f"dynamic_shapes names axis {axis!r} of the input {path!r}, which has "
                    f"{value.dim()} ({', '.join(map(str, value.shape))}): count from 0"
                )
            wish = self._wish(f"axis {axis} of the input {path!r}", int(value.shape[axis]), one)
            if wish is not None:
                if not value.shape[axis]:
                    raise LoweringError(
                        f"axis {axis} of the input {path!r} has size 0 in the example, which tells nothing of other "
                        "sizes: give an example with at least 2"
                    )
                found[axis] = wish
        return found

    def _wish(self, place: str, number: int, said: Any) -> Wish | None:
        """What is asked of one axis; None where it keeps its size."""
        # Rule 4.
        if said is None:
            return None
        if isinstance(said, int) and not isinstance(said, bool):
            if said != number:
                raise LoweringError(f"dynamic_shapes fixes {place} at {said}, and the example has {number}: give that")
            return None
        if isinstance(said, str):
            try:
                return Wish(size=Size.parse(said))
            except ValueError as error:
                raise LoweringError(
                    f"dynamic_shapes calls {place} {said!r}: give a name of letters, digits and underscores, or a sum "
                    'of such, as "past + 1"'
                ) from error
        if isinstance(said, Dim):
            if hasattr(said, "value"):  # a number in the form of a Dim
                return self._wish(place, number, int(said.value))
            self._check_range(place, number, said, said.min, said.max)
            root = getattr(said, "root", said)
            self._limit(root.__name__, root.min or None, root.max)
            if root is said:
                return Wish(size=Size.named(root.__name__))
            constant = int(said.fn(0))  # type: ignore[attr-defined]
            return Wish(size=Size(((root.__name__, int(said.fn(1)) - constant),), constant))  # type: ignore[attr-defined]
        kind = getattr(getattr(said, "type", None), "name", "")
        if kind == "STATIC":
            return None
        if kind in ("AUTO", "DYNAMIC"):
            self._check_range(place, number, said, said.min, said.max)
            return Wish(required=kind == "DYNAMIC")
        raise LoweringError(f"dynamic_shapes says {said!r} of {place}: give {_AXIS}")

    def _check_range(self, place: str, number: int, said: Any, least: Any, most: Any) -> None:
        if (least is not None and number < least) or (most is not None and number > most):
            raise LoweringError(
                f"{place} is {number} in the example, which the range of {said!r} leaves out: widen the range, or give "
                "an example inside it"
            )

    def _limit(self, name: str, least: Any, most: Any) -> None:
        known = self.limits.get(name, (None, None))
        largest = None if most is None or most > sys.maxsize else int(most)  # a Dim without an end has infinity
        self.limits[name] = (known[0] if least is None else int(least), known[1] if largest is None else largest)

    def check(self) -> None:
        """Rule 5: sizes of one name are one number in the example."""
        seen: dict[str, tuple[str, int]] = {}
        for leaf, axes in self.axes.items():
            for axis, wish in axes.items():
                if wish.size is None or wish.size.name is None:
                    continue
                place, number = f"axis {axis} of the input {self.paths[leaf]!r}", int(self.leaves[leaf].shape[axis])
                first, known = seen.setdefault(wish.size.name, (place, number))
                if number != known:
                    raise LoweringError(
                        f"dynamic_shapes calls {first} and {place} {wish.size.name!r}, and in the example they are "
                        f"{known} and {number}: give them two names, or an example in which they are the same"
                    )
        known_sizes = {name: number for name, (_, number) in seen.items()}
        for leaf, axes in self.axes.items():
            for axis, wish in axes.items():
                size = wish.size
                if size is not None and size.name is None and all(name in known_sizes for name, _ in size.terms):
                    number, asked = int(self.leaves[leaf].shape[axis]), size.at(known_sizes)
                    if number != asked:
                        raise LoweringError(
                            f"dynamic_shapes says that axis {axis} of the input {self.paths[leaf]!r} is {size}, which "
                            f"is {asked} in the example, and it is {number} there: give an example in which it is so"
                        )


def _is_by_axis(said: Any) -> bool:
    """Whether something is said by axis, of tensors."""
    return isinstance(said, Mapping) and bool(said) and all(type(key) is int for key in said)


def _holds_tensors(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))
