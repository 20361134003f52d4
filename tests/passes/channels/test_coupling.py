"""Classes of channels: coupling, and the arrays that are left when some go."""

import networkx as nx
import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from srigl_fx.passes.channels.coupling import FIXED, Channels, compress, distinct, kept_shape, surplus


@given(st.integers(1, 40), st.lists(st.tuples(st.integers(0, 39), st.integers(0, 39)), max_size=60))
@settings(deadline=None, max_examples=50)
def test_groups_are_the_connected_components(count: int, edges: list[tuple[int, int]]) -> None:
    edges = [(a % count, b % count) for a, b in edges]
    channels = Channels()
    labels = torch.cat([channels.fresh(len(part), "axis") for part in torch.arange(count).tensor_split(3)])
    for a, b in edges:
        channels.couple(labels[a : a + 1], labels[b : b + 1])
    groups = channels.resolve()
    plain: nx.Graph[int] = nx.Graph(edges)
    plain.add_nodes_from(range(count))
    number = groups.of(labels).tolist()
    for component in nx.connected_components(plain):
        assert len({number[i] for i in component}) == 1
    assert len(set(number)) == nx.number_connected_components(plain)


def test_coupling_broadcasts() -> None:
    channels = Channels()
    one, other = channels.fresh(3, "one").reshape(1, 3), channels.fresh(6, "other").reshape(2, 3)
    channels.couple(one, other)
    number = channels.resolve().of(other)
    assert torch.equal(number[0], number[1])
    assert len(set(number[0].tolist())) == 3


def test_a_long_chain_is_one_group() -> None:
    channels = Channels()
    labels = channels.fresh(5000, "chain")
    channels.couple(labels[:-1], labels[1:])
    assert len(distinct(channels.resolve().of(labels))) == 1


def test_pins_reach_the_whole_group_with_the_first_reason() -> None:
    channels = Channels()
    one, other = channels.fresh(3, "one"), channels.fresh(3, "other")
    channels.couple(one, other)
    channels.pin(other[1:2], "first")
    channels.pin(one[1:], "second")
    groups = channels.resolve()
    assert groups.pinned[groups.of(one)].tolist() == [False, True, True]
    assert [groups.reason[int(number)] for number in groups.of(one)[1:]] == ["first", "second"]
    assert bool(groups.pinned[groups.number[FIXED]])


def test_merging_couples_along_axes() -> None:
    channels = Channels()
    labels = channels.fresh(6, "heads").reshape(1, 2, 1, 3)
    merged = channels.merge(labels, [3])
    assert merged.shape == (1, 2, 1, 1)
    number = channels.resolve().of(labels)[0, :, 0]
    assert [len(distinct(row)) for row in number] == [1, 1]
    assert number[0, 0] != number[1, 0]


def test_compressing_drops_what_does_not_vary() -> None:
    labels = torch.arange(3)[None, :, None].expand(4, 3, 5)
    assert compress(labels).shape == (1, 3, 1)
    assert compress(labels.contiguous()).shape == (1, 3, 1)
    assert compress(torch.tensor([[0, 1], [1, 0]])).shape == (2, 2)


KEPT = arrays(np.bool_, st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)))


def nested_shape(kept: torch.Tensor) -> list[int] | None:
    """By recursion: what is left of each index along the first axis must have one shape."""
    if kept.dim() == 0:
        return []
    inner = [nested_shape(row) for row in kept if bool(row.any())]
    if not inner or any(shape is None or shape != inner[0] for shape in inner):
        return None
    return [len(inner), *(inner[0] or [])]


@given(KEPT)
@settings(deadline=None, max_examples=200)
def test_what_is_left_is_an_array_or_it_is_not(array: NDArray[np.bool_]) -> None:
    kept = torch.from_numpy(array)
    assert kept_shape(kept) == nested_shape(kept)


@given(KEPT)
@settings(deadline=None, max_examples=200)
def test_taking_back_ends_in_an_array(array: NDArray[np.bool_]) -> None:
    kept = torch.from_numpy(array)
    if not bool(kept.any()):
        return
    for _ in range(kept.numel() + 1):
        back = surplus(kept)
        assert not bool((back & kept).any())
        if kept_shape(kept) is not None:
            assert not bool(back.any())
            return
        assert bool(back.any())
        kept = kept | back
    raise AssertionError("no end")
