"""Whether a lowered model does what the model does.

Owns the comparison of the two, and what an error says of its cause. It must not know how the one was made of the other.
"""

from collections.abc import Callable

import torch

from srigl_fx.comparison import Results, compare
from srigl_fx.errors import LoweringError
from srigl_fx.lowering.lowered import LoweredModule
from srigl_fx.passes.base import brief
from srigl_fx.passes.model_runs import Run, run_steps
from srigl_fx.passes.program import Program
from srigl_fx.passes.verify_program import verifier


def verify_lowered(program: Program, lowered: LoweredModule) -> float:
    """Compare the lowered module with the model, several calls in a row where that keeps state; the largest error."""
    runs: dict[int | None, list[Run]] = {}

    def expected(size: int | None) -> list[Results]:
        runs[size] = run_steps(program.model, *program.inputs(size, apart=True))
        return [run.results for run in runs[size]]

    def got(size: int | None, calls: int) -> list[Results]:
        try:
            return [run.results for run in run_steps(lowered, *program.inputs(size, apart=True), calls)]
        except Exception as error:  # of any operator
            raise LoweringError(
                f"the lowered model fails at batch {size} ({brief(error)}), where the model does not; "
                f"{_suspects(program, runs[size][0])}"
            ) from error

    found = compare(program.sizes, expected, got, program.tolerance)
    if (wrong := found.wrong) is None:
        return found.worst
    if wrong.counts[0] != wrong.counts[1]:
        raise LoweringError(
            f"the lowered model gives {wrong.counts[1]} outputs, the model {wrong.counts[0]}: please report it"
        )
    raise LoweringError(
        f"{wrong.what} of the lowered model is off by {wrong.error:.2e} of the largest value{wrong.place} "
        f"(allowed: {program.tolerance:.2e}); {_suspects(program, runs[wrong.size][wrong.call])}"
    )


def _suspects(program: Program, run: Run) -> str:
    """What may have made the lowered model differ, and what to do about it."""
    if run.changed:
        return (
            f"the forward keeps state in {', '.join(run.changed)}, and a graph keeps it in buffers alone: register "
            "what it writes as buffers (register_buffer)"
        )
    layers = ", ".join(layer.weight.fqn for layer in program.layers if layer.decision != "dense")
    exact = "" if program.value_dtype is torch.float32 else "; value_dtype=torch.float32 rounds no weights"
    return (
        f"lowered layers: {layers}{exact}. A model whose outputs depend on more than its inputs and buffers cannot be "
        "verified: pass verify=False if that is so"
    )


def second_check(captured: Program) -> Callable[[str, Program], None]:
    """The check after each pass; a LoweringError where the graph differs as it was captured: then none is to blame."""
    check = verifier(captured)
    try:
        check("capture", captured)
    except Exception as error:  # the graph may fail, too
        raise LoweringError(f"the captured graph differs from the model ({brief(error)})") from error
    return check
