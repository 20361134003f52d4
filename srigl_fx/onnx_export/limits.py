"""What makes a file refuse sizes that its graph is not right for.

Owns the nodes that do so. It must not know how limits are found. ONNX has no operator that raises: a table of one row
is read at row 1 where a size is out of its limits, by a node whose name says what they are, and that errors tell.
"""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from srigl_fx.passes.sizes import ANY, Size, span_of

if TYPE_CHECKING:
    import onnx

_LARGEST = 2**63 - 1
_SAID = re.compile(r"the size (.+) must be from (\d{1,19}) (?:to (\d{1,19})|on)")  # some tools put more before it


def limit_sizes(
    model: "onnx.ModelProto", sizes: Sequence[Mapping[int, Size]], limits: Mapping[str, tuple[int, int | None]]
) -> None:
    """Let a model check the sizes that have limits, each in the first input where it stands alone.

    Args:
        model: It is changed in place; its inputs have their names.
        sizes: For each input of the model, its free axes and their sizes.
        limits: By the names of sizes.

    Example:
        >>> import onnx.parser
        >>> text = '<ir_version: 9, opset_import: ["" : 18]> g (float[n] x) => (float[n] y) {y = Neg(x)}'
        >>> model = onnx.parser.parse_model(text)
        >>> limit_sizes(model, [{0: Size.named("n")}], {"n": (1, 9)})
        >>> [node.name for node in model.graph.node if "must" in node.name], list(model.graph.node[-1].input)
        (['the size n must be from 1 to 9'], ['x_within_limits'])
    """
    left = {name: limit for name, limit in limits.items() if limit != ANY}
    added: list[onnx.NodeProto] = []
    for value, free in zip(list(model.graph.input), sizes, strict=True):
        read = value.name  # of the input, behind the checks of its sizes so far
        for axis, size in free.items():
            name = size.name
            if name in left and any(read in node.input for node in model.graph.node):
                added += _check(model, added, value, read, axis, name, *left.pop(name))
                read = added[-1].output[0]
    nodes = [*added, *model.graph.node]
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


def _check(
    model: "onnx.ModelProto",
    added: "Sequence[onnx.NodeProto]",
    value: "onnx.ValueInfoProto",
    source: str,
    axis: int,
    name: str,
    least: int,
    most: int | None,
) -> "list[onnx.NodeProto]":
    """Nodes that make what the graph reads of an input, by the name ``source``, depend on one of its sizes."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    taken = {one for node in (*added, *model.graph.node) for one in (*node.input, *node.output)}
    checked = f"{value.name}_within_limits"
    while checked in taken:
        checked += "_"
    rank = len(value.type.tensor_type.shape.dim)
    constants = {"axis": axis, "least": least, "most": _LARGEST if most is None else most}
    for label, number in constants.items():
        model.graph.initializer.append(numpy_helper.from_array(np.array(number, np.int64), f"{checked}.{label}"))
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((1, rank), np.int64), f"{checked}.same"))

    def node(kind: str, inputs: list[str], output: str, name: str = "") -> "onnx.NodeProto":
        made = f"{checked}.{output}"
        return helper.make_node(kind, inputs, [made], name=name or made)

    row = node("Cast", [f"{checked}.wrong"], "row")
    row.attribute.append(helper.make_attribute("to", TensorProto.INT64))
    for other in model.graph.node:
        other.input[:] = [checked if one == source else one for one in other.input]
    return [
        node("Shape", [source], "shape"),
        node("Gather", [f"{checked}.shape", f"{checked}.axis"], "size"),
        node("Less", [f"{checked}.size", f"{checked}.least"], "less"),
        node("Greater", [f"{checked}.size", f"{checked}.most"], "more"),
        node("Or", [f"{checked}.less", f"{checked}.more"], "wrong"),
        row,
        node(
            "Gather",
            [f"{checked}.same", f"{checked}.row"],
            "sizes",
            name=f"the size {name} must be {span_of(least, most)}",
        ),
        # A size of 0 stands for that of the input: this changes nothing, and copies nothing.
        helper.make_node("Reshape", [source, f"{checked}.sizes"], [checked], name=checked),
    ]
