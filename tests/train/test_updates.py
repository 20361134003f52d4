"""The update rules against worked examples; the fuzz against a literal reading is in test_rules_fuzz.py."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from srigl_fx.errors import StructureError
from srigl_fx.train.updates import drop_and_grow, gmp_update, rigl_update, set_update, snfs_update, srigl_update

W_A = torch.tensor([[0.9, -0.8, 0, 0], [0.1, 0, -0.7, 0], [0, 0.3, 0, 0.2]])
G_A = torch.tensor([[0.5, -0.1, 0.2, 0.3], [0.05, -0.9, 0.15, 0.7], [0.6, 0.25, -0.35, 0.01]])
PER_ROW = [[1, 1, 0, 0], [0, 1, 1, 0], [1, 1, 0, 0]]
ONE_ABLATED = [[1, 1, 0, 1], [1, 1, 1, 0], [0, 0, 0, 0]]


def srigl(weight: Tensor, grad: Tensor, **options: Any) -> list[list[int]]:
    mask = options.pop("mask", weight != 0)
    result: list[list[int]] = srigl_update(weight, grad, mask, **options).int().tolist()
    return result


def test_rigl_by_hand() -> None:
    assert rigl_update(W_A, G_A, W_A != 0, drop_fraction=0.4).int().tolist() == [
        [1, 1, 0, 0],
        [0, 1, 1, 1],
        [0, 1, 0, 0],
    ]


def test_srigl_without_ablation_by_hand() -> None:
    assert srigl(W_A, G_A, budget=6, drop_fraction=0.4) == PER_ROW
    assert srigl(W_A, G_A, budget=6, drop_fraction=0.4, ablation=0) == PER_ROW
    assert srigl(W_A, G_A, budget=6, drop_fraction=0.4, ablation=0.95) == PER_ROW


@pytest.mark.parametrize("threshold", [2, 10])
def test_srigl_ablates_a_neuron_with_too_few_salient_weights(threshold: int) -> None:
    assert srigl(W_A, G_A, budget=6, drop_fraction=0.4, ablation=threshold, ablation_mode="absolute") == ONE_ABLATED


def test_only_active_weights_are_kept() -> None:
    weight = W_A.clone()
    weight[2, 3] = 0.05
    assert srigl(weight, G_A, budget=6, drop_fraction=0.2, ablation=2, ablation_mode="absolute") == ONE_ABLATED


REVIVED_WEIGHT = torch.tensor([[0.2, 0.9, 0, 0.8], [0.6, 0, 0.7, 0.1], [0, 0, 0, 0]])
REVIVED_GRAD = torch.tensor([[0.05, 0.06, 0.3, 0.07], [0.1, 0.2, 0.08, 0.09], [0.95, 0.9, 0.01, 0.02]])
REVIVED: dict[str, Any] = {"budget": 6, "drop_fraction": 0.2, "ablation": 1, "ablation_mode": "absolute"}


def test_a_neuron_comes_back_and_the_others_lose_their_smallest_weight() -> None:
    assert srigl(REVIVED_WEIGHT, REVIVED_GRAD, **REVIVED) == [[0, 1, 0, 1], [1, 0, 1, 0], [1, 1, 0, 0]]


def test_a_neuron_that_is_ablated_for_good_does_not_come_back() -> None:
    frozen = torch.tensor([False, False, True])
    assert srigl(REVIVED_WEIGHT, REVIVED_GRAD, frozen_rows=frozen, **REVIVED) == [
        [1, 1, 0, 1],
        [1, 1, 1, 0],
        [0, 0, 0, 0],
    ]


def test_a_threshold_may_be_a_fraction_of_the_first_fan_in() -> None:
    weight = torch.tensor(
        [[0.9, -0.8, 0.7, 0, 0, 0], [0, 0.6, 0, 0.5, 0.4, 0], [0, 0, 0.35, 0, 0.3, 0.05], [0.04, 0, 0, 0.03, 0, 0.02]]
    )
    grad = torch.tensor(
        [
            [0.01, 0.02, 0.03, 0.10, 0.20, 0.05],
            [0.30, 0.01, 0.02, 0.01, 0.03, 0.15],
            [0.08, 0.09, 0.01, 0.12, 0.02, 0.01],
            [0.02, 0.40, 0.06, 0.01, 0.02, 0.01],
        ]
    )
    expected = [[1, 1, 1, 0, 1, 0], [1, 1, 0, 1, 1, 0], [0, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0]]
    assert srigl(weight, grad, budget=12, drop_fraction=0.34, ablation=0.7) == expected


def test_ablation_of_one_is_the_whole_first_fan_in() -> None:
    whole = srigl(W_A, G_A, budget=6, drop_fraction=0.4, ablation=1.0)
    assert whole == srigl(W_A, G_A, budget=6, drop_fraction=0.4, ablation=2, ablation_mode="absolute") == ONE_ABLATED


def test_min_neurons() -> None:
    options: dict[str, Any] = {"budget": 6, "drop_fraction": 0.4, "ablation": 10, "ablation_mode": "absolute"}
    assert srigl(W_A, G_A, min_neurons=1, **options) == ONE_ABLATED
    assert srigl(W_A, G_A, min_neurons=3, **options) == PER_ROW
    assert srigl(W_A, G_A, min_neurons=100, **options) == PER_ROW


def test_equal_gradients_grow_at_the_lowest_index() -> None:
    mask = torch.tensor([[False, False, True, False], [True, False, False, False]])
    weight = mask * torch.tensor(3.0)
    grown = srigl(weight, torch.ones(2, 4), budget=2, drop_fraction=1.0, mask=mask)
    assert grown == [[1, 0, 0, 0], [1, 0, 0, 0]]
    assert rigl_update(weight, torch.ones(2, 4), mask, drop_fraction=1.0).int().tolist() == [[1, 1, 0, 0], [0, 0, 0, 0]]


def test_gradients_that_are_not_finite_grow_nothing() -> None:
    grad = G_A.clone()
    grad[0, 2], grad[1, 3], grad[2, 0] = float("nan"), float("inf"), float("-inf")
    clean = grad.clone()
    clean[~torch.isfinite(grad)] = 0
    for options in ({}, {"ablation": 2, "ablation_mode": "absolute"}):
        arguments: dict[str, Any] = {"budget": 6, "drop_fraction": 0.4, **options}
        assert srigl(W_A, grad, **arguments) == srigl(W_A, clean, **arguments)


def test_degenerate_shapes() -> None:
    everything = torch.ones(3, 4, dtype=torch.bool)
    assert torch.equal(
        srigl_update(torch.randn(3, 4), torch.randn(3, 4), everything, budget=12, drop_fraction=0.5), everything
    )
    one = torch.tensor([[True, False, True]])
    assert srigl(torch.tensor([[1.0, 0, 2.0]]), torch.tensor([[0.0, 3, 0]]), mask=one, budget=2, drop_fraction=0.5) == [
        [0, 1, 1]
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"budget": 2},
        {"drop_fraction": 1.1},
        {"drop_fraction": float("nan")},
        {"ablation": -0.5},
        {"ablation": float("inf")},
        {"ablation": 1.5, "ablation_mode": "absolute"},
        {"ablation": 1, "ablation_mode": "count"},
        {"mask": torch.ones(3, 4)},
        {"mask": torch.ones(4, 3, dtype=torch.bool)},
    ],
)
def test_bad_arguments(change: dict[str, Any]) -> None:
    with pytest.raises(StructureError):
        srigl(W_A, G_A, **{"budget": 6, "drop_fraction": 0.4, **change})


def _random_layer(seed: int, rows: int = 24, fan_in: int = 40, k: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, fan_in, generator=generator).argsort(dim=1) < k
    weight, grad = (torch.randn(rows, fan_in, generator=generator, dtype=torch.float64) for _ in range(2))
    return weight * mask, grad, mask


@pytest.mark.parametrize("ablation", [None, 0.3, 0.95])
def test_permutation_and_scale(ablation: float | None) -> None:
    for seed in range(10):
        weight, grad, mask = _random_layer(seed)
        options: dict[str, Any] = {"budget": int(mask.sum()), "drop_fraction": 0.3, "ablation": ablation}
        new = srigl_update(weight, grad, mask, **options)
        order = torch.randperm(len(mask), generator=torch.Generator().manual_seed(seed))
        assert torch.equal(srigl_update(weight[order], grad[order], mask[order], **options), new[order])
        assert torch.equal(srigl_update(7 * weight, 0.01 * grad, mask, **options), new)
        assert not torch.equal(new, mask)


def test_nothing_dropped_changes_nothing() -> None:
    weight, grad, mask = _random_layer(3)
    assert torch.equal(srigl_update(weight, grad, mask, budget=int(mask.sum()), drop_fraction=0.0), mask)
    assert torch.equal(rigl_update(weight, grad, mask, drop_fraction=0.0), mask)


@given(st.integers(0, 1000), st.floats(0, 1))
@settings(max_examples=50)
def test_rigl_and_set_keep_the_number_of_weights(seed: int, drop_fraction: float) -> None:
    weight, grad, mask = _random_layer(seed, 6, 9, 3)
    dropped = int(int(mask.sum()) * drop_fraction)
    generator = torch.Generator().manual_seed(seed)
    survivors = weight.abs().flatten().sort(descending=True).indices[: 18 - dropped]
    for new in (
        rigl_update(weight, grad, mask, drop_fraction=drop_fraction),
        set_update(weight, mask, drop_fraction=drop_fraction, generator=generator),
    ):
        assert int(new.sum()) == 18
        assert new.flatten()[survivors].all()


def test_snfs_is_rigl_by_momentum() -> None:
    assert snfs_update(W_A, G_A, W_A != 0, drop_fraction=0.4).int().tolist() == [
        [1, 1, 0, 0],
        [0, 1, 1, 1],
        [0, 1, 0, 0],
    ]


def test_growth_is_ranked_by_the_structure() -> None:
    mask = W_A != 0
    shared: dict[str, Any] = {"budget": 6, "drop_fraction": 0.4}
    anywhere = drop_and_grow(W_A, G_A, mask, structure="unstructured", **shared)
    per_row = drop_and_grow(W_A, G_A, mask, structure="constant_fan_in", **shared)
    assert anywhere.int().tolist() == [[1, 1, 0, 0], [0, 1, 1, 1], [0, 1, 0, 0]]
    assert per_row.int().tolist() == PER_ROW


def test_gmp_keeps_the_largest() -> None:
    everything = torch.ones(3, 4, dtype=torch.bool)
    assert gmp_update(W_A, everything, count=4).int().tolist() == [[1, 1, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0]]
    assert gmp_update(W_A, everything, count=4, structure="constant_fan_in").int().tolist() == [
        [1, 0, 0, 0],
        [0, 0, 1, 0],
        [0, 1, 0, 0],
    ]
    # Never more than there are; weights off the mask do not come back, whatever their value.
    part = everything.clone()
    part[0, 0] = False
    assert torch.equal(gmp_update(W_A, part, count=12), part)
    with pytest.raises(StructureError, match="3 neurons a fan-in of 0"):
        gmp_update(W_A, everything, count=2, structure="constant_fan_in")


def test_set_depends_on_its_generator() -> None:
    weight, _, mask = _random_layer(0)
    first, again, other = (
        set_update(weight, mask, drop_fraction=0.5, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    weight, grad = W_A.to(dtype), G_A.to(dtype)
    assert srigl(weight, grad, budget=6, drop_fraction=0.4, ablation=2, ablation_mode="absolute") == ONE_ABLATED
