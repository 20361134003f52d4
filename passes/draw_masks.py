"""Draw the initial masks, and the values the kept weights start from.

Owns the order of the two: mask first, then initialisation by the sparse fan-in. The model is only read.

Rules:
    1. Each block of a weight draws its own mask within its own budget, from a generator seeded by the call's seed and
       the weight's name, so a weight's mask does not depend on the others. Rows of a block that share their inputs are
       drawn as one.
    2. Values off the mask are exactly zero.
    3. Where masks start full, to be pruned in training, the record says so.
"""

import zlib
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from srigl_fx.masks.initialisation import initialise
from srigl_fx.masks.records import WeightRecord, plain
from srigl_fx.masks.structures import MaskInit, initial_mask
from srigl_fx.passes.base import Pass, PassResult
from srigl_fx.passes.draft import Draft

WeightInit = Literal["keep", "kaiming", "torch", "grad_flow_ref"]


@dataclass(frozen=True, kw_only=True)
class DrawMasks(Pass[Draft]):
    """Fill ``draft.masks`` and ``draft.values`` for every sparse record (rules 1-3 of the module)."""

    mask_init: MaskInit
    weight_init: WeightInit
    seed: int

    def run(self, subject: Draft) -> PassResult[Draft]:
        """Draw mask and values of each sparse weight."""
        for fqn, record in subject.records.items():
            if record.sparse:
                subject.masks[fqn], subject.values[fqn] = self._draw(fqn, subject.model.get_parameter(fqn), record)
                subject.records[fqn] = replace(record, dense_start=self.mask_init == "dense")
        return PassResult(subject=subject, changed=False)

    @torch.no_grad()
    def _draw(self, fqn: str, parameter: nn.Parameter, record: WeightRecord) -> tuple[Tensor, Tensor]:
        name = plain(fqn)  # the one that a recipe has: what wraps the model changes no mask
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed}:{name}".encode()))  # it reads 32 bits
        matrix = record.site.to_matrix(parameter.detach())
        masks, values = [], []
        assert record.structure is not None
        for block, budget in zip(record.site.blocks, record.budgets, strict=True):
            rows = matrix[block.start : block.stop]
            mask = initial_mask(
                rows,
                structure=record.structure,
                budget=budget,
                init=self.mask_init,
                generator=generator,
                groups=record.row_groups(block),
            )
            masks.append(mask)
            values.append(initialise(rows, mask, self.weight_init, generator))
        return record.site.from_matrix(torch.cat(masks)), record.site.from_matrix(torch.cat(values))
