"""Decide masks from the zeros that the weights of a model have already.

Owns the rules below; it must not know what pruned the model. The model is only read.

Rules:
    1. What can only stay dense does, with the reason that discovery gives.
    2. A weight stays dense where less than ``min_sparsity`` of it is zero, and where all of it is.
    3. Else its mask keeps what is not zero; a NaN is not. Values stay as they are.
    4. The structure is a constant fan-in if, in each block, all rows that keep anything keep equally many; else it is
       unstructured. Rows that keep nothing are ablated neurons.
    5. The budget of a block is what it keeps.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from srigl_fx.errors import SparsifyError
from srigl_fx.masks.records import Structure, WeightRecord, WeightSite, dense_record
from srigl_fx.passes.base import Note, Pass, PassResult
from srigl_fx.passes.draft import Draft, Finding

_NAMED = 8  # weights that one error names


@dataclass(frozen=True, kw_only=True)
class AdoptZeros(Pass[Draft]):
    """Fill ``draft.records``, ``draft.masks`` and ``draft.values`` from zeros (rules 1-5 of the module).

    Attributes:
        min_sparsity: The least fraction of zeros.
    """

    min_sparsity: float

    @torch.no_grad()
    def run(self, subject: Draft) -> PassResult[Draft]:
        """Decide each finding."""
        for finding in subject.findings:
            record = self._decided(finding, subject)
            subject.records[finding.site.fqn] = record
            if record.sparse:
                weight = subject.model.get_parameter(finding.site.fqn).detach()
                subject.masks[finding.site.fqn] = weight != 0
                subject.values[finding.site.fqn] = weight.clone()
        notes = [Note(where=fqn, reason=record.reason) for fqn, record in subject.records.items() if record.reason]
        return PassResult(subject=subject, changed=False, notes=tuple(notes))

    def ensures(self, subject: Draft) -> None:
        """Something must have been sparse.

        Raises:
            SparsifyError: Nothing was; the message says how sparse the weights are.
        """
        if any(record.sparse for record in subject.records.values()):
            return
        reasons = [f"{fqn}: {record.reason}" for fqn, record in subject.records.items()]
        more = f"; and {len(reasons) - _NAMED} more" if len(reasons) > _NAMED else ""
        raise SparsifyError(
            f"no weight of this {type(subject.model).__name__} is sparse already: "
            + ("; ".join(reasons[:_NAMED]) + more if reasons else "it has no weight matrix")
        )

    def _decided(self, finding: Finding, subject: Draft) -> WeightRecord:
        site = finding.site
        if finding.reason or site.kind == "other":  # rule 1
            return dense_record(site, finding.reason or "its use is not that of a weight matrix")
        kept = site.to_matrix(subject.model.get_parameter(site.fqn).detach() != 0)
        zeros = kept.numel() - int(kept.sum())
        if zeros == kept.numel():  # rule 2
            return dense_record(site, "all of it is zero")
        if zeros < self.min_sparsity * kept.numel():
            share = f"{zeros / kept.numel():.1%} of it" if zeros else "nothing of it"
            return dense_record(site, f"{share} is zero, and min_sparsity is {self.min_sparsity:.0%}")
        return WeightRecord(
            site=site,
            structure=_structure(site, kept),
            budgets=tuple(int(kept[block.start : block.stop].sum()) for block in site.blocks),
            ablation=(None,) * len(site.blocks),
        )


def _structure(site: WeightSite, kept: Tensor) -> Structure:
    """Rule 4."""
    counts = kept.sum(dim=1).tolist()
    fan_ins = [{*counts[block.start : block.stop]} - {0} for block in site.blocks]
    even = all(len(found) == 1 for found in fan_ins)
    return "constant_fan_in" if even else "unstructured"
