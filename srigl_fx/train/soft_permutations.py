"""Matrices that are to become permutations: how far they are from one, how they stay near one, and which one it is.

Owns the rules of PA-DST as pure functions of one matrix. It must not know layers, optimizers or when anything happens.
"""

import math

import numpy as np
import torch
from torch import Tensor


def penalty(matrix: Tensor) -> Tensor:
    """The sum over rows and columns of their L1 norm less their L2 norm.

    Of a matrix whose rows and columns sum to 1 it is zero exactly if the matrix is a permutation.

    Args:
        matrix: (d, d), floating.

    Returns:
        A number, through which gradients flow.

    Source: the penalty of AutoShuffleNet (Lyu et al., 2019), as PA-DST (arXiv 2510.14812) uses it.

    Example:
        >>> penalty(torch.eye(3)), penalty(torch.full((4, 4), 0.25))
        (tensor(0.), tensor(4.))
    """
    total = torch.zeros((), dtype=matrix.dtype, device=matrix.device)
    for dim in (0, 1):
        total = total + (matrix.abs().sum(dim) - torch.linalg.vector_norm(matrix, dim=dim)).sum()
    return total


def normalised_penalty(matrix: Tensor) -> float:
    """The penalty as a share of what the matrix has whose entries are all 1 / d: 1 there, 0 of a permutation.

    Args:
        matrix: (d, d), floating, d at least 2.

    Example:
        >>> normalised_penalty(torch.full((4, 4), 0.25)), normalised_penalty(torch.eye(4))
        (1.0, 0.0)
    """
    size = matrix.shape[0]
    return float(penalty(matrix.detach())) / (2 * size * (1 - 1 / math.sqrt(size)))


def normalise(matrix: Tensor) -> Tensor:
    """The matrix without negative entries, its columns divided by their sums, then its rows by theirs.

    One pass, as after each optimizer step; where a sum is zero nothing is divided.

    Args:
        matrix: (d, d), floating.

    Source: PA-DST (arXiv 2510.14812), section 3, after Sinkhorn and Knopp (1967).

    Example:
        >>> normalise(torch.tensor([[1.0, 1.0], [-2.0, 3.0]]))
        tensor([[0.8000, 0.2000],
                [0.0000, 1.0000]])
    """
    matrix = matrix.clamp(min=0)
    for dim in (0, 1):
        sums = matrix.sum(dim, keepdim=True)
        matrix = matrix / torch.where(sums == 0, 1.0, sums)
    return matrix


def assignment(matrix: Tensor) -> Tensor:
    """The permutation with the largest sum of entries: row j gets column ``order[j]``, and no column two rows.

    The largest entry of each row may lie in one column several times, and then is no permutation.

    Args:
        matrix: (d, d), floating and finite.

    Returns:
        (d,) int64, on the matrix's device; of equally good ones always the same.

    Source: the method of shortest augmenting paths (Kuhn 1955; Jonker and Volgenant 1987).

    Example:
        >>> assignment(torch.tensor([[0.9, 0.8, 0.0], [0.9, 0.1, 0.0], [0.0, 0.0, 0.1]])).tolist()
        [1, 0, 2]
    """
    cost = -matrix.detach().cpu().double().numpy()
    size = cost.shape[0]
    # Prices of rows and columns: what an entry costs beyond them is never negative, and zero on what is assigned.
    rows, columns = np.zeros(size), np.zeros(size + 1)
    row_of = np.full(size + 1, -1)  # the row that has each column; the last column stands for the row to be placed
    for row in range(size):
        row_of[size], column = row, size
        distance, before = np.full(size, np.inf), np.full(size, size)
        reached = np.zeros(size + 1, dtype=bool)
        while row_of[column] >= 0:
            reached[column] = True
            here = row_of[column]
            further = cost[here] - rows[here] - columns[:size]
            nearer = ~reached[:size] & (further < distance)
            distance[nearer], before[nearer] = further[nearer], column
            nearest = int(np.where(reached[:size], np.inf, distance).argmin())
            step = distance[nearest]
            rows[row_of[reached]] += step
            columns[reached] -= step
            distance[~reached[:size]] -= step
            column = nearest
        while column != size:  # along the shortest path, each row moves on to the next column
            row_of[column] = row_of[before[column]]
            column = before[column]
    order = np.empty(size, dtype=np.int64)
    order[row_of[:size]] = np.arange(size)
    return torch.from_numpy(order).to(matrix.device)
