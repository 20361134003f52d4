"""Who gets a budget, of what size, and why not: by hand, on sites that no model stands behind."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from torch import nn

from srigl_fx.errors import RuleError, SparsifyError
from srigl_fx.masks.records import Block, WeightRecord, WeightSite
from srigl_fx.passes.assign_budgets import AssignBudgets
from srigl_fx.passes.base import PassResult
from srigl_fx.passes.draft import Draft, Finding
from srigl_fx.specs import LayerSpec, RuleSet


def site(name: str, shape: tuple[int, ...] = (8, 16), **fields: Any) -> WeightSite:
    return WeightSite(owner=name, attr="weight", kind=fields.pop("kind", "linear"), shape=shape, **fields)


def found(*findings: WeightSite | Finding) -> Draft:
    wrapped = [each if isinstance(each, Finding) else Finding(site=each, owner=nn.Linear(1, 1)) for each in findings]
    return Draft(nn.Sequential(), findings=wrapped)


def assign(draft: Draft, sparsity: float = 0.75, **options: Any) -> PassResult[Draft]:
    settings: dict[str, Any] = {
        "distribution": "uniform",
        "filter_fn": None,
        "structure": "constant_fan_in",
        "group_size": 1,
        "block_width": 1,
        "strict": False,
    }
    rules: Mapping[Any, Any] = options.pop("rules", {})
    return AssignBudgets(sparsity=sparsity, rules=RuleSet(rules), **{**settings, **options}).run(draft)


def records(*findings: WeightSite | Finding, **options: Any) -> dict[str, WeightRecord]:
    """The decisions by the owner's name."""
    decided = assign(found(*findings), **options).subject.records
    return {fqn.removesuffix(".weight"): record for fqn, record in decided.items()}


def halves(rows: int) -> tuple[Block, ...]:
    return (Block(name="a", start=0, stop=rows // 2), Block(name="b", start=rows // 2, stop=rows))


dense = Finding(site=site("d", (4, 16)), owner=nn.Linear(1, 1), reason="why", compensated=True)


def test_rule_1_the_filter_is_asked_with_module_and_name_before_any_rule() -> None:
    one, other = nn.Linear(1, 1), nn.Linear(1, 1)
    asked: list[tuple[str, nn.Module]] = []

    def admits(name: str, module: nn.Module) -> bool:
        asked.append((name, module))
        return module is other

    decided = records(
        Finding(site=site("a"), owner=one),
        Finding(site=site("b"), owner=other),
        Finding(site=site("e", kind="other"), owner=one, reason="no weight"),
        filter_fn=admits,
        rules={"a": 0.5},
    )
    assert asked == [("a", one), ("b", other)]  # what is no contraction is not the user's to refuse
    assert {name: record.reason for name, record in decided.items()} == {
        "a": "filter_fn leaves it out",
        "b": "",
        "e": "no weight",
    }
    assert decided["b"].budgets == (32,)  # what the filter leaves out is not made up for


def test_rule_1_a_filter_that_fails_is_named_with_its_error() -> None:
    admitted: dict[str, bool] = {}
    with pytest.raises(SparsifyError, match=r"filter_fn failed for 'a' \(KeyError: 'x'\)"):
        records(site("a"), filter_fn=lambda name, module: admitted["x"])


@pytest.mark.parametrize(
    ("rule", "shape", "blocks", "budgets"),
    [
        (0.5, (8, 16), (), (64,)),
        (LayerSpec(fan_in=3), (8, 16), (), (24,)),
        (LayerSpec(fan_in=16), (8, 16), (), (128,)),  # all of them
        (LayerSpec(fan_in=3), (8, 16), halves(8), (12, 12)),
        (0.7, (8, 10), halves(8), (12, 12)),
        (LayerSpec(sparsity=0.99, structure="unstructured"), (8, 16), (), (1,)),
        (0.0, (8, 16), (), (128,)),
    ],
)
def test_rule_2_a_rule_with_a_density_is_kept_to_whatever_the_distribution(
    rule: Any, shape: tuple[int, ...], blocks: tuple[Block, ...], budgets: tuple[int, ...]
) -> None:
    decided = records(site("a", shape, blocks=blocks), site("b", (8, 64)), rules={"a": rule})
    assert decided["a"].budgets == budgets
    assert decided["b"].budgets == (128,)  # a quarter of its own, whatever the rule took


def test_rule_2_none_leaves_a_weight_dense_with_the_better_reason() -> None:
    decided = records(site("a"), dense, site("b"), rules={"a": None, "d": None})
    assert decided["a"].reason == "the rule 'a' leaves it dense"
    assert decided["d"].reason == "why"
    assert decided["b"].budgets == (32,)  # d was taken out of the distribution: nobody makes up for it


def test_rule_2_what_a_rule_does_not_say_is_as_the_call_says() -> None:
    decided = records(
        site("a", blocks=halves(8)),
        site("b"),
        site("c"),
        rules={"a": LayerSpec(ablation=0.1), "b": LayerSpec(structure="unstructured"), "c": LayerSpec(sparsity=0.5)},
        structure="constant_fan_in",
    )
    assert decided["a"].ablation == (0.1, 0.1)
    assert decided["a"].budgets == (16, 16)
    assert decided["b"].ablation == (None,)
    assert [decided[name].structure for name in "abc"] == ["constant_fan_in", "unstructured", "constant_fan_in"]


def test_rule_2_a_rule_gives_a_weight_its_group_size() -> None:
    rules = {"a": LayerSpec(sparsity=0.5, group_size=8), "b": LayerSpec(group_size=1), "c": LayerSpec(ablation=0.1)}
    decided = records(site("a"), site("b"), site("c"), site("d"), rules=rules, group_size=4)
    assert [decided[name].group_size for name in "abcd"] == [8, 1, 4, 4]
    assert decided["a"].row_groups(decided["a"].site.blocks[0]).index.tolist() == [0] * 8


def test_rule_3_others_make_up_for_what_can_only_stay_dense() -> None:
    """Of 64 + 192 weights a quarter is kept, 64 and so those of d alone; of 192, and more in a, some are left."""
    decided = records(dense, site("a", (16, 16)))
    assert decided["d"].reason == "why"
    assert decided["a"].budgets == (16,)  # a quarter of 320 is 80, of which d has 64


def test_rule_3_a_weight_that_is_no_part_of_the_distribution_is_not_made_up_for() -> None:
    whole = Finding(site=site("d", (4, 16)), owner=nn.Linear(1, 1), reason="an embedding")
    assert records(whole, site("a", (16, 16)))["a"].budgets == (64,)


def test_rule_3_each_block_is_a_unit_of_the_distribution() -> None:
    """As ERK shares out 48 + 2 of 200: by the sum of the two sizes over their product."""
    blocks = (Block(name="wide", start=0, stop=30), Block(name="narrow", start=30, stop=40))
    decided = records(site("a", (40, 10), blocks=blocks), sparsity=0.5, distribution="erk", structure="unstructured")
    # Of 400 weights 200 are kept: scale * (40 + 20) = 200.
    assert decided["a"].budgets == (133, 66)


@pytest.mark.parametrize(
    ("structure", "budgets"), [("constant_fan_in", None), ("unstructured", (12,))], ids=["constant", "unstructured"]
)
def test_rule_4_a_fan_in_of_0_makes_a_weight_dense(structure: Any, budgets: tuple[int, ...] | None) -> None:
    decided = records(site("a", (16, 3)), site("b", (16, 64)), structure=structure)
    assert decided["a"].budgets == (budgets or ())
    if budgets is None:
        assert decided["a"].reason == "too small: a density of 0.25 of 3 inputs per neuron leaves a fan-in of 0"
        assert decided["b"].budgets == ((16 * 67) // 4 - 48,)  # which b makes up for
    else:
        assert decided["b"].budgets == (256,)


def test_rule_4_what_becomes_too_small_by_making_up_for_others_is_found_too() -> None:
    """Twice a quarter of b is 1 at first, then less, as b makes up for a."""
    decided = records(site("a", (16, 3)), site("b", (16, 4)), site("c", (16, 64)))
    assert [decided[name].reason.startswith("too small") for name in "abc"] == [True, True, False]
    assert decided["c"].budgets == ((16 * 71) // 4 - 16 * 7,)


def test_rule_4_a_fan_in_of_exactly_one_is_none_of_0() -> None:
    assert records(site("a", (16, 4)))["a"].budgets == (16,)


@pytest.mark.parametrize(("budget", "sparse"), [(38, False), (40, True)])
def test_rule_4_an_unstructured_weight_keeps_an_input_of_a_group_at_least(budget: int, sparse: bool) -> None:
    """Of 38 weights, a group of 32 rows has 30 and the rest of 8 rows 7: no input for either. Of 40 each has one."""
    decided = records(
        site("a", (40, 16)),
        site("b", (40, 16)),
        distribution={"a": budget / 640, "b": 0.5},
        structure="unstructured",
        group_size=32,
    )
    assert decided["a"].sparse == sparse
    assert decided["b"].group_size == 32


def test_rule_4_one_block_that_is_too_small_makes_the_weight_dense() -> None:
    decided = records(
        site("a", (4, 8), blocks=halves(4)),
        site("b", (8, 8)),
        distribution={"a.weight[a]": 0.5, "a.weight[b]": 0.01, "b": 0.5},
    )
    assert decided["a"].reason == "too small: a density of 0.01 of 8 inputs per neuron leaves a fan-in of 0"


@pytest.mark.parametrize(
    ("options", "whose"),
    [
        ({"strict": True}, "strict=True: 'a.weight'"),
        ({"rules": {"a": 0.75}}, "the rule 'a': 'a.weight'"),
        ({"rules": {"*": LayerSpec(ablation=0.2)}}, r"the rule '\*': 'a.weight'"),
    ],
)
def test_rule_4_a_weight_that_is_named_must_not_be_too_small(options: dict[str, Any], whose: str) -> None:
    with pytest.raises(SparsifyError, match=f"{whose} of shape .* ask for a sparsity of at most 0.6666"):
        records(site("a", (16, 3)), site("b", (16, 64)), **options)


def test_rule_4_a_type_names_no_weight() -> None:
    for rule in (0.75, LayerSpec(ablation=0.2)):
        assert records(site("a", (16, 3)), site("b", (16, 64)), rules={nn.Linear: rule})["a"].reason


def test_rule_5_a_density_of_one_is_dense_unless_nothing_was_to_go() -> None:
    sites = site("a"), site("b")
    decided = records(*sites, distribution={"a": 1.0, "b": 0.5})
    assert decided["a"].reason == "the distribution keeps it whole: density 1"
    assert records(*sites, sparsity=0.0)["a"].budgets == (128,)
    apart = records(site("a", blocks=halves(8)), distribution={"a.weight[a]": 1.0, "a.weight[b]": 0.5})
    assert apart["a"].budgets == (64, 32)  # one block that is whole is none


def test_a_mapping_goes_by_the_nearest_name_and_leaves_the_rest_dense() -> None:
    blocks = site("a", blocks=halves(8))
    decided = records(blocks, site("b"), site("c"), distribution={"a.weight[b]": 0.25, "a": 0.75, "b": 1 / 8})
    assert decided["a"].budgets == (48, 16)
    assert decided["b"].budgets == (16,)
    assert decided["c"].reason == "not in the distribution mapping"


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"a": 0.5, "x": 0.5, "y": 0.1}, "names 'x', 'y', which is no weight .* those are: a.weight, d.weight"),
        ({"a": 0.0}, r"outside \(0, 1\]: {'a.weight': 0.0}"),
        ({"a": 1.5}, r"outside \(0, 1\]: {'a.weight': 1.5}"),
        ({"a": "half"}, "gives 'a' the density 'half', which is no number"),
        ({"a": True}, "gives 'a' the density True, which is no number"),
    ],
)
def test_a_mapping_that_cannot_be_meant(mapping: dict[str, Any], message: str) -> None:
    with pytest.raises(RuleError, match=message):
        records(site("a"), dense, distribution=mapping)


@pytest.mark.parametrize("key", ["d", "d.weight"])
def test_a_rule_that_names_what_can_only_stay_dense_is_refused(key: str) -> None:
    with pytest.raises(RuleError, match=f"the rule '{key}' asks for a sparse 'd.weight', .*: why;"):
        records(dense, site("a", (16, 16)), rules={key: 0.5})
    assert records(dense, site("a", (16, 16)), rules={"*": 0.5})["d"].reason == "why"  # a glob may meet it


def test_a_fan_in_beyond_the_inputs_is_refused() -> None:
    with pytest.raises(RuleError, match=r"the rule 'a' asks for a fan-in of 17, but 'a.weight' .* at most 16"):
        records(site("a"), rules={"a": LayerSpec(fan_in=17)})


def test_rules_go_by_all_names_of_a_tied_weight_and_all_must_be_used() -> None:
    tied = site("a", aliases=("z.weight",))
    assert records(tied, rules={"z": 0.5})["a"].budgets == (64,)
    with pytest.raises(RuleError, match="y"):
        records(tied, rules={"y": 0.5})


def test_strict_refuses_what_is_not_understood() -> None:
    unread = Finding(site=site("u"), owner=nn.Linear(1, 1), reason="nobody reads it", reached=False)
    with pytest.raises(
        SparsifyError, match=r"the use of 1 weight\(s\) is not understood: u.weight \(nobody reads it\)"
    ):
        records(unread, dense, site("a"), strict=True)
    assert records(unread, site("a"))["u"].reason == "nobody reads it"


def test_a_sparsity_that_small_layers_make_impossible_says_which_they_are() -> None:
    sites = [site(name, (16, 3)) for name in "abcdef"]
    wide, options = site("w", (8, 64)), {"distribution": "erk", "sparsity": 0.9}
    with pytest.raises(SparsifyError, match=r"Of these, a.weight, b.weight, c.weight, d.weight, e.weight and others"):
        records(*sites, wide, **options)
    with pytest.raises(SparsifyError, match=r"Of these, a.weight became .* a sparsity of 0.93 would leave"):
        records(*sites[:1], wide, **{**options, "sparsity": 0.93})
    with pytest.raises(SparsifyError) as caught:
        records(dense, wide, **{**options, "sparsity": 0.95})
    assert "Of these" not in str(caught.value)  # nobody became dense on the way


def test_records_stand_in_the_order_of_the_findings_and_reasons_are_notes() -> None:
    result = assign(found(site("c"), dense, site("a", (64, 16))), rules={"a": None})
    assert [*result.subject.records] == ["c.weight", "d.weight", "a.weight"]
    assert [(note.where, note.reason) for note in result.notes] == [
        ("d.weight", "why"),
        ("a.weight", "the rule 'a' leaves it dense"),
    ]


@pytest.mark.parametrize(
    ("count", "message"),
    [(0, "it has no weight matrix"), (1, "s0.weight: why$"), (8, "s7.weight: why$"), (9, r"s7.weight: why; \.\.\.$")],
)
def test_it_is_an_error_if_nothing_becomes_sparse(count: int, message: str) -> None:
    findings = [Finding(site=site(f"s{i}"), owner=nn.Linear(1, 1), reason="why") for i in range(count)]
    draft = assign(found(*findings)).subject
    ensures: Callable[[Draft], None] = AssignBudgets(
        sparsity=0.5,
        distribution="erk",
        rules=RuleSet({}),
        filter_fn=None,
        structure="unstructured",
        group_size=1,
        block_width=1,
        strict=False,
    ).ensures
    with pytest.raises(SparsifyError, match=f"nothing to sparsify in this Sequential: .*{message}"):
        ensures(draft)
    ensures(assign(found(*findings, site("a"))).subject)
