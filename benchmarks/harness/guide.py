"""How many times as fast int8 and bfloat16 are, by kind of layer, batch size and instruction set.

Owns two tables, of what was measured elsewhere: by ``peers.py``, and for the cost model. It must not measure.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from harness.cells import (
    DENSE,
    DENSE_INT8,
    OURS,
    OURS_BF16,
    OURS_INT8,
    OURS_ORT,
    Record,
    best,
    geometric_mean,
    group,
    read_csv,
)
from srigl_fx.runtime.costs.cost_model import Machine, Work, condensed
from srigl_fx.runtime.cpu.kernels.isa import TARGETS, level_of

SPARSITIES = (0.9, 0.95)
SAMPLES = (1, 16, 64)  # one, and those of the narrowest tile and a full one
# The layer that the cost model's factors were measured with, 10 % kept.
LAYER = Work(rows=768, fan_in=3072, active=768, kept=768 * 307, columns=1)
Cells = Sequence[Mapping[str, Record]]


def speeds(folder: Path) -> list[list[str]]:
    """A line for each kind of layer, sparsity and batch size: worst, mean and best over the layers measured.

    The columns are int8 over ours in float32, over dense int8, and over dense float32, then bfloat16 in ONNX Runtime
    over float32 there.

    Args:
        folder: With ``peers_int8.csv``, ``peers_int8_conv.csv`` and ``peers_bf16.csv``.
    """
    lines = []
    for kind, sparsity, batch, cells in _kinds(folder, ("int8", "int8_conv")):
        halves = [
            found for _, *where, found in _kinds(folder, ("bf16",)) if kind == "linear" and where == [sparsity, batch]
        ]
        lines.append(
            [
                kind,
                f"{sparsity:.0%}",
                str(batch),
                *(_gains(cells, slow, OURS_INT8) for slow in (OURS, DENSE_INT8, DENSE)),
                *((_gains(found, (OURS_ORT,), OURS_BF16[1:]) for found in halves) if halves else ("",)),
            ]
        )
    return lines


def _kinds(folder: Path, sections: Iterable[str]) -> Iterator[tuple[str, float, int, Cells]]:
    for section in sections:
        cells = group(read_csv(folder / f"peers_{section}.csv"))
        found: dict[tuple[str, float, int], list[Mapping[str, Record]]] = {}
        for (_, layer, sparsity, batch, _), records in cells.items():
            kind = f"convolution, {layer.split()[0]}" if section == "int8_conv" else "linear"
            if sparsity in SPARSITIES:
                found.setdefault((kind, sparsity, batch), []).append(records)
        for key in sorted(found, key=lambda key: (key[0] != "linear", *key)):
            yield *key, found[key]


def _gains(cells: Cells, slow: Sequence[str], fast: Sequence[str]) -> str:
    """The worst, the geometric mean and the best gain of the faster contenders over the slower ones."""
    gains = [gain for cell in cells if not math.isnan(gain := best(cell, slow) / best(cell, fast))]
    return f"{min(gains):.2f}x, {geometric_mean(gains):.2f}x, {max(gains):.2f}x" if gains else ""


def instruction_sets() -> list[list[str]]:
    """A line for each instruction set: how many times as fast as float32 the kernels of int8 were measured there.

    These are the factors of the cost model, calls and the layout of activations left out.
    """
    lines = []
    for position, name in enumerate(TARGETS):
        kernels = Machine(
            target=position,
            level=level_of(name),
            condensed_call=0.0,
            move_rate=math.inf,
            bandwidth=math.inf,
        )
        floats, rounded = (
            [condensed(replace(work, columns=samples), kernels) for samples in SAMPLES]
            for work in (LAYER, replace(LAYER, value_bytes=1, eight_bits=True))
        )
        lines.append([f"`{name}`", *(f"{one / other:.2f}x" for one, other in zip(floats, rounded, strict=True))])
    return lines
