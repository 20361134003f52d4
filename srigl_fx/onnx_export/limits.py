"""What makes a file refuse sizes that its graph is not right for.

Owns the nodes that do so. It must not know how limits and conditions are found. ONNX has no operator that raises: a
table of one row is read at row 1 where a size is out of its limits, or sizes do not go together, by a node whose name
says what they must be, and that errors tell.
"""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from srigl_fx.passes.sizes import ANY, Condition, Size, span_of

if TYPE_CHECKING:
    import onnx

_LARGEST = 2**63 - 1
_SAID = re.compile(r"the size (.+) must be from (\d{1,19}) (?:to (\d{1,19})|on)")  # some tools put more before it


def limit_sizes(
    model: "onnx.ModelProto",
    sizes: Sequence[Mapping[int, Size]],
    limits: Mapping[str, tuple[int, int | None]],
    conditions: Sequence[Condition] = (),
) -> None:
    """Let a model check the sizes that have limits or conditions, each in the first input where it stands alone.

    A condition on a size that stands nowhere alone is left to the operators.

    Args:
        model: It is changed in place; its inputs have their names.
        sizes: For each input of the model, its free axes and their sizes.
        limits: By the names of sizes.
        conditions: What else is required of them.

    Example:
        >>> import onnx.parser
        >>> text = '<ir_version: 9, opset_import: ["" : 18]> g (float[n] x) => (float[n] y) {y = Neg(x)}'
        >>> model = onnx.parser.parse_model(text)
        >>> limit_sizes(model, [{0: Size.named("n")}], {"n": (1, 9)}, [Condition.parse("n % 4 == 0")])
        >>> [node.name for node in model.graph.node if "must" in node.name]
        ['the size n must be from 1 to 9', 'n must be a multiple of 4, where n is axis 0 of x']
        >>> list(model.graph.node[-1].input)
        ['x_within_limits_']
    """
    gates = _Gates(model)
    left = {name: limit for name, limit in limits.items() if limit != ANY}
    places: dict[str, tuple[onnx.ValueInfoProto, int]] = {}
    for value, free in zip(list(model.graph.input), sizes, strict=True):
        for axis, size in free.items():
            name = size.name
            if name is not None:
                places.setdefault(name, (value, axis))
            if name in left and gates.is_read(value):
                gates.limit(value, axis, name, *left.pop(name))
    for condition in conditions:
        known = {name: places[name] for name in condition.names if name in places}
        gate = next((value for value, _ in known.values() if gates.is_read(value)), None)
        if gate is not None and len(known) == len(condition.names):
            gates.require(gate, condition, known)
    nodes = [*gates.added, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def limits_in(model: "onnx.ModelProto") -> dict[str, tuple[int, int | None]]:
    """The limits that a file checks, by the names of sizes: what :func:`limit_sizes` put into it.

    Example:
        >>> import onnx.parser
        >>> text = '<ir_version: 9, opset_import: ["" : 18]> g (float[n] x) => (float[n] y) {y = Neg(x)}'
        >>> model = onnx.parser.parse_model(text)
        >>> limit_sizes(model, [{0: Size.named("n")}], {"n": (2, None)})
        >>> limits_in(model)
        {'n': (2, None)}
    """
    found = {}
    for node in model.graph.node:
        if node.op_type == "Gather" and (said := _SAID.search(node.name)):
            found[said[1]] = int(said[2]), int(said[3]) if said[3] else None
    return found


class _Gates:
    """Nodes between inputs and what reads them, in their order."""

    def __init__(self, model: "onnx.ModelProto") -> None:
        self.added: list[onnx.NodeProto] = []
        self._model = model
        self._read: dict[str, str] = {}  # what the graph reads of an input, behind the gates so far

    def is_read(self, value: "onnx.ValueInfoProto") -> bool:
        """Whether a node of the graph reads an input: what nobody reads cannot be checked on its way."""
        read = self._read.get(value.name, value.name)
        return any(read in node.input for node in self._model.graph.node)

    def limit(self, value: "onnx.ValueInfoProto", axis: int, name: str, least: int, most: int | None) -> None:
        """A gate in an input that is open where a size of its is within limits."""
        prefix = self._new_name(value)
        size = self._size(prefix, value.name, axis)
        less = self._node("Less", [size, self._number(prefix, "least", least)], f"{prefix}.less")
        most = _LARGEST if most is None else most
        more = self._node("Greater", [size, self._number(prefix, "most", most)], f"{prefix}.more")
        wrong = self._node("Or", [less, more], f"{prefix}.wrong")
        said = f"the size {name} must be {span_of(least, None if most == _LARGEST else most)}"
        self._gate(prefix, value, wrong, said)

    def require(
        self,
        gate: "onnx.ValueInfoProto",
        condition: Condition,
        places: "Mapping[str, tuple[onnx.ValueInfoProto, int]]",
    ) -> None:
        """A gate in an input that is open where a condition holds; ``places`` has an input and axis for each name."""
        prefix = self._new_name(gate)
        total = self._number(prefix, "constant", condition.size.constant)
        for i, (name, factor) in enumerate(condition.size.terms):
            value, axis = places[name]
            size = self._size(f"{prefix}.{i}", value.name, axis)
            times = self._node("Mul", [size, self._number(prefix, f"{i}.factor", factor)], f"{prefix}.{i}.times")
            total = self._node("Add", [total, times], f"{prefix}.{i}.sum")
        if condition.divisor:
            total = self._node("Mod", [total, self._number(prefix, "divisor", condition.divisor)], f"{prefix}.rest")
        zero = self._number(prefix, "zero", 0)
        if condition.relation == ">=":
            wrong = self._node("Less", [total, zero], f"{prefix}.wrong")
        else:
            wrong = self._node("Equal", [total, zero], f"{prefix}.equal")
            if condition.relation == "==":
                wrong = self._node("Not", [wrong], f"{prefix}.wrong")
        said = [f"{name} is axis {axis} of {value.name}" for name, (value, axis) in places.items()]
        self._gate(prefix, gate, wrong, f"{condition.words}, where {' and '.join(said)}")

    def _new_name(self, value: "onnx.ValueInfoProto") -> str:
        """What an input is called behind one more gate."""
        taken = {one for node in (*self.added, *self._model.graph.node) for one in (*node.input, *node.output)}
        name = f"{value.name}_within_limits"
        while name in taken:
            name += "_"
        return name

    def _number(self, prefix: str, label: str, number: int) -> str:
        import numpy as np

        return self._constant(f"{prefix}.{label}", np.array(number, np.int64))

    def _constant(self, name: str, value: Any) -> str:
        from onnx import numpy_helper

        self._model.graph.initializer.append(numpy_helper.from_array(value, name))
        return name

    def _node(self, kind: str, inputs: list[str], output: str, name: str = "", **attributes: Any) -> str:
        from onnx import helper

        self.added.append(helper.make_node(kind, inputs, [output], name=name or output, **attributes))
        return output

    def _size(self, prefix: str, source: str, axis: int) -> str:
        shape = self._node("Shape", [source], f"{prefix}.shape")
        return self._node("Gather", [shape, self._number(prefix, "axis", axis)], f"{prefix}.size")

    def _gate(self, checked: str, value: "onnx.ValueInfoProto", wrong: str, said: str) -> None:
        """Make what the graph reads of an input depend on whether something is wrong."""
        import numpy as np
        from onnx import TensorProto

        source = self._read.get(value.name, value.name)
        for other in self._model.graph.node:
            other.input[:] = [checked if one == source else one for one in other.input]
        rank = len(value.type.tensor_type.shape.dim)
        same = self._constant(f"{checked}.same", np.zeros((1, rank), np.int64))
        row = self._node("Cast", [wrong], f"{checked}.row", to=TensorProto.INT64)
        sizes = self._node("Gather", [same, row], f"{checked}.sizes", name=said)
        # A size of 0 stands for that of the input: this changes nothing, and copies nothing.
        self._node("Reshape", [source, sizes], checked)
        self._read[value.name] = checked
