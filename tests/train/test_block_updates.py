"""The update rules for blocks of rows and inputs: worked examples, and a literal reading on random layers.

The oracle is tests/train_support/literal_blocks.py. Values are few multiples of powers of two, so that sums are exact
in any order, and ties and zeros are common.
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
from train_support import literal_blocks as literal

from srigl_fx.errors import StructureError
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

# Blocks of 2 x 2 in 4 x 4. Sums of |w|: 2.0 (top left), 1.5 (bottom left). Sums of |g|: top right .9, bottom right 1.0,
# and .3 and .2 where weights are kept.
W = torch.tensor([[0.9, -0.1, 0, 0], [0.4, 0.6, 0, 0], [0.7, 0, 0, 0], [-0.3, 0.5, 0, 0]])
G = torch.tensor([[0.1, 0.1, 0.9, 0], [0.1, 0, 0, 0], [0, 0.1, 0.2, -0.3], [0.1, 0, 0.4, -0.1]])
BLOCKS = RowGroups(rows=4, size=2, width=2)
KEPT = torch.tensor([[1, 1, 0, 0]] * 4, dtype=torch.bool)


def test_rigl_exchanges_whole_blocks() -> None:
    """Of two blocks that of 1.5 goes, though single weights of the other are smaller, and that of 1.0 grows.

    The largest single gradient, .9, is in another block.
    """
    new = rigl_update(W, G, KEPT, drop_fraction=0.5, groups=BLOCKS)
    assert new.int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    new = rigl_update(W, G, KEPT, drop_fraction=1.0, groups=BLOCKS)
    assert new.int().tolist() == [[0, 0, 1, 1]] * 4
    assert torch.equal(snfs_update(W, G, KEPT, drop_fraction=1.0, groups=BLOCKS), new)
    again = drop_and_grow(W, G, KEPT, budget=8, drop_fraction=1.0, structure="block", groups=BLOCKS)
    assert torch.equal(again, new)


def test_a_block_that_was_dropped_may_grow_again() -> None:
    grad = torch.zeros(4, 4)
    grad[2:, :2] = 1.0
    new = rigl_update(W, grad, KEPT, drop_fraction=0.5, groups=BLOCKS)
    assert torch.equal(new, KEPT)


def test_gmp_by_hand() -> None:
    everything = torch.ones(4, 4, dtype=torch.bool)
    new = gmp_update(W, everything, count=7, structure="block", groups=BLOCKS)  # one block, and 3 weights unused
    assert new.int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    new = gmp_update(W, everything, count=8, structure="block", groups=BLOCKS)
    assert torch.equal(new, KEPT)


def test_the_first_mask_by_hand() -> None:
    """With 3 rows, blocks of one row are ranked among themselves; 8 weights are 5 and 2 of them: one block each."""
    weight = torch.tensor([[0.5, 0, 0.1, 0.1], [0, 0, 0.2, 0.2], [9.0, 0, -4.0, 4.0]])
    draw: dict[str, Any] = {"init": "magnitude", "generator": torch.Generator(), "structure": "block"}
    groups = RowGroups(rows=3, size=2, width=2)
    mask = initial_mask(weight, budget=8, groups=groups, **draw)
    assert mask.int().tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0]]
    with pytest.raises(StructureError, match="a budget of 1 weights gives 3 neurons"):
        initial_mask(weight, budget=1, groups=groups, **draw)


def test_blocks_that_do_not_fit_are_refused() -> None:
    weight, mask = torch.ones(4, 6), torch.ones(4, 6, dtype=torch.bool)
    odd = RowGroups(rows=4, size=2, width=4)
    with pytest.raises(StructureError, match=r"6 inputs are no whole blocks of 4 \(block_width=4\)"):
        rigl_update(weight, weight, mask, drop_fraction=0.5, groups=odd)
    with pytest.raises(StructureError, match="6 inputs are no whole blocks of 4: block_width must divide them"):
        initial_mask(weight, structure="block", budget=12, init="random", generator=torch.Generator(), groups=odd)
    groups = RowGroups(rows=4, size=2, width=2)
    calls: list[Callable[[], Tensor]] = [
        lambda: srigl_update(weight, weight, mask, budget=12, drop_fraction=0.5, groups=groups),
        lambda: gmp_update(weight, mask, count=12, structure="constant_fan_in", groups=groups),
        lambda: gmp_update(weight, mask, count=12, structure="unstructured", groups=groups),
        lambda: initial_mask(
            weight,
            structure="constant_fan_in",
            budget=12,
            init="random",
            generator=torch.Generator(),
            groups=groups,
        ),
    ]
    for call in calls:
        with pytest.raises(StructureError, match=r'\(block_width\) under the structure "block" alone, not under'):
            call()
    mask[3, 5] = False
    named = r"rows 2-3 and inputs 4-5 are one block \(group_size=2, block_width=2\), but only some of its weights"
    with pytest.raises(StructureError, match=named):
        rigl_update(weight, weight, mask, drop_fraction=0.5, groups=groups)
    assert "rows 2-3 and inputs 4-5" in RowGroups(rows=4, size=2, width=2).fault(mask)


@dataclass
class Case:
    """One layer to update."""

    groups: RowGroups
    weight: Tensor
    grad: Tensor
    mask: Tensor
    budget: int
    seed: int

    @property
    def shape(self) -> tuple[int, int]:
        rows, inputs = self.mask.shape
        return rows, inputs

    @property
    def blocks(self) -> list[literal.Block]:
        return literal.blocks_of(*self.shape, self.groups.size, self.groups.width)

    def assert_whole(self, new: Tensor) -> None:
        """Each block is kept whole or not at all."""
        for block in self.blocks:
            assert len({bool(new[i, j]) for i, j in block}) == 1


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Layers of up to 9 rows and 3 blocks a row, with any mask of whole blocks."""
    size, width = draw(st.sampled_from([1, 2, 4, 8])), draw(st.sampled_from([1, 2, 4]))
    rows, inputs = draw(st.integers(1, 9)), width * draw(st.integers(1, 3))
    groups = RowGroups(rows=rows, size=size, width=width)
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(len(groups), inputs // width, generator=generator) < draw(st.sampled_from([0.0, 0.4, 0.8, 1.0]))
    mask = groups.expand(kept)

    def values(special: bool) -> Tensor:
        found = torch.randint(-4, 5, (rows, inputs), generator=generator) / 4
        if special:
            odd = draw(st.sampled_from([math.inf, -math.inf, math.nan]))
            found[torch.rand(rows, inputs, generator=generator) < 0.15] = odd
        return found

    weight = values(draw(st.booleans())).masked_fill(~mask, 0.0)
    budget = draw(st.integers(1, rows * inputs))
    return Case(groups, weight, values(draw(st.booleans())), mask, budget, seed)


@pytest.mark.long
@settings(max_examples=200, deadline=None)
@given(cases(), FRACTIONS)
def test_rigl_and_snfs_equal_the_literal_reading(case: Case, drop_fraction: float) -> None:
    lists = case.weight.tolist(), case.grad.tolist(), case.mask.tolist()
    expected = literal.rigl(case.blocks, *lists, drop_fraction=drop_fraction)
    for rule in (rigl_update, snfs_update):
        new = rule(case.weight, case.grad, case.mask, drop_fraction=drop_fraction, groups=case.groups)
        assert new.int().tolist() == expected
        case.assert_whole(new)
        assert int(new.sum()) == int(case.mask.sum())


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(cases(), FRACTIONS)
def test_set_equals_the_literal_reading(case: Case, drop_fraction: float) -> None:
    scores = random_scores(case.mask.shape, torch.Generator().manual_seed(case.seed))
    generator = torch.Generator().manual_seed(case.seed)
    new = set_update(case.weight, case.mask, drop_fraction=drop_fraction, generator=generator, groups=case.groups)
    lists = case.weight.tolist(), scores.tolist(), case.mask.tolist()
    assert new.int().tolist() == literal.rigl(case.blocks, *lists, drop_fraction=drop_fraction)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(cases())
def test_gmp_equals_the_literal_reading(case: Case) -> None:
    new = gmp_update(case.weight, case.mask, count=case.budget, structure="block", groups=case.groups)
    expected = literal.gmp(case.blocks, case.weight.tolist(), case.mask.tolist(), count=case.budget)
    assert new.int().tolist() == expected
    assert not (new & ~case.mask).any()
    assert int(new.sum()) <= case.budget


@pytest.mark.long
@settings(max_examples=200, deadline=None)
@given(cases(), st.sampled_from(["magnitude", "random"]))
def test_first_masks_equal_the_literal_reading(case: Case, init: Any) -> None:
    weight = case.grad.nan_to_num(nan=0.0, posinf=2.0, neginf=2.0)
    options: dict[str, Any] = {"structure": "block", "budget": case.budget, "init": init, "groups": case.groups}
    generator = torch.Generator().manual_seed(case.seed)
    if not any(inputs for _, inputs in case.groups.shares(case.budget)):
        with pytest.raises(StructureError, match="a fan-in of 0"):
            initial_mask(weight, generator=generator, **options)
        return
    new = initial_mask(weight, generator=generator, **options)
    if init == "random":
        shape = len(case.groups), case.shape[1] // case.groups.width
        scores = random_scores(shape, torch.Generator().manual_seed(case.seed)).flatten().tolist()
    else:
        scores = [sum(abs(weight[i, j].item()) for i, j in block) for block in case.blocks]
    assert new.int().tolist() == literal.initial(case.blocks, scores, case.shape, budget=case.budget)
    case.assert_whole(new)
    assert 0 < int(new.sum()) <= case.budget
