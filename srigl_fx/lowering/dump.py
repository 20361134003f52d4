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


class Dump:
    """Writes the graph as it was captured and after each pass, and a table of the passes.

    ``00 captured.txt``, ``01 Normalize.txt`` and so on: for each pass how long it took, what it noted, how often each
    operator is there more or less than before, and the graph. ``passes.txt``: a line for each.
    """

    def __init__(self, folder: Path, program: Program) -> None:
        """Begin with the captured program.

        Raises:
            LoweringError: The folder cannot be made or written.
        """
        self._folder = folder
        with _named(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for old in folder.glob("[0-9][0-9] *.txt"):
                old.unlink()
        self._write("00 captured", _text(program))
        self._rows: list[list[str]] = []

    def __call__(self, name: str, before: Program, result: PassResult[Program], seconds: float) -> None:
        """Write down what the pass ``name`` made of the program ``before``.

        Raises:
            LoweringError: A file cannot be written, for want of space say.
        """
        one, other = _operators(before), _operators(result.subject)
        more, less = sorted((other - one).items()), sorted((one - other).items())
        changes = ", ".join([f"+{count} {kind}" for kind, count in more] + [f"-{count} {kind}" for kind, count in less])
        undone = any(note.undone for note in result.notes)
        took = f"{seconds:.3f} s"
        outcome = "undone" if undone else ("changed" if result.changed else "nothing to do")
        self._rows.append([str(len(self._rows) + 1), name, took, outcome, changes])
        head = [f"{name}: {outcome}, {took}", changes, *(f"{note.where}: {note.reason}" for note in result.notes)]
        lines = "\n".join(f"# {line}" for part in head if part for line in part.splitlines())
        self._write(f"{len(self._rows):02} {name}", f"{lines}\n\n{_text(result.subject)}")
        self._write(
            "passes", format_table(("", "pass", "time", "outcome", "operators"), self._rows, right=(0, 2)) + "\n"
        )

    def _write(self, name: str, text: str) -> None:
        file = self._folder / f"{_NO_NAME.sub('_', name)}.txt"
        with _named(file):
            file.write_text(text, encoding="utf-8", errors="backslashreplace")


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
