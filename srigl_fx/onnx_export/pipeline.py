"""``export_onnx``: one ONNX file that runs with the operator library, and on a stock ONNX Runtime without it.

Owns the verb: the order of its steps, and the file on disk. It must not know how a model is lowered or translated, how
a file is verified, nor how the library works.
"""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from srigl_fx.comparison import Comparison
from srigl_fx.compatibility import noted
from srigl_fx.errors import ExportError
from srigl_fx.lowering.calibration_inputs import Calibration
from srigl_fx.lowering.inputs import arranged, sizes_of
from srigl_fx.lowering.lowered import LoweredModule
from srigl_fx.lowering.pipeline import lower
from srigl_fx.lowering.regions import LoweredRegions
from srigl_fx.lowering.tables import check_table_dtype, with_rounded_tables
from srigl_fx.lowering.value_dtypes import ValueDtypes
from srigl_fx.onnx_export import recipes
from srigl_fx.onnx_export.file import inspect_file
from srigl_fx.onnx_export.model import build_model, functions_for
from srigl_fx.onnx_export.names import shapes_of
from srigl_fx.onnx_export.report import ExportReport
from srigl_fx.onnx_export.triton import requested, triton_model
from srigl_fx.onnx_export.verification import check_file
from srigl_fx.onnx_export.weights import ExternalData, check_external_data, require_place, writing
from srigl_fx.passes.asked_sizes import DynamicShapes
from srigl_fx.passes.example_inputs import normalise_inputs
from srigl_fx.passes.free_sizes import batch_names
from srigl_fx.passes.hugging_face import register_caches
from srigl_fx.passes.sizes import Sizes
from srigl_fx.passes.state import kept_in, writes
from srigl_fx.passes.wrappers import unwrapped


@noted
def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    dynamic_batch: bool = True,
    dynamic_shapes: DynamicShapes | None = None,
    fallback: bool = True,
    min_speedup: float | Literal["auto"] = "auto",
    value_dtype: ValueDtypes = torch.float32,
    calibration: Calibration | None = None,
    embedding_dtype: torch.dtype = torch.float32,
    verify: bool = True,
    state: Literal["inputs", "error"] = "inputs",
    external_data: ExternalData = "auto",
    triton: str | os.PathLike[str] | Mapping[str, Any] | None = None,
) -> ExportReport:
    """Write a sparse-trained or lowered model as one ONNX file, and check it in ONNX Runtime.

    Sparse layers become ``CondensedLinear``, ``CondensedConv`` and ``CondensedConvTranspose`` nodes of domain
    ``srigl_fx``, an activation or addition that follows being part of them and their names, and ``Int8`` where their
    values have eight bits. A session opened by
    ``srigl_fx.runtime.load`` runs them with the operator library; a stock ONNX Runtime runs the function of the same
    name inside the file, densely. Opset 18; ONNX Runtime 1.17 and newer read it. The model's recipe is among the file's
    metadata (:func:`srigl_fx.onnx_tools.recipe`).

    Args:
        model: A model with masks, in eval mode, float32 on the CPU; or what :func:`srigl_fx.lower` returned.
        path: The file to write; it appears whole or not at all.
        example_inputs: A tuple of arguments, or (args, kwargs).
        dynamic_batch: Let the file take any batch size, where the model does and ONNX can say it; the report notes
            where it cannot. False fixes all sizes.
        dynamic_shapes: As for :func:`srigl_fx.lower`, in the place of ``dynamic_batch``: which sizes of the file's
            inputs are free, by default the batch and the number of tokens. They have their names in the file, which
            refuses numbers outside their ranges. What is lowered already keeps its own.
        fallback: Put the functions for a stock ONNX Runtime into the file.
        min_speedup: As for :func:`srigl_fx.lower`. "auto" leaves dense what the cost model expects to lose in ONNX
            Runtime at batch 1 or 16, the same layers on every machine; 0 condenses every layer that has an operator.
        value_dtype: As for :func:`srigl_fx.lower`; what is lowered already keeps its own.
        calibration: As for :func:`srigl_fx.lower`, likewise.
        embedding_dtype: What embedding tables are stored in: ``torch.float32``, ``torch.float16``, ``torch.bfloat16``
            or ``torch.int8``, with a scale for each row. Rows become float32 where they are looked up, by standard
            operators. Tables that something else reads too stay as they are. The outputs on the example inputs must
            keep a signal-to-noise ratio of 20 dB.
        verify: Compare outputs with and without the library with PyTorch's, at the example batch and at another one, or
            at a smaller and a larger number of each size that ``dynamic_shapes`` frees; of a model that keeps state, in
            several calls. Errors up to 1e-4 of the largest value pass, or, with layers of int8, a signal-to-noise ratio
            of at least 30 dB: what differs in the last bit may be rounded apart.
        state: What becomes of buffers that the forward pass writes: with "inputs" each is an input and an output of the
            file, and its present value is kept as the initial one (see ``srigl_fx.runtime.Stream``); "error" refuses.
        external_data: Whether large tensors go to a file beside it, called like it, by what it holds, and ``.data``,
            which ONNX Runtime maps into memory; "auto" is where one file cannot hold all (2 GiB). One that the file
            had before goes with it.
        triton: The folder of all models of a Triton server, which exists, to write one for this file into it, too, as
            :func:`srigl_fx.onnx_tools.triton_model` does; or a dict of that function's arguments, with the folder as
            "repository". By default none is written.

    Returns:
        A report; ``str()`` is a few lines, ``.path`` the file.

    Raises:
        ExportError: The graph has an operator without ONNX form, or ONNX Runtime's outputs differ. Or the example
            inputs are a batch of 0. Or the model writes buffers, and ``state`` is "error". Or the model is not one
            graph: the message says what broke, and how the parts that are graphs are exported. Or ``triton`` asks for
            what :func:`srigl_fx.onnx_tools.triton_model` refuses.
        LoweringError, CaptureError, InvariantError: As :func:`srigl_fx.lower` raises them.

    An existing file at ``path`` is left alone in each case, and the model, its buffers included, is never changed.

    Example:
        >>> import tempfile, srigl_fx as sx
        >>> model = sx.sparsify(nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)), sparsity=0.75)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path, inputs = f"{folder}/model.onnx", (torch.ones(2, 16),)
        ...     report = sx.export_onnx(model.eval(), path, inputs, min_speedup=0, verify=False)
        >>> report.condensed_layers
        2
    """
    if torch.is_inference_mode_enabled():
        raise ExportError(
            "export_onnx cannot run under torch.inference_mode(); call it outside, or under torch.no_grad()"
        )
    target = Path(path)
    require_place(target)
    check_table_dtype(embedding_dtype)
    if state not in ("inputs", "error"):
        raise ExportError(f'state must be "inputs" or "error", not {state!r}')
    if not isinstance(dynamic_batch, bool):
        raise ExportError(f"dynamic_batch must be True or False, not {dynamic_batch!r}")
    if dynamic_shapes is not None and not dynamic_batch:
        raise ExportError("dynamic_shapes says which sizes are free, the batch among them: leave dynamic_batch out")
    check_external_data(external_data)
    _require_rows(example_inputs)
    served = None if triton is None else requested(triton, target)
    model = unwrapped(model)
    lowered = model
    if not isinstance(lowered, LoweredModule | LoweredRegions):
        options: dict[str, Any] = {"value_dtype": value_dtype, "calibration": calibration, "verify": verify}
        lowered = lower(model, example_inputs, min_speedup=min_speedup, dynamic_shapes=dynamic_shapes, **options)
    elif dynamic_shapes is not None:
        raise ExportError(
            "the model is lowered already, with the sizes that its report names: give dynamic_shapes to lower"
        )
    if isinstance(lowered, LoweredRegions):
        raise _not_one_graph(lowered)
    names = tuple(writes(lowered.graph))
    if names and state == "error":
        raise _keeps_state(model, names)
    args, kwargs = normalise_inputs(example_inputs)
    register_caches(model, pytree.tree_leaves((args, kwargs)))
    args, kwargs = arranged(lowered, args, kwargs)
    lowered = with_rounded_tables(lowered, embedding_dtype, args, kwargs, verify=verify)
    leaves = pytree.tree_leaves((args, kwargs))
    sizes = _sizes(lowered, leaves) if dynamic_batch else Sizes()
    write = functools.partial(
        _write,
        target,
        lowered,
        args,
        kwargs,
        fallback=fallback,
        verify=verify,
        external_data=external_data,
        served=served,
    )
    try:
        written = write(sizes)
    except ExportError as error:
        if not sizes.names or dynamic_shapes not in (None, "auto"):
            raise
        written, sizes = _with_fewer(write, sizes, error)
    else:
        if dynamic_batch and not lowered.report.tried_sizes:
            written.notes.extend(_fixed(lowered, leaves, sizes))
    written.notes.extend(f"{note.by}: {note.reason}" for note in lowered.report.undone)
    contents = inspect_file(target)
    return ExportReport(
        path=target,
        bytes=contents.file_bytes,
        layers=contents.weights,
        sparse_bytes=contents.sparse_bytes,
        dense_bytes=contents.dense_bytes,
        dynamic_batch=any(0 in axes for axes in sizes.axes),
        fallback=fallback,
        library_error=written.worst("library"),
        fallback_error=written.worst("fallback"),
        min_snr=min((one.snr for one in written.compared.values() if one.snr is not None), default=None),
        notes=tuple(written.notes),
        inputs=written.inputs,
        outputs=written.outputs,
        state=names,
        lowering=lowered.report,
        triton=written.folder,
    )


@dataclass
class _Written:
    """What was written and found when it was checked."""

    compared: dict[str, Comparison]
    notes: list[str]
    inputs: dict[str, tuple[int | str, ...]]
    outputs: dict[str, tuple[int | str, ...]]
    folder: Path | None

    def worst(self, host: str) -> float | None:
        """The largest relative error on a host; None where that was not checked."""
        return self.compared[host].worst if host in self.compared else None


def _require_rows(example_inputs: Any) -> None:
    """Require a batch of examples to check the file with: rows cannot be made out of none."""
    leaves = pytree.tree_leaves(normalise_inputs(example_inputs))
    first = next((leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()), None)
    if first is not None and first.shape[0] == 0:
        raise ExportError(
            f"the first tensor of the example inputs is {tuple(first.shape)}, a batch of 0 examples: give at least one"
        )


def _keeps_state(model: nn.Module, names: Sequence[str]) -> ExportError:
    buffers = "; ".join(kept_in(model, name) for name in names)
    return ExportError(
        f'the forward pass writes {buffers}: pass state="inputs" to make that an input and an output of the file, or '
        "make it an argument and a result of the forward"
    )


def _with_fewer(write: Callable[[Sizes], _Written], sizes: Sizes, error: ExportError) -> tuple[_Written, Sizes]:
    """The file with the batch alone free, or else with none, where ``error`` came with all; a note says so."""
    leading = [
        {axis: size for axis, size in axes.items() if sizes.batched(leaf) and axis == 0}
        for leaf, axes in enumerate(sizes.axes)
    ]
    batch = replace(sizes, axes=tuple(leading))
    if batch.axes != sizes.axes and batch.names:
        with suppress(ExportError):
            written = write(batch)
            written.notes.append(f"of the free sizes the file takes the batch alone; with all, {error}")
            return written, batch
    try:
        written = write(Sizes())
    except ExportError:
        raise error from error.__cause__
    written.notes.append(f"the file takes the batch of the example inputs only; with any batch, {error}")
    return written, Sizes()


def _fixed(lowered: LoweredModule, leaves: Sequence[Any], sizes: Sizes) -> list[str]:
    """Why leading sizes that might be free are not."""
    fixed = [
        position
        for position, (leaf, axes) in enumerate(zip(leaves, sizes.axes, strict=True))
        if isinstance(leaf, Tensor) and leaf.dim() and 0 not in axes
    ]
    if not any(0 in axes for axes in sizes.axes):
        why = next((str(one) for one in lowered.report.capture_failures if "batch" in one.attempt), "")
        return [f"the batch is fixed: {why}"] if why else []
    return [
        f"the leading size of input {position} is fixed at {leaves[position].shape[0]}: it is not that of the first "
        "input of the example, which is taken for the batch"
        for position in fixed
    ]


def _write(
    target: Path,
    lowered: LoweredModule,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    sizes: Sizes,
    *,
    fallback: bool,
    verify: bool,
    external_data: ExternalData,
    served: dict[str, Any] | None,
) -> _Written:
    """Write the file and check it, and a folder of it for Triton as ``served`` asks."""
    origins, held = dict[str, str](), dict[str, Any]()
    proto = build_model(lowered, args, kwargs, sizes, origins, held)
    if fallback:
        proto.functions.extend(functions_for(proto))
    recipes.put(proto, lowered.recipes)
    with writing(target, proto, held, external_data) as part:
        compared, notes = dict[str, Comparison](), list[str]()
        if verify:
            trials = _trials(lowered, pytree.tree_leaves((args, kwargs)), sizes)
            compared, notes = check_file(part, lowered, args, kwargs, sizes, trials, origins, fallback=fallback)
        folder = None if served is None else triton_model(part, **served)
    return _Written(compared, notes, shapes_of(proto.graph.input), shapes_of(proto.graph.output), folder)


def _not_one_graph(lowered: LoweredRegions) -> ExportError:
    """The error for a model that is not one graph: what broke, and how its parts are exported."""
    failures = lowered.report.capture_failures
    broken = [one for one in failures if not any(other.name.startswith(f"{one.name}.") for other in failures)]
    causes = dict.fromkeys(str(failure) for failure in (*failures[:1], *broken))
    return ExportError(
        "the model is not one graph, and one file holds one graph. What broke: "
        f"{'; '.join(causes)}. Mend that, or export the parts that are graphs ({', '.join(lowered.regions)}):\n"
        "    lowered = srigl_fx.lower(model, example_inputs, min_speedup=0)\n"
        "    for name, part in lowered.regions.items():\n"
        '        srigl_fx.export_onnx(part, f"{name}.onnx", lowered.region_inputs[name])'
    )


def _sizes(lowered: LoweredModule, leaves: Sequence[Any]) -> Sizes:
    """The free sizes of a lowered module's inputs, of which these are examples."""
    if len(leaves) != len(lowered.inputs):
        raise ExportError(
            f"the lowered model takes {len(lowered.inputs)} inputs, the example inputs are {len(leaves)}; pass those "
            "it was lowered with"
        )
    sizes = sizes_of(lowered.inputs)
    return replace(sizes, batch=batch_names(sizes.axes, leaves))


def _trials(lowered: LoweredModule, leaves: Sequence[Any], sizes: Sizes) -> list[dict[str, int]]:
    """Numbers for free sizes beside the example's: those that the lowered model was tried at, else another batch."""
    if lowered.report.tried_sizes:
        found = [{name: n for name, n in one.items() if name in sizes.names} for one in lowered.report.tried_sizes]
        return [one for one in found if one]
    if not sizes.batch:
        return []
    size = sizes.example(leaves)[sizes.batch[0]]
    return [{name: size + 1 + size % 2 + 2 * i for i, name in enumerate(sizes.batch)}]
