"""The coverage table: what came of every model of the zoo, as a committed file and as the documentation shows it.

Owns the row, its file and its two printed forms. It must not know how a model is tested.
"""

import csv
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from srigl_fx.reports.text_tables import format_table

FILE = Path(__file__).with_name("coverage.csv")


@dataclass(frozen=True, kw_only=True)
class Row:
    """What came of one model.

    Attributes:
        model: Its name.
        family: Where it comes from.
        weights: Weights that the library lists.
        sparse: Those made sparse.
        dense: The others, counted by reason.
        gradients: In which mode it was trained.
        capture: How the graph was captured.
        regions: Graphs it was captured as; 1 where it is whole.
        condensed: Sparse weights that became condensed operators.
        not_condensed: The other sparse weights, counted by reason.
        ablated: Neurons without weights.
        removed: Neurons that lowering took out of the graph.
        onnx: "whole", or how many of the regions were exported, and why not the others.
    """

    model: str
    family: str
    weights: int
    sparse: int
    dense: str
    gradients: str
    capture: str
    regions: int
    condensed: int
    not_condensed: str
    ablated: int
    removed: int
    onnx: str


def read(path: Path = FILE) -> dict[str, Row]:
    """The rows of the file, by model."""
    numbers = {field.name for field in fields(Row) if field.type in (int, "int")}

    def row(cells: dict[str, str]) -> Row:
        values: dict[str, Any] = {name: int(cell) if name in numbers else cell for name, cell in cells.items()}
        return Row(**values)

    with path.open(newline="", encoding="utf-8") as lines:
        return {cells["model"]: row(cells) for cells in csv.DictReader(lines)}


def write(rows: Sequence[Row], path: Path = FILE) -> None:
    """Write the file anew."""
    with path.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(asdict, rows))


_HEADERS = ("model", "weights", "sparse", "condensed", "graphs", "ablated", "removed", "ONNX")


def _cells(row: Row) -> tuple[object, ...]:
    dynamic = "" if "dynamic" in row.capture or row.regions > 1 else ", static batch"
    graphs = f"{row.regions} regions" if row.regions > 1 else "whole" + dynamic
    return (row.model, row.weights, row.sparse, row.condensed, graphs, row.ablated, row.removed, row.onnx)


def text(rows: Sequence[Row]) -> str:
    """The table for a terminal."""
    return format_table(_HEADERS, [_cells(row) for row in rows], right=(1, 2, 3, 5, 6))


def markdown(rows: Sequence[Row]) -> str:
    """The table for the documentation, and one of the reasons why weights stay dense."""
    reasons = _reasons([row.dense for row in rows]), _reasons([row.not_condensed for row in rows])
    why = [(stage, *counted) for stage, found in zip(("sparsify", "lower"), reasons, strict=True) for counted in found]
    models = _markdown_table(_HEADERS, "-rrr-rr-", map(_cells, rows))
    return models + "\n\n" + _markdown_table(("stage", "weights", "models", "why dense"), "-rr-", why)


def _reasons(cells: Sequence[str]) -> list[tuple[int, int, str]]:
    """Weights, models and reason, from cells like "3 x a | 1 x b"."""
    weights: Counter[str] = Counter()
    models: Counter[str] = Counter()
    for cell in filter(None, cells):
        for part in cell.split(" | "):
            times, _, reason = part.partition(" x ")
            reason = re.sub(r" of [\d.]+ of \d+ inputs", " times the inputs", reason)
            weights[reason] += int(times)
            models[reason] += 1
    return [(count, models[reason], reason) for reason, count in weights.most_common()]


def _markdown_table(headers: Sequence[str], align: str, rows: Iterable[Sequence[object]]) -> str:
    rule = ["---:" if side == "r" else "---" for side in align]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in (headers, rule, *rows))
