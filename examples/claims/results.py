"""The results of the paper's claims: a run's row, and which runs the file still lacks.

It must not know what the numbers mean, or how the file is kept (``rows.py``).
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from claims import rows
from claims.runs import METHODS, TASKS, Key

COLUMNS = (
    "seed",
    "task",
    "method",
    "sparsity",
    "steps",
    "score",
    "sparsity_masked",
    "sparsity_all",
    "active_share",
    "itop",
    "train_flops",
    "train_cpu_seconds",
    "layers",
)


@dataclass(frozen=True)
class Row:
    """A finished run: its key, and the other columns as text."""

    key: Key
    values: Mapping[str, str]

    def number(self, column: str) -> float:
        """A column as a number."""
        return float(self.values[column])


def plan(
    tasks: Iterable[str] = tuple(TASKS),
    methods: Iterable[str] = tuple(METHODS),
    sparsities: Iterable[float] | None = None,
    seeds: int | None = None,
    steps_scale: float = 1.0,
) -> list[Key]:
    """The runs to do, seed by seed, so that few results already span everything; a dense run serves all sparsities."""
    methods = tuple(methods)
    keys = set()
    for name in tasks:
        task = TASKS[name]
        wanted = task.sparsities if sparsities is None else [s for s in sparsities if s in task.sparsities]
        for seed in range(task.seeds if seeds is None else min(seeds, task.seeds)):
            for method in methods:
                for sparsity in wanted if METHODS[method].trainer else (0.0,):
                    keys.add(Key(seed, name, method, sparsity, max(4, round(task.steps * steps_scale))))
    order = {name: position for position, name in enumerate((*TASKS, *METHODS))}
    return sorted(keys, key=lambda key: (key.seed, order[key.task], key.sparsity, order[key.method]))


def read(path: Path) -> list[Row]:
    """The finished runs in ``path``, without a last line that was cut off; none where there is no such file.

    Raises:
        ValueError: The file is damaged; the message names the line.
    """
    return [*rows.read(path, COLUMNS, _parsed).values()]


def _parsed(line: dict[str, str]) -> tuple[Key, Row]:
    key = Key(int(line["seed"]), line["task"], line["method"], float(line["sparsity"]), int(line["steps"]))
    return key, Row(key, line)


def append(path: Path, key: Key, values: Mapping[str, object]) -> None:
    """Write the row of a finished run in one piece, and see it on the disk; a line cut off before is removed."""
    rows.append(path, COLUMNS, {**asdict(key), **values})
