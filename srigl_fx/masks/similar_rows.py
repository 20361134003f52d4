"""An order of rows in which those that can share their inputs are neighbours.

Owns the pairing of rows by the magnitudes of their weights. Works on (n, F) matrices; it must not know whose they are,
or whether their rows may change places.
"""

import heapq
from collections.abc import Sequence

import torch
from torch import Tensor

_LARGEST = 4096  # units that are compared with one another at a time: a table of their pairs has to fit into memory


@torch.no_grad()
def similar_order(weights: Sequence[Tensor], *, size: int, density: float) -> Tensor:
    """An order of n rows in which groups of ``size`` neighbours keep more of their weights' magnitude.

    Rows are joined in pairs, pairs in fours, and so on, up to groups of ``size``. With A[u, j] the sum of |w[i, j]|
    over the rows i of unit u, and B[u, j] = 1 where that is among the k = round(density * F) largest of the unit::

        S[u, v] = sum over j of B[u, j] A[v, j] + A[u, j] B[v, j]

    is what each of two units keeps of the inputs that the other one would choose. Of all pairs that are left, the one
    of the largest S is joined, until at most one unit is alone, which has no part in the joins that follow. What is
    left over at the end, n mod ``size`` rows, comes last.

    Args:
        weights: One or several matrices (n, F) of the same rows, whose S are added up: a neuron may have several.
        size: Rows of a group, a power of two.
        density: The share of its inputs that a row will keep, in (0, 1].

    Returns:
        int64 (n,): which row comes first, second and so on. On the CPU.

    Example:
        >>> weight = torch.tensor([[9.0, 0, 1, 0], [0, 8, 0, 1], [7, 1, 0, 0], [1, 9, 0, 0]])
        >>> similar_order([weight], size=2, density=0.25).tolist()
        [1, 3, 0, 2]
    """
    sums = [weight.detach().abs().nan_to_num().double().cpu() for weight in weights]
    units = [[row] for row in range(len(sums[0]))]
    over: list[list[int]] = []
    width = 1
    while width < size and len(units) > 1:
        pairs, alone = _joined(sums, density)
        over[:0] = [units[unit] for unit in alone]
        sums = [torch.stack([one[a] + one[b] for a, b in pairs]) for one in sums]
        units = [units[a] + units[b] for a, b in pairs]
        width *= 2
    full = units if width >= size else []
    rest = ([] if width >= size else units) + over
    return torch.tensor([row for unit in full + rest for row in unit])


def _joined(sums: Sequence[Tensor], density: float) -> tuple[list[tuple[int, int]], list[int]]:
    """The pairs of units, and the units that are alone."""
    count, pairs, alone = len(sums[0]), list[tuple[int, int]](), list[int]()
    for start in range(0, count, _LARGEST):
        part = [one[start : start + _LARGEST] for one in sums]
        table = torch.zeros(len(part[0]), len(part[0]), dtype=torch.float64)
        for one in part:
            chosen = torch.zeros_like(one)
            kept = max(1, round(density * one.shape[1]))
            chosen.scatter_(1, one.sort(dim=1, descending=True, stable=True).indices[:, :kept], 1.0)
            product = chosen @ one.T
            table += product + product.T
        found, left = _matched(table)
        pairs += [(a + start, b + start) for a, b in found]
        alone += [unit + start for unit in left]
    while len(alone) > 1:  # of parts with an odd number of units each
        pairs.append((alone.pop(0), alone.pop(0)))
    return pairs, alone


def _matched(table: Tensor) -> tuple[list[tuple[int, int]], list[int]]:
    """Units in pairs, those with the highest entries of a symmetric table first; and the one that is left, if any."""
    table.fill_diagonal_(-torch.inf)
    free = torch.ones(len(table), dtype=torch.bool)
    best = table.max(dim=1)
    queue = [(-value, unit, other) for unit, (value, other) in enumerate(zip(*map(Tensor.tolist, best), strict=True))]
    heapq.heapify(queue)
    pairs: list[tuple[int, int]] = []
    while queue and len(pairs) < len(table) // 2:
        _, unit, other = heapq.heappop(queue)
        if not free[unit]:
            continue
        if not free[other]:  # its best partner is gone: the best of those that are left comes later in the queue
            value, index = table[unit].masked_fill(~free, -torch.inf).max(dim=0)
            heapq.heappush(queue, (-float(value), unit, int(index)))
            continue
        free[unit] = free[other] = False
        pairs.append((min(unit, other), max(unit, other)))
    return pairs, free.nonzero()[:, 0].tolist()
