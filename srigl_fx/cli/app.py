"""The commands of ``srigl-fx``, listed.

Owns which commands there are and under which headings they are shown. It must not know what any of them takes or does:
each group of commands is a module beside this one.
"""

from collections.abc import Callable

import typer

from srigl_fx.cli import bench, export, files, machine, serve

GROUPS: dict[str, tuple[Callable[..., None], ...]] = {
    "From a model to a service": (export.export, bench.bench, serve.serve),
    "Files": (files.inspect, files.recipe, files.condense, files.merge, files.densify, files.triton),
    "This machine": (machine.demo, machine.library, machine.doctor),
}

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Sparse training, lowering and ONNX export for PyTorch.",
)
for heading, commands in GROUPS.items():
    for command in commands:
        app.command(rich_help_panel=heading)(command)
