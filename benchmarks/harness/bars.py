"""What is aimed at, and whether it is met: the bars as data, and the comparison with what was measured.

Owns the bars. It must not know how figures are measured or drawn.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from harness.cells import (
    CSR_TORCH,
    DEEPSPARSE,
    DENSE,
    DENSE_STEP,
    ORT_DENSE,
    ORT_INT8,
    OURS,
    OURS_BF16,
    OURS_INT8,
    SPARSE_STEP,
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
# Of ours in int8 over dense int8, and over ours in float32, by batch and sparsity; 4096 -> 4096 at batch 1 is 3.
INT8_BARS = {
    0.9: {1: 2.0, 16: 2.2, 64: 3.0, 256: 3.0, 2048: 3.0},
    0.95: {1: 3.0, 16: 3.5, 64: 5.0, 256: 5.0, 2048: 5.0},
}
INT8_WIDE, INT8_WIDE_BAR = "4096 -> 4096", 3.0
INT8_OVER_OURS_BARS = {1: 1.4, 16: 2.0, 64: 2.8, 256: 2.8, 2048: 2.8}  # at 90 %
INT8_CONV_BAR = 2.0  # geometric mean over QDQ, by batch
INT8_MODEL_BAR, INT8_MODEL_OVER_OURS_BAR = 2.0, 1.6
TRAIN_BAR = 3.0
THREADS_BAR = 1.7

Cells = dict[Cell, dict[str, Record]]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One bar: what is aimed at, what was measured, and where.

    Attributes:
        bar: In words.
        target: How many times faster ours is to be.
        measured: How many times faster it is; in the worst cell, where the bar is one for every cell.
        where: That cell, in words.
        cell: That cell.
        microseconds: Of ours in that cell.
    """

    bar: str
    target: float
    measured: float
    where: str = ""
    cell: Cell | None = None
    microseconds: float = math.nan

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


def _worst(bar: str, target: float, cells: Cells, slower: Sequence[str], faster: Sequence[str] = OURS) -> list[Outcome]:
    """The bar for every cell: the worst of them decides. Nothing where there are no cells."""
    if not cells:
        return []
    ratios = {key: ratio(cell, slower, faster) for key, cell in cells.items()}
    measured = {key: value for key, value in ratios.items() if not math.isnan(value)}
    if not measured:
        return [Outcome(bar=bar, target=target, measured=math.nan)]
    key = min(measured, key=measured.__getitem__)
    _, layer, sparsity, batch, _ = key
    met = sum(value >= target for value in measured.values())
    return [
        Outcome(
            bar=bar,
            target=target,
            measured=measured[key],
            where=f"worst at {layer}, {sparsity:.0%}, batch {batch}; {met} of {len(measured)} met",
            cell=key,
            microseconds=best(cells[key], faster),
        )
    ]


def _at(cells: Cells, sparsity: float, batch: int) -> Cells:
    return {key: cell for key, cell in cells.items() if key[2:4] == (sparsity, batch)}


def _linear(cells: Cells) -> list[Outcome]:
    found = []
    for batch, targets in LINEAR_BARS.items():
        for sparsity, target in targets.items():
            bar = f"linear, batch {batch}, {sparsity:.0%}, over dense"
            found += _worst(bar, target, _at(cells, sparsity, batch), DENSE)
    found += _worst("linear, every cell, over DeepSparse", DEEPSPARSE_BAR, cells, [DEEPSPARSE])
    for batch, target in CSR_BARS.items():
        found += _worst(f"linear, batch {batch}, 90%, over torch CSR", target, _at(cells, 0.9, batch), [CSR_TORCH])
    return found


def _conv(cells: Cells) -> list[Outcome]:
    found = []
    for peer, target in ((ORT_DENSE, CONV_MEAN_BAR), (DEEPSPARSE, CONV_DEEPSPARSE_BAR)):
        ratios = [value for cell in cells.values() if not math.isnan(value := ratio(cell, [peer], OURS))]
        bar, mean = f"convolution, geometric mean, over {peer}", geometric_mean(ratios)
        found.append(Outcome(bar=bar, target=target, measured=mean, where=f"{len(ratios)} cells"))
    return found + _worst("convolution, every cell, over ORT dense", CONV_WORST_BAR, cells, [ORT_DENSE])


def _bf16(cells: Cells) -> list[Outcome]:
    found = []
    for sparsity, target in BF16_BARS.items():
        bar = f"linear, bf16 values, batch 1, {sparsity:.0%}, over dense"
        found += _worst(bar, target, _at(cells, sparsity, 1), DENSE, OURS_BF16)
    return found


def _int8(cells: Cells) -> list[Outcome]:
    found = []
    for sparsity, targets in INT8_BARS.items():
        for batch, target in targets.items():
            bar = f"linear, int8, batch {batch}, {sparsity:.0%}, over {ORT_INT8}"
            found += _worst(bar, target, _at(cells, sparsity, batch), [ORT_INT8], OURS_INT8)
    wide = {key: cell for key, cell in _at(cells, 0.9, 1).items() if key[1] == INT8_WIDE}
    found += _worst(
        f"linear, int8, {INT8_WIDE}, batch 1, 90%, over {ORT_INT8}", INT8_WIDE_BAR, wide, [ORT_INT8], OURS_INT8
    )
    for batch, target in INT8_OVER_OURS_BARS.items():
        bar = f"linear, int8, batch {batch}, 90%, over ours in float32"
        found += _worst(bar, target, _at(cells, 0.9, batch), OURS, OURS_INT8)
    return found


def _int8_conv(cells: Cells) -> list[Outcome]:
    found = []
    for batch in sorted({key[3] for key in cells}):
        of_batch = [cell for key, cell in cells.items() if key[3] == batch]
        ratios = [value for cell in of_batch if not math.isnan(value := ratio(cell, [ORT_INT8], OURS_INT8))]
        bar, mean = f"convolution, int8, batch {batch}, geometric mean, over {ORT_INT8}", geometric_mean(ratios)
        found.append(Outcome(bar=bar, target=INT8_CONV_BAR, measured=mean, where=f"{len(ratios)} cells"))
    return found


def _models(cells: Cells) -> list[Outcome]:
    found = []
    for key, cell in cells.items():
        where = f"{key[1]}, batch {key[3]}"
        for rival, names, target in (
            (ORT_INT8, (ORT_INT8,), INT8_MODEL_BAR),
            ("ours in float32", OURS, INT8_MODEL_OVER_OURS_BAR),
        ):
            if not math.isnan(measured := ratio(cell, names, OURS_INT8)):
                bar = f"whole model, int8, over {rival}"
                found.append(Outcome(bar=bar, target=target, measured=measured, where=where))
    return found


def _train(cells: Cells) -> list[Outcome]:
    bar = "training step, 95%, batch 256, over the dense step"
    return _worst(bar, TRAIN_BAR, cells, [DENSE_STEP], [SPARSE_STEP])


def _threads(cells: Cells) -> list[Outcome]:
    """Each of ours against itself: one thread stands for the slower, two for the faster contender."""
    found = []
    for name in OURS:
        pairs: Cells = {}
        for key, cell in cells.items():
            twice = cells.get((*key[:4], 2), {})
            if key[3] >= 16 and key[4] == 1 and name in cell and name in twice:
                pairs[key] = {"one": cell[name], "two": twice[name]}
        bar = f"{name}, two threads over one, batch 16 and more"
        # The limits are those of one thread.
        found += [replace(one, cell=None) for one in _worst(bar, THREADS_BAR, pairs, ["one"], ["two"])]
    return found


_JUDGES = (
    ("linear", _linear),
    ("conv", _conv),
    ("bf16", _bf16),
    ("int8", _int8),
    ("int8_conv", _int8_conv),
    ("train", _train),
    ("threads", _threads),
    ("models", _models),
)
