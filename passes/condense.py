"""From dense contractions to condensed ones, in the graph.

Owns the rewriting of one node in each of its forms, and :class:`Condense`, which applies what was decided. It must not
know how a decision came about, nor any kernel: the operators are named through ``torch.ops``.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, fx, nn

import srigl_fx.runtime.ops  # noqa: F401 - registers the operators named below
from srigl_fx.passes.base import Pass, PassResult
from srigl_fx.passes.program import Decision, Program, Use, arguments, new_buffer, tensor_at
from srigl_fx.runtime.format import VALUE_DTYPES, CondensedWeight, ValueDtype, padding_problem
from srigl_fx.runtime.row_lengths import masks_by_length, places

aten = torch.ops.aten

_MOST_PIECES = 4  # runs of rows with equal fan-ins that become operators of their own, rather than padded
_WORTH_CUTTING = 0.1  # the share of entries that padding must add before it is worth more operators
# Places in panels that one more operator must save: of one sample they take about as long as its call in PyTorch
# (benchmarks/results/uneven_rows.md).
_WORTH_AN_OPERATOR = 160_000


class Condense(Pass[Program]):
    """Rewrite the uses of each layer as its decision says.

    For the active row r of a weight, whose kept weights are ``values[r]`` at the inputs ``indices[r]``::

        y[active[r]] = sum over j of values[r, j] x[indices[r, j]] + bias[active[r]]

    and ``y = bias`` for all other rows.

    1. "condensed": the node becomes a condensed operator; values, indices and active rows are buffers named after the
       weight, the values in the layer's ``value_dtype``; in int8, their scales are one more, and the scale that may be
       given for the input is an argument. A layer without bias gets a buffer of zeros. What an even kernel with padding
       "same" needs on the far side is padded before it.
    2. Where a few runs of a matrix's rows keep fan-ins that differ much (the blocks of a packed projection), the node
       becomes one operator a run and their concatenation; else the shorter rows (where inputs were removed) are padded.
       Rows of any order are operators by groups of like length, where padded to the longest of all they would take as
       many bytes as the dense weight, or where each further operator saves enough places: each computes all outputs,
       those of the other rows being its bias, and adds what the one before has computed.
    3. "shrunk": the dense operator computes the active rows only; the others are filled with their bias.
    4. "dense": nothing changes.
    5. Dense weights that no node reads any more are gone from the module.
    """

    def run(self, subject: Program) -> PassResult[Program]:
        """Rewrite the graph in place."""
        graph = subject.module.graph
        for layer in subject.layers:
            names: set[str] = set()
            for use in layer.uses:
                names |= rewrite(subject.module, use, layer.weight.fqn, layer.decision, layer.value_dtype)
            layer.bytes_after = sum(tensor_at(subject.module, name).nbytes for name in names)
        graph.eliminate_dead_code()
        graph.lint()
        subject.module.delete_all_unused_submodules()
        # A GraphModule made from a graph keeps just the tensors that the graph reads.
        subject.module = fx.GraphModule(subject.module, graph)
        kept: dict[str, set[str]] = {}
        for node in graph.find_nodes(op="get_attr"):
            if masked := subject.masked.get(str(node.target)):
                kept.setdefault(masked.fqn, set()).add(str(node.target))
        for layer in subject.layers:
            targets = kept.get(layer.weight.fqn, set())
            tensors = {id(t): t.nbytes for t in (tensor_at(subject.module, target) for target in targets)}
            layer.bytes_after += sum(tensors.values())
        return PassResult(subject=subject, changed=any(layer.decision != "dense" for layer in subject.layers))

    def ensures(self, subject: Program) -> None:
        """No condensed layer is still contracted densely."""
        left = {use.node for layer in subject.layers if layer.decision != "dense" for use in layer.uses}
        assert not left & set(subject.module.graph.nodes)


def condensed_rows(use: Use, value_dtype: torch.dtype = torch.float32) -> list[tuple[int, int, CondensedWeight]]:
    """The rows of a use as condensed weights with the first and last row of each (rule 2 of :class:`Condense`).

    Several that have all rows are groups of like length.
    """
    weight, mask = use.weight.numpy(), use.mask.numpy()
    counts = mask.sum(axis=1)
    cuts = _runs(counts)
    missing = int(np.where(counts > 0, counts.max(initial=0) - counts, 0).sum())
    if len(cuts) > (_MOST_PIECES if use.geometry is None else 1) or missing < _WORTH_CUTTING * counts.sum():
        cuts = [(0, len(counts))]
    dtype = cast(ValueDtype, str(value_dtype).removeprefix("torch."))
    pieces = [(first, last, mask[first:last]) for first, last in cuts]
    if len(cuts) == 1:
        pieces = [(0, len(mask), part) for part in _groups(mask, value_dtype.itemsize)]
    return [
        (first, last, CondensedWeight.from_dense(weight[first:last], kept, dtype=dtype, pad=True))
        for first, last, kept in pieces
    ]


def _groups(mask: "np.ndarray[Any, Any]", value_bytes: int) -> "list[np.ndarray[Any, Any]]":
    """The mask, or masks of rows of like length (rule 2)."""
    groups = masks_by_length(mask)
    if len(groups) < 2:
        return [mask]
    saved = places(mask.sum(axis=1)) - sum(places(part.sum(axis=1)) for part in groups)
    if saved >= (len(groups) - 1) * _WORTH_AN_OPERATOR:
        return groups
    is_large = bool(padding_problem(mask, value_bytes)) and not padding_problem(mask, value_bytes, groups)
    return groups if is_large else [mask]


def _runs(counts: "np.ndarray[Any, Any]") -> list[tuple[int, int]]:
    """Runs of rows that keep equally many weights; rows that keep none belong to any run."""
    cuts, first, kept = [], 0, 0
    for row, count in enumerate(counts.tolist()):
        if count and kept and count != kept:
            cuts.append((first, row))
            first = row
        kept = count or kept
    return [*cuts, (first, len(counts))]


def rewrite(
    module: fx.GraphModule, use: Use, name: str, decision: Decision, value_dtype: torch.dtype = torch.float32
) -> set[str]:
    """Replace one use of the weight ``name`` in ``module``'s graph by the form ``decision`` names.

    Returns:
        The targets of the buffers made for it.
    """
    if decision == "dense":
        return set()
    node = use.node
    before = node.prev
    buffers = _Buffers(module)
    with module.graph.inserting_before(node):
        new = _shrunk(buffers, use, name) if decision == "shrunk" else _condensed(buffers, use, name, value_dtype)
    made = before.next
    while made is not node:
        made.meta = {**node.meta, **made.meta}
        if made is not new and made.op == "call_function":
            del made.meta["val"]
        made = made.next
    node.replace_all_uses_with(new)
    module.graph.erase_node(node)
    return buffers.targets


def _condensed(buffers: "_Buffers", use: Use, name: str, value_dtype: torch.dtype) -> fx.Node:
    graph = buffers.module.graph
    pieces = condensed_rows(use, value_dtype)
    x, geometry = use.x, use.geometry
    if geometry is not None and any(geometry.extra):
        zeros = [number for extra in reversed(geometry.extra) for number in (0, extra)]
        x = graph.call_function(aten.constant_pad_nd.default, (x, zeros, 0.0))
    outputs: list[fx.Node] = []
    by_length = len(pieces) > 1 and pieces[0][:2] == pieces[1][:2]
    for i, (first, last, weight) in enumerate(pieces):
        stem = name if len(pieces) == 1 else f"{name}_rows{first}_{last}"
        if by_length:
            stem = f"{name}_group{i}"
        parts: dict[str, Any] = {"values": values_of(weight), "indices": weight.indices, "active": weight.active}
        operands = [
            buffers.read(f"{stem}_{part}", held if isinstance(held, Tensor) else torch.from_numpy(held))
            for part, held in parts.items()
        ]
        if use.bias is None or (by_length and i):
            operands.append(buffers.read(f"{stem}_bias", torch.zeros(last - first)))
        elif len(pieces) == 1 or by_length:
            operands.append(buffers.bias(use.bias, f"{stem}_bias"))
        else:
            rows = (use.bias, 0, first, last)
            operands.append(buffers.bias(graph.call_function(aten.slice.Tensor, rows), f"{stem}_bias"))
        more: dict[str, Any] = {"residual": outputs[-1]} if by_length and i else {}
        if weight.scales is not None:
            more["scales"] = buffers.read(f"{stem}_scales", torch.from_numpy(weight.scales))
            if use.x_scale is not None:
                more |= {"x_scale": use.x_scale, "x_offset": use.x_offset}
        if geometry is None:
            operator = torch.ops.srigl_fx.condensed_linear.default
            outputs.append(graph.call_function(operator, (x, *operands, use.mask.shape[1]), more))
        else:
            channels = use.mask.shape[1] // math.prod(geometry.kernel)
            shape = [last - first, channels, *geometry.kernel]
            numbers = [list(setting) for setting in (geometry.stride, geometry.padding, geometry.dilation)]
            if geometry.transposed:
                more |= {"transposed": True, "output_padding": list(geometry.output_padding)}
            operator = torch.ops.srigl_fx.condensed_conv.default
            outputs.append(graph.call_function(operator, (x, *operands, shape, *numbers, geometry.groups), more))
    axis = -1 if geometry is None else 1
    if by_length:
        return outputs[-1]
    return outputs[0] if len(outputs) == 1 else graph.call_function(aten.cat.default, (outputs, axis))


def values_of(weight: CondensedWeight) -> Tensor:
    """The values as a tensor: torch does not read NumPy arrays of bfloat16.

    Example:
        >>> one = np.ones((1, 1))
        >>> values_of(CondensedWeight.from_dense(one, one > 0, dtype="bfloat16")).dtype
        torch.bfloat16
    """
    if weight.values.dtype == VALUE_DTYPES["bfloat16"]:
        return torch.from_numpy(weight.values.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(weight.values)


def can_shrink(use: Use) -> bool:
    """Whether computing the active rows only would spare work: some are ablated, and no groups tie them together."""
    active = use.mask.any(1)
    groups = 1 if use.geometry is None else use.geometry.groups
    return bool(active.any()) and not bool(active.all()) and groups == 1


def _shrunk(buffers: "_Buffers", use: Use, name: str) -> fx.Node:
    """Pad the active rows' outputs with one channel of zeros, pick each row's channel from that, and add the bias."""
    graph = buffers.module.graph
    active = use.mask.any(1)
    rows = use.weight[active]
    count = rows.shape[0]
    channel = torch.where(active, active.cumsum(0) - 1, count)
    picked = buffers.read(f"{name}_channel", channel)
    weight = buffers.read(f"{name}_rows", rows if use.geometry is None else use.geometry.from_matrix(rows))
    given = {**arguments(use.node), "weight": weight, "bias": None}
    assert callable(use.node.target)
    y = graph.call_function(use.node.target, tuple(given.values()))
    inner = 0 if use.geometry is None else len(use.geometry.kernel)
    axis = 1 if inner else -1
    y = graph.call_function(aten.constant_pad_nd.default, (y, [0, 0] * inner + [0, 1], 0.0))
    y = graph.call_function(aten.index_select.default, (y, axis, picked))
    if use.bias is None:
        return y
    bias = use.bias
    if inner:
        bias = graph.call_function(aten.reshape.default, (bias, [-1] + [1] * inner))
    return graph.call_function(aten.add.Tensor, (y, bias))


class _Buffers:
    """Buffers that hold what replaces a weight.

    Attributes:
        module: Where they are.
        targets: Those made or found so far.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.targets: set[str] = set()

    def read(self, name: str, tensor: Tensor) -> fx.Node:
        """A node that reads ``tensor`` from a buffer ``name``: the one that holds it already, or a new one."""
        node = new_buffer(self.module, name, tensor, same=_same)
        self.targets.add(str(node.target))
        return node

    def bias(self, node: fx.Node, name: str) -> fx.Node:
        """The bias as one tensor read by name: rows of one are cut out once, here, rather than at every call."""
        constant = _constant(self.module, node)
        if node.op == "get_attr" or constant is None:
            return node
        return self.read(name, constant)


def _same(held: object, tensor: Tensor) -> bool:
    if not isinstance(held, Tensor) or held.dtype != tensor.dtype:
        return False
    # NumPy has no bfloat16; every number held here is exact in float64.
    return np.array_equal(held.detach().double().numpy(), tensor.double().numpy(), equal_nan=True)


def _constant(module: fx.GraphModule, node: fx.Node) -> Tensor | None:
    """The value of a node that depends on no input, or None."""
    if node.op == "get_attr":
        return tensor_at(module, str(node.target)).detach()
    if node.op != "call_function" or any(_constant(module, source) is None for source in node.all_input_nodes):
        return None
    assert callable(node.target)
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: _constant(module, source))
    value = node.target(*args, **kwargs)
    return value.detach().clone() if isinstance(value, Tensor) else value


def variants(
    use: Use, decisions: Iterable[Decision], value_dtype: torch.dtype = torch.float32
) -> Iterator[tuple[Decision, fx.GraphModule]]:
    """The one contraction of ``use`` on its own, in each form: what a measurement compares.

    Each module takes the input of the node and returns its output.
    """
    for decision in decisions:
        graph = fx.Graph()
        root = nn.Module()
        x = graph.placeholder("x")
        copies: dict[fx.Node, fx.Node] = {use.x: x}
        for source in use.node.all_input_nodes:
            if source not in copies:
                owner = use.node.graph.owning_module
                held = _constant(owner, source) if owner is not None else None
                root.register_buffer(f"constant{len(copies)}", torch.ones(use.mask.shape[0]) if held is None else held)
                copies[source] = graph.get_attr(f"constant{len(copies)}")
        node = graph.node_copy(use.node, lambda source, copies=copies: copies[source])  # type: ignore[misc]
        graph.output(node)
        module = fx.GraphModule(root, graph)
        rewrite(module, replace(use, node=node), "weight", decision, value_dtype)
        graph.eliminate_dead_code()
        module.recompile()
        yield decision, module
