"""What must hold for every training method, one test each.

What other files look at: weights, gradients and optimizer state are zero off the mask (test_engine_projection.py,
test_training_invariants.py); all processes hold the same masks (distributed/); a resumed run equals an uninterrupted
one, to the bit (test_resume.py, test_methods.py); the condensed forward equals the masked one (tests/runtime).
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from train_support import batches, loss_of, mlp

from srigl_fx import LayerSpec, sparsify
from srigl_fx.errors import SparsifyError, StructureError
from srigl_fx.masks import distributions, verify
from srigl_fx.masks.budgets import budget as weights_at
from srigl_fx.masks.records import Structure, sparse_weights
from srigl_fx.train import SET, SNFS, RigL, SRigL, Static
from srigl_fx.train.base import Trainer
from srigl_fx.train.schedules import cosine_drop_fraction
from srigl_fx.train.updates import drop_and_grow, gmp_update, rigl_update, set_update, snfs_update, srigl_update

STEPS, EVERY, STOP = 24, 3, 0.75
METHODS: dict[str, Callable[..., Trainer]] = {"SRigL": SRigL, "RigL": RigL, "SET": SET, "SNFS": SNFS, "Static": Static}
PER_ROW = [(name, "constant_fan_in") for name in METHODS]
ANYWHERE = [(name, "unstructured") for name in METHODS if name != "SRigL"]


@dataclass
class Moment:
    """Masks and weights by name, before the update of a step and after it."""

    step: int
    masks: tuple[dict[str, Tensor], dict[str, Tensor]]
    weights: tuple[dict[str, Tensor], dict[str, Tensor]]


@dataclass
class Run:
    """A whole training run."""

    budgets: dict[str, int]
    moments: list[Moment]


@cache
def history(method: str, structure: Structure, seed: int = 0, **options: Any) -> Run:
    """Train a small network with strong ablation where there is any, and remember every step."""
    torch.manual_seed(seed)
    model = mlp(structure=structure)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    chosen: dict[str, Any] = {"drop_fraction": 0.5, **options}
    if method == "SRigL":
        chosen.setdefault("ablation", 0.9)
    trainer = METHODS[method](
        model, optimizer, total_steps=STEPS, update_every=EVERY, stop_at=STOP, auto=False, **chosen
    )

    def look() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        handles = sparse_weights(model)
        return {h.fqn: h.mask.clone() for h in handles}, {h.fqn: h.weight.detach().clone() for h in handles}

    moments = []
    for step, x in enumerate(batches(STEPS, seed=seed), start=1):
        optimizer.zero_grad()
        torch.autograd.backward(loss_of(model, x))
        optimizer.step()
        before = look()
        trainer.step()
        after = look()
        verify(model, optimizer)
        moments.append(Moment(step, (before[0], after[0]), (before[1], after[1])))
    return Run({handle.fqn: sum(handle.record.budgets) for handle in sparse_weights(model)}, moments)


def masks_of(run: Run) -> list[tuple[int, Tensor]]:
    """(budget, mask) of every layer after every step."""
    return [(run.budgets[name], mask) for moment in run.moments for name, mask in moment.masks[1].items()]


def random_layer(seed: int, rows: int = 12, fan_in: int = 20, k: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """(weight, gradient, constant fan-in mask) without ties."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, fan_in, generator=generator).argsort(dim=1) < k
    weight, grad = (torch.randn(rows, fan_in, generator=generator, dtype=torch.float64) for _ in range(2))
    return weight * mask, grad, mask


@pytest.mark.parametrize(("method", "structure"), PER_ROW)
def test_every_active_row_has_the_same_fan_in_and_every_other_none(method: str, structure: Structure) -> None:
    for budget, mask in masks_of(history(method, structure)):
        counts = mask.sum(dim=1)
        active = int((counts > 0).sum())
        assert set(counts.tolist()) <= {0, min(mask.shape[1], budget // active)}


@pytest.mark.parametrize(("method", "structure"), PER_ROW + ANYWHERE)
def test_no_layer_ever_keeps_more_weights_than_its_budget(method: str, structure: Structure) -> None:
    for budget, mask in masks_of(history(method, structure)):
        assert 0 < int(mask.sum()) <= budget


@pytest.mark.parametrize(("method", "structure"), PER_ROW[1:] + ANYWHERE)
def test_rigl_set_and_snfs_keep_the_number_of_weights(method: str, structure: Structure) -> None:
    for moment in history(method, structure).moments:
        before, after = moment.masks
        assert {name: int(mask.sum()) for name, mask in before.items()} == {
            name: int(mask.sum()) for name, mask in after.items()
        }


@pytest.mark.parametrize(("method", "structure"), PER_ROW[:-1] + ANYWHERE[:-1])
def test_grown_weights_start_at_zero_and_kept_ones_keep_their_value(method: str, structure: Structure) -> None:
    grown = regrown = 0
    for moment in history(method, structure).moments:
        drop = cosine_drop_fraction(moment.step, initial=0.5, end=int(STOP * STEPS))
        for name, old in moment.masks[0].items():
            new, before, after = moment.masks[1][name], moment.weights[0][name], moment.weights[1][name]
            assert not after[new & ~old].any()
            assert not after[~new].any()
            assert torch.equal(after[new & old], before[new & old])
            grown += int((new & ~old).sum())
            if moment.step % EVERY == 0:
                dropped = before.abs().masked_fill(~old, math.inf).flatten().argsort()[: int(int(old.sum()) * drop)]
                regrown += int(new.flatten()[dropped].sum())
    assert grown > 0
    assert regrown > 0


@pytest.mark.parametrize(("method", "structure"), PER_ROW + ANYWHERE)
def test_masks_change_at_multiples_of_the_interval_below_the_end_only(method: str, structure: Structure) -> None:
    changes = [
        moment.step
        for moment in history(method, structure).moments
        if any(not torch.equal(mask, moment.masks[1][name]) for name, mask in moment.masks[0].items())
    ]
    assert changes == ([] if method == "Static" else list(range(EVERY, int(STOP * STEPS), EVERY)))


@given(st.integers(1, 10_000), st.floats(1e-6, 1))
def test_the_drop_fraction_falls_from_its_start_to_zero(end: int, initial: float) -> None:
    steps = range(0, end + 1, max(1, end // 20))
    values = [cosine_drop_fraction(step, initial=initial, end=end) for step in (*steps, end)]
    assert values[0] == initial
    assert values[-1] == 0
    assert all(a >= b >= 0 for a, b in itertools.pairwise(values))


@pytest.mark.parametrize("structure", ["constant_fan_in", "unstructured"])
def test_nothing_dropped_changes_nothing(structure: Structure) -> None:
    for seed in range(10):
        weight, grad, mask = random_layer(seed)
        budget = int(mask.sum())
        assert torch.equal(
            drop_and_grow(weight, grad, mask, budget=budget, drop_fraction=0.0, structure=structure), mask
        )
        assert torch.equal(gmp_update(weight, mask, count=budget, structure=structure), mask)


@pytest.mark.long
@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(1, 8), st.integers(1, 8))
def test_as_many_rows_survive_any_threshold_as_hold_the_budget(data: st.DataObject, rows: int, fan_in: int) -> None:
    budget = data.draw(st.integers(rows, rows * fan_in))
    k = min(fan_in, budget // rows)
    weight, grad, mask = random_layer(data.draw(st.integers(0, 999)), rows, fan_in, k)
    for _ in range(4):
        mask = srigl_update(
            weight, grad, mask, budget=budget, drop_fraction=0.6, ablation=10**6, ablation_mode="absolute"
        )
        weight = weight.masked_fill(~mask, 0.0) + 0.1 * grad * mask
        counts = mask.sum(dim=1)
        assert int((counts > 0).sum()) >= budget // fan_in + (budget % fan_in > 0)
        assert int(counts.max()) <= fan_in


def test_protected_layers_keep_every_neuron() -> None:
    rules: dict[str | type[nn.Module], float | LayerSpec | None] = {
        "*": LayerSpec(sparsity=0.75),
        "0": LayerSpec(sparsity=0.75, ablation=0.0),
    }
    model = nn.Sequential(
        nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16), nn.Linear(16, 8)
    )
    sparsify(model, rules=rules)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options: dict[str, Any] = {"total_steps": 40, "update_every": 2, "ablation": 1.0, "drop_fraction": 0.5}
    trainer = SRigL(model, optimizer, protect=["[5]"], **options)
    for x in batches(20):
        optimizer.zero_grad()
        torch.autograd.backward(loss_of(model, x))
        optimizer.step()
        active = {h.fqn: int(h.mask.any(dim=1).sum()) for h in sparse_weights(model)}
        assert active["0.weight"] == 32  # by its rule
        assert active["5.weight"] == 8  # by the argument
    assert set(trainer.protected) == {"5.weight"}
    assert active["2.weight"] < 32
    assert active["4.weight"] < 16


def test_permanent_ablation_only_grows() -> None:
    run = history("SRigL", "constant_fan_in", permanent_ablation=True)
    dead: dict[str, Tensor] = {}
    for moment in run.moments:
        for name, mask in moment.masks[1].items():
            now = ~mask.any(dim=1)
            assert name not in dead or not (dead[name] & ~now).any()
            dead[name] = now
    assert dead["0.weight"].any()
    assert dead["2.weight"].any()


def test_a_layer_that_is_dead_for_good_stays_dead() -> None:
    weight, grad, mask = torch.zeros(3, 4), torch.ones(3, 4), torch.zeros(3, 4, dtype=torch.bool)
    everybody = torch.ones(3, dtype=torch.bool)
    options: dict[str, Any] = {"budget": 6, "drop_fraction": 0.5, "ablation": 0.5}
    assert not srigl_update(weight, grad, mask, frozen_rows=everybody, **options).any()
    assert srigl_update(weight, grad, mask, **options).sum() == 6


@pytest.mark.parametrize("rule", ["srigl", "ablation", "rigl", "snfs", "gmp", "gmp per row"])
def test_neither_the_order_of_neurons_nor_the_scale_of_values_matters(rule: str) -> None:
    def update(weight: Tensor, grad: Tensor, mask: Tensor) -> Tensor:
        budget = 48
        if rule == "rigl":
            return rigl_update(weight, grad, mask, drop_fraction=0.4)
        if rule == "snfs":
            return snfs_update(weight, grad, mask, drop_fraction=0.4)
        if rule.startswith("gmp"):
            structure: Structure = "constant_fan_in" if "row" in rule else "unstructured"
            return gmp_update(weight, mask, count=budget // 2, structure=structure)
        ablation = 0.95 if rule == "ablation" else None
        return srigl_update(weight, grad, mask, budget=budget, drop_fraction=0.4, ablation=ablation)

    for seed in range(10):
        weight, grad, mask = random_layer(seed)
        new = update(weight, grad, mask)
        assert not torch.equal(new, mask)
        order = torch.randperm(len(mask), generator=torch.Generator().manual_seed(seed))
        assert torch.equal(update(weight[order], grad[order], mask[order]), new[order])
        assert torch.equal(update(3 * weight, 0.5 * grad, mask), new)


@given(
    st.lists(st.tuples(st.integers(4, 40), st.integers(4, 40)), min_size=2, max_size=6),
    st.sampled_from([0.5, 0.75, 0.8, 0.9]),
    st.sampled_from([distributions.erk, distributions.uniform]),
)
def test_the_budgets_of_a_distribution_add_up_to_its_density(
    shapes: list[tuple[int, int]], sparsity: float, distribution: Callable[..., Any]
) -> None:
    named = {str(i): shape for i, shape in enumerate(shapes)}
    densities = distribution(named, sparsity)
    assert all(0 < density <= 1 for density in densities.values())
    sizes = {name: math.prod(shape) for name, shape in named.items()}
    kept = sum(weights_at(sizes[name], density) for name, density in densities.items())
    assert abs(kept - (1 - sparsity) * sum(sizes.values())) <= len(shapes) + 1e-6


def test_the_densities_of_small_shapes_by_hand() -> None:
    shapes = {"a": (8, 4), "b": (16, 16)}
    assert distributions.erk(shapes, 0.75) == pytest.approx({"a": 0.613636, "b": 0.204545}, abs=1e-6)
    assert distributions.erk(shapes, 0.5) == {"a": 1.0, "b": 0.4375}
    assert distributions.uniform(shapes, 0.7, dense=["a"]) == pytest.approx({"a": 1.0, "b": 0.2125})


@pytest.mark.parametrize("rule", ["srigl", "rigl", "snfs", "gmp"])
def test_ties_go_to_the_lowest_index(rule: str) -> None:
    mask = torch.tensor([[False, False, True, True], [True, False, False, True]])
    weight, grad = mask.float(), torch.full((2, 4), -2.0)
    if rule == "srigl":
        new = srigl_update(weight, grad, mask, budget=4, drop_fraction=1.0)
        assert new.tolist() == [[True, True, False, False]] * 2
    elif rule == "gmp":
        new = gmp_update(weight, mask, count=2)
        assert new.tolist() == [[False, False, True, True], [False] * 4]
    else:
        new = (rigl_update if rule == "rigl" else snfs_update)(weight, grad, mask, drop_fraction=0.5)
        assert new.tolist() == [[True, True, True, True], [False] * 4]


@pytest.mark.parametrize(("rows", "fan_in", "k"), [(1, 5, 2), (1, 1, 1), (3, 4, 4), (4, 1, 1), (5, 3, 1)])
def test_full_masks_full_fan_ins_and_single_neurons_work(rows: int, fan_in: int, k: int) -> None:
    weight, grad, mask = random_layer(1, rows, fan_in, k)
    budget = rows * k
    for ablation in (None, 0.9):
        new = srigl_update(weight, grad, mask, budget=budget, drop_fraction=0.5, ablation=ablation)
        active = int(new.any(dim=1).sum())
        assert int(new.sum()) == min(fan_in, budget // active) * active
    assert int(rigl_update(weight, grad, mask, drop_fraction=0.5).sum()) == budget
    draw = torch.Generator().manual_seed(0)
    assert int(set_update(weight, mask, drop_fraction=0.5, generator=draw).sum()) == budget
    assert torch.equal(gmp_update(weight, mask, count=budget, structure="constant_fan_in"), mask)


def test_a_single_neuron_without_bias_trains() -> None:
    model = nn.Sequential(nn.Linear(24, 16, bias=False), nn.ReLU(), nn.Linear(16, 1, bias=False))
    sparsify(model, rules={"0": 0.75, "2": 0.5})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    SRigL(model, optimizer, total_steps=20, update_every=2, ablation=0.9)
    for x in batches(10):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        verify(model, optimizer)


def test_a_fan_in_of_zero_is_an_error() -> None:
    weight, grad, mask = random_layer(0)
    with pytest.raises(StructureError, match="12 neurons a fan-in of 0: reduce the sparsity"):
        srigl_update(weight, grad, mask, budget=11, drop_fraction=0.5)
    with pytest.raises(SparsifyError):
        sparsify(nn.Sequential(nn.Linear(8, 8)), rules={"0": 0.99})


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_never_reaches_a_mask(bad: float) -> None:
    for seed in range(5):
        weight, grad, mask = random_layer(seed)
        strange = grad.clone()
        strange[torch.rand(grad.shape, generator=torch.Generator().manual_seed(seed)) < 0.3] = bad
        clean = strange.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        for rule in (rigl_update, snfs_update):
            new = rule(weight, strange, mask, drop_fraction=0.5)
            assert torch.equal(new, rule(weight, clean, mask, drop_fraction=0.5))
            assert not (new & ~mask)[~strange.isfinite()].any()
        for ablation in (None, 0.9):
            options: dict[str, Any] = {"budget": int(mask.sum()), "drop_fraction": 0.5, "ablation": ablation}
            assert torch.equal(
                srigl_update(weight, strange, mask, **options), srigl_update(weight, clean, mask, **options)
            )
