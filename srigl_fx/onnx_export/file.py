"""What an ONNX file holds: its condensed layers and their sizes.

Owns reading a file that nobody vouches for: nothing in it is executed or expanded, and only declared sizes are used.
It must not know how files are written or run.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srigl_fx.errors import FormatError
from srigl_fx.onnx_export.recipes import KEY as RECIPE
from srigl_fx.reports.text_tables import format_bytes, format_table
from srigl_fx.runtime.format import shape_problem
from srigl_fx.runtime.ort.abi import DOMAIN, NO_LAYERS, SCALES, inputs_of, operator_names
from srigl_fx.runtime.ort.contents import MARK

if TYPE_CHECKING:
    import onnx

_COMPUTED = ("x", "residual")  # the inputs of an operator that are no constants


@dataclass(frozen=True, kw_only=True)
class CondensedNode:
    """One condensed layer of a file.

    Attributes:
        name: The weight it comes from.
        operator: ``CondensedLinear``, ``CondensedConv`` or ``CondensedConvTranspose``, with ``Int8`` where values have
            eight bits and ``Bytes`` where outputs have, and the epilogue it computes.
        weight_shape: The dense weight's shape, output channels first.
        fan_in: Weights kept by each active neuron.
        active_neurons: Neurons that keep weights.
        bytes: What its constants take in the file: values, indices, active, bias, and scales if it has some.
    """

    name: str
    operator: str
    weight_shape: tuple[int, ...]
    fan_in: int
    active_neurons: int
    bytes: int

    @property
    def kept(self) -> float:
        """Fraction of the dense weight that is kept."""
        return self.fan_in * self.active_neurons / math.prod(self.weight_shape)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the dense float32 weight and bias."""
        return 4 * (math.prod(self.weight_shape) + self.weight_shape[0])


@dataclass(frozen=True)
class FileReport:
    """The condensed layers of a file, and what is left of those that it had; ``str()`` is a table.

    Attributes:
        path: The file.
        file_bytes: Its size, with the tensors that it keeps in files beside it.
        nodes: Its condensed layers, one for each node.
        fallback: Whether it carries the functions for a stock ONNX Runtime.
        marked: Whether it was exported with condensed layers.
        renamed: Functions of the operators' domain under other names, which a tool gave them: they compute densely.
        expanded: Condensed weights whose arrays are in the file, but which no condensed operator reads any more.
        external_bytes: What the file keeps in files beside it.
        has_recipe: Whether it says by what recipe its model was made sparse (:func:`srigl_fx.onnx_tools.recipe`).
    """

    path: Path
    file_bytes: int
    nodes: tuple[CondensedNode, ...]
    fallback: bool
    marked: bool = False
    renamed: tuple[str, ...] = ()
    expanded: tuple[str, ...] = ()
    external_bytes: int = 0
    has_recipe: bool = False

    @property
    def weights(self) -> "tuple[CondensedNode, ...]":
        """The condensed layers without repetition: a weight that several nodes use counts once."""
        return tuple({node.name: node for node in self.nodes}.values())

    @property
    def sparse_bytes(self) -> int:
        """What the condensed layers take in the file, biases included."""
        return sum(node.bytes for node in self.weights)

    @property
    def dense_bytes(self) -> int:
        """What the same layers take in a dense file, biases included."""
        return sum(node.dense_bytes for node in self.weights)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts."""
        nodes = [{**asdict(node), "kept": node.kept, "dense_bytes": node.dense_bytes} for node in self.nodes]
        totals = {"sparse_bytes": self.sparse_bytes, "dense_bytes": self.dense_bytes}
        return {**asdict(self), "path": str(self.path), "nodes": nodes, **totals}

    def __str__(self) -> str:
        if not self.nodes:
            said = self._lost() or " srigl-fx condense makes some of weights that hold zeros."
            return f"{self.path} ({format_bytes(self.file_bytes)}) has no condensed layers.{said}{self._more()}"
        rows = [
            (
                node.name,
                node.operator,
                "x".join(map(str, node.weight_shape)),
                f"{node.fan_in}/{math.prod(node.weight_shape[1:])}",
                f"{node.active_neurons}/{node.weight_shape[0]}",
                f"{node.kept:.1%}",
                format_bytes(node.bytes),
                format_bytes(node.dense_bytes),
            )
            for node in self.nodes
        ]
        headers = ("layer", "operator", "weight", "fan-in", "active", "kept", "bytes", "dense bytes")
        total, dense = self.sparse_bytes, self.dense_bytes
        fallback = "with a fallback for stock ONNX Runtime" if self.fallback else "needs the operator library to run"
        return "\n".join(
            (
                format_table(headers, rows, right=(3, 4, 5, 6, 7)),
                f"{format_bytes(total)} instead of {format_bytes(dense)} ({total / dense:.1%}) for the condensed "
                f"layers; the whole file has {format_bytes(self.file_bytes)}{self._beside()}, {fallback}."
                f"{self._lost()}{self._more()}",
            )
        )

    def _more(self) -> str:
        return " srigl-fx recipe shows the recipe that it holds." if self.has_recipe else ""

    def _beside(self) -> str:
        return f" ({format_bytes(self.external_bytes)} of them in files beside it)" if self.external_bytes else ""

    def _lost(self) -> str:
        """What a tool took from the file since it was exported, as sentences; "" where nothing is known to be lost."""
        said = []
        if self.renamed:
            said.append(f"A tool has renamed condensed operators, which run densely now: {_some(self.renamed)}.")
        if self.expanded:
            said.append(f"These weights are still stored condensed, but computed densely: {_some(self.expanded)}.")
        if self.marked and not self.nodes and not said:
            said.append("It was exported with condensed layers, and a tool has made it dense since.")
        if said:
            said.append(
                "The page 'Tools around ONNX' of the documentation says which tools do that, and how to avoid it."
            )
        return "".join(f" {sentence}" for sentence in said)


def _some(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def read_model(path: Path) -> "onnx.ModelProto":
    """The model in a file, without the tensors that it keeps in files beside it.

    Raises:
        FormatError: If the file cannot be read, or is no ONNX file.

    Example:
        >>> read_model(Path("missing.onnx"))
        Traceback (most recent call last):
        srigl_fx.errors.FormatError: cannot read missing.onnx: No such file or directory
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        content = path.read_bytes()
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror or error}") from error
    if content[4:8] == b"ORTM":
        raise FormatError(f"{path} is a file in ORT format: give the ONNX file that it was made from")
    try:
        model = onnx.load_model_from_string(content, format="protobuf")
    except DecodeError as error:
        problem = (str(error).splitlines() or [type(error).__name__])[0]
        raise FormatError(f"{path} is no ONNX file, or a damaged one: {problem:.300}") from error
    if not model.graph.node:  # so it is with an empty file
        raise FormatError(f"{path} is no ONNX file, or a damaged one: it holds no graph")
    return model


def inspect_file(path: Path) -> FileReport:
    """Read ``path`` and describe its condensed layers.

    Raises:
        FormatError: If the file cannot be read, is no ONNX file, or holds a malformed condensed layer.
    """
    import onnx

    model = read_model(path)
    size = path.stat().st_size
    constants = {tensor.name: tensor for graph in all_graphs(model.graph) for tensor in graph.initializer}
    texts = [text for node in all_nodes(model.graph) for text in (node.op_type, node.domain, *node.input, *node.output)]
    if not all(
        isinstance(text, str) for text in (*texts, *constants)
    ):  # protobuf gives bytes that are no UTF-8 as such
        raise FormatError(f"{path} is no ONNX file, or a damaged one: a name in it is no text")
    known = operator_names()
    ours = [node for node in all_nodes(model.graph) if node.domain == DOMAIN]
    nodes = tuple(
        _read_node(node, constants, path, inputs_of(*known[node.op_type][:2])) for node in ours if node.op_type in known
    )
    renamed = tuple(dict.fromkeys(node.op_type for node in ours if node.op_type not in (*known, *NO_LAYERS)))
    read = {name for node in ours for name in node.input}
    fallback = {function.name for function in model.functions if function.domain == DOMAIN}
    external = sum(
        _constant_bytes(tensor, str(path))
        for tensor in constants.values()
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    )
    return FileReport(
        path,
        size + external,
        nodes,
        fallback >= {node.operator for node in nodes},
        marked=MARK in [(entry.key, entry.value) for entry in model.metadata_props],
        renamed=renamed,
        expanded=tuple(name for name in _stored_condensed(constants) if f"{name}_values" not in read),
        external_bytes=external,
        has_recipe=any(entry.key.startswith(RECIPE) for entry in model.metadata_props),
    )


def _stored_condensed(constants: "dict[str, onnx.TensorProto]") -> list[str]:
    """The weights of which all arrays of the condensed format are among a file's constants."""
    names = (name.removesuffix("_values") for name in constants if name.endswith("_values"))
    return [name for name in names if f"{name}_indices" in constants and f"{name}_active" in constants]


def all_nodes(graph: "onnx.GraphProto") -> "Iterator[onnx.NodeProto]":
    """Every node of ``graph`` and of the branches and loops inside it."""
    for one in all_graphs(graph):
        yield from one.node


def all_graphs(graph: "onnx.GraphProto") -> "Iterator[onnx.GraphProto]":
    """``graph``, and those of the branches and loops inside it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from all_graphs(attribute.g)


def all_tensors(model: "onnx.ModelProto") -> "Iterator[onnx.TensorProto]":
    """Every tensor that a file holds, those of branches, loops and functions too."""
    graphs, nodes = [model.graph], [node for function in model.functions for node in function.node]
    while graphs:
        graph = graphs.pop()
        yield from graph.initializer
        sparse = [*graph.sparse_initializer]
        nodes += graph.node
        while nodes:
            for attribute in nodes.pop().attribute:
                yield from (attribute.t, *attribute.tensors)
                sparse += [attribute.sparse_tensor, *attribute.sparse_tensors]
                graphs += [attribute.g, *attribute.graphs]
        for one in sparse:
            yield from (one.values, one.indices)


def _read_node(
    node: "onnx.NodeProto", constants: "dict[str, onnx.TensorProto]", path: Path, inputs: Sequence[str]
) -> CondensedNode:
    """What a node says of its layer; ``inputs`` are those that its operator takes."""
    where = f"{path}: the {node.op_type} node {node.name!r}"
    if len(node.input) != len(inputs):
        raise FormatError(f"{where} has {len(node.input)} inputs instead of {len(inputs)}; export the model anew")
    operands = {}
    for operand, name in zip(inputs, node.input, strict=True):
        if operand not in _COMPUTED:
            if name not in constants:
                raise FormatError(f"{where} has no constant {operand}; export the model anew")
            operands[operand] = constants[name]
    shape = next((tuple(attribute.ints) for attribute in node.attribute if attribute.name == "weight_shape"), ())
    if len(shape) < 2 or min(shape) < 1:
        raise FormatError(f"{where} has the dense shape {shape}, which no weight has; export the model anew")
    stored = {operand: tuple(tensor.dims) for operand, tensor in operands.items()}
    values, fan_in = stored["values"], math.prod(shape[1:])
    if (
        len(values) != 2
        or shape_problem(values, stored["indices"], stored["active"])
        or stored["bias"] != shape[:1]
        or stored.get(SCALES, values[:1]) != values[:1]
        or not (0 <= values[0] <= shape[0] and 0 <= values[1] <= fan_in)
    ):
        *most, last = (f"{operand} {sizes}" for operand, sizes in stored.items())
        raise FormatError(
            f"{where} stores {', '.join(most)} and {last}, which do not fit the dense shape {shape}; "
            "export the model anew"
        )
    return CondensedNode(
        name=node.input[1].removesuffix("_values"),
        operator=node.op_type,
        weight_shape=shape,
        fan_in=values[1],
        active_neurons=values[0],
        bytes=sum(_constant_bytes(tensor, where) for tensor in operands.values()),
    )


def _constant_bytes(tensor: "onnx.TensorProto", where: str) -> int:
    """Bytes of a constant by its declared type and shape."""
    from onnx import TensorProto, helper

    try:
        # NumPy has no bfloat16 of its own: releases of onnx name other types for it.
        half = tensor.data_type == TensorProto.BFLOAT16
        item = 2 if half else int(helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
    except (KeyError, ValueError, TypeError) as error:
        raise FormatError(f"{where}: the constant {tensor.name!r} has an unknown type ({tensor.data_type})") from error
    return int(math.prod(tensor.dims) * item)
