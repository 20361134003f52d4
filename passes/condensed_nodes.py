"""The condensed operators in a graph: which nodes they are, and writing their optional arguments.

Owns what the passes that run after condensing share. It must not know how a weight is condensed, nor any kernel.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from srigl_fx.passes.program import arguments, tensor_at
from srigl_fx.runtime.format import is_padding, row_indices
from srigl_fx.runtime.ops import AFFINE as AFFINE
from srigl_fx.runtime.ops import ARRANGE as ARRANGE
from srigl_fx.runtime.ops import CONCAT as CONCAT
from srigl_fx.runtime.ops import CONV as CONV
from srigl_fx.runtime.ops import LINEAR as LINEAR
from srigl_fx.runtime.ops import PAD as PAD
from srigl_fx.runtime.ops import POOL as POOL
from srigl_fx.runtime.ops import ROUND as ROUND


def is_condensed(node: fx.Node) -> bool:
    """Whether a node is a condensed operator.

    Example:
        >>> is_condensed(fx.Graph().placeholder("x"))
        False
    """
    return node.target in (LINEAR, CONV)


def condensed_nodes(graph: fx.Graph) -> Iterator[fx.Node]:
    """The condensed operators of a graph, in its order."""
    return (node for node in graph.nodes if is_condensed(node))


def name_of(node: fx.Node) -> str:
    """The weight that a condensed operator holds, by the name of its values, or the node's own name."""
    values = arguments(node)["values"]
    return str(values.target).removesuffix("_values") if isinstance(values, fx.Node) else node.name


def settled_padding(module: fx.GraphModule) -> Iterator[tuple[fx.Node, torch.Tensor]]:
    """The values of condensed operators whose padding is no longer zero, with zeros there.

    The operators ignore padding; an optimizer that looks at a whole matrix (Muon) writes to it all the same.
    """
    for node in condensed_nodes(module.graph):
        given = arguments(node)
        if all(given[name].op == "get_attr" for name in ("values", "indices", "active")):
            values, indices, active = (
                tensor_at(module, str(given[name].target)).detach() for name in ("values", "indices", "active")
            )
            padding = torch.from_numpy(is_padding(row_indices(indices.numpy(), active.numpy())))
            if bool(values[padding].any()):
                yield given["values"], values.masked_fill(padding, 0)


def set_arguments(node: fx.Node, **changes: Any) -> None:
    """Write arguments of an operator node by name, where they stand already or as keywords.

    Example:
        >>> graph = fx.Graph()
        >>> node = graph.call_function(torch.ops.aten.gelu.default, (graph.placeholder("x"),))
        >>> set_arguments(node, approximate="tanh")
        >>> node.kwargs
        {'approximate': 'tanh'}
    """
    assert isinstance(node.target, torch._ops.OpOverload)
    names = [argument.name for argument in node.target._schema.arguments]
    for name, value in changes.items():
        position = names.index(name)
        if position < len(node.args):
            node.update_arg(position, value)
        else:
            node.update_kwarg(name, value)


def same_shape(one: fx.Node, other: fx.Node) -> bool:
    """Whether both nodes are known to be tensors of one shape and float32; free sizes must be the same expression."""
    shapes = []
    for value in (one.meta.get("val"), other.meta.get("val")):
        if not isinstance(value, torch.Tensor) or value.dtype is not torch.float32:
            return False
        shapes.append(tuple(map(str, value.shape)))
    return shapes[0] == shapes[1]
