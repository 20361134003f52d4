"""What is aimed at, and whether it is met: the bars as data, and the comparison with what was measured.

Owns the bars. It must not know how figures are measured or drawn.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from harness.cells import (
    CSR_TORCH,
    DEEPSPARSE,
    DENSE,
    ORT_DENSE,
    OURS,
    OURS_BF16,
    Cell,
    Record,
    best,
    geometric_mean,
    group,
)

# Over the faster dense, by batch and sparsity.
LINEAR_BARS = {
    1: {0.8: 3.5, 0.9: 5.0, 0.95: 8.0, 0.99: 15.0},
    16: {0.8: 2.5, 0.9: 4.5, 0.95: 7.0, 0.99: 15.0},
    64: {0.8: 2.8, 0.9: 4.8, 0.95: 8.0, 0.99: 16.0},
    256: {0.8: 3.0, 0.9: 5.0, 0.95: 9.0, 0.99: 18.0},
    2048: {0.8: 3.0, 0.9: 5.0, 0.95: 9.0, 0.99: 18.0},
}
DEEPSPARSE_BAR = 1.5
CSR_BARS = {1: 4.0, 256: 10.0}  # at 90 %
CONV_MEAN_BAR, CONV_WORST_BAR, CONV_DEEPSPARSE_BAR = 4.5, 2.5, 1.3
BF16_BARS = {0.9: 6.0, 0.95: 10.0}  # at batch 1
TRAIN_BAR = 3.0
THREADS_BAR = 1.7

Cells = dict[Cell, dict[str, Record]]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One bar: what is aimed at, what was measured, and where."""

    bar: str
    target: float
    measured: float
    where: str = ""

    @property
    def verdict(self) -> str:
        if math.isnan(self.measured):
            return "not measured"
        if self.measured >= self.target:
            return "met"
        return f"missed by {1 - self.measured / self.target:.0%}"


def ratio(cell: dict[str, Record], slower: Sequence[str], faster: Sequence[str]) -> float:
    """How many times faster the best of ``faster`` is than the best of ``slower``; NaN where either did not run."""
    return best(cell, slower) / best(cell, faster)


def outcomes(records: Iterable[Record]) -> list[Outcome]:
    """All bars that the records say something about, in one order."""
    cells = group(records)
    by_section: dict[str, Cells] = {}
    for key, cell in cells.items():
        by_section.setdefault(key[0], {})[key] = cell
    found: list[Outcome] = []
    for section, judge in _JUDGES:
        if section in by_section:
            found += judge(by_section[section])
    return found


def _worst(bar: str, target: float, ratios: dict[str, float]) -> Outcome:
    """The bar for every cell: the worst of them decides."""
    measured = {where: value for where, value in ratios.items() if not math.isnan(value)}
    if not measured:
        return Outcome(bar=bar, target=target, measured=math.nan)
    where = min(measured, key=measured.__getitem__)
    met = sum(value >= target for value in measured.values())
    return Outcome(bar=bar, target=target, measured=measured[where], where=f"worst at {where}; {met}/{len(measured)} met")


def _linear(cells: Cells) -> list[Outcome]:
    found = []
    for batch, targets in LINEAR_BARS.items():
        for sparsity, target in targets.items():
            chosen = {
                layer: ratio(cell, DENSE, OURS)
                for (_, layer, at, size, _), cell in cells.items()
                if (at, size) == (sparsity, batch)
            }
            if chosen:
                found.append(_worst(f"linear, batch {batch}, {sparsity:.0%}, over dense", target, chosen))
    peer = {
        f"{layer}, {at:.0%}, batch {size}": ratio(cell, [DEEPSPARSE], OURS)
        for (_, layer, at, size, _), cell in cells.items()
    }
    found.append(_worst("linear, every cell, over DeepSparse", DEEPSPARSE_BAR, peer))
    for batch, target in CSR_BARS.items():
        chosen = {
            layer: ratio(cell, [CSR_TORCH], OURS)
            for (_, layer, at, size, _), cell in cells.items()
            if (at, size) == (0.9, batch)
        }
        if chosen:
            found.append(_worst(f"linear, batch {batch}, 90%, over torch CSR", target, chosen))
    return found


def _conv(cells: Cells) -> list[Outcome]:
    dense = {f"{key[1]}, batch {key[3]}": ratio(cell, [ORT_DENSE], OURS) for key, cell in cells.items()}
    peer = {f"{key[1]}, batch {key[3]}": ratio(cell, [DEEPSPARSE], OURS) for key, cell in cells.items()}
    found = [
        Outcome(
            bar="convolution, geometric mean, over ORT dense",
            target=CONV_MEAN_BAR,
            measured=geometric_mean(dense.values()),
            where=f"{len(dense)} cells",
        ),
        Outcome(
            bar="convolution, geometric mean, over DeepSparse",
            target=CONV_DEEPSPARSE_BAR,
            measured=geometric_mean(peer.values()),
            where=f"{sum(not math.isnan(value) for value in peer.values())} cells",
        ),
        _worst("convolution, every cell, over ORT dense", CONV_WORST_BAR, dense),
    ]
    return found


def _bf16(cells: Cells) -> list[Outcome]:
    found = []
    for sparsity, target in BF16_BARS.items():
        chosen = {key[1]: ratio(cell, DENSE, OURS_BF16) for key, cell in cells.items() if key[2:4] == (sparsity, 1)}
        if chosen:
            found.append(_worst(f"linear, bf16 values, batch 1, {sparsity:.0%}, over dense", target, chosen))
    return found


def _train(cells: Cells) -> list[Outcome]:
    steps = {key[1]: ratio(cell, ["dense step"], ["sparse step"]) for key, cell in cells.items()}
    return [_worst("training step, batch 256, 95%, over the dense step", TRAIN_BAR, steps)]


def _threads(cells: Cells) -> list[Outcome]:
    ratios = {}
    for (section, layer, sparsity, batch, threads), cell in cells.items():
        if threads == 1 and (section, layer, sparsity, batch, 2) in cells:
            twice = cells[section, layer, sparsity, batch, 2]
            for name in OURS:
                ratios[f"{name}, {layer}, {sparsity:.0%}, batch {batch}"] = best(cell, [name]) / best(twice, [name])
    return [_worst("two threads over one, batch 16 and more", THREADS_BAR, ratios)]


_JUDGES = (("linear", _linear), ("conv", _conv), ("bf16", _bf16), ("train", _train), ("threads", _threads))
