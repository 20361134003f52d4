"""The numeric check between passes: does the graph still compute what the model does?

Owns :func:`verifier`, which :func:`srigl_fx.passes.base.run` can call after each pass. It must not know any pass.
"""

from collections.abc import Callable, Iterator

from torch.utils import _pytree as pytree

from srigl_fx.comparison import relative_error
from srigl_fx.errors import PassError
from srigl_fx.passes.model_runs import Run, run_steps
from srigl_fx.passes.program import Program

_ADVICE = (
    "this is a defect of the pass: mend it if it is yours, report it with the model if it came with srigl_fx, or leave "
    "it out of the pipeline"
)


def verifier(program: Program, *, tolerance: float | None = None) -> Callable[[str, Program], None]:
    """A check that compares a program's outputs with the model's, on the example inputs and at another batch size.

    The model runs here, once for each batch size, or several times in a row where it keeps state; the check itself runs
    the graph alone.

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
    expected = [(size, _of_model(program, size)) for size in _sizes(program)]

    def check(name: str, subject: Program) -> None:
        allowed = subject.tolerance if tolerance is None else tolerance
        subject.module.recompile()  # a pass that forgot to would be found out only after the next
        for size, runs in expected:
            where = "" if size is None else f" at batch {size}"
            given = subject.inputs(size, apart=True)
            for step, (one, other) in enumerate(zip(runs, run_steps(subject.module, *given, len(runs)), strict=True)):
                count = [len(pytree.tree_leaves(run.output)) for run in (other, one)]
                if count[0] != count[1]:
                    raise PassError(
                        f"after the pass {name} the graph gives {count[0]} outputs{where}, the model {count[1]}; "
                        f"{_ADVICE}"
                    )
                for what, error in differences(one, other):
                    if not error <= allowed:
                        call = f" in call {step + 1}" if step else ""
                        raise PassError(
                            f"after the pass {name}, {what}{where}{call} is off by {error:.2e} of its largest value "
                            f"(allowed: {allowed:.2e}); {_ADVICE}"
                        )

    return check


def _sizes(program: Program) -> list[int | None]:
    return [program.batch_size, program.other_batch] if program.dynamic else [None]


def _of_model(program: Program, size: int | None) -> list[Run]:
    return run_steps(program.model, *program.inputs(size, apart=True))


def differences(expected: Run, got: Run) -> Iterator[tuple[str, float]]:
    """The relative errors of outputs, and of the buffers that were written, each with what it is the error of."""
    leaves = [pytree.tree_leaves(run.output) for run in (expected, got)]
    for position, (one, other) in enumerate(zip(*leaves, strict=True)):
        yield f"output {position}", relative_error(one, other)
    for name, buffer in expected.buffers.items():
        if name not in got.buffers:
            yield f"the buffer {name}", float("inf")
        else:
            yield f"the buffer {name}", relative_error(buffer, got.buffers[name])
