"""Where the nodes of an exported model come from: which operator of PyTorch, in which module.

Owns the exporter's notes of that, and finding a node in what a checker or a runtime says. It must not know files or
sessions.
"""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

# How ONNX and ONNX Runtime name a node in what they raise, and how they name its kind.
_NAMES = re.compile(r"node name: (\S+?)\)|with name '([^']+)'|Name: ?'([^']+)'|Node ?\(([^)]+)\)|Node: ?(\S+)")
_KINDS = re.compile(r"implementation for (\w+)\(\d+\)|running (\w+) node|Op ?\((\w+)\)|op_type: ?(\w+)")


def places(model: "onnx.ModelProto") -> dict[str, str]:
    """Operator and module of each node of the graph, in words, by its name and by its kind where all have the same.

    Example:
        >>> import onnx
        >>> node = onnx.helper.make_node("Erf", ["x"], ["y"], name="node_erf")
        >>> node.metadata_props.add(key="namespace", value=": Net/inner: Inner/erf: aten.erf.default")
        key: "namespace"
        value: ": Net/inner: Inner/erf: aten.erf.default"
        <BLANKLINE>
        >>> places(onnx.helper.make_model(onnx.helper.make_graph([node], "graph", [], [])))
        {'node_erf': 'aten.erf.default (in inner)', 'Erf': 'aten.erf.default (in inner)'}
    """
    named: dict[str, str] = {}
    kinds: dict[str, set[str]] = {}
    for node in model.graph.node:
        space = next((note.value for note in node.metadata_props if note.key == "namespace"), "")
        *modules, operator = [part.partition(": ")[::2] for part in space.split("/")]
        inside = next((name for name, _ in reversed(modules) if name), "")
        place = f"{operator[1] or 'an operator'}{f' (in {inside})' if inside else ''}" if space else ""
        named[node.name] = place
        kinds.setdefault(node.op_type, set()).add(place)
    alike = {kind: next(iter(found)) for kind, found in kinds.items() if len(found) == 1 and kind not in named}
    return {name: place for name, place in {**named, **alike}.items() if place}


def place_in(message: str, known: Mapping[str, str]) -> str:
    """The place of the node that a message names, or of its kind; "" where it names none that is known.

    Example:
        >>> place_in("Could not find an implementation for Erf(13) node with name 'n0'", {"Erf": "aten.erf.default"})
        'aten.erf.default'
    """
    found = [name for match in (*_NAMES.findall(message), *_KINDS.findall(message)) for name in match]
    return next((known[name] for name in found if name in known), "")
