"""Rows of unequal lengths: the places they take, and groups of them."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from srigl_fx.runtime.row_lengths import groups_by_length, places


def padded(counts: NDArray[Any], groups: list[NDArray[Any]]) -> int:
    return sum(int(rows.sum() * counts[rows].max()) for rows in groups)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([], 0),
        ([0, 0], 0),
        ([5] * 16, 80),
        ([5] * 15 + [9], 144),
        ([5] * 16 + [9], 89),
        ([0] * 7 + [5] * 16 + [0, 9], 89),  # rows that keep nothing are no neighbours
        ([1, 2] * 20, 80),
    ],
)
def test_places_of_neighbours_are_as_many_as_the_longest_has(counts: list[int], expected: int) -> None:
    assert places(np.array(counts, int)) == expected


@pytest.mark.parametrize(
    ("counts", "groups"),
    [
        ([3, 3, 0, 3], [[0, 1, 3]]),
        ([0, 0], []),
        ([], []),
        ([2, 9, 2, 9, 2], [[0, 2, 4], [1, 3]]),
        ([20, 19, 20, 19], [[0, 1, 2, 3]]),  # a group more would save 2 of 80
        ([1, 10, 100, 1000], [[0, 1], [2], [3]]),  # 1,120 places, of which one more group would save 9
        ([16, 64, 4, 4, 4, 4, *[1] * 20, 16], [[*range(6, 26)], [2, 3, 4, 5], [0, 26], [1]]),
        ([1, 1, 10, 100, 1000, 10000], [[0, 1, 2, 3], [4], [5]]),  # to cut once more saves little of 11,400
    ],
)
def test_groups_of_like_length(counts: list[int], groups: list[list[int]]) -> None:
    assert [np.flatnonzero(rows).tolist() for rows in groups_by_length(np.array(counts, int))] == groups


@given(st.lists(st.integers(0, 12), max_size=12), st.integers(1, 4))
def test_no_cut_into_as_many_groups_takes_fewer_places(counts: list[int], most: int) -> None:
    """Against all cuts of the sorted rows; and one group more, where there may be one, saves less than a tenth."""
    array = np.array(counts, int)
    found = groups_by_length(array, most)
    kept = np.sort(array[array > 0])
    assert np.array_equal(np.sum(found, axis=0) if found else np.zeros(len(array), int), (array > 0).astype(int))

    def least(count: int) -> int:
        cuts = itertools.combinations(range(1, kept.size), count - 1)
        return min(
            (sum((b - a) * int(kept[b - 1]) for a, b in itertools.pairwise([0, *cut, kept.size])) for cut in cuts),
            default=10**9,
        )

    if not kept.size:
        assert not found
        return
    assert padded(array, found) == least(len(found))
    assert len(found) == most or 10 * least(len(found) + 1) > 9 * padded(array, found)
    assert all(10 * least(i + 1) <= 9 * least(i) for i in range(1, len(found)))


def test_many_lengths_are_cut_nearly_as_well() -> None:
    """Not every length is tried as the end of a group."""
    counts = np.random.default_rng(0).lognormal(4, 1, 4000).astype(int).clip(1, 3000)
    groups = groups_by_length(counts)
    assert len(groups) == 4
    assert np.array_equal(np.sum(groups, axis=0), np.ones(4000, int))
    assert all(counts[a].max() < counts[b].min() for a, b in itertools.pairwise(groups))
    assert padded(counts, groups) < 0.25 * counts.size * counts.max()
