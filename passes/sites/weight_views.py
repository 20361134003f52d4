"""How a tensor is cut from a parameter: which of its dimensions run along which of the parameter's axes.

Owns :class:`WeightView` and what views, slices and selections do to one; it must not know graphs or contractions.
A parameter is thought of as its flat, contiguous elements. Each dimension of a view is a product of factors, and each
factor is a stretch of the flat index: a stride and a size. What an operation does to the dimensions is not written
down here rule by rule: it is run on an empty tensor without storage, and the strides of the result tell.

With factors (stride s, size n) of the dimensions, the element at the index (i, j, ...) is the parameter's element ::

    flat[offset + sum over the factors of s * digit]

where the digits of one dimension's index are those of i in a number system with the sizes n for bases, the outermost
factor first. The offset is not kept: which rows a slice begins at makes no difference to how neurons lie.

For a parameter of shape (6, 4): whole it is ((4, 6),) ((1, 4),); transposed ((1, 4),) ((4, 6),); flattened it is one
dimension of two factors, ((4, 6), (1, 4)); ``[:3]`` leaves 3 of 6 steps of 4, and ``[0]`` only ((1, 4),).

For each dimension of the result, of stride s and size n over the flat elements of the view that was looked at:

1. Size 1 runs along nothing; stride 0 repeats.
2. Factors that lie within one step of s are passed by; the first that does not is the innermost of the dimension. A
   step that is no multiple of its own, or covers it not evenly, runs along no axis: what it does is unknown.
3. Where every element is still there, a factor that is covered in part was split (a reshape): the parts are factors.
4. Where elements are missing, it was sliced: the factor keeps its ``full`` size.
5. What is left of n goes on with the next factor outwards, whose step is where this one ends.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from srigl_fx.passes.operators import operator_named

_VIEWS = frozenset({"reshape", "one", "axes", "expand", "part", "split"})


def is_view(name: str) -> bool:
    """Whether an operation only rearranges, slices or selects, so that strides tell all; by name, whether function,
    method or operator.

    Example:
        >>> is_view("swapaxes"), is_view("__getitem__"), is_view("flip")
        (True, True, False)
    """
    return operator_named(name).family in _VIEWS or name.strip("_") == "getitem"


@dataclass(frozen=True)
class Factor:
    """``size`` steps of ``stride`` through the flat parameter, of the ``full`` ones it was sliced from."""

    stride: int
    size: int
    full: int


Dimension = tuple[Factor, ...]


@dataclass(frozen=True)
class WeightView:
    """A tensor that holds elements of one parameter, unchanged or scaled one by one.

    Attributes:
        parameter: The id of the Parameter.
        shape_of: The parameter's shape.
        dims: For each dimension, outermost first, the factors of the flat index it runs through, outermost first. A
            factor of stride 0 repeats.
        loose: Whether further leading dimensions may exist that are not known.
    """

    parameter: int
    shape_of: tuple[int, ...]
    dims: tuple[Dimension, ...]
    loose: bool = False

    @classmethod
    def whole(cls, parameter: Tensor) -> "WeightView":
        """The parameter itself.

        Example:
            >>> view = WeightView.whole(torch.empty(6, 4))
            >>> [part.shape for part in view.through(torch.chunk, 2)], view.through(torch.t).dims[1]
            ([(3, 4), (3, 4)], (Factor(stride=4, size=6, full=6),))
        """
        shape = tuple(parameter.shape)
        strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        dims = tuple((Factor(s, n, n),) if n != 1 else () for s, n in zip(strides, shape, strict=True))
        return cls(id(parameter), shape, dims)

    @property
    def shape(self) -> tuple[int, ...]:
        """The view's own shape."""
        return tuple(math.prod(factor.size for factor in dim) for dim in self.dims)

    @property
    def is_whole(self) -> bool:
        """Whether its dimensions are the parameter's, in order; slices count, selections do not."""
        whole = [(s, n) for s, n in zip(_strides(self.shape_of), self.shape_of, strict=True)]
        own = [[(f.stride, f.full) for f in dim] for dim in self.dims]
        return len(own) == len(whole) and all(
            dim == ([] if n == 1 else [(s, n)]) for dim, (s, n) in zip(own, whole, strict=True)
        )

    def through(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What ``function``, an :func:`is_view`, makes of the view: a view, a list of views, or None if unknown."""
        probe = torch.empty(self.shape, device="meta")  # shapes and strides, but no memory
        try:
            with torch.no_grad():
                out = function(probe, *args, **kwargs)
        except (RuntimeError, TypeError, ValueError, IndexError):  # sizes that are not those of the real tensor
            return None
        if isinstance(out, Tensor):
            return self._seen_as(probe, out)
        return [self._seen_as(probe, part) for part in out] if isinstance(out, tuple | list) else None

    def indexed(self, position: int, *, rank: int | None) -> "WeightView | None":
        """The view with the dimension at ``position`` indexed by a tensor of ``rank`` dimensions (None: unknown).

        Rows that are picked from the front are selected, whichever they are; further behind it is a slice.
        """
        before, after = self.dims[:position], self.dims[position + 1 :]
        if position and rank == 1:  # columns picked: whichever they are, they lie as a slice of columns does
            return self
        if rank is None:  # only leading dimensions can stay unknown
            return None if position else WeightView(self.parameter, self.shape_of, after, loose=True)
        return WeightView(self.parameter, self.shape_of, before + ((),) * rank + after, loose=self.loose)

    def _seen_as(self, probe: Tensor, out: Tensor) -> "WeightView | None":
        if out.untyped_storage()._cdata != probe.untyped_storage()._cdata:  # a copy: its strides are its own
            return None
        flat = [factor for dim in self.dims for factor in dim]
        relative = [math.prod(factor.size for factor in flat[i + 1 :]) for i in range(len(flat))]
        preserved = out.numel() == probe.numel()
        dims: list[Dimension] = []
        for stride, size in zip(out.stride(), out.shape, strict=True):
            dim = _covered(list(zip(relative, flat, strict=True)), stride, size, preserved)
            if dim is None:
                return None
            dims.append(dim)
        return WeightView(self.parameter, self.shape_of, tuple(dims), loose=self.loose)


def _strides(shape: tuple[int, ...]) -> list[int]:
    return [math.prod(shape[i + 1 :]) for i in range(len(shape))]


def _covered(flat: list[tuple[int, Factor]], stride: int, size: int, preserved: bool) -> Dimension | None:
    """The factors that a dimension of this stride and size over contiguous ``flat`` factors runs through.

    With ``preserved`` every element is still there, so a part of a factor means that it was split; else it was sliced.
    """
    if size == 1:  # rule 1
        return ()
    if stride == 0:  # rule 1
        return (Factor(0, size, size),)
    covered: list[Factor] = []
    for relative, factor in reversed(flat):
        if factor.size == 1 or relative * factor.size <= stride:  # rule 2
            continue
        if stride % relative:  # rule 2
            return None
        inner = stride // relative
        if preserved:  # rule 3
            available = factor.size // inner
            take = min(size, available)
            if factor.size % inner or available % take or size % take:
                return None
            full = factor.full // inner if take == available else take
            covered.insert(0, Factor(factor.stride * inner, take, full))
        else:  # rule 4; of a slice in steps, all is taken for a part of one factor
            take = min(size, factor.size // inner if inner == 1 else size)
            if size % take:
                return None
            covered.insert(0, Factor(factor.stride, take, factor.full))
        size //= take
        if size == 1:
            return tuple(covered)
        stride = relative * factor.size  # rule 5
    return None
