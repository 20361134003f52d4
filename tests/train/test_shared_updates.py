"""The update rules for rows that share their inputs: worked examples, and a literal reading on random layers.

The oracle is tests/train_support/literal_groups.py. Few distinct values make ties and zeros common.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from train_support import literal_groups as literal

from srigl_fx.errors import StructureError
from srigl_fx.masks.records import Structure
from srigl_fx.masks.row_groups import RowGroups
from srigl_fx.masks.structures import initial_mask
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
STRUCTURES: tuple[Structure, ...] = ("constant_fan_in", "unstructured")

# Four neurons in two pairs. Mean |w| of the first pair (.55, .6), of the second (.5, .4) in columns 2 and 3.
W = torch.tensor([[0.9, -0.8, 0, 0], [0.2, -0.4, 0, 0], [0, 0, 0.7, 0.2], [0, 0, -0.3, 0.6]])
G = torch.tensor([[0.01, 0.02, 0.03, 0], [0, 0, 0, 0.05], [0.1, 0.4, 0, 0.2], [0.3, -0.1, 0.1, 0.05]])
PAIRS = RowGroups(rows=4, size=2)


def test_srigl_drops_and_grows_for_a_group() -> None:
    """The second pair loses its inputs, and grows (1, 0): mean |g| .2, .25, .05, .125."""
    new = srigl_update(W, G, W != 0, budget=8, drop_fraction=0.5, groups=PAIRS)
    assert new.int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]]
    # By itself, the third neuron keeps .7 and grows where its own gradient is .4.
    alone = srigl_update(W, G, W != 0, budget=8, drop_fraction=0.5)
    assert alone.int().tolist() == [[1, 1, 0, 0], [1, 0, 0, 1], [0, 1, 1, 0], [1, 0, 0, 1]]


def test_srigl_ablates_a_neuron_and_not_its_group() -> None:
    """Salient are |w| .9 .8 .7 .6 and |g| .4 .3 .2 .1: none of the second neuron, which is ablated; k = 9 // 3.

    The first neuron keeps its own weights (.9, .8, without the second's .2, .4) and grows by its own gradient, in
    column 2, where that of both would be column 3. The others grow columns 1, 0 and 3.
    """
    options: dict[str, Any] = {"budget": 9, "drop_fraction": 0.5, "ablation": 1, "ablation_mode": "absolute"}
    new = srigl_update(W, G, W != 0, groups=PAIRS, **options)
    assert new.int().tolist() == [[1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 0, 1], [1, 1, 0, 1]]


def test_srigl_brings_a_neuron_back_to_the_inputs_of_its_group() -> None:
    weight, grad = W.clone(), G.clone()
    weight[1], grad[1] = 0, torch.tensor([0, 0, 0.9, 0])
    options: dict[str, Any] = {"budget": 8, "drop_fraction": 0.2, "ablation": 1, "ablation_mode": "absolute"}
    new = srigl_update(weight, grad, weight != 0, groups=PAIRS, **options)
    assert new.int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    frozen = torch.tensor([False, True, False, False])
    new = srigl_update(weight, grad, weight != 0, groups=PAIRS, frozen_rows=frozen, **options)
    assert new.int().tolist() == [[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]


def test_a_group_with_fewer_rows_is_not_the_weaker_for_it() -> None:
    """The rest has weights of .5 and .41, the pair sums of .8 and .6, but means of .4 and .3: these go."""
    weight = torch.tensor([[0.4, 0.3, 0, 0], [0.4, 0.3, 0, 0], [0, 0, 0.5, 0.41]])
    grad = torch.tensor([[0, 0, 0.1, 0.2], [0, 0, 0.1, 0.2], [0.9, 0.9, 0, 0]])
    new = srigl_update(weight, grad, weight != 0, budget=6, drop_fraction=0.5, groups=RowGroups(rows=3, size=2))
    assert new.int().tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1]]


REST_W = torch.tensor([[0.5, 0.1, 0], [0.5, -0.3, 0], [0, 0, 0.9]])
REST_G = torch.tensor([[0, 0.1, 0.4], [0, 0.1, -0.4], [9.0, 8.0, 0]])
REST = RowGroups(rows=3, size=2)


def test_rigl_exchanges_the_inputs_of_equally_large_groups() -> None:
    """The pair drops .2 and grows where |g| is .4, though its sum is 0; the rest drops int(.5) of its one input."""
    new = rigl_update(REST_W, REST_G, REST_W != 0, drop_fraction=0.5, groups=REST)
    assert new.int().tolist() == [[1, 0, 1], [1, 0, 1], [0, 0, 1]]
    new = rigl_update(REST_W, REST_G, REST_W != 0, drop_fraction=1.0, groups=REST)
    assert new.int().tolist() == [[0, 1, 1], [0, 1, 1], [1, 0, 0]]


def test_groups_differ_in_their_fan_in_where_a_layer_is_unstructured() -> None:
    new = rigl_update(W, G, W != 0, drop_fraction=0.25, groups=PAIRS)  # drops .4, and grows where |g| is .25
    assert new.int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0]]
    new = gmp_update(W, W != 0, count=6, groups=PAIRS)
    assert new.int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0]]


def test_gmp_by_hand() -> None:
    everything = torch.ones(3, 3, dtype=torch.bool)
    # Of 6 weights the pair has 4, two inputs of mean .5 and .2; the rest 2, of which one is zero.
    new = gmp_update(REST_W, everything, count=6, groups=REST)
    assert new.int().tolist() == [[1, 1, 0], [1, 1, 0], [1, 0, 1]]
    new = gmp_update(REST_W, everything, count=3, structure="constant_fan_in", groups=REST)
    assert new.int().tolist() == [[1, 0, 0], [1, 0, 0], [0, 0, 1]]


def test_the_first_mask_by_hand() -> None:
    def draw(structure: Structure, budget: int) -> list[list[int]]:
        generator = torch.Generator()
        mask = initial_mask(
            weight, structure=structure, budget=budget, init="magnitude", generator=generator, groups=REST
        )
        rows: list[list[int]] = mask.int().tolist()
        return rows

    weight = torch.tensor([[0.6, 0.1, 0.5], [-0.1, 0.3, 0.5], [0.2, 0.9, 0.3]])
    assert draw("constant_fan_in", 5) == [[0, 0, 1], [0, 0, 1], [0, 1, 0]]  # sums .7, .4, 1.0
    assert draw("constant_fan_in", 6) == [[1, 0, 1], [1, 0, 1], [0, 1, 1]]
    assert draw("unstructured", 5) == [[0, 0, 1], [0, 0, 1], [0, 1, 0]]  # 3 and 1 weights: an input each
    assert draw("unstructured", 8) == [[1, 0, 1], [1, 0, 1], [0, 1, 1]]  # 5 and 2
    with pytest.raises(StructureError, match="a budget of 1 weights gives 3 neurons of 3 inputs a fan-in of 0"):
        draw("unstructured", 1)


def test_groups_that_do_not_fit_are_refused() -> None:
    mask = W != 0
    mask[1, 2] = True
    calls: list[Callable[[Tensor, RowGroups], Tensor]] = [
        lambda mask, groups: srigl_update(W, G, mask, budget=8, drop_fraction=0.5, groups=groups),
        lambda mask, groups: rigl_update(W, G, mask, drop_fraction=0.5, groups=groups),
        lambda mask, groups: gmp_update(W, mask, count=8, groups=groups),
    ]
    for call in calls:
        with pytest.raises(StructureError, match=r"rows 0-1 share their inputs \(group_size=2\)"):
            call(mask, PAIRS)
        with pytest.raises(StructureError, match="groups are of 3 rows, but the mask has 4"):
            call(W != 0, REST)


@dataclass
class Case:
    """One layer to update."""

    groups: RowGroups
    weight: Tensor
    grad: Tensor
    mask: Tensor
    budget: int
    frozen: Tensor
    seed: int

    @property
    def members(self) -> literal.Groups:
        return literal.groups_of(self.groups.rows, self.groups.size, self.groups.section)

    def lists(self) -> tuple[Any, Any, Any]:
        return self.weight.tolist(), self.grad.tolist(), self.mask.tolist()


@st.composite
def cases(draw: st.DrawFn, *, trained: bool) -> Case:
    """Layers of up to 11 x 6; ``trained`` ones as training with a constant fan-in leaves them, else any shared mask."""
    rows, fan_in = draw(st.integers(1, 11)), draw(st.integers(1, 6))
    groups = RowGroups(
        rows=rows, size=draw(st.sampled_from([1, 2, 4, 8])), section=draw(st.none() | st.integers(1, rows))
    )
    budget = draw(st.integers(rows, rows * fan_in))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    # Ablated rows may come back, frozen ones not.
    ablated = torch.rand(rows, generator=generator) < draw(st.sampled_from([0.0, 0.3, 0.7]))
    if int((~ablated).sum()) * fan_in < budget:
        ablated = torch.zeros(rows, dtype=torch.bool)
    frozen = ablated if draw(st.booleans()) else torch.zeros(rows, dtype=torch.bool)
    if trained:
        k = min(fan_in, budget // int((~ablated).sum()))
        shared = torch.rand(len(groups), fan_in, generator=generator).argsort(dim=1) < k
    else:
        shared = torch.rand(len(groups), fan_in, generator=generator) < draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]))
    mask = groups.expand(shared, ~ablated)
    levels = draw(st.sampled_from([1, 2, 3, 10, 10_000]))

    def values(special: bool) -> Tensor:
        found = torch.randint(-levels, levels + 1, (rows, fan_in), generator=generator) / levels
        if special:
            found[torch.rand(rows, fan_in, generator=generator) < 0.15] = draw(
                st.sampled_from([math.inf, -math.inf, math.nan, 3e38])
            )
        return found

    weight = values(draw(st.booleans())).masked_fill(~mask, 0.0)
    return Case(groups, weight, values(draw(st.booleans())), mask, budget, frozen, seed)


def assert_shared(new: Tensor, case: Case) -> None:
    """Rows of a group that keep anything keep the same."""
    for rows in case.members:
        assert len({tuple(row) for row in new[rows].tolist() if any(row)}) <= 1


@pytest.mark.long
@settings(max_examples=200, deadline=None)
@given(cases(trained=False), FRACTIONS)
def test_rigl_and_snfs_equal_the_literal_reading(case: Case, drop_fraction: float) -> None:
    weight, grad, mask = case.lists()
    expected = literal.rigl(case.members, weight, grad, mask, drop_fraction=drop_fraction)
    options: dict[str, Any] = {"drop_fraction": drop_fraction, "groups": case.groups}
    for rule in (rigl_update, snfs_update):
        new = rule(case.weight, case.grad, case.mask, **options)
        assert new.int().tolist() == expected
        assert_shared(new, case)
        # No row of an unstructured layer is ablated: one that was empty is given the inputs of its group.
        assert int(new.sum()) == int(case.groups.expand(case.groups.any(case.mask)).sum())
    by_structure = drop_and_grow(
        case.weight, case.grad, case.mask, budget=case.budget, structure="unstructured", **options
    )
    assert torch.equal(by_structure, new)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(cases(trained=False), FRACTIONS)
def test_set_equals_the_literal_reading(case: Case, drop_fraction: float) -> None:
    weight, _, mask = case.lists()
    scores = random_scores(case.mask.shape, torch.Generator().manual_seed(case.seed))
    generator = torch.Generator().manual_seed(case.seed)
    new = set_update(case.weight, case.mask, drop_fraction=drop_fraction, generator=generator, groups=case.groups)
    assert new.int().tolist() == literal.rigl(case.members, weight, scores.tolist(), mask, drop_fraction=drop_fraction)


@pytest.mark.long
@settings(max_examples=200, deadline=None)
@given(cases(trained=False), st.floats(0, 1), st.sampled_from(STRUCTURES))
def test_gmp_equals_the_literal_reading(case: Case, share: float, structure: Structure) -> None:
    rows, fan_in = case.mask.shape
    mask = case.groups.expand(case.groups.any(case.mask))  # no row is ablated while a layer is pruned
    count = rows + int(share * (rows * fan_in - rows))
    new = gmp_update(case.weight, mask, count=count, structure=structure, groups=case.groups)
    per_row = structure == "constant_fan_in"
    expected = literal.gmp(case.members, case.weight.tolist(), mask.tolist(), count=count, per_row=per_row)
    assert new.int().tolist() == expected
    assert not (new & ~mask).any()
    assert int(new.sum()) <= count
    assert_shared(new, case)


@pytest.mark.long
@settings(max_examples=200, deadline=None)
@given(cases(trained=False), st.sampled_from(STRUCTURES), st.sampled_from(["magnitude", "random"]))
def test_first_masks_equal_the_literal_reading(case: Case, structure: Structure, init: Any) -> None:
    weight = case.grad.nan_to_num(nan=0.0)
    generator = torch.Generator().manual_seed(case.seed)
    fits = structure == "constant_fan_in" or any(inputs for _, inputs in case.groups.shares(case.budget))
    options: dict[str, Any] = {"structure": structure, "budget": case.budget, "init": init, "groups": case.groups}
    if not fits:
        with pytest.raises(StructureError, match="a fan-in of 0"):
            initial_mask(weight, generator=generator, **options)
        return
    new = initial_mask(weight, generator=generator, **options)
    if init == "random":
        scores = random_scores((len(case.members), weight.shape[1]), torch.Generator().manual_seed(case.seed)).tolist()
    else:
        scores = [
            [sum(abs(weight[i, j].item()) for i in rows) for j in range(weight.shape[1])] for rows in case.members
        ]
    per_row = structure == "constant_fan_in"
    assert new.int().tolist() == literal.initial(case.members, scores, budget=case.budget, per_row=per_row)
    assert 0 < int(new.sum()) <= case.budget
    assert_shared(new, case)


ABLATIONS = st.sampled_from(
    [(None, "fraction"), (0.3, "fraction"), (0.95, "fraction"), (1.0, "fraction"), (1, "absolute"), (3, "absolute")]
)


@pytest.mark.long
@pytest.mark.parametrize("trained", [True, False])
@settings(max_examples=300, deadline=None)
@given(data=st.data(), drop_fraction=FRACTIONS, ablation=ABLATIONS, min_neurons=st.sampled_from([None, 1, 2, 4]))
def test_srigl_equals_the_literal_reading(
    trained: bool,
    data: st.DataObject,
    drop_fraction: float,
    ablation: tuple[float | None, Any],
    min_neurons: int | None,
) -> None:
    case = data.draw(cases(trained=trained))
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
        groups=case.groups,
    )
    weight, grad, mask = case.lists()
    assert new.int().tolist() == literal.srigl(
        case.members,
        weight,
        grad,
        mask,
        budget=case.budget,
        drop_fraction=drop_fraction,
        threshold=threshold,
        min_neurons=min_neurons,
        frozen=case.frozen.tolist(),
    )
    assert_shared(new, case)
    if case.budget == rows * fan_in:
        return
    counts = new.sum(dim=1)
    active = int((counts > 0).sum())
    assert set(counts.tolist()) <= {0, min(fan_in, case.budget // max(1, active))}
    assert int(new.sum()) <= case.budget
    assert not new[case.frozen].any()
    if gamma is None:
        assert new[~case.frozen].any(dim=1).all()
    else:
        # Who is ablated does not depend on the groups.
        alone = srigl_update(
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
        assert torch.equal(new.any(dim=1), alone.any(dim=1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    """Sums are taken in float64, and one that overflows even there is the largest number."""
    large = 0.75 * torch.finfo(dtype).max
    weight = torch.tensor([[1.0, 0], [1.0, 0], [0, 1.0], [0, 1.0]], dtype=dtype)
    grad = torch.tensor([[large, large], [0, large], [large, large], [large, 0]], dtype=dtype)
    new = srigl_update(weight, grad, weight != 0, budget=4, drop_fraction=1.0, groups=PAIRS)
    assert new.int().tolist() == [[0, 1], [0, 1], [1, 0], [1, 0]]
