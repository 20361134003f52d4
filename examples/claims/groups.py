"""What sharing inputs costs: the runs with groups of several sizes, and their file.

Owns which runs there are, and the columns of their rows; it must not know tables or figures. All of them are SRigL
without ablation, whose masks differ in nothing but the size of the groups. Runs of one seed share their initialisation
and their order of data, so sizes are compared within each seed.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from claims import rows, runs

METHOD = "srigl_no_ablation"
GROUP_SIZES = (1, 2, 4, 8, 16)
SPARSITIES = (0.8, 0.9, 0.95)
COLUMNS = ("seed", "task", "sparsity", "group_size", "steps", "score", "sparsity_all", "train_cpu_seconds")


@dataclass(frozen=True, order=True)
class Key:
    """What tells one run from another."""

    seed: int
    task: str
    sparsity: float
    group_size: int
    steps: int


@dataclass(frozen=True)
class Row:
    """A finished run: its score, the sparsity that all of its weights have, and the seconds that it trained."""

    key: Key
    score: float
    sparsity_all: float
    cpu_seconds: float


def plan(
    tasks: Iterable[str] = tuple(runs.TASKS),
    sparsities: Iterable[float] | None = None,
    group_sizes: Iterable[int] = GROUP_SIZES,
    seeds: int | None = None,
    steps_scale: float = 1.0,
) -> list[Key]:
    """The runs to do, seed by seed, so that few results already span everything."""
    tasks, group_sizes = tuple(tasks), tuple(group_sizes)
    wanted = SPARSITIES if sparsities is None else [one for one in SPARSITIES if one in set(sparsities)]
    most = max(runs.TASKS[name].seeds for name in tasks)
    return [
        Key(seed, name, sparsity, size, max(4, round(runs.TASKS[name].steps * steps_scale)))
        for seed in range(most if seeds is None else min(seeds, most))
        for name in tasks
        if seed < runs.TASKS[name].seeds
        for sparsity in wanted
        for size in group_sizes
    ]


def execute(key: Key) -> dict[str, object]:
    """Train and test one network; the other columns of a row by name."""
    row = runs.execute(runs.Key(key.seed, key.task, METHOD, key.sparsity, key.steps), key.group_size)
    return {name: row[name] for name in COLUMNS if name in row}


def read(path: Path) -> list[Row]:
    """The finished runs in ``path``, without a last line that was cut off; none where there is no such file.

    Raises:
        ValueError: The file is damaged; the message names the line.
    """
    return [*rows.read(path, COLUMNS, _parsed).values()]


def _parsed(line: dict[str, str]) -> tuple[Key, Row]:
    if line["task"] not in runs.TASKS:
        raise ValueError(f"no task is called {line['task']!r}")
    numbers = float(line["sparsity"]), int(line["group_size"]), int(line["steps"])
    key = Key(int(line["seed"]), line["task"], *numbers)
    return key, Row(key, float(line["score"]), float(line["sparsity_all"]), float(line["train_cpu_seconds"]))


def append(path: Path, key: Key, values: dict[str, object]) -> None:
    """Write the row of a finished run in one piece, and see it on the disk; a line cut off before is removed."""
    rows.append(path, COLUMNS, {**asdict(key), **values})
