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

    The operator is the one that the exporter translated: what it takes apart first has the name of a part.

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

    A node that ONNX Runtime has made of several has a name of its own. Where that holds the name of one of them, it is
    the place of that one; where it does not, the kind is no help either, since it is that of the new node.

    Example:
        >>> place_in("Could not find an implementation for Erf(13) node with name 'n0'", {"n0": "aten.erf.default"})
        'aten.erf.default'
        >>> place_in("Non-zero status code returned while running Erf node. Name:''", {"Erf": "aten.erf.default"})
        'aten.erf.default'
        >>> place_in("node with name 'node_mm/MatMulAddFusion'", {"node_mm": "aten.mm.default (in inner)"})
        'aten.mm.default (in inner), fused with others'
    """
    if names := [name for match in _NAMES.findall(message) for name in match if name]:
        exact = next((known[name] for name in names if name in known), "")
        return exact or next((place for name in names if (place := _inside(name, known))), "")
    kinds = [kind for match in _KINDS.findall(message) for kind in match if kind]
    return next((known[kind] for kind in kinds if kind in known), "")


def _inside(name: str, known: Mapping[str, str]) -> str:
    """The place of the longest known name that a fused node's name holds as a word."""
    held = [one for one in known if re.search(rf"(?<!\w){re.escape(one)}(?!\w|/\d)", name)]
    return f"{known[max(held, key=len)]}, fused with others" if held else ""
