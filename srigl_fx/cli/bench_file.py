"""The forms of one ONNX file against each other, on this machine: dense, dense int8, sparse, sparse int8.

Owns what is called and when, and the report. It must not know how the forms are made (:mod:`srigl_fx.cli.forms`).
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from srigl_fx.cli.feeds import Feeds, batch_of, feeds_for
from srigl_fx.cli.forms import DENSE, DENSE_INT8, FORMS, SPARSE, SPARSE_INT8, Form, make_forms
from srigl_fx.cli.output import Waiting
from srigl_fx.cli.timing import medians
from srigl_fx.errors import FormatError, SriglError
from srigl_fx.reports.text_tables import format_bytes, format_table

if TYPE_CHECKING:
    import onnxruntime

PAIRS = ((DENSE, SPARSE), (DENSE_INT8, SPARSE_INT8))  # what is compared: the first over the second


@dataclass(frozen=True, kw_only=True)
class FileCell:
    """One batch size: the median seconds of a call of each form that there is, and how many times faster sparse is."""

    batch: int
    seconds: dict[str, float]

    def gain(self, dense: str, sparse: str) -> float | None:
        """The time of one form over that of the other; None where one is missing."""
        if dense not in self.seconds or sparse not in self.seconds:
            return None
        return self.seconds[dense] / self.seconds[sparse]

    @property
    def best(self) -> float | None:
        """The faster dense form over the faster sparse one."""
        dense, sparse = (
            [self.seconds[name] for name in pair if name in self.seconds] for pair in zip(*PAIRS, strict=True)
        )
        return min(dense) / min(sparse) if dense and sparse else None

    @property
    def gains(self) -> dict[str, float | None]:
        """All of them, by what is compared."""
        pairs = {f"{dense} / {sparse}": self.gain(dense, sparse) for dense, sparse in PAIRS}
        return {**pairs, "best dense / best sparse": self.best}


@dataclass(frozen=True, kw_only=True)
class FileTimes:
    """What was measured of a file; ``str()`` is two tables.

    Attributes:
        file: The file.
        forms: Those that were made of it, and why others were not.
        differences: The largest difference of each form's outputs from those of the dense one, over the largest output.
        cells: A row for each batch size.
        threads: Of a call.
        sizes: What the free sizes were, the batch aside.
        host: Processor, and versions of what was measured.
    """

    file: Path
    forms: tuple[Form, ...]
    differences: dict[str, float]
    cells: tuple[FileCell, ...]
    threads: int
    sizes: dict[str, int]
    host: str

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        forms = [{**asdict(form), "path": None, "difference": self.differences.get(form.name)} for form in self.forms]
        for form in forms:
            del form["path"]  # of a folder that is gone
        cells = [{"batch": cell.batch, "seconds": cell.seconds, "gains": cell.gains} for cell in self.cells]
        rest = {"threads": self.threads, "sizes": self.sizes, "host": self.host}
        return {"file": str(self.file), "forms": forms, "cells": cells, **rest}

    def __str__(self) -> str:
        return "\n\n".join((self._forms(), self._times(), self._words()))

    def _forms(self) -> str:
        rows = [
            (form.name, format_bytes(form.bytes), form.condensed_layers, self._difference(form.name), form.made_by)
            if form.path
            else (form.name, "-", "-", "-", f"none: {form.reason}")
            for form in self.forms
        ]
        headers = ("form", "size", "condensed layers", "off dense by", "from")
        return format_table(headers, rows, right=(1, 2, 3))

    def _difference(self, name: str) -> str:
        return f"{self.differences[name]:.1e}" if name in self.differences else "-"

    def _times(self) -> str:
        names = [form.name for form in self.forms if form.path]
        headers = ("batch", *(f"{name} ms" for name in names), *self.cells[0].gains, "")
        rows = [
            (
                cell.batch,
                *(f"{1e3 * cell.seconds[name]:.3g}" for name in names),
                *("-" if gain is None else f"{gain:.2f}" for gain in cell.gains.values()),
                "loses" if any(gain is not None and gain < 1 for gain in cell.gains.values()) else "",
            )
            for cell in self.cells
        ]
        return format_table(headers, rows, right=range(len(headers) - 1))

    def _words(self) -> str:
        found = [(cell.batch, what, gain) for cell in self.cells for what, gain in cell.gains.items() if gain]
        lost = [f"{what} at batch {batch}" for batch, what, gain in found if gain < 1]
        sizes = "".join(f", {name} {number}" for name, number in self.sizes.items())
        return (
            f"Medians of one call in ONNX Runtime, {self.threads} thread{'s' * (self.threads > 1)}{sizes}, random "
            f"inputs, all forms in turns; {self.host}.\n"
            "Above 1, sparse is faster. "
            + (f"Loses in {len(lost)} of {len(found)} cells: {'; '.join(lost)}." if lost else "It loses nowhere here.")
            * bool(found)
        ).rstrip()


def compare_forms(
    file: Path,
    batches: Sequence[int],
    *,
    threads: int = 1,
    sizes: Mapping[str, int] | None = None,
    seconds: float = 5.0,
    waiting: Waiting | None = None,
) -> FileTimes:
    """Make the forms of a file and time them in turns, on random inputs.

    Args:
        file: An ONNX file.
        batches: Batch sizes; one that the file fixes is the only one.
        threads: Of a call.
        sizes: Of other free sizes, by their names.
        seconds: About how long each batch size is measured; longer where a few calls take longer.
        waiting: Is told of each step.

    Raises:
        FormatError: The file cannot be read or run, or a size is none that it has free.
        LibraryError: The operator library is missing here and cannot be built.
    """
    asked, cells, differences = dict(sizes or {}), list[FileCell](), dict[str, float]()
    with tempfile.TemporaryDirectory(prefix="srigl_fx_bench_") as folder:
        forms = make_forms(file, Path(folder))
        sessions = {form.name: _session(form, threads) for form in forms if form.path is not None}
        first = next(iter(sessions))  # the dense one
        inputs = sessions[first].get_inputs()
        fixed = batch_of(inputs)
        batches = [fixed] if fixed is not None else list(dict.fromkeys(batches))
        used: dict[str, int] = {}
        if waiting is not None:
            waiting.steps(len(batches))
        for batch in batches:
            feeds, used = feeds_for(inputs, batch, asked)
            outputs = {name: _run(session, feeds, name) for name, session in sessions.items()}
            for name in outputs.keys() - {first}:
                differences[name] = max(differences.get(name, 0.0), _difference(outputs[first], outputs[name]))
            calls = {name: _call(session, feeds) for name, session in sessions.items()}
            cells.append(FileCell(batch=batch, seconds=medians(calls, seconds=seconds)))
            if waiting is not None:
                waiting.step()
    return FileTimes(
        file=file,
        forms=tuple(forms),
        differences={name: differences[name] for name in FORMS if name in differences},
        cells=tuple(cells),
        threads=threads,
        sizes=used,
        host=_host(),
    )


def _session(form: Form, threads: int) -> "onnxruntime.InferenceSession":
    import onnxruntime

    from srigl_fx.runtime.ort.session import register

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # what is wrong is raised
    if form.condensed_layers:
        register(options)
    try:
        return onnxruntime.InferenceSession(str(form.path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions have no base class of their own
        raise FormatError(f"ONNX Runtime cannot open the {form.name} form: {error}") from error


def _run(session: "onnxruntime.InferenceSession", feeds: Feeds, name: str) -> list[Any]:
    try:
        outputs: list[Any] = session.run(None, feeds)
    except Exception as error:  # the same
        shapes = ", ".join(f"{name} {array.shape}" for name, array in feeds.items())
        raise SriglError(
            f"ONNX Runtime cannot run the {name} form on {shapes}: {error}; --size NAME=NUMBER sets other sizes"
        ) from error
    return outputs


def _call(session: "onnxruntime.InferenceSession", feeds: Feeds) -> Callable[[], object]:
    return lambda: session.run(None, feeds)


def _difference(expected: Sequence[Any], got: Sequence[Any]) -> float:
    """The largest relative error of outputs that are numbers and may be compared; 0 where there are none."""
    from srigl_fx.onnx_condensing.trial import relative_error

    pairs = [(one, other) for one, other in zip(expected, got, strict=True) if isinstance(one, np.ndarray)]
    alike = [(one, other) for one, other in pairs if one.dtype.kind == "f" and one.shape == other.shape]
    return max((relative_error(one, other) for one, other in alike), default=0.0)


def _host() -> str:
    import onnxruntime

    from srigl_fx.runtime.cpu.kernels.isa import host_isa

    return f"kernels for {host_isa()}, onnxruntime {onnxruntime.__version__}"
