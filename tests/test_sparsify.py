"""What the user sees of ``sparsify``: budgets, rules, reports, and what bad input gets."""

import copy
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import srigl_fx as sx
from srigl_fx.errors import RuleError, SparsifyError, SriglError, StructureError
from srigl_fx.masks.records import sparse_weights


def mlp(*widths: int) -> nn.Sequential:
    return nn.Sequential(*[nn.Linear(a, b) for a, b in itertools.pairwise(widths)])


def kept(model: nn.Module) -> dict[str, int]:
    return {row.name: row.kept for row in sx.summary(model).rows}


def test_uniform_keeps_the_global_density_exact() -> None:
    model = sx.sparsify(mlp(100, 200, 100, 50), sparsity=0.9, distribution="uniform")
    assert kept(model) == {"0.weight": 2000, "1.weight": 2000, "2.weight": 500}


def test_what_can_only_stay_dense_is_made_up_for() -> None:
    model = nn.ModuleDict({"depthwise": nn.Conv2d(100, 100, 3, groups=100), "fc": nn.Linear(100, 100)})
    sx.sparsify(model, sparsity=0.5, distribution="uniform")
    assert kept(model)["fc.weight"] == (10000 + 900) // 2 // 100 * 100 - 900


def test_weights_with_a_rule_of_their_own_do_not_count() -> None:
    model = sx.sparsify(mlp(100, 200, 100, 50), sparsity=0.9, distribution="uniform", rules={"0": None, "2": 0.5})
    assert kept(model) == {"0.weight": 20000, "1.weight": 2000, "2.weight": 2500}
    assert "rule '0'" in sx.summary(model).rows[0].reason


def test_filter_fn_is_asked_first_with_module_names() -> None:
    asked: list[tuple[str, type]] = []

    def only_second(name: str, module: nn.Module) -> bool:
        asked.append((name, type(module)))
        return name == "1"

    model = sx.sparsify(mlp(100, 200, 100), sparsity=0.9, filter_fn=only_second, rules={"0": 0.5})
    assert asked == [("0", nn.Linear), ("1", nn.Linear)]
    assert kept(model) == {"0.weight": 20000, "1.weight": 2000}


def test_rigl_uniform_leaves_the_first_layer_dense_and_the_others_at_the_sparsity() -> None:
    model = sx.sparsify(mlp(100, 200, 100), sparsity=0.9, distribution="uniform_rigl")
    assert kept(model) == {"0.weight": 20000, "1.weight": 2000}


def test_a_distribution_mapping_gives_densities() -> None:
    model = sx.sparsify(mlp(100, 200, 100, 50), distribution={"0": 0.5, "1.weight": 0.25})
    assert kept(model) == {"0.weight": 10000, "1.weight": 5000, "2.weight": 5000}
    assert "mapping" in sx.summary(model).rows[2].reason
    with pytest.raises(RuleError, match="'nine'"):
        sx.sparsify(mlp(4, 4), distribution={"nine": 0.5})
    with pytest.raises(RuleError, match="densities"):
        sx.sparsify(mlp(4, 4), distribution={"0": 1.5})


def test_layer_specs_set_fan_in_structure_and_ablation() -> None:
    rules: dict[Any, Any] = {
        "0": sx.LayerSpec(fan_in=7),
        "1": sx.LayerSpec(structure="unstructured"),
        "2": sx.LayerSpec(ablation=0.5),
    }
    model = sx.sparsify(mlp(100, 200, 100, 50), sparsity=0.9, distribution="uniform", rules=rules)
    handles = {handle.fqn: handle for handle in sparse_weights(model)}
    assert handles["0.weight"].mask.sum(1).tolist() == [7] * 200
    assert handles["1.weight"].record.structure == "unstructured"
    assert len(set(handles["1.weight"].mask.sum(1).tolist())) > 1
    assert handles["2.weight"].record.ablation == (0.5,)


def test_the_blocks_of_packed_attention_keep_equal_fan_in() -> None:
    model = sx.sparsify(nn.MultiheadAttention(64, 4), sparsity=0.9, distribution="uniform")
    assert model.get_buffer("in_proj_weight_mask").sum(1).tolist() == [6] * 192


@pytest.mark.parametrize("structure", ["constant_fan_in", "unstructured"])
@pytest.mark.parametrize("mask_init", ["magnitude", "random"])
def test_masks_keep_what_they_say(structure: Any, mask_init: Any) -> None:
    torch.manual_seed(0)
    model = mlp(64, 48)
    dense = model.get_parameter("0.weight").detach().clone()
    sx.sparsify(model, sparsity=0.75, distribution="uniform", structure=structure, mask_init=mask_init)
    mask = model.get_buffer("0.weight_mask")
    assert int(mask.sum()) == 64 * 48 // 4
    assert torch.equal(model.get_parameter("0.weight").detach(), dense * mask)
    lowest_kept, highest_dropped = dense.abs()[mask].min(), dense.abs()[~mask].max()
    if mask_init == "magnitude" and structure == "unstructured":
        assert lowest_kept >= highest_dropped
    if mask_init == "random":
        assert lowest_kept < highest_dropped


def test_draws_depend_on_the_seed_and_the_name_alone() -> None:
    def mask(seed: int, *widths: int) -> torch.Tensor:
        model = sx.sparsify(mlp(*widths), sparsity=0.9, distribution="uniform", mask_init="random", seed=seed)
        return model.get_buffer("0.weight_mask").clone()

    assert torch.equal(mask(3, 64, 32), mask(3, 64, 32, 16))
    assert not torch.equal(mask(3, 64, 32), mask(4, 64, 32))


def test_the_global_random_state_is_not_touched() -> None:
    state = torch.random.get_rng_state()
    model = mlp(64, 64)
    state = torch.random.get_rng_state()
    sx.sparsify(model, mask_init="random", weight_init="kaiming")
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    ("scheme", "std"), [("kaiming", (2 / 64) ** 0.5), ("torch", 64**-0.5 / 3**0.5), ("grad_flow_ref", 2 / 64)]
)
def test_weight_initialisation_uses_the_sparse_fan_in(scheme: Any, std: float) -> None:
    model = sx.sparsify(mlp(640, 500), sparsity=0.9, distribution="uniform", weight_init=scheme)
    kept_values = model.get_parameter("0.weight")[model.get_buffer("0.weight_mask")]
    assert kept_values.std().item() == pytest.approx(std, rel=0.03)
    assert not model.get_parameter("0.weight")[~model.get_buffer("0.weight_mask")].any()


def test_a_sparsity_of_zero_is_a_full_mask() -> None:
    model = sx.sparsify(mlp(8, 8), sparsity=0.0)
    assert model.get_buffer("0.weight_mask").all()
    sx.verify(model)


@pytest.mark.slow
@settings(deadline=None, max_examples=40)
@given(
    widths=st.lists(st.integers(1, 60), min_size=2, max_size=5),
    sparsity=st.floats(0.0, 0.99),
    distribution=st.sampled_from(["erk", "uniform", "uniform_rigl"]),
    structure=st.sampled_from(["constant_fan_in", "unstructured"]),
)
def test_any_chain_of_layers_keeps_the_invariants_or_is_left_alone(
    widths: list[int], sparsity: float, distribution: Any, structure: Any
) -> None:
    model = mlp(*widths)
    before = copy.deepcopy(model.state_dict())
    try:
        sx.sparsify(model, sparsity=sparsity, distribution=distribution, structure=structure)
    except SparsifyError:
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert model.state_dict().keys() == before.keys()
        return
    sx.verify(model)
    summary = sx.summary(model)
    for row in summary.rows:
        assert (row.status == "dense") == bool(row.reason)
    # Rounding to a constant fan-in only ever removes: less than one weight per neuron.
    dense = sum(row.kept for row in summary.rows if row.status == "dense")
    assert summary.kept <= max(
        summary.total * (1 - sparsity) + 1, dense + sum(row.kept for row in summary.rows if row.reason == "")
    )


def refused(model: nn.Module, error: type[SriglError], message: str, **arguments: Any) -> None:
    before = copy.deepcopy(model.state_dict())
    classes = [type(module) for module in model.modules()]
    with pytest.raises(error, match=message):
        sx.sparsify(model, **arguments)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [type(module) for module in model.modules()] == classes
    assert not any("srigl" in name for module in model.modules() for name in vars(module))


@pytest.mark.parametrize("sparsity", [1.0, -0.1, 90, float("nan"), "0.9", None])
def test_a_sparsity_outside_its_range(sparsity: Any) -> None:
    refused(mlp(8, 8), SparsifyError, r"\[0, 1\)", sparsity=sparsity)


def test_a_rule_that_matches_nothing() -> None:
    refused(mlp(8, 8), RuleError, "'haed' matches no weight.*0.weight", rules={"haed": None})


def test_a_layer_too_small_that_a_rule_named() -> None:
    refused(mlp(4, 64, 64), SparsifyError, r"rule '0'.*'0.weight' of shape \(64, 4\) is too small", rules={"0": 0.9})
    refused(
        mlp(4, 64, 64), SparsifyError, "too small", rules={"0*": sx.LayerSpec(ablation=0.1)}, distribution="uniform"
    )


def test_a_layer_too_small_that_no_rule_named_stays_dense_and_is_made_up_for() -> None:
    model = sx.sparsify(mlp(4, 64, 64), sparsity=0.9, distribution="uniform")
    rows = sx.summary(model).rows
    assert "too small" in rows[0].reason
    assert rows[1].kept == int((64 * 64 + 4 * 64) * 0.1 - 4 * 64 + 1e-6) // 64 * 64
    refused(mlp(4, 64, 64), SparsifyError, "strict=True.*too small", distribution="uniform", strict=True)
    typed = sx.sparsify(mlp(4, 64, 64), rules={nn.Linear: 0.9})
    assert "too small" in sx.summary(typed).rows[0].reason


def test_a_named_layer_that_can_only_stay_dense() -> None:
    model = nn.ModuleDict({"depthwise": nn.Conv2d(8, 8, 3, groups=8), "fc": nn.Linear(64, 64)})
    refused(model, RuleError, "'depthwise'.*can only stay dense: depthwise", rules={"depthwise": 0.5})


def test_nothing_to_sparsify() -> None:
    refused(nn.Sequential(nn.ReLU(), nn.LayerNorm(4)), SparsifyError, "no weight matrix")
    refused(nn.Sequential(nn.Embedding(9, 4)), SparsifyError, "nothing to sparsify.*looked up")
    refused(mlp(64, 64), SparsifyError, "nothing to sparsify.*rule", rules={"*": None})


def test_sparsifying_twice() -> None:
    model = sx.sparsify(mlp(64, 64))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(SparsifyError, match=r"sparse already.*finalize"):
        sx.sparsify(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_strict_refuses_weights_that_are_not_understood() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.utils.parametrizations.orthogonal(nn.Linear(64, 64)))
    refused(model, SparsifyError, r"strict=True.*1\.parametrizations", strict=True)


def test_unknown_choices() -> None:
    refused(mlp(8, 8), SparsifyError, "distribution must be", distribution="er")
    refused(mlp(8, 8), StructureError, "structure must be", structure="2:4")
    refused(mlp(8, 8), SparsifyError, "mask_init must be", mask_init="largest")
    refused(mlp(8, 8), SparsifyError, "weight_init must be", weight_init="zeros")
    refused(mlp(8, 8), RuleError, "fan-in of 9", rules={"0": sx.LayerSpec(fan_in=9)})
    with pytest.raises(SparsifyError, match=r"torch\.nn\.Module"):
        sx.sparsify([nn.Linear(4, 4)])  # type: ignore[type-var]


def test_a_report_of_a_plain_model_says_what_to_do() -> None:
    with pytest.raises(SriglError, match="sparsify"):
        sx.summary(mlp(8, 8))


def test_a_model_without_values_has_a_repr() -> None:
    model = sx.sparsify(nn.Sequential(nn.Linear(64, 32)), sparsity=0.5).to("meta")
    assert "SparseLinear(in_features=64, out_features=32, bias=True, masked)" in repr(model)


def test_hugging_face_conv1d() -> None:
    transformers = pytest.importorskip("transformers.pytorch_utils", reason="the transformers extra is not installed")
    model = nn.Sequential(transformers.Conv1D(96, 32))
    nn.init.normal_(model.get_parameter("0.weight"))
    sx.sparsify(model, sparsity=0.75)
    assert model.get_buffer("0.weight_mask").shape == (32, 96)
    assert model.get_buffer("0.weight_mask").sum(0).tolist() == [8] * 96
    assert sx.summary(model).rows[0].fan_in == 8
