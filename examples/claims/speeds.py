"""How fast layers whose neurons share their inputs are: the times of a benchmark, as ratios.

Owns the file that it reads; it must not know how the times were measured, or what is drawn of them. The file is a CSV
with at least the columns :data:`COLUMNS`, one row a layer, sparsity, batch and contender, in whatever order. Its
contender "dense" is the fastest dense one, and has group size 0.
"""

import csv
import math
from pathlib import Path

COLUMNS = ("layer", "sparsity", "batch", "group_size", "microseconds")
BATCH = 64


def read(path: Path) -> dict[tuple[float, int], float]:
    """How many times as fast as dense, by sparsity and group size, at batch 64: the geometric mean over the layers.

    Only layers that were measured in both ways count. Nothing where there is no such file.

    Raises:
        ValueError: The file lacks a column.
    """
    if not path.exists():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if lacking := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
            raise ValueError(f"{path} has no column {', '.join(lacking)}: measure anew")
        lines = [line for line in reader if int(line["batch"]) == BATCH]
    times = {
        (line["layer"], float(line["sparsity"]), int(line["group_size"])): float(line["microseconds"]) for line in lines
    }
    ratios: dict[tuple[float, int], list[float]] = {}
    for (layer, sparsity, size), microseconds in times.items():
        if size and (layer, sparsity, 0) in times:
            ratios.setdefault((sparsity, size), []).append(times[layer, sparsity, 0] / microseconds)
    return {place: math.exp(sum(map(math.log, found)) / len(found)) for place, found in ratios.items()}
