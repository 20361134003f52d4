"""Selecting the highest scores of a matrix, by a level instead of a sort.

Owns the two selections that every update rule is made of, over a whole layer and row by row, and what becomes one
score where rows are selected for together. It must not know what the scores mean. Ties go to the lowest flat index, so
that every device and every process selects the same entries.

Scores are magnitudes, and magnitudes compare like the integers that their bits spell. They are computed from the
values a few rows at a time, so that they stay in the cache and no second copy of a layer is ever made.
"""

import math

import numpy as np
import torch
from torch import Tensor

from srigl_fx.masks.row_groups import RowGroups

# The integer type of each element size in bytes.
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 15  # entries at a time: they fit the cache of a core, and torch takes no second thread for so few
_SAMPLE = 1 << 14  # entries that guess the level of a layer
_DEVIATIONS = 5  # of the guess: it fails once in a million, and is then searched for


class Scores:
    """The magnitudes of a matrix as integers of the same order, -1 where an entry may not be chosen.

    Args:
        values: Matrix (n, F) of any floating-point type; NaN counts as 0.
        among: Bool (n, F), True where an entry may be chosen; everywhere if not given.
        finite: Whether infinite values count as 0, too.

    Example:
        >>> scores = Scores(torch.tensor([[-2.0, 1.0, torch.nan]]), torch.tensor([[True, False, True]]))
        >>> scores[:].view(torch.float32)[0, 0].item(), scores[:][0, 1:].tolist()
        (2.0, [-1, 0])
    """

    def __init__(self, values: Tensor, among: Tensor | None = None, *, finite: bool = True) -> None:
        """See the class."""
        self.shape, self.device = values.shape, values.device
        self._values, self._among = values, among
        self._bits = _BITS[values.element_size()]
        self._infinity = 0.0 if finite else torch.inf

    def __getitem__(self, rows: slice) -> Tensor:
        """The scores of some rows, a new tensor."""
        return self._scores(self._values[rows], None if self._among is None else self._among[rows])

    def count(self, least: int) -> int:
        """The number of scores that are at least ``least``."""
        counts = [(self[rows] >= least).count_nonzero() for rows in _chunks(self)]
        return int(torch.stack(counts).sum())

    def sample(self, size: int) -> Tensor:
        """The scores of about evenly spread entries, ascending."""
        rows, columns = self.shape
        # Multiples of the golden section: no stride of a matrix has anything in common with them.
        step = int(rows * columns * 0.6180339887) | 1
        flat = torch.arange(size, device=self.device) * step % (rows * columns)
        index = flat // columns, flat % columns
        return self._scores(self._values[index], None if self._among is None else self._among[index]).sort().values

    def _scores(self, values: Tensor, among: Tensor | None) -> Tensor:
        bits = values.abs().nan_to_num_(nan=0.0, posinf=self._infinity).view(self._bits)
        if among is not None:
            bits |= among.to(bits.dtype) - 1
        return bits


def pooled(values: Tensor, groups: RowGroups, among: Tensor | None = None, *, finite: bool = True) -> Tensor:
    """The values of groups of rows (m, F / width), by whose magnitudes their inputs are ranked.

    Of the rows i of group p that have any entry that may be chosen (c[p] of them), it is the mean magnitude::

        P[p, j] = sum of |values[i, j]| where among[i, j], over the rows i of p, / c[p]

    That ranks the inputs of one group, and those of groups with as many such rows, as the sum does. A group with fewer
    of them, a rest or one that has lost rows, is not the weaker for it. Where several inputs are one (blocks), their P
    are added up. Rows by themselves keep their values.

    Args:
        values: Matrix (n, F) of any floating-point type; NaN counts as 0.
        groups: Which rows are selected for together.
        among: Bool (n, F), True where an entry may be chosen; everywhere if not given.
        finite: Whether infinite values count as 0, too.

    Returns:
        Float64, at least 0; ``values`` itself where each row is by itself.

    Example:
        >>> values = torch.tensor([[-2.0, 1.0], [4.0, torch.nan], [9.0, 9.0]])
        >>> pooled(values, RowGroups(rows=3, size=4), values != 9).tolist()
        [[3.0, 0.5]]
    """
    if groups.single:
        return values
    sizes = values.abs().nan_to_num_(nan=0.0, posinf=0.0 if finite else torch.inf)
    rows = groups.sizes.to(values.device)[:, None]
    if among is not None:
        sizes.masked_fill_(~among, 0.0)
        rows = groups.count(among.any(dim=1)).clamp_(min=1.0)[:, None]
    mean = groups.sum(sizes).div_(rows)
    # A sum of large numbers may overflow, and must not count as one that was infinite from the start.
    return mean.clamp_(max=torch.finfo(mean.dtype).max) if finite else mean


def top(scores: Scores, count: int, *, least: int = 0) -> Tensor:
    """Bool mask of the ``count`` highest scores of the layer, ties to the lowest flat index; none below ``least``.

    Example:
        >>> top(Scores(torch.tensor([[0.5, -0.9], [0.5, 0.5]])), 2).tolist()
        [[True, True], [False, False]]
    """
    if count <= 0:
        return torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    chosen = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    level = max(least, _level(scores, count))
    for rows in _chunks(scores):
        torch.ge(scores[rows], level, out=chosen[rows])
    excess = int(chosen.count_nonzero()) - count
    for rows in reversed(_chunks(scores)):
        if excess <= 0:
            break
        last = (scores[rows] == level).flatten().nonzero()[-excess:, 0]
        chosen[rows].view(-1)[last] = False
        excess -= len(last)
    return chosen


def top_of_rows(scores: Scores, counts: Tensor) -> Tensor:
    """Bool mask of the ``counts[i]`` highest scores of each row i, ties to the lowest index.

    Example:
        >>> top_of_rows(Scores(torch.tensor([[0.5, -0.9], [0.5, 0.5]])), torch.tensor([1, 1])).tolist()
        [[False, True], [True, False]]
    """
    most = int(counts.max())
    if most == 0:
        return torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    chosen = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    for rows in _chunks(scores):
        found, wanted = scores[rows], counts[rows, None]
        levels = _highest_of_rows(found, most).gather(1, (most - wanted).clamp(max=most - 1))
        levels.masked_fill_(wanted == 0, torch.iinfo(found.dtype).max)
        torch.ge(found, levels, out=chosen[rows])
        if bool(chosen[rows].count_nonzero() > wanted.sum()):
            above, level = found > levels, found == levels
            chosen[rows] = above | (level & (level.cumsum(dim=1) <= wanted - above.sum(dim=1, keepdim=True)))
    return chosen


def counts_of_rows(mask: Tensor) -> Tensor:
    """The number of chosen entries of each row, int64.

    Example:
        >>> counts_of_rows(torch.tensor([[True, True], [False, False]])).tolist()
        [2, 0]
    """
    return torch.cat([mask[rows].sum(dim=1) for rows in _chunks(mask)])


def _chunks(matrix: Scores | Tensor) -> list[slice]:
    """Slices of rows that cover the matrix; on a GPU, where each may wait for the host, at most four."""
    rows, columns = matrix.shape
    step = max(1, _CHUNK // columns, 0 if matrix.device.type == "cpu" else -(-rows // 4))
    return [slice(start, min(rows, start + step)) for start in range(0, rows, step)]


def _highest_of_rows(found: Tensor, most: int) -> Tensor:
    """The ``most`` highest of each row, ascending."""
    if found.device.type != "cpu":
        return found.topk(most, dim=1).values.flip(1)
    # NumPy sorts with vector instructions: ten times faster than topk.
    highest = np.partition(found.numpy(), found.shape[1] - most, axis=1)[:, -most:]
    return torch.from_numpy(np.sort(highest, axis=1))


def _level(scores: Scores, count: int) -> int:
    """The ``count``-th highest score of the layer, the lowest one if there are fewer."""
    size = math.prod(scores.shape)
    if count >= size:
        return -1
    if size <= 4 * _SAMPLE:
        return int(scores[:].flatten().kthvalue(size - count + 1).values)
    sample = scores.sample(_SAMPLE)
    share = count / size
    position = _SAMPLE * (1 - share)
    margin = _DEVIATIONS * math.sqrt(_SAMPLE * share * (1 - share)) + _DEVIATIONS
    last = _SAMPLE - 1
    low, high = sample[[max(0, int(position - margin)), min(last, math.ceil(position + margin))]].tolist()
    found = torch.cat([some[some > low] for some in map(scores.__getitem__, _chunks(scores))])
    inside = found[found < high]
    missing = count - (len(found) - len(inside))
    if 0 < missing <= len(inside):
        return int(inside.kthvalue(len(inside) - missing + 1).values)
    # Where many entries are equal, the guess misses, and the level most often is the bound itself.
    if missing > 0:
        return low if scores.count(low) >= count else _search(scores, count, -1, low)
    return high if scores.count(high + 1) < count else _search(scores, count, high, torch.iinfo(found.dtype).max)


def _search(scores: Scores, count: int, lowest: int, highest: int) -> int:
    """The ``count``-th highest score, which lies between ``lowest`` and ``highest``, by bisection."""
    while lowest < highest:
        middle = highest - (highest - lowest) // 2
        if scores.count(middle) >= count:
            lowest = middle
        else:
            highest = middle - 1
    return lowest
