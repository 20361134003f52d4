"""What an export gave: the file, its layers, its inputs and outputs, and how far its results are from the model's.

Owns :class:`ExportReport` and how it reads. It must not know how a file is made or checked.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from srigl_fx.lowering.lowered import LoweringReport, format_speedups
from srigl_fx.onnx_export.file import CondensedNode
from srigl_fx.reports.sizes import format_sizes
from srigl_fx.reports.text_tables import format_bytes
from srigl_fx.runtime.ort.stream import INPUT


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What was written, and how it compares with the model; ``str()`` is readable text.

    Attributes:
        path: The file.
        bytes: Its size.
        layers: Its condensed layers.
        sparse_bytes: What they take in the file, biases included.
        dense_bytes: What the same layers take in a dense file, biases included.
        dynamic_batch: Whether the leading size of the first input is free.
        fallback: Whether it runs without the operator library.
        library_error: Largest difference between PyTorch and ONNX Runtime with the library, over the largest output;
            None where that was not checked.
        fallback_error: The same for an ONNX Runtime without the library.
        min_snr: The smallest signal-to-noise ratio in dB of these differences, with and without the library; None where
            that was not checked, or no layer has values of int8.
        notes: What could not be checked, which passes failed and were undone, and which sizes are fixed, each with why.
        inputs: The sizes of the inputs by name: numbers where they are fixed, the names of sizes where they are free.
            Sizes have the same name where they must be the same.
        outputs: The same of the outputs.
        lowering: What became of each weight and why, with its expected times
            (:class:`~srigl_fx.lowering.lowered.LayerReport`).
        state: The buffers that the model writes: ``name`` is the input ``state.name`` and the output
            ``next_state.name``, and ``srigl_fx.runtime.Stream`` carries it from call to call.
        triton: The folder that was written for a Triton server; None where none was asked for.
    """

    path: Path
    bytes: int
    layers: tuple[CondensedNode, ...]
    sparse_bytes: int
    dense_bytes: int
    dynamic_batch: bool
    fallback: bool
    library_error: float | None
    fallback_error: float | None
    notes: tuple[str, ...] = ()
    inputs: dict[str, tuple[int | str, ...]] = field(default_factory=dict)
    outputs: dict[str, tuple[int | str, ...]] = field(default_factory=dict)
    state: tuple[str, ...] = ()
    lowering: LoweringReport | None = None
    min_snr: float | None = None
    triton: Path | None = None

    @property
    def condensed_layers(self) -> int:
        """The number of condensed layers in the file."""
        return len(self.layers)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts."""
        sizes = {
            name: {key: list(shape) for key, shape in values.items()}
            for name, values in (("inputs", self.inputs), ("outputs", self.outputs))
        }
        listed = {"notes": list(self.notes), "state": list(self.state)}
        lowering = None if self.lowering is None else self.lowering.as_dict()
        paths = {"path": str(self.path), "triton": None if self.triton is None else str(self.triton)}
        return {**asdict(self), **paths, **sizes, **listed, "lowering": lowering}

    def __str__(self) -> str:
        def error(value: float | None) -> str:
            return "not checked" if value is None else f"{value:.1e}"

        ratio = self.sparse_bytes / self.dense_bytes if self.dense_bytes else 1.0
        lines = [
            f"{self.path}: {format_bytes(self.bytes)}, {self.condensed_layers} condensed "
            f"layer{'' if self.condensed_layers == 1 else 's'} "
            f"({format_bytes(self.sparse_bytes)} instead of {format_bytes(self.dense_bytes)}, {ratio:.3f} of dense)",
            f"batch: {self._batch}; without the library: {'runs densely' if self.fallback else 'does not run'}",
            f"largest relative error: {error(self.library_error)} with the library, "
            f"{error(self.fallback_error)} without"
            + ("" if self.min_snr is None else f"; smallest signal-to-noise ratio {self.min_snr:.1f} dB"),
            f"takes {_listed(self.inputs)}; returns {_listed(self.outputs)}",
            *self._sizes,
            *self._expected,
            *self.notes,
            *([] if self.triton is None else [f"for Triton: {self.triton}"]),
        ]
        return "\n".join(lines)

    @property
    def _expected(self) -> list[str]:
        """What masked layers are expected to gain together, and which stay dense because they are expected to lose."""
        if self.lowering is None:
            return []
        speedups = format_speedups(self.lowering.expected_speedups).removeprefix("; ")
        dense = [layer for layer in self.lowering.layers if layer.decision == "dense" and layer.estimates]
        left = "; ".join(f"{layer.fqn} stays dense, {layer.reason}" for layer in dense)
        return list(filter(None, (speedups, left)))

    @property
    def _sizes(self) -> list[str]:
        """Which sizes are free, where more than the batch was to be."""
        if self.lowering is None or not (self.lowering.tried_sizes or self.lowering.fixed_sizes):
            return []
        names = {name for shape in self.inputs.values() for name in shape if isinstance(name, str)}
        free = [one for one in self.lowering.free_sizes if any(one.name in name for name in names)]
        return format_sizes(free, self.lowering.fixed_sizes).splitlines()

    @property
    def _batch(self) -> str:
        """Which leading sizes are free, in words."""
        sized = {name: shape for name, shape in self.inputs.items() if shape and not name.startswith(INPUT)}
        free = [name for name, shape in sized.items() if isinstance(shape[0], str)]
        if not free:
            return "any" if self.dynamic_batch and not sized else "as in the example inputs"
        return "any" if len(free) == len(sized) else f"any of {', '.join(free)}, else as in the example inputs"


def _listed(sizes: dict[str, tuple[int | str, ...]]) -> str:
    return ", ".join(f"{name} ({', '.join(map(str, shape))})" for name, shape in sizes.items())
