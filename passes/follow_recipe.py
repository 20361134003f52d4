"""Give every found weight what a recipe decided for it.

Owns whether a recipe fits a model; it must not know how its decisions came about, or how a mask is drawn.

Rules:
    1. The recipe names exactly the weights of the model, without or with the prefixes of wrappers; a tied weight may go
       by any of its names.
    2. A weight has the shape that the recipe says, and as many neurons in each block.
    3. What the recipe makes sparse can be made sparse: a weight that can only stay dense here does not fit.
    4. Everything that does not fit is named in one error, before anything is written.
    5. Whether a weight feeds an output is what the recipe says, where nobody looked this time.
    6. Of a model that became another after it was made sparse, a recipe does not name all weights: one that has a new
       head, or a part that was made sparse by a call of its own. Where that is allowed, such a weight is left alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from srigl_fx.errors import RecipeError
from srigl_fx.masks.decisions import WeightDecision
from srigl_fx.masks.records import WeightRecord, dense_record, plain
from srigl_fx.passes.base import Note, Pass, PassResult
from srigl_fx.passes.draft import Draft, Finding

_NAMED = 5  # weights that one error names


@dataclass(frozen=True, kw_only=True)
class FollowRecipe(Pass[Draft]):
    """Fill ``draft.records`` with a recipe's decisions (rules 1-6 of the module).

    Attributes:
        decisions: Those of the recipe.
        may_have_more: Whether the model may have weights that the recipe does not name.
    """

    decisions: tuple[WeightDecision, ...]
    may_have_more: bool = False

    def run(self, subject: Draft) -> PassResult[Draft]:
        """Match decisions and findings by name."""
        left = {decision.name: decision for decision in self.decisions}
        problems: list[str] = []
        for finding in subject.findings:
            given = finding.site.fqn, *finding.site.aliases
            names = [plain(name) for name in given]
            known = next((name for name in (*given, *names) if name in left), None)
            if known is None:
                problems += [] if self.may_have_more else [f"{names[0]!r} is not in the recipe"]  # rule 6
                continue
            decision = left.pop(known)
            problems += [f"{names[0]!r} {what}" for what in _misfits(finding, decision)]
            subject.records[finding.site.fqn] = _record(finding, decision)
        problems += [f"the model has no {name!r}" for name in left]
        if problems:
            more = f"; and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
            raise RecipeError(
                f"the recipe does not fit this {type(subject.model).__name__}: {'; '.join(problems[:_NAMED])}{more}. "
                "Give it the model that it was made of, or sparsify this one by arguments"
            )
        subject.findings = [finding for finding in subject.findings if finding.site.fqn in subject.records]
        notes = [Note(where=fqn, reason=record.reason) for fqn, record in subject.records.items() if record.reason]
        return PassResult(subject=subject, changed=False, notes=tuple(notes))

    def ensures(self, subject: Draft) -> None:
        """Something must become sparse."""
        if not any(record.sparse for record in subject.records.values()):
            raise RecipeError("the recipe makes no weight sparse: take that of a sparsified model")


def _misfits(finding: Finding, decision: WeightDecision) -> Iterator[str]:
    """What keeps a weight from what was decided for it (rules 2 and 3)."""
    site = finding.site
    if site.shape != decision.shape:
        yield f"has the shape {site.shape}, in the recipe {decision.shape}"
    elif decision.sparse and finding.reason:
        # What only example inputs show is not found without them.
        inputs = "" if finding.reached else "; pass the example_inputs of the first call, if it had any"
        yield f"can only stay dense here: {finding.reason}{inputs}"
    elif decision.sparse and tuple(block.rows for block in site.blocks) != decision.rows:
        yield f"has blocks of {[block.rows for block in site.blocks]} neurons, in the recipe {list(decision.rows)}"


def _record(finding: Finding, decision: WeightDecision) -> WeightRecord:
    site = finding.site
    if site.feeds_output is None:
        site = replace(site, feeds_output=decision.feeds_output)
    if decision.structure is None:
        return dense_record(site, decision.reason)
    return WeightRecord(
        site=site,
        structure=decision.structure,
        budgets=decision.budgets,
        ablation=decision.ablation,
        group_size=decision.group_size,
        block_width=decision.block_width,
    )
