"""Options that several commands have.

Owns how their text is read. It must not know what they mean.
"""

from typing import Annotated, Literal

import typer

MinSpeedup = Annotated[
    str, typer.Option(help="How much faster a layer must be expected to be; auto, or a number, 0 for all layers.")
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
