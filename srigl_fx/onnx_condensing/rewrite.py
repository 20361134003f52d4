"""From a contraction of a graph to one condensed node.

Owns the node and its initializers; it must not know which contractions are rewritten.
"""

from typing import Any

import numpy as np
import onnx_ir as ir

from srigl_fx.onnx_condensing.match import Contraction
from srigl_fx.runtime.format import CondensedWeight
from srigl_fx.runtime.ort import abi


def condense(graph: ir.Graph, one: Contraction, weight: CondensedWeight) -> None:
    """Put a condensed node in the place of a contraction and of what it takes over.

    Args:
        graph: The graph, whose other nodes may read what is replaced.
        one: The contraction.
        weight: Its weight.
    """
    arrays: dict[str, Any] = {item: getattr(weight, item) for item in abi.INPUTS[1:]}
    name = _base_name(graph, one.weight, arrays)
    constants = [_initializer(graph, f"{name}_{item}", array) for item, array in arrays.items()]
    n, fan_in = weight.out_features, weight.in_features
    attributes: dict[str, Any] = {
        "in_features": fan_in,
        "weight_shape": list(one.weight_shape),
        "flat_size": n * fan_in,
    }
    if one.convolution is None:
        base, rows = abi.FLOAT_BASES[0], list(range(len(one.x.shape or ())))
        attributes |= {"x_perm": rows, "y_perm": rows}
    else:
        base = abi.FLOAT_BASES[1]
        attributes |= one.convolution
    (old,) = one.last.outputs
    node = ir.node(
        abi.operator_name(base, one.residual is not None, one.activation),
        [one.x, *constants, *([] if one.residual is None else [one.residual])],
        attributes,
        domain=abi.DOMAIN,
        outputs=[ir.val(old.name, shape=old.shape, type=old.type)],
        name=one.node.name,
    )
    # Before the last of the nodes that it replaces: what is added is computed by then.
    graph.insert_before(one.last, node)
    old.name = f"{old.name}_dense"
    old.replace_all_uses_with(node.outputs[0], replace_graph_outputs=True)


def _initializer(graph: ir.Graph, name: str, array: Any) -> ir.Value:
    if name not in graph.initializers:
        tensor = ir.tensor(np.ascontiguousarray(array), name=name)
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
