"""Decide how many weights every found weight may keep.

Owns the meeting of rules and distribution; it must not know how a mask is drawn.

Rules:
    1. ``filter_fn`` is asked first: what it refuses stays dense and is left out of the distribution.
    2. A weight whose rule gives it a sparsity, a fan-in or None gets just that, and is left out too.
    3. Over the rest the distribution gives each block a density such that the whole has the asked sparsity; weights
       that can only stay dense (a depthwise convolution, a fan-in that would be 0) take their part of it, and the
       others make up for them.
    4. A budget is an integer: ``B = floor(N * density)`` for each block of ``N`` weights. A constant fan-in is
       ``k = B // n``; where it would be 0 the weight stays dense, or the call fails where a rule named the weight or
       ``strict`` is set. So it is where an unstructured weight would keep nothing, as one does whose budget is smaller
       than a group of rows that share their inputs.
    5. A density of 1 (ERK gives it to small layers) means dense, unless a sparsity of 0 was asked for.
    6. A weight whose inputs are no whole blocks of the width that is asked for stays dense, and others make up for it;
       where a rule named it or ``strict`` is set, the call fails.

With N[l] for the weights of layer l, d[l] for its density and S for the asked sparsity, every distribution that
compensates has sum of d[l] N[l] = (1 - S) sum of N[l], where d[l] = 1 for the dense ones::

    uniform   d[l] = ((1 - S) N - N_dense) / (N - N_dense)
    erk       d[l] = scale * sum(shape[l]) / prod(shape[l]), and 1 for those that would get more

A unit is a block: the gates of an LSTM or the experts of a stack each get a budget of their own.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from srigl_fx.errors import RuleError, SparsifyError
from srigl_fx.masks.budgets import budget
from srigl_fx.masks.distributions import DISTRIBUTIONS
from srigl_fx.masks.records import Structure, WeightRecord, WeightSite, dense_record
from srigl_fx.passes.base import Note, Pass, PassResult
from srigl_fx.passes.draft import Draft, Finding
from srigl_fx.specs import LayerSpec, Match, RuleSet

Distribution = Literal["erk", "uniform", "uniform_rigl"] | Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class AssignBudgets(Pass[Draft]):
    """Fill ``draft.records`` with a decision for every finding (rules 1-6 of the module)."""

    sparsity: float
    distribution: Distribution
    rules: RuleSet
    filter_fn: Callable[[str, nn.Module], bool] | None
    structure: Structure
    group_size: int
    block_width: int
    strict: bool

    def run(self, subject: Draft) -> PassResult[Draft]:
        """Match rules, share out the rest, and round to integers."""
        if self.strict:
            self._refuse_unreached(subject.findings)
        matches = {
            finding.site.fqn: self.rules.match((finding.site.fqn, *finding.site.aliases), finding.owner)
            for finding in subject.findings
        }
        self.rules.check_all_used(list(matches))
        records: dict[str, WeightRecord] = {}
        shared: list[_Share] = []
        for finding in subject.findings:
            site, match = finding.site, matches[finding.site.fqn]
            if site.kind != "other" and not self._admits(site.owner, finding.owner):  # rule 1
                records[site.fqn] = dense_record(site, "filter_fn leaves it out")
            elif match is not None and match.spec is None:  # rule 2
                records[site.fqn] = dense_record(site, finding.reason or f"the rule {match.key!r} leaves it dense")
            elif finding.reason:  # it can only stay dense
                self._refuse_named(finding, match)
                records[site.fqn] = dense_record(site, finding.reason)
                if finding.compensated:  # rule 3: others make up for it
                    shared.append(self._share(site, match, dense=True))
            elif odd := self._odd(site, match):  # rule 6
                records[site.fqn] = dense_record(site, odd)
                shared.append(self._share(site, match, dense=True))
            elif match is not None and match.spec is not None and match.spec.names_a_density:  # rule 2
                records[site.fqn] = self._by_rule(site, match, match.spec)
            else:  # rule 3
                shared.append(self._share(site, match))
        for share, record in self._share_out(shared):
            records.setdefault(share.site.fqn, record)
        subject.records = {fqn: records[fqn] for fqn in matches}
        notes = [Note(where=fqn, reason=record.reason) for fqn, record in subject.records.items() if record.reason]
        return PassResult(subject=subject, changed=False, notes=tuple(notes))

    def _admits(self, owner: str, module: nn.Module) -> bool:
        if self.filter_fn is None:
            return True
        try:
            return bool(self.filter_fn(owner, module))
        except Exception as error:  # the user's function may raise anything
            raise SparsifyError(
                f"filter_fn failed for {owner!r} ({type(error).__name__}: {error}); it takes a module's name and the "
                "module, and returns True or False"
            ) from error

    def ensures(self, subject: Draft) -> None:
        """Something must have become sparse."""
        if any(record.sparse for record in subject.records.values()):
            return
        reasons = [f"{fqn}: {record.reason}" for fqn, record in subject.records.items()]
        raise SparsifyError(
            f"nothing to sparsify in this {type(subject.model).__name__}: "
            + ("; ".join(reasons[:8]) + ("; ..." if len(reasons) > 8 else "") if reasons else "it has no weight matrix")
        )

    def _refuse_unreached(self, findings: list[Finding]) -> None:
        unreached = [f"{finding.site.fqn} ({finding.reason})" for finding in findings if not finding.reached]
        if unreached:
            raise SparsifyError(
                f"strict=True, and the use of {len(unreached)} weight(s) is not understood: {'; '.join(unreached)}; "
                "call without strict to leave them dense"
            )

    @staticmethod
    def _refuse_named(finding: Finding, match: Match[LayerSpec | None] | None) -> None:
        if match is not None and match.spec is not None and match.key in (finding.site.fqn, finding.site.owner):
            raise RuleError(
                f"the rule {match.key!r} asks for a sparse {finding.site.fqn!r}, which can only stay dense: "
                f"{finding.reason}; give it the rule None, or none"
            )

    def _share(self, site: WeightSite, match: Match[LayerSpec | None] | None, *, dense: bool = False) -> "_Share":
        """A weight with what its rule, or else the call, asks for."""
        spec = match.spec if match is not None and match.spec is not None else LayerSpec()
        structure = spec.structure or self.structure
        if (spec.block_width or 1) > 1 and structure != "block":
            raise RuleError(
                f"the rule {match.key if match else None!r} asks for blocks of {spec.block_width} inputs, but the "
                f'structure of {site.fqn!r} is {structure!r}: add structure="block" to it'
            )
        return _Share(
            site=site,
            match=match,
            structure=structure,
            group_size=spec.group_size or self.group_size,
            block_width=(spec.block_width or self.block_width) if structure == "block" else 1,
            dense=dense,
        )

    def _odd(self, site: WeightSite, match: Match[LayerSpec | None] | None) -> str:
        """Why a weight has no whole blocks, or "" where it has; an error where it must have."""
        share, fan_in = self._share(site, match), site.matrix_shape[1]
        if not fan_in % share.block_width:
            return ""
        what = f"its {fan_in} inputs are no whole blocks of {share.block_width}"
        if self.strict or (match is not None and match.named):
            whose = "strict=True" if match is None or not match.named else f"the rule {match.key!r}"
            raise SparsifyError(
                f"{whose}: {site.fqn!r} of shape {site.shape} cannot be sparse in blocks: {what}; give it another "
                "block_width, another structure, or the rule None"
            )
        return what

    def _by_rule(self, site: WeightSite, match: Match[LayerSpec | None], spec: LayerSpec) -> WeightRecord:
        fan_in = site.matrix_shape[1]
        if spec.fan_in is not None and spec.fan_in > fan_in:
            raise RuleError(
                f"the rule {match.key!r} asks for a fan-in of {spec.fan_in}, but {site.fqn!r} of shape {site.shape} "
                f"has {fan_in} inputs per neuron; ask for at most {fan_in}"
            )
        share = self._share(site, match)
        if spec.fan_in is not None:  # rule 4: B = n k, by definition
            return share.sparse(tuple(block.rows * spec.fan_in for block in site.blocks))
        budgets = share.budgets([1.0 - (spec.sparsity or 0.0)] * len(site.blocks))
        return (
            self._too_small(share, 1.0 - (spec.sparsity or 0.0)) if share.too_small(budgets) else share.sparse(budgets)
        )

    def _too_small(self, share: "_Share", density: float) -> WeightRecord:
        """The dense record of a weight whose fan-in would be 0, or the error where the user named it."""
        fan_in = share.site.matrix_shape[1]
        what = f"a density of {density:.4g} of {fan_in} inputs per neuron leaves a fan-in of 0"
        if self.strict or (share.match is not None and share.match.named):
            whose = "strict=True" if share.match is None else f"the rule {share.match.key!r}"
            raise SparsifyError(
                f"{whose}: {share.site.fqn!r} of shape {share.site.shape} is too small: {what}; ask for a sparsity of "
                f"at most {math.floor((1 - 1 / fan_in) * 1e4) / 1e4}, for LayerSpec(fan_in=1), or leave it dense with "
                "the rule None"
            )
        return dense_record(share.site, f"too small: {what}")

    def _share_out(self, shares: list["_Share"]) -> Iterator[tuple["_Share", WeightRecord]]:
        """The decision for each weight the distribution covers.

        A weight whose fan-in would be 0 becomes dense and the others make up for it, until none is left: they get less
        then, so that another one may become too small. A weight never comes back, so that this ends.
        """
        while True:  # rules 3 and 4
            densities = self._densities(shares)
            small = []
            for share in shares:
                share_densities = [densities.get(name, 1.0) for name in share.units]
                if not share.dense and share.too_small(share.budgets(share_densities)):
                    small.append((share, self._too_small(share, min(share_densities))))
            if not small:
                break
            yield from small
            for share, _ in small:
                share.dense, share.too_few = True, share.structure == "constant_fan_in"
        for share in shares:
            if share.dense:
                continue
            if not densities.keys() >= set(share.units):
                yield share, dense_record(share.site, "not in the distribution mapping")
            elif min(densities[name] for name in share.units) >= 1.0 and self.sparsity > 0:  # rule 5
                yield share, dense_record(share.site, "the distribution keeps it whole: density 1")
            else:
                yield share, share.sparse(share.budgets([densities[name] for name in share.units]))

    def _densities(self, shares: list["_Share"]) -> dict[str, float]:
        if not isinstance(self.distribution, str):
            return self._mapped(shares)
        shapes = {name: shape for share in shares for name, shape in share.units.items()}
        dense = tuple(name for share in shares if share.dense for name in share.units)
        if len(dense) == len(shapes):  # nobody is left to make up for them
            return dict.fromkeys(shapes, 1.0)
        try:
            return DISTRIBUTIONS[self.distribution](shapes, self.sparsity, dense=dense)
        except SparsifyError as error:
            small = [share.site.fqn for share in shares if share.too_few]
            if not small:
                raise
            raise SparsifyError(
                f"{error}. Of these, {', '.join(small[:5])}{' and others' if len(small) > 5 else ''} became dense only "
                f"because a sparsity of {self.sparsity} would leave a neuron no input, and a constant fan-in needs one "
                'of at least 1: lower the sparsity, or use structure="unstructured"'
            ) from error

    def _mapped(self, shares: list["_Share"]) -> dict[str, float]:
        assert not isinstance(self.distribution, str)
        known: dict[str, float] = {}
        used: set[str] = set()
        for share in shares:
            for name in share.units:
                for key in (name, share.site.fqn, share.site.owner):
                    if key in self.distribution and name not in known:
                        known[name] = _density(key, self.distribution[key])
                        used.add(key)
        unknown = [key for key in self.distribution if key not in used]
        if unknown:
            raise RuleError(
                f"the distribution mapping names {', '.join(map(repr, unknown[:8]))}, which is no weight of the model "
                f"that the distribution covers; those are: {', '.join(share.site.fqn for share in shares[:8])}"
            )
        wrong = {name: density for name, density in known.items() if not 0.0 < density <= 1.0}
        if wrong:
            raise RuleError(f"the distribution mapping gives densities (kept fractions) outside (0, 1]: {wrong}")
        return known


def _density(key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RuleError(f"the distribution mapping gives {key!r} the density {value!r}, which is no number in (0, 1]")
    return float(value)


@dataclass(kw_only=True)
class _Share:
    """A weight that takes part in the distribution, one unit per block."""

    site: WeightSite
    match: Match[LayerSpec | None] | None
    structure: Structure
    group_size: int
    block_width: int
    dense: bool = False
    too_few: bool = False

    @property
    def units(self) -> dict[str, tuple[int, ...]]:
        """The shape of each block, by a name of its own; a lone block is the weight itself."""
        if len(self.site.blocks) == 1:
            return {self.site.fqn: self.site.shape}
        fan_in = self.site.matrix_shape[1]
        return {f"{self.site.fqn}[{block.name}]": (block.rows, fan_in) for block in self.site.blocks}

    def budgets(self, densities: Sequence[float]) -> tuple[int, ...]:
        """The integer budget of each block at these densities."""
        fan_in = self.site.matrix_shape[1]
        return tuple(
            budget(block.rows * fan_in, density) for block, density in zip(self.site.blocks, densities, strict=True)
        )

    def too_small(self, budgets: tuple[int, ...]) -> bool:
        """Whether a block would have a fan-in of 0 (constant fan-in), or keep nothing (unstructured)."""
        blocks = zip(self.site.blocks, budgets, strict=True)
        if self.structure == "constant_fan_in":
            return any(kept < block.rows for block, kept in blocks)
        record = self.sparse(budgets)
        return any(not any(inputs for _, inputs in record.row_groups(block).shares(kept)) for block, kept in blocks)

    def sparse(self, budgets: tuple[int, ...]) -> WeightRecord:
        """The record that makes the weight sparse with these budgets."""
        ablation = self.match.spec.ablation if self.match is not None and self.match.spec is not None else None
        return WeightRecord(
            site=self.site,
            structure=self.structure,
            budgets=budgets,
            ablation=(ablation,) * len(self.site.blocks),
            group_size=self.group_size,
            block_width=self.block_width,
        )
