"""The list of commands of docs/command-line.md, made from the real ones; run as a script, it writes them there.

``make tables`` runs it.
"""

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from typer.models import ArgumentInfo, OptionInfo

from srigl_fx.cli.app import GROUPS

BEGIN, END = "<!-- commands -->\n\n", "\n\n<!-- end commands -->"


def with_commands(page: str) -> str:
    """The page with the commands as they are now; what stands outside of the marks stays."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin, "the page has no place for the commands"
    assert end, "the commands have no end on the page"
    return before + begin + as_markdown() + end + after


def as_markdown() -> str:
    """Every command under its heading: what it does, how it is called, what it takes."""
    parts = []
    for heading, functions in GROUPS.items():
        parts.append(f"## {heading}")
        parts += [_command(function) for function in functions]
    return "\n\n".join(parts)


def _command(function: Callable[..., None]) -> str:
    found = list(parameters(function))
    arguments = [
        names[0] if needed == "needed" else f"[{names[0]}]" for names, needed, _ in found if names[0][0] != "-"
    ]
    usage = " ".join(["srigl-fx", function.__name__, "[OPTIONS]", *arguments])
    rows = [f"| {', '.join(f'`{name}`' for name in names)} | {default} | {text} |" for names, default, text in found]
    table = "\n".join(("| | by default | |", "|---|---|---|", *rows))
    text = "\n\n".join(" ".join(part.split()) for part in inspect.cleandoc(function.__doc__ or "").split("\n\n"))
    return f"### {function.__name__}\n\n{text}\n\n```text\n{usage}\n```\n\n{table}"


def parameters(function: Callable[..., None]) -> Iterator[tuple[tuple[str, ...], str, str]]:
    """Names, default and help of everything that a command takes, in the order of its function."""
    hints = get_type_hints(function, include_extras=True)
    for name, parameter in inspect.signature(function).parameters.items():
        kind, info = get_args(hints[name])
        assert isinstance(info, ArgumentInfo | OptionInfo)
        choices = get_args(kind) if get_origin(kind) is Literal else ()
        names = _names(name, kind, info)
        text = (info.help or "") + (f" One of {', '.join(choices)}." if choices else "")
        yield names, _default(parameter.default, switch=len(names) > 1), text


def _names(name: str, kind: Any, info: ArgumentInfo | OptionInfo) -> tuple[str, ...]:
    if isinstance(info, ArgumentInfo):
        return (info.metavar if isinstance(info.metavar, str) else name.upper(),)
    # Where the annotation has it, typer finds the first name in the place of the default.
    if given := [one for one in (info.default, *(info.param_decls or ())) if isinstance(one, str)]:
        return tuple(given)
    long = name.replace("_", "-")
    return (f"--{long}", f"--no-{long}") if kind is bool else (f"--{long}",)


def _default(value: Any, *, switch: bool) -> str:
    if value is inspect.Parameter.empty:
        return "needed"
    if isinstance(value, bool):
        return ("yes" if value else "no") if switch else ""
    return "" if value is None or value == ("", "") else f"`{value}`"


if __name__ == "__main__":
    file = Path(__file__).resolve().parents[2] / "docs" / "command-line.md"
    file.write_text(with_commands(file.read_text(encoding="utf-8")), encoding="utf-8")
