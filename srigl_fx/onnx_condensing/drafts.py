"""Nodes that are made before it is settled whether they get into a graph, and names that nothing else has.

Owns how such nodes and their constants are named, put into a graph, or let go. It must not know what they compute.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir


class Names:
    """The names of all values of a model: a graph inside another one must not take a name of that one either.

    Example:
        >>> names = Names(ir.Model(ir.Graph([ir.val("x")], [], nodes=[]), ir_version=9))
        >>> names.fresh("x"), names.fresh("x"), names.fresh("y")
        ('x_2', 'x_3', 'y')
    """

    def __init__(self, model: ir.Model) -> None:
        self.taken: set[str] = set()
        for graph in model.graphs():
            values = [*graph.inputs, *graph.initializers.values()]
            values += [value for node in graph for value in node.outputs]
            self.taken.update(value.name for value in values if value.name)

    def fresh(self, base: str) -> str:
        """A name like this one that nothing has; it is taken from now on."""
        name, count = base, 1
        while name in self.taken:
            count += 1
            name = f"{base}_{count}"
        self.taken.add(name)
        return name


class Draft:
    """Nodes in their order, and the constants that they read.

    Args:
        names: Those of the model.
        stem: What the names of its values begin with.

    Example:
        >>> draft = Draft(Names(ir.Model(ir.Graph([], [], nodes=[]), ir_version=9)), "layer")
        >>> draft.add("Relu", ir.val("x"), shape=[2]).name, draft.constant(np.zeros(2), "zeros").name
        ('layer_Relu', 'layer_zeros')
    """

    def __init__(self, names: Names, stem: str) -> None:
        self.names, self.stem = names, stem
        self.nodes: list[ir.Node] = []
        self.constants: list[ir.Value] = []

    def constant(self, array: Any, name: str) -> ir.Value:
        """A constant of the same graph."""
        tensor = ir.tensor(np.asarray(array), name=self.names.fresh(f"{self.stem}_{name}"))
        kind = ir.TensorType(tensor.dtype)
        value = ir.val(tensor.name, shape=ir.Shape(tensor.shape.numpy()), type=kind, const_value=tensor)
        self.constants.append(value)
        return value

    def value(self, name: str, shape: Sequence[Any] | None, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        """A value that is nothing's output yet."""
        name = self.names.fresh(f"{self.stem}_{name}")
        return ir.val(name, shape=None if shape is None else ir.Shape(shape), type=ir.TensorType(dtype))

    def add(
        self,
        operator: str,
        *inputs: ir.Value | None,
        shape: Sequence[Any] | None,
        dtype: ir.DataType = ir.DataType.FLOAT,
        **attributes: Any,
    ) -> ir.Value:
        """The output of a further node; attributes that are None are left out."""
        return self.add_several(operator, *inputs, shapes=[shape], dtype=dtype, **attributes)[0]

    def add_several(
        self,
        operator: str,
        *inputs: ir.Value | None,
        shapes: Sequence[Sequence[Any] | None],
        dtype: ir.DataType = ir.DataType.FLOAT,
        **attributes: Any,
    ) -> list[ir.Value]:
        """The same of a node with several outputs."""
        outputs = [self.value(operator, shape, dtype) for shape in shapes]
        given = {name: value for name, value in attributes.items() if value is not None}
        self.nodes.append(ir.node(operator, inputs, given, outputs=outputs, name=self.names.fresh(self.stem)))
        return outputs

    def graph(self, name: str, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]) -> ir.Graph:
        """All of it, as the body of a node."""
        return ir.Graph(inputs, outputs, nodes=self.nodes, initializers=self.constants, name=name)

    def put(self, place: ir.Node, old: Sequence[ir.Value], new: Sequence[ir.Value | None]) -> None:
        """Get into the graph of a node, in front of it, and into the place of what is read of it.

        Args:
            place: The node.
            old: Values of the graph.
            new: What is read instead of each, with its name; None where nothing reads it.
        """
        graph = place.graph
        assert isinstance(graph, ir.Graph)
        graph.insert_before(place, self.nodes)
        for value in self.constants:
            if value.uses():
                graph.register_initializer(value)
        for before, after in zip(old, new, strict=True):
            if after is not None:
                name, before.name = before.name, self.names.fresh(f"{before.name}_dense")
                after.name, after.type = name, before.type if before.type is not None else after.type
                after.shape = before.shape if after.shape is None else after.shape
                before.replace_all_uses_with(after, replace_graph_outputs=True)

    def let_go(self) -> None:
        """Read nothing any more, so that nothing is kept for these nodes."""
        for node in reversed(list(ir.traversal.RecursiveGraphIterator(self._loose()))):
            for i in range(len(node.inputs)):
                node.replace_input_with(i, None)

    def _loose(self) -> ir.Graph:
        return ir.Graph([], [], nodes=self.nodes)
