"""Options that several commands have.

Owns how their text is read. It must not know what they mean.
"""

from typing import Annotated, Literal

import typer

MinSpeedup = Annotated[
    str, typer.Option(help="How much faster a layer must be expected to be; auto, or a number, 0 for all layers.")
]
Sizes = Annotated[
    list[str] | None, typer.Option(help="Of a file: NAME=NUMBER, what a free size is; may be given several times.")
]
Threads = Annotated[int, typer.Option(min=1, help="Threads of a call.")]


def read_min_speedup(text: str) -> float | Literal["auto"]:
    """The value of ``--min-speedup``.

    Raises:
        typer.BadParameter: It is neither "auto" nor a number.

    Example:
        >>> read_min_speedup("auto"), read_min_speedup("1.5")
        ('auto', 1.5)
    """
    if text == "auto":
        return "auto"
    try:
        return float(text)
    except ValueError as error:
        raise typer.BadParameter(f"it takes auto or a number, not {text!r}", param_hint="--min-speedup") from error


def read_sizes(texts: list[str] | None) -> dict[str, int]:
    """The values of ``--size``.

    Raises:
        typer.BadParameter: One is no name and number.

    Example:
        >>> read_sizes(["length=128", "images=2"])
        {'length': 128, 'images': 2}
    """
    sizes = {}
    for text in texts or ():
        name, _, number = text.rpartition("=")
        if not name or not number.isdecimal() or not int(number):
            raise typer.BadParameter(f"it takes NAME=NUMBER, such as length=128, not {text!r}", param_hint="--size")
        sizes[name] = int(number)
    return sizes
