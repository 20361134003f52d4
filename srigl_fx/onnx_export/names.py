"""What the inputs, outputs and free sizes of an ONNX model are called.

Owns these names: an input is called like the argument of the forward, an output by its place in what the model returns.
The names of values inside the graph play no part. It must not know how a model is translated.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import fx
from torch.utils import _pytree as pytree

from srigl_fx.onnx_export.rewrites import is_tensor
from srigl_fx.passes.sizes import Size
from srigl_fx.passes.trees import leaf_paths

if TYPE_CHECKING:
    import onnx


def output_names(module: fx.GraphModule) -> list[str]:
    """Names for the tensors that a model returns, by their places: a dict's keys, fields, "output" for a lone tensor.

    Numbers and None are no outputs. A name that an input has already ends in "_out"; one that another output has is
    numbered.

    Example:
        >>> import torch
        >>> class Pair(torch.nn.Module):
        ...     def forward(self, x):
        ...         return {"y": x + 1, "none": None, "parts": [x + 2, 3, x + 4], "x": x}
        >>> output_names(torch.export.export(Pair(), (torch.ones(2),)).module())
        ['y', 'parts_0', 'parts_2', 'x_out']
    """
    (returned,) = next(node for node in module.graph.nodes if node.op == "output").args
    leaves = pytree.tree_leaves(returned)
    inputs = {node.name for node in module.graph.nodes if node.op == "placeholder"}
    spec = module.graph._codegen.pytree_info.out_spec  # type: ignore[attr-defined]
    if spec is None or spec.num_leaves != len(leaves):
        spec = pytree.tree_structure(list(range(len(leaves))))
    names: list[str] = []
    for path, leaf in zip(leaf_paths(spec), leaves, strict=True):
        if is_tensor(leaf):
            name = "_".join(path if path and path[0] and not path[0].isdigit() else ["output", *path])
            names.append(_unused(name + "_out" if name in inputs else name, {*names, *inputs}))
    return names


def _unused(name: str, taken: set[str]) -> str:
    candidate, number = name, 2
    while candidate in taken:
        candidate, number = f"{name}_{number}", number + 1
    return candidate


def name_values(model: "onnx.ModelProto", inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Give a model's inputs and outputs their names; other values that have one of them are renamed.

    Example:
        >>> import onnx.parser
        >>> text = '<ir_version: 9, opset_import: ["" : 18]> g (float[2] a) => (float[2] b) {y = Neg(a) b = Abs(y)}'
        >>> model = onnx.parser.parse_model(text)
        >>> name_values(model, ["x"], ["y"])
        >>> [(list(node.input), list(node.output)) for node in model.graph.node]
        [(['x'], ['_y']), (['_y'], ['y'])]
    """
    graph = model.graph
    names = dict(zip((value.name for value in graph.input), inputs, strict=True))
    names |= dict(zip((value.name for value in graph.output), outputs, strict=True))
    wanted = {*inputs, *outputs}
    others = {name for part in _graphs(graph) for name in _values(part)} - names.keys()
    for name in sorted(others & wanted):
        new = "_" + name
        while new in others or new in wanted:
            new = "_" + new
        names[name] = new
    rename_values(model, names)


def rename_values(model: "onnx.ModelProto", names: Mapping[str, str]) -> None:
    """Give values other names, wherever they stand; none of these may be taken."""
    for part in _graphs(model.graph):
        _rename(part, names)


def _graphs(graph: "onnx.GraphProto") -> "Iterator[onnx.GraphProto]":
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node or inner.output:
                    yield from _graphs(inner)


def _values(graph: "onnx.GraphProto") -> Iterator[str]:
    for value in (*graph.input, *graph.output, *graph.initializer):
        yield value.name
    for node in graph.node:
        yield from node.output


def _rename(graph: "onnx.GraphProto", names: Mapping[str, str]) -> None:
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        for listed in (node.input, node.output):
            listed[:] = [names.get(name, name) for name in listed]


def name_sizes(model: "onnx.ModelProto", sizes: Sequence[Mapping[int, Size]]) -> None:
    """Call free sizes by their names, wherever they stand.

    Args:
        model: Its free sizes have symbols.
        sizes: For each input of the model, its free axes and their sizes.
    """
    names: dict[str, str] = {}
    for value, free in zip(model.graph.input, sizes, strict=True):
        for axis, size in free.items():
            symbol = value.type.tensor_type.shape.dim[axis].dim_param
            if symbol.isidentifier():  # a sum of others has their names
                names.setdefault(symbol, str(size) if size.name else f"({size})")
    if names:
        pattern = re.compile("|".join(rf"\b{re.escape(symbol)}\b" for symbol in names))
        for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
            for dimension in value.type.tensor_type.shape.dim:
                if dimension.dim_param:
                    dimension.dim_param = pattern.sub(lambda found: names[found.group()], dimension.dim_param)
    for value, free in zip(model.graph.input, sizes, strict=True):
        for axis, size in free.items():
            value.type.tensor_type.shape.dim[axis].dim_param = str(size)


def shapes_of(values: "Sequence[onnx.ValueInfoProto]") -> dict[str, tuple[int | str, ...]]:
    """The sizes of inputs or outputs by name: numbers where they are fixed, the names of sizes where they are free."""
    return {
        value.name: tuple(size.dim_param or int(size.dim_value) for size in value.type.tensor_type.shape.dim)
        for value in values
    }
