"""What is installed and what works on this machine.

Owns the examination: each line is something that was looked up or tried just now. It must not know how to mend what it
finds beyond the sentence that says so.
"""

import importlib.metadata
import os
import platform
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from srigl_fx.compatibility import known_good, untested
from srigl_fx.errors import SriglError
from srigl_fx.reports.text_tables import format_seconds, format_table

if TYPE_CHECKING:
    import onnx

    from srigl_fx.runtime.format import CondensedWeight

DISTRIBUTION = "srigl-fx"
OTHER_PLATFORMS = (
    "The operator library exists for Linux on x86-64 and on Arm with ONNX Runtime 1.17 or newer. Everywhere else "
    "(macOS, Windows) the same ONNX files run through the fallback inside them, as fast as a dense network; training "
    "and lowering work wherever PyTorch and Numba do."
)


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: what, whether it is as it should be, and what was seen."""

    what: str
    fine: bool
    seen: str
    needed: bool = False


@dataclass(frozen=True)
class Health:
    """All that was looked at; ``str()`` is a table."""

    findings: tuple[Check, ...]

    @property
    def healthy(self) -> bool:
        """Whether everything that the core needs works."""
        return all(finding.fine for finding in self.findings if finding.needed)

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"healthy": self.healthy, "findings": [asdict(finding) for finding in self.findings]}

    def __str__(self) -> str:
        rows = [
            ("ok" if finding.fine else "FAIL" if finding.needed else "-", finding.what, finding.seen)
            for finding in self.findings
        ]
        return format_table(("", "what", "seen here"), rows) + "\n\n" + OTHER_PLATFORMS


def examine(*, renew: bool = False) -> Health:
    """Look at this machine; takes some four minutes where the operator library must be built first.

    Args:
        renew: Forget all times measured on this processor, and measure the constants of the cost model anew; some ten
            seconds, most of which compile the kernels.

    Example:
        >>> examine().healthy  # doctest: +SKIP
        True
    """
    if renew:
        from srigl_fx.runtime.costs.calibration import machine_constants
        from srigl_fx.runtime.costs.timings import Timings

        timings = Timings.open()
        timings.clear()
        machine_constants(timings)
    return Health((*_platform(), *_packages(), *_library(), *_timings(), *_gpu()))


def _platform() -> Iterator[Check]:
    python = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"
    yield Check("platform", True, python)


def _packages() -> Iterator[Check]:
    """The core's packages, then one finding for each extra."""
    by_extra: dict[str, list[str]] = {"": []}
    for requirement in importlib.metadata.requires(DISTRIBUTION) or ():
        name = re.split(r"[\s<>=!~;\[(]", requirement, maxsplit=1)[0]
        marker = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", requirement)
        by_extra.setdefault(marker.group(1) if marker else "", []).append(name)
    for name in [DISTRIBUTION, *by_extra.pop("")]:
        version = _version(name)
        seen = version or f"missing: pip install {name}"
        if name == "torch" and version is not None and untested(version):
            seen += f"; not tested. {known_good()}"
        yield Check(name, version is not None, seen, needed=True)
    for extra, names in by_extra.items():
        absent = [name for name in names if _version(name) is None]
        seen = f"missing {', '.join(absent)}: pip install '{DISTRIBUTION}[{extra}]'" if absent else "installed"
        yield Check(f"extra [{extra}]", not absent, seen)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _library() -> Iterator[Check]:
    from srigl_fx import runtime
    from srigl_fx.runtime.ort.library import library_status

    status = library_status()
    if not status.supported:
        yield Check("operator library", False, status.reason)
        return
    try:
        path = runtime.library_path()
        error = run_tiny_model()
    except SriglError as problem:
        yield Check("operator library", False, str(problem), needed=True)
        return
    yield Check("operator library", True, str(path))
    yield Check("instruction set", status.isa is not None, status.isa or status.reason, needed=True)
    yield Check("tiny model in ONNX Runtime", error < 1e-5, f"largest error {error:.1e}", needed=True)


def _timings() -> Iterator[Check]:
    from srigl_fx.runtime.costs.calibration import WHAT, believable
    from srigl_fx.runtime.costs.timings import Timings, timings_path

    path = timings_path()
    if path is None:
        yield Check("measured times", False, "not kept: no cache folder, or SRIGL_FX_CACHE is set to nothing")
        return
    timings = Timings(path)
    yield Check("measured times", True, f"{path}: {len(timings)} for this machine and these versions")
    constants = timings.by_threads(WHAT)
    if not constants:
        yield Check("cost model", True, "not measured here yet: the first lower does it, or doctor --renew")
    for threads, seconds in constants.items():
        believed = believable(seconds, threads)
        doubt = "" if believed else "; not believable, so not used: measured anew when needed, or by doctor --renew"
        yield Check(f"cost model, threads: {threads}", believed, format_probes(seconds) + doubt)


def format_probes(seconds: Mapping[str, float]) -> str:
    """The measured times that the constants of the cost model come from.

    Example:
        >>> format_probes({"dense call": 3e-6, "dense few": 2.5e-4, "condensed call": 1e-5})
        'condensed call 10 µs, dense call 3 µs, dense few 250 µs'
    """
    return ", ".join(f"{name} {format_seconds(one)}" for name, one in sorted(seconds.items()))


def run_tiny_model() -> float:
    """Run :func:`tiny_model` in ONNX Runtime and return its largest error against NumPy.

    Raises:
        SriglError: If the library cannot be had, or refuses the model.
    """
    from onnx import save

    from srigl_fx import runtime

    model, condensed = tiny_model()
    weight, _ = condensed.to_dense()
    x = np.random.default_rng(1).standard_normal((3, condensed.in_features)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tiny.onnx")
        save(model, path)
        (y,) = runtime.load(path).run(None, {"x": x})
    return float(np.abs(y - (x @ weight.T + condensed.bias)).max())


def tiny_model() -> "tuple[onnx.ModelProto, CondensedWeight]":
    """An ONNX model of one condensed layer (16 inputs, 8 neurons, the first ablated), and that layer's weight.

    It has no fallback: only the operator library can run it.
    """
    from onnx import TensorProto, helper, numpy_helper

    from srigl_fx.runtime.format import CondensedWeight

    rng = np.random.default_rng(0)
    mask = np.zeros((8, 16), np.bool_)
    mask[1:, 3::5] = True
    condensed = CondensedWeight.from_dense(rng.standard_normal(mask.shape), mask, rng.standard_normal(8))
    operands = {
        "layer.weight_values": condensed.values,
        "layer.weight_indices": condensed.indices,
        "layer.weight_active": condensed.active,
        "layer.bias": condensed.bias,
    }
    node = helper.make_node(
        "CondensedLinear",
        ["x", *operands],
        ["y"],
        name="layer",
        domain="srigl_fx",
        in_features=condensed.in_features,
        weight_shape=list(mask.shape),
        flat_size=mask.size,
    )
    graph = helper.make_graph(
        [node],
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 8])],
        [numpy_helper.from_array(array, name) for name, array in operands.items()],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("srigl_fx", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9), condensed


def _gpu() -> Iterator[Check]:
    import onnxruntime
    import torch

    if torch.cuda.is_available():
        seen = f"PyTorch can train on {torch.cuda.get_device_name()}; condensed operators run on the CPU"
    elif torch.version.cuda is None:
        seen = "none: this PyTorch is a CPU build; training and condensed operators run on the CPU"
    else:
        seen = "none: PyTorch finds no usable CUDA device; training and condensed operators run on the CPU"
    yield Check("GPU", torch.cuda.is_available(), seen)
    yield Check("ONNX Runtime providers", True, ", ".join(onnxruntime.get_available_providers()))
