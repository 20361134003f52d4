"""``condense_onnx``: from an ONNX file whose weights hold zeros to one whose layers are condensed.

Owns the verb: the order of its steps, what is decided for each layer, and the file on disk. It must not know how a
layer is found or rewritten, nor models of PyTorch.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from numpy.typing import NDArray

from srigl_fx.errors import ExportError, FormatError, SriglError
from srigl_fx.files import place_of
from srigl_fx.onnx_condensing.byte_operators import BYTE_OPERATORS
from srigl_fx.onnx_condensing.decide import condense_all
from srigl_fx.onnx_condensing.report import CondensingReport
from srigl_fx.onnx_condensing.trial import ROUNDED_TOLERANCE, TOLERANCE, check
from srigl_fx.onnx_export.file import all_nodes, inspect_file
from srigl_fx.onnx_export.reading import open_model
from srigl_fx.onnx_export.weights import ExternalData, check_external_data, require_place, take_out, writing
from srigl_fx.runtime.ort import abi
from srigl_fx.runtime.ort.contents import MARK
from srigl_fx.runtime.ort.fallback import OPSET_VERSION

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

_ROUNDING = frozenset({"QuantizeLinear", "DynamicQuantizeLinear", "QGemm"})
_SAME_SHAPE = frozenset({"Binarizer", "Imputer", "Normalizer", "Scaler"})  # of ai.onnx.ml
_MOST_NODES = 1_000_000  # once functions are in the place of their calls
_LEAST_IR_VERSION = 8  # of files with functions


def condense_onnx(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    min_sparsity: float = 0.5,
    min_speedup: float | Literal["auto"] = "auto",
    fallback: bool = True,
    verify: bool = True,
    example_inputs: Mapping[str, NDArray[Any]] | None = None,
    sizes: Mapping[str, int] | None = None,
    external_data: ExternalData = "auto",
) -> CondensingReport:
    """Condense the layers of an ONNX file whose weights hold enough zeros, whoever made it.

    ``MatMul``, ``Gemm`` and ``Conv`` with constant weights become condensed nodes, as
    :func:`srigl_fx.export_onnx` writes them, with the bias, the addition and the activation that follow. Batch
    normalisation is folded into what it follows, and weights that are transposed or dequantised are seen through. Where
    samples and weights are both rounded to eight bits (``QuantizeLinear`` and ``DequantizeLinear``, or operators that
    multiply bytes), the nodes are those of eight bits, with the file's own numbers and scales; where these cannot be
    carried exactly, they are of float32 and the report says why. ``LSTM`` and ``GRU`` become condensed products around
    a ``Scan``, and a ``MatMul`` with a stack of weights several, where that is expected to gain. Layers inside ``If``,
    ``Loop``, ``Scan`` and functions are condensed, too. Files of older opsets are brought to opset 18 first, by
    ``onnx.version_converter``.

    Args:
        source: The file, which may keep its tensors beside it.
        path: The file to write; it appears whole or not at all.
        min_sparsity: A weight counts as sparse if at least this fraction of it is zero, in (0, 1).
        min_speedup: "auto" leaves dense what the cost model expects to lose in ONNX Runtime at batch 1 or 16, as
            :func:`srigl_fx.export_onnx` does; a number is the ratio that is expected at least, and 0 condenses all.
        fallback: Put the functions for a stock ONNX Runtime into the file.
        verify: Compare with what ONNX Runtime makes of the source, with and without the operator library.
        example_inputs: Arrays by the names of the model's inputs to compare with; by default random ones, of small
            sizes where they are free, ones for integers.
        sizes: What these sizes are, by the names that the source has for them, where it does not take small ones.
        external_data: Whether large tensors go to a file beside it, called like it, by what it holds, and ``.data``,
            which ONNX Runtime maps into memory; "auto" is where one file cannot hold all (2 GiB). One that the file
            had before goes with it.

    Returns:
        A report; ``str()`` is a table.

    Raises:
        FormatError: The source cannot be read, or is no ONNX file.
        ExportError: Nothing in it can be condensed (the message says why), it takes or returns maps, an argument is out
            of range, ONNX cannot bring it to opset 18, the outputs differ, or a file that the source keeps tensors in
            would be written over (in its own place a file may be condensed).

    An existing file at ``path`` is left alone in each case.

    Example:
        >>> condense_onnx("missing.onnx", "condensed.onnx")
        Traceback (most recent call last):
        srigl_fx.errors.FormatError: cannot read missing.onnx: No such file or directory
    """
    target = Path(path)
    if isinstance(min_sparsity, bool) or not isinstance(min_sparsity, int | float) or not 0 < min_sparsity < 1:
        raise ExportError(f"min_sparsity must lie between 0 and 1, such as 0.5, got {min_sparsity!r}")
    if min_speedup != "auto" and (not isinstance(min_speedup, int | float) or not min_speedup >= 0):
        raise ExportError(f'min_speedup must be "auto" or a number of at least 0, not {min_speedup!r}')
    if bad := {name: size for name, size in (sizes or {}).items() if type(size) is not int or size < 1}:
        raise ExportError(f"sizes are numbers of at least 1 by their names, got {bad}")
    if sizes and (example_inputs is not None or not verify):
        raise ExportError("sizes are those of random inputs: leave them out with example_inputs, and with verify=False")
    check_external_data(external_data)
    files: set[Path] = set()
    model = _prepared(Path(source), files)
    require_place(target)
    least = 1.0 if min_speedup == "auto" else float(min_speedup)
    has_bytes = any(node.op_type in BYTE_OPERATORS for node in model.graph.all_nodes())
    try:
        rows = condense_all(model, min_sparsity, least)
    except SriglError:
        raise
    except Exception as error:  # of attributes and sizes that do not go together, any type
        raise FormatError(f"the graph of {source} cannot be followed: {type(error).__name__}: {error}") from error
    if not any(row.condensed for row in rows):
        reasons = "; ".join(f"{row.name}: {row.reason}" for row in rows[:8])
        more = f"; and {len(rows) - 8} more" if len(rows) > 8 else ""
        if any(row.reason.startswith("estimated") for row in rows):
            more += "; min_speedup=0 condenses what is expected to lose, too"
        done = sum(node.domain == abi.DOMAIN for node in model.graph.all_nodes())
        raise ExportError(
            f"nothing {'more ' if done else ''}in {source} can be condensed: "
            + (f"{done} of its nodes are condensed already; " if done else "")
            + (reasons + more or f"it has no {'other ' if done else ''}MatMul, Gemm or Conv with a constant weight")
        )
    allowed = ROUNDED_TOLERANCE if _is_rounded_again(model.graph) else TOLERANCE
    proto, held = _finished(model, fallback=fallback)
    options: dict[str, Any] = {"fallback": fallback, "allowed": allowed, "has_bytes": has_bytes, "sizes": sizes}
    # In its own place, the source is to be lost.
    spared = () if place_of(Path(source)) == place_of(target) else files
    with writing(target, proto, held, external_data, spared) as part:
        del proto, held, model  # what follows has the memory
        errors = check(Path(source), part, example_inputs, **options) if verify else {}
    return CondensingReport(
        path=target,
        bytes=inspect_file(target).file_bytes,
        rows=tuple(rows),
        library_error=errors.get("library"),
        fallback_error=errors.get("fallback"),
        allowed_error=allowed,
    )


@contextlib.contextmanager
def _followed(source: Path) -> Iterator[None]:
    """Whatever goes wrong with a graph that is none is an error of its file."""
    try:
        yield
    except Exception as error:
        first: BaseException = error
        while first.__cause__ is not None:  # what reads a graph says where it was, and not what was wrong
            first = first.__cause__
        problem = (str(first).splitlines() or [type(first).__name__])[0]
        raise FormatError(f"the graph of {source} cannot be followed: {problem}") from error


def _prepared(source: Path, files: set[Path]) -> "ir.Model":
    """The model at opset 18 or later, with batch normalisation folded and the shapes of its values inferred.

    The files beside it are put into ``files``.
    """
    import onnx_ir as ir
    from onnx_ir.passes import common
    from onnxscript.rewriter import rewrite
    from onnxscript.rewriter.rules import common as rules

    proto = open_model(source, files)
    for versions in (proto.opset_import, *(function.opset_import for function in proto.functions)):
        for one in versions:
            one.domain = "" if one.domain == "ai.onnx" else one.domain  # two names of one domain
    opset = next((one.version for one in proto.opset_import if not one.domain), 0)
    if not proto.HasField("graph") or not opset:
        raise FormatError(f"{source} is no ONNX file: it has no graph of ONNX's operators")
    _refuse_maps(proto, source)
    if opset < OPSET_VERSION:
        proto = _converted(proto, source, opset)
    with _followed(source):
        model = ir.from_proto(proto)
        # Files before version 4 of the format list their weights among the inputs.
        common.RemoveInitializersFromInputsPass()(model)
        _inline(model)
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        rewrite(
            model,
            [
                rules.dropout_inference_rule,
                rules.fuse_batchnorm_into_conv_rule,
                rules.fuse_batchnorm_into_gemm_rule,
            ],
        )
        common.IdentityEliminationPass()(model)
        _infer_shapes(model)
    return model


def _refuse_maps(proto: "onnx.ModelProto", source: Path) -> None:
    """Refuse a model that takes or returns maps, as those of classifiers do by default."""
    for entry in (*proto.graph.input, *proto.graph.output):
        kind = entry.type
        while kind.WhichOneof("value") == "sequence_type":
            kind = kind.sequence_type.elem_type
        if kind.WhichOneof("value") == "map_type":
            raise ExportError(
                f"{entry.name!r} of {source} is a map, which cannot be carried on: have the file written with tensors "
                "alone (skl2onnx: options={'zipmap': False})"
            )


def _infer_shapes(model: "ir.Model") -> None:
    """Infer the shapes of values, those behind operators of ai.onnx.ml, too, of which ONNX infers none."""
    from onnx_ir.passes import common

    found = True
    while found:
        common.ShapeInferencePass()(model)
        found = False
        for node in model.graph.all_nodes():
            if node.domain != "ai.onnx.ml" or node.op_type not in _SAME_SHAPE or not node.inputs:
                continue
            given, made = node.inputs[0], node.outputs[0]
            if made.shape is None and given is not None and given.shape is not None:
                made.shape = given.shape.copy()
                found = True


def _converted(proto: "onnx.ModelProto", source: Path, opset: int) -> "onnx.ModelProto":
    """The model at the opset of the operators."""
    import onnx
    import onnx_ir as ir

    if proto.functions:  # which the converter drops
        with _followed(source):
            model = ir.from_proto(proto)
            _inline(model)
            proto = ir.to_proto(model)
    try:
        return onnx.version_converter.convert_version(proto, OPSET_VERSION)
    except Exception as error:  # RuntimeErrors and others, by operator
        problem = (str(error).splitlines() or [type(error).__name__])[0]
        raise ExportError(
            f"onnx.version_converter cannot bring {source} from opset {opset} to {OPSET_VERSION}: {problem}; "
            "export the model anew at that opset"
        ) from error


def _inline(model: "ir.Model") -> None:
    """Put functions of the model's own in the place of their calls; the fallback of what is condensed stays."""
    from onnx_ir.passes import common

    sizes: dict[Any, int] = {}

    def size(graph: "ir.Graph | ir.Function") -> int:
        total = 0
        for node in graph.all_nodes():
            called = model.functions.get(node.op_identifier())
            if called is not None and node.op_identifier() not in sizes:
                sizes[node.op_identifier()] = _MOST_NODES + 1  # while it is counted: one that calls itself has no size
                sizes[node.op_identifier()] = size(called)
            total += sizes.get(node.op_identifier(), 1)
        return total

    if size(model.graph) > _MOST_NODES:
        raise FormatError(f"its functions call each other for more than {_MOST_NODES} nodes in all, or themselves")
    common.InlinePass(criteria=lambda function: function.domain != abi.DOMAIN)(model)


def _is_rounded_again(graph: "ir.Graph", depending: set[int] | None = None) -> bool:
    """Whether something that depends on a condensed node is rounded: then a step more or less is no mistake."""
    depending = set() if depending is None else depending
    for node in graph:  # in topological order
        inner = [attribute.as_graph() for attribute in node.attributes.values() if attribute.type.name == "GRAPH"]
        depends = any(id(value) in depending for value in node.inputs)
        if depends and (node.op_type in _ROUNDING or node.op_type.startswith("QLinear")):
            return True
        # What a loop carries comes back to its start.
        depends = depends or any(_is_condensed(one) for one in inner)
        for one in inner:
            if depends:
                depending.update(id(value) for value in one.inputs)
            if _is_rounded_again(one, depending):
                return True
            depends = depends or any(id(value) in depending for value in one.outputs)
        if depends or node.domain == abi.DOMAIN:
            depending.update(id(value) for value in node.outputs)
    return False


def _is_condensed(graph: "ir.Graph") -> bool:
    return any(node.domain == abi.DOMAIN for node in graph.all_nodes())


def _finished(model: "ir.Model", *, fallback: bool) -> "tuple[onnx.ModelProto, dict[str, Any]]":
    """The model as a file holds it: without what nobody reads, with the fallback; and its large tensors."""
    import onnx_ir as ir
    from onnx_ir.passes import common

    from srigl_fx.onnx_export.model import functions_for

    common.RemoveUnusedNodesPass()(model)
    for graph in model.graphs():  # the pass leaves constants inside nodes alone
        for name in [name for name, value in graph.initializers.items() if _is_unused(value)]:
            del graph.initializers[name]
    model.opset_imports[abi.DOMAIN] = abi.DOMAIN_VERSION
    model.ir_version = max(model.ir_version, _LEAST_IR_VERSION)
    held = take_out(model)
    proto = ir.to_proto(model)
    proto.metadata_props.add(key=MARK[0], value=MARK[1])
    if fallback:
        functions = functions_for(proto)
        for function in functions:
            # A function whose operators are of another version than the model's is refused by ONNX Runtime.
            function.opset_import[0].version = model.opset_imports[""]
        proto.functions.extend(functions)
    assert any(node.domain == abi.DOMAIN for node in all_nodes(proto.graph))
    return proto, held


def _is_unused(value: "ir.Value") -> bool:
    return not value.uses() and not value.is_graph_output() and not value.is_graph_input()
