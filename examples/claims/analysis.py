"""What the rows say: means with 95 % intervals, and the paper's claims as comparisons with a verdict.

Owns the statistics and the list of claims; it must not know files or figures. Runs of one seed share their order of
data, so two methods are compared by the differences within each seed.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from claims.results import Row
from claims.runs import METHODS, TASKS

Setting = tuple[str, float]  # a method at a sparsity
Verdict = Literal["holds", "does not hold", "undecided", "no data"]
MARGINS = {"accuracy": 1.0, "bits": 0.05}  # what counts as equal: percentage points, bits per character
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over ``count`` seeds; its 95 % t-interval reaches ``half_width`` to both sides, nan for one seed."""

    mean: float
    half_width: float
    count: int


class Results:
    """The rows by setting and seed."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows: dict[tuple[str, Setting], dict[int, Row]] = {}
        for row in rows:
            self._rows.setdefault((row.key.task, (row.key.method, row.key.sparsity)), {})[row.key.seed] = row

    def rows(self, task: str, setting: Setting) -> dict[int, Row]:
        """The rows of a setting by seed."""
        return self._rows.get((task, setting), {})

    def estimate(self, task: str, setting: Setting, column: str = "score") -> Estimate | None:
        """Mean of a column over the seeds there are; None if there are none."""
        return estimate([row.number(column) for row in self.rows(task, setting).values()])

    def difference(self, task: str, first: Setting, second: Setting, column: str = "score") -> Estimate | None:
        """Mean of first - second over the seeds both have; of scores, positive where the first is better."""
        one, other = self.rows(task, first), self.rows(task, second)
        sign = -1 if column == "score" and TASKS[task].bits else 1
        return estimate([sign * (one[seed].number(column) - other[seed].number(column)) for seed in one.keys() & other])


def estimate(values: Sequence[float]) -> Estimate | None:
    """Mean and Student's t-interval of ``values``; None if there are none.

    Example:
        >>> found = estimate([1.0, 2.0, 3.0])
        >>> f"{found.mean} ± {found.half_width:.4f}"
        '2.0 ± 2.4841'
    """
    if not values:
        return None
    count = len(values)
    if count == 1:
        return Estimate(values[0], math.nan, 1)
    from scipy.stats import t

    quantile = float(t.ppf((1 + LEVEL) / 2, count - 1))
    return Estimate(statistics.fmean(values), quantile * statistics.stdev(values) / math.sqrt(count), count)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """First against second: "more" (or better), "not less" (by more than the margin) or "equal" (within it)."""

    first: Setting
    second: Setting
    expected: Literal["more", "not less", "equal"]
    column: str = "score"

    def judge(self, results: Results, task: str) -> tuple[Verdict, Estimate | None]:
        """A verdict where the whole interval of the difference agrees, else undecided."""
        found = results.difference(task, self.first, self.second, self.column)
        if found is None or found.count < 2:
            return "no data", found
        low, high = found.mean - found.half_width, found.mean + found.half_width
        margin = MARGINS["bits" if TASKS[task].bits else "accuracy"]
        if self.expected == "equal":
            return _verdict(-margin <= low and high <= margin, high < -margin or low > margin), found
        if self.expected == "more":
            return _verdict(low > 0, high <= 0), found
        return _verdict(low >= -margin, high < -margin), found


def _verdict(holds: bool, fails: bool) -> Verdict:
    return "holds" if holds else "does not hold" if fails else "undecided"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One sentence of the paper, or of the work it builds on, and the comparisons that test it."""

    text: str
    comparisons: tuple[Comparison, ...]
    tasks: tuple[str, ...] = tuple(TASKS)

    def on(self, task: str) -> list[Comparison]:
        """The comparisons whose sparsities the task has."""
        known = {0.0, *TASKS[task].sparsities}
        if task not in self.tasks:
            return []
        return [one for one in self.comparisons if one.first[1] in known and one.second[1] in known]


def _at(
    sparsities: Sequence[float], first: str, expected: Literal["more", "not less", "equal"], second: str, **more: str
) -> tuple[Comparison, ...]:
    return tuple(
        Comparison(
            first=(first, sparsity),
            second=(second, sparsity if METHODS[second].trainer else 0.0),
            expected=expected,
            **more,
        )
        for sparsity in sparsities
    )


ALL = (0.8, 0.9, 0.95, 0.98, 0.99)
MODERATE, HIGH = (0.8, 0.9, 0.95), (0.98, 0.99)
CLAIMS = (
    Claim(
        text="SRigL is as good as the dense network at 80 and 90 %",
        comparisons=_at((0.8, 0.9), "srigl", "not less", "dense"),
    ),
    Claim(
        text="SRigL is as good as RigL up to 95 %",
        comparisons=_at(MODERATE, "srigl", "not less", "rigl"),
    ),
    Claim(
        text="SRigL is as good as RigL at 98 and 99 %",
        comparisons=_at(HIGH, "srigl", "not less", "rigl"),
    ),
    Claim(
        text="Without ablation SRigL falls behind RigL at 98 and 99 %",
        comparisons=_at(HIGH, "rigl", "more", "srigl_no_ablation"),
    ),
    Claim(
        text="Ablation makes SRigL better at 98 and 99 %",
        comparisons=_at(HIGH, "srigl", "more", "srigl_no_ablation"),
    ),
    Claim(
        text="In transformers ablation makes SRigL better at 80 and 90 % already",
        comparisons=_at((0.8, 0.9), "srigl", "more", "srigl_no_ablation"),
        tasks=("vit", "gpt"),
    ),
    Claim(
        text="Transformers need a high threshold: 0.95 is better than 0.3",
        comparisons=_at(ALL, "srigl", "more", "srigl_other_gamma"),
        tasks=("vit", "gpt"),
    ),
    Claim(
        text="For a CNN the threshold hardly matters: 0.3 and 0.95 are equally good",
        comparisons=_at(ALL, "srigl", "equal", "srigl_other_gamma"),
        tasks=("cnn",),
    ),
    Claim(text="SET is better than Static", comparisons=_at(ALL, "set", "more", "static")),
    Claim(text="RigL is better than SET", comparisons=_at(ALL, "rigl", "more", "set")),
    Claim(
        text="RigL empties neurons of its own accord: fewer have weights than under Static",
        comparisons=_at(HIGH, "static", "more", "rigl", column="active_share"),
    ),
    Claim(
        text="The sparser the network, the fewer neurons SRigL keeps",
        comparisons=tuple(
            Comparison(first=("srigl", low), second=("srigl", high), expected="more", column="active_share")
            for low, high in ((0.8, 0.95), (0.95, 0.99))
        ),
    ),
)
