"""The commands from ONNX files to ONNX files, and those that say what is in one.

Owns their arguments; each calls one function. It must not know how anything is done.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from srigl_fx.cli.options import MinSpeedup, Sizes, read_min_speedup, read_sizes
from srigl_fx.cli.output import AsJson, show, show_path, working

if TYPE_CHECKING:
    from srigl_fx.recipes import Recipe

OnnxFile = Annotated[Path, typer.Argument(help="An ONNX file.")]
Output = Annotated[Path, typer.Option(help="The file to write.")]


def inspect(file: OnnxFile, json: AsJson = False) -> None:
    """List the condensed layers of an ONNX file: what they keep and what that saves. Runs nothing in the file."""
    from srigl_fx.onnx_export.file import inspect_file

    with working(f"reading {file}"):
        report = inspect_file(file)
    show(report, json)


@dataclass(frozen=True)
class _Recipe:
    found: "Recipe"

    def as_dict(self) -> dict[str, Any]:
        return self.found.to_dict()

    def __str__(self) -> str:
        return str(self.found)


def recipe(
    file: OnnxFile,
    part: Annotated[str | None, typer.Option(help="Of which part, where the file holds several recipes.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write it to this JSON file too.")] = None,
    json: AsJson = False,
) -> None:
    """Show what the model of an ONNX file was sparsified by. Runs nothing in the file."""
    from srigl_fx.onnx_tools import recipe as recipe_in

    with working(f"reading {file}"):
        found = recipe_in(file, part)
        if output is not None:
            found.save(output)
    show(_Recipe(found), json)


def merge(
    first: Annotated[Path, typer.Argument(help="The file whose outputs are read.")],
    second: Annotated[Path, typer.Argument(help="The file that reads them.")],
    output: Output,
    connect: Annotated[
        list[str],
        typer.Option(help="OUTPUT=INPUT: an output of the first, and the input of the second that it becomes."),
    ],
    prefix: Annotated[
        tuple[str, str], typer.Option(help="Prefixes for the names of each, where a name stands in both.")
    ] = ("", ""),
    json: AsJson = False,
) -> None:
    """Join two ONNX files into one in which condensed layers stay condensed."""
    from srigl_fx.onnx_tools import merge as merge_files

    if wrong := [pair for pair in connect if pair.count("=") != 1]:
        raise typer.BadParameter(f"it takes OUTPUT=INPUT, not {wrong[0]!r}", param_hint="--connect")
    pairs = [(output, read) for output, _, read in (pair.partition("=") for pair in connect)]
    for ends in zip(*pairs, strict=True):
        if twice := [one for one, times in Counter(ends).items() if times > 1]:
            raise typer.BadParameter(f"{twice[0]} is given twice, and can be connected once", param_hint="--connect")
    with working(f"joining {first} and {second}"):
        merge_files(first, second, output, dict(pairs), prefixes=prefix)
    show_path(output, json)


def densify(
    file: Annotated[Path, typer.Argument(help="An ONNX file with condensed layers.")],
    output: Output,
    json: AsJson = False,
) -> None:
    """Write an ONNX file with dense weights and standard operators alone, for tools that know no others."""
    from srigl_fx.onnx_tools import densify as densify_file

    with working(f"densifying {file}"):
        densify_file(file, output)
    show_path(output, json)


def condense(
    file: Annotated[Path, typer.Argument(help="An ONNX file whose weights hold zeros.")],
    output: Annotated[Path, typer.Argument(help="The file to write.")],
    min_sparsity: Annotated[
        float, typer.Option(help="The least fraction of zeros of a weight that is condensed.")
    ] = 0.5,
    min_speedup: MinSpeedup = "auto",
    verify: Annotated[bool, typer.Option(help="Compare with the source in ONNX Runtime, on random inputs.")] = True,
    size: Sizes = None,
    beside: Annotated[bool, typer.Option("--beside", help="Put weights into a file beside it, large or not.")] = False,
    json: AsJson = False,
) -> None:
    """Condense the layers of an ONNX file that something else made sparse."""
    from srigl_fx.onnx_condensing.pipeline import condense_onnx

    options: dict[str, Any] = {"verify": verify, "external_data": beside or "auto"}
    options |= {"min_speedup": read_min_speedup(min_speedup), "sizes": read_sizes(size)}
    with working(f"condensing {file}"):
        report = condense_onnx(file, output, min_sparsity=min_sparsity, **options)
    show(report, json)


def triton(
    file: OnnxFile,
    repository: Annotated[Path, typer.Argument(help="The folder of Triton's models, which exists.")],
    name: Annotated[str | None, typer.Option(help="Of the model; by default that of the file.")] = None,
    served_from: Annotated[str, typer.Option(help="Where the server finds the folder of models.")] = "/models",
    max_batch_size: Annotated[
        int | None, typer.Option(help="The most samples that the server puts into a batch; 0 for none.")
    ] = None,
    threads: Annotated[int, typer.Option(help="Of each instance of the model.")] = 1,
    json: AsJson = False,
) -> None:
    """Write a model folder for Triton Inference Server: the file, the operator library, config.pbtxt."""
    from srigl_fx.onnx_tools import triton_model

    options: dict[str, Any] = {"served_from": served_from, "max_batch_size": max_batch_size, "threads": threads}
    with working(f"writing a folder for {file}"):
        folder = triton_model(file, repository, name=name, **options)
    show_path(folder, json)
