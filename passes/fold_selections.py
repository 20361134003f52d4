"""A fixed selection of channels becomes part of the weights that read it.

Owns :class:`FoldSelections`: which operators select channels, and what the weight behind one is without it. It must not
know why a model selects channels, nor formats or kernels.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from srigl_fx.passes.base import Note, Pass, PassResult
from srigl_fx.passes.operators import operator_of
from srigl_fx.passes.program import (
    MaskedTensor,
    Program,
    arguments,
    attribute_at,
    drop_unread,
    new_buffer,
    operands,
    tensor_at,
)
from srigl_fx.passes.state import writes

aten = torch.ops.aten

_CONVOLUTIONS = frozenset({"convolution", "transposed convolution", "any convolution"})


class FoldSelections(Pass[Program]):
    """Fold selections of channels into the masked weights of the layers that read them.

    With s(j) for the channel of x that is the j-th of the selection, each masked weight W becomes V::

        sum over j of W[r, j] x[s(j)]  =  sum over i of V[r, i] x[i],    V[r, i] = sum over j with s(j) = i of W[r, j]

    1. A selection is an ``index_select``, an ``index`` with one vector of numbers, a ``flip`` or a ``channel_shuffle``
       over one axis alone, whose numbers depend on no input and are not written by the graph. Where all that read it
       are layers it can be folded into, each gets a weight and a mask of its own, and the selection goes.
    2. Such layers are ``linear`` with a selection over the last axis, and convolutions with one over their channels,
       with a masked weight that is a parameter or buffer.
    3. Channels that the selection leaves out get no weights; those of one that it repeats are added, and the mask keeps
       what any of them keeps. Sums are computed in float64 and rounded once.
    4. Where a convolution has groups, the selection must give each group as many channels, and its own alone.
    5. Selections of selections are folded one after the other.
    6. Not folded, with a note: a selection that something else reads as well, or an output of the graph, since it must
       be computed anyway; one over another axis; one that moves channels from group to group.
    """

    only_improves = True

    @torch.no_grad()
    def run(self, subject: Program) -> PassResult[Program]:
        """Rewrite the graph in place."""
        module, notes, changed = subject.module, [], False
        written = set(writes(module.graph))
        for node in reversed(list(module.graph.nodes)):  # rule 5: the last one first
            found = _selection(module, node, written)
            if found is None or not any(_weight(subject, user) for user in node.users):
                continue
            problems = [(user, _problem(subject, node, user, *found)) for user in node.users]
            if reasons := [(user, reason) for user, reason in problems if reason]:
                notes += list(_notes(subject, node, reasons))
                continue
            for user in list(node.users):
                _fold(subject, node, user, found[1])
            module.graph.erase_node(node)
            changed = True
        if changed:
            drop_unread(subject)
        return PassResult(subject=subject, changed=changed, notes=tuple(notes))


def _selection(module: fx.GraphModule, node: fx.Node, written: set[str]) -> tuple[int, Tensor] | None:
    """The axis over which ``node`` selects, and the places that it selects there; None where it is no selection."""
    family = operator_of(node.target).family
    if family not in {"pick", "order", "shuffle"} or not isinstance(node.target, torch._ops.OpOverload):
        return None
    given = arguments(node)
    data = given.get("self")
    value = data.meta.get("val") if isinstance(data, fx.Node) else None
    if not isinstance(value, Tensor) or not value.dim():
        return None
    axis, places = 0, None
    if node.target is aten.index_select.default:
        axis, places = given["dim"] % value.dim(), _numbers(module, given["index"], written)
    elif node.target is aten.index.Tensor:
        axes = [axis for axis, index in enumerate(given["indices"]) if index is not None]
        if len(axes) == 1:
            axis, places = axes[0], _numbers(module, given["indices"][axes[0]], written)
    elif node.target is aten.flip.default and len(given["dims"]) == 1:
        axis = given["dims"][0] % value.dim()
        if isinstance(value.shape[axis], int):
            places = torch.arange(value.shape[axis]).flip(0)
    elif node.target is aten.channel_shuffle.default:
        axis = 1
        if isinstance(value.shape[axis], int):
            places = torch.arange(value.shape[axis]).reshape(given["groups"], -1).t().flatten()
    if places is None or not isinstance(value.shape[axis], int):
        return None
    return axis, torch.where(places < 0, places + value.shape[axis], places)


def _numbers(module: fx.GraphModule, node: object, written: set[str]) -> Tensor | None:
    """The constant vector of whole numbers that ``node`` reads; None where it is something else."""
    if not isinstance(node, fx.Node) or node.op != "get_attr" or str(node.target) in written:
        return None
    tensor = attribute_at(module, str(node.target))
    whole = isinstance(tensor, Tensor) and tensor.dtype in (torch.int64, torch.int32) and tensor.dim() == 1
    return tensor.detach().long() if isinstance(tensor, Tensor) and whole else None


def _weight(program: Program, reader: fx.Node) -> MaskedTensor | None:
    """The masked weight of a layer; None where ``reader`` is no layer, or has none."""
    if reader.target is not aten.linear.default and operator_of(reader.target).family not in _CONVOLUTIONS:
        return None
    weight = operands(reader)[1]
    return program.masked.get(str(weight.target)) if isinstance(weight, fx.Node) and weight.op == "get_attr" else None


def _problem(program: Program, selection: fx.Node, reader: fx.Node, axis: int, places: Tensor) -> str:
    """Why the selection cannot be folded into ``reader``; "" where it can."""
    masked = _weight(program, reader)
    if masked is None:
        return "it is an output, too" if reader.op == "output" else f"{reader.name} reads it, too"
    x, weight, bias = operands(reader)
    if x is not selection or selection in (weight, bias):
        return f"{reader.name} reads it as other than its data, too"
    rank = selection.meta["val"].dim()
    linear = reader.target is aten.linear.default
    if (axis != rank - 1) if linear else (axis != 1 or rank != masked.mask.dim()):
        return "it is not over the channels of the layer"
    groups = 1 if linear else arguments(reader)["groups"]
    if groups > 1:
        channels = _channels(selection)
        if len(places) != channels or not torch.equal(
            places // (channels // groups), torch.arange(channels) // (channels // groups)
        ):
            return "it moves channels from one group of the convolution to another"  # rule 4
    return ""


def _channels(selection: fx.Node) -> int:
    """How many channels there are to select from; the axis was found to have a fixed size."""
    data = arguments(selection)["self"].meta["val"]
    return int(data.shape[1])


def _notes(program: Program, selection: fx.Node, reasons: list[tuple[fx.Node, str]]) -> Iterator[Note]:
    """Rule 6: a note for each layer that reads a selection which stays."""
    for user in selection.users:
        if (masked := _weight(program, user)) is not None:
            reason = next((reason for other, reason in reasons if other is user), reasons[0][1])
            yield Note(where=masked.fqn, reason=f"its inputs are selected at each call ({selection.name}): {reason}")


def _fold(program: Program, selection: fx.Node, reader: fx.Node, places: Tensor) -> None:
    """Have ``reader`` read what is selected from, by a weight of its own."""
    module = program.module
    data = arguments(selection)["self"]
    source = operands(reader)[1]
    target = str(source.target)
    masked, old = program.masked[target], tensor_at(module, target).detach()
    linear = reader.target is aten.linear.default
    given = {} if linear else arguments(reader)
    transposed = not linear and given.get("transposed", "transpose" in str(reader.target))
    groups = 1 if linear or transposed else given["groups"]  # a transposed one has all channels along one axis
    size = data.meta["val"].shape[-1] if linear else data.meta["val"].shape[1]

    def moved(tensor: Tensor) -> Tensor:
        if transposed:
            return _sums(tensor, 0, places, size)
        rows = tensor.chunk(groups) if groups > 1 else (tensor,)
        own = size // groups
        local = [places[g * own : (g + 1) * own] - g * own for g in range(groups)] if groups > 1 else [places]
        return torch.cat([_sums(part, 1, to, own) for part, to in zip(rows, local, strict=True)])

    weight, mask = moved(old.double()).to(old.dtype), moved(masked.mask.double()) > 0
    with module.graph.inserting_before(reader):
        new = new_buffer(module, f"{target}_{selection.name}", weight, same=_equal)
    program.masked[str(new.target)] = MaskedTensor(fqn=masked.fqn, mask=mask)
    reader.replace_input_with(source, new)
    reader.replace_input_with(selection, data)


def _sums(tensor: Tensor, axis: int, places: Tensor, size: int) -> Tensor:
    """Zeros of that size along ``axis``, to which the slices of ``tensor`` are added at their places (rule 3)."""
    shape = [*tensor.shape[:axis], size, *tensor.shape[axis + 1 :]]
    return tensor.new_zeros(shape).index_add(axis, places, tensor)


def _equal(existing: Any, tensor: Tensor) -> bool:
    return isinstance(existing, Tensor) and torch.equal(existing, tensor)
