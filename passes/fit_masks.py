"""Choose and fit kept weights so that each layer gives what it gave, on inputs of the model.

Owns what is fitted and in which order, and what is said of each fit. It must not know how a fit is computed
(:mod:`srigl_fx.masks.least_squares`), nor how inputs are found (:mod:`srigl_fx.passes.layer_moments`). The model is as
it was afterwards: what is fitted stands in the draft.

Rules:
    1. The mask keeps, within the budgets and the structure, the weights that are largest times the spread of their
       inputs (Wanda, Sun et al., ICLR 2024); the values are those of least squares, and kept inputs are exchanged for
       better ones (:func:`srigl_fx.masks.least_squares.fitted`).
    2. Where the layer has a bias of its own, it makes up for what the mean of the inputs has changed, and the spread is
       that about the mean; else it is the root mean square.
    3. Weights whose inputs cannot be seen keep the mask and the values that they have in the draft, and the fit says
       why.
    4. With ``sequential``, each layer is fitted on what the layers before it give after their fit.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from srigl_fx.errors import SparsifyError
from srigl_fx.masks.least_squares import Part, damped, fitted
from srigl_fx.masks.moments import pooled
from srigl_fx.masks.records import WeightRecord
from srigl_fx.masks.structures import initial_mask
from srigl_fx.passes.base import Pass, PassResult
from srigl_fx.passes.draft import Draft, WeightFit
from srigl_fx.passes.example_inputs import Inputs
from srigl_fx.passes.layer_moments import Group, Positions, Sections, groups_in_order, stages, summed_up
from srigl_fx.passes.sites.registry import lookup
from srigl_fx.passes.sites.weight_inputs import is_visible

Progress = Callable[[int, int], object]
_Writer = Callable[[Mapping[str, Tensor]], None]


@dataclass(frozen=True, kw_only=True)
class FitMasks(Pass[Draft]):
    """Replace masks and values of the draft by fitted ones, and fill ``draft.fits`` (rules 1-4 of the module).

    Attributes:
        batches: Inputs of the model.
        sequential: See rule 4.
        exchanges: Rounds of exchanges.
        positions: Which positions of an input count.
        memory: Bytes that sums of inputs may take at a time.
        progress: Told how much of how much is done.
    """

    batches: Sequence[Inputs]
    sequential: bool
    exchanges: int
    positions: Positions | None
    memory: int
    progress: Progress | None

    @torch.no_grad()
    def run(self, subject: Draft) -> PassResult[Draft]:
        """Fit each layer as its inputs are summed up."""
        reasons = {fqn: _unseen(subject, fqn) for fqn, record in subject.records.items() if record.sparse}
        sites = [subject.records[fqn].site for fqn, reason in reasons.items() if not reason]
        for site in sites:
            if not bool(subject.model.get_parameter(site.fqn).isfinite().all()):
                raise SparsifyError(f"{site.fqn!r} holds numbers that are not finite; mend the model first")
        model = subject.model
        groups = groups_in_order(model, sites, self.batches) if sites else []
        cut = list(stages(groups, 0 if self.sequential else self.memory))
        count = _Count(len(cut) * len(self.batches) + len(sites), self.progress)
        with _given_back(model) as write:
            for stage in cut:
                sums = summed_up(model, stage, self.batches, positions=self.positions, after=count.one_more)
                for group, sections in zip(stage, sums, strict=True):
                    self._fit_group(subject, group, sections, count, write)
        for fqn, reason in reasons.items():
            if reason:  # rule 3
                subject.fits[fqn] = WeightFit(name=fqn, reason=reason)
        subject.fits = {fqn: subject.fits[fqn] for fqn in reasons}
        return PassResult(subject=subject, changed=False)

    def _fit_group(self, subject: Draft, group: Group, sections: Sections, count: "_Count", write: _Writer) -> None:
        for site in group.sites:
            record = subject.records[site.fqn]
            bias = _bias_of(subject.model, record)
            values = _fit(subject, record, sections, bias, self.exchanges)
            if self.sequential:  # rule 4
                write(values)
            subject.values |= values
            count.one_more()


class _Count:
    """How much is done."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._done, self._total, self._progress = 0, total, progress

    def one_more(self) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total)


@contextmanager
def _given_back(model: nn.Module) -> Iterator[_Writer]:
    """A function that writes into parameters by name; afterwards they are as before, and only they were copied."""
    before: dict[str, Tensor] = {}

    def write(values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            parameter = model.get_parameter(name)
            if name not in before:
                before[name] = parameter.detach().clone()
            parameter.copy_(value)

    try:
        yield write
    finally:
        for name, former in before.items():
            model.get_parameter(name).copy_(former)


def _unseen(subject: Draft, fqn: str) -> str:
    """Why the inputs of a weight cannot be seen; "" where they can."""
    finding = next(each for each in subject.findings if each.site.fqn == fqn)
    if finding.transforms:
        return "its layer transforms it before it is used"
    return "" if is_visible(finding.site) else f"inputs of the kind {finding.site.kind!r} are not seen one by one"


def _bias_of(model: nn.Module, record: WeightRecord) -> tuple[str, int] | None:
    """The bias that is added to what the weight gives, and where in it the weight's rows begin (rule 2)."""
    site = record.site
    owner = model.get_submodule(site.owner)
    if site.aliases or lookup(owner) is None:  # of a user's own module, a bias may be anything
        return None
    apart = {"q_proj_weight": 0, "k_proj_weight": 1, "v_proj_weight": 2}
    attr = "bias" if site.attr == "weight" else "in_proj_bias"
    bias = owner._parameters.get(attr)
    rows = site.matrix_shape[0]
    start = apart.get(site.attr, 0) * rows
    if bias is None or bias.dim() != 1 or len(bias) < start + rows:
        return None
    shared = sum(other is bias for _, other in model.named_parameters(remove_duplicate=False)) > 1
    return None if shared else (f"{site.owner}.{attr}" if site.owner else attr, start)


def _fit(
    subject: Draft, record: WeightRecord, sections: Sections, bias: tuple[str, int] | None, exchanges: int
) -> dict[str, Tensor]:
    """Fit one weight: its mask and its fit go into the draft, its values and those of its bias come back."""
    site = record.site
    parameter = subject.model.get_parameter(site.fqn)
    weight = site.to_matrix(parameter.detach()).double()
    inputs = list(_inputs(sections, len(weight), centred=bias is not None))
    spread = torch.cat(
        [one.covariance.diagonal().clamp(min=0).sqrt().expand(one.stop - one.start, -1) for one in inputs]
    )
    blocks = [(slice(block.start, block.stop), record.row_groups(block)) for block in site.blocks]
    masks = []
    assert record.structure is not None
    for (rows, groups), budget in zip(blocks, record.budgets, strict=True):
        masks.append(
            initial_mask(
                weight[rows] * spread[rows],
                structure=record.structure,
                budget=budget,
                init="magnitude",
                generator=torch.Generator(),
                groups=groups,
            )
        )
    first = torch.cat(masks)
    parts = [Part(one.start, one.stop, damped(one.covariance)) for one in inputs]
    found = fitted(weight, first, parts, blocks, exchanges=exchanges)
    by_magnitude = site.to_matrix(subject.masks[site.fqn])
    subject.fits[site.fqn] = WeightFit(
        name=site.fqn,
        samples=min(one.count for one in inputs),
        magnitude_error=_error(weight, weight * by_magnitude, inputs),
        mask_error=_error(weight, weight * first, inputs),
        error=_error(weight, found.values, inputs),
    )
    subject.masks[site.fqn] = site.from_matrix(found.mask)
    values = {site.fqn: site.from_matrix(found.values.to(parameter.dtype))}
    if bias is not None:
        name, start = bias
        # Of separate projections, parts of one bias change one after the other.
        changed = subject.values.get(name, subject.model.get_parameter(name).detach()).double()
        missing = weight - found.values
        shift = torch.cat([missing[one.start : one.stop] @ one.mean for one in inputs])
        changed[start : start + len(shift)] += shift
        values[name] = changed.to(parameter.dtype)
    return values


@dataclass(frozen=True)
class _Inputs:
    """What some rows of a weight are given."""

    start: int
    stop: int
    count: int
    mean: Tensor
    covariance: Tensor


def _inputs(sections: Sections, rows: int, *, centred: bool) -> Iterator[_Inputs]:
    """The inputs of all rows, cut where the rows of any use begin or end."""
    borders = sorted({0, rows, *(row for section in sections for row in section)})
    for start, stop in pairwise(borders):
        over = [moments for (first, last), moments in sections.items() if first <= start and stop <= last]
        if not over:
            raise SparsifyError(f"rows {start} to {stop - 1} of a weight were never used: leave it dense (rule None)")
        count, mean, covariance = pooled(over)
        if not centred:
            covariance = covariance + torch.outer(mean, mean)
        yield _Inputs(start, stop, count, mean, covariance)


def _error(weight: Tensor, values: Tensor, inputs: Sequence[_Inputs]) -> float:
    """The share of the output's expected square that is lost, about the mean where the bias makes up for that."""

    def expected(matrix: Tensor) -> float:
        return sum(
            float(((matrix[one.start : one.stop] @ one.covariance) * matrix[one.start : one.stop]).sum())
            for one in inputs
        )

    whole = expected(weight)
    return expected(weight - values) / whole if whole > 0 else 0.0
