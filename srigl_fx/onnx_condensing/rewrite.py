"""From a contraction of a graph to one condensed node.

Owns the node and its initializers; it must not know which contractions are rewritten.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from srigl_fx.onnx_condensing.constants import Array, constant
from srigl_fx.onnx_condensing.match import Contraction
from srigl_fx.onnx_condensing.quantised import EightBits, quantiser
from srigl_fx.runtime.format import CondensedWeight
from srigl_fx.runtime.ort import abi
from srigl_fx.runtime.quantisation import OFFSET


def condense(graph: ir.Graph, one: Contraction, kept: Array, numbers: EightBits | None) -> None:
    """Put a condensed node in the place of a contraction and of what it takes over.

    Args:
        graph: The graph, whose other nodes may read what is replaced.
        one: The contraction.
        kept: bool (n, F), the weights that it keeps.
        numbers: Where it is one of whole numbers, these.
    """
    weight = _weight(one, kept, numbers)
    arrays: dict[str, Any] = {item: getattr(weight, item) for item in abi.INPUTS[1:]}
    if weight.scales is not None:
        arrays[abi.SCALES] = weight.scales
    name = _base_name(graph, one.weight, arrays)
    constants = [_initializer(graph, f"{name}_{item}", array) for item, array in arrays.items()]
    n, fan_in = weight.out_features, weight.in_features
    attributes: dict[str, Any] = {
        "in_features": fan_in,
        "weight_shape": list(one.weight_shape),
        "flat_size": n * fan_in,
    }
    x = one.x
    if one.convolution is None:
        base, rows = abi.FLOAT_BASES[0], list(range(len(one.x.shape or ())))
        attributes |= {"x_perm": rows, "y_perm": rows}
    else:
        base = abi.FLOAT_BASES[1]
        attributes |= one.convolution
    if numbers is not None:
        base, x = base + abi.EIGHT_BITS, _bytes(graph, numbers)
        attributes |= {"x_scale": numbers.scale, "x_offset": numbers.offset, "x_bytes": 1}
    (old,) = one.last.outputs
    node = ir.node(
        abi.operator_name(base, one.residual is not None, one.activation),
        [x, *constants, *([] if one.residual is None else [one.residual])],
        attributes,
        domain=abi.DOMAIN,
        outputs=[ir.val(old.name, shape=old.shape, type=old.type)],
        name=one.node.name,
    )
    # Before the last of the nodes that it replaces: what is added is computed by then.
    graph.insert_before(one.last, node)
    old.name = f"{old.name}_dense"
    old.replace_all_uses_with(node.outputs[0], replace_graph_outputs=True)


def _weight(one: Contraction, kept: Array, numbers: EightBits | None) -> CondensedWeight:
    if numbers is None:
        return CondensedWeight.from_dense(one.matrix, kept, one.bias, pad=True)
    bias = numbers.correction if one.bias is None else one.bias + numbers.correction
    # They are not to be rounded with scales of our own.
    weight = CondensedWeight.from_dense(numbers.values, kept, bias, pad=True)
    return replace(weight, values=weight.values.astype(np.int8), scales=numbers.scales[weight.rows])


def _bytes(graph: ir.Graph, numbers: EightBits) -> ir.Value:
    """The input as uint8: int8 is rounded anew, with a zero point that is 128 more."""
    node = quantiser(numbers.x)
    if not numbers.signed or node is None:
        return numbers.x
    name = f"{numbers.x.name}_uint8"
    for reader in (use.node for value in node.inputs[:1] if value is not None for use in value.uses()):
        if reader.outputs[0].name == name:
            return reader.outputs[0]
    zero = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    point = np.full((), (0 if zero is None else int(zero.item())) + OFFSET, np.uint8)
    inputs = [*node.inputs[:2], _initializer(graph, f"{name}_zero_point", point)]
    made = ir.val(name, shape=numbers.x.shape, type=ir.TensorType(ir.DataType.UINT8))
    graph.insert_after(node, ir.node("QuantizeLinear", inputs, outputs=[made], name=f"{node.name or name}_uint8"))
    return made


def _initializer(graph: ir.Graph, name: str, array: Any) -> ir.Value:
    if name not in graph.initializers:
        tensor = ir.tensor(np.array(array, order="C"), name=name)
        value = ir.val(name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        graph.register_initializer(value)
    return graph.initializers[name]


def _base_name(graph: ir.Graph, name: str, arrays: dict[str, Any]) -> str:
    """A name for initializers that no others have, but those of the same numbers: nodes may share a weight."""
    base, count = name, 1
    while not all(_is_free(graph, f"{base}_{item}", array) for item, array in arrays.items()):
        count += 1
        base = f"{name}_{count}"
    return base


def _is_free(graph: ir.Graph, name: str, array: Any) -> bool:
    if name not in graph.initializers:
        return True
    stored = graph.initializers[name].const_value
    return stored is not None and np.array_equal(stored.numpy(), array)
