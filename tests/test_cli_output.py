"""What all commands share: results on stdout alone, messages on stderr, and a sign of life where it takes long."""

import contextlib
import errno
import io
import json
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import typer
from rich.console import Console

from srigl_fx.cli import output
from srigl_fx.cli.output import document, refusals, require_extra, show_path, working
from srigl_fx.errors import ExportError, MissingExtraError
from srigl_fx.files import replacing


def test_what_is_printed_meanwhile_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with working("doing"):
        print("by a user's module")
    print("the result")
    assert capsys.readouterr() == ("the result\n", "by a user's module\n")


def test_a_refusal_is_one_line_whatever_stands_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as stopped, working("doing"):
        raise ExportError("it is\n  [bold]wrong[/]: give another")
    assert stopped.value.exit_code == 1
    assert capsys.readouterr() == ("", "error: it is [bold]wrong[/]: give another\n")


def test_what_the_system_refuses_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as stopped, working("doing"):
        raise OSError(errno.EROFS, "Read-only file system", "folder/[a]")
    assert stopped.value.exit_code == 1
    assert capsys.readouterr().err.startswith("error: cannot read or write folder/[a]: Read-only file system; give")
    with pytest.raises(typer.Exit), working("doing"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert capsys.readouterr().err.startswith("error: cannot read or write: No space left on device; give")
    with pytest.raises(BrokenPipeError), refusals():
        raise BrokenPipeError


class Full(io.StringIO):
    """A disk without space."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_result_that_cannot_be_written_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.redirect_stdout(Full()), pytest.raises(typer.Exit) as stopped:
        show_path(Path("a.onnx"), False)
    assert stopped.value.exit_code == 1
    assert capsys.readouterr().err.startswith("error: cannot read or write: No space left on device; give")


def _interrupted(path: Path, number: int) -> None:
    """Told to end while a file is half written."""
    with working("doing"), replacing(path) as part:
        part.write_bytes(b"half")
        signal.raise_signal(number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=["SIGTERM", "SIGHUP"])
def test_who_is_told_to_end_leaves_no_half_file(number: signal.Signals, tmp_path: Path) -> None:
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit) as ended:
            _interrupted(tmp_path / "a.onnx", number)
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert ended.value.code == 128 + number
    assert list(tmp_path.iterdir()) == []


def test_who_is_to_ignore_a_closed_terminal_does() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with working("doing"):
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_mistake_of_ours_is_no_refusal() -> None:
    with pytest.raises(KeyError), working("doing"):
        raise KeyError("a bug")


def test_who_waits_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(output, "PATIENCE", 0.02)
    with working("condensing a[1].onnx"):
        time.sleep(0.1)
    assert capsys.readouterr() == ("", "condensing a[1].onnx ...\n")
    with working("measuring") as waiting:
        waiting.steps(3)
        time.sleep(0.1)
        waiting.step()
    assert capsys.readouterr().err.splitlines() == ["measuring ...", "measuring: 1 of 3"]


def test_a_terminal_shows_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(output, "PATIENCE", 0.01)
    monkeypatch.setattr(output, "Console", lambda **options: Console(**options, force_terminal=True, width=90))
    before = sys.stdout, sys.stderr
    with working("measuring") as waiting:
        waiting.steps(4)
        waiting.step()
        time.sleep(0.2)
    assert (sys.stdout, sys.stderr) == before
    out, shown = capsys.readouterr()
    assert out == ""
    assert "measuring" in shown
    assert "1/4" in shown


def test_what_is_quick_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with working("doing") as waiting:
        waiting.steps(2)
        waiting.step()
    assert capsys.readouterr() == ("", "")


def test_a_document_holds_what_json_does_not() -> None:
    value = {"path": Path("a"), 3: (1.5, float("inf"), None, True), "nested": {"nan": float("nan")}}
    assert json.loads(document(value)) == {"path": "a", "3": [1.5, None, None, True], "nested": {"nan": None}}


def test_a_document_holds_numpy_scalars_as_numbers() -> None:
    value: dict[str, object] = {
        "n": np.int64(3),
        "x": np.float32(0.5),
        "long": np.longdouble(0.5),
        "is": np.bool_(True),
    }
    value |= {"inf": np.float16("inf"), "nan": np.array(np.nan), "text": np.str_("a")}
    value |= {"sizes": (np.uint8(255), np.arange(2), np.array([[1.5, np.inf]]))}
    plain: dict[str, object] = {"n": 3, "x": 0.5, "long": 0.5, "is": True, "inf": None, "nan": None, "text": "a"}
    plain |= {"sizes": [255, [0, 1], [[1.5, None]]]}
    assert json.loads(document(value)) == plain
    assert document(value) == document(plain)  # true is not 1


def test_a_missing_package_names_the_extra() -> None:
    with pytest.raises(MissingExtraError, match=r"needs b-package: pip install 'srigl-fx\[x\]'"):
        require_extra("x", {"json": "json", "no_such_module": "b-package"})
