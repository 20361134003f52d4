"""Every update rule against its literal reading: random shapes, weights, gradients and masks; ties, zeros, infinities.

Few distinct values make ties and zeros common. Masks need not come from training: rows may be unequal, empty or full.
"""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from train_support.literal import gmp, rigl, srigl

from srigl_fx.masks.records import Structure
from srigl_fx.train.updates import (
    drop_and_grow,
    gmp_update,
    random_scores,
    rigl_update,
    set_update,
    snfs_update,
    srigl_update,
)

FRACTIONS = st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.77, 1.0])


@dataclass
class Case:
    """One layer to update."""

    weight: Tensor
    grad: Tensor
    mask: Tensor
    budget: int
    frozen: Tensor
    seed: int

    def lists(self) -> tuple[Any, Any, Any]:
        return self.weight.tolist(), self.grad.tolist(), self.mask.tolist()


@st.composite
def cases(draw: st.DrawFn, *, constant_fan_in: bool = False) -> Case:
    """Layers of up to 6 x 7; with ``constant_fan_in`` as training leaves them, else with any mask."""
    rows, fan_in = draw(st.integers(1, 6)), draw(st.integers(1, 7))
    budget = draw(st.integers(rows, rows * fan_in))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    frozen = torch.zeros(rows, dtype=torch.bool)
    if rows > 2 and draw(st.booleans()):
        frozen[draw(st.integers(0, rows - 1))] = True
    if constant_fan_in:
        k = min(fan_in, budget // int((~frozen).sum()))
        mask = (torch.rand(rows, fan_in, generator=generator).argsort(dim=1) < k) & ~frozen[:, None]
    else:
        density = draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]))
        mask = (torch.rand(rows, fan_in, generator=generator) < density) & ~frozen[:, None]
    levels = draw(st.sampled_from([1, 2, 3, 10, 10_000]))

    def values(special: bool) -> Tensor:
        found = torch.randint(-levels, levels + 1, (rows, fan_in), generator=generator) / levels
        if special:
            found[torch.rand(rows, fan_in, generator=generator) < 0.15] = draw(
                st.sampled_from([math.inf, -math.inf, math.nan])
            )
        return found

    weight = values(draw(st.booleans())).masked_fill(~mask, 0.0)
    return Case(weight, values(draw(st.booleans())), mask, budget, frozen, seed)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(cases(), FRACTIONS)
def test_rigl_and_snfs_equal_the_literal_reading(case: Case, drop_fraction: float) -> None:
    weight, grad, mask = case.lists()
    expected = rigl(weight, grad, mask, drop_fraction=drop_fraction)
    for rule in (rigl_update, snfs_update):
        new = rule(case.weight, case.grad, case.mask, drop_fraction=drop_fraction)
        assert new.int().tolist() == expected
        assert int(new.sum()) == int(case.mask.sum())


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(cases(), FRACTIONS)
def test_set_equals_the_literal_reading(case: Case, drop_fraction: float) -> None:
    weight, _, mask = case.lists()
    scores = random_scores(case.mask.shape, torch.Generator().manual_seed(case.seed))
    generator = torch.Generator().manual_seed(case.seed)
    new = set_update(case.weight, case.mask, drop_fraction=drop_fraction, generator=generator)
    assert new.int().tolist() == rigl(weight, scores.tolist(), mask, drop_fraction=drop_fraction)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(cases(), st.floats(0, 1), st.sampled_from(["unstructured", "constant_fan_in"]))
def test_gmp_equals_the_literal_reading(case: Case, share: float, structure: Structure) -> None:
    rows, fan_in = case.mask.shape
    weight, _, mask = case.lists()
    count = rows + int(share * (rows * fan_in - rows))
    new = gmp_update(case.weight, case.mask, count=count, structure=structure)
    expected = gmp(weight, mask, count=count, per_row=structure == "constant_fan_in")
    assert new.int().tolist() == expected
    assert not (new & ~case.mask).any()


@pytest.mark.slow
@pytest.mark.parametrize("growth", ["gradient", "random"])
@settings(max_examples=200, deadline=None)
@given(case=cases(constant_fan_in=True), drop_fraction=FRACTIONS)
def test_growth_per_row_equals_the_literal_reading(growth: str, case: Case, drop_fraction: float) -> None:
    """RigL, SNFS and SET with constant fan-in: one rule, three scores."""
    weight, _, mask = case.lists()
    scores = case.grad if growth == "gradient" else random_scores(case.mask.shape, torch.Generator().manual_seed(1))
    new = drop_and_grow(
        case.weight, scores, case.mask, budget=case.budget, drop_fraction=drop_fraction, structure="constant_fan_in"
    )
    expected = srigl(weight, scores.tolist(), mask, budget=case.budget, drop_fraction=drop_fraction)
    assert new.int().tolist() == expected
    rows, fan_in = case.mask.shape
    if case.budget < rows * fan_in:
        assert set(new.sum(dim=1).tolist()) == {case.budget // rows}


ABLATIONS = st.sampled_from(
    [(None, "fraction"), (0.3, "fraction"), (0.95, "fraction"), (1.0, "fraction"), (1, "absolute"), (3, "absolute")]
)


@pytest.mark.long
@pytest.mark.parametrize("trained", [True, False])
@settings(max_examples=250, deadline=None)
@given(data=st.data(), drop_fraction=FRACTIONS, ablation=ABLATIONS, min_neurons=st.sampled_from([None, 1, 2, 4]))
def test_srigl_equals_the_literal_reading(
    trained: bool,
    data: st.DataObject,
    drop_fraction: float,
    ablation: tuple[float | None, Any],
    min_neurons: int | None,
) -> None:
    case = data.draw(cases(constant_fan_in=trained))
    rows, fan_in = case.mask.shape
    gamma, mode = ablation
    first = case.budget // rows
    threshold = 0 if gamma is None else int(gamma) if mode == "absolute" else max(1, math.floor(gamma * first + 1e-9))
    new = srigl_update(
        case.weight,
        case.grad,
        case.mask,
        budget=case.budget,
        drop_fraction=drop_fraction,
        ablation=gamma,
        ablation_mode=mode,
        min_neurons=min_neurons,
        frozen_rows=case.frozen if case.frozen.any() else None,
    )
    weight, grad, mask = case.lists()
    assert new.int().tolist() == srigl(
        weight,
        grad,
        mask,
        budget=case.budget,
        drop_fraction=drop_fraction,
        threshold=threshold,
        min_neurons=min_neurons,
        frozen=case.frozen.tolist(),
    )
    if case.budget == rows * fan_in:
        return
    counts = new.sum(dim=1)
    active = int((counts > 0).sum())
    assert set(counts.tolist()) <= {0, min(fan_in, case.budget // max(1, active))}
    assert int(new.sum()) <= case.budget
    assert not new[case.frozen].any()
    if not case.frozen.any():
        assert active >= -(-case.budget // fan_in)
        assert active >= min(rows, min_neurons or 0)
