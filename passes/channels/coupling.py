"""Labels of channels, and which of them must be removed together.

Elements with the same label are removed together or stay together. Owns :class:`Channels`: the labels, a networkx graph
over the axes that they belong to, and the union of the index maps along its edges; and what arrays are left when some
labels go. It must not know operators, weights or masks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import networkx as nx
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FIXED = 0
"""The label of everything that is never removed: inputs, batch, tokens."""


@dataclass(frozen=True)
class Groups:
    """The coupling groups of all labels.

    Attributes:
        number: (labels,) int64, the group of each label, 0 to ``count - 1``; the fixed label is in group 0.
        pinned: (count,) bool, which groups must stay.
        reason: Why, by group.
        count: How many groups there are.
    """

    number: Tensor
    pinned: Tensor
    reason: dict[int, str]
    count: int

    def of(self, labels: Tensor) -> Tensor:
        """The group of every element of ``labels``."""
        return self.number[labels]


class Channels:
    """The labels of a graph, and what couples them. Elements of one label are removed together or stay together.

    Example:
        >>> channels = Channels()
        >>> rows, others = channels.fresh(2, "rows"), channels.fresh(2, "others")
        >>> channels.couple(rows, others.flip(0))
        >>> groups = channels.resolve()
        >>> groups.of(rows).tolist() == groups.of(others).tolist()[::-1]
        True
    """

    def __init__(self) -> None:
        self._starts = [0]
        self._next = 1
        self._axes: nx.Graph[int] = nx.Graph()
        self._axes.add_node(0, name="fixed")
        self._maps: dict[int, list[NDArray[np.int64]]] = {}
        self._pins: list[tuple[Tensor, str]] = [
            (torch.tensor([FIXED]), "it is coupled with an input or another fixed axis")
        ]

    def fresh(self, count: int, axis: str) -> Tensor:
        """``count`` new labels, for an axis of that name."""
        self._axes.add_node(len(self._starts), name=axis)
        self._starts.append(self._next)
        labels = torch.arange(self._next, self._next + count)
        self._next += count
        return labels

    def couple(self, one: Tensor, other: Tensor) -> None:
        """Classes at the same place of two arrays, broadcast, go together."""
        if one is other:
            return
        # Each pair once, as one number: axes are large, and most are coupled with themselves or many times.
        a, b = (array.reshape(-1) for array in np.broadcast_arrays(one.numpy(), other.numpy()))
        different = a != b
        if not different.any():
            return
        a, b = a[different], b[different]
        pairs = np.unique(np.minimum(a, b) * np.int64(1 << 31) + np.maximum(a, b))
        edges = np.stack([pairs >> 31, pairs & ((1 << 31) - 1)])
        # An edge between axes says that some of their labels are coupled, a map which ones.
        blocks = np.searchsorted(self._starts, edges, side="right") - 1
        for i, j in np.unique(blocks, axis=1).T.tolist():
            self._axes.add_edge(i, j)
            self._maps.setdefault(i, []).append(edges[:, (blocks[0] == i) & (blocks[1] == j)])

    def merge(self, labels: Tensor, axes: Sequence[int]) -> Tensor:
        """Couple all labels along ``axes``; the result has size 1 there."""
        first = labels  # of each line along the axes, its first element stands for all
        for axis in axes:
            first = first.narrow(axis, 0, 1)
        if first.numel() != labels.numel():
            self.couple(labels, first.expand(labels.shape))
        return first

    def pin(self, labels: Tensor, reason: str) -> None:
        """No label in ``labels`` may be removed."""
        self._pins.append((distinct(labels), reason))

    def resolve(self) -> Groups:
        """The coupling groups: connected components over the axes, then over the labels of each component."""
        parent = np.arange(self._next)
        for component in nx.connected_components(self._axes):
            maps = [edges for block in component for edges in self._maps.get(block, ())]
            if maps:
                _unite(parent, *np.concatenate(maps, axis=1))
        roots, number = np.unique(parent, return_inverse=True)
        groups = Groups(torch.from_numpy(number), torch.zeros(len(roots), dtype=torch.bool), {}, len(roots))
        for labels, reason in reversed(self._pins):  # so that the first reason is the one that is left
            found = distinct(groups.of(labels))
            groups.pinned[found] = True
            groups.reason.update(dict.fromkeys(found.tolist(), reason))
        return groups


def _unite(parent: NDArray[np.int64], a: NDArray[np.int64], b: NDArray[np.int64]) -> None:
    """Let ``parent`` name the smallest member of each component of the edges ``a`` - ``b``."""
    members = np.unique(np.concatenate([a, b]))
    # In rounds: the parents of both ends of an edge take the smaller one of the two, and so do the ends; then members
    # take their parents' parents, which halves the way to the smallest. It ends when all edges have one parent each.
    while True:
        low = np.minimum(parent[a], parent[b])
        if np.array_equal(low, parent[a]) and np.array_equal(low, parent[b]):
            return
        for end in (a, b):
            np.minimum.at(parent, parent[end], low)
            np.minimum.at(parent, end, low)
        parent[members] = parent[parent[members]]


def distinct(numbers: Tensor) -> Tensor:
    """The different numbers in a tensor, ascending."""
    return torch.from_numpy(np.unique(numbers.numpy()))


def compress(labels: Tensor) -> Tensor:
    """``labels`` with size 1 along every axis on which they do not vary.

    Example:
        >>> compress(torch.tensor([[1, 2], [1, 2]])).tolist()
        [[1, 2]]
    """
    for axis, (size, stride) in enumerate(zip(labels.shape, labels.stride(), strict=True)):
        if size > 1 and (stride == 0 or bool((labels == labels.narrow(axis, 0, 1)).all())):
            labels = labels.narrow(axis, 0, 1)
    return labels.contiguous()


def kept_shape(kept: Tensor) -> list[int] | None:
    """The shape in which the kept elements of an array lie, in order; None where they are no such array.

    Along the first axis whole indices may be missing; each index that is left must keep the same shape.

    Args:
        kept: bool, what stays.

    Example:
        >>> kept_shape(torch.tensor([[True, False], [False, False], [False, True]]))
        [2, 1]
    """
    shape: list[int] = []
    while kept.dim():
        counts = kept.sum(-1)
        sizes = distinct(counts[counts > 0])
        if len(sizes) != 1:
            return None
        shape.insert(0, int(sizes))
        kept = counts > 0
    return shape


def surplus(kept: Tensor) -> Tensor:
    """What must stay after all so that ``kept`` can lie in an array: bool, of its shape.

    Where indices keep unequal numbers of elements, those with fewer take the first missing ones back.

    Example:
        >>> surplus(torch.tensor([[True, True], [False, True]])).tolist()
        [[False, False], [True, False]]
    """
    back = torch.zeros_like(kept)
    for axis in range(kept.dim() - 1, -1, -1):
        # Elements along `axis` are whole blocks: which of them have anything left?
        tail = tuple(range(axis + 1, kept.dim()))
        alive = kept.any(dim=tail) if tail else kept
        counts = alive.sum(-1, keepdim=True)
        most = counts.max()
        missing = torch.where(counts > 0, most - counts, 0)
        if bool((missing > 0).any()):
            order = (~alive).cumsum(-1)
            take = ~alive & (order <= missing)
            back |= take.reshape(take.shape + (1,) * len(tail)) if tail else take
            return back
    return back
