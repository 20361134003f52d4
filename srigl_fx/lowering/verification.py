"""Whether a lowered model does what the model does.

Owns the comparison of the two, and what an error says of its cause. It must not know how the one was made of the other.
"""

from collections.abc import Callable

import torch
from torch import nn

from srigl_fx.comparison import Comparison, Results, compare
from srigl_fx.errors import LoweringError, PassError
from srigl_fx.lowering.lowered import LoweredModule
from srigl_fx.passes.base import brief
from srigl_fx.passes.model_runs import Run, run_steps
from srigl_fx.passes.program import MatchedLayer, Program, attribute_at
from srigl_fx.passes.sizes import At
from srigl_fx.passes.verify_program import verifier

_NAMED = 3  # layers that an error names as those with the most noise
_UNVERIFIABLE = (
    "A model whose outputs depend on more than its inputs and buffers cannot be verified: pass verify=False if that is "
    "so"
)


class CapturedGraphError(LoweringError):
    """The graph as it was captured, before any pass, does not compute what the model does: no pass is to blame."""


def verify_lowered(program: Program, lowered: LoweredModule) -> Comparison:
    """Compare the lowered module with the model, several calls in a row where that keeps state.

    Raises:
        LoweringError: They differ by more than the program's :attr:`~srigl_fx.passes.program.Program.limit`.
    """
    return _verify(program, lowered, "lowered model", lambda _: _suspects(program), LoweringError)


def checked(captured: Program) -> Callable[[str, Program], None]:
    """The check after each pass, :func:`~srigl_fx.passes.verify_program.verifier`, of a graph that is right so far.

    Raises:
        CapturedGraphError: It is not; the message says why, where that can be found.
    """
    _verify(captured, captured.module, "graph as captured", lambda run: _cause(captured, run), CapturedGraphError)
    return verifier(captured)


def second_check(captured: Program) -> Callable[[str, Program], None]:
    """The check after each pass, as :func:`checked` gives it, that blames no pass for layers rounded to eight bits.

    That is asked for: it raises a LoweringError there, which is no PassError.
    """
    check = checked(captured)

    def blaming(name: str, subject: Program) -> None:
        try:
            check(name, subject)
        except PassError as error:
            if subject.limit.snr is not None:
                raise LoweringError(str(error)) from error
            raise

    return blaming


def _verify(
    program: Program, graph: nn.Module, which: str, why: Callable[[Run], str], error_type: type[LoweringError]
) -> Comparison:
    """Compare the model with a graph made of it, called ``which``; ``why`` it may differ, by what the model did."""
    runs: dict[At, list[Run]] = {}

    def expected(at: At) -> list[Results]:
        runs[at] = run_steps(program.model, *program.inputs_at(at))
        return [run.results for run in runs[at]]

    def got(at: At, calls: int) -> list[Results]:
        try:
            return [run.results for run in run_steps(graph, *program.inputs_at(at), calls)]
        except Exception as error:  # of any operator
            raise error_type(
                f"the {which} fails at {at} ({brief(error)}), where the model does not; {why(runs[at][0])}"
            ) from error

    allowed = program.limit
    found = compare(program.trials, expected, got, allowed)
    if (wrong := found.wrong) is None:
        return found
    if wrong.counts[0] != wrong.counts[1]:
        raise error_type(f"the {which} gives {wrong.counts[1]} outputs, the model {wrong.counts[0]}: please report it")
    assert isinstance(wrong.at, At)
    cause = why(runs[wrong.at][wrong.call])
    raise error_type(f"{wrong.what} of the {which} {wrong.off(allowed)}{wrong.place} ({allowed}); {cause}")


def _cause(captured: Program, run: Run) -> str:
    """What makes a graph differ from its model although no pass has run, and what to do about it."""
    if run.changed:
        return (
            f"the forward keeps state in {', '.join(run.changed)}, and a graph keeps it in buffers alone: register "
            "what it writes as buffers (register_buffer)"
        )
    reads = captured.module.graph.find_nodes(op="get_attr")
    drawn = [
        user.name
        for node in reads
        if isinstance(attribute_at(captured.module, str(node.target)), torch.Generator)
        for user in node.users
    ]
    if drawn:
        return (
            f"the forward draws from a torch.Generator ({', '.join(drawn)}), which a graph never seeds again: draw in "
            "__init__, and register what was drawn as a buffer (register_buffer)"
        )
    return f"no pass has run yet. {_UNVERIFIABLE}"


def _suspects(program: Program) -> str:
    """What may have made the lowered model differ, and what to do about it."""
    lowered = [layer for layer in program.layers if layer.decision != "dense"]
    layers = ", ".join(layer.weight.fqn for layer in lowered)
    dtypes = {layer.value_dtype for layer in lowered if layer.decision == "condensed"}
    exact = "; value_dtype=torch.float32 rounds no weights" if dtypes - {torch.float32} else ""
    return f"lowered layers: {layers}{_noisiest(lowered)}{exact}. {_UNVERIFIABLE}"


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
