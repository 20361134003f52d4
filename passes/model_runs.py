"""Running a model, or its graph, for comparison: without gradients, and so that it is afterwards as it was.

Owns one run and several in a row. It must not know what their results are compared with.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from srigl_fx.comparison import Results
from srigl_fx.errors import CaptureError
from srigl_fx.nn.model_state import copies, restored
from srigl_fx.passes.tracing import plain_execution

STEPS = 3  # in a row, of a model that keeps state


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one forward pass did.

    Attributes:
        output: What it returned.
        written: The buffers written so far, by name, and how their type or sizes changed ("" where they did not).
        changed: The names of other attributes changed so far.
        buffers: The values of the written buffers afterwards.
    """

    output: Any
    written: dict[str, str]
    changed: tuple[str, ...]
    buffers: dict[str, Tensor]

    @property
    def keeps_state(self) -> bool:
        """Whether what the next pass returns may depend on this one."""
        return bool(self.written or self.changed)

    @property
    def results(self) -> Results:
        """What there is to compare with another model's pass."""
        return Results(pytree.tree_leaves(self.output), self.buffers)


def run_model(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One forward pass that leaves no trace: no gradients, buffers and the random state as they were."""
    return run_steps(model, args, kwargs, 1)[0].output


def run_steps(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], steps: int | None = None) -> list[Run]:
    """Several forward passes in a row on the same inputs; afterwards, as after :func:`run_model`, all is as before.

    What one pass writes, the next reads. By default :data:`STEPS` of a model that keeps state, else one.

    Raises:
        CaptureError: The forward writes to a parameter, which then keeps what was written: no copies of parameters are
            held. The message names it.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> [int(run.buffers["num_batches_tracked"]) for run in run_steps(norm, (torch.ones(3, 2),), {})]
        [1, 2, 3]
        >>> len(run_steps(norm.eval(), (torch.ones(3, 2),), {}))
        1
    """
    runs: list[Run] = []
    versions = _versions(model)
    with torch.no_grad(), torch.random.fork_rng(devices=[]), plain_execution(), restored(model) as state:
        torch.manual_seed(0)
        while steps is None or len(runs) < steps:
            given, named = copies((args, kwargs))  # a forward may write into its inputs
            output = _apart(model(*given, **named))
            _check_parameters(model, versions)
            written, values = state.written(), state.values()
            runs.append(
                Run(
                    output=output,
                    written=written,
                    changed=tuple(state.changed_attributes()),
                    buffers={name: values[name] for name in written if name in values},
                )
            )
            if steps is None:
                steps = STEPS if runs[0].keeps_state else 1
    return runs


def _versions(model: nn.Module) -> dict[str, int]:
    """How often each parameter was written to; of those that have values, and count."""
    return {
        name: parameter._version
        for name, parameter in model.named_parameters()
        if not isinstance(parameter, nn.parameter.UninitializedParameter) and not parameter.is_inference()
    }


def _check_parameters(model: nn.Module, before: dict[str, int]) -> None:
    now = _versions(model)
    for name, version in before.items():
        if now.get(name, version) != version:
            path, _, own = name.rpartition(".")
            raise CaptureError(
                f"the forward of {path or 'the model'} ({type(model.get_submodule(path)).__name__}) writes to its "
                f"parameter {own!r}, which no graph does: register what a forward writes with register_buffer. The run "
                "on the example inputs has written to it, too"
            )


def _apart(output: Any) -> Any:
    """An output whose tensors the next pass does not write into: one may be a buffer."""
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, output)
