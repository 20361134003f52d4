"""Whether a trainer may be attached to a model and an optimizer.

Owns the checks before one attaches, and detaching from outside. It must not know what an engine does.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from srigl_fx.errors import TrainerError
from srigl_fx.masks.attached import engines
from srigl_fx.masks.invariants import check_in_place
from srigl_fx.masks.records import SparseWeight, sparse_weights
from srigl_fx.train.distributed import check_wrapping
from srigl_fx.train.stepping import family, unwrap


@dataclass(frozen=True)
class Attachable:
    """What :func:`check_attachable` found, for those who attach: they need not look again.

    Attributes:
        weights: The model's masked weights, in registration order.
        optimizer: The optimizer whose steps are to be followed, without what only passes calls on to it.
    """

    weights: Sequence[SparseWeight]
    optimizer: Optimizer


def detach_from(model: nn.Module) -> None:
    """Remove the hooks of every trainer attached to ``model`` or a part of it.

    Example:
        >>> detach_from(nn.Linear(3, 2))
    """
    for engine in engines(model):
        engine.detach()


def check_attachable(model: nn.Module, optimizer: object) -> Attachable:
    """Check that a trainer may attach to ``model`` and ``optimizer``, and touch neither.

    Raises:
        TrainerError: Nothing is masked, a trainer is attached already, or the optimizer is not one whose steps masks
            can follow, or does not hold the masked parameters.
        InvariantError: A weight or its mask is not where it was. Of values off a mask the engine knows.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> check_attachable(layer, torch.optim.SGD(layer.parameters(), lr=0.1))
        Traceback (most recent call last):
        srigl_fx.errors.TrainerError: Linear has no mask-managed weight: call srigl_fx.sparsify(model) first
    """
    if not isinstance(model, nn.Module) or not (weights := sparse_weights(model)):
        raise TrainerError(f"{type(model).__name__} has no mask-managed weight: call srigl_fx.sparsify(model) first")
    followed = unwrap(optimizer)
    if any(isinstance(each, torch.optim.LBFGS) for each in family(followed)):
        raise TrainerError(
            "LBFGS evaluates a closure many times in one step and keeps a history that masks cannot follow: "
            "use SGD, Adam, AdamW or another optimizer that takes one gradient a step"
        )
    if engines(model, weights):
        raise TrainerError(
            "a trainer is attached to this model already: call .detach() on it, or srigl_fx.train.detach_from(model), "
            "before attaching another one"
        )
    check_wrapping(model, weights)
    check_in_place(model, weights)
    check_held(weights, followed)
    return Attachable(weights, followed)


def check_held(weights: Iterable[SparseWeight], optimizer: Optimizer) -> None:
    """Check that ``optimizer`` holds every masked parameter that requires gradients.

    Raises:
        TrainerError: It does not; the message names them.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> check_held(sparse_weights(layer), torch.optim.SGD(layer.parameters(), lr=0.1))
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [handle.fqn for handle in weights if handle.weight.requires_grad and id(handle.weight) not in held]
    if missing:
        raise TrainerError(
            f"the optimizer does not hold {_some(missing)}: create it from model.parameters() of this very model, "
            "after anything that replaces parameters (load_state_dict(..., assign=True), fully_shard, a copy). A "
            "trainer follows one optimizer: leave the weights that another one trains dense with rules={name: None}, "
            "and freeze those that none trains with requires_grad_(False)"
        )


def _some(names: Iterable[str], most: int = 5) -> str:
    """The first few of ``names``, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more
