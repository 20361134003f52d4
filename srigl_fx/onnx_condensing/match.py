"""Which nodes of an ONNX graph multiply with a constant weight, in the terms of a condensed operator.

Owns the reading of MatMul, Gemm and Conv, and of what follows them. It must not know how sparse a weight is, nor write.

Rules:
    1. ``MatMul`` of something computed with a constant matrix (F, n) is a linear layer; so is ``Gemm`` where only the
       weight is transposed or scaled, and its bias one number for each output, or for all.
    2. ``Conv`` with a constant filter is a convolution over one to three axes. Where its padding depends on the size of
       its input (``auto_pad``), that size must be known, unless the stride is 1.
    3. The input's rank must be known, and it must be float32.
    4. An ``Add`` of a constant with one number for each output, which alone reads a layer without a bias, is its bias.
       An ``Add`` of something computed, of the same shape, is a residual. One node behind that is an activation, if a
       condensed operator has it.
"""

import functools
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from srigl_fx.onnx_condensing.constants import Array, attribute, constant, source_name
from srigl_fx.runtime.activations import ACTIVATIONS


@dataclass(kw_only=True)
class Contraction:
    """A node that multiplies with a constant weight, and what of the nodes behind it one operator can compute too.

    Attributes:
        node: The node.
        weight: Its weight as the file has it, by the initializer it comes from.
        matrix: float32 (n, F), its matrix view.
        bias: float32 (n,), or None.
        convolution: The attributes of a convolution, None for a linear layer.
        weight_shape: (n, F), or (n, C / groups, kernel...).
        factor: What the product is multiplied with, which the matrix has in it.
        residual: What is added, if anything is.
        activation: The activation's name.
        last: The node whose output is that of all of them together.
        positions: How often each weight is used with one sample; None where the shapes say it.
        refused: Why it cannot be condensed; "" where it can.
    """

    node: ir.Node
    weight: str
    matrix: Array
    bias: Array | None = None
    convolution: dict[str, Any] | None = None
    weight_shape: tuple[int, ...] = ()
    factor: float = 1.0
    residual: ir.Value | None = None
    activation: str = "none"
    last: ir.Node = field(init=False)
    positions: int | None = None
    refused: str = ""

    def __post_init__(self) -> None:
        self.last = self.node
        self.weight_shape = self.weight_shape or self.matrix.shape

    @property
    def x(self) -> ir.Value:
        """What is multiplied."""
        x = self.node.inputs[0]
        assert x is not None
        return x


def contraction(node: ir.Node) -> Contraction | None:
    """A node as one with a constant weight (rules 1-3 of the module), or None where it is none.

    Example:
        >>> contraction(ir.node("MatMul", [ir.val("x"), ir.val("w")])) is None
        True
    """
    read = _READERS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    one = None if read is None else read(node)
    if one is not None:
        one.refused = one.refused or _unsuitable(one)
    return one


def matrix_view(node: ir.Node, weight: Array) -> Array:
    """The (n, F) matrix view of the weight of a MatMul, Gemm or Conv, as the file has it.

    Example:
        >>> matrix_view(ir.node("MatMul", [ir.val("x"), ir.val("w")]), np.ones((4, 2))).shape
        (2, 4)
    """
    if node.op_type == "Conv":
        return weight.reshape(len(weight), -1)
    return weight if node.op_type == "Gemm" and attribute(node, "transB", 0) else weight.T


def _matmul(node: ir.Node) -> Contraction | None:
    weight = constant(node.inputs[1])
    if weight is None or weight.ndim != 2 or constant(node.inputs[0]) is not None:
        return None
    return Contraction(node=node, weight=source_name(node.inputs[1]), matrix=_float(matrix_view(node, weight)))


def _gemm(node: ir.Node) -> Contraction | None:
    weight = constant(node.inputs[1])
    if weight is None or weight.ndim != 2 or constant(node.inputs[0]) is not None:
        return None
    factor = attribute(node, "alpha", 1.0)
    one = Contraction(
        node=node,
        weight=source_name(node.inputs[1]),
        matrix=_float(matrix_view(node, weight)) * np.float32(factor),
        factor=factor,
    )
    if attribute(node, "transA", 0):
        one.refused = "its input is transposed"
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        bias = constant(node.inputs[2])
        if bias is None or bias.size not in (1, len(one.matrix)) or (bias.ndim > 1 and bias.shape[0] > 1):
            one.refused = one.refused or "its bias is computed, or not one number for each output"
        else:
            wide = np.broadcast_to(_float(bias).reshape(-1), len(one.matrix))
            one.bias = wide * np.float32(attribute(node, "beta", 1.0))
    return one


def _conv(node: ir.Node) -> Contraction | None:
    weight = constant(node.inputs[1])
    if weight is None or constant(node.inputs[0]) is not None:
        return None
    rank = weight.ndim - 2
    strides = list(attribute(node, "strides", None) or [1] * rank)
    dilations = list(attribute(node, "dilations", None) or [1] * rank)
    pads = _pads(node, weight.shape[2:], strides, dilations)
    one = Contraction(
        node=node,
        weight=source_name(node.inputs[1]),
        matrix=_float(matrix_view(node, weight)),
        weight_shape=weight.shape,
        convolution={
            "strides": strides,
            "pads": pads,
            "dilations": dilations,
            "group": attribute(node, "group", 1),
        },
    )
    if not 1 <= rank <= 3:
        one.refused = f"it has {rank} axes"
    elif pads is None:
        one.refused = "its padding depends on the size of its input (auto_pad), which is not known"
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        bias = constant(node.inputs[2])
        if bias is None:
            one.refused = one.refused or "its bias is computed"
        else:
            one.bias = _float(bias).reshape(-1)
    return one


def _pads(node: ir.Node, kernel: tuple[int, ...], strides: list[int], dilations: list[int]) -> list[int] | None:
    """The zeros before each axis, and then those behind; None where they are not the same for all inputs."""
    rank, how = len(kernel), attribute(node, "auto_pad", "NOTSET")
    if how == "NOTSET":
        return list(attribute(node, "pads", None) or [0] * (2 * rank))
    if how == "VALID":
        return [0] * (2 * rank)
    x = node.inputs[0]
    sizes = list(x.shape[2:]) if x is not None and x.shape is not None else [None] * rank
    totals = []
    for size, width, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        if dilation != 1 or (stride != 1 and not isinstance(size, int)):
            return None
        left = (size - 1) % stride if isinstance(size, int) else 0  # of the input, behind the last step
        totals.append(max(0, width - 1 - left))
    small, large = [total // 2 for total in totals], [total - total // 2 for total in totals]
    return [*small, *large] if how == "SAME_UPPER" else [*large, *small]


_READERS = {"MatMul": _matmul, "Gemm": _gemm, "Conv": _conv}


def _float(array: Array) -> Array:
    return np.ascontiguousarray(array, dtype=np.float32)


def _unsuitable(one: Contraction) -> str:
    """Rule 3."""
    x = one.x
    if problem := unsuitable_type(x):
        return problem
    if x.shape is None:
        return "the rank of its input is not known"
    if one.convolution is None and len(x.shape) < 1:
        return "its input is no matrix"
    return ""


def unsuitable_type(x: ir.Value) -> str:
    """Why something of its type cannot be multiplied, or "".

    Example:
        >>> unsuitable_type(ir.val("x", dtype=ir.DataType.DOUBLE))
        'its input is double, not float32: export the model in float32'
    """
    if x.dtype is None or x.dtype == ir.DataType.FLOAT:
        return ""
    return f"its input is {x.dtype.name.lower()}, not float32: export the model in float32"


def take_epilogue(one: Contraction) -> None:
    """Let a contraction have what follows it (rule 4 of the module).

    Two of them may be added to each other. The first that is rewritten has the addition; of the other one's output, the
    condensed node is then a reader, too.

    Example:
        >>> x, w = ir.val("x", dtype=ir.DataType.FLOAT, shape=[2, 4]), ir.val("w", const_value=ir.tensor([[1.0]] * 4))
        >>> nodes = [ir.node("MatMul", [x, w])]
        >>> nodes.append(ir.node("Relu", nodes[0].outputs))
        >>> graph = ir.Graph([x], nodes[1].outputs, nodes=nodes)
        >>> one = contraction(nodes[0])
        >>> take_epilogue(one)
        >>> one.activation, one.last is nodes[1]
        ('relu', True)
    """
    other = _added(one)
    bias = constant(other) if one.bias is None else None
    if other is not None and bias is not None and (found := _as_bias(one, bias)) is not None:
        one.bias, one.last = found, _reader(one)
        other = _added(one)
    if other is not None and constant(other) is None and _same_shape(other, one.last.outputs[0]):
        one.residual, one.last = other, _reader(one)
    follower = _only_reader(one.last)
    if follower is not None and len(follower.inputs) == 1 and (name := _activation_of(follower)) is not None:
        one.activation, one.last = name, follower


def _added(one: Contraction) -> ir.Value | None:
    """What the node that alone reads a contraction adds to it, if it does."""
    reader = _only_reader(one.last)
    if reader is None or reader.op_type != "Add":
        return None
    return reader.inputs[1] if reader.inputs[0] is one.last.outputs[0] else reader.inputs[0]


def _reader(one: Contraction) -> ir.Node:
    return next(iter(one.last.outputs[0].uses())).node


def _only_reader(node: ir.Node) -> ir.Node | None:
    """The one node of the same graph that reads a node's output, where nothing else does."""
    (value,) = node.outputs
    uses = list(value.uses())
    if value.is_graph_output() or len(uses) != 1:
        return None
    reader = uses[0].node
    return reader if reader.graph is node.graph and reader.domain in ("", "ai.onnx") else None


def _as_bias(one: Contraction, array: Array) -> Array | None:
    """A constant that is added as a bias, if it has one number for each output."""
    n, rank = len(one.matrix), len(one.x.shape or ())
    axis = rank - 1 if one.convolution is None else 1
    shape = (1,) * (rank - array.ndim) + array.shape
    if array.ndim > rank or any(size != 1 for place, size in enumerate(shape) if place != axis):
        return None
    return np.broadcast_to(_float(array).reshape(-1), n) if array.size in (1, n) else None


def _same_shape(first: ir.Value, second: ir.Value) -> bool:
    """Whether two values are known to have one shape: each size is a number, or has a name."""
    if first.shape is None or second.shape is None or len(first.shape) != len(second.shape):
        return False
    return all(_same_size(one, other) for one, other in zip(first.shape, second.shape, strict=True))


def _same_size(one: Any, other: Any) -> bool:
    if isinstance(one, int) or isinstance(other, int):
        return bool(one == other)
    return one.value is not None and one.value == other.value


@functools.cache
def _activations() -> dict[str, tuple[str, dict[str, Any]]]:
    """The activations that are one node of ONNX: by its operator, the name and the attributes."""
    import onnx.parser

    found = {}
    for row in ACTIVATIONS:
        body = row.onnx.format(x="x", y="y")
        nodes = onnx.parser.parse_graph(f"g (float[1] x) => (float[1] y) {{ {body} }}").node if body else []
        if len(nodes) == 1:
            found[nodes[0].op_type] = row.name, {item.name: item.f for item in nodes[0].attribute}
    return found


def _activation_of(node: ir.Node) -> str | None:
    name, settings = _activations().get(node.op_type, (None, {}))
    given = {item: one.value for item, one in node.attributes.items()}
    return name if name is not None and given == settings else None


def positions(one: Contraction, batch: int) -> int:
    """About how often each weight is used with so many samples, where sizes that are free are usual ones.

    That is 128 tokens, and 14 places along each axis of a convolution.
    """
    if one.positions is not None:
        return batch * one.positions
    shape = one.node.outputs[0].shape if one.convolution is not None else one.x.shape
    sizes = list(shape or ())
    if one.convolution is not None:
        axes = sizes[2:] or [14] * (len(one.weight_shape) - 2)
        return batch * math.prod(size if isinstance(size, int) else 14 for size in axes)
    return batch * math.prod(size if isinstance(size, int) else 128 for size in sizes[1:-1])
