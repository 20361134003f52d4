"""From a lowered graph to an ONNX model in memory.

Owns the translation of the condensed operators to nodes of domain ``srigl_fx``, the options of ``torch.onnx``, what
must not stay in a model, and which fallback functions it needs. It must not know files on disk, sessions or masks.
"""

import contextlib
import functools
import io
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.export.graph_signature import InputKind, TensorArgument
from torch.utils import _pytree as pytree

from srigl_fx.errors import ExportError
from srigl_fx.onnx_export.file import all_graphs, all_nodes
from srigl_fx.onnx_export.limits import limit_sizes
from srigl_fx.onnx_export.names import name_sizes, name_values, output_names
from srigl_fx.onnx_export.places import place_in, places
from srigl_fx.onnx_export.rewrites import rewrite
from srigl_fx.onnx_export.state import explicit, of_leaves
from srigl_fx.onnx_export.weights import take_out
from srigl_fx.passes.capture import EXPORT_LOCK
from srigl_fx.passes.condensed_nodes import AFFINE, ARRANGE, CONCAT, CONV, LINEAR, PAD, POOL, ROUND
from srigl_fx.passes.feature_major import settle_layouts
from srigl_fx.passes.program import arguments
from srigl_fx.passes.recurrences import whole_recurrences
from srigl_fx.passes.sizes import Sizes
from srigl_fx.runtime.ort import abi, stream
from srigl_fx.runtime.ort.contents import MARK
from srigl_fx.runtime.ort.fallback import IR_VERSION, OPSET_VERSION, SHARED, attributes_of, fallback_functions
from srigl_fx.runtime.value_types import VALUE_TYPES

if TYPE_CHECKING:
    import onnx

_LINEAR, _CONV, _TRANSPOSED = abi.FLOAT_BASES
_SINGLE_NUMBERS = ("in_features", "flat_size", "group", "x_offset", "x_bytes", "y_offset", "arranged", "back")


def build_model(
    module: fx.GraphModule,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    sizes: Sizes,
    origins: dict[str, str] | None = None,
    held: dict[str, Any] | None = None,
) -> "onnx.ModelProto":
    """Translate a lowered graph, for opset 18 and every ONNX Runtime from 1.17 on; without the fallback functions.

    A buffer ``name`` that the graph writes becomes the input ``state.name`` and the output ``next_state.name``, after
    all others; its value is kept in the model's metadata.

    Args:
        module: The lowered graph.
        args: Example arguments.
        kwargs: Example keyword arguments.
        sizes: Those of the leaves of (args, kwargs) that are free.
        origins: Where given, :func:`~srigl_fx.onnx_places.places` of the model are put there, which it does not keep.
        held: Where given, large tensors are put there, and the model has their sizes alone
            (:func:`srigl_fx.onnx_export.weights.take_out`).

    Raises:
        ExportError: torch.export or torch.onnx cannot translate the graph, or makes something of it that is no ONNX;
            the message names the operator and its module.
    """
    _refuse_projections(module)
    outputs = output_names(module)
    if not outputs:
        raise ExportError("the model returns no tensor: a file of ONNX needs one; None and numbers are no outputs")
    stateless = explicit(*of_leaves(module, args, kwargs))
    args, kwargs = stateless.args, stateless.kwargs
    leaves, spec = pytree.tree_flatten((args, kwargs))
    free = [*sizes.axes, *({} for _ in leaves[len(sizes.axes) :])]
    shapes: Any = None
    if any(free):
        # Export takes a size of 1 for a constant.
        leaves = sizes.resized(leaves, {name: max(2, size) for name, size in sizes.example(leaves).items()})
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        shapes = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
        for leaf, axes in zip(leaves, free, strict=True):
            if axes:
                shapes[leaf] = dict.fromkeys(axes, torch.export.Dim.DYNAMIC)
    try:
        with EXPORT_LOCK, _quiet(), whole_recurrences(), torch.no_grad():
            exported = torch.export.export(rewrite(stateless.module), args, kwargs, dynamic_shapes=shapes)
            _settle_layouts(exported.graph)
            inputs = [
                one.arg.name
                for one in exported.graph_signature.input_specs
                if one.kind is InputKind.USER_INPUT and isinstance(one.arg, TensorArgument)
            ]
            program = torch.onnx.export(
                exported,
                dynamo=True,
                verbose=False,
                opset_version=OPSET_VERSION,
                custom_translation_table=_TRANSLATIONS,
            )
            assert program is not None
            if held is not None:
                held |= take_out(program.model)
            model: onnx.ModelProto = program.model_proto
    except Exception as error:  # the exporters raise nearly every type
        raise ExportError(
            f"torch.onnx cannot translate the model{_where(module, error)}: {_innermost(error)}; replace that by "
            "something that ONNX has, or serve the lowered model with PyTorch (lower(...).save(path))"
        ) from error
    model.ir_version = min(model.ir_version, IR_VERSION)
    _check_types(model)
    if origins is not None:
        origins.update(places(model))
    _strip(model)
    _forget_logical_shapes(model.graph)
    _name(model, inputs, outputs, list(stateless.state))
    named = [one for leaf, one in zip(leaves, free, strict=True) if isinstance(leaf, Tensor)]
    name_sizes(model, named)
    limit_sizes(model, named, sizes.limits, sizes.conditions)
    if stateless.state:
        _keep_state(model, stateless.state)
    if any(node.domain == abi.DOMAIN for node in all_nodes(model.graph)):
        model.metadata_props.add(key=MARK[0], value=MARK[1])
    return model


def _name(model: "onnx.ModelProto", inputs: list[str], outputs: list[str], state: list[str]) -> None:
    """Give inputs and outputs their names; those of the state come last."""
    count = len(inputs) - len(state)
    name_values(
        model,
        [*inputs[:count], *(stream.INPUT + name for name in state)],
        [*outputs, *(stream.OUTPUT + name for name in state)],
    )


def _keep_state(model: "onnx.ModelProto", state: Mapping[str, Tensor]) -> None:
    for name, value in state.items():
        if value.dtype in (torch.bfloat16, torch.complex64, torch.complex128):
            raise ExportError(f"the buffer {name} is {value.dtype}, which no file keeps as state: make it float32")
    entry = model.metadata_props.add()
    entry.key = stream.KEY
    entry.value = stream.encode({name: value.numpy() for name, value in state.items()})


def functions_for(model: "onnx.ModelProto", *, exact: bool = True) -> "list[onnx.FunctionProto]":
    """The fallback functions of the operators that a model uses, in the order of their names.

    Names in the operators' domain that are of no operator are those of functions that a tool has renamed.

    Args:
        model: The model.
        exact: As for :func:`~srigl_fx.runtime.ort.fallback.fallback_functions`.

    Example:
        >>> import onnx.parser
        >>> text = '<ir_version: 9, opset_import: ["srigl_fx": 1]> g (float[2] x) => (float[2] y) {'
        >>> text += "y = srigl_fx.CondensedLinearRelu <x_perm = [0], y_perm = [0]> (x, x, x, x, x) }"
        >>> [function.name for function in functions_for(onnx.parser.parse_model(text))]
        ['CondensedLinearRelu']
    """
    used: dict[str, set[str]] = {}
    own = {tensor.name for graph in all_graphs(model.graph) for tensor in graph.initializer if len(tensor.dims) == 1}
    for node in all_nodes(model.graph):
        if node.domain == abi.DOMAIN and node.op_type in abi.OPERATORS:
            asked = {item.name for item in node.attribute if item.name.endswith("_perm") and _moves(item.ints)}
            asked |= {item.name for item in node.attribute if item.name == "x_scale" and item.f}
            asked |= {item.name for item in node.attribute if item.name == "x_bytes" and item.i}
            if not own.issuperset(node.input[_ACTIVE : _ACTIVE + 1]):  # rows share indices, for all one knows
                asked.add(SHARED)
            used.setdefault(node.op_type, set()).update(asked)
    return fallback_functions(sorted(used), used, exact=exact)


_ACTIVE = abi.INPUTS.index("active")


def _moves(permutation: Sequence[int]) -> bool:
    return list(permutation) != sorted(permutation)


def _settle_layouts(graph: fx.Graph) -> None:
    """Keep the layouts between layers only where all of a tensor's readers agree: a graph may have been edited."""
    linears = graph.find_nodes(op="call_function", target=LINEAR)
    settle_layouts(graph, [node for node in linears if arguments(node)["y_feature_major"]])


def _forget_logical_shapes(graph: "onnx.GraphProto") -> None:
    """Drop the shapes recorded for what is stored permuted: the exporter took them from torch, which has strides."""
    permuted: set[str] = set()
    for node in graph.node:  # in topological order
        perms = {item.name: item.ints for item in node.attribute} if node.domain == abi.DOMAIN else {}
        if _moves(perms.get("y_perm", ())) or (node.domain != abi.DOMAIN and permuted.intersection(node.input)):
            permuted.update(node.output)
    kept = [value for value in graph.value_info if value.name not in permuted]
    del graph.value_info[:]
    graph.value_info.extend(kept)


def _refuse_projections(module: fx.GraphModule) -> None:
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.lstm.input):
        given = arguments(node)
        weights = len(given["params"]) // (given["num_layers"] * (1 + given["bidirectional"]))
        if weights == (5 if given["has_biases"] else 3):  # without one there are 4 or 2
            stack = list(node.meta.get("nn_module_stack", {}).values())
            name = f" {stack[-1][0]!r}" if stack and stack[-1][0] else ""
            raise ExportError(
                f"the LSTM{name} projects its outputs (proj_size), and ONNX's LSTM has no projections: build it with "
                "proj_size=0, or serve the lowered model with PyTorch (lower(...).save(path))"
            )


def _check_types(model: "onnx.ModelProto") -> None:
    """Refuse a model with a node that is given what it does not take: no runtime would open the file.

    The nodes still have the exporter's notes, which say what module each is of.
    """
    import onnx
    from onnx.shape_inference import InferenceError, infer_shapes

    if model.ByteSize() > onnx.checker.MAXIMUM_PROTOBUF:
        return
    try:
        infer_shapes(model, check_type=True)
    except InferenceError as error:
        raise ExportError(
            f"torch.onnx makes something of {place_in(str(error), places(model)) or 'an operator'} that is "
            f"no ONNX: {_innermost(error)}; replace it, or serve the lowered model with PyTorch (lower(...).save(path))"
        ) from error


def _strip(model: "onnx.ModelProto") -> None:
    """Remove the exporter's notes, which hold stack traces with the paths of source files.

    The shapes that are recorded for initialisers go, too: they say nothing that the initialisers do not, and a
    quantiser that replaces a weight by its transpose leaves the recorded shape behind, which then contradicts it.
    """
    graph = model.graph
    constants = {tensor.name for tensor in graph.initializer}
    values = [value for value in graph.value_info if value.name not in constants]
    del graph.value_info[:]
    graph.value_info.extend(values)
    for item in (graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        item.ClearField("metadata_props")
        item.ClearField("doc_string")


@functools.cache
def _operator(base: str, residual: bool, activation: str) -> Any:
    """The operator as onnxscript calls it."""
    import onnx.defs
    from onnxscript.values import Op, Opset

    schema = onnx.defs.OpSchema
    is_layer = base not in abi.NO_LAYERS
    name = abi.operator_name(base, residual, activation) if is_layer else base
    types = {"values": "V", "indices": "I", "active": "tensor(int32)"}
    constraints = [
        ("V", [row.onnx_type for row in VALUE_TYPES if row.scaled == abi.has_scales(base)], ""),
        ("I", ["tensor(uint16)", "tensor(int32)"], ""),
    ]
    if abi.has_scales(base):
        types["x"] = "X"
        constraints.append(("X", ["tensor(float)", "tensor(uint8)"], ""))
    inputs = abi.inputs_of(base, residual) if is_layer else abi.NO_LAYERS[base]
    stored = "tensor(uint8)" if base.endswith(abi.BYTES) or base == abi.ROUND else "tensor(float)"
    return Op(
        Opset(abi.DOMAIN, abi.DOMAIN_VERSION),
        name,
        op_schema=schema(
            name,
            abi.DOMAIN,
            abi.DOMAIN_VERSION,
            inputs=[schema.FormalParameter(item, types.get(item, "tensor(float)")) for item in inputs],
            outputs=[schema.FormalParameter("y", stored)],
            type_constraints=constraints if is_layer else [],
            attributes=[schema.Attribute(item, _attribute_type(item, schema), "") for item in attributes_of(base)],
        ),
    )


def _attribute_type(name: str, schema: Any) -> Any:
    if name in ("x_scale", "y_scale"):
        return schema.AttrType.FLOAT
    return schema.AttrType.INT if name in _SINGLE_NUMBERS else schema.AttrType.INTS


def _given(
    x: Any, scales: Any, x_scale: float | None, x_offset: int, y_scale: float | None, y_offset: int
) -> dict[str, Any]:
    """The attributes that say how samples and outputs are rounded, of operators with values of eight bits."""
    if scales is None:
        return {}
    import onnx

    is_bytes = x.dtype == onnx.TensorProto.UINT8
    given = {"x_scale": float(x_scale or 0), "x_offset": int(x_offset), "x_bytes": int(is_bytes)}
    return given if y_scale is None else given | {"y_scale": float(y_scale), "y_offset": int(y_offset)}


def _of(base: str, scales: Any, y_scale: float | None) -> str:
    if scales is None:
        return base
    return base + abi.EIGHT_BITS + ("" if y_scale is None else abi.BYTES)


def _translate_round(x: Any, scale: float, offset: int) -> Any:
    return _operator(abi.ROUND, False, "none")(x, x_scale=float(scale), x_offset=int(offset))


def _translate_arrange(x: Any, back: bool = False) -> Any:
    return _operator(abi.ARRANGE, False, "none")(x, back=int(back))


def _translate_pool(
    x: Any,
    window: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    mean: bool = False,
) -> Any:
    given = {"kernel_shape": list(window), "strides": list(stride), "pads": [*padding, *padding]}
    if mean:
        return _operator(abi.MEAN_POOL, False, "none")(x, **given)
    return _operator(abi.MAX_POOL, False, "none")(x, dilations=list(dilation), **given)


def _translate_pad(x: Any, before: Sequence[int], after: Sequence[int], value: float = 0.0) -> Any:
    return _operator(abi.PAD, False, "none")(x, pads=[0, 0, *before, 0, 0, *after], value=float(value))


def _translate_affine(x: Any, scale: Any, shift: Any) -> Any:
    return _operator(abi.AFFINE, False, "none")(x, scale, shift)


def _translate_concat(x: Any, other: Any) -> Any:
    return _operator(abi.CONCAT, False, "none")(x, other)


def _translate_linear(
    x: Any,
    values: Any,
    indices: Any,
    active: Any,
    bias: Any,
    in_features: int,
    residual: Any = None,
    activation: str = "none",
    x_feature_major: bool = False,
    y_feature_major: bool = False,
    scales: Any = None,
    x_scale: float | None = None,
    x_offset: int = 0,
    y_scale: float | None = None,
    y_offset: int = 0,
) -> Any:
    n, rank = int(bias.shape[0]), len(x.shape)
    rows = list(range(rank))
    operator = _operator(_of(_LINEAR, scales, y_scale), residual is not None, activation)
    return operator(
        *(x, values, indices, active, bias, *(given for given in (scales, residual) if given is not None)),
        in_features=in_features,
        weight_shape=[n, in_features],
        flat_size=n * in_features,
        x_perm=[*rows[1:], 0] if x_feature_major else rows,
        y_perm=[rank - 1, *rows[:-1]] if y_feature_major else rows,
        **_given(x, scales, x_scale, x_offset, y_scale, y_offset),
    )


def _translate_conv(
    x: Any,
    values: Any,
    indices: Any,
    active: Any,
    bias: Any,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    residual: Any = None,
    activation: str = "none",
    transposed: bool = False,
    output_padding: Sequence[int] | None = None,
    scales: Any = None,
    x_scale: float | None = None,
    x_offset: int = 0,
    y_scale: float | None = None,
    y_offset: int = 0,
    arranged: bool = False,
) -> Any:
    base = _of(_TRANSPOSED if transposed else _CONV, scales, y_scale)
    operator = _operator(base, residual is not None, activation)
    extra: dict[str, Any] = {"output_padding": list(output_padding or ()) or [0] * len(stride)} if transposed else {}
    if arranged:  # a file without says what files said before
        extra = {"arranged": 1}
    return operator(
        *(x, values, indices, active, bias, *(given for given in (scales, residual) if given is not None)),
        in_features=math.prod(weight_shape[1:]),
        weight_shape=list(weight_shape),
        flat_size=math.prod(weight_shape),
        strides=list(stride),
        pads=[*padding, *padding],
        dilations=list(dilation),
        group=groups,
        **extra,
        **_given(x, scales, x_scale, x_offset, y_scale, y_offset),
    )


# How torch.onnx writes the operators of torch.
_TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    LINEAR: _translate_linear,
    CONV: _translate_conv,
    ROUND: _translate_round,
    ARRANGE: _translate_arrange,
    POOL: _translate_pool,
    PAD: _translate_pad,
    AFFINE: _translate_affine,
    CONCAT: _translate_concat,
}


def _where(module: fx.GraphModule, error: BaseException) -> str:
    """The sub-module that holds the operator without translation, where the error names the operator."""
    if not (found := re.search(r"op='([\w.]+)', overload='(\w+)'", str(_root(error)))):
        return ""
    # The exporter takes some apart first: aten.linalg_svd is then aten._linalg_svd.
    whole, taken_apart = ".".join(found.groups()), found[1].replace("._", ".") + "."
    nodes = [node for node in module.graph.nodes if node.op == "call_function"]
    exact = [node for node in nodes if str(node.target) == whole]
    for node in exact or [node for node in nodes if str(node.target).startswith(taken_apart)]:
        stack = list(node.meta.get("nn_module_stack", {}).values())
        return f" (in {stack[-1][0]})" if stack and stack[-1][0] else ""
    return ""


def _innermost(error: BaseException) -> str:
    """What the exception that started it says first."""
    error = _root(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    what = lines[0]
    if what.endswith(":"):  # a list follows, and the first of its lines that expects something says what is wrong
        what = " ".join([what, *[line for line in lines[1:] if "xpected" in line][:1]])
    return f"{type(error).__name__}: {what}"


def _root(error: BaseException) -> BaseException:
    """The exception that started it: the exporter wraps it several times."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters from printing: what matters is in the error or the report."""
    loggers = [logging.getLogger(name) for name in ("torch", "torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
