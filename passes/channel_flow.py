"""Where the channels of a graph go: classes for the elements of every value, and what reads them.

Owns :class:`Flow`, the record, and :class:`Transport`, which fills it in node by node: operators that move elements are
run on the classes, operators that combine elements couple them. What contracts channels is in
:mod:`srigl_fx.passes.contraction_flow`. It must not know masks, values of weights, nor what is removed.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from srigl_fx.passes.channel_groups import FIXED, Channels, compress
from srigl_fx.passes.op_table import ALONG_AXIS, CREATION, LAYOUT, PADS, REDUCTIONS, SAME, SPATIAL
from srigl_fx.passes.op_table import is_pointwise, plain_name
from srigl_fx.passes.program import Program, arguments, tensor_at

_BATCH = 2
_LARGEST_CONSTANT = 1 << 21


@dataclass
class Site:
    """A contraction of data with a constant weight, or rows looked up in one.

    The weight is seen as (groups, rows, columns, kernel).

    Attributes:
        node: The operator.
        weight: The ``get_attr`` node of its weight.
        bias: The ``get_attr`` node of its bias.
        data: What it contracts; None where that has no channels (an embedding).
        axis: The channel axis of the data, from the end.
        rows: (groups, rows) classes, of what it makes.
        columns: (groups, columns) classes, of what it reads.
        layout: How the weight is stored: "rows first" (linear, convolution), "columns first" (matmul, embedding) or
            "groups and columns first" (transposed convolution).
        coupled: Whether each row is its own column's (depthwise), so that nothing is contracted away.
        places: At how many places of one sample the weight is applied, times its kernel.
    """

    node: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    data: fx.Node | None
    axis: int
    rows: Tensor
    columns: Tensor
    layout: str
    coupled: bool = False
    places: int = 0

    def matrix(self, tensor: Tensor) -> Tensor:
        """The weight, or a mask of its shape, as (groups, rows, columns, kernel)."""
        groups, rows, columns = *self.rows.shape, self.columns.shape[1]
        if self.layout == "rows first":
            return tensor.reshape(groups, rows, columns, -1)
        return tensor.reshape(groups, columns, rows, -1).transpose(1, 2)

    def tensor(self, matrix: Tensor, kernel: Sequence[int]) -> Tensor:
        """The weight as it is stored, from :meth:`matrix`."""
        groups, rows, columns, _ = matrix.shape
        if self.layout == "rows first":
            return matrix.reshape(groups * rows, columns, *kernel)
        return matrix.transpose(1, 2).reshape(groups * columns, rows, *kernel)


@dataclass
class Pairing:
    """A product of two activations, summed over channels that both have: queries and keys.

    Attributes:
        node: The operator.
        left: The first activation.
        right: The second.
        left_axis: The summed axis of the first, from the end; the other one of its last two axes is free.
        right_axis: The same of the second.
        softmax: Whether a softmax over the free axis of the second follows, so that what is the same for all of it
            does not matter.
        whole: (n,) classes of the outer indices (heads): where such a one goes, so do its channels.
        members: (n, channels), their classes.
    """

    node: fx.Node
    left: fx.Node
    right: fx.Node
    left_axis: int
    right_axis: int
    softmax: bool
    whole: Tensor
    members: Tensor


@dataclass
class Reading:
    """A sum, mean or root mean square over a channel axis: ``axis`` of ``data``, from the end."""

    node: fx.Node
    data: fx.Node
    axis: int


@dataclass
class Flow:
    """All that is known of the channels of a graph.

    Attributes:
        ids: For every node, the classes of its value, of a shape that broadcasts to it (a list for several values).
        channels: The classes and their coupling.
        sites: The contractions with constant weights, in the graph's order.
        pairings: The products of activations.
        readings: Reductions over channels that can tell what a constant adds.
        hulls: Pairs of (n,) and (n, m) classes: each of the n goes exactly if all m of its row go.
        adopted: ``get_attr`` nodes of other constants, or nodes that depend on the batch size only, with the classes of
            the values they are combined with (aligned at the last axis).
        norms: Fused root mean square norms over channels.
    """

    ids: dict[fx.Node, Any] = field(default_factory=dict)
    channels: Channels = field(default_factory=Channels)
    sites: list[Site] = field(default_factory=list)
    pairings: list[Pairing] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)
    hulls: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    adopted: list[tuple[fx.Node, fx.Node, Tensor]] = field(default_factory=list)


class Transport:
    """Carries classes through a graph whose constants have one user each."""

    def __init__(self, program: Program, constant: frozenset[fx.Node]) -> None:
        self.program = program
        self.constant = constant
        self.flow = Flow()
        self.channels = self.flow.channels
        self.weights: dict[str, tuple[Tensor, Tensor]] = {}

    def run(self) -> Flow:
        """Visit every node."""
        from srigl_fx.passes.contraction_flow import contract

        for node in self.program.module.graph.nodes:
            if node.op == "output":
                for operand in node.all_input_nodes:
                    self.pin(operand, "it is an output of the model")
            elif node.op == "placeholder":
                self.flow.ids[node] = self.fixed(node)
            elif node.op == "get_attr":
                continue
            elif not isinstance(node.meta.get("val"), Tensor | tuple | list) and node.target is not operator.getitem:
                self.number(node)
            else:
                for rule in (functools.partial(contract, self), self.visit, self.unknown):
                    self.flow.ids[node] = rule(node)
                    if self.flow.ids[node] is not None:
                        break
        return self.flow

    # -- values ---------------------------------------------------------------------------------------------------

    def ids(self, node: fx.Node) -> Any:
        """The classes of a node; a constant gets one for every element when it is first asked for."""
        if node not in self.flow.ids:
            shape = shape_of(node)
            count = tensor_count(shape)
            own = self.fixed(node)
            if node.op == "get_attr" and 1 < count <= _LARGEST_CONSTANT:
                own = self.channels.fresh(count, node.name).reshape(shape)
                self.flow.adopted.append((node, node, own))
            self.flow.ids[node] = own
        return self.flow.ids[node]

    def full(self, node: fx.Node) -> Tensor:
        """The classes of a node's value, at full shape."""
        ids: Tensor = self.ids(node)
        return ids.expand(shape_of(node))

    def fixed(self, node: fx.Node) -> Any:
        """The fixed class for every value of a node."""
        return pytree.tree_map(
            lambda value: torch.full((1,) * value.dim(), FIXED) if isinstance(value, Tensor) else None, node.meta["val"]
        )

    def pin(self, node: fx.Node, reason: str) -> None:
        """Nothing of a node's value may be removed."""
        if node.op == "get_attr" and node not in self.flow.ids:
            return
        for ids in pytree.tree_leaves(self.ids(node)):
            if isinstance(ids, Tensor):
                self.channels.pin(ids, reason)

    def adopt(self, constant: fx.Node | None, ids: Tensor, reader: fx.Node) -> None:
        """Let an operand that may be a constant follow ``ids``."""
        if not isinstance(constant, fx.Node):
            return
        if self.is_constant(constant):
            self.flow.adopted.append((constant, reader, ids))
        else:
            own = self.ids(constant)
            self.channels.couple(align(own, ids.dim()), ids)

    def is_constant(self, node: fx.Node) -> bool:
        """Whether a node can be replaced by a buffer where it is read."""
        if node.op == "get_attr":
            return node not in self.flow.ids
        return node in self.constant and all(not bool(leaf.any()) for leaf in pytree.tree_leaves(self.flow.ids[node]))

    # -- operators ------------------------------------------------------------------------------------------------

    def visit(self, node: fx.Node) -> Any:
        """The classes of the result of an operator that contracts no channels; None where it is unknown."""
        if node.target is operator.getitem:
            source, index = node.args
            found = self.ids(source) if isinstance(source, fx.Node) else None
            return found[index] if isinstance(found, list | tuple) else None
        name = plain_name(node.target)
        if not name:
            return None
        given = arguments(node)
        first = next((value for value in given.values() if _is_tensor(value)), None)
        if name in SAME and first is not None and first.op != "get_attr":
            return self.ids(first)
        if name in CREATION:
            return self.fixed(node)
        if is_pointwise(node.target):
            return self.pointwise(node)
        special: Callable[[fx.Node, dict[str, Any]], Any] | None = getattr(self, f"_{name.strip('_')}", None)
        if special is not None:
            return special(node, given)
        if name in LAYOUT:
            return self.layout(node)
        if first is None:
            return self.fixed(node)
        rank = len(shape_of(first))
        if name in PADS:
            return self._padded(node, given, first)
        if name in SPATIAL:
            ids = self.channels.merge(self.ids(first), range(rank - SPATIAL[name], rank))
            return pytree.tree_map(lambda _: ids, node.meta["val"])
        if name in ALONG_AXIS and isinstance(given.get("dim"), int):
            ids = self.channels.merge(self.ids(first), [given["dim"] % rank])
            return pytree.tree_map(lambda _: ids, node.meta["val"])
        if name in REDUCTIONS:
            dims = given.get("dim")
            dims = [dims] if isinstance(dims, int) else list(dims) if dims else list(range(rank))
            return self._reduced(node, first, [dim % rank for dim in dims], bool(given.get("keepdim")))
        return None

    def unknown(self, node: fx.Node) -> Any:
        """Keep everything around an operator that is not understood."""
        name = str(node.target).removesuffix(".default")
        for operand in node.all_input_nodes:
            self.pin(operand, f"{name} mixes channels, or is not known")
        return self.fixed(node)

    def number(self, node: fx.Node) -> None:
        """A size: whatever axis it measures must keep it."""
        self.flow.ids[node] = None
        for operand in node.all_input_nodes:
            ids = self.flow.ids.get(operand)
            if not isinstance(ids, Tensor):
                continue
            if plain_name(node.target) == "sym_size":
                axis = arguments(node)["dim"]
                ids = ids if ids.shape[axis] > 1 else torch.tensor([FIXED])
            self.channels.pin(ids, "its number is computed with")

    def join(self, one: Tensor, one_shape: Sequence[int], other: Tensor, other_shape: Sequence[int]) -> Tensor:
        """The classes of an element-wise combination of two values of equal rank, of which axes may have size 1."""
        active = [max(a, b) > 1 for a, b in zip(one.shape, other.shape, strict=True)]
        both = [a > 1 and b > 1 for a, b in zip(one_shape, other_shape, strict=True)]
        if any(a and b for a, b in zip(active, both, strict=True)):
            self.channels.couple(one, other)
            return one if one.numel() >= other.numel() else other
        if one.numel() > 1 and other.numel() > 1:
            for ids in (one, other):
                self.channels.pin(ids, "it is combined with channels of another axis")
            return torch.full((1,) * one.dim(), FIXED)
        if one.numel() == other.numel() and list(one_shape) == list(other_shape):
            self.channels.couple(one, other)
        return one if one.numel() > 1 or other.numel() == 1 else other

    def pointwise(self, node: fx.Node) -> Tensor:
        """Element by element: the operands are coupled, constants follow."""
        rank = len(shape_of(node))
        ids: Tensor | None = None
        shape: list[int] = []
        constants = []
        for operand in _operands(node):
            if self.is_constant(operand):
                constants.append(operand)
                continue
            other, other_shape = align(self.ids(operand), rank), padded(shape_of(operand), rank)
            if ids is None:
                ids, shape = other, other_shape
            else:
                ids = self.join(ids, shape, other, other_shape)
                shape = [max(a, b) for a, b in zip(shape, other_shape, strict=True)]
        if ids is None:
            return torch.full((1,) * rank, FIXED)
        for constant in constants:
            self.adopt(constant, ids, node)
        return ids

    def layout(self, node: fx.Node) -> Any:
        """Elements change places: run the operator on the classes."""
        given = arguments(node)
        name = plain_name(node.target)
        if name == "index":
            return self._indexed(node, given)
        if name in {"cat", "concat"}:
            parts = [self.ids(part) for part in given["tensors"]]
            axis = given["dim"] % len(shape_of(node))
            if all(part.shape[axis] == 1 for part in parts) and any(part.numel() > 1 for part in parts):
                for part in parts[1:]:
                    self.channels.couple(parts[0], part)
                return max(parts, key=Tensor.numel)
        elif any(given.get(key) is not None and isinstance(given[key], fx.Node) for key in ("other", "index")):
            if name != "index_select":
                return None
        assert isinstance(node.target, torch._ops.OpOverload)
        out = execute(node.target, node.args, node.kwargs, self.full)
        return pytree.tree_map(compress, out)

    def _indexed(self, node: fx.Node, given: dict[str, Any]) -> Any:
        ids = self.ids(given["self"])
        axes = [axis for axis, index in enumerate(given["indices"]) if index is not None]
        indices: list[Any] = []
        for axis, index in enumerate(given["indices"]):
            if index is None:
                indices.append(None)
                continue
            value = index.meta["val"]
            if value.dtype in (torch.bool, torch.uint8):
                return None
            if index.op == "get_attr":
                indices.append(tensor_at(self.program.module, str(index.target)))
                continue
            if ids.shape[axis] > 1:
                return None
            indices.append(torch.zeros(concrete(value.shape), dtype=torch.long))
        if len(axes) > 1 and any(ids.shape[axis] > 1 for axis in axes):
            return None
        return compress(torch.ops.aten.index.Tensor(self.full(given["self"]), indices))

    def _padded(self, node: fx.Node, given: dict[str, Any], first: fx.Node) -> Any:
        ids = self.ids(first)
        amounts = given.get("pad", given.get("padding"))
        axes = [ids.dim() - 1 - i // 2 for i, amount in enumerate(amounts) if amount != 0]
        if all(ids.shape[axis] == 1 for axis in axes):
            return ids
        if given.get("mode", "constant") != "constant":
            return None
        return compress(torch.nn.functional.pad(self.full(first), list(amounts), value=FIXED))

    def _reduced(self, node: fx.Node, first: fx.Node, dims: list[int], keepdim: bool) -> Any:
        ids = self.ids(first)
        active = [axis for axis, size in enumerate(ids.shape) if size > 1]
        if plain_name(node.target) in {"mean", "sum"} and len(active) == 1 and active[0] in dims:
            self.flow.readings.append(Reading(node, first, active[0] - ids.dim()))
            ids = torch.full((1,) * ids.dim(), FIXED)
        ids = self.channels.merge(ids, dims)
        if not keepdim:
            for dim in sorted(dims, reverse=True):
                ids = ids.squeeze(dim)
        return pytree.tree_map(lambda _: ids, node.meta["val"])

    def _glu(self, node: fx.Node, given: dict[str, Any]) -> Tensor:
        halves = self.full(given["self"]).chunk(2, given["dim"])
        one, other = (compress(half) for half in halves)
        self.channels.couple(*torch.broadcast_tensors(one, other))
        return one if one.numel() >= other.numel() else other

    def _layer_norm(self, node: fx.Node, given: dict[str, Any]) -> Any:
        rank = len(shape_of(given["input"]))
        ids = self.ids(given["input"])
        return self.channels.merge(ids, range(rank - len(given["normalized_shape"]), rank))

    def _rms_norm(self, node: fx.Node, given: dict[str, Any]) -> Any:
        ids = self.ids(given["input"])
        if len(given["normalized_shape"]) == 1 and ids.numel() == ids.shape[-1] > 1:
            if given["weight"] is None or given["weight"].op == "get_attr":
                self.flow.readings.append(Reading(node, given["input"], -1))
                return ids
        return self._layer_norm(node, given)

    def _group_norm(self, node: fx.Node, given: dict[str, Any]) -> Any:
        ids = self.channels.merge(self.ids(given["input"]), range(2, len(shape_of(given["input"]))))
        count = shape_of(given["input"])[1]
        grouped = ids.expand(-1, count, *ids.shape[2:]).reshape(ids.shape[0], given["num_groups"], -1)
        merged = self.channels.merge(grouped, [2]).expand(grouped.shape)
        out = compress(merged.reshape(ids.shape[0], count, *ids.shape[2:]))
        for constant in (given["weight"], given["bias"]):
            self.adopt(constant, out.reshape(-1), node)
        return out

    def _batch_norm(self, node: fx.Node, given: dict[str, Any]) -> Any:
        """Any norm with statistics by channel, given or over the other axes."""
        data = given["input"]
        ids = self.ids(data)
        if given.get("training") or given.get("use_input_stats"):
            ids = self.channels.merge(ids, range(2, ids.dim()))
        vector = self.channels.merge(ids, [axis for axis in range(ids.dim()) if axis != 1]).reshape(-1)
        for key in ("weight", "bias", "running_mean", "running_var"):
            self.adopt(given.get(key), vector, node)
        value = node.meta["val"]
        return ids if isinstance(value, Tensor) else [ids] + [compress_like(v) for v in value[1:]]

    _native_batch_norm_legit_no_training = _batch_norm
    _native_batch_norm_legit = _batch_norm
    _instance_norm = _batch_norm

    def _prelu(self, node: fx.Node, given: dict[str, Any]) -> Any:
        ids = self.ids(given["self"])
        if shape_of(given["weight"]) != [1]:
            vector = self.channels.merge(ids, [axis for axis in range(ids.dim()) if axis != 1]).reshape(-1)
            self.adopt(given["weight"], vector, node)
        return ids

    def _im2col(self, node: fx.Node, given: dict[str, Any]) -> Any:
        ids = self.channels.merge(self.ids(given["self"]), range(2, 4)).squeeze(3)
        window = given["kernel_size"][0] * given["kernel_size"][1]
        return compress(ids.expand(-1, shape_of(given["self"])[1], -1).repeat_interleave(window, 1))


def _is_tensor(value: Any) -> bool:
    return isinstance(value, fx.Node) and isinstance(value.meta.get("val"), Tensor)


def _operands(node: fx.Node) -> list[fx.Node]:
    return [leaf for leaf in pytree.tree_leaves((node.args, node.kwargs)) if _is_tensor(leaf)]


def execute(target: torch._ops.OpOverload, args: Any, kwargs: Any, value: Callable[[fx.Node], Any]) -> Any:
    """Run an operator that moves elements on something else than its operands."""

    def one(operand: fx.Node) -> Any:
        meta = operand.meta.get("val")
        return value(operand) if isinstance(meta, Tensor | list | tuple) else concrete_number(meta)

    mapped_args, mapped_kwargs = fx.node.map_arg((args, kwargs), one)
    return target(*mapped_args, **mapped_kwargs)


def concrete_number(value: Any) -> Any:
    """A size with its symbols (the batch) set to 2."""
    if not isinstance(value, torch.SymInt):
        return value
    expression = value.node.expr
    return int(expression.xreplace(dict.fromkeys(expression.free_symbols, _BATCH)))


def concrete(shape: Sequence[Any]) -> list[int]:
    """A shape with its symbols (the batch) set to 2."""
    return [size if isinstance(size, int) else concrete_number(size) for size in shape]


def shape_of(node: fx.Node) -> list[int]:
    """The shape of a node's value at batch 2."""
    return concrete(node.meta["val"].shape)


def tensor_count(shape: Sequence[int]) -> int:
    """The number of elements of a shape."""
    return int(torch.Size(shape).numel())


def padded(shape: Sequence[int], rank: int) -> list[int]:
    """``shape`` with axes of size 1 in front."""
    return [1] * (rank - len(shape)) + list(shape)


def align(ids: Tensor, rank: int) -> Tensor:
    """``ids`` with axes of size 1 in front."""
    return ids.reshape(padded(ids.shape, rank))


def compress_like(value: Tensor) -> Tensor:
    """The fixed class for a value."""
    return torch.full((1,) * value.dim(), FIXED)
