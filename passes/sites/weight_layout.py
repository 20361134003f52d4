"""From a contraction's operand to the layout of the parameter it was cut from.

Owns :class:`Layout` and how the roles of an operand's dimensions become the axes of a parameter's matrix view; it must
not know graphs, modules or the names of operations.

A layout says how a parameter becomes a matrix with one neuron a row::

    W.reshape(view).permute(neuron_axes + input_axes).reshape(rows, fan_in)

Rules:
    1. An operand that is the parameter as it is has the layout that is usual for its kind.
    2. Else the factors of all its dimensions, outermost first by their strides, must cut the parameter into axes: each
       ends where the one before begins. Two uses may cut differently, but not across each other.
    3. A stretch of the parameter that no factor covers is one that the view selects from (an expert of a stack): an
       axis with the role ``b``, as if it were matched with a batch.
    4. A lookup is no contraction: rows are selected, and none of the axes that are left is a neuron's.
    5. Where nothing is summed over, or only an axis of size 1, the weight scales its input, and there is no fan-in.
    6. Neighbouring axes of one role are one axis, unless the parameter itself has a border there.
    7. Axes of size 1 are not seen in strides: they are neurons if nothing else is; else one in front is a stack of one,
       and others are neurons.
    8. Axes with the role ``b`` are neurons too, ahead of the others; each place along them is a block of its own.
    9. Where no axis is a neuron's (a product of vectors, element by element in the batch), those with ``b`` are.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from srigl_fx.masks.records import Block, Kind, WeightSite
from srigl_fx.passes.sites.contractions import Operand
from srigl_fx.passes.sites.weight_views import WeightView

LOOKED_UP = "its rows are looked up by index"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a parameter's neurons lie in it; the fields are those of :class:`~srigl_fx.masks.records.WeightSite`.

    Two layouts are equal where the matrix views are, whatever they are called.
    """

    kind: Kind = field(compare=False)
    view: tuple[int, ...]
    neuron_axes: tuple[int, ...]
    input_axes: tuple[int, ...]
    groups: int = field(default=1, compare=False)
    blocks: tuple[Block, ...] = field(default=(), compare=False)

    @classmethod
    def usual(cls, kind: Kind, shape: Sequence[int], *, groups: int = 1, blocks: tuple[Block, ...] = ()) -> "Layout":
        """The layout of a parameter of this shape that is laid out as is usual for its kind.

        Example:
            >>> layout = Layout.usual("conv_transpose2d", (8, 6, 3, 3), groups=2)
            >>> layout.view, layout.neuron_axes, layout.input_axes
            ((2, 4, 6, 3, 3), (0, 2), (1, 3, 4))
        """
        site = WeightSite(owner="", attr="", kind=kind, shape=tuple(shape), groups=groups, blocks=blocks)
        return cls(
            kind=kind,
            view=site.view,
            neuron_axes=site.neuron_axes,
            input_axes=site.input_axes,
            groups=groups,
            blocks=blocks,
        )

    @property
    def rows(self) -> int:
        """The number of neurons."""
        return math.prod(self.view[axis] for axis in self.neuron_axes)


def equal_blocks(rows: int, names: Sequence[str], *, ablatable: bool = True) -> tuple[Block, ...]:
    """``rows`` cut into as many blocks of equal size as there are names; one nameless block if there are none.

    Example:
        >>> [(b.name, b.start, b.stop) for b in equal_blocks(6, ("gate", "up"))]
        [('gate', 0, 3), ('up', 3, 6)]
    """
    names = names if names and rows % len(names) == 0 else ("",)
    size = rows // len(names)
    return tuple(
        Block(name=name, start=i * size, stop=(i + 1) * size, ablatable=ablatable) for i, name in enumerate(names)
    )


def layout_of(view: WeightView, operand: Operand) -> Layout | str:
    """The layout of the parameter behind ``view`` when a contraction reads it as ``operand``; else why there is none.

    Axes the view selects from (one expert of a stack) and those matched with a batch make one block each.

    Example:
        >>> import torch
        >>> view = WeightView.whole(torch.empty(6, 4)).through(torch.t)
        >>> layout = layout_of(view, Operand(value=None, roles="in"))
        >>> layout.kind, layout.neuron_axes
        ('linear', (0,))
    """
    usual = operand.kind not in ("other", "einsum", "stack")
    if usual and view.is_whole:  # rule 1
        groups = operand.groups
        if groups == 0:  # known at run time only
            if operand.kind.startswith("conv_transpose"):
                return "a transposed convolution whose groups are not known statically"
            # One input channel a group is taken for depthwise; otherwise rows are the same whatever the groups are.
            groups = view.shape_of[0] if view.shape_of[1] == 1 else 1
        rows = Layout.usual(operand.kind, view.shape_of, groups=groups).rows
        named = operand.blocks or not operand.ablatable
        blocks = equal_blocks(rows, operand.blocks, ablatable=operand.ablatable) if named else ()
        return Layout.usual(operand.kind, view.shape_of, groups=groups, blocks=blocks)
    roles = operand.roles_of(len(view.dims), loose=view.loose)
    # Of a transposed convolution, neurons lie across the groups, which a part of its weight does not show.
    if roles is None or (operand.kind.startswith("conv_transpose") and operand.groups != 1):
        return f"a {len(view.dims)}-D view of the weight is contracted in a way that is not understood"
    return _from_roles(view, roles, operand)


def _from_roles(view: WeightView, roles: str, operand: Operand) -> Layout | str:
    total = math.prod(view.shape_of)
    pieces = sorted(
        {(f.stride, f.full, role) for dim, role in zip(view.dims, roles, strict=True) for f in dim if f.stride},
        reverse=True,
    )
    axes: list[tuple[int, int, str]] = []  # (stride, size, role), outermost first
    end = total
    for stride, size, role in pieces:
        span = stride * size
        if span > end or end % span:  # rule 2
            return "its uses cut it in pieces that are no axes"
        axes += _missing(view.shape_of, span, end)  # rule 3
        axes.append((stride, size, role))
        end = stride
    axes += _missing(view.shape_of, 1, end)
    kept = {role for _, _, role in pieces}
    if "n" not in kept and len(pieces) < len(axes):  # rule 4
        return LOOKED_UP
    if {role for _, _, role in axes} <= {"b", "n"}:  # rule 5
        return "it is multiplied element by element, not summed over with the data"
    merged = _merged(axes, view.shape_of)
    return _layout(merged, view.shape_of, operand)


def _missing(shape: tuple[int, ...], start: int, end: int) -> list[tuple[int, int, str]]:
    """Rule 3: the parameter's own axes between two strides, which the view selects from."""
    borders = {math.prod(shape[i:]) for i in range(len(shape) + 1)}
    cuts = sorted({start, end} | {border for border in borders if start < border < end}, reverse=True)
    return [(low, high // low, "b") for high, low in pairwise(cuts) if high % low == 0]


def _merged(axes: list[tuple[int, int, str]], shape: tuple[int, ...]) -> list[tuple[int, str]]:
    """(size, role) of each axis of the view; neighbours of one role within one of the parameter's axes are one."""
    borders = {math.prod(shape[i:]) for i in range(len(shape) + 1)}
    merged: list[tuple[int, str]] = []
    for stride, size, role in axes:
        if merged and merged[-1][1] == role and stride * size not in borders:  # rule 6
            merged[-1] = (merged[-1][0] * size, role)
        else:
            merged.append((size, role))
    # Rule 7.
    for position, length in enumerate(shape):
        if length == 1:
            stacked = position == 0 and any(role == "n" for _, role in merged)
            merged.insert(min(position, len(merged)), (1, "b" if stacked else "n"))
    return merged


def _layout(axes: list[tuple[int, str]], shape: tuple[int, ...], operand: Operand) -> Layout:
    if not any(role == "n" for _, role in axes):  # rule 9: each has its own inputs
        axes = [(size, "n" if role == "b" else role) for size, role in axes]
    by_role = {wanted: tuple(i for i, (_, role) in enumerate(axes) if role == wanted) for wanted in "bni"}
    view = tuple(size for size, _ in axes)
    neurons, inputs = by_role["b"] + by_role["n"], by_role["i"]  # rule 8
    stack = math.prod(view[axis] for axis in by_role["b"])
    kind: Kind
    if view == shape and len(shape) == 2 and stack == 1:
        kind = "linear" if neurons == (0,) else "linear_in_out"
    else:
        kind = "stack" if stack > 1 else "einsum"
    if operand.kind in ("einsum", "rnn_gates") and stack == 1:
        kind = operand.kind
    rows = math.prod(view[axis] for axis in neurons)
    blocks = equal_blocks(rows, [str(i) for i in range(stack)]) if stack > 1 else ()
    layout = Layout(kind=kind, view=view, neuron_axes=neurons, input_axes=inputs, blocks=blocks)
    if operand.kind.startswith("conv") and len(shape) == len(operand.roles):
        usual = Layout.usual(operand.kind, shape)
        return usual if usual == layout else layout
    return layout
