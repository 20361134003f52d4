"""Plain-text tables for reports.

Owns how a table of facts is laid out as text; it must not know what the facts are.
"""

from collections.abc import Sequence


def format_table(headers: Sequence[str], rows: Sequence[Sequence[object]], *, right: Sequence[int] = ()) -> str:
    """Lay out ``rows`` under ``headers``; columns listed in ``right`` are right-aligned.

    Example:
        >>> print(format_table(("layer", "kept"), [("fc1", 120), ("head", 7)], right=(1,)))
        layer  kept
        -----  ----
        fc1     120
        head      7
    """
    cells = [[str(header) for header in headers], *[[str(cell) for cell in row] for row in rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headers))]

    def line(row: Sequence[str]) -> str:
        aligned = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(aligned).rstrip()

    return "\n".join([line(cells[0]), "  ".join("-" * width for width in widths), *map(line, cells[1:])])


def format_bytes(count: int) -> str:
    """A byte count in the unit a reader expects.

    Example:
        >>> format_bytes(512), format_bytes(1_500_000)
        ('512 B', '1.43 MiB')
    """
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{count} B" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1024
    raise AssertionError("unreachable")


def format_seconds(seconds: float) -> str:
    """A duration in the unit a reader expects, three digits.

    Example:
        >>> format_seconds(0.00012), format_seconds(0.0251), format_seconds(3.0)
        ('120 µs', '25.1 ms', '3 s')
    """
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * factor >= 1 or unit == "µs":
            return f"{seconds * factor:.3g} {unit}"
    raise AssertionError("unreachable")
