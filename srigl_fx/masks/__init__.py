"""What a mask is: records, structures, budgets, distributions, initialisation, invariants.

Owns the view of a model as masked weights. It must not know how weights are discovered, trained or lowered.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from srigl_fx.masks import budgets, distributions, initialisation, invariants, records, shards, structures
from srigl_fx.masks.invariants import verify

__all__ = [
    "apply",
    "budgets",
    "distributions",
    "initialisation",
    "invariants",
    "named_masks",
    "records",
    "shards",
    "strip",
    "structures",
    "verify",
]


def named_masks(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (weight FQN, mask) for every mask-managed weight, in registration order.

    The mask is the live bool buffer, of the weight's shape; a tied weight appears once, under its first name.

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

    Example:
        >>> from torch import nn
        >>> apply(nn.Linear(3, 2))
    """
    for handle in records.sparse_weights(model):
        weight = handle.weight
        shards.local(weight).masked_fill_(~shards.part(handle.mask, weight), 0.0)


def strip(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of ``state_dict`` without masks, which the dense model loads; tensors are shared.

    A mask is a bool entry ``<name>_mask`` beside an entry ``<name>`` of the same shape.

    Example:
        >>> mask = torch.tensor([True, False])
        >>> state = {"weight": torch.ones(2), "weight_mask": mask, "attn_mask": torch.ones(1)}
        >>> list(strip(state))
        ['weight', 'attn_mask']
    """
    stripped: OrderedDict[str, Any] = OrderedDict(
        (name, value) for name, value in state_dict.items() if not _is_mask(state_dict, name, value)
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
