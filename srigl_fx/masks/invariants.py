"""What always holds for a sparse model, checked.

Owns :func:`verify`. It must not know which method trains the model: it looks at masks, weights and optimizer state
as they stand.
"""

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from srigl_fx.errors import InvariantError
from srigl_fx.masks.attached import engines
from srigl_fx.masks.optimizer_state import OptimizerState
from srigl_fx.masks.records import Block, SparseWeight, sparse_weights
from srigl_fx.masks.shards import local, part

_REMEDY = "; srigl_fx.masks.apply(model) sets the weights to zero there"


@torch.no_grad()
def verify(model: nn.Module, optimizer: Optimizer | None = None) -> None:
    """Check every mask-managed weight of ``model``; return silently if all is well.

    1. The mask is a bool tensor of the weight's shape, on its device.
    2. The weight is exactly zero off the mask (a NaN there counts as not zero).
    3. No block of rows keeps more weights than its budget, unless gradual pruning is still on its way there.
    4. With constant fan-in, every active neuron of a block has the same fan-in, ``budget // active`` or the full one,
       and enough neurons are active to hold the budget. While gradual pruning is on its way, every neuron is active.
    5. Optimizer state that belongs to single weights (:mod:`srigl_fx.masks.optimizer_state`) holds off the mask what
       it holds for a new weight: zero, of most optimizers. Other state of the weight's shape is not looked at.

    6. A trainer that is attached sees the gradients of every weight, and has left none that is not zero off the mask.

    Of a weight that is spread over processes, each checks the part it holds.

    Args:
        model: A model that was sparsified; a model without masks passes.
        optimizer: Its optimizer, for rule 5.

    Raises:
        InvariantError: A rule is broken; the message names the weight.

    Source: SRigL (Lasby et al., ICLR 2024), section 3.

    Example:
        >>> verify(nn.Linear(4, 2))
    """
    for handle in sparse_weights(model):
        weight, mask = _tensors(handle)
        held = part(mask, weight)
        if count := int(((local(weight) != 0) & ~held).sum()):
            raise InvariantError(f"{handle.fqn}: {count} weights off the mask are not zero{_REMEDY}")
        matrix = handle.record.site.to_matrix(mask)
        for block, budget in zip(handle.record.site.blocks, handle.record.budgets, strict=True):
            _check_block(handle, block, budget, matrix[block.start : block.stop])
        if optimizer is not None:
            _check_state(handle, optimizer, held)
    for fault in (fault for engine in engines(model) for fault in engine.faults()):
        raise InvariantError(fault)


def over_budget(model: nn.Module) -> list[str]:
    """The names of the weights whose masks keep more than their budget, as gradual pruning starts from.

    Example:
        >>> over_budget(nn.Linear(4, 2))
        []
    """
    return [
        handle.fqn
        for handle in sparse_weights(model)
        if handle.record.dense_start and int(handle.mask.sum()) > sum(handle.record.budgets)
    ]


def _tensors(handle: SparseWeight) -> tuple[nn.Parameter, Tensor]:
    """The weight and its mask, after rule 1."""
    try:
        weight, mask = handle.weight, handle.mask
    except AttributeError as error:
        raise InvariantError(f"{handle.fqn}: the weight or its mask was removed from its module ({error})") from error
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise InvariantError(f"{handle.mask_fqn} must be a bool tensor, not {getattr(mask, 'dtype', type(mask))}")
    if mask.shape != weight.shape:
        raise InvariantError(f"{handle.mask_fqn} has shape {tuple(mask.shape)}, its weight {tuple(weight.shape)}")
    if mask.device != weight.device:
        raise InvariantError(f"{handle.mask_fqn} is on {mask.device}, its weight on {weight.device}: use model.to(...)")
    return weight, mask


def _check_state(handle: SparseWeight, optimizer: Optimizer, held: Tensor) -> None:
    """Rule 5, for what the optimizer holds of one weight."""
    for state in OptimizerState.of(optimizer).elementwise(handle.weight):
        value = local(state.tensor)
        if bool((~value.isfinite() & ~held).any()):
            raise InvariantError(
                f"{handle.fqn}: the optimizer state {state.name!r} is not finite: a gradient was NaN or infinite at "
                "some step; resume from an earlier checkpoint, at a lower learning rate"
            )
        fresh = torch.tensor(state.fresh, dtype=value.dtype, device=value.device)
        if state.steady and bool(((value != fresh) & ~held).any()):
            raise InvariantError(
                f"{handle.fqn}: the optimizer state {state.name!r} is not {state.fresh:g}, as a new weight's, off the "
                "mask; attach a trainer (SRigL or Static) to this optimizer, or create the optimizer anew"
            )


def _check_block(handle: SparseWeight, block: Block, budget: int, mask: Tensor) -> None:
    where = f"{handle.fqn} (rows {block.start}-{block.stop - 1}, {block.name})" if block.name else handle.fqn
    counts = mask.sum(dim=1)
    kept = int(counts.sum())
    if handle.record.dense_start and kept > budget:
        if handle.record.structure == "constant_fan_in" and int(counts.min()) != int(counts.max()):
            raise InvariantError(
                f"{where}: gradual pruning must leave every neuron the same fan-in, but they range from "
                f"{int(counts.min())} to {int(counts.max())}"
            )
        return
    if kept > budget:
        raise InvariantError(f"{where}: the mask keeps {kept} weights, more than the budget of {budget}")
    if handle.record.structure != "constant_fan_in":
        return
    fan_in = mask.shape[1]
    active = int((counts > 0).sum())
    if active < -(-budget // fan_in):
        raise InvariantError(f"{where}: {active} active neurons of fan-in {fan_in} cannot hold the budget of {budget}")
    expected = min(fan_in, budget // active)
    if bool(((counts != 0) & (counts != expected)).any()):
        raise InvariantError(
            f"{where}: {active} active neurons must have a fan-in of {expected} each, but their fan-ins are "
            f"{sorted(set(counts[counts > 0].tolist()))}"
        )
