"""The commands about this machine: the operator library, what works here, and the demonstration.

Owns their arguments; each calls one function. It must not know how anything is done.
"""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from srigl_fx.cli.output import AsJson, refusals, require_extra, show, show_path, working
from srigl_fx.errors import SriglError

DEMO_PACKAGES = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "tqdm": "tqdm"}
PRETRAINED_PACKAGES = {"transformers": "transformers", "tokenizers": "tokenizers", "tqdm": "tqdm"}


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the ONNX files, the table and the figure.")] = Path(
        "demo_output"
    ),
    quick: Annotated[
        bool, typer.Option("--quick", help="A tenth of the training, one sparsity: only checks that it works.")
    ] = False,
    pretrained: Annotated[
        bool,
        typer.Option("--pretrained", help="Prune and distil a pretrained sentence encoder instead, and measure it."),
    ] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="Of each distillation, with --pretrained.")] = None,
) -> None:
    """Train real networks sparsely, export them, serve them in ONNX Runtime, and show what was measured."""
    with refusals():
        if steps is not None and not pretrained:
            raise SriglError("--steps is of the distillation: give it with --pretrained")
        status = _run_pretrained(out, quick, steps) if pretrained else _run_demo(out, quick)
    raise typer.Exit(status)


def _run_demo(out: Path, quick: bool) -> int:
    require_extra("demo", DEMO_PACKAGES)
    from srigl_fx.demo.run import run_demo

    return run_demo(out, quick=quick)  # it shows its own progress


def _run_pretrained(out: Path, quick: bool, steps: int | None) -> int:
    require_extra("demo,transformers", PRETRAINED_PACKAGES)
    from srigl_fx.demo.pretrained import QUICK, Plan, run_pretrained

    plan = QUICK if quick else Plan()
    return run_pretrained(out, plan if steps is None else replace(plan, steps=steps))


def library(
    output: Annotated[Path | None, typer.Option(help="Copy the library to this file or folder too.")] = None,
    platform: Annotated[
        str | None, typer.Option(help="The platform to serve on, linux-x86_64 or linux-aarch64; this one by default.")
    ] = None,
    json: AsJson = False,
) -> None:
    """Print the path of the ONNX Runtime operator library; build it first where it is missing."""
    import srigl_fx as sx

    with working("looking for the operator library, or building it, which takes minutes"):
        path = Path(sx.runtime.library_path(platform))
        if output is not None:
            try:
                path = Path(shutil.copy(path, output))
            except OSError as error:
                raise SriglError(
                    f"cannot copy the operator library to {output}: {error.strerror or error}; give a folder that "
                    "exists and can be written to"
                ) from error
    show_path(path, json, bytes=path.stat().st_size)


def doctor(
    renew: Annotated[
        bool,
        typer.Option("--renew", help="Forget the times measured on this processor; measure the cost model anew."),
    ] = False,
    json: AsJson = False,
) -> None:
    """Say what is installed and what works here: kernels, operator library, measured times, GPU, extras."""
    from srigl_fx.cli.doctor import examine

    with working("looking at this machine"):
        report = examine(renew=renew)
    show(report, json)
    raise typer.Exit(0 if report.healthy else 1)
