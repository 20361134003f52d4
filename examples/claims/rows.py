"""A file of results: one row a finished run, safe to be killed at any moment.

Owns the CSV, which rows of it are whole, and what is said of a damaged one; it must not know what the columns mean.
"""

import csv
import io
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


def read(path: Path, columns: Sequence[str], parse: Callable[[dict[str, str]], tuple[K, V]]) -> dict[K, V]:
    """The finished runs in ``path``, without a last line that was cut off; none where there is no such file.

    Args:
        path: The file.
        columns: Its columns, in order.
        parse: Makes a run and what is known of it from a row; a ValueError says that the row is none.

    Raises:
        ValueError: The file is damaged; the message names the line.
    """
    if not path.exists():
        return {}
    content, found, line = path.read_bytes(), dict[K, V](), 1
    try:
        lines = csv.reader(io.StringIO(content[: content.rfind(b"\n") + 1].decode(), newline=""), strict=True)
        if (header := next(lines, [*columns])) != [*columns]:
            raise ValueError(f"the columns are {', '.join(header)}, not {', '.join(columns)}")
        for cells in lines:
            line = lines.line_num
            if len(cells) != len(columns):
                raise ValueError(f"{len(cells)} cells for {len(columns)} columns")
            key, value = parse(dict(zip(columns, cells, strict=True)))
            if key in found:
                raise ValueError("this run has a row before")
            found[key] = value
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(_damage(path, line, error)) from error
    except (ValueError, csv.Error) as error:
        raise ValueError(_damage(path, line, error)) from error
    return found


def _damage(path: Path, line: int, error: Exception) -> str:
    remedy = "take the file from its history" if line == 1 else "delete the line, and its run is trained again"
    return f"{path}, line {line} is damaged: {error}; {remedy}"


def append(path: Path, columns: Sequence[str], values: Mapping[str, object]) -> None:
    """Write the row of a finished run in one piece, and see it on the disk; a line cut off before is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    with path.open("a+b") as file:
        file.seek(0)
        end = file.read().rfind(b"\n") + 1
        file.truncate(end)
        if end == 0:
            writer.writerow(columns)
        writer.writerow([values[column] for column in columns])
        file.write(text.getvalue().encode())
        file.flush()
        os.fsync(file.fileno())
