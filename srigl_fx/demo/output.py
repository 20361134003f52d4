"""What the demonstrations write beside their tables: rows as CSV files, and the processor's name.

Owns the form. It must not know what was measured.
"""

import csv
import platform
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any


def cpu() -> str:
    """The processor's name, as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # no Linux: the platform module knows best
    return platform.processor() or platform.machine()


def write_csv(rows: Sequence[Any], path: Path) -> None:
    """One line for each row, below their fields' names; all rows are of one dataclass."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(rows[0])])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
