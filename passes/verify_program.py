"""The numeric check between passes: does the graph still compute what the model does?

Owns :func:`verifier`, which :func:`srigl_fx.passes.base.run` can call after each pass. It must not know any pass.
"""

from collections.abc import Callable

from torch import nn

from srigl_fx.comparison import Limit, Results, compare
from srigl_fx.errors import PassError
from srigl_fx.passes.model_runs import run_steps
from srigl_fx.passes.program import Program
from srigl_fx.passes.sizes import At

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
            :attr:`Program.limit` says of each program: as soon as layers of it are rounded to eight bits, the
            signal-to-noise ratio of the outputs counts.

    Returns:
        ``check(name of the pass, program)``.

    Raises:
        PassError: From ``check``, where an output is off by more than is allowed; it names the pass, the output and the
            error.

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
    runs: dict[At | None, list[Results]] = {at: _results(program.model, program, at) for at in program.trials}

    def check(name: str, subject: Program) -> None:
        allowed = subject.limit if tolerance is None else Limit(tolerance)
        subject.module.recompile()  # a pass that forgot to would be found out only after the next
        wrong = compare(
            program.trials,
            lambda at: runs[at],
            lambda at, calls: _results(subject.module, subject, at, calls),
            allowed,
        ).wrong
        if wrong is None:
            return
        if wrong.counts[0] != wrong.counts[1]:
            raise PassError(
                f"after the pass {name} the graph gives {wrong.counts[1]} outputs{wrong.place}, the model "
                f"{wrong.counts[0]}; {_ADVICE}"
            )
        raise PassError(f"after the pass {name}, {wrong.what}{wrong.place} {wrong.off(allowed)} ({allowed}); {_ADVICE}")

    return check


def _results(model: nn.Module, program: Program, at: At | None, calls: int | None = None) -> list[Results]:
    return [run.results for run in run_steps(model, *program.inputs_at(at), calls)]
