"""Selecting the highest scores of a matrix, by a level instead of a sort.

Owns the two selections that every update rule is made of: over a whole layer, and row by row. It must not know what
the scores mean. Ties go to the lowest flat index, so that every device and every process selects the same entries.

Scores are magnitudes, and magnitudes compare like the integers that their bits spell. They are computed from the
values a few rows at a time, so that they stay in the cache and no second copy of a layer is ever made.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

# The integer type of each element size in bytes.
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 17  # entries at a time: with their temporaries they fit the cache of a core
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
        bits = _BITS[values.element_size()]
        self.shape = values.shape
        self.device = values.device
        self._values, self._among = values.view(bits), among
        self._limit = int(torch.tensor(torch.inf, dtype=values.dtype).view(bits)) - finite
        self._magnitude = torch.iinfo(bits).max

    def __getitem__(self, rows: slice) -> Tensor:
        """The scores of some rows, a new tensor."""
        return self._scores(self._values[rows], None if self._among is None else self._among[rows])

    def sample(self, size: int) -> Tensor:
        """The scores of about evenly spread entries, ascending."""
        rows, columns = self.shape
        # Multiples of the golden section: no stride of a matrix has anything in common with them.
        step = int(rows * columns * 0.6180339887) | 1
        index = torch.arange(size, device=self.device) * step % (rows * columns)
        index = index // columns, index % columns
        return self._scores(self._values[index], None if self._among is None else self._among[index]).sort().values

    def chunks(self) -> Iterator[slice]:
        """Slices of rows that cover the matrix; on a GPU, where each waits for the host, only a few."""
        rows, columns = self.shape
        entries = _CHUNK if self.device.type == "cpu" else max(_CHUNK, rows * columns // 4)
        step = max(1, entries // columns)
        return (slice(start, min(rows, start + step)) for start in range(0, rows, step))

    def _scores(self, values: Tensor, among: Tensor | None) -> Tensor:
        bits = values & self._magnitude
        bits *= bits <= self._limit
        if among is not None:
            bits |= among.to(bits.dtype) - 1
        return bits


def top(scores: Scores, count: int) -> Tensor:
    """Bool mask of the ``count`` highest scores of the layer, ties to the lowest flat index; all there are if fewer.

    Example:
        >>> top(Scores(torch.tensor([[0.5, -0.9], [0.5, 0.5]])), 2).tolist()
        [[True, True], [False, False]]
    """
    chosen = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    if count <= 0:
        return chosen
    level = max(0, _level(scores, count))
    for rows in scores.chunks():
        torch.ge(scores[rows], level, out=chosen[rows])
    excess = int(chosen.count_nonzero()) - count
    for rows in reversed(list(scores.chunks())):
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
    chosen = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    most = int(counts.max())
    for rows in scores.chunks() if most else ():
        found, wanted = scores[rows], counts[rows, None]
        levels = found.topk(most, dim=1).values.gather(1, (wanted - 1).clamp(min=0))
        torch.ge(found, levels, out=chosen[rows])
        chosen[rows] &= wanted > 0
        tied = (chosen[rows].sum(dim=1) > counts[rows]).nonzero()[:, 0]
        if len(tied):
            found, wanted, levels = found[tied], wanted[tied], levels[tied]
            above, level = found > levels, found == levels
            chosen[rows][tied] = above | (level & (level.cumsum(dim=1) <= wanted - above.sum(dim=1, keepdim=True)))
    return chosen


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
    between = []
    above = torch.zeros((), dtype=torch.int64, device=scores.device)
    for rows in scores.chunks():
        found = scores[rows]
        between.append(found[(found > low) & (found < high)])
        above += (found >= high).count_nonzero()
    candidates, missing = torch.cat(between), count - int(above)
    if 0 < missing <= len(candidates):
        return int(candidates.kthvalue(len(candidates) - missing + 1).values)
    return _search(scores, count, high if missing <= 0 else -1, low if missing > 0 else None)


def _search(scores: Scores, count: int, lowest: int, highest: int | None) -> int:
    """The ``count``-th highest score by bisection: it is at least ``lowest`` and, where given, at most ``highest``."""

    def enough(level: int) -> bool:
        return sum(int((scores[rows] >= level).count_nonzero()) for rows in scores.chunks()) >= count

    top_score = scores._limit if highest is None else highest
    # The guess misses where many entries are equal, and then the level is most often the bound itself.
    if highest is not None and enough(highest):
        return highest
    if highest is None and not enough(lowest + 1):
        return lowest
    while lowest < top_score:
        middle = (lowest + top_score + 1) // 2
        lowest, top_score = (middle, top_score) if enough(middle) else (lowest, middle - 1)
    return lowest
