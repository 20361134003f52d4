"""The constant that a value of a graph is, where it is one.

Owns the few operators that exporters and quantisers put between an initializer and the node that reads it. It must not
know what a constant is used for.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

Array = NDArray[Any]


_MOVED = frozenset({"Identity", "Transpose", "Slice", "Concat", "Squeeze", "Unsqueeze"})
_FOLLOWED = _MOVED | {"Cast", "QuantizeLinear", "DequantizeLinear"}


def constant(value: ir.Value | None) -> Array | None:
    """What a value always is: an initializer, or what a few operators make of some; else None.

    Initializers may be moved (transposed, cut into parts, joined: PyTorch's exporter puts the gates of an LSTM in
    another order so), cast, quantised and dequantised.

    Example:
        >>> constant(ir.val("x")) is None
        True
    """
    return _Reading().of(value)


@dataclass
class _Reading:
    """What has been found on the way to one constant.

    Attributes:
        found: By the identity of values: each is computed once, however often a graph that nobody vouches for reads it.
        elements: Those of all initializers among them. What is joined of their parts has no more.
    """

    found: dict[int, Array | None] = field(default_factory=dict)
    elements: int = 0

    def of(self, value: ir.Value | None) -> Array | None:
        """What a value always is, or None."""
        if value is None:
            return None
        if id(value) not in self.found:
            self.found[id(value)] = self._read(value)
        return self.found[id(value)]

    def _read(self, value: ir.Value) -> Array | None:
        if value.const_value is not None:
            self.elements += value.const_value.size
            return value.const_value.numpy()
        node = value.producer()
        if node is None or node.domain not in ("", "ai.onnx") or node.op_type not in _FOLLOWED:
            return None
        given = []
        for one in node.inputs:
            if (array := self.of(one)) is None and one is not None:
                return None
            given.append(array)
        if not given or (first := given[0]) is None:
            return None
        if node.op_type in _MOVED:
            return self._moved(node, first, given[1:])
        if node.op_type == "Cast":
            return first.astype(ir.DataType(attribute(node, "to", 1)).numpy())
        if node.op_type == "QuantizeLinear":
            return _quantised(node, first, given[1:])
        parts = _apart(node, first, given[1:])
        return None if parts is None else np.asarray(parts[0].astype(parts[1].dtype) * parts[1])

    def _moved(self, node: ir.Node, first: Array, others: list[Array | None]) -> Array | None:
        """The same numbers at other places, or some of them."""
        if node.op_type == "Identity":
            return first
        if node.op_type == "Transpose":
            return first.transpose(attribute(node, "perm", list(range(first.ndim))[::-1]))
        if node.op_type == "Concat":
            parts = [first, *(one for one in others if one is not None)]
            if sum(part.size for part in parts) > self.elements:
                return None
            return np.concatenate(parts, axis=attribute(node, "axis", 0))
        numbers = [None if one is None else [int(number) for number in one.reshape(-1)] for one in others]
        if node.op_type == "Slice":
            return _slice(first, *numbers)
        axes = tuple(numbers[0]) if numbers and numbers[0] is not None else None
        if node.op_type == "Squeeze":
            return first.squeeze(axes)
        return None if axes is None else np.expand_dims(first, axes)


def _slice(
    array: Array,
    starts: list[int] | None = None,
    ends: list[int] | None = None,
    axes: list[int] | None = None,
    strides: list[int] | None = None,
) -> Array | None:
    """What ONNX's Slice takes of an array: its rules for numbers beyond the ends are those of Python."""
    if starts is None or ends is None:
        return None
    axes = list(range(len(starts))) if axes is None else axes
    places = [slice(None)] * array.ndim
    for start, end, axis, stride in zip(starts, ends, axes, strides or [1] * len(starts), strict=True):
        places[axis] = slice(start, end, stride)
    return array[tuple(places)]


def steps(value: ir.Value | None) -> tuple[Array, Array] | None:
    """The whole numbers, less their zero point, and the scales that a dequantised constant is made of.

    Returns:
        int32, and a floating-point array that can be broadcast to the same shape; None where a value is no such
        constant.

    Example:
        >>> steps(ir.val("x")) is None
        True
    """
    node = value.producer() if value is not None else None
    if node is None or node.domain not in ("", "ai.onnx") or constant(value) is None:
        return None
    if node.op_type == "Identity":
        return steps(node.inputs[0])
    if node.op_type == "Transpose":
        if (found := steps(node.inputs[0])) is None:
            return None
        perm = attribute(node, "perm", list(range(found[0].ndim))[::-1])
        return found[0].transpose(perm), found[1].transpose(perm)
    if node.op_type != "DequantizeLinear":
        return None
    first, *others = (constant(one) for one in node.inputs)
    return None if first is None else _apart(node, first, others)


def source_name(value: ir.Value | None) -> str:
    """The name of the initializer that a constant is made from.

    Example:
        >>> source_name(ir.node("Transpose", [ir.val("w")]).outputs[0])
        'w'
    """
    while value is not None and (producer := value.producer()) is not None:
        value = producer.inputs[0]
    return (value.name if value is not None else None) or "weight"


def input_of(node: "ir.Node", i: int) -> "ir.Value | None":
    """An input of a node by its position; None where it is left out.

    Example:
        >>> import onnx_ir as ir
        >>> input_of(ir.node("Relu", [ir.val("x")]), 1) is None
        True
    """
    return node.inputs[i] if i < len(node.inputs) else None


def attribute(node: ir.Node, name: str, default: Any) -> Any:
    """An attribute of a node, as Python has it.

    Example:
        >>> attribute(ir.node("Relu", [ir.val("x")]), "alpha", 0.5)
        0.5
    """
    found = node.attributes.get(name)
    return default if found is None else found.value


def _apart(node: ir.Node, numbers: Array, others: list[Array | None]) -> tuple[Array, Array] | None:
    """The numbers of a DequantizeLinear, less their zero point, and their scales."""
    if (parts := _scales(node, numbers, others)) is None or numbers.dtype.kind not in "iu":
        return None
    scale, zero = parts
    return numbers.astype(np.int32) - zero.astype(np.int32), scale


def _quantised(node: ir.Node, numbers: Array, others: list[Array | None]) -> Array | None:
    """What a QuantizeLinear makes of floats: bytes."""
    parts = _scales(node, numbers, others)
    if parts is None or parts[1].dtype not in (np.uint8, np.int8) or not np.isfinite(numbers).all():
        return None
    scale, zero = parts
    if attribute(node, "output_dtype", 0) not in (0, ir.DataType.from_numpy(zero.dtype)):
        return None
    limits = np.iinfo(zero.dtype)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        rounded = np.rint(numbers / scale) + zero.astype(np.int32)
    return np.asarray(np.nan_to_num(rounded).clip(limits.min, limits.max), dtype=zero.dtype)


def _scales(node: ir.Node, numbers: Array, others: list[Array | None]) -> tuple[Array, Array] | None:
    """The scales and the zero points of one of these nodes, as they are broadcast to the numbers."""
    scale, zero = others[0], others[1] if len(others) > 1 else None
    if scale is None or attribute(node, "block_size", 0) or scale.ndim > 1:
        return None
    zero = np.zeros((), np.uint8) if zero is None else zero
    shape = [1] * numbers.ndim
    if max(scale.size, zero.size) > 1:
        axis = attribute(node, "axis", 1)
        if not -numbers.ndim <= axis < numbers.ndim:
            return None
        shape[axis] = -1
    return scale.reshape(shape), zero.reshape(shape)
