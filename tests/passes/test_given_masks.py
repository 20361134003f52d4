"""Saved masks and the weights of a model: whether the two are of one save."""

import pytest
import torch
from torch import Tensor, nn

from srigl_fx.errors import RecipeError
from srigl_fx.masks.records import WeightRecord, WeightSite, dense_record
from srigl_fx.passes.draft import Draft
from srigl_fx.passes.given_masks import GivenMasks

MASK = torch.tensor([[True, False], [False, True], [True, True]])


def draft(names: str = "a", dense: str = "", **site: tuple[str, ...]) -> Draft:
    """Linear layers of weights that are zero where ``MASK`` is, of which some are to stay dense."""
    model = nn.ModuleDict({name: nn.Linear(2, 3) for name in names})
    records = {}
    for name, layer in model.items():
        assert isinstance(layer, nn.Linear)
        layer.weight.data.fill_(2.0).mul_(MASK)
        where = WeightSite(owner=name, attr="weight", kind="linear", shape=(3, 2), **site)  # type: ignore[arg-type]
        sparse = WeightRecord(site=where, structure="unstructured", budgets=(4,), ablation=(None,))
        records[where.fqn] = dense_record(where, "why") if name in dense else sparse
    return Draft(model, records=records)


def test_masks_and_values_are_those_given() -> None:
    subject = draft("ab", dense="b")
    done = GivenMasks(masks={"a.weight": MASK}).run(subject).subject
    assert torch.equal(done.masks["a.weight"], MASK)
    weight = subject.model.get_parameter("a.weight")
    assert torch.equal(done.values["a.weight"], weight)
    assert done.values["a.weight"].data_ptr() != weight.data_ptr()  # written into the weight later on
    assert not done.values["a.weight"].requires_grad
    assert [*done.masks] == [*done.values] == ["a.weight"]
    assert not done.records["a.weight"].dense_start


def test_while_a_model_is_pruned_masks_may_exceed_their_budgets() -> None:
    done = GivenMasks(masks={"a.weight": MASK}, pruning=True).run(draft("ab", dense="b")).subject
    assert [record.dense_start for record in done.records.values()] == [True, False]


@pytest.mark.parametrize("name", ["y.weight", "z.weight"])
def test_rule_1_a_tied_weight_may_go_by_any_of_its_names(name: str) -> None:
    subject = draft(aliases=("y.weight", "module._orig_mod.z.weight"))
    assert torch.equal(GivenMasks(masks={name: MASK}).run(subject).subject.masks["a.weight"], MASK)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({}, "'a.weight' has no mask"),
        ({"a.weight": MASK.float()}, r"'a.weight' needs a bool mask \(3, 2\), not torch.float32 \(3, 2\)"),
        ({"a.weight": MASK.T}, r"'a.weight' needs a bool mask \(3, 2\), not torch.bool \(2, 3\)"),
        ({"a.weight": ~MASK}, "'a.weight' is not zero at 4 places off its mask: the two are not of one save"),
        ({"a.weight": MASK, "b.weight": MASK}, "there is a mask for 'b.weight', which is not to be sparse"),
    ],
    ids=["none", "dtype", "shape", "values", "dense"],
)
def test_rules_1_and_2_what_does_not_fit_is_told(masks: dict[str, Tensor], message: str) -> None:
    with pytest.raises(RecipeError, match=f"the saved masks do not fit this ModuleDict: {message}$"):
        GivenMasks(masks=masks).run(draft("ab", dense="b"))


@pytest.mark.parametrize(("count", "more"), [(5, ""), (6, "; and 1 more"), (7, "; and 2 more")])
def test_rule_3_all_that_does_not_fit_is_in_one_error(count: int, more: str) -> None:
    names = "abcdefg"[:count]
    with pytest.raises(RecipeError) as caught:
        GivenMasks(masks={}).run(draft(names))
    assert str(caught.value).endswith("; ".join(f"'{name}.weight' has no mask" for name in names[:5]) + more)
