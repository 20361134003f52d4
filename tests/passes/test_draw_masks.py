"""Masks and first values of drafted weights, block by block."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from srigl_fx.masks.records import Block, Structure, WeightRecord, WeightSite, dense_record
from srigl_fx.passes.draft import Draft
from srigl_fx.passes.draw_masks import DrawMasks


def record(name: str, budgets: tuple[int, ...], structure: Structure = "constant_fan_in", **site: Any) -> WeightRecord:
    kind = site.pop("kind", "linear")
    where = WeightSite(owner=name, attr="weight", kind=kind, shape=site.pop("shape", (8, 16)), **site)
    return WeightRecord(site=where, structure=structure, budgets=budgets, ablation=(None,) * len(budgets))


def draft(*records: WeightRecord) -> Draft:
    torch.manual_seed(0)
    model = nn.ModuleDict({each.site.owner: nn.Linear(1, 1) for each in records})
    for each in records:
        owner: Any = model[each.site.owner]
        owner.weight = nn.Parameter(torch.randn(each.site.shape))
    return Draft(model, records={each.site.fqn: each for each in records})


def drawn(subject: Draft, **options: Any) -> Draft:
    settings: dict[str, Any] = {"mask_init": "random", "weight_init": "keep", "seed": 0}
    return DrawMasks(**{**settings, **options}).run(subject).subject


def test_rule_1_each_block_keeps_to_its_own_budget() -> None:
    blocks = (Block(name="a", start=0, stop=2), Block(name="b", start=2, stop=8))
    subject = drawn(draft(record("x", (8, 6), blocks=blocks)))
    assert subject.masks["x.weight"].sum(1).tolist() == [4, 4, 1, 1, 1, 1, 1, 1]


def test_rule_1_rows_are_neurons_whatever_the_layout() -> None:
    subject = drawn(draft(record("x", (32,), kind="linear_in_out"), record("y", (17,), "unstructured")))
    assert subject.masks["x.weight"].sum(0).tolist() == [2] * 16
    assert subject.masks["y.weight"].sum() == 17


def masks_of(*names: str, **options: Any) -> dict[str, Tensor]:
    return drawn(draft(*(record(name, (32,)) for name in names)), **options).masks


def test_rule_1_a_mask_depends_on_seed_and_name_and_on_nothing_else() -> None:
    alone, among = masks_of("b"), masks_of("a", "b", "c")
    assert torch.equal(alone["b.weight"], among["b.weight"])
    assert not torch.equal(among["a.weight"], among["b.weight"])
    assert not torch.equal(alone["b.weight"], masks_of("b", seed=1)["b.weight"])


def test_rule_1_blocks_of_one_weight_draw_apart() -> None:
    blocks = (Block(name="a", start=0, stop=4), Block(name="b", start=4, stop=8))
    mask = drawn(draft(record("x", (16, 16), blocks=blocks))).masks["x.weight"]
    assert not torch.equal(mask[:4], mask[4:])


def test_rule_1_rows_that_share_their_inputs_are_drawn_as_one() -> None:
    blocks = (Block(name="a", start=0, stop=3), Block(name="b", start=3, stop=8))
    where = record("x", (12, 20), blocks=blocks, shape=(8, 16))
    mask = drawn(draft(replace(where, group_size=2))).masks["x.weight"]
    assert [torch.equal(mask[row], mask[row + 1]) for row in range(7)] == [True, False, False, True, False, True, False]
    assert mask.sum(1).tolist() == [4] * 8


def test_rule_2_values_are_kept_on_the_mask_and_zero_off_it() -> None:
    subject = draft(record("x", (32,)))
    weight = subject.model.get_parameter("x.weight").detach().clone()
    done = drawn(subject)
    assert torch.equal(done.values["x.weight"], weight * done.masks["x.weight"])
    assert not done.values["x.weight"].requires_grad
    assert torch.equal(subject.model.get_parameter("x.weight"), weight)  # the model is only read


def test_rule_2_values_may_be_drawn_anew_for_the_sparse_fan_in() -> None:
    subject = draft(record("x", (32,)))
    done = drawn(subject, weight_init="kaiming")
    values, mask = done.values["x.weight"], done.masks["x.weight"]
    assert bool((values[mask] != 0).all())
    assert not bool(values[~mask].any())
    assert not bool((values[mask] == subject.model.get_parameter("x.weight")[mask]).any())


@pytest.mark.parametrize(("mask_init", "starts_full"), [("dense", True), ("random", False)])
def test_rule_3_what_is_pruned_in_training_starts_full(mask_init: str, starts_full: bool) -> None:
    subject = drawn(draft(record("x", (32,))), mask_init=mask_init)
    assert bool(subject.masks["x.weight"].all()) == starts_full
    assert subject.records["x.weight"].dense_start == starts_full


def test_dense_weights_get_neither_mask_nor_values() -> None:
    subject = draft(record("x", (32,)), record("y", (32,)))
    subject.records["y.weight"] = dense_record(subject.records["y.weight"].site, "why")
    done = drawn(subject, mask_init="dense")
    assert [*done.masks] == [*done.values] == ["x.weight"]
    assert not done.records["y.weight"].dense_start
