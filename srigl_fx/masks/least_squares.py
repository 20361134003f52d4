"""Kept weights that give most nearly what the dense ones gave, and which weights to keep for that.

Owns the fit of a layer's rows to the covariance of its inputs, its plain reference, and exchanges of kept inputs for
others. Works on (n, F) matrices; it must not know layers, nor how inputs are gathered.

With C for the covariance of the inputs, K for the inputs that a row keeps, w for what the row was and v for what it
becomes, zero off K, the expected squared error of its output is::

    e = (w - v)^T C (w - v), least where v[K] = C[K, K]^-1 (C w)[K]

At that v the gradient g = C (w - v) is zero on K. To leave out a kept input i costs v[i]^2 / (C[K, K]^-1)[i, i], as in
Optimal Brain Surgeon (Hassibi & Stork, 1993); to add j gains at least g[j]^2 / C[j, j]. An exchange takes the cheapest
i for the best j.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from srigl_fx.masks.row_groups import RowGroups

DAMPING = 0.01  # of the mean variance of the inputs, added to each
_CHUNK = 1 << 23  # numbers of all the small systems that are solved together: 64 MiB
_FIRST_SHARE = 0.25  # of the kept inputs, exchanged in the first round


def damped(covariance: Tensor, damping: float = DAMPING) -> Tensor:
    """The covariance (F, F) with a share of the mean variance added to each input's, so that it can be inverted.

    Example:
        >>> damped(torch.tensor([[1.0, 0.0], [0.0, 3.0]]), 0.5).tolist()
        [[2.0, 0.0], [0.0, 4.0]]
    """
    mean = float(covariance.diagonal().mean())
    # Inputs that never change say nothing: all weights are then alike, and the kept ones stay as they are.
    return covariance + (damping * mean or 1.0) * torch.eye(
        len(covariance), dtype=covariance.dtype, device=covariance.device
    )


def least_squares(weight: Tensor, mask: Tensor, covariance: Tensor) -> Tensor:
    """The rows that give most nearly what those of ``weight`` give, from kept weights alone.

    Args:
        weight: (n, F) of any floating-point type.
        mask: (n, F) bool; rows may keep different numbers.
        covariance: Of the inputs, float64 (F, F), positive definite: see :func:`damped`.

    Returns:
        Float64 (n, F), zero off the mask.

    Example:
        >>> covariance = torch.tensor([[1.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
        >>> least_squares(torch.tensor([[1.0, 2.0]]), torch.tensor([[False, True]]), covariance).tolist()
        [[0.0, 2.5]]
    """
    return _solved(weight.double(), mask, covariance, costs=False)[0]


def least_squares_reference(
    weight: NDArray[np.float64], mask: NDArray[np.bool_], covariance: NDArray[np.float64]
) -> NDArray[np.float64]:
    """What :func:`least_squares` computes, row by row.

    Example:
        >>> covariance = np.array([[1.0, 0.5], [0.5, 1.0]])
        >>> least_squares_reference(np.array([[1.0, 2.0]]), np.array([[False, True]]), covariance).tolist()
        [[0.0, 2.5]]
    """
    found = np.zeros(weight.shape)
    for row, kept in enumerate(mask):
        if kept.any():
            found[row, kept] = np.linalg.solve(covariance[np.ix_(kept, kept)], (covariance @ weight[row])[kept])
    return found


def _solved(weight: Tensor, mask: Tensor, covariance: Tensor, *, costs: bool) -> tuple[Tensor, Tensor]:
    """The fitted rows, and for each kept weight what leaving it out would cost (else zero)."""
    wanted = weight @ covariance
    values, losses = torch.zeros_like(wanted), torch.zeros_like(wanted)
    for rows in _chunks(mask):
        kept, valid = _places(mask[rows])
        both = valid.unsqueeze(2) & valid.unsqueeze(1)
        systems = torch.where(both, covariance[kept.unsqueeze(2), kept.unsqueeze(1)], 0.0)
        systems.diagonal(dim1=1, dim2=2).masked_fill_(~valid, 1.0)  # places of shorter rows: solved by zero
        factors = torch.linalg.cholesky(systems)
        right = torch.where(valid, wanted[rows].gather(1, kept), 0.0)
        solved = torch.cholesky_solve(right.unsqueeze(2), factors).squeeze(2)
        # Places that are not valid name the same input as others: they add zero to it.
        values[rows] = values[rows].scatter_add_(1, kept, solved)
        if costs:
            inverse = torch.cholesky_inverse(factors).diagonal(dim1=1, dim2=2)
            losses[rows] = losses[rows].scatter_add_(1, kept, torch.where(valid, solved.square() / inverse, 0.0))
    return values, losses


def _chunks(mask: Tensor) -> Iterator[Tensor]:
    """Rows whose systems are solved together, those of like size together: int64 indices."""
    counts, order = mask.sum(dim=1).sort(descending=True, stable=True)
    start = 0
    while start < len(order):
        size = max(1, int(counts[start]))
        stop = start + max(1, _CHUNK // size**2)
        yield order[start:stop]
        start = stop


def _places(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The kept inputs of each row, padded with 0 to those of the longest, int64 (n, k), and which of them are some."""
    counts = mask.sum(dim=1)
    most = max(1, int(counts.max()))
    kept = mask.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :most]
    valid = torch.arange(most, device=mask.device) < counts[:, None]
    return torch.where(valid, kept, 0), valid


@dataclass(frozen=True)
class Part:
    """Rows of a weight whose inputs have one covariance.

    Attributes:
        start: The first of them.
        stop: The first one behind them.
        covariance: Damped, float64 (F, F).
    """

    start: int
    stop: int
    covariance: Tensor


@dataclass(frozen=True)
class Fit:
    """Fitted rows.

    Attributes:
        mask: Bool (n, F).
        values: Float64 (n, F), zero off the mask.
        errors: The expected squared error of each row's output, float64 (n,), with the damping in it.
    """

    mask: Tensor
    values: Tensor
    errors: Tensor


def fitted(
    weight: Tensor,
    mask: Tensor,
    parts: Sequence[Part],
    blocks: Sequence[tuple[slice, RowGroups]],
    *,
    exchanges: int = 0,
) -> Fit:
    """Fit all rows, and exchange kept inputs for better ones.

    In each round every group of rows gives up the inputs that cost it least for those that gain it most, as long as
    these gain more, up to a quarter of what it keeps, later a share that halves with each round. A group whose error
    does not fall by it stays as it was, so that errors never grow. How many inputs a group keeps does not change.

    Args:
        weight: (n, F).
        mask: Bool (n, F), as the groups have it.
        parts: They cover all rows.
        blocks: Rows, and how they are grouped; they cover all rows.
        exchanges: How many rounds at most.

    Example:
        >>> covariance = torch.eye(3, dtype=torch.float64)
        >>> weight, mask = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[True, False, True]])
        >>> whole = [Part(0, 1, covariance)], [(slice(0, 1), RowGroups(rows=1))]
        >>> fitted(weight, mask, *whole, exchanges=3).values.tolist()
        [[0.0, 2.0, 3.0]]
    """
    weight = weight.double()
    best, losses, gains = _fit(weight, mask, parts, costs=exchanges > 0)
    for number in range(exchanges):
        share = _FIRST_SHARE / 2**number
        mask = torch.cat(
            [exchanged(best.mask[rows], losses[rows], gains[rows], groups, share) for rows, groups in blocks]
        )
        if torch.equal(mask, best.mask):
            continue
        found, costs, hopes = _fit(weight, mask, parts, costs=number + 1 < exchanges)
        better = torch.cat([_improved(best.errors[rows], found.errors[rows], groups) for rows, groups in blocks])
        one = better[:, None]
        best = Fit(
            torch.where(one, found.mask, best.mask),
            torch.where(one, found.values, best.values),
            torch.where(better, found.errors, best.errors),
        )
        losses, gains = torch.where(one, costs, losses), torch.where(one, hopes, gains)
    return best


def _fit(weight: Tensor, mask: Tensor, parts: Sequence[Part], *, costs: bool) -> tuple[Fit, Tensor, Tensor]:
    """Fitted rows, what each kept input would cost, and what each other one would gain."""
    found = []
    for part in parts:
        rows = slice(part.start, part.stop)
        values, losses = _solved(weight[rows], mask[rows], part.covariance, costs=costs)
        missing = weight[rows] - values
        gradient = missing @ part.covariance
        gains = gradient.square() / part.covariance.diagonal()
        found.append((values, losses, gains, (gradient * missing).sum(dim=1)))
    values, losses, gains, errors = (torch.cat(each) for each in zip(*found, strict=True))
    return Fit(mask, values, errors), losses, gains


def exchanged(mask: Tensor, losses: Tensor, gains: Tensor, groups: RowGroups, share: float) -> Tensor:
    """The mask with the cheapest inputs of each group of rows exchanged for the best others, where that pays.

    Args:
        mask: Bool (n, F), as the groups have it.
        losses: What each kept weight would cost, (n, F).
        gains: What each other weight would gain, (n, F).
        groups: Which rows share their inputs.
        share: Of a group's inputs, exchanged at most; but always one.

    Example:
        >>> mask, losses = torch.tensor([[True, True, False, False]]), torch.tensor([[5.0, 1.0, 0.0, 0.0]])
        >>> exchanged(mask, losses, torch.tensor([[0.0, 0.0, 2.0, 3.0]]), RowGroups(rows=1), 0.5).tolist()
        [[True, False, False, True]]
    """
    active = mask.any(dim=1)
    kept = groups.any(mask)
    cost = groups.sum(losses.double()).masked_fill_(~kept, torch.inf)
    gain = groups.sum(torch.where(active[:, None], gains, 0.0).double()).masked_fill_(kept, -torch.inf)
    counts = kept.sum(dim=1)
    most = min(max(1, int(share * int(counts.max()))), kept.shape[1])
    cheap, gone = cost.sort(dim=1, stable=True)
    best, come = gain.sort(dim=1, descending=True, stable=True)
    allowed = torch.arange(most, device=mask.device) < (share * counts).long().clamp(min=1)[:, None]
    pays = allowed & (best[:, :most] > cheap[:, :most])
    changed = kept.clone()
    for places, now in ((gone, False), (come, True)):
        at = places[:, :most]
        changed.scatter_(1, at, torch.where(pays, now, changed.gather(1, at)))
    return groups.expand(changed, active)


def _improved(before: Tensor, after: Tensor, groups: RowGroups) -> Tensor:
    """Whether the error of each row's group has fallen, bool (n,)."""
    index = groups.index.to(before.device)
    change = before.new_zeros(len(groups)).index_add_(0, index, after - before)
    return (change < 0)[index]
