"""Masks that were saved, for weights that are as they were saved with them.

Owns whether given masks and the weights of a model are of one save; it must not know where the masks come from.

Rules:
    1. There is a mask for each weight that becomes sparse and for no other: a bool tensor of the weight's shape.
    2. The weight is exactly zero off its mask: nothing that was trained is lost.
    3. Everything that does not fit is named in one error, before anything is written.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from srigl_fx.errors import RecipeError
from srigl_fx.masks.invariants import count_off
from srigl_fx.masks.records import plain
from srigl_fx.passes.base import Pass, PassResult
from srigl_fx.passes.draft import Draft

_NAMED = 5  # weights that one error names


@dataclass(frozen=True, kw_only=True)
class GivenMasks(Pass[Draft]):
    """Fill ``draft.masks`` and ``draft.values`` from saved masks (rules 1-3 of the module).

    Attributes:
        masks: The masks by the weights' names, without the prefixes of wrappers.
        pruning: Whether masks may keep more than their budgets, as they do while a model is pruned gradually.
    """

    masks: Mapping[str, Tensor]
    pruning: bool = False

    @torch.no_grad()
    def run(self, subject: Draft) -> PassResult[Draft]:
        """Match masks and weights by name."""
        left = dict(self.masks)
        problems: list[str] = []
        for fqn, record in subject.records.items():
            if not record.sparse:
                continue
            weight = subject.model.get_parameter(fqn)
            known = next((name for name in map(plain, (fqn, *record.site.aliases)) if name in left), None)
            mask = None if known is None else left.pop(known)
            found = [*_misfits(weight, mask)]
            problems += [f"{plain(fqn)!r} {what}" for what in found]
            if mask is not None and not found:
                subject.masks[fqn] = mask.to(weight.device)
                subject.values[fqn] = weight.detach().clone()
                subject.records[fqn] = replace(record, dense_start=self.pruning)
        problems += [f"there is a mask for {name!r}, which is not to be sparse" for name in left]
        if problems:
            more = f"; and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
            raise RecipeError(
                f"the saved masks do not fit this {type(subject.model).__name__}: {'; '.join(problems[:_NAMED])}{more}"
            )
        return PassResult(subject=subject, changed=False)


def _misfits(weight: nn.Parameter, mask: Tensor | None) -> Iterator[str]:
    """What keeps a mask from being that of a weight (rules 1 and 2)."""
    if mask is None:
        yield "has no mask"
    elif mask.dtype != torch.bool or mask.shape != weight.shape:
        yield f"needs a bool mask {tuple(weight.shape)}, not {mask.dtype} {tuple(mask.shape)}"
    elif count := count_off(weight, mask.to(weight.device)):
        yield f"is not zero at {count} places off its mask: the two are not of one save"
