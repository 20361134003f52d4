"""From a contraction of a graph to condensed nodes, one as a rule.

Owns the nodes and their initializers; it must not know which contractions are rewritten.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from srigl_fx.errors import FormatError
from srigl_fx.onnx_condensing.constants import Array, constant
from srigl_fx.onnx_condensing.drafts import Names
from srigl_fx.onnx_condensing.match import Contraction
from srigl_fx.onnx_condensing.quantised import EightBits, quantiser
from srigl_fx.runtime.format import CondensedWeight
from srigl_fx.runtime.ort import abi
from srigl_fx.runtime.quantisation import OFFSET


def condense(one: Contraction, parts: Sequence[Array], numbers: EightBits | None, names: Names) -> None:
    """Put condensed nodes in the place of a contraction and of what it takes over.

    Each computes some rows; of all others its outputs are those of the node before, which it adds.

    Args:
        one: The contraction, in a graph whose other nodes may read what is replaced.
        parts: bool (n, F) for each node, the weights that it keeps: those of different rows.
        numbers: Where it is one of whole numbers, these.
        names: Those of the model.
    """
    bias, correction = one.bias, None if numbers is None else numbers.correction
    if correction is not None:
        bias = correction if bias is None else bias + correction
    (old,) = one.last.outputs
    residual, graph = one.residual, graph_of(one.last)
    for i, kept in enumerate(parts):
        is_last = i == len(parts) - 1
        stem = one.weight if len(parts) == 1 else f"{one.weight}_rows{i}"
        weight = _weight(one, kept, None if i else bias, numbers)
        node = _node(one, weight, stem, residual, one.activation if is_last else "none", numbers, names)
        node.name = one.node.name if is_last or not one.node.name else f"{one.node.name}_rows{i}"
        (y,) = node.outputs
        y.name, y.shape, y.type = old.name if is_last else f"{old.name}_rows{i}", old.shape, old.type
        # Before the last of the nodes that it replaces: what is added is computed by then.
        graph.insert_before(one.last, node)
        residual = y
    old.name = f"{old.name}_dense"
    assert residual is not None
    old.replace_all_uses_with(residual, replace_graph_outputs=True)


def graph_of(node: ir.Node) -> ir.Graph:
    """The graph that a node is in: the model's, or one inside another node.

    Example:
        >>> node = ir.node("Relu", [ir.val("x")])
        >>> graph = ir.Graph([], [], nodes=[node])
        >>> graph_of(node) is graph
        True
    """
    assert isinstance(node.graph, ir.Graph)
    return node.graph


def _node(
    one: Contraction,
    weight: CondensedWeight,
    stem: str,
    residual: ir.Value | None,
    activation: str,
    numbers: EightBits | None,
    names: Names,
) -> ir.Node:
    graph = graph_of(one.node)
    arrays: dict[str, Any] = {item: getattr(weight, item) for item in abi.INPUTS[1:]}
    if weight.scales is not None:
        arrays[abi.SCALES] = weight.scales
    name = _base_name(graph, stem, arrays, names)
    constants = [_initializer(graph, f"{name}_{item}", array, names) for item, array in arrays.items()]
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
        base, x = base + abi.EIGHT_BITS, _bytes(one, numbers, names)
        attributes |= {"x_scale": numbers.scale, "x_offset": numbers.offset, "x_bytes": 1}
    return ir.node(
        abi.operator_name(base, residual is not None, activation),
        [x, *constants, *([] if residual is None else [residual])],
        attributes,
        domain=abi.DOMAIN,
    )


def _weight(one: Contraction, kept: Array, bias: Array | None, numbers: EightBits | None) -> CondensedWeight:
    if numbers is None:
        return CondensedWeight.from_dense(one.matrix, kept, bias, pad=True)
    weight = CondensedWeight.from_dense(numbers.values, kept, bias, pad=True)
    # They are not to be rounded with scales of our own.
    return replace(weight, values=weight.values.astype(np.int8), scales=numbers.scales[weight.rows])


def _bytes(one: Contraction, numbers: EightBits, names: Names) -> ir.Value:
    """The input as uint8: int8 is rounded anew, with a zero point that is 128 more."""
    if not numbers.signed:
        return numbers.x
    node = quantiser(numbers.x)
    samples: ir.Value | None
    scale: ir.Value | None
    if node is None:  # the numbers that the bytes stand for are rounded: they become the same bytes
        point = numbers.zero
        samples, scale, place = one.x, None, one.node
    else:
        zero = constant(node.inputs[2]) if len(node.inputs) > 2 else None
        point = OFFSET if zero is None else int(zero.item()) + OFFSET
        samples, scale, place = node.inputs[0], node.inputs[1], node
    if not 0 <= point <= np.iinfo(np.uint8).max:
        raise FormatError(f"{numbers.x.name} is said to be int8, but its zero point {point - OFFSET} is none of int8")
    assert samples is not None
    array, graph = np.full((), point, np.uint8), graph_of(place)
    step = np.asarray(numbers.scale, np.float32) if scale is None else constant(scale)
    for reader in (use.node for use in samples.uses()):
        if reader.graph is graph and _rounds_so(reader, step, array):
            return reader.outputs[0]
    stem = f"{numbers.x.name}_uint8"
    arrays = {"zero_point": array} | ({} if scale is not None else {"scale": step})
    base = _base_name(graph, stem, arrays, names)
    zero_point = _initializer(graph, f"{base}_zero_point", array, names)
    scale = scale if scale is not None else _initializer(graph, f"{base}_scale", step, names)
    made = ir.val(names.fresh(stem), shape=numbers.x.shape, type=ir.TensorType(ir.DataType.UINT8))
    rounding = ir.node("QuantizeLinear", [samples, scale, zero_point], outputs=[made], name=made.name)
    if node is None:
        graph.insert_before(place, rounding)
    else:
        graph.insert_after(place, rounding)
    return made


def _rounds_so(reader: ir.Node, scale: Array | None, point: Array) -> bool:
    """Whether a node rounds with this scale and this zero point."""
    if reader.op_type != "QuantizeLinear" or reader.domain not in ("", "ai.onnx") or len(reader.inputs) < 3:
        return False
    zero, step = constant(reader.inputs[2]), constant(reader.inputs[1])
    if zero is None or step is None or scale is None or zero.dtype != point.dtype or step.size != 1:
        return False
    return np.array_equal(zero.reshape(-1), point.reshape(-1)) and np.array_equal(step.reshape(-1), scale.reshape(-1))


def _initializer(graph: ir.Graph, name: str, array: Any, names: Names) -> ir.Value:
    if name not in graph.initializers:
        tensor = ir.tensor(np.array(array, order="C"), name=name)
        value = ir.val(name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        graph.register_initializer(value)
        names.taken.add(name)
    return graph.initializers[name]


def _base_name(graph: ir.Graph, name: str, arrays: dict[str, Any], names: Names) -> str:
    """A name for initializers that no others have, but those of the same numbers: nodes may share a weight."""
    base, count = name, 1
    while not all(_is_free(graph, f"{base}_{item}", array, names) for item, array in arrays.items()):
        count += 1
        base = f"{name}_{count}"
    return base


def _is_free(graph: ir.Graph, name: str, array: Any, names: Names) -> bool:
    if name not in graph.initializers:
        return name not in names.taken
    stored = graph.initializers[name].const_value
    return stored is not None and np.array_equal(stored.numpy(), array)
