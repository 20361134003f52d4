"""What each pass of a pipeline made of a graph, as text.

Owns the files of ``lower(dump=...)``. It must not know what a pass does.
"""

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from srigl_fx.errors import LoweringError
from srigl_fx.passes.base import PassResult
from srigl_fx.passes.program import Program
from srigl_fx.reports.text_tables import format_table

_NO_NAME = re.compile(r"[/\\\0]")  # what no file name may have; a pass may be called anything

_TABLE, _CAPTURED = "passes", "00 captured"
_ROW = re.compile(r" *(?P<number>\d+)  (?P<name>.*?) +[\d.]+ s  ")  # of the table


class Dump:
    """Writes the graph as it was captured and after each pass, and a table of the passes.

    ``00 captured.txt``, ``01 Normalize.txt`` and so on: for each pass how long it took, what it noted, how often each
    operator is there more or less than before, and the graph. ``passes.txt``: a line for each, one that failed too.
    """

    def __init__(self, folder: Path, program: Program) -> None:
        """Begin with the captured program.

        Raises:
            LoweringError: The folder cannot be made or written.
        """
        self._folder = folder
        self._rows: list[list[str]] = []
        clear(folder)
        with _named(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._write_table()
        self._write(_CAPTURED, _text(program))

    def __call__(self, name: str, before: Program, result: PassResult[Program] | Exception, seconds: float) -> None:
        """Write down what the pass ``name`` made of the program ``before``, or the error that it ended with.

        Raises:
            LoweringError: A file cannot be written, for want of space say.
        """
        took = f"{seconds:.3f} s"
        if isinstance(result, Exception):
            after, outcome, said = before, "failed", [str(result)]
        else:
            after = result.subject
            undone = any(note.undone for note in result.notes)
            outcome = "undone" if undone else ("changed" if result.changed else "unchanged")
            said = [f"{note.where}: {note.reason}" for note in result.notes]
        one, other = _operators(before), _operators(after)
        more, less = sorted((other - one).items()), sorted((one - other).items())
        changes = ", ".join([f"+{count} {kind}" for kind, count in more] + [f"-{count} {kind}" for kind, count in less])
        self._rows.append([str(len(self._rows) + 1), name, took, outcome, changes])
        lines = [f"# {line}" for part in (f"{name}: {outcome}, {took}", changes, *said) for line in part.splitlines()]
        self._write_table()
        self._write(f"{len(self._rows):02} {name}", "\n".join(lines) + f"\n\n{_text(after)}")

    def _write_table(self) -> None:
        headers = ("", "pass", "time", "outcome", "operators")
        self._write(_TABLE, format_table(headers, self._rows, right=(0, 2)) + "\n")

    def _write(self, name: str, text: str) -> None:
        file = self._folder / _file_name(name)
        with _named(file):
            file.write_text(text, encoding="utf-8", errors="backslashreplace")


def clear(folder: Path) -> None:
    """Remove the files of an earlier dump from ``folder``, and those of its parts from the folders in it.

    Nothing else goes: a file is known by the table beside it, which lists the passes.

    Raises:
        LoweringError: A file cannot be removed.

    Example:
        >>> clear(Path("no such folder"))
    """
    if not folder.is_dir():
        return
    with _named(folder):
        for place in (folder, *(part for part in folder.iterdir() if part.is_dir() and not part.is_symlink())):
            files = _files_of_dump(place)
            for file in files:
                file.unlink(missing_ok=True)
            if files and place != folder and not any(place.iterdir()):
                place.rmdir()


def folder_of_part(folder: Path, name: str) -> Path:
    """The folder in ``folder`` for a part of a model: its name, without what no name of a folder may have.

    Example:
        >>> folder_of_part(Path("dump"), "parts.a/b").name
        'parts.a_b'
    """
    return folder / (_NO_NAME.sub("_", name) or "model")


def _files_of_dump(folder: Path) -> list[Path]:
    """The files that a :class:`Dump` left in ``folder``; the table is the last."""
    table, captured = folder / _file_name(_TABLE), folder / _file_name(_CAPTURED)
    if not (table.is_file() and captured.is_file()):
        return []
    lines = table.read_text(encoding="utf-8", errors="replace").splitlines()
    if not lines or lines[0].split() != ["pass", "time", "outcome", "operators"]:
        return []
    found = [_ROW.match(line) for line in lines[2:]]
    names = [f"{int(row['number']):02} {row['name']}" for row in found if row is not None]
    return [*(folder / _file_name(name) for name in (_CAPTURED, *names)), table]


def _file_name(name: str) -> str:
    return f"{_NO_NAME.sub('_', name)}.txt"


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Name ``path`` where it cannot be written."""
    try:
        yield
    except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
        why = getattr(error, "strerror", None) or error
        raise LoweringError(
            f"dump: {path} cannot be written ({why}); name a folder that can be written, with space left, or leave "
            "dump out"
        ) from error


def _operators(program: Program) -> Counter[str]:
    return Counter(str(node.target) for node in program.module.graph.nodes if node.op == "call_function")


def _text(program: Program) -> str:
    return str(program.module.print_readable(print_output=False))
