"""Records as text: the lines printed while measuring, Markdown tables with every cell, and the table of bars.

Owns the wording and the layout of figures. It must not know how they were measured.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

from harness.bars import LINEAR_BARS, Outcome
from harness.cells import DEEPSPARSE, DENSE, OURS, OURS_BF16, Record, best, group

# The limit of a cell in seconds: (bytes moved, multiply-adds) to the time of the machine at its ceilings.
Limit = dict[tuple[str, str, float, int, int], tuple[float, str]]


def microseconds(time: float) -> str:
    """Three digits.

    Example:
        >>> microseconds(3.14159), microseconds(1234.5), microseconds(math.nan)
        ('3.14', '1234', '-')
    """
    if math.isnan(time):
        return "-"
    return f"{time:.2f}" if time < 10 else f"{time:.1f}" if time < 100 else f"{time:.0f}"


def times_faster(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}x" if value < 10 else f"{value:.1f}x"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell_line(records: Sequence[Record]) -> str:
    """One cell in one line of text: the time of each contender, and how much faster than dense it is."""
    cell = {record.contender: record for record in records}
    first = records[0]
    dense = best(cell, [name for name in ("dense step", *DENSE) if name in cell])
    figures = [
        f"{name} {microseconds(record.microseconds)}"
        + (f" ({times_faster(dense / record.microseconds)})" if not math.isnan(record.microseconds) else "")
        for name, record in cell.items()
    ]
    ours = best(cell, (*OURS, *OURS_BF16, "sparse step"))
    bar = LINEAR_BARS.get(first.batch, {}).get(first.sparsity) if first.section == "linear" else None
    aim = f" [bar {bar:g}x: {'met' if dense / ours >= bar else 'missed'}]" if bar else ""
    return f"{first.layer}, {first.sparsity:.0%}, batch {first.batch}: ours {times_faster(dense / ours)}{aim} | " + ", ".join(
        figures
    )


def cells_table(records: Sequence[Record], limits: Mapping[tuple[object, ...], tuple[float, str]] | None = None) -> str:
    """Every cell: microseconds of each contender; our better one over the faster dense and over DeepSparse.

    Args:
        records: Of one section.
        limits: By cell, the microseconds below which the machine cannot go, and what limits it.
    """
    cells = group(records)
    names = list(dict.fromkeys(record.contender for record in records))
    header = ["layer", "sparsity", "batch", "threads", *(f"{name}, µs" for name in names), "ours / dense", "ours / DeepSparse"]
    if limits:
        header += ["limit, µs", "measured / limit", "limited by"]
    rows = []
    for key, cell in cells.items():
        _, layer, sparsity, batch, threads = key
        ours = best(cell, (*OURS, *OURS_BF16, "sparse step"))
        row = [layer, f"{sparsity:.0%}", str(batch), str(threads)]
        row += [microseconds(cell[name].microseconds) if name in cell else "-" for name in names]
        row += [times_faster(best(cell, (*DENSE, "dense step")) / ours), times_faster(best(cell, [DEEPSPARSE]) / ours)]
        if limits:
            limit, reason = limits.get(key, (math.nan, "-"))
            row += [microseconds(limit), times_faster(ours / limit), reason]
        rows.append(row)
    table = markdown(header, rows)
    notes = sorted({(record.contender, record.note) for record in records if record.note})
    if notes:
        table += "\n\n" + "\n".join(f"- {contender}: {note}" for contender, note in notes)
    return table


def bars_table(outcomes: Sequence[Outcome]) -> str:
    """Every bar: aimed at, measured, met or missed by how much."""
    rows = [
        [outcome.bar, f"{outcome.target:g}x", times_faster(outcome.measured), outcome.verdict, outcome.where]
        for outcome in outcomes
    ]
    return markdown(["bar", "aimed at", "measured", "verdict", "where"], rows)
