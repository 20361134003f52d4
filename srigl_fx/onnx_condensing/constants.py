"""The constant that a value of a graph is, where it is one.

Owns the few operators that exporters and quantisers put between an initializer and the node that reads it. It must not
know what a constant is used for.
"""

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

Array = NDArray[Any]


_FOLLOWED = frozenset({"Identity", "Transpose", "Cast", "DequantizeLinear"})


def constant(value: ir.Value | None) -> Array | None:
    """What a value always is: an initializer, or one that is moved, cast or dequantised; None where it is computed.

    Example:
        >>> constant(ir.val("x")) is None
        True
    """
    if value is None:
        return None
    if value.const_value is not None:
        return value.const_value.numpy()
    node = value.producer()
    if node is None or node.domain not in ("", "ai.onnx") or node.op_type not in _FOLLOWED:
        return None
    given = [constant(one) for one in node.inputs]
    if not given or any(array is None and one is not None for array, one in zip(given, node.inputs, strict=True)):
        return None
    if (first := given[0]) is None:
        return None
    if node.op_type == "Identity":
        return first
    if node.op_type == "Transpose":
        return first.transpose(attribute(node, "perm", list(range(first.ndim))[::-1]))
    if node.op_type == "Cast":
        return first.astype(ir.DataType(attribute(node, "to", 1)).numpy())
    return _dequantised(first, given[1:], attribute(node, "axis", 1), attribute(node, "block_size", 0))


def attribute(node: ir.Node, name: str, default: Any) -> Any:
    """An attribute of a node, as Python has it.

    Example:
        >>> attribute(ir.node("Relu", [ir.val("x")]), "alpha", 0.5)
        0.5
    """
    found = node.attributes.get(name)
    return default if found is None else found.value


def _dequantised(steps: Array, others: list[Array | None], axis: int, block_size: int) -> Array | None:
    scale, zero = others[0], others[1] if len(others) > 1 else None
    if scale is None or block_size or scale.ndim > 1:
        return None
    shape = [1] * steps.ndim
    if scale.ndim and scale.size > 1:
        shape[axis] = scale.size
    offset = np.zeros((), np.int32) if zero is None else zero.astype(np.int32)
    apart = steps.astype(np.int32) - offset.reshape(shape if offset.size > 1 else [1] * steps.ndim)
    return np.asarray(apart.astype(scale.dtype) * scale.reshape(shape if scale.size > 1 else [1] * steps.ndim))
