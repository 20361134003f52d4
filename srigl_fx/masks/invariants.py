"""What always holds for a sparse model, checked.

Owns :func:`verify`, and the part of it that every verb asks before it begins. It must not know which method trains the
model: it looks at masks, weights and optimizer state as they stand.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from srigl_fx.errors import InvariantError
from srigl_fx.masks import input_orders
from srigl_fx.masks.attached import engines
from srigl_fx.masks.completeness import unmasked_since
from srigl_fx.masks.optimizer_state import OptimizerState
from srigl_fx.masks.presence import added_since
from srigl_fx.masks.records import MASK_SUFFIX, Block, SparseWeight, sparse_weights
from srigl_fx.masks.shards import is_sharded, local, part

_REMEDY = (
    "; something else than its trainer wrote to it (an average of models, an adapter that was merged, another "
    "optimizer): srigl_fx.masks.apply(model) sets the weights to zero there, srigl_fx.masks.release(model) keeps their "
    "values and lets the mask keep everything"
)
_DIVERGED = (
    "; a step with gradients that were not finite, or a file, wrote them: resume from an earlier checkpoint, at a "
    "lower learning rate"
)
_AVERAGED = (
    "; masks that are averaged like weights (timm's ModelEmaV2, AveragedModel(use_buffers=True)) keep what any of them "
    "kept: load the masks of the model that trains into the average, then call srigl_fx.masks.apply"
)


@torch.no_grad()
def verify(model: nn.Module, optimizer: Optimizer | None = None) -> None:
    """Check every mask-managed weight of ``model``; return silently if all is well.

    1. Each weight is a parameter of its module, of the shape it had, with its mask beside it: a bool tensor of that
       shape, on its device. Nothing computes it from other tensors that did not when it was sparsified, and no weight
       without a mask took the place of one that had one.
    2. The weight is exactly zero off the mask (a NaN there counts as not zero).
    3. No block of rows keeps more weights than its budget, unless gradual pruning is still on its way there.
    4. With constant fan-in, every active neuron of a block has the same fan-in, ``budget // active`` or the full one,
       and enough neurons are active to hold the budget. While gradual pruning is on its way, every neuron is active.
       Of rows that share their inputs (:mod:`srigl_fx.masks.row_groups`), whatever the structure, all active ones keep
       the same.
    5. The optimizer holds every weight that trains (not asked where parameters are sharded: a forward may have left
       whole ones in their place). State that belongs to single weights
       (:mod:`srigl_fx.masks.optimizer_state`) is off the mask what it is for a new weight: zero, of most optimizers.
       Other state of the weight's shape is not looked at.
    6. Where a layer reads its inputs in an order of its own, that names each of them once; a matrix by which it is
       still learned is finite and nowhere negative.
    7. A trainer that is attached sees the gradients of every weight, and has left none that is not zero off the mask.

    :func:`srigl_fx.finalize`, :func:`srigl_fx.summary`, :func:`srigl_fx.lower`, :func:`srigl_fx.export_onnx` and
    trainers that attach ask for rules 1 and 2 first, :func:`srigl_fx.train.checkpoint.save` for rules 1 to 4.

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
    weights = sparse_weights(model)
    check_sound(model, weights)
    for handle in weights:
        for block, budget, rows in _blocks(handle):
            _check_block(handle, block, budget, rows)
        if optimizer is not None:
            _check_held(handle, optimizer)
            _check_state(handle, optimizer, part(handle.mask, handle.weight))
    for fault in input_orders.faults(model):
        raise InvariantError(fault)
    for fault in (fault for engine in engines(model, weights) for fault in engine.faults()):
        raise InvariantError(fault)


def check_sound(model: nn.Module, weights: Sequence[SparseWeight] | None = None) -> None:
    """Require that the model is what its masks say: rules 1 and 2 of :func:`verify`. Every verb asks this first.

    Args:
        model: A model that was sparsified.
        weights: Its masked weights, where they have been looked up.

    Raises:
        InvariantError: It is not; the message names the weight.

    Example:
        >>> check_sound(nn.Linear(4, 2))
    """
    weights = sparse_weights(model) if weights is None else weights
    check_in_place(model, weights)
    off = values_off(model, weights)
    for handle in weights:
        if count := off.get(handle.fqn):
            if not local(handle.weight).isfinite().all():
                raise InvariantError(f"{handle.fqn}: {_not_finite(handle)}{_DIVERGED}")
            raise InvariantError(f"{handle.fqn}: {count} weights off the mask are not zero{_REMEDY}")


def check_in_place(model: nn.Module, weights: Sequence[SparseWeight] | None = None) -> None:
    """Require that each mask lies beside its weight, and each weight beside its mask: rule 1 of :func:`verify`.

    Args:
        model: A model that was sparsified.
        weights: Its masked weights, where they have been looked up.

    Raises:
        InvariantError: One does not; the message names the weight.

    Example:
        >>> check_in_place(nn.Linear(4, 2))
    """
    for handle in sparse_weights(model) if weights is None else weights:
        _check_mask(handle)
    for name in unmasked_since(model):
        raise InvariantError(
            f"{name}: the weight that was here when the model was sparsified had a mask, and this one has none: its "
            "module or its parameter was replaced, or it was tied to another weight and is not any more. Put the "
            f"former one back or tie it again, or srigl_fx.masks.release(model, [{name!r}]) leaves it dense"
        )


def _not_finite(handle: SparseWeight) -> str:
    """How many values of a weight are not finite, on and off its mask."""
    wrong, kept = ~local(handle.weight).isfinite(), part(handle.mask.to(handle.weight.device), handle.weight)
    return f"{int((wrong & kept).sum())} kept weights and {int((wrong & ~kept).sum())} off the mask are NaN or infinite"


def values_off(model: nn.Module, weights: Sequence[SparseWeight] | None = None) -> dict[str, int]:
    """How many values are not zero off the mask, for each weight where there are any.

    Args:
        model: A model that was sparsified.
        weights: Its masked weights, where they have been looked up.

    Example:
        >>> values_off(nn.Linear(4, 2))
        {}
    """
    handles = sparse_weights(model) if weights is None else weights
    counts = {handle.fqn: count_off(handle.weight, handle.mask) for handle in handles}
    return {name: count for name, count in counts.items() if count}


def check_masks(model: nn.Module) -> None:
    """Require that the masks keep no more than one model may: rules 1 and 3 of :func:`verify`.

    Raises:
        InvariantError: They are not; the message names the weight.

    Example:
        >>> check_masks(nn.Linear(4, 2))
    """
    for handle in sparse_weights(model):
        _check_mask(handle)
        for _, budget, rows in _blocks(handle):
            kept = int(rows.sum())
            if kept > budget and not handle.record.dense_start:
                raise InvariantError(_over_budget(handle.fqn, kept, budget))


def _over_budget(where: str, kept: int, budget: int) -> str:
    return f"{where}: the mask keeps {kept} weights, more than the budget of {budget}{_AVERAGED}"


@torch.no_grad()
def count_off(weight: Tensor, mask: Tensor) -> int:
    """How many values of what this process holds of a weight are not zero where its mask is False.

    Example:
        >>> count_off(torch.tensor([1.0, 2.0]), torch.tensor([True, False]))
        1
    """
    return int(((local(weight) != 0) & ~part(mask.to(weight.device), weight)).sum())


def disagreements(state_dict: Mapping[str, Any], names: Mapping[str, str]) -> Iterator[str]:
    """What is wrong with the weights of a state_dict that are not zero off the masks that come with them.

    Args:
        state_dict: Any.
        names: The keys of weights there, and what they are to be called.

    Example:
        >>> list(disagreements({"weight": torch.ones(2)}, {"weight": "fc.weight"}))
        []
    """
    for key, name in names.items():
        weight, mask = state_dict.get(key), state_dict.get(key + MASK_SUFFIX)
        if not isinstance(weight, Tensor) or not isinstance(mask, Tensor) or weight.is_meta or mask.is_meta:
            continue
        if mask.dtype != torch.bool or mask.shape != weight.shape:
            continue
        if count := count_off(weight, mask):
            yield (
                f"{name}: in this state_dict, {count} weights off its mask {key + MASK_SUFFIX!r} are not zero: the two "
                "are not of one model at one time, as where weights are averaged over models whose masks differ. Call "
                "srigl_fx.masks.apply on the model it is made from, or leave the masks out of it; then the weights "
                "are cut to the masks that the loading model has"
            )


def over_budget(model: nn.Module, weights: Sequence[SparseWeight] | None = None) -> list[str]:
    """The names of the weights whose masks keep more than their budget, as gradual pruning starts from.

    Args:
        model: A model that was sparsified.
        weights: Its masked weights, where they have been looked up.

    Example:
        >>> over_budget(nn.Linear(4, 2))
        []
    """
    return [
        handle.fqn
        for handle in (sparse_weights(model) if weights is None else weights)
        if handle.record.dense_start and int(handle.mask.sum()) > sum(handle.record.budgets)
    ]


def _check_mask(handle: SparseWeight) -> None:
    """Rule 1 for one weight."""
    weight, mask, shape = handle.weight, handle.mask, handle.record.site.shape
    if added := added_since(handle.owner):
        raise InvariantError(
            f"{handle.fqn}: the parametrisation {' and '.join(added)} was registered on top after sparsify, and may "
            "fill pruned weights again: take it off (torch.nn.utils.parametrize.remove_parametrizations), and register "
            "it before sparsify"
        )
    if weight.shape != shape:
        raise InvariantError(
            f"{handle.fqn} has shape {tuple(weight.shape)}, and had {shape} when the model was sparsified: finalize "
            "the model, resize it, and sparsify it again"
        )
    if mask.dtype != torch.bool:
        raise InvariantError(
            f"{handle.mask_fqn} must be a bool tensor, not {mask.dtype}: something wrote a tensor of its own there"
        )
    if mask.shape != weight.shape:
        raise InvariantError(f"{handle.mask_fqn} has shape {tuple(mask.shape)}, its weight {tuple(weight.shape)}")
    if mask.device != weight.device:
        raise InvariantError(f"{handle.mask_fqn} is on {mask.device}, its weight on {weight.device}: use model.to(...)")


def _blocks(handle: SparseWeight) -> Iterator[tuple[Block, int, Tensor]]:
    """The blocks of a weight's rows, with their budgets and their rows of the mask."""
    matrix = handle.record.site.to_matrix(handle.mask)
    for block, budget in zip(handle.record.site.blocks, handle.record.budgets, strict=True):
        yield block, budget, matrix[block.start : block.stop]


def _check_held(handle: SparseWeight, optimizer: Optimizer) -> None:
    """Rule 5: whether the optimizer has the weight at all."""
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if any(map(is_sharded, held)):  # a forward may have left whole parameters in the place of the sharded ones
        return
    if handle.weight.requires_grad and not any(parameter is handle.weight for parameter in held):
        raise InvariantError(
            f"{handle.fqn}: the optimizer does not hold this weight, and does not train it: create the optimizer from "
            "model.parameters() of this very model, after anything that replaces parameters"
        )


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
    """Rules 3 and 4 for one block of a weight's rows."""
    where = f"{handle.fqn} (rows {block.start}-{block.stop - 1}, {block.name})" if block.name else handle.fqn
    if fault := handle.record.row_groups(block).fault(mask):
        raise InvariantError(f"{where}: {fault}{_AVERAGED}")
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
        raise InvariantError(_over_budget(where, kept, budget))
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
