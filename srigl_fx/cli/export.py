"""The command ``export``: from a function that returns a model to an ONNX file.

Owns its arguments, and the order of its steps. It must not know how any is done.
"""

import inspect
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from srigl_fx.cli.options import MinSpeedup, read_min_speedup
from srigl_fx.cli.output import AsJson, say, show, working

ValueDtype = Literal["float32", "bfloat16", "float16", "int8"]
Sizes = Literal["usual", "auto", "none"]


def export(
    source: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:FUNCTION",
            help="A function without arguments that returns the model and its example inputs, and where it is: a "
            "module that can be imported from here, or a file such as models/net.py.",
        ),
    ],
    output: Annotated[Path, typer.Argument(help="The file to write.")],
    checkpoint: Annotated[
        Path | None, typer.Option(help="Load these weights: a checkpoint of srigl_fx, or a state dict.")
    ] = None,
    adopt: Annotated[
        bool, typer.Option("--adopt", help="Take masks from zeros in the weights: something else made them sparse.")
    ] = False,
    value_dtype: Annotated[ValueDtype, typer.Option(help="What condensed layers store their values in.")] = "float32",
    embedding_dtype: Annotated[ValueDtype, typer.Option(help="What embedding tables are stored in.")] = "float32",
    dynamic_shapes: Annotated[
        Sizes,
        typer.Option(help="Which sizes are free: the batch and the number of tokens, all that the model allows, none."),
    ] = "usual",
    min_speedup: MinSpeedup = "auto",
    fallback: Annotated[bool, typer.Option(help="Let it run without the operator library, too, as fast as dense.")] = (
        True
    ),
    verify: Annotated[bool, typer.Option(help="Compare with PyTorch in ONNX Runtime, on the example inputs.")] = True,
    beside: Annotated[bool, typer.Option("--beside", help="Put weights into a file beside it, large or not.")] = False,
    json: AsJson = False,
) -> None:
    """Write a model as one ONNX file: import a function, load a checkpoint, lower, export, check."""
    if not all(source.rpartition(":")):
        raise typer.BadParameter(f"it takes MODULE:FUNCTION, such as models:build, not {source!r}")
    given: dict[str, Any] = {"min_speedup": read_min_speedup(min_speedup), "verify": verify, "fallback": fallback}
    given |= {"external_data": beside or "auto", "dynamic_batch": dynamic_shapes != "none"}
    if dynamic_shapes == "auto":
        given["dynamic_shapes"] = "auto"
    with working(f"exporting {source}"):
        from srigl_fx.cli.model_source import importable  # it takes seconds, as torch does

        with importable(source):
            report, loaded = _export(source, output, checkpoint, adopt, value_dtype, embedding_dtype, given)
    if loaded:
        say(f"loaded {checkpoint}, {loaded}")
    if not report.layers:
        say("note: no layer of the file is condensed; --min-speedup 0 condenses what is expected to lose, too")
    show(report, json)


def _export(
    source: str,
    output: Path,
    checkpoint: Path | None,
    adopt: bool,
    value_dtype: str,
    embedding_dtype: str,
    given: dict[str, Any],
) -> tuple[Any, str]:
    import torch

    import srigl_fx as sx
    from srigl_fx.cli.model_source import load_source
    from srigl_fx.cli.weights_file import load_weights
    from srigl_fx.lowering.lowered import LoweredModule
    from srigl_fx.lowering.regions import LoweredRegions
    from srigl_fx.masks.records import sparse_weights

    allowed = frozenset(
        name for name, one in inspect.signature(sx.export_onnx).parameters.items() if one.kind is one.KEYWORD_ONLY
    )
    found = load_source(source, allowed)
    model = found.model.eval()
    loaded = "" if checkpoint is None else load_weights(model, checkpoint, found.example_inputs)
    if adopt:
        sx.adopt(model, example_inputs=found.example_inputs)
    if not isinstance(model, LoweredModule | LoweredRegions) and not sparse_weights(model):
        raise sx.SriglError(
            f"the model that {source} returns has no masks, so that there is nothing to condense: let it call sparsify "
            "or prune, give a --checkpoint of a sparse run, or --adopt where its weights hold zeros"
        )
    for name, text in (("value_dtype", value_dtype), ("embedding_dtype", embedding_dtype)):
        given[name] = getattr(torch, text)
    defaults = {
        name: one.default for name, one in inspect.signature(sx.export_onnx).parameters.items() if name in allowed
    }
    said = {name: value for name, value in given.items() if value != defaults[name]}
    if twice := sorted(said.keys() & found.arguments.keys()):
        raise sx.SriglError(f"both {source} and the command line give the argument {twice[0]!r}: leave one out")
    return sx.export_onnx(model, output, found.example_inputs, **{**said, **found.arguments}), loaded
