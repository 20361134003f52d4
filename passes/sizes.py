"""Which sizes of a model's inputs are free, what they are called, and inputs of other sizes.

Owns this fact, which the captured program carries to lowering, saved files and ONNX: a free size is a name, or a sum of
multiples of names where the model ties it to others. It must not know how a size is found to be free, nor graphs.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from srigl_fx.passes.trees import leaf_paths

BATCH = "batch"
ANY = (1, None)  # the limits of a size that has none

_TERM = re.compile(r"(?:(-?\d+)\*)?([A-Za-z_]\w*)|(-?\d+)", re.ASCII)
_MUST = {"==": "be", "!=": "not be", ">=": "be at least"}
_CONDITION = re.compile(r"(.+?)(?: % (\d{1,9}))? (==|!=|>=) 0", re.ASCII)


@dataclass(frozen=True)
class Size:
    """A free size: the sum of multiples of named sizes, and a constant.

    Attributes:
        terms: Names, each with what it is multiplied with; at least one.
        constant: What is added.

    Example:
        >>> Size((("past", 1),), 1), str(Size((("past", 1), ("half", 2)), -1))
        (Size(terms=(('past', 1),), constant=1), 'past + 2*half + -1')
    """

    terms: tuple[tuple[str, int], ...]
    constant: int = 0

    @classmethod
    def named(cls, name: str) -> "Size":
        """The size that has this name."""
        return cls(((name, 1),))

    @classmethod
    def parse(cls, text: str) -> "Size":
        """The inverse of ``str()``, for text from files, too.

        Raises:
            ValueError: The text is no such sum.

        Example:
            >>> Size.parse("past + 2*half + -1").at({"past": 4, "half": 3})
            9
        """
        terms: dict[str, int] = {}
        constant = 0
        for part in text.split(" + "):
            if not (found := _TERM.fullmatch(part)):
                raise ValueError(f"{text!r} is not the size of an axis")
            if found[3]:
                constant += int(found[3])
            else:
                terms[found[2]] = terms.get(found[2], 0) + int(found[1] or 1)
        if not terms or not all(terms.values()):
            raise ValueError(f"{text!r} is not the size of an axis")
        return cls(tuple(terms.items()), constant)

    @property
    def name(self) -> str | None:
        """The name of a size that is nothing but one; None of a sum or a multiple."""
        return self.terms[0][0] if not self.constant and len(self.terms) == 1 and self.terms[0][1] == 1 else None

    def at(self, values: Mapping[str, int]) -> int:
        """The number that it is where the named sizes are ``values``."""
        return sum(factor * values[name] for name, factor in self.terms) + self.constant

    def put(self, sizes: Mapping[str, "Size"]) -> "Size":
        """The same with other sizes in the place of some of its names.

        Example:
            >>> str(Size.parse("a + 2*b + 1").put({"b": Size.parse("a + 3")}))
            '3*a + 7'
        """
        terms: dict[str, int] = {}
        constant = self.constant
        for name, factor in self.terms:
            put = sizes.get(name) or Size.named(name)
            constant += factor * put.constant
            for other, times in put.terms:
                terms[other] = terms.get(other, 0) + factor * times
        return Size(tuple(terms.items()), constant)

    def __str__(self) -> str:
        parts = [name if factor == 1 else f"{factor}*{name}" for name, factor in self.terms]
        return " + ".join([*parts, *([str(self.constant)] if self.constant else [])])


@dataclass(frozen=True)
class Condition:
    """What free sizes must satisfy beside their limits: something of a sum of them and zero.

    Attributes:
        size: The sum.
        relation: It, or its rest, is this to zero.
        divisor: What it is divided by, if its rest is meant; else 0.

    Example:
        >>> less = Condition(Size.parse("rows + -1*past + -1"), ">=")
        >>> str(less), less.words, less.holds({"rows": 3, "past": 3})
        ('rows + -1*past + -1 >= 0', 'rows must be at least past + 1', False)
    """

    size: Size
    relation: Literal["==", "!=", ">="]
    divisor: int = 0

    @classmethod
    def parse(cls, text: str) -> "Condition":
        """The inverse of ``str()``, for text from files, too.

        Raises:
            ValueError: The text is no such condition.

        Example:
            >>> Condition.parse("tokens % 8 == 0").words
            'tokens must be a multiple of 8'
        """
        found = _CONDITION.fullmatch(text)
        if not found or (found[2] and (int(found[2]) < 2 or found[3] == ">=")):
            raise ValueError(f"{text!r} is no condition on sizes")
        return cls(Size.parse(found[1]), found[3], int(found[2] or 0))  # type: ignore[arg-type]

    @property
    def names(self) -> tuple[str, ...]:
        """The sizes that it is about, in the order of its words."""
        return tuple(name for name, _ in sorted(self.size.terms, key=lambda term: term[1] < 0))

    def holds(self, values: Mapping[str, int]) -> bool:
        """Whether it holds where the named sizes are ``values``."""
        number = self.size.at(values)
        number = number % self.divisor if self.divisor else number
        return number >= 0 if self.relation == ">=" else (number == 0) is (self.relation == "==")

    def put(self, sizes: Mapping[str, Size]) -> "Condition | None":
        """The same with other sizes in the place of names, which are sorted; None where no size is left in it."""
        made = self.size.put(sizes)
        terms = sorted((name, factor) for name, factor in made.terms if factor)
        if not terms:
            return None
        # Of a sum and the same with the other sign, one stands for both.
        sign = -1 if terms[0][1] < 0 and self.relation != ">=" and not self.divisor else 1
        size = Size(tuple((name, sign * factor) for name, factor in terms), sign * made.constant)
        return Condition(size, self.relation, self.divisor)

    @property
    def words(self) -> str:
        """The condition as errors tell it."""
        if self.divisor:
            return f"{self.size} must {'' if self.relation == '==' else 'not '}be a multiple of {self.divisor}"
        sides: tuple[list[str], list[str]] = ([], [])
        for name, factor in (*self.size.terms, ("", self.size.constant)):
            if factor:
                number = "" if abs(factor) == 1 and name else f"{abs(factor)}{'*' if name else ''}"
                sides[factor < 0].append(f"{number}{name}")
        left, right = (" + ".join(side) or "0" for side in sides)
        return f"{left} must {_MUST[self.relation]} {right}"

    def __str__(self) -> str:
        return f"{self.size}{f' % {self.divisor}' if self.divisor else ''} {self.relation} 0"


@dataclass(frozen=True)
class At:
    """Named sizes with numbers, in words: where a model is run.

    Example:
        >>> str(At.of({"batch": 3, "tokens": 8}))
        'batch 3, tokens 8'
    """

    values: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, values: Mapping[str, int]) -> "At":
        """From a mapping."""
        return cls(tuple(values.items()))

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.values)


@dataclass(frozen=True, kw_only=True)
class FreeSize:
    """A size that may be given, as reports tell it.

    Attributes:
        name: What it is called, in the ONNX file, too.
        axes: Where it stands: the input, the axis, and the sum that it is part of where it does not stand alone.
        example: The size in the example inputs.
        tried: The other sizes at which the model runs and its graph gives the same; empty where none was asked for.
        least: The smallest size that the graph is right for, as far as it says.
        most: The largest; None where it says none.
        conditions: What else must be so of it, perhaps beside other sizes, in words.
    """

    name: str
    axes: tuple[str, ...]
    example: int
    tried: tuple[int, ...] = ()
    least: int = 1
    most: int | None = None
    conditions: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class FixedSize:
    """A size that was to be free where the model allows it, and is not.

    Attributes:
        axis: The input and the axis.
        size: The number that it is.
        reason: Why, and by which line of the model where that is known.
    """

    axis: str
    size: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The free sizes of a model's inputs.

    Attributes:
        axes: For each leaf of (args, kwargs), its free axes and the sizes that they have.
        batch: The names of those sizes that count samples: leading ones that are as long as the first in the example.
        limits: The smallest and the largest number of named sizes, where there are such.
        conditions: What else is required of them.
        tried: Numbers beside the example's at which the model runs.
        asked: Whether somebody said which sizes are to be free.
        fixed: What was to be free where possible, and is not.
    """

    axes: tuple[Mapping[int, Size], ...] = ()
    batch: tuple[str, ...] = ()
    limits: Mapping[str, tuple[int, int | None]] = field(default_factory=dict)
    conditions: tuple[Condition, ...] = ()
    tried: tuple[Mapping[str, int], ...] = ()
    asked: bool = False
    fixed: tuple[FixedSize, ...] = ()

    @classmethod
    def of_batch(cls, batched: Sequence[bool], ties: Sequence[int] = ()) -> "Sizes":
        """Leading sizes alone, by leaf; those that have the same number among ``ties`` are tied, all by default.

        Example:
            >>> [str(axes[0]) for axes in Sizes.of_batch((True, True, True), (4, 2, 4)).axes]
            ['batch', 'batch_1', 'batch']
        """
        ties = ties or (0,) * len(batched)
        order = list(dict.fromkeys(tie for tie, free in zip(ties, batched, strict=True) if free))
        names = {tie: f"{BATCH}_{i}" if i else BATCH for i, tie in enumerate(order)}
        axes = [{0: Size.named(names[tie])} if free else {} for tie, free in zip(ties, batched, strict=True)]
        return cls(axes=tuple(axes), batch=tuple(names.values()))

    @property
    def names(self) -> tuple[str, ...]:
        """All names, in the order of the inputs."""
        found = [name for axes in self.axes for size in axes.values() for name, _ in size.terms]
        return tuple(dict.fromkeys(found))

    def batched(self, leaf: int) -> bool:
        """Whether the leading size of a leaf counts samples."""
        size = self.axes[leaf].get(0) if leaf < len(self.axes) else None
        return size is not None and size.name in self.batch

    def example(self, leaves: Sequence[Any]) -> dict[str, int]:
        """The numbers that named sizes have in inputs of which these are the leaves.

        One that stands nowhere alone is found from the first sum in which it is the only one not known.
        """
        sizes = [
            (size, int(leaf.shape[i]))
            for leaf, axes in zip(leaves, self.axes, strict=False)
            for i, size in axes.items()
        ]
        found: dict[str, int] = {}
        for size, number in sizes:
            if size.name is not None:
                found.setdefault(size.name, number)
        for size, number in sizes:
            unknown = [(name, factor) for name, factor in size.terms if name not in found]
            if len(unknown) == 1:
                rest = sum(factor * found[name] for name, factor in size.terms if name in found) + size.constant
                found[unknown[0][0]] = (number - rest) // unknown[0][1]
        return {name: found.get(name, 1) for name in self.names}

    def resized(self, leaves: Sequence[Any], values: Mapping[str, int]) -> list[Any]:
        """Inputs of other sizes: what the leaves hold is repeated or cut along their free axes.

        Args:
            leaves: The leaves of the example inputs.
            values: The numbers of named sizes; others are as in the example.

        Example:
            >>> sizes = Sizes(axes=({0: Size.named("n"), 1: Size.parse("n + 1")},))
            >>> sizes.resized([torch.arange(6).reshape(2, 3)], {"n": 1})[0].tolist()
            [[0, 1]]
        """
        whole = {**self.example(leaves), **values}
        made = list(leaves)
        for position, axes in enumerate(self.axes):
            for axis, size in axes.items():
                if not values.keys().isdisjoint(name for name, _ in size.terms):
                    made[position] = resize(made[position], size.at(whole), axis)
        return made

    def tied(self) -> "Sizes":
        """The same with one size for all batches."""
        return self.with_one(self.batch)

    def with_one(self, names: Sequence[str]) -> "Sizes":
        """The same with one size, called like the first, for all of these."""
        one = {name: Size.named(names[0]) for name in names}
        axes = tuple({axis: size.put(one) for axis, size in axes.items()} for axes in self.axes)
        batch = tuple(dict.fromkeys(names[0] if name in one else name for name in self.batch))
        limits = dict(self.limits)
        known = [limits.pop(name) for name in names if name in limits]
        if known:
            mosts = [most for _, most in known if most is not None]
            limits[names[0]] = (max(least for least, _ in known), min(mosts, default=None))
        conditions = tuple(found for item in self.conditions if (found := item.put(one)) is not None)
        return replace(self, axes=axes, batch=batch, limits=limits, conditions=conditions)

    def told(self, leaves: Sequence[Any], paths: Sequence[str]) -> tuple[FreeSize, ...]:
        """The free sizes for a report; ``paths`` are the names of the leaves."""
        example = self.example(leaves)
        found = []
        for name in self.names:
            axes = [
                f"{path} axis {axis}" + ("" if size.name else f" ({size})")
                for path, own in zip(paths, self.axes, strict=True)
                for axis, size in own.items()
                if any(name == other for other, _ in size.terms)
            ]
            tried = {values[name] for values in self.tried if name in values} - {example[name]}
            least, most = self.limits.get(name, ANY)
            found.append(
                FreeSize(
                    name=name,
                    axes=tuple(axes),
                    example=example[name],
                    tried=tuple(sorted(tried)),
                    least=least,
                    most=most,
                    conditions=tuple(item.words for item in self.conditions if name in item.names),
                )
            )
        return tuple(found)


def is_within(size: int, least: int, most: int | None) -> bool:
    """Whether a size is inside limits.

    Example:
        >>> is_within(5, 1, None), is_within(5, 6, 9)
        (True, False)
    """
    return least <= size and (most is None or size <= most)


def span_of(least: int, most: int | None) -> str:
    """Limits in words.

    Example:
        >>> span_of(2, 512), span_of(2, None)
        ('from 2 to 512', 'from 2 on')
    """
    return f"from {least} on" if most is None else f"from {least} to {most}"


def leaf_names(names: Sequence[str], tree: Any) -> list[str]:
    """What the leaves of (args, kwargs) are called: the argument, and the steps to them."""
    steps = leaf_paths(pytree.tree_structure(tree))
    return [".".join((names[int(rest[0])], *rest[1:]) if kind == "0" else rest) for kind, *rest in steps]


def resize(tensor: Tensor, size: int, axis: int = 0) -> Tensor:
    """What ``tensor`` holds along an axis repeated or cut to ``size``.

    Example:
        >>> resize(torch.tensor([1, 2]), 3).tolist()
        [1, 2, 1]
    """
    if axis == 0:
        return tensor[torch.arange(size, device=tensor.device) % tensor.shape[0]]
    return tensor.index_select(axis, torch.arange(size, device=tensor.device) % tensor.shape[axis])
