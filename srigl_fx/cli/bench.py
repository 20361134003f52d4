"""Condensed against dense linear layers in PyTorch, on this machine.

Owns the measurement and its table; it must not know the kernels: it calls the public operator.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor

from srigl_fx.errors import SriglError
from srigl_fx.reports.text_tables import format_table
from srigl_fx.runtime.cpu.threads import torch_threads
from srigl_fx.runtime.value_types import NAMES, choice

Shape = tuple[int, int]
DEFAULT_SHAPES: tuple[Shape, ...] = ((768, 768), (768, 3072), (3072, 768), (4096, 4096))
SECONDS = 0.25  # for each comparison
LARGEST = 2**15  # inputs or outputs; a dense layer of that size takes 4 GiB


def parse_shape(text: str) -> Shape:
    """Read ``"768x3072"`` as (inputs, outputs).

    Raises:
        SriglError: If it is not two positive numbers with an x between them.

    Example:
        >>> parse_shape("768x3072")
        (768, 3072)
    """
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() and 0 < int(part) <= LARGEST for part in parts):
        raise SriglError(
            f"cannot read the shape {text!r}: write INPUTSxOUTPUTS, such as 768x3072, up to {LARGEST} each"
        )
    return int(parts[0]), int(parts[1])


def compare(
    shapes: Sequence[Shape],
    sparsities: Sequence[float],
    batches: Sequence[int],
    *,
    threads: int = 1,
    value_dtype: str = "float32",
) -> str:
    """A table of median times, dense and condensed in turns; slower cases are shown like all others.

    Args:
        shapes: Layers as (inputs, outputs).
        sparsities: Fractions removed, in [0, 1).
        batches: Rows of the input.
        threads: Threads of the dense layer.
        value_dtype: What the condensed layer stores its values in; the dense one is float32.

    Raises:
        SriglError: If a sparsity or a batch size is out of range, or there is no such dtype.

    Example:
        >>> print(compare([(64, 32)], [0.75], [1]).splitlines()[0].split())
        ['inputs', 'outputs', 'sparsity', 'batch', 'dense', 'us', 'condensed', 'us', 'dense', '/', 'condensed']
    """
    if not all(0 <= sparsity < 1 for sparsity in sparsities) or not all(batch >= 1 for batch in batches):
        raise SriglError("a sparsity must lie in [0, 1), such as 0.9, and a batch size must be at least 1")
    if value_dtype not in NAMES:
        raise SriglError(f"values are stored in {choice()}, not in {value_dtype!r}")
    rows = []
    with torch_threads(threads), torch.inference_mode():
        for inputs, outputs in shapes:
            for sparsity in sparsities:
                for batch in batches:
                    dense, condensed = _measure(inputs, outputs, sparsity, batch, value_dtype)
                    times = (f"{1e6 * dense:.1f}", f"{1e6 * condensed:.1f}", f"{dense / condensed:.2f}")
                    rows.append((inputs, outputs, f"{sparsity:.0%}", batch, *times))
    headers = ("inputs", "outputs", "sparsity", "batch", "dense us", "condensed us", "dense / condensed")
    note = (
        f"Median of one call; dense: torch on {threads} thread{'s' * (threads > 1)}; condensed: one thread, values in "
        f"{value_dtype}. "
        "Above 1, condensed is faster."
    )
    return format_table(headers, rows, right=range(len(headers))) + "\n" + note


def _measure(inputs: int, outputs: int, sparsity: float, batch: int, value_dtype: str) -> tuple[float, float]:
    import srigl_fx.runtime.ops  # noqa: F401 - registers torch.ops.srigl_fx
    from srigl_fx.passes.condense import values_of
    from srigl_fx.runtime.format import CondensedWeight, ValueDtype

    rng = np.random.default_rng(0)
    fan_in = max(1, round((1 - sparsity) * inputs))
    mask = np.zeros((outputs, inputs), np.bool_)
    np.put_along_axis(mask, rng.random(mask.shape).argpartition(fan_in - 1, axis=1)[:, :fan_in], True, axis=1)
    weight = (rng.standard_normal(mask.shape) * mask).astype(np.float32)
    dtype = cast("ValueDtype", value_dtype)
    condensed = CondensedWeight.from_dense(weight, mask, rng.standard_normal(outputs), dtype=dtype)

    x, dense, bias = torch.randn(batch, inputs), torch.from_numpy(weight), torch.from_numpy(condensed.bias)
    operands = [values_of(condensed), *map(torch.from_numpy, (condensed.indices, condensed.active))]
    scales = None if condensed.scales is None else torch.from_numpy(condensed.scales)
    return _medians(
        lambda: torch.nn.functional.linear(x, dense, bias),
        lambda: torch.ops.srigl_fx.condensed_linear(x, *operands, bias, inputs, scales=scales),
    )


def _medians(first: Callable[[], Tensor], second: Callable[[], Tensor]) -> tuple[float, float]:
    """Median seconds of a call of each, in turns of a few calls, so that a busy moment hits both alike."""
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(times[0]) < 20:
        for call, measured in zip((first, second), times, strict=True):
            call()
            for _ in range(5):
                started = time.perf_counter()
                call()
                measured.append(time.perf_counter() - started)
    return statistics.median(times[0]), statistics.median(times[1])
