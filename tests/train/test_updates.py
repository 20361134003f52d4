"""The update rules against worked examples and against a slow, literal implementation."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from srigl_fx.errors import StructureError
from srigl_fx.train.updates import rigl_update, set_update, srigl_update

W_A = torch.tensor([[0.9, -0.8, 0, 0], [0.1, 0, -0.7, 0], [0, 0.3, 0, 0.2]])
G_A = torch.tensor([[0.5, -0.1, 0.2, 0.3], [0.05, -0.9, 0.15, 0.7], [0.6, 0.25, -0.35, 0.01]])
E2 = [[1, 1, 0, 0], [0, 1, 1, 0], [1, 1, 0, 0]]
E3 = [[1, 1, 0, 1], [1, 1, 1, 0], [0, 0, 0, 0]]


def srigl(weight: Tensor, grad: Tensor, **options: Any) -> list[list[int]]:
    mask = options.pop("mask", weight != 0)
    result: list[list[int]] = srigl_update(weight, grad, mask, **options).int().tolist()
    return result


def test_e1_rigl() -> None:
    assert rigl_update(W_A, G_A, W_A != 0, drop_fraction=0.4).int().tolist() == [
        [1, 1, 0, 0],
        [0, 1, 1, 1],
        [0, 1, 0, 0],
    ]


def test_e2_without_ablation() -> None:
    assert srigl(W_A, G_A, budget=6, drop_fraction=0.4) == E2
    assert srigl(W_A, G_A, budget=6, drop_fraction=0.4, ablation=0) == E2
    assert srigl(W_A, G_A, budget=6, drop_fraction=0.4, ablation=0.95) == E2


@pytest.mark.parametrize("threshold", [2, 10])
def test_e3_ablation(threshold: int) -> None:
    assert srigl(W_A, G_A, budget=6, drop_fraction=0.4, ablation=threshold, ablation_mode="absolute") == E3


def test_e4_only_active_weights_are_kept() -> None:
    weight = W_A.clone()
    weight[2, 3] = 0.05
    assert srigl(weight, G_A, budget=6, drop_fraction=0.2, ablation=2, ablation_mode="absolute") == E3


E5_WEIGHT = torch.tensor([[0.2, 0.9, 0, 0.8], [0.6, 0, 0.7, 0.1], [0, 0, 0, 0]])
E5_GRAD = torch.tensor([[0.05, 0.06, 0.3, 0.07], [0.1, 0.2, 0.08, 0.09], [0.95, 0.9, 0.01, 0.02]])
E5: dict[str, Any] = {"budget": 6, "drop_fraction": 0.2, "ablation": 1, "ablation_mode": "absolute"}


def test_e5_a_revived_neuron_and_trimming_by_magnitude() -> None:
    assert srigl(E5_WEIGHT, E5_GRAD, **E5) == [[0, 1, 0, 1], [1, 0, 1, 0], [1, 1, 0, 0]]


def test_e5_with_permanent_ablation() -> None:
    frozen = torch.tensor([False, False, True])
    assert srigl(E5_WEIGHT, E5_GRAD, frozen_rows=frozen, **E5) == [[1, 1, 0, 1], [1, 1, 1, 0], [0, 0, 0, 0]]


def test_e6_a_fraction_of_the_first_fan_in() -> None:
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
    assert whole == srigl(W_A, G_A, budget=6, drop_fraction=0.4, ablation=2, ablation_mode="absolute") == E3


def test_min_neurons() -> None:
    options: dict[str, Any] = {"budget": 6, "drop_fraction": 0.4, "ablation": 10, "ablation_mode": "absolute"}
    assert srigl(W_A, G_A, min_neurons=1, **options) == E3
    assert srigl(W_A, G_A, min_neurons=3, **options) == E2
    assert srigl(W_A, G_A, min_neurons=100, **options) == E2


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


# A literal reading of the rules: Python numbers, explicit loops, one step after the other.


def literal_srigl(
    weight: list[list[float]],
    grad: list[list[float]],
    mask: list[list[bool]],
    *,
    budget: int,
    drop_fraction: float,
    threshold: int,
    min_neurons: int | None,
    frozen: list[bool],
) -> list[list[int]]:
    rows, fan_in = len(mask), len(mask[0])
    cells = [(i, j) for i in range(rows) for j in range(fan_in)]
    size = {cell: abs(weight[cell[0]][cell[1]]) for cell in cells}
    slope = {cell: abs(grad[cell[0]][cell[1]]) for cell in cells}
    slope = {cell: value if math.isfinite(value) else 0.0 for cell, value in slope.items()}
    on = [cell for cell in cells if mask[cell[0]][cell[1]]]

    nonzero = [cell for cell in on if size[cell] > 0]
    n_keep = min(len(on) - int(len(on) * drop_fraction), len(nonzero))
    n_prune = len(on) - n_keep

    ablated = list(frozen)
    if threshold:
        by_size = sorted(on, key=lambda cell: (-size[cell], cell))[:n_keep]
        allowed = [cell for cell in cells if not frozen[cell[0]]]
        by_slope = sorted(allowed, key=lambda cell: (-slope[cell], cell))[:n_prune]
        counts = [sum(1 for cell in {*by_size, *by_slope} if cell[0] == i) for i in range(rows)]
        others = sorted((counts[i] for i in range(rows) if not frozen[i]), reverse=True)
        must_survive = min(rows, max(budget // fan_in + 1, min_neurons or 0))
        limit = min(threshold, others[must_survive - 1]) if must_survive <= len(others) else 0
        ablated = [frozen[i] or counts[i] < limit for i in range(rows)]

    active = [i for i in range(rows) if not ablated[i]]
    new = [[0] * fan_in for _ in range(rows)]
    if not active:
        return new
    k = min(fan_in, budget // len(active))
    kept = sorted((cell for cell in nonzero if not ablated[cell[0]]), key=lambda cell: (-size[cell], cell))[:n_keep]
    for i in active:
        mine = sorted((cell for cell in kept if cell[0] == i), key=lambda cell: (-size[cell], cell))[:k]
        every_kept = {cell for cell in kept if cell[0] == i}
        rest = [cell for cell in cells if cell[0] == i and cell not in every_kept]
        mine += sorted(rest, key=lambda cell: (-slope[cell], cell))[: k - len(mine)]
        for _, j in mine:
            new[i][j] = 1
    return new


@st.composite
def layers(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """(weight, grad, mask, budget, frozen rows) with few distinct values, so that ties and zeros are common."""
    rows, fan_in = draw(st.integers(1, 6)), draw(st.integers(1, 7))
    budget = draw(st.integers(rows, rows * fan_in))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    frozen = torch.zeros(rows, dtype=torch.bool)
    if rows > 2 and draw(st.booleans()):
        frozen[draw(st.integers(0, rows - 1))] = True
    active = int((~frozen).sum())
    k = min(fan_in, budget // active)
    order = torch.rand(rows, fan_in, generator=generator).argsort(dim=1)
    mask = (order < k) & ~frozen[:, None]
    levels = draw(st.sampled_from([2, 3, 10, 10_000]))

    def values() -> Tensor:
        return torch.randint(-levels, levels + 1, (rows, fan_in), generator=generator) / levels

    grad = values()
    if draw(st.booleans()):
        grad[torch.rand(rows, fan_in, generator=generator) < 0.1] = draw(
            st.sampled_from([math.inf, -math.inf, math.nan])
        )
    return values() * mask, grad, mask, budget, frozen


@settings(max_examples=400, deadline=None)
@given(
    layers(),
    st.sampled_from([0.0, 0.1, 0.3, 0.5, 1.0]),
    st.sampled_from([(None, "fraction"), (0.3, "fraction"), (0.95, "fraction"), (1, "absolute"), (3, "absolute")]),
    st.sampled_from([None, 1, 2, 4]),
)
def test_equals_the_literal_reading(
    layer: tuple[Tensor, Tensor, Tensor, int, Tensor],
    drop_fraction: float,
    ablation: tuple[float | None, Any],
    min_neurons: int | None,
) -> None:
    weight, grad, mask, budget, frozen = layer
    rows, fan_in = mask.shape
    gamma, mode = ablation
    threshold = (
        0 if gamma is None else int(gamma) if mode == "absolute" else max(1, math.floor(gamma * (budget // rows)))
    )
    new = srigl_update(
        weight,
        grad,
        mask,
        budget=budget,
        drop_fraction=drop_fraction,
        ablation=gamma,
        ablation_mode=mode,
        min_neurons=min_neurons,
        frozen_rows=frozen if frozen.any() else None,
    )
    if budget == rows * fan_in:
        assert torch.equal(new, mask)
        return
    assert new.int().tolist() == literal_srigl(
        weight.tolist(),
        grad.tolist(),
        mask.tolist(),
        budget=budget,
        drop_fraction=drop_fraction,
        threshold=threshold,
        min_neurons=min_neurons,
        frozen=frozen.tolist(),
    )
    counts = new.sum(dim=1)
    active = int((counts > 0).sum())
    assert set(counts.tolist()) <= {0, min(fan_in, budget // active)}
    assert int(new.sum()) <= budget
    assert not new[frozen].any()
    if not frozen.any():
        assert active >= -(-budget // fan_in)
        assert active >= min(rows, min_neurons or 0)


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
    assert srigl(weight, grad, budget=6, drop_fraction=0.4, ablation=2, ablation_mode="absolute") == E3
