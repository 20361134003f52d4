"""What a mask is: records, structures, budgets, distributions, initialisation, invariants.

Owns the view of a model as masked weights. It must not know how weights are discovered, trained or lowered.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from srigl_fx.errors import InvariantError
from srigl_fx.masks import (
    budgets,
    completeness,
    distributions,
    initialisation,
    input_orders,
    invariants,
    records,
    shards,
    structures,
)
from srigl_fx.masks.invariants import verify

__all__ = [
    "apply",
    "budgets",
    "completeness",
    "distributions",
    "initialisation",
    "input_orders",
    "invariants",
    "named_masks",
    "records",
    "release",
    "shards",
    "strip",
    "structures",
    "verify",
]


def named_masks(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (weight FQN, mask) for every mask-managed weight, in registration order.

    The mask is the live bool buffer, of the weight's shape; a tied weight appears once, under its first name.

    Args:
        model: Any model; one without masks yields nothing.

    Example:
        >>> from torch import nn
        >>> list(named_masks(nn.Linear(3, 2)))
        []
    """
    for handle in records.sparse_weights(model):
        yield handle.fqn, handle.mask


@torch.no_grad()
def apply(model: nn.Module) -> None:
    """Set every weight of ``model`` to exactly zero off its mask, in place.

    For weights that were written by something other than training, such as a moving average of several models.

    Raises:
        InvariantError: A mask is not one of a single model: it keeps more than its budget, say, because masks were
            averaged as well. Nothing is written then.

    Example:
        >>> from torch import nn
        >>> apply(nn.Linear(3, 2))
    """
    invariants.check_masks(model)
    for handle in records.sparse_weights(model):
        weight = handle.weight
        shards.local(weight).masked_fill_(~shards.part(handle.mask, weight), 0.0)


@torch.no_grad()
def release(model: nn.Module, names: Iterable[str] | None = None) -> list[str]:
    """Keep the values that weights have, off their masks too: the masks keep everything from now on, in place.

    For weights that shall be dense after all, because an adapter was merged into them, say. They still count as sparse
    ones, of a sparsity of zero. Detach a trainer first: it knows their budgets.

    Args:
        model: A model that was sparsified.
        names: The weights, as :func:`named_masks` names them, or :func:`verify` where they have no mask any more; by
            default all that are not zero off their masks.

    Returns:
        Their names.

    Raises:
        InvariantError: A name is not one of those.

    Example:
        >>> import srigl_fx as sx
        >>> from torch import nn
        >>> model = sx.sparsify(nn.Sequential(nn.Linear(64, 32)), sparsity=0.5)
        >>> with torch.no_grad():
        ...     _ = model[0].weight.add_(torch.ones(32, 2) @ torch.ones(2, 64))
        >>> release(model), sx.summary(model).sparsity
        (['0.weight'], 0.0)
    """
    handles = {handle.fqn: handle for handle in records.sparse_weights(model)}
    unmasked = set(completeness.unmasked_since(model))
    if names is None:
        chosen = list(invariants.values_off(model))
    else:
        chosen = list(names)
        if unknown := [name for name in chosen if name not in handles and name not in unmasked]:
            raise InvariantError(f"no masked weight is called {', '.join(unknown)}; there are {', '.join(handles)}")
    for handle in (handles[name] for name in chosen if name in handles):
        handle.mask.fill_(True)
        width = handle.record.site.matrix_shape[1]
        full = tuple(block.rows * width for block in handle.record.site.blocks)
        records.replace_record(model, handle, replace(handle.record, budgets=full, dense_start=False))
    completeness.let_go(model, unmasked.intersection(chosen))
    return chosen


def strip(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of ``state_dict`` without masks, which the dense model loads; tensors are shared.

    A mask is a bool entry ``<name>_mask`` beside an entry ``<name>`` of the same shape.

    Args:
        state_dict: What the ``state_dict()`` of a sparse model gave, or a file that was saved of it; it is not changed.

    Raises:
        InvariantError: A weight is not zero off its mask, or a layer reads its inputs in an order of its own: the dense
            model would not compute what the sparse one does.

    Example:
        >>> mask = torch.tensor([True, False])
        >>> state = {"weight": torch.tensor([2.0, 0.0]), "weight_mask": mask, "attn_mask": torch.ones(1)}
        >>> list(strip(state))
        ['weight', 'attn_mask']
    """
    if ordered := input_orders.entries(state_dict):
        raise InvariantError(
            f"{ordered[0]}: the layer reads its inputs in an order of its own, which a dense model knows nothing of: "
            "call srigl_fx.finalize on a copy of the model, and take the state_dict of that"
        )
    found = {name for name, value in state_dict.items() if _is_mask(state_dict, name, value)}
    weights = [name.removesuffix(records.MASK_SUFFIX) for name in state_dict if name in found]
    for problem in invariants.disagreements(state_dict, dict(zip(weights, weights, strict=True))):
        raise InvariantError(problem)
    stripped: OrderedDict[str, Any] = OrderedDict(
        (name, value) for name, value in state_dict.items() if name not in found
    )
    if hasattr(state_dict, "_metadata"):
        # torch keeps the modules' version numbers there, and load_state_dict reads them.
        stripped._metadata = state_dict._metadata  # type: ignore[attr-defined]
    return stripped


def _is_mask(state_dict: Mapping[str, Any], name: str, value: object) -> bool:
    weight = state_dict.get(name.removesuffix(records.MASK_SUFFIX)) if name.endswith(records.MASK_SUFFIX) else None
    return (
        isinstance(value, Tensor)
        and isinstance(weight, Tensor)
        and value.dtype == torch.bool
        and value.shape == weight.shape
    )
