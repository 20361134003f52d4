"""What all commands share: where results, messages and errors go, and what is shown while one waits.

Owns the rules. A result goes to stdout, as text or as one JSON document, and nothing else does; all that is said on the
way goes to stderr. What the library or the system refuses is one line there and exit status 1. It must not know any
command.
"""

import contextlib
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from srigl_fx.errors import MissingExtraError, SriglError

PATIENCE = 2.0  # seconds that a command may take without a word

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]


class Report(Protocol):
    """What a command found: text for people, plain data for programs."""

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        ...


class Waiting:
    """What is shown on stderr of a command that takes longer than :data:`PATIENCE`.

    A terminal shows a bar with the time, anything else a line for each step that is worth one.

    Args:
        doing: What the command does, in words.
    """

    def __init__(self, doing: str) -> None:
        self._doing = doing
        self._console = Console(stderr=True, soft_wrap=True)
        self._done, self._total, self._said = 0, 0, time.monotonic()
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(20), TimeElapsedColumn())
        self._bar = Progress(*columns, console=self._console, transient=True)
        self._task = self._bar.add_task(escape(doing), total=None)
        self._timer = threading.Timer(PATIENCE, self._begin)
        self._timer.daemon = True

    def steps(self, total: int) -> None:
        """Say of how many steps the rest is made."""
        self._total = total
        self._bar.columns = (*self._bar.columns, MofNCompleteColumn())
        self._bar.update(self._task, total=total)

    def step(self) -> None:
        """One step is done."""
        self._done += 1
        self._bar.advance(self._task)
        if not self._console.is_terminal and time.monotonic() > self._said + PATIENCE:
            self._say(f"{self._doing}: {self._done} of {self._total}")

    def _begin(self) -> None:
        if self._console.is_terminal:
            self._bar.start()
        elif not self._done:
            self._say(f"{self._doing} ...")

    def _say(self, text: str) -> None:
        self._said = time.monotonic()
        self._console.print(escape(text), highlight=False)

    def __enter__(self) -> "Waiting":
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        self._timer.join()
        if self._bar.live.is_started:
            self._bar.stop()


@contextlib.contextmanager
def working(doing: str) -> Iterator[Waiting]:
    """Do what a command does: what is printed meanwhile goes to stderr, and a refusal is one line there.

    Args:
        doing: In words, for whoever waits.

    Raises:
        typer.Exit: With status 1, as of :func:`refusals`.
        SystemExit: The process was told to end, as of :func:`tidy_end`.
    """
    with tidy_end(), refusals(), contextlib.redirect_stdout(sys.stderr), Waiting(doing) as waiting:
        yield waiting


@contextlib.contextmanager
def tidy_end() -> Iterator[None]:
    """Let what runs take its half-written files away when the process is told to end, or its terminal is closed.

    A process that is to ignore such a signal, as of ``nohup``, ignores it still. A call of ONNX Runtime ends first.

    Raises:
        SystemExit: With status 128 and the number of the signal, as a shell has it, in the place of a sudden end.

    Example:
        >>> with tidy_end():
        ...     signal.raise_signal(signal.SIGTERM)
        Traceback (most recent call last):
        SystemExit: 143
    """

    def end(number: int, _: object) -> None:
        sys.exit(128 + number)

    names = ("SIGTERM", "SIGHUP")  # the second is not on every system
    wanted = [getattr(signal, name) for name in names if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():  # the only one that gets signals
        wanted = []
    replaced = [number for number in wanted if signal.getsignal(number) is signal.SIG_DFL]
    try:
        for number in replaced:
            signal.signal(number, end)
        yield
    finally:
        for number in replaced:
            signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """What the library refuses is one line on stderr, and exit status 1; so is a disk that is full or read-only.

    Raises:
        typer.Exit: With status 1, where the library raised an error on purpose, or the system does not read or write.
    """
    try:
        yield
    except BrokenPipeError:
        raise  # whoever read the result has enough: the command line ends without a word
    except (SriglError, OSError) as error:
        line = _of_the_system(error) if isinstance(error, OSError) else " ".join(str(error).split())
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(line)}", highlight=False)
        raise typer.Exit(1) from error


def _of_the_system(error: OSError) -> str:
    """What the system says, of which file, and what to do."""
    place = f" {error.filename}" if error.filename else ""
    advice = "give the path of a file in a folder that can be written to, and has the space"
    return f"cannot read or write{place}: {error.strerror or error}; {advice}"


def say(text: str) -> None:
    """Say something on stderr."""
    typer.echo(text, err=True)


def show(report: Report, as_json: bool) -> None:
    """Print a report on stdout."""
    with refusals():
        typer.echo(document(report.as_dict()) if as_json else str(report))


def show_path(path: Path, as_json: bool, **more: Any) -> None:
    """Print on stdout where a file or folder is."""
    with refusals():
        typer.echo(document({"path": path, **more}) if as_json else str(path))


def document(value: Any) -> str:
    """Plain data as JSON; NumPy's scalars are numbers and its arrays lists, what is not finite is null, paths are text.

    Example:
        >>> print(document({"path": Path("a.onnx"), "sizes": (1, float("nan"))}))
        {
          "path": "a.onnx",
          "sizes": [
            1,
            null
          ]
        }
    """
    return json.dumps(_plain(value), indent=2, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, str | int | None):
        return value
    if (numpy := sys.modules.get("numpy")) and isinstance(value, numpy.generic | numpy.ndarray):
        found = value.tolist()
        if isinstance(found, numpy.floating):  # a long double, which Python has no type for
            found = float(found)
        if not isinstance(found, numpy.generic):
            return _plain(found)
    return str(value)


def require_extra(name: str, packages: Mapping[str, str]) -> None:
    """Require the packages of an extra, given as the modules that are imported and the names that pip knows.

    Raises:
        MissingExtraError: One is missing.

    Example:
        >>> require_extra("cli", {"typer": "typer"})
        >>> require_extra("demo", {"no_such_module": "matplotlib"})
        Traceback (most recent call last):
        srigl_fx.errors.MissingExtraError: this needs matplotlib: pip install 'srigl-fx[demo]'
    """
    if missing := [package for module, package in packages.items() if find_spec(module) is None]:
        raise MissingExtraError(f"this needs {', '.join(missing)}: pip install 'srigl-fx[{name}]'")
