"""A captured graph and its tensors in one file without code: safetensors, with the graph as JSON in the header.

Owns the encoding and what a file may contain. A file is untrusted: only functional operators from an allow-list are
accepted, every name that reaches generated code is an identifier, and condensed weights are checked before they can
run. It must not know lowering.
"""

import json
import math
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, fx, nn
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from srigl_fx.errors import FormatError, LoweringError
from srigl_fx.lowering.file_guards import check, guard
from srigl_fx.lowering.file_operators import function_name, function_named
from srigl_fx.passes import trees
from srigl_fx.passes.condensed_nodes import condensed_nodes, settled_padding
from srigl_fx.passes.program import arguments
from srigl_fx.runtime.activations import NAMES
from srigl_fx.runtime.format import VALUE_DTYPES, CondensedWeight
from srigl_fx.runtime.quantisation import given_problem

Value = TypeVar("Value")

VERSION = 1
_KEY = "srigl_fx.graph"
_ATTRIBUTE = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")


def dump(module: fx.GraphModule, extra: dict[str, Any]) -> bytes:
    """A graph module, and ``extra`` for JSON, as the bytes of a file.

    Raises:
        LoweringError: The graph holds something that a file cannot.
    """
    tensors: dict[str, Tensor] = {}
    attributes: dict[str, dict[str, Any]] = {}
    seen: dict[int, str] = {}
    storages: set[int] = set()
    parameters = dict(module.named_parameters(remove_duplicate=False))
    settled = {id(_tensor(module, str(node.target))): values for node, values in settled_padding(module)}
    nodes = []
    for node in module.graph.nodes:
        if node.op == "get_attr" and node.target not in attributes:
            tensor = _tensor(module, str(node.target))
            key = seen.setdefault(id(tensor), str(node.target))
            if key not in tensors:
                held = settled.get(id(tensor), tensor).detach().contiguous()
                shared = held.untyped_storage().data_ptr() in storages
                tensors[key] = held.clone() if shared else held
                storages.add(tensors[key].untyped_storage().data_ptr())
            parameter = node.target in parameters
            attributes[str(node.target)] = {"tensor": key, "parameter": parameter, **_described(tensors[key])}
        try:
            check(node, lambda target: _tensor(module, target))
            nodes.append(_encode_node(node))
        except ValueError as error:
            raise LoweringError(f"this lowered module cannot be saved: node {node.name}: {error}") from error
    info = module.graph._codegen.pytree_info  # type: ignore[attr-defined]
    try:
        header = {
            "version": VERSION,
            "nodes": nodes,
            "attributes": attributes,
            "arguments": list(info.orig_args),
            "in": encode_tree(info.in_spec),
            "out": encode_tree(info.out_spec),
            "extra": extra,
        }
    except ValueError as error:
        raise LoweringError(f"this lowered module cannot be saved: {error}") from error
    return safetensors.torch.save(tensors, metadata={_KEY: json.dumps(header)})


def guarded(origin: str, load_it: Callable[[], Value]) -> Value:
    """The result of reading untrusted data; whatever it raises becomes a FormatError that names ``origin``."""
    try:
        return load_it()
    except FormatError as error:
        raise FormatError(f"{origin}: {error}") from error
    except Exception as error:
        raise FormatError(
            f"{origin} is not a lowered model, or is damaged ({type(error).__name__}: {error}); save it again with "
            "lower(...).save(path)"
        ) from error


def load(data: bytes) -> tuple[fx.GraphModule, dict[str, Any]]:
    """The graph module and the extra that :func:`dump` was given; raises many things on bad data (see guarded)."""
    size = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + size]).get("__metadata__", {})
    tensors = safetensors.torch.load(data)
    header = json.loads(metadata[_KEY])
    if header["version"] != VERSION:
        raise FormatError(f"the file has version {header['version']}, this srigl_fx reads version {VERSION}: update it")
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for item in header["nodes"]:
        try:
            nodes[item["name"]] = _decode_node(graph, item, nodes)
        except Exception as error:
            name = item.get("name") if isinstance(item, dict) else item
            raise FormatError(
                f"the node {name!r} is malformed ({type(error).__name__}: {error}); save it again with "
                "lower(...).save(path)"
            ) from error
    given, returned = _decode_tree(header["in"]), _decode_tree(header["out"])
    _, keywords = given
    # Code is generated with these; other keys of dicts are only compared.
    for name in (*header["arguments"], *keywords):
        _identifier(name)
    in_spec, out_spec = pytree.tree_structure(given), pytree.tree_structure(returned)
    results = nodes[header["nodes"][-1]["name"]]
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    if (
        results.op != "output"
        or sum(node.op == "output" for node in graph.nodes) != 1
        or in_spec.num_leaves != len(placeholders)
        or not isinstance(results.args[0], tuple | list)
        or out_spec.num_leaves != len(results.args[0])
    ):
        raise ValueError("inputs or outputs do not fit the graph")
    graph.set_codegen(_PyTreeCodeGen(_PyTreeInfo(list(header["arguments"]), in_spec, out_spec)))
    root = nn.Module()
    made: dict[tuple[str, bool], Tensor] = {}
    for target, entry in header["attributes"].items():
        key, parameter = str(entry["tensor"]), bool(entry["parameter"])
        if (key, parameter) not in made:
            if key not in tensors:
                raise FormatError(f"the tensor {key} of {target} is missing; save it again with lower(...).save(path)")
            tensor = tensors[key]
            _check_kind(target, entry, tensor)
            made[key, parameter] = nn.Parameter(tensor, tensor.is_floating_point()) if parameter else tensor
        _place(root, target, made[key, parameter])
    guard(graph, lambda target: _tensor(root, target))
    graph.lint()
    module = fx.GraphModule(root, graph)
    _check_condensed(module)
    return module, header["extra"]


def _described(tensor: Tensor) -> dict[str, Any]:
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}


def _check_kind(target: str, entry: dict[str, Any], tensor: Tensor) -> None:
    """Require of a tensor the type and sizes that the graph was saved with; files from before they were kept say none.

    Most operators would find out by themselves, in the middle of a call.
    """
    found = _described(tensor)
    if (wanted := {key: entry.get(key, found[key]) for key in found}) != found:
        raise FormatError(
            f"the tensor {target} is {found['dtype']} {found['shape']}, but the graph was saved with "
            f"{wanted['dtype']} {wanted['shape']}; save it again with lower(...).save(path)"
        )


def _encode_node(node: fx.Node) -> dict[str, Any]:
    if node.op in ("placeholder", "get_attr", "output"):
        target = str(node.target)
    elif node.op == "call_function":
        target = function_name(node.target)
        function_named(target)
    else:
        raise ValueError(f"a {node.op} of {node.target} has no form in a file")
    args, kwargs = [_encode(arg) for arg in node.args], {key: _encode(arg) for key, arg in node.kwargs.items()}
    return {"op": node.op, "name": node.name, "target": target, "args": args, "kwargs": kwargs}


def _decode_node(graph: fx.Graph, item: dict[str, Any], nodes: dict[str, fx.Node]) -> fx.Node:
    op, name, target = item["op"], _identifier(item["name"]), item["target"]
    if name in nodes:
        raise ValueError(f"two nodes are named {name!r}")
    if op == "call_function":
        target = function_named(target)
    elif op == "get_attr":
        if not _ATTRIBUTE.fullmatch(target):
            raise ValueError(f"{target!r} is not the name of a tensor")
    elif op in ("placeholder", "output"):
        _identifier(target)
        if op == "placeholder" and item["args"]:
            raise ValueError("a default value for an input")
    else:
        raise ValueError(f"a node of kind {op!r}")
    args = tuple(_decode(arg, nodes) for arg in item["args"])
    kwargs = {_identifier(key): _decode(arg, nodes) for key, arg in item["kwargs"].items()}
    return graph.create_node(op, target, args, kwargs, name)


def _identifier(name: Any) -> str:
    if not isinstance(name, str) or not name.isascii() or not name.isidentifier():
        raise ValueError(f"{name!r} is not an identifier")
    return name


def _encode(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, list):
        return [_encode(item) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [_encode(item) for item in value]}
    if isinstance(value, slice):
        return {"slice": [_encode(item) for item in (value.start, value.stop, value.step)]}
    _check_place(value)
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for kind in (torch.dtype, torch.layout, torch.memory_format):
        if isinstance(value, kind):
            return {kind.__name__: str(value).removeprefix("torch.")}
    raise ValueError(f"an argument of type {type(value).__name__} has no form in a file")


def _decode(value: Any, nodes: dict[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decode(item, nodes) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "node":
        return nodes[content]
    if kind in ("tuple", "slice"):
        items = [_decode(item, nodes) for item in content]
        return tuple(items) if kind == "tuple" else slice(*items)
    if kind == "device":
        return _check_place(torch.device(content))
    for known in (torch.dtype, torch.layout, torch.memory_format):
        if kind == known.__name__ and isinstance(found := getattr(torch, content, None), known):
            return _check_place(found)
    raise ValueError(f"an argument {value!r}")


def _check_place(value: Any) -> Any:
    """The value; an error if it is a device other than the CPU, or a layout other than the dense one."""
    if (isinstance(value, torch.device) and value.type != "cpu") or (
        isinstance(value, torch.layout) and value is not torch.strided
    ):
        raise ValueError(f"{value}: a lowered graph has dense tensors on the CPU only")
    return value


def encode_tree(spec: "pytree.TreeSpec") -> Any:
    """A tree of inputs or outputs: 0 is a leaf; other registered types become the plain container they resemble."""
    if spec.is_leaf():
        return 0
    children = [encode_tree(child) for child in spec.children()]
    if isinstance(spec.type, type) and issubclass(spec.type, dict):
        keys = list(spec.context[1] if isinstance(spec.context, tuple) else spec.context)
        if len(keys) == len(children) and all(isinstance(key, str) for key in keys):
            return {"dict": dict(zip(keys, children, strict=True))}
    elif (isinstance(spec.type, type) and issubclass(spec.type, tuple)) or spec.type.__name__ == "namedtuple":
        return {"tuple": children}
    elif spec.type is list:
        return children
    if isinstance(spec.type, type) and not issubclass(spec.type, dict | deque):
        steps = trees.steps_of(spec, len(children))
        numbered = list(steps) == [str(number) for number in range(len(children))]
        return children if numbered else {"dict": dict(zip(steps, children, strict=True))}
    raise ValueError(
        f"inputs or outputs of type {spec.type.__name__} have no form in a file; use tuples, lists or dicts"
    )


def _decode_tree(tree: Any) -> Any:
    if isinstance(tree, list):
        return [_decode_tree(child) for child in tree]
    if isinstance(tree, dict):
        ((kind, children),) = tree.items()
        if kind == "tuple":
            return tuple(_decode_tree(child) for child in children)
        if kind == "dict":
            return {key: _decode_tree(child) for key, child in children.items()}
    if tree == 0:
        return 0
    raise ValueError(f"a container {tree!r}")


def _tensor(module: nn.Module, target: str) -> Tensor:
    owner, _, attr = target.rpartition(".")
    tensor = getattr(module.get_submodule(owner), attr)
    if not isinstance(tensor, Tensor):
        raise LoweringError(f"this lowered module cannot be saved: {target} is a {type(tensor).__name__}")
    return tensor


def _place(root: nn.Module, target: str, tensor: Tensor) -> None:
    if not _ATTRIBUTE.fullmatch(target):
        raise ValueError(f"{target!r} is not the name of a tensor")
    *path, attr = target.split(".")
    owner = root
    for name in path:
        if name not in owner._modules:
            owner.add_module(name, nn.Module())
        child = owner._modules[name]
        assert child is not None
        owner = child
    if isinstance(tensor, nn.Parameter):
        owner.register_parameter(attr, tensor)
    else:
        owner.register_buffer(attr, tensor)


def condensed_weights(
    module: fx.GraphModule, nodes: Iterable[fx.Node] | None = None
) -> Iterator[tuple[fx.Node, CondensedWeight]]:
    """Each condensed node of a graph (or among ``nodes``) whose operands are tensors of the module, with its weight."""
    among: Iterable[Any] = module.graph.nodes if nodes is None else nodes
    for node in among:
        if node.op != "call_function" or function_name(node.target).split(".")[0] != "srigl_fx":
            continue
        operands = node.args[1:5]
        if not all(isinstance(operand, fx.Node) and operand.op == "get_attr" for operand in operands):
            continue
        scales = arguments(node)["scales"]
        if scales is not None and not (isinstance(scales, fx.Node) and scales.op == "get_attr"):
            continue
        values, indices, active, bias, *rest = (
            _array(_tensor(module, str(operand.target)).detach())
            for operand in (*operands, *([] if scales is None else [scales]))
        )
        in_features = node.args[5] if isinstance(node.args[5], int) else math.prod(node.args[5][1:])
        yield (
            node,
            CondensedWeight(
                values=values,
                indices=indices,
                active=active,
                bias=bias,
                out_features=int(bias.shape[0]) if bias.ndim else 0,
                in_features=int(in_features),
                scales=rest[0] if rest else None,
            ),
        )


def _array(tensor: Tensor) -> "np.ndarray[Any, Any]":
    """A tensor as an array: NumPy has no bfloat16 of its own, and torch gives none away."""
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(VALUE_DTYPES["bfloat16"])
    return tensor.numpy()


def _check_condensed(module: fx.GraphModule) -> None:
    for node in condensed_nodes(module.graph):
        try:
            given = arguments(node)
            if (activation := given["activation"]) not in NAMES:
                raise ValueError(f"a condensed operator with the activation {activation!r}")
            for side in ("x", "y"):
                scale, offset = given[f"{side}_scale"], given[f"{side}_offset"]
                if scale is not None and (problem := given_problem(scale, offset)):
                    raise ValueError(f"its {side}_{problem}")
            weight = next(iter(condensed_weights(module, [node])), None)
            problem = "" if weight is None else weight[1].problem()
        except Exception as error:
            raise FormatError(
                f"the condensed layer {node.name} is malformed ({type(error).__name__}: {error}); save it again with "
                "lower(...).save(path)"
            ) from error
        if problem:
            name = str(arguments(node)["values"].target).removesuffix("_values")
            raise FormatError(
                f"the condensed weight {name} is malformed: {problem}; save it again with lower(...).save(path)"
            )
