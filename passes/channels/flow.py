"""Where the channels of a graph go: classes for the elements of every value, and what reads them.

Owns :class:`Flow`, the record that other modules fill in and read, and the sizes that go with it. It must not know how
operators pass channels on, nor what is removed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from srigl_fx.passes.channels.groups import Channels
from srigl_fx.passes.operators import operator_of, plain_name
from srigl_fx.passes.program import Program, arguments, tensor_at

_BATCH = 2
_JOINED = {"vstack": 0, "row_stack": 0, "hstack": 1, "column_stack": 1, "dstack": 2}


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
        adopted: Other constants (``get_attr`` nodes, or nodes that depend on the batch size only), the node that reads
            each, and the classes of the values it is combined with there, aligned at the last axis.
    """

    ids: dict[fx.Node, Any] = field(default_factory=dict)
    channels: Channels = field(default_factory=Channels)
    sites: list[Site] = field(default_factory=list)
    pairings: list[Pairing] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)
    hulls: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    adopted: list[tuple[fx.Node, fx.Node, Tensor]] = field(default_factory=list)


def index_values(program: Program, given: dict[str, Any], ids: Tensor) -> list[Any] | None:
    """The indices of ``index`` or ``index_select``, one for each axis; None where one that varies picks channels.

    Along an axis without channels any index will do.
    """
    nodes = given["indices"] if "indices" in given else [None] * (given["dim"] % ids.dim()) + [given["index"]]
    if sum(node is not None and ids.shape[axis] > 1 for axis, node in enumerate(nodes)) > 1:
        return None
    values: list[Any] = []
    for axis, node in enumerate(nodes):
        if node is None:
            values.append(None)
        elif node.meta["val"].dtype in (torch.bool, torch.uint8):
            return None
        elif ids.shape[axis] == 1:
            values.append(torch.zeros(shape_of(node), dtype=torch.long))
        elif node.op == "get_attr":
            values.append(tensor_at(program.module, str(node.target)))
        else:
            return None
    return values


def joined_axis(node: fx.Node) -> int | None:
    """The axis along which an operator puts tensors of the result's rank behind each other; None for any other.

    Example:
        >>> graph = fx.Graph()
        >>> x = graph.placeholder("x")
        >>> node = graph.call_function(torch.ops.aten.hstack.default, ([x, x],))
        >>> x.meta["val"], node.meta["val"] = torch.ones(2, 3), torch.ones(2, 6)
        >>> joined_axis(node), joined_axis(x)
        (1, None)
    """
    if operator_of(node.target).family != "join" or plain_name(node.target) == "stack":
        return None
    given, rank = arguments(node), len(shape_of(node))
    axis = given["dim"] % rank if "dim" in given else _JOINED[plain_name(node.target)]
    same = all(len(shape_of(part)) == rank for part in given["tensors"])
    return axis if same and axis < rank else None


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
