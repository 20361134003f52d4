"""Keeping the optimizer's state of pruned weights as a new weight's state begins.

Owns what is written to optimizer state, and when. It must not know hooks, gradients or schedules, nor how the state
that belongs to single weights is told from other state (:mod:`srigl_fx.masks.optimizer_state`).
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from srigl_fx.errors import TrainerError
from srigl_fx.masks.optimizer_state import OptimizerState
from srigl_fx.masks.projection import keep_only
from srigl_fx.masks.records import SparseWeight
from srigl_fx.train.managed import ManagedWeight

# Given masked gradients, these keep zero weights and fresh state as they are; of others nothing is assumed.
ELEMENTWISE = frozenset(
    {
        torch.optim.SGD,
        torch.optim.Adam,
        torch.optim.AdamW,
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.RMSprop,
        torch.optim.Adagrad,
        torch.optim.Adadelta,
    }
)


class MaskedState:
    """What masks do to the state of one optimizer."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._state = OptimizerState.of(optimizer)

    def mask(self, managed: ManagedWeight, *, force: bool) -> bool:
        """Set the state off the mask to what a new weight's state is; return whether that was done.

        Without ``force`` it is done only if there are other state tensors than at the last call.
        """
        found = self._state.elementwise(managed.handle.weight)
        sources = tuple(state.source for state in found)
        same = len(sources) == len(managed.states) and all(a is b for a, b in zip(sources, managed.states, strict=True))
        if force or not same:
            for state in found:
                if state.fresh == 0.0:
                    managed.project(state.tensor)
                else:
                    managed.own(state.tensor).masked_fill_(~managed.mask, state.fresh)
            managed.states = sources
        return force or not same

    def begin_anew(self, managed: ManagedWeight, staying: Tensor) -> None:
        """Bring the state of weights that do not stay, those that leave and those that grow, to that of new ones."""
        for state in self._state.elementwise(managed.handle.weight):
            own = managed.own(state.tensor)
            if state.fresh == 0.0:
                keep_only(own, staying)
            else:
                own.masked_fill_(~staying, state.fresh)


def keeps_zeros(optimizer: Optimizer) -> bool:
    """Whether zero gradients and fresh state leave a zero weight where it is: not if the step divides zero by zero.

    Example:
        >>> keeps_zeros(torch.optim.Adam([torch.zeros(2)])), keeps_zeros(torch.optim.Adamax([torch.zeros(2)]))
        (True, False)
    """
    smallest = {torch.float16: 1e-7}  # below it an eps becomes 0 there
    return type(optimizer) in ELEMENTWISE and all(
        group.get("eps", 1.0) > max((smallest.get(parameter.dtype, 0.0) for parameter in group["params"]), default=0.0)
        for group in optimizer.param_groups
    )


def check_growable(weights: Iterable[SparseWeight], optimizer: Optimizer) -> None:
    """Require that a weight which grows can begin as a new one does, as far as its state is its own.

    Raises:
        TrainerError: It cannot, or that is not known; the message names the optimizer.

    Example:
        >>> check_growable([], torch.optim.SGD(torch.nn.Linear(3, 2).parameters(), lr=0.1))
    """
    state = OptimizerState.of(optimizer)
    for handle in weights:
        if (obstacle := state.obstacle(handle.weight)) is not None:
            raise TrainerError(
                f"a weight of {handle.fqn} that grows cannot begin like a new one: {obstacle}. Train with fixed masks "
                "(Static), with another optimizer, or, where its state does begin with the same values everywhere, say "
                "so: srigl_fx.masks.optimizer_state.declare(TheOptimizer, exp_avg=0.0, ...)"
            )
