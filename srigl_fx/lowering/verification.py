"""Whether a lowered model does what the model does.

Owns the comparison of the two, and what an error says of its cause. It must not know how the one was made of the other.
"""

from collections.abc import Callable

import torch

from srigl_fx.comparison import Comparison, Results, compare
from srigl_fx.errors import LoweringError, PassError
from srigl_fx.lowering.lowered import LoweredModule
from srigl_fx.passes.base import brief
from srigl_fx.passes.model_runs import Run, run_steps
from srigl_fx.passes.program import MatchedLayer, Program
from srigl_fx.passes.verify_program import verifier

_NAMED = 3  # layers that an error names as those with the most noise


def verify_lowered(program: Program, lowered: LoweredModule) -> Comparison:
    """Compare the lowered module with the model, several calls in a row where that keeps state.

    Raises:
        LoweringError: They differ by more than the program's :attr:`~srigl_fx.passes.program.Program.limit`.
    """
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

    allowed = program.limit
    found = compare(program.sizes, expected, got, allowed)
    if (wrong := found.wrong) is None:
        return found
    if wrong.counts[0] != wrong.counts[1]:
        raise LoweringError(
            f"the lowered model gives {wrong.counts[1]} outputs, the model {wrong.counts[0]}: please report it"
        )
    raise LoweringError(
        f"{wrong.what} of the lowered model {wrong.off(allowed)}{wrong.place} ({allowed}); "
        f"{_suspects(program, runs[wrong.size][wrong.call])}"
    )


def _suspects(program: Program, run: Run) -> str:
    """What may have made the lowered model differ, and what to do about it."""
    if run.changed:
        return (
            f"the forward keeps state in {', '.join(run.changed)}, and a graph keeps it in buffers alone: register "
            "what it writes as buffers (register_buffer)"
        )
    lowered = [layer for layer in program.layers if layer.decision != "dense"]
    layers = ", ".join(layer.weight.fqn for layer in lowered)
    dtypes = {layer.value_dtype for layer in lowered if layer.decision == "condensed"}
    exact = "; value_dtype=torch.float32 rounds no weights" if dtypes - {torch.float32} else ""
    return (
        f"lowered layers: {layers}{_noisiest(lowered)}{exact}. A model whose outputs depend on more than its inputs "
        "and buffers cannot be verified: pass verify=False if that is so"
    )


def _noisiest(layers: list[MatchedLayer]) -> str:
    """The layers of int8 with the smallest signal-to-noise ratios, which rules may keep in float32."""
    rounded = [(layer.snr, layer.weight.fqn) for layer in layers if layer.snr is not None and not layer.unrounded]
    named = ", ".join(f"{name} ({snr:.1f} dB)" for snr, name in sorted(rounded)[:_NAMED])
    if not named:
        return ""
    return (
        f"; most noise with int8 comes from {named}: give such layers torch.float32 by rules, or more example inputs "
        "where outputs are few numbers, as all count together"
    )


def second_check(captured: Program) -> Callable[[str, Program], None]:
    """The check after each pass; a LoweringError, which names no pass, where none is to blame.

    None is where the graph differs as it was captured, nor where layers are rounded to eight bits: that is asked for.
    """
    check = verifier(captured)
    try:
        check("capture", captured)
    except Exception as error:  # the graph may fail, too
        raise LoweringError(f"the captured graph differs from the model ({brief(error)})") from error

    def blaming(name: str, subject: Program) -> None:
        try:
            check(name, subject)
        except PassError as error:
            if subject.limit.snr is not None:
                raise LoweringError(str(error)) from error
            raise

    return blaming
