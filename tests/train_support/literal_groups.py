"""The update rules for rows that share their inputs, read literally: Python numbers and explicit loops. The oracle."""

import math

from train_support.literal import Mask, Matrix

Groups = list[list[int]]
Cell = tuple[int, int]  # a group and one of its inputs


def groups_of(rows: int, size: int, section: int | None = None, start: int = 0) -> Groups:
    """The rows of a block one after the other: a group ends when it is full, and where a section ends."""
    found: Groups = []
    for row in range(rows):
        begins = section is not None and (start + row) % section == 0
        if not found or begins or len(found[-1]) == size:
            found.append([])
        found[-1].append(row)
    return found


def _kept(groups: Groups, mask: Mask) -> list[Cell]:
    """What any row of each group keeps."""
    return [(p, j) for p, rows in enumerate(groups) for j in range(len(mask[0])) if any(mask[i][j] for i in rows)]


def _means(groups: Groups, size: dict[Cell, float], mask: Mask | None, active: list[bool]) -> dict[Cell, float]:
    """The mean over those active rows of a group that have weights (with no mask: over all its active rows)."""
    found = {}
    columns = 1 + max(j for _, j in size)
    for p, rows in enumerate(groups):
        counted = [i for i in rows if active[i] and (mask is None or any(mask[i]))]
        for j in range(columns):
            total = 0.0
            for i in counted:
                total += size[i, j] if mask is None or mask[i][j] else 0.0
            found[p, j] = total / max(1, len(counted))
    return found


def _sizes(weight: Matrix) -> dict[Cell, float]:
    """|w|; a NaN counts as 0."""
    return {(i, j): 0.0 if math.isnan(w) else abs(w) for i, row in enumerate(weight) for j, w in enumerate(row)}


def _slopes(grad: Matrix) -> dict[Cell, float]:
    """|g|; what is not finite counts as 0."""
    return {(i, j): abs(g) if math.isfinite(g) else 0.0 for i, row in enumerate(grad) for j, g in enumerate(row)}


def _largest(cells: list[Cell], score: dict[Cell, float], count: int) -> list[Cell]:
    return sorted(cells, key=lambda cell: (-score[cell], cell))[: max(0, count)]


def _as_mask(groups: Groups, chosen: list[Cell], columns: int, active: list[bool]) -> list[list[int]]:
    new = [[0] * columns for rows in groups for _ in rows]
    for p, j in chosen:
        for i in groups[p]:
            if active[i]:
                new[i][j] = 1
    return new


def alike(groups: Groups) -> list[list[int]]:
    """The groups of equally many rows."""
    return [[p for p, rows in enumerate(groups) if len(rows) == size] for size in sorted({len(r) for r in groups})]


def inputs_of(groups: Groups, some: list[int], budget: int) -> int:
    """How many inputs these groups, which have equally many rows, may keep between them."""
    rows = sum(len(groups[p]) for p in some)
    weights = budget * rows // sum(map(len, groups))
    return weights // len(groups[some[0]])


def rigl(groups: Groups, weight: Matrix, growth: Matrix, mask: Mask, *, drop_fraction: float) -> list[list[int]]:
    """Drop and grow inputs among the groups of equally many rows: RigL; SET with random scores, SNFS with momentum."""
    everybody = [True] * len(mask)
    size, slope = _means(groups, _sizes(weight), mask, everybody), _means(groups, _slopes(growth), None, everybody)
    chosen: list[Cell] = []
    for some in alike(groups):
        on = [cell for cell in _kept(groups, mask) if cell[0] in some]
        stay = _largest(on, size, len(on) - int(len(on) * drop_fraction))
        rest = [(p, j) for p in some for j in range(len(mask[0])) if (p, j) not in stay]
        chosen += stay + _largest(rest, slope, len(on) - len(stay))
    return _as_mask(groups, chosen, len(mask[0]), everybody)


def gmp(groups: Groups, weight: Matrix, mask: Mask, *, count: int, per_row: bool) -> list[list[int]]:
    """Keep the largest inputs, of each group or of the groups of equally many rows."""
    everybody = [True] * len(mask)
    size, on = _means(groups, _sizes(weight), mask, everybody), _kept(groups, mask)
    chosen: list[Cell] = []
    if per_row:
        for p in range(len(groups)):
            chosen += _largest([cell for cell in on if cell[0] == p], size, count // len(mask))
    else:
        for some in alike(groups):
            chosen += _largest([cell for cell in on if cell[0] in some], size, inputs_of(groups, some, count))
    return _as_mask(groups, chosen, len(mask[0]), everybody)


def initial(groups: Groups, scores: Matrix, *, budget: int, per_row: bool) -> list[list[int]]:
    """The first mask by the scores of groups (m, F): sums of magnitudes, or a draw."""
    columns = len(scores[0])
    score = {(p, j): value for p, row in enumerate(scores) for j, value in enumerate(row)}
    rows = sum(map(len, groups))
    chosen: list[Cell] = []
    if per_row:
        for p in range(len(groups)):
            chosen += _largest([(p, j) for j in range(columns)], score, budget // rows)
    else:
        for some in alike(groups):
            cells = [(p, j) for p in some for j in range(columns)]
            chosen += _largest(cells, score, inputs_of(groups, some, budget))
    return _as_mask(groups, chosen, columns, [True] * rows)


def srigl(
    groups: Groups,
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
    """Ablate neuron by neuron, drop over the layer, grow in each group; without a threshold, RigL, SET and SNFS."""
    rows, columns = len(mask), len(mask[0])
    if budget >= rows * columns:
        return [[int(on) for on in row] for row in mask]
    size, slope = _sizes(weight), _slopes(grad)
    stay_dead = frozen or [False] * rows
    active = [not dead for dead in stay_dead]

    held = _kept(groups, mask)
    before = _means(groups, size, mask, [True] * rows)
    n_keep = min(len(held) - int(len(held) * drop_fraction), sum(before[cell] > 0 for cell in held))

    if threshold:
        on = [(i, j) for i in range(rows) for j in range(columns) if mask[i][j]]
        salient = _largest(
            [cell for cell in on if size[cell] > 0], size, len(on) - int(len(on) * drop_fraction)
        )  # by magnitude: as many as survive a drop weight by weight
        free = [(i, j) for i in range(rows) for j in range(columns) if not stay_dead[i]]
        salient += _largest(free, slope, len(on) - len(salient))
        counts = [len({cell for cell in salient if cell[0] == i}) for i in range(rows)]
        others = sorted((counts[i] for i in range(rows) if not stay_dead[i]), reverse=True)
        must_survive = min(rows, max(budget // columns + 1, min_neurons or 0))
        limit = min(threshold, others[must_survive - 1]) if must_survive <= len(others) else 0
        active = [not stay_dead[i] and counts[i] >= limit for i in range(rows)]

    if not any(active):
        return _as_mask(groups, [], columns, active)
    k = min(columns, budget // sum(active))
    after, growth = _means(groups, size, mask, active), _means(groups, slope, None, active)
    had = {(p, j) for p, j in held if any(active[i] and mask[i][j] for i in groups[p])}
    stay = _largest([cell for cell in held if cell in had and after[cell] > 0], after, n_keep)
    chosen: list[Cell] = []
    for p, members in enumerate(groups):
        if not any(active[i] for i in members):
            continue
        mine = _largest([cell for cell in stay if cell[0] == p], after, k)
        rest = [(p, j) for j in range(columns) if (p, j) not in mine]
        chosen += mine + _largest(rest, growth, k - len(mine))
    return _as_mask(groups, chosen, columns, active)
