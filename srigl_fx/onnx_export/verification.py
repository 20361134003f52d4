"""Whether an exported file gives in ONNX Runtime what the lowered model gives in torch.

Owns the runs that are compared, with the operator library and without, at the example batch and at another one, in
several calls where there is state. It must not know how a file is made.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from srigl_fx.comparison import Comparison, Limit, Results, compare
from srigl_fx.errors import ExportError, LibraryError
from srigl_fx.lowering.lowered import LoweredModule
from srigl_fx.onnx_export.places import place_in
from srigl_fx.passes.model_runs import run_steps
from srigl_fx.passes.sizes import At, Sizes
from srigl_fx.runtime.ort.stream import INPUT, Stream

if TYPE_CHECKING:
    import onnxruntime

# dB: a difference in the last bit may round an activation to the next of its 255 steps, which is a whole step.
_LEAST_SNR = 30.0


def check_file(
    path: Path,
    lowered: LoweredModule,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    sizes: Sizes,
    trials: Sequence[Mapping[str, int]],
    origins: Mapping[str, str],
    *,
    fallback: bool,
) -> tuple[dict[str, Comparison], list[str]]:
    """Run a file with and without the operator library; how both compare, and what was not checked.

    Errors up to 1e-4 of the largest value pass; of a model with layers of int8, a signal-to-noise ratio of 30 dB.

    Args:
        path: The file.
        lowered: What it was made of.
        args: Example arguments.
        kwargs: Example keyword arguments.
        sizes: Those of the flat inputs that are free.
        trials: Numbers for named sizes at which it is run, beside those of the example inputs.
        origins: Where the file's nodes come from, for errors.
        fallback: Whether it carries the functions for a host without the library.

    Raises:
        ExportError: ONNX Runtime does not run it, or its outputs are not the model's.
    """
    import onnxruntime

    from srigl_fx.runtime.ort.session import register

    compared: dict[str, Comparison] = {}
    notes: list[str] = []
    allowed = Limit(snr=None if lowered.report.limit.snr is None else _LEAST_SNR)
    hosts = ["library", "fallback"] if fallback else ["library"]
    for host in hosts:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what is wrong is raised
        if host == "library":
            try:
                register(options)
            except LibraryError as error:
                notes.append(f"not checked with the operator library: {error}")
                continue
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            found = compared[host] = _compared(session, lowered, args, kwargs, sizes, trials, allowed)
        except ExportError as error:
            raise ExportError(f"{host}: {error}") from error
        except Exception as error:  # ONNX Runtime's exceptions have no base class of their own
            remedy = "; fallback=False writes a file for the operator library alone" if host == "fallback" else ""
            if place := place_in(str(error), origins):
                remedy = "; replace it, give it float32, or serve with PyTorch (lower(...).save(path))"
                place = f", because of {place}"
            raise ExportError(f"ONNX Runtime cannot run the exported file ({host}){place}: {error}{remedy}") from error
        if (wrong := found.wrong) is not None:
            raise ExportError(
                f"with ONNX Runtime ({host}) {wrong.what} {wrong.off(allowed)}{wrong.place} ({allowed}). A model whose "
                "outputs depend on more than its inputs cannot be verified: pass verify=False if that is so"
            )
    return compared, notes


def _compared(
    session: "onnxruntime.InferenceSession",
    lowered: LoweredModule,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    sizes: Sizes,
    trials: Sequence[Mapping[str, int]],
    allowed: Limit,
) -> Comparison:
    """How outputs compare at the sizes of the example inputs, and at others."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    leaves = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]  # NumPy takes no others
    stream = Stream(session)
    entries = [entry for entry in session.get_inputs() if not entry.name.startswith(INPUT)]
    tensors = [position for position, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    if len(entries) != len(tensors):
        names = [entry.name for entry in entries]
        raise ExportError(f"the file takes the inputs {names}, the model has {len(tensors)}; one of them is not used")
    stored: dict[At | None, list[Any]] = {}

    def expected(at: At | None) -> list[Results]:
        given = stored[at] = leaves if at is None else sizes.resized(leaves, dict(at.values))
        try:
            runs = run_steps(lowered, *pytree.tree_unflatten(given, spec))
        except Exception as error:  # of an operator of the graph: any type
            raise ExportError(f"the graph does not run at {at}: {error}") from error
        return [
            Results([leaf for leaf in run.results.outputs if isinstance(leaf, Tensor)], run.buffers) for run in runs
        ]

    def got(at: At | None, calls: int) -> list[Results]:
        feeds = {entry.name: stored[at][position].numpy() for entry, position in zip(entries, tensors, strict=True)}
        stream.reset()
        served = []
        for _ in range(calls):
            outputs = [torch.from_numpy(value) for value in stream.run(None, feeds)]
            served.append(Results(outputs, {name: torch.from_numpy(value) for name, value in stream.state.items()}))
        return served

    return compare([None, *map(At.of, trials)], expected, got, allowed)
