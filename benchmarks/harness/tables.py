"""Records as text: the lines printed while measuring, Markdown tables with every cell, and the table of bars.

Owns the wording and the layout of figures. It must not know how they were measured.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

from harness.bars import LINEAR_BARS, Outcome
from harness.ceilings import Ceilings
from harness.cells import (
    DEEPSPARSE,
    DENSE,
    DENSE_INT8,
    DENSE_STEP,
    OURS,
    OURS_BF16,
    OURS_INT8,
    SPARSE_STEP,
    Cell,
    Record,
    best,
    group,
)

Limits = Mapping[Cell, tuple[float, str]]  # the microseconds that a cell cannot go below, and what limits it


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
    dense = best(cell, [name for name in (DENSE_STEP, *DENSE) if name in cell])
    figures = [
        f"{name} {microseconds(record.microseconds)}"
        + (f" ({times_faster(dense / record.microseconds)})" if not math.isnan(record.microseconds) else "")
        for name, record in cell.items()
    ]
    ours = best(cell, (*OURS, *OURS_BF16, SPARSE_STEP))
    bar = LINEAR_BARS.get(first.batch, {}).get(first.sparsity) if first.section == "linear" else None
    aim = f" [bar {bar:g}x: {'met' if dense / ours >= bar else 'missed'}]" if bar else ""
    return (
        f"{first.layer}, {first.sparsity:.0%}, batch {first.batch}: ours {times_faster(dense / ours)}{aim} | "
        + ", ".join(figures)
    )


def cells_table(records: Sequence[Record], limits: Limits) -> str:
    """Every cell: microseconds of each contender; our better one over the faster dense and over DeepSparse.

    Args:
        records: Of one section.
        limits: Of the cells where the machine's are known.
    """
    cells = group(records)
    names = list(dict.fromkeys(record.contender for record in records))
    header = [
        "layer",
        "sparsity",
        "batch",
        "threads",
        *(f"{name}, µs" for name in names),
        "ours / dense",
        "ours int8 / dense int8",
        "ours / DeepSparse",
    ]
    if limits:
        header += ["moved, MB", "multiply-adds, M", "limit, µs", "measured / limit", "limited by"]
    rows = []
    for key, cell in cells.items():
        _, layer, sparsity, batch, threads = key
        ours = best(cell, (*OURS, *OURS_BF16, SPARSE_STEP))
        row = [layer, f"{sparsity:.0%}", str(batch), str(threads)]
        row += [microseconds(cell[name].microseconds) if name in cell else "-" for name in names]
        row += [times_faster(best(cell, (*DENSE, DENSE_STEP)) / ours)]
        row += [times_faster(best(cell, DENSE_INT8) / best(cell, OURS_INT8))]
        row += [times_faster(best(cell, [DEEPSPARSE]) / ours)]
        if key in limits:
            limit, reason = limits[key]
            moved, fmas = min(record.bytes for record in cell.values()), max(record.fmas for record in cell.values())
            row += [f"{moved / 1e6:.3g}", f"{fmas / 1e6:.3g}", microseconds(limit), times_faster(ours / limit), reason]
        elif limits:
            row += ["-"] * 5
        rows.append(row)
    table = markdown(header, rows)
    notes = sorted({(record.contender, record.note) for record in records if record.note})
    if notes:
        table += "\n\n" + "\n".join(f"- {contender}: {note}" for contender, note in notes)
    return table


def bars_table(outcomes: Sequence[Outcome], limits: Limits) -> str:
    """Every bar: aimed at, measured, met or missed by how much; and how far the machine would let the worst cell go."""
    rows = []
    for outcome in outcomes:
        row = [outcome.bar, f"{outcome.target:g}x", times_faster(outcome.measured), outcome.verdict, outcome.where]
        limit, reason = limits.get(outcome.cell, (math.nan, "-")) if outcome.cell else (math.nan, "-")
        rows.append([*row, times_faster(outcome.microseconds / limit), reason])
    header = ["bar", "aimed at", "measured", "verdict", "where", "its time / limit", "limited by"]
    return markdown(header, rows)


def ceilings_table(ceilings: Ceilings) -> str:
    """What the machine reaches on one thread."""
    rows = [
        [f"{level.buffer / 2**10:,.0f} KiB ({level.name})", f"{level.rate / 1e9:.1f} GB/s"] for level in ceilings.levels
    ]
    rows += [
        ["multiply-adds from registers", f"{ceilings.register_fmas / 1e9:.1f} G/s"],
        ["multiply-adds, one operand from L1", f"{ceilings.load_fmas / 1e9:.1f} G/s"],
        ["the same, and a weight and its index for each two vectors", f"{ceilings.sparse_fmas / 1e9:.1f} G/s"],
    ]
    return markdown(["read from", "one thread"], rows)
