"""The commands of ``srigl-fx``: arguments, help texts, and errors as one readable line.

Owns what is typed and what is printed; it must not know how anything is done: each command calls one function.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from srigl_fx.errors import MissingExtraError, SriglError

DEMO_PACKAGES = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "tqdm": "tqdm"}
PRETRAINED_PACKAGES = {"transformers": "transformers", "tokenizers": "tokenizers", "tqdm": "tqdm"}

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Sparse training, lowering and ONNX export for PyTorch.",
)


@contextmanager
def _readable_errors() -> Iterator[None]:
    """Print an error that the library raised on purpose as one line, and exit with status 1."""
    try:
        yield
    except SriglError as error:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {_plain(str(error))}", highlight=False)
        raise typer.Exit(1) from error


def _plain(text: str) -> str:
    """``text`` with rich's markup switched off."""
    from rich.markup import escape

    return escape(text)


@app.command()
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
    with _readable_errors():
        if steps is not None and not pretrained:
            raise SriglError("--steps is of the distillation: give it with --pretrained")
        packages, extras = (PRETRAINED_PACKAGES, "demo,transformers") if pretrained else (DEMO_PACKAGES, "demo")
        missing = [package for module, package in packages.items() if find_spec(module) is None]
        if missing:
            raise MissingExtraError(f"the demo needs {', '.join(missing)}: pip install 'srigl-fx[{extras}]'")
        status = _run_pretrained(out, quick, steps) if pretrained else _run_demo(out, quick)
    raise typer.Exit(status)


def _run_demo(out: Path, quick: bool) -> int:
    from srigl_fx.demo.run import run_demo

    return run_demo(out, quick=quick)


def _run_pretrained(out: Path, quick: bool, steps: int | None) -> int:
    from srigl_fx.demo.pretrained import QUICK, Plan, run_pretrained

    plan = QUICK if quick else Plan()
    return run_pretrained(out, plan if steps is None else replace(plan, steps=steps))


@app.command()
def inspect(file: Annotated[Path, typer.Argument(help="An ONNX file.")]) -> None:
    """List the condensed layers of an ONNX file: what they keep and what that saves. Runs nothing in the file."""
    from srigl_fx.onnx_export.file import inspect_file

    with _readable_errors():
        typer.echo(str(inspect_file(file)))


@app.command()
def recipe(
    file: Annotated[Path, typer.Argument(help="An ONNX file.")],
    part: Annotated[str | None, typer.Option(help="Of which part, where the file holds several recipes.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write it to this JSON file too.")] = None,
) -> None:
    """Show what the model of an ONNX file was sparsified by. Runs nothing in the file."""
    from srigl_fx.onnx_tools import recipe as recipe_in

    with _readable_errors():
        found = recipe_in(file, part)
        if output is not None:
            found.save(output)
        typer.echo(str(found))


@app.command()
def merge(
    first: Annotated[Path, typer.Argument(help="The file whose outputs are read.")],
    second: Annotated[Path, typer.Argument(help="The file that reads them.")],
    output: Annotated[Path, typer.Option(help="The file to write.")],
    connect: Annotated[
        list[str],
        typer.Option(help="OUTPUT=INPUT: an output of the first, and the input of the second that it becomes."),
    ],
    prefix: Annotated[
        tuple[str, str], typer.Option(help="Prefixes for the names of each, where a name stands in both.")
    ] = ("", ""),
) -> None:
    """Join two ONNX files into one in which condensed layers stay condensed."""
    from srigl_fx.onnx_tools import merge as merge_files

    with _readable_errors():
        if wrong := [pair for pair in connect if pair.count("=") != 1]:
            raise SriglError(f"--connect takes OUTPUT=INPUT, not {wrong[0]!r}")
        merge_files(first, second, output, dict(pair.split("=") for pair in connect), prefixes=prefix)
        typer.echo(output)


@app.command()
def densify(
    file: Annotated[Path, typer.Argument(help="An ONNX file with condensed layers.")],
    output: Annotated[Path, typer.Option(help="The file to write.")],
) -> None:
    """Write an ONNX file with dense weights and standard operators alone, for tools that know no others."""
    from srigl_fx.onnx_tools import densify as densify_file

    with _readable_errors():
        densify_file(file, output)
        typer.echo(output)


@app.command()
def condense(
    file: Annotated[Path, typer.Argument(help="An ONNX file whose weights hold zeros.")],
    output: Annotated[Path, typer.Argument(help="The file to write.")],
    min_sparsity: Annotated[
        float, typer.Option(help="The least fraction of zeros of a weight that is condensed.")
    ] = 0.5,
    min_speedup: Annotated[
        str, typer.Option(help="How much faster a layer must be expected to be; auto, or a number, 0 for all layers.")
    ] = "auto",
    verify: Annotated[bool, typer.Option(help="Compare with the source in ONNX Runtime, on random inputs.")] = True,
    beside: Annotated[bool, typer.Option("--beside", help="Put weights into a file beside it, large or not.")] = False,
) -> None:
    """Condense the layers of an ONNX file that something else made sparse."""
    from srigl_fx.onnx_condensing.pipeline import condense_onnx

    with _readable_errors():
        try:
            least: Any = min_speedup if min_speedup == "auto" else float(min_speedup)
        except ValueError as error:
            raise SriglError(f"--min-speedup takes auto or a number, not {min_speedup!r}") from error
        options: dict[str, Any] = {"min_speedup": least, "verify": verify, "external_data": beside or "auto"}
        typer.echo(str(condense_onnx(file, output, min_sparsity=min_sparsity, **options)))


@app.command()
def triton(
    file: Annotated[Path, typer.Argument(help="An ONNX file.")],
    repository: Annotated[Path, typer.Argument(help="The folder of Triton's models, which exists.")],
    name: Annotated[str | None, typer.Option(help="Of the model; by default that of the file.")] = None,
    served_from: Annotated[str, typer.Option(help="Where the server finds the folder of models.")] = "/models",
    max_batch_size: Annotated[
        int | None, typer.Option(help="The most samples that the server puts into a batch; 0 for none.")
    ] = None,
    threads: Annotated[int, typer.Option(help="Of each instance of the model.")] = 1,
) -> None:
    """Write a model folder for Triton Inference Server: the file, the operator library, config.pbtxt."""
    from srigl_fx.onnx_tools import triton_model

    options = {"served_from": served_from, "max_batch_size": max_batch_size, "threads": threads}
    with _readable_errors():
        typer.echo(triton_model(file, repository, name=name, **options))  # type: ignore[arg-type]


@app.command()
def library(
    output: Annotated[Path | None, typer.Option(help="Copy the library to this file or folder too.")] = None,
    platform: Annotated[
        str | None, typer.Option(help="The platform to serve on, linux-x86_64 or linux-aarch64; this one by default.")
    ] = None,
) -> None:
    """Print the path of the ONNX Runtime operator library; build it first where it is missing."""
    import srigl_fx as sx

    with _readable_errors():
        path = Path(sx.runtime.library_path(platform))
        if output is not None:
            try:
                path = Path(shutil.copy(path, output))
            except OSError as error:
                raise SriglError(
                    f"cannot copy the operator library to {output}: {error.strerror}; give a folder that exists and "
                    "can be written to"
                ) from error
        typer.echo(path)


@app.command()
def doctor(
    renew: Annotated[
        bool,
        typer.Option("--renew", help="Forget the times measured on this processor; measure the cost model anew."),
    ] = False,
) -> None:
    """Say what is installed and what works here: kernels, operator library, measured times, GPU, extras."""
    from srigl_fx.cli.doctor import examine

    with _readable_errors():
        report = examine(renew=renew)
        typer.echo(str(report))
    raise typer.Exit(0 if report.healthy else 1)


@app.command()
def bench(
    shape: Annotated[
        list[str] | None, typer.Option(help="A layer as INPUTSxOUTPUTS; may be given several times.")
    ] = None,
    sparsity: Annotated[list[float] | None, typer.Option(help="Fraction removed; may be given several times.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Batch size; may be given several times.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each of them.")] = 1,
    value_dtype: Annotated[
        str, typer.Option(help="What the condensed layer stores its values in: float32, bfloat16, float16 or int8.")
    ] = "float32",
) -> None:
    """Time condensed linear layers against dense ones and dense int8 on this machine; shows where they lose, too."""
    from srigl_fx.cli.bench import DEFAULT_SHAPES, compare, parse_shape

    with _readable_errors():
        shapes = [parse_shape(text) for text in shape] if shape else list(DEFAULT_SHAPES)
        sparsities, batches = sparsity or [0.8, 0.9, 0.95], batch or [1, 64]
        typer.echo(compare(shapes, sparsities, batches, threads=threads, value_dtype=value_dtype))
