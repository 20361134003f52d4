"""The numeric check between passes: does the graph still compute what the model does?

Owns :func:`verifier`, which :func:`srigl_fx.passes.base.run` can call after each pass. It must not know any pass.
"""

from collections.abc import Callable
from typing import Any

from torch.utils import _pytree as pytree

from srigl_fx.comparison import relative_error
from srigl_fx.errors import PassError
from srigl_fx.passes.capture import run_model
from srigl_fx.passes.program import Program

_ADVICE = (
    "this is a defect of the pass: mend it if it is yours, report it with the model if it came with srigl_fx, or leave "
    "it out of the pipeline"
)


def verifier(program: Program, *, tolerance: float | None = None) -> Callable[[str, Program], None]:
    """A check that compares a program's outputs with the model's, on the example inputs and at another batch size.

    The model runs here, once for each batch size; the check itself runs the graph alone.

    Args:
        program: As captured; its model and inputs are what later programs are compared with.
        tolerance: The largest error allowed, relative to the largest value of an output; by default what
            :attr:`Program.tolerance` says of each program.

    Returns:
        ``check(name of the pass, program)``, which raises PassError naming the pass, the output and the error.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from srigl_fx.passes.base import run
        >>> from srigl_fx.passes.capture import capture
        >>> from srigl_fx.passes.normalize import Normalize
        >>> program = capture(nn.Linear(3, 2).eval(), (torch.ones(2, 3),))
        >>> run((Normalize(),), program, check=verifier(program)).notes
        ()
    """
    sizes = [program.batch_size, program.batch_size + 2] if program.dynamic else [None]
    expected: list[tuple[int | None, list[Any]]] = [
        (size, pytree.tree_leaves(run_model(program.model, *program.inputs(size)))) for size in sizes
    ]

    def check(name: str, subject: Program) -> None:
        allowed = subject.tolerance if tolerance is None else tolerance
        subject.module.recompile()  # a pass that forgot to would be found out only after the next
        for size, outputs in expected:
            got = pytree.tree_leaves(run_model(subject.module, *subject.inputs(size)))
            where = "" if size is None else f" at batch {size}"
            if len(got) != len(outputs):
                raise PassError(
                    f"after the pass {name} the graph gives {len(got)} outputs{where}, the model {len(outputs)}; "
                    f"{_ADVICE}"
                )
            for position, (one, other) in enumerate(zip(outputs, got, strict=True)):
                error = relative_error(one, other)
                if not error <= allowed:
                    raise PassError(
                        f"after the pass {name}, output {position}{where} is off by {error:.2e} of its largest value "
                        f"(allowed: {allowed:.2e}); {_ADVICE}"
                    )

    return check
