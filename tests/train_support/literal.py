"""The update rules read literally: Python numbers, explicit loops, one step after the other. Slow; the oracle."""

import math
from collections.abc import Iterable

Matrix = list[list[float]]
Mask = list[list[bool]]
Cell = tuple[int, int]


def _cells(mask: Mask) -> list[Cell]:
    return [(i, j) for i in range(len(mask)) for j in range(len(mask[0]))]


def _sizes(weight: Matrix) -> dict[Cell, float]:
    """|w|; a NaN counts as 0."""
    return {
        (i, j): 0.0 if math.isnan(value) else abs(value) for i, row in enumerate(weight) for j, value in enumerate(row)
    }


def _slopes(grad: Matrix) -> dict[Cell, float]:
    """|g|; what is not finite counts as 0."""
    return {
        (i, j): abs(value) if math.isfinite(value) else 0.0 for i, row in enumerate(grad) for j, value in enumerate(row)
    }


def _largest(cells: Iterable[Cell], score: dict[Cell, float], count: int) -> list[Cell]:
    """The ``count`` cells of the highest score; ties to the lowest index."""
    return sorted(cells, key=lambda cell: (-score[cell], cell))[:count]


def _as_mask(chosen: Iterable[Cell], mask: Mask) -> list[list[int]]:
    new = [[0] * len(mask[0]) for _ in mask]
    for i, j in chosen:
        new[i][j] = 1
    return new


def rigl(weight: Matrix, growth: Matrix, mask: Mask, *, drop_fraction: float) -> list[list[int]]:
    """Drop the smallest of the layer, grow as many anywhere: RigL; SET with random scores, SNFS with momentum."""
    cells = _cells(mask)
    on = [cell for cell in cells if mask[cell[0]][cell[1]]]
    kept = _largest(on, _sizes(weight), len(on) - int(len(on) * drop_fraction))
    rest = [cell for cell in cells if cell not in set(kept)]
    return _as_mask(kept + _largest(rest, _slopes(growth), len(on) - len(kept)), mask)


def gmp(weight: Matrix, mask: Mask, *, count: int, per_row: bool) -> list[list[int]]:
    """Keep the largest active weights, of the layer or of each row."""
    on = [cell for cell in _cells(mask) if mask[cell[0]][cell[1]]]
    size = _sizes(weight)
    if not per_row:
        return _as_mask(_largest(on, size, count), mask)
    kept: list[Cell] = []
    for i in range(len(mask)):
        kept += _largest([cell for cell in on if cell[0] == i], size, count // len(mask))
    return _as_mask(kept, mask)


def srigl(
    weight: Matrix,
    grad: Matrix,
    mask: Mask,
    *,
    budget: int,
    drop_fraction: float,
    threshold: int = 0,
    min_neurons: int | None = None,
    frozen: list[bool] | None = None,
) -> list[list[int]]:
    """Drop the smallest of the layer, ablate, grow in each row; without a threshold, per-row RigL, SET and SNFS."""
    rows, fan_in = len(mask), len(mask[0])
    if budget >= rows * fan_in:
        return [[int(on) for on in row] for row in mask]
    cells, size, slope = _cells(mask), _sizes(weight), _slopes(grad)
    on = [cell for cell in cells if mask[cell[0]][cell[1]]]

    nonzero = [cell for cell in on if size[cell] > 0]
    n_keep = min(len(on) - int(len(on) * drop_fraction), len(nonzero))
    n_prune = len(on) - n_keep

    stay_dead = frozen or [False] * rows
    ablated = list(stay_dead)
    if threshold:
        by_size = _largest(on, size, n_keep)
        by_slope = _largest([cell for cell in cells if not stay_dead[cell[0]]], slope, n_prune)
        counts = [sum(1 for cell in {*by_size, *by_slope} if cell[0] == i) for i in range(rows)]
        others = sorted((counts[i] for i in range(rows) if not stay_dead[i]), reverse=True)
        must_survive = min(rows, max(budget // fan_in + 1, min_neurons or 0))
        limit = min(threshold, others[must_survive - 1]) if must_survive <= len(others) else 0
        ablated = [stay_dead[i] or counts[i] < limit for i in range(rows)]

    active = [i for i in range(rows) if not ablated[i]]
    if not active:
        return _as_mask([], mask)
    k = min(fan_in, budget // len(active))
    kept = _largest((cell for cell in nonzero if not ablated[cell[0]]), size, n_keep)
    chosen: list[Cell] = []
    for i in active:
        mine = [cell for cell in kept if cell[0] == i]
        held = _largest(mine, size, k)
        rest = [cell for cell in cells if cell[0] == i and cell not in held]
        chosen += held + _largest(rest, slope, k - len(held))
    return _as_mask(chosen, mask)
