"""A recipe's decisions, matched with findings by hand."""

from dataclasses import replace
from typing import Any

import pytest
from torch import nn

from srigl_fx.errors import RecipeError
from srigl_fx.masks.decisions import WeightDecision
from srigl_fx.masks.records import Block, WeightRecord, WeightSite
from srigl_fx.passes.draft import Draft, Finding
from srigl_fx.passes.follow_recipe import FollowRecipe


def finding(name: str, shape: tuple[int, ...] = (8, 16), **fields: Any) -> Finding:
    site = {key: fields.pop(key) for key in ("blocks", "aliases", "feeds_output") if key in fields}
    owner, _, attr = name.rpartition(".")
    return Finding(
        site=WeightSite(owner=owner, attr=attr, kind="linear", shape=shape, **site), owner=nn.Linear(1, 1), **fields
    )


def sparse(name: str, shape: tuple[int, ...] = (8, 16), **fields: Any) -> WeightDecision:
    settings: dict[str, Any] = {"rows": (8,), "budgets": (32,), "ablation": (0.1,), "structure": "constant_fan_in"}
    return WeightDecision(name=name, shape=shape, **{**settings, **fields})


def dense(name: str, shape: tuple[int, ...] = (8, 16), **fields: Any) -> WeightDecision:
    return WeightDecision(name=name, shape=shape, reason="so it was decided", **fields)


def follow(findings: list[Finding], *decisions: WeightDecision) -> dict[str, WeightRecord]:
    return FollowRecipe(decisions=decisions).run(Draft(nn.Sequential(), findings=findings)).subject.records


def test_a_weight_gets_what_was_decided_for_it() -> None:
    records = follow([finding("a.w"), finding("b.w")], dense("b.w"), sparse("a.w", group_size=4))
    one, other = records["a.w"], records["b.w"]
    assert (one.structure, one.budgets, one.ablation, one.reason) == ("constant_fan_in", (32,), (0.1,), "")
    assert one.group_size == 4
    assert (other.structure, other.budgets, other.reason) == (None, (), "so it was decided")


def test_what_stays_dense_is_noted_with_the_reason_of_the_recipe() -> None:
    draft = Draft(nn.Sequential(), findings=[finding("a.w"), finding("b.w", reason="another")])
    result = FollowRecipe(decisions=(sparse("a.w"), dense("b.w"))).run(draft)
    assert [(note.where, note.reason) for note in result.notes] == [("b.w", "so it was decided")]


@pytest.mark.parametrize(
    "found",
    [
        finding("module._orig_mod.a.w"),
        finding("b.w", aliases=("c.w", "_orig_mod.a.w")),
    ],
    ids=["wrapped", "tied"],
)
def test_rule_1_any_name_of_a_weight_will_do(found: Finding) -> None:
    records = follow([found], sparse("a.w"))
    assert records[found.site.fqn].sparse


FOUR = tuple(Block(name=str(i), start=2 * i, stop=2 * i + 2) for i in range(4))


@pytest.mark.parametrize(
    ("found", "decisions", "message"),
    [
        ([finding("a.w"), finding("_orig_mod.b.w")], [sparse("a.w")], "'b.w' is not in the recipe"),
        ([finding("a.w")], [sparse("a.w"), dense("z.w")], "the model has no 'z.w'"),
        ([finding("a.w", (16, 8))], [sparse("a.w")], r"'a.w' has the shape \(16, 8\), in the recipe \(8, 16\)"),
        ([finding("a.w", (16, 8))], [dense("a.w")], r"'a.w' has the shape \(16, 8\), in the recipe \(8, 16\)"),
        (
            [finding("a.w", blocks=FOUR)],
            [sparse("a.w", rows=(4, 4), budgets=(16, 16), ablation=(None, None))],
            r"'a.w' has blocks of \[2, 2, 2, 2\] neurons, in the recipe \[4, 4\]",
        ),
        ([finding("a.w", reason="why")], [sparse("a.w")], r"'a.w' can only stay dense here: why\. Give it the model"),
        (
            [finding("a.w", reason="why", reached=False)],
            [sparse("a.w")],
            "dense here: why; pass the example_inputs of the first call",
        ),
    ],
    ids=["unknown", "missing", "shape", "shape of a dense one", "blocks", "dense", "unreached"],
)
def test_rules_1_to_3_what_does_not_fit_is_told(
    found: list[Finding], decisions: list[WeightDecision], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        follow(found, *decisions)


def test_rule_3_what_was_dense_may_be_so_for_any_reason_and_in_any_blocks() -> None:
    records = follow([finding("a.w", reason="why", blocks=FOUR)], dense("a.w", rows=(8,)))
    assert records["a.w"].reason == "so it was decided"


@pytest.mark.parametrize(("count", "more"), [(5, ""), (6, "; and 1 more"), (8, "; and 3 more")])
def test_rule_4_all_that_does_not_fit_is_in_one_error(count: int, more: str) -> None:
    with pytest.raises(RecipeError) as caught:
        follow([finding(f"a{i}.w") for i in range(count)])
    named = "; ".join(f"'a{i}.w' is not in the recipe" for i in range(5))
    assert f"does not fit this Sequential: {named}{more}. Give" in str(caught.value)


@pytest.mark.parametrize("seen", [True, False, None])
@pytest.mark.parametrize("decided", [True, False, None])
@pytest.mark.parametrize("decision", [sparse, dense])
def test_rule_5_who_looked_this_time_knows_better(seen: bool | None, decided: bool | None, decision: Any) -> None:
    records = follow([finding("a.w", feeds_output=seen)], decision("a.w", feeds_output=decided))
    assert records["a.w"].site.feeds_output is (decided if seen is None else seen)


def test_rule_6_what_the_recipe_does_not_name_may_be_left_alone() -> None:
    draft = Draft(nn.Module(), findings=[finding("new.weight"), finding("fc.weight")])
    follows = FollowRecipe(decisions=(sparse("fc.weight"),), may_have_more=True)
    draft = follows.run(draft).subject
    assert [*draft.records] == [found.site.fqn for found in draft.findings] == ["fc.weight"]
    with pytest.raises(RecipeError, match=r"fit this Module: the model has no 'gone\.weight'"):
        replace(follows, decisions=(sparse("fc.weight"), sparse("gone.weight"))).run(draft)


def test_a_recipe_that_makes_nothing_sparse_is_none() -> None:
    draft = Draft(nn.Sequential(), findings=[finding("a.w"), finding("b.w")])
    step = FollowRecipe(decisions=(dense("a.w"), dense("b.w")))
    with pytest.raises(RecipeError, match="makes no weight sparse"):
        step.ensures(step.run(draft).subject)
    step = FollowRecipe(decisions=(sparse("a.w"), dense("b.w")))
    step.ensures(step.run(draft).subject)
