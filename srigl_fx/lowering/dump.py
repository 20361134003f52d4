"""What each pass of a pipeline made of a graph, as text.

Owns the files of ``lower(dump=...)``. It must not know what a pass does.
"""

from collections import Counter
from pathlib import Path

from srigl_fx.errors import LoweringError
from srigl_fx.passes.base import PassResult
from srigl_fx.passes.program import Program
from srigl_fx.reports.text_tables import format_table


class Dump:
    """Writes the graph as it was captured and after each pass, and a table of the passes.

    ``00 captured.txt``, ``01 Normalize.txt`` and so on: for each pass how long it took, what it noted, how often each
    operator is there more or less than before, and the graph. ``passes.txt``: a line for each.
    """

    def __init__(self, folder: Path, program: Program) -> None:
        """Begin with the captured program.

        Raises:
            LoweringError: The folder cannot be made, or it has files of another kind.
        """
        self._folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for old in folder.glob("[0-9][0-9] *.txt"):
                old.unlink()
            (folder / "00 captured.txt").write_text(_text(program), encoding="utf-8")
        except OSError as error:
            raise LoweringError(
                f"dump: {folder} cannot be written ({error.strerror or error}); name a folder"
            ) from error
        self._rows: list[list[str]] = []

    def __call__(self, name: str, before: Program, result: PassResult[Program], seconds: float) -> None:
        """Write down what the pass ``name`` made of the program ``before``."""
        one, other = _operators(before), _operators(result.subject)
        more, less = sorted((other - one).items()), sorted((one - other).items())
        changes = ", ".join([f"+{count} {kind}" for kind, count in more] + [f"-{count} {kind}" for kind, count in less])
        undone = any(note.undone for note in result.notes)
        took = f"{seconds:.3f} s"
        outcome = "undone" if undone else ("changed" if result.changed else "nothing to do")
        self._rows.append([str(len(self._rows) + 1), name, took, outcome, changes])
        head = [f"{name}: {outcome}, {took}", changes, *(f"{note.where}: {note.reason}" for note in result.notes)]
        lines = "\n".join(f"# {line}" for part in head if part for line in part.splitlines())
        file = self._folder / f"{len(self._rows):02} {name}.txt"
        file.write_text(f"{lines}\n\n{_text(result.subject)}", encoding="utf-8")
        passes = format_table(("", "pass", "time", "outcome", "operators"), self._rows, right=(0, 2))
        (self._folder / "passes.txt").write_text(passes + "\n", encoding="utf-8")


def _operators(program: Program) -> Counter[str]:
    return Counter(str(node.target) for node in program.module.graph.nodes if node.op == "call_function")


def _text(program: Program) -> str:
    return str(program.module.print_readable(print_output=False))
