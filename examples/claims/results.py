"""The file of results: one row a finished run, safe to be killed at any moment.

Owns the CSV and which runs it still lacks; it must not know what the numbers mean.
"""

import csv
import io
import os
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path

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
    """The finished runs in ``path``, without a last line that was cut off; none where there is no such file."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    rows = []
    for line in csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])):
        key = Key(int(line["seed"]), line["task"], line["method"], float(line["sparsity"]), int(line["steps"]))
        rows.append(Row(key, line))
    return rows


def append(path: Path, key: Key, values: Mapping[str, object]) -> None:
    """Write the row of a finished run in one piece, and see it on the disk; a line cut off before is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    with path.open("a+b") as file:
        file.seek(0)
        end = file.read().rfind(b"\n") + 1
        file.truncate(end)
        if end == 0:
            writer.writerow(COLUMNS)
        writer.writerow([*astuple(key), *(values[column] for column in COLUMNS[5:])])
        file.write(text.getvalue().encode())
        file.flush()
        os.fsync(file.fileno())
