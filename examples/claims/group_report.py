"""The page on group sizes: tables as Markdown, filled into its marked parts, and the figure.

Owns what is generated of that page; the words around it are the page's own.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from claims import figures, speeds
from claims.analysis import MARGINS, Estimate, estimate
from claims.groups import GROUP_SIZES, SPARSITIES, Row, plan
from claims.report import fill, marked, shown, table
from claims.runs import TASKS, Task

Speeds = Mapping[tuple[float, int], float]
SPEEDS = Path("benchmarks/results/group_sizes.csv")
PAGE = "group-size.md"
FIGURE = "groups.svg"
COLOURS = {0.8: "tab:blue", 0.9: "tab:orange", 0.95: "tab:red"}


def write(rows: Sequence[Row], folder: Path, speed_file: Path = SPEEDS) -> None:
    """Draw the figure into ``folder`` and fill the page beside it; it is made if there is none."""
    found = speeds.read(speed_file)
    folder.mkdir(parents=True, exist_ok=True)
    draw(rows, found, folder / FIGURE)
    parts = parts_of_page(rows, found)
    page = folder.parent / PAGE
    text = page.read_text(encoding="utf-8") if page.exists() else "\n\n".join(map(marked, parts.items())) + "\n"
    page.write_text(fill(text, parts), encoding="utf-8")


def parts_of_page(rows: Sequence[Row], measured: Speeds) -> dict[str, str]:
    """The generated parts by name."""
    planned = set(plan())
    hours = sum(row.cpu_seconds for row in rows) / 3600
    done = len({row.key for row in rows} & planned)
    return {
        "group_progress": f"{done} of {len(planned)} runs are in, {hours:.1f} hours of one core.",
        "group_answers": _answers(rows),
        "group_scores": "\n\n".join(_scores(rows, name) for name in TASKS),
        "group_prices": "\n\n".join(_prices(rows, name) for name in TASKS),
        "group_speeds": _speeds(measured),
    }


def score(rows: Sequence[Row], task: str, sparsity: float, size: int) -> Estimate | None:
    """The mean score over the seeds there are; None if there are none."""
    return estimate([*_by_seed(rows, task, sparsity, size).values()])


def price(rows: Sequence[Row], task: str, sparsity: float, size: int) -> Estimate | None:
    """What groups of this size lose against neurons by themselves, within each seed; negative where they gain."""
    alone, together = _by_seed(rows, task, sparsity, 1), _by_seed(rows, task, sparsity, size)
    sign = -1 if TASKS[task].bits else 1
    return estimate([sign * (alone[seed] - together[seed]) for seed in sorted(alone.keys() & together)])


def largest_as_good(rows: Sequence[Row], task: str, sparsity: float) -> int | None:
    """The largest size up to which the whole interval of each price lies below the margin; None before two seeds.

    The margin is what counts as equal on the page of claims: one point of accuracy, 0.05 bits.
    """
    margin, best = MARGINS["bits" if TASKS[task].bits else "accuracy"], 1
    for size in GROUP_SIZES[1:]:
        found = price(rows, task, sparsity, size)
        if found is None or found.count < 2:
            return None if size == GROUP_SIZES[1] else best
        if found.mean + found.half_width > margin:
            return best
        best = size
    return best


def _by_seed(rows: Sequence[Row], task: str, sparsity: float, size: int) -> dict[int, float]:
    wanted = (task, sparsity, size)
    return {row.key.seed: row.score for row in rows if (row.key.task, row.key.sparsity, row.key.group_size) == wanted}


def _answers(rows: Sequence[Row]) -> str:
    lines = [[task.title, *(str(largest_as_good(rows, name, s) or "-") for s in SPARSITIES)] for name, task in _tasks()]
    return table(["", *_percent()], lines)


def _scores(rows: Sequence[Row], name: str) -> str:
    task = TASKS[name]
    lines = [
        [str(size), *(shown(score(rows, name, sparsity, size), 1, _digits(task)) for sparsity in SPARSITIES)]
        for size in GROUP_SIZES
    ]
    return f"**{task.title}**: {task.unit}\n\n" + table(["group size", *_percent()], lines)


def _prices(rows: Sequence[Row], name: str) -> str:
    task = TASKS[name]
    lines = [
        [str(size), *(shown(price(rows, name, sparsity, size), 1, _digits(task)) for sparsity in SPARSITIES)]
        for size in GROUP_SIZES[1:]
    ]
    unit = "bits more" if task.bits else "points less"
    return f"**{task.title}**: {unit} than with groups of 1\n\n" + table(["group size", *_percent()], lines)


def _speeds(measured: Speeds) -> str:
    if not measured:
        return "Not measured yet."
    sizes = sorted({size for _, size in measured})
    lines = [
        [str(size), *(f"{measured[s, size]:.2f}x" if (s, size) in measured else "-" for s in SPARSITIES)]
        for size in sizes
    ]
    return table(["group size", *_percent()], lines)


def draw(rows: Sequence[Row], measured: Speeds, path: Path) -> None:
    """Score against speed, a panel a task and a line a sparsity; against the group size where no speed is known."""
    figure, panels = figures.row_of_panels(height=4.2)
    for panel, (name, task) in zip(panels, _tasks(), strict=True):
        for order, sparsity in enumerate(SPARSITIES):
            _line(panel, rows, measured, name, sparsity, 0.04 * (order - 1))
        if measured:
            panel.set(xlabel=f"times as fast as dense, batch {speeds.BATCH}, float32 (points: group sizes)")
        else:
            panel.set_xticks(range(len(GROUP_SIZES)), map(str, GROUP_SIZES))
            panel.set(xlabel="group size")
        panel.set(title=task.title, ylabel=task.unit)
    figures.legend(panels, title="sparsity", title_fontsize=7)
    figures.save(figure, path)


def _line(panel: Any, rows: Sequence[Row], measured: Speeds, name: str, sparsity: float, offset: float) -> None:
    """One line of a panel; beside one another where several would lie at the same place."""
    points: list[tuple[float, Estimate, int]] = []
    for place, size in enumerate(GROUP_SIZES):
        found = score(rows, name, sparsity, size)
        if found and (not measured or (sparsity, size) in measured):
            points.append((measured[sparsity, size] if measured else place + offset, found, size))
    if not points:
        return
    panel.errorbar(
        [x for x, _, _ in points],
        [found.mean for _, found, _ in points],
        yerr=[0 if found.count == 1 else found.half_width for _, found, _ in points],
        color=COLOURS[sparsity],
        marker="o",
        markersize=3,
        linewidth=1.2,
        capsize=2,
        label=f"{sparsity:.0%}",
    )
    if measured:
        for x, found, size in points:
            panel.annotate(str(size), (x, found.mean), xytext=(3, 3), textcoords="offset points", fontsize=7)


def _tasks() -> list[tuple[str, Task]]:
    return [*TASKS.items()]


def _percent() -> list[str]:
    return [f"{sparsity:.0%}" for sparsity in SPARSITIES]


def _digits(task: Task) -> int:
    return 3 if task.bits else 1
