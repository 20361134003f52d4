"""Calls of the command line in a test, and what is required of its errors."""

import json
from typing import Any
from unittest.mock import patch

from typer.testing import CliRunner, Result

from srigl_fx.cli.app import app


def run(*arguments: object) -> Result:
    """Call the command line in this process; that it takes long on a busy machine is not said."""
    with patch("srigl_fx.cli.output.PATIENCE", 3600.0):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])


def document(*arguments: object) -> Any:
    """What ``--json`` prints: one JSON document and nothing else on stdout."""
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def assert_readable_error(result: Result, *parts: str) -> None:
    """One line on stderr, nothing on stdout, and exit status 1."""
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    for part in parts:
        assert part in line


def assert_wrong_usage(result: Result, *parts: str) -> None:
    """Exit status 2, and words that begin with how the command is called."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Usage: " in result.stderr
    words = " ".join(result.stderr.replace("│", " ").split())
    for part in parts:
        assert part in words
