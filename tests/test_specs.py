from collections.abc import Mapping
from typing import Any

import pytest
from torch import nn

from srigl_fx.errors import RuleError
from srigl_fx.specs import LayerSpec, RuleSet


def key_for(rules: Mapping[Any, Any], *names: str, module: nn.Module | None = None) -> object:
    match = RuleSet(rules).match(names, module or nn.Linear(2, 2))
    return None if match is None else match.key


def test_an_exact_name_wins_over_globs_and_types() -> None:
    rules = {nn.Linear: 0.1, "*": 0.2, "blocks.0": 0.3, "blocks.0.fc.weight": 0.4}
    assert key_for(rules, "blocks.0.fc.weight") == "blocks.0.fc.weight"
    assert key_for(rules, "blocks.0.proj.weight") == "blocks.0"
    assert key_for(rules, "head.weight") == "*"


def test_the_first_matching_glob_wins_and_a_star_crosses_dots() -> None:
    rules = {"*.fc": 0.1, "blocks.*": 0.2}
    assert key_for(rules, "blocks.0.fc.weight") == "*.fc"
    assert key_for(rules, "blocks.1.sub.proj.weight") == "blocks.*"


def test_types_match_subclasses_and_come_last() -> None:
    assert key_for({nn.Module: 0.1}, "fc.weight") is nn.Module
    assert key_for({nn.Conv2d: 0.1}, "fc.weight") is None


def test_a_name_covers_what_is_below_it_but_not_what_only_starts_like_it() -> None:
    assert key_for({"fc": 0.1}, "fc.0.weight") == "fc"
    assert key_for({"fc": 0.1}, "fc2.weight") is None
    assert key_for({"": 0.1}, "anything.weight") == ""


def test_an_alias_of_a_tied_weight_matches_too() -> None:
    assert key_for({"head": 0.1}, "embedding.weight", "head.weight") == "head"


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_wrapper_prefixes_are_ignored(prefix: str) -> None:
    assert key_for({prefix + "fc": 0.1}, "fc.weight") == prefix + "fc"
    for key in ("fc", "fc.weight", "f*", prefix + "fc", prefix + "f*", "*fc.weight"):
        assert key_for({key: 0.1}, prefix + "fc.weight") == key
    assert key_for({"f": 0.1}, prefix + "fc.weight") is None
    with pytest.raises(RuleError, match=r"names that come close: fc$"):
        RuleSet({"f": 0.1}).check_all_used([prefix + "fc.weight"])


@pytest.mark.parametrize("sparsity", [1.0, -0.1, 90, float("nan"), float("inf"), "0.9", True])
def test_a_sparsity_outside_its_range_is_refused_with_the_rule(sparsity: object) -> None:
    with pytest.raises(RuleError, match=r"rule 'fc'.*\[0, 1\)"):
        RuleSet({"fc": sparsity})  # type: ignore[dict-item]


@pytest.mark.parametrize("key", [3, None, int, ("fc",)])
def test_a_key_of_another_kind_is_refused(key: object) -> None:
    with pytest.raises(RuleError, match="module or parameter name, a glob, or a module type"):
        RuleSet({key: 0.5})  # type: ignore[dict-item]


def test_rules_must_be_a_mapping() -> None:
    with pytest.raises(RuleError, match="mapping"):
        RuleSet([("fc", 0.5)])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "arguments",
    [
        {"sparsity": 0.5, "fan_in": 3},
        {"fan_in": 0},
        {"fan_in": True},
        {"ablation": -0.1},
        {"ablation": float("nan")},
        {"structure": "blocked"},
        {"fan_in": 3, "structure": "unstructured"},
        {"group_size": 3},
        {"group_size": True},
    ],
)
def test_contradictory_specs_are_refused(arguments: dict[str, object]) -> None:
    with pytest.raises(RuleError, match="LayerSpec"):
        LayerSpec(**arguments)  # type: ignore[arg-type]


def test_a_spec_round_trips_as_plain_data() -> None:
    spec = LayerSpec(sparsity=0.5, ablation=0.2)
    assert LayerSpec.from_dict(spec.to_dict()) == spec
    assert LayerSpec.from_dict(LayerSpec(group_size=4).to_dict()) == LayerSpec(group_size=4)
    with pytest.raises(RuleError, match="version"):
        LayerSpec.from_dict({"version": 4})
    with pytest.raises(RuleError, match="fields"):
        LayerSpec.from_dict({"version": 1, "sparcity": 0.5})


def test_a_spec_of_version_1_has_no_group_size() -> None:
    assert LayerSpec.from_dict({"version": 1, "fan_in": 3}) == LayerSpec(fan_in=3)
    with pytest.raises(RuleError, match="fields"):
        LayerSpec.from_dict({"version": 1, "group_size": 4})


def test_unused_rules_are_named() -> None:
    rules = RuleSet({"head": None, "haed": None})
    rules.match(("head.weight",), nn.Linear(2, 2))
    with pytest.raises(RuleError, match="'haed' matches no weight of the model; names that come close: head"):
        rules.check_all_used(["body.weight", "head.weight"])
    with pytest.raises(RuleError, match=r"it has body\.weight"):
        RuleSet({"zzz": None}).check_all_used(["body.weight"])
