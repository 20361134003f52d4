"""What a layer was given, as the sums that least squares need: never the inputs themselves.

Owns mean and covariance of rows that come in parts. It must not know where the rows come from.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Moments:
    """Mean (F,) and covariance (F, F) of rows (N, F) that are added part by part.

    Products are computed in the type of the rows, or float32 if that has 16 bits, and added up in float64. What is
    added up is the distance from the mean of the first part, so that a large mean costs no digits.

    Example:
        >>> moments = Moments()
        >>> for part in torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 4.0]]).split(2):
        ...     moments.add(part)
        >>> moments.mean.tolist(), moments.covariance.diagonal().tolist()
        ([2.0, 2.0], [2.6666666666666665, 2.0])
    """

    count: int = 0
    _shift: Tensor = field(default_factory=lambda: torch.zeros(()))
    _total: Tensor = field(default_factory=lambda: torch.zeros(()))
    _squares: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, rows: Tensor) -> None:
        """Take more rows (N, F) in, on any device; none change nothing."""
        if not len(rows):
            return
        rows = rows.float() if rows.element_size() < 4 else rows
        if not self.count:
            self._shift = rows.mean(dim=0)
            self._total = rows.new_zeros(rows.shape[1], dtype=torch.float64)
            self._squares = rows.new_zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
        rows = rows - self._shift
        self.count += len(rows)
        self._total += rows.sum(dim=0, dtype=torch.float64)
        self._squares += rows.T @ rows

    @property
    def mean(self) -> Tensor:
        """Float64 (F,)."""
        return self._shift.double() + self._total / self.count

    @property
    def covariance(self) -> Tensor:
        """Float64 (F, F), divided by the number of rows."""
        offset = self._total / self.count
        return self._squares / self.count - torch.outer(offset, offset)

    @property
    def finite(self) -> bool:
        """Whether all numbers so far were finite."""
        return bool(self._squares.isfinite().all())


def pooled(moments: Sequence[Moments]) -> tuple[int, Tensor, Tensor]:
    """How many rows all of these have together, and the mean and covariance of these rows.

    Example:
        >>> parts = [Moments(), Moments()]
        >>> parts[0].add(torch.tensor([[0.0], [2.0]])), parts[1].add(torch.tensor([[4.0]]))
        (None, None)
        >>> count, mean, covariance = pooled(parts)
        >>> count, mean.item(), round(covariance.item(), 6)
        (3, 2.0, 2.666667)
    """
    if len(moments) == 1:
        return moments[0].count, moments[0].mean, moments[0].covariance
    count = sum(one.count for one in moments)
    shares = [one.count / count for one in moments]
    mean = torch.stack([share * one.mean for share, one in zip(shares, moments, strict=True)]).sum(dim=0)
    covariance = torch.zeros_like(moments[0].covariance)
    for share, one in zip(shares, moments, strict=True):
        offset = one.mean - mean
        covariance += share * (one.covariance + torch.outer(offset, offset))
    return count, mean, covariance
