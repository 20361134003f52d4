"""Rows in an order in which similar ones are neighbours."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from srigl_fx.masks import similar_rows
from srigl_fx.masks.row_groups import RowGroups
from srigl_fx.masks.similar_rows import similar_order


def kept(weight: Tensor, size: int, density: float) -> float:
    """The sum of magnitudes that groups of neighbours keep."""
    sums = RowGroups(rows=len(weight), size=size).sum(weight.abs())
    return float(sums.topk(max(1, round(density * weight.shape[1])), dim=1).values.sum())


def families(count: int, size: int, inputs: int = 64) -> tuple[Tensor, Tensor]:
    """Rows of a few kinds, in order and shuffled: those of one kind weigh the same inputs."""
    generator = torch.Generator().manual_seed(count)
    kinds = (torch.rand(count, inputs, generator=generator) < 0.2).repeat_interleave(size, 0)
    weight = torch.randn(kinds.shape, generator=generator) * (0.05 + kinds)
    return weight, weight[torch.randperm(len(weight), generator=generator)]


@pytest.mark.parametrize("size", [2, 4, 8])
def test_rows_of_a_kind_come_together(size: int) -> None:
    best, weight = families(12, size)
    order = similar_order([weight], size=size, density=0.2)
    assert kept(weight, size, 0.2) < 0.9 * kept(best, size, 0.2)
    assert kept(weight[order], size, 0.2) > 0.95 * kept(best, size, 0.2)
    # A second weight of the same rows has a say: here, all of it.
    other = torch.zeros(len(weight), 3)
    assert torch.equal(similar_order([other, weight], size=size, density=0.2), order)


def test_by_hand() -> None:
    """The most that two rows keep of one another: .9 + .8 for rows 0 and 3; 1 and 4, and 2 is left."""
    weight = torch.tensor([[0.9, 0, 0], [0, 0.5, 0], [0, 0, 0.1], [-0.8, 0, 0], [0, 0.4, 0]])
    assert similar_order([weight], size=2, density=1 / 3).tolist() == [0, 3, 1, 4, 2]
    # In fours, the two pairs are one group.
    assert similar_order([weight], size=4, density=1 / 3).tolist() == [0, 3, 1, 4, 2]
    assert similar_order([weight[:1]], size=4, density=1 / 3).tolist() == [0]
    assert sorted(similar_order([weight[:3]], size=4, density=1 / 3).tolist()) == [0, 1, 2]


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 40), st.sampled_from([2, 4, 8, 16, 32]), st.integers(0, 99), st.booleans())
def test_each_row_has_one_place(rows: int, size: int, seed: int, in_parts: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-2, 3, (rows, 6), generator=generator).float()
    with pytest.MonkeyPatch.context() as patch:
        if in_parts:
            patch.setattr(similar_rows, "_LARGEST", 5)
        order = similar_order([weight], size=size, density=0.5)
        assert sorted(order.tolist()) == list(range(rows))
        assert torch.equal(order, similar_order([weight.clone()], size=size, density=0.5))
