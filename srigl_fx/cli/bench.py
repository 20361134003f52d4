"""The command ``bench``: the forms of one ONNX file, or single layers, timed on this machine.

Owns its arguments. It must not know how anything is measured.
"""

from pathlib import Path
from typing import Annotated, Literal

import typer

from srigl_fx.cli.options import Sizes, Threads, read_sizes
from srigl_fx.cli.output import AsJson, show, working

BATCHES = (1, 16, 64)
LAYER_BATCHES, LAYER_SPARSITIES = (1, 64), (0.8, 0.9, 0.95)


def bench(
    file: Annotated[
        Path | None, typer.Argument(help="An ONNX file, condensed or with zeros in its weights; else single layers.")
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Batch size; may be given several times.")] = None,
    threads: Threads = 1,
    size: Sizes = None,
    seconds: Annotated[
        float, typer.Option(min=0.1, help="Of a file: how long each batch size is measured, longer where calls are.")
    ] = 5.0,
    shape: Annotated[
        list[str] | None, typer.Option(help="Of layers: INPUTSxOUTPUTS; may be given several times.")
    ] = None,
    sparsity: Annotated[
        list[float] | None, typer.Option(help="Of layers: the fraction removed; may be given several times.")
    ] = None,
    value_dtype: Annotated[
        Literal["float32", "bfloat16", "float16", "int8"],
        typer.Option(help="Of layers: what the condensed one stores its values in."),
    ] = "float32",
    json: AsJson = False,
) -> None:
    """Time what sparsity gives on this machine; shows where it loses, too.

    Of a file: dense, dense int8 (ONNX Runtime's quantize_dynamic), sparse and sparse int8, made from that file.
    Without a file: condensed linear layers against dense ones and dense int8.
    """
    if file is None:
        _layers(batch, threads, size, shape, sparsity, value_dtype, json)
        return
    if shape or sparsity or value_dtype != "float32":
        raise typer.BadParameter("--shape, --sparsity and --value-dtype are of single layers: leave them out")
    from srigl_fx.cli.bench_file import compare_forms

    with working(f"measuring {file}") as waiting:
        report = compare_forms(
            file, batch or BATCHES, threads=threads, sizes=read_sizes(size), seconds=seconds, waiting=waiting
        )
    show(report, json)


def _layers(
    batch: list[int] | None,
    threads: int,
    size: list[str] | None,
    shape: list[str] | None,
    sparsity: list[float] | None,
    value_dtype: str,
    json: bool,
) -> None:
    from srigl_fx.cli.bench_layers import DEFAULT_SHAPES, compare, parse_shape
    from srigl_fx.errors import SriglError

    if size:
        raise typer.BadParameter("it is of a file, and none is given", param_hint="--size")
    try:
        shapes = [parse_shape(text) for text in shape] if shape else list(DEFAULT_SHAPES)
    except SriglError as error:
        raise typer.BadParameter(str(error), param_hint="--shape") from error
    sparsities, batches = sparsity or LAYER_SPARSITIES, batch or LAYER_BATCHES
    if not all(0 <= one < 1 for one in sparsities):
        raise typer.BadParameter("a sparsity lies in [0, 1), such as 0.9", param_hint="--sparsity")
    with working("measuring layers") as waiting:
        waiting.steps(len(shapes) * len(sparsities) * len(batches))
        report = compare(shapes, sparsities, batches, threads=threads, value_dtype=value_dtype, done=waiting.step)
    show(report, json)
