"""Rows that keep unequal numbers of weights: what padding costs, and groups of rows that are about as long.

Owns the arithmetic of lengths; it must not know how long anything takes, nor how groups are computed one by one.
"""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from srigl_fx.runtime.cpu.kernels.plan import LANES

Array = NDArray[Any]
_WORTH_A_GROUP: Final = 0.1  # the share of places that one more group of rows must save
_CANDIDATES: Final = 128  # lengths at which groups may end, at most


def places(counts: Array) -> int:
    """The places that rows take in a panel, where each 16 neighbours have as many as the longest of them.

    Args:
        counts: (n,), the weights that each row keeps; rows that keep none are not stored.

    Example:
        >>> places(np.full(20, 3)), places(np.array([9] + [1] * 19)), places(np.zeros(4, int))
        (60, 148, 0)
    """
    counts = counts[counts > 0]
    return sum(len(part) * int(part.max()) for part in np.split(counts, range(LANES, counts.size, LANES)) if part.size)


def groups_by_length(counts: Array, most: int = 4) -> list[Array]:
    """Which rows belong together, so that few places are needed where each group is padded to its longest row.

    Of all ways to cut the rows, in the order of their lengths, into so many groups it takes one with the fewest places;
    and as many groups as each save a tenth of the places that one fewer needs.

    Args:
        counts: (n,), the weights that each row keeps.
        most: How many groups there may be.

    Returns:
        For each group a bool array (n,), the shortest rows first; rows that keep none are in no group.

    Example:
        >>> [rows.tolist() for rows in groups_by_length(np.array([2, 9, 0, 2, 2]))]
        [[True, False, False, True, True], [False, True, False, False, False]]
        >>> len(groups_by_length(np.full(5, 3))), len(groups_by_length(np.zeros(5, int)))
        (1, 0)
    """
    kept = np.sort(counts[counts > 0])
    if not kept.size:
        return []
    # Every length where there are few, else those of equal shares of the rows.
    lengths = np.unique(kept[np.linspace(0, kept.size - 1, min(kept.size, 8 * _CANDIDATES)).astype(int)])
    if lengths.size > _CANDIDATES:
        lengths = np.unique(lengths[np.linspace(0, lengths.size - 1, _CANDIDATES).astype(int)])
    below = np.concatenate([[0], np.searchsorted(kept, lengths, side="right")])
    # Of a group of the lengths i to j: its rows, each as long as the last.
    steps = ((below[None, 1:] - below[:-1, None]) * lengths[None, :]).astype(np.float64)
    steps[np.tril_indices(lengths.size, -1)] = np.inf
    best, starts = [steps[0]], [np.zeros(lengths.size, int)]
    while len(best) < most:
        before = np.concatenate([[np.inf], best[-1][:-1]])[:, None] + steps
        if not before.min(axis=0)[-1] <= (1 - _WORTH_A_GROUP) * best[-1][-1]:
            break
        starts.append(before.argmin(axis=0))
        best.append(before.min(axis=0))
    limits, last = [], lengths.size - 1
    for start in reversed(starts):
        first = int(start[last])
        limits.append((0 if first == 0 else int(lengths[first - 1]), int(lengths[last])))
        last = first - 1
    return [(counts > low) & (counts <= high) for low, high in reversed(limits)]


def masks_by_length(mask: Array) -> list[Array]:
    """A mask as one for each group of rows of about the same length; together they keep what it keeps.

    Args:
        mask: Bool (n, F).

    Example:
        >>> [part.sum(axis=1).tolist() for part in masks_by_length(np.tri(3, 8, dtype=bool)[[0, 0, 2]])]
        [[1, 1, 0], [0, 0, 3]]
    """
    return [mask & rows[:, None] for rows in groups_by_length(mask.sum(axis=1))]
