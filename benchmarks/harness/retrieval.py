"""How good the vectors of an encoder are for finding one text by another, and how alike two encoders' vectors are.

Owns the measures, as functions of similarities: of N queries (rows) with N answers (columns), of which each query's
own has its index. It must not know how the vectors came about.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

SCALE = 20.0  # of cosines as logits, as sentence encoders are trained (Sentence-BERT's ranking loss)


def similarities(queries: Tensor, answers: Tensor) -> Tensor:
    """The cosines (N, N) of vectors (N, D) of length one."""
    return queries @ answers.T


def hits(found: Tensor) -> Tensor:
    """Whether each query's own answer is the most similar one: (N,) bool.

    Example:
        >>> hits(torch.tensor([[0.9, 0.1], [0.8, 0.3]]))
        tensor([ True, False])
    """
    return found.argmax(dim=1) == torch.arange(len(found))


def bits(found: Tensor) -> Tensor:
    """How many bits each query's own answer is away from certainty: the cross-entropy of a choice among all, (N,).

    Example:
        >>> bits(torch.zeros(2, 2))
        tensor([1., 1.])
    """
    own = torch.arange(len(found))
    return functional.cross_entropy(SCALE * found, own, reduction="none") / math.log(2)


def common(one: Tensor, other: Tensor, count: int) -> float:
    """The share of each query's ``count`` most similar answers that two encoders agree on, in the mean.

    Example:
        >>> common(torch.tensor([[0.9, 0.5, 0.1]]), torch.tensor([[0.9, 0.1, 0.5]]), 2)
        0.5
    """
    best = [found.topk(count, dim=1).indices for found in (one, other)]
    return float((best[0].unsqueeze(2) == best[1].unsqueeze(1)).sum() / best[0].numel())


def rank_correlation(one: Tensor, other: Tensor) -> float:
    """Spearman's correlation of all similarities; equal ones have the mean of their ranks.

    Example:
        >>> round(rank_correlation(torch.tensor([[0.1, 0.2, 0.9]]), torch.tensor([[0.3, 0.4, 0.5]])), 6)
        1.0
    """
    from scipy.stats import spearmanr

    return float(spearmanr(one.flatten().numpy(), other.flatten().numpy()).statistic)


def cosines(one: Tensor, other: Tensor) -> Tensor:
    """Of the vectors (N, D) of two encoders for the same texts: (N,)."""
    return functional.cosine_similarity(one, other, dim=1)
