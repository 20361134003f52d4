"""Which parameter elements a view holds, against the elements themselves."""

import math
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from srigl_fx.passes.sites.weight_views import WeightView

SHAPES = [(6, 4), (2, 3, 4), (12,), (2, 6, 1, 4)]


def elements(view: WeightView) -> Tensor:
    """The flat index of each element, up to a common offset that a slice adds."""
    index = torch.zeros((), dtype=torch.long)
    for dim in view.dims:
        steps = torch.zeros((1,), dtype=torch.long)
        for factor in dim:
            steps = (steps[:, None] + torch.arange(factor.size) * factor.stride).flatten()
        index = index[..., None] + steps
    return index


def operations(shape: tuple[int, ...]) -> "st.SearchStrategy[tuple[str, tuple[Any, ...]]]":
    rank, dims = len(shape), st.integers(0, len(shape) - 1)
    sizes = [split for split in product(range(1, 7), repeat=3) if math.prod(split) == math.prod(shape)]
    choices: list[st.SearchStrategy[tuple[str, tuple[Any, ...]]]] = [
        st.permutations(range(rank)).map(lambda order: ("permute", tuple(order))),
        dims.map(lambda dim: ("unsqueeze", (dim,))),
        dims.flatmap(lambda dim: st.integers(0, shape[dim] - 1).map(lambda at: ("select", (dim, at)))),
        dims.flatmap(
            lambda dim: st.integers(1, shape[dim]).map(lambda size: ("narrow", (dim, shape[dim] - size, size)))
        ),
        st.just(("flatten", ())),
    ]
    if sizes:
        choices.append(st.sampled_from(sizes).map(lambda split: ("reshape", (split,))))
    return st.one_of(choices)


@pytest.mark.slow
@given(data=st.data())
def test_a_view_holds_the_elements_that_the_operations_leave(data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from(SHAPES))
    parameter = nn.Parameter(torch.zeros(shape))
    real, view = torch.arange(math.prod(shape)).reshape(shape), WeightView.whole(parameter)
    for _ in range(data.draw(st.integers(1, 4))):
        if not real.dim():
            return
        name, args = data.draw(operations(tuple(real.shape)))
        found = view.through(getattr(torch.Tensor, name), *args)
        real = getattr(real, name)(*args)
        if found is None:  # a reshape across a slice has no axes
            return
        assert isinstance(found, WeightView)
        view = found
        assert view.shape == tuple(real.shape)
        assert torch.equal(elements(view), real - real.flatten()[0])


@pytest.mark.parametrize("shape", SHAPES)
def test_chunks_and_repetitions(shape: tuple[int, ...]) -> None:
    view = WeightView.whole(torch.empty(shape))
    parts = view.through(torch.chunk, 2)
    assert [part.shape for part in parts] == [tuple(part.shape) for part in torch.empty(shape).chunk(2)]
    repeated = view.through(torch.Tensor.expand, 5, *shape)
    assert repeated.shape == (5, *shape)
    assert repeated.dims[1:] == view.dims


def test_what_does_not_only_rearrange_is_unknown() -> None:
    view = WeightView.whole(torch.empty(4, 4))
    assert view.through(torch.diagonal) is None
    assert view.through(torch.exp) is None
    assert view.through(torch.reshape, (3, 5)) is None


def test_rows_picked_by_a_tensor_are_selected() -> None:
    view = WeightView.whole(torch.empty(5, 4, 3))
    picked = view.indexed(0, rank=2)
    assert picked is not None
    assert picked.dims == ((), (), *view.dims[1:])
    unknown = view.indexed(0, rank=None)
    assert unknown is not None
    assert unknown.loose
    assert view.indexed(1, rank=1) == view
    assert view.indexed(1, rank=None) is None
