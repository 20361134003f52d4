"""The rules for blocks of rows and inputs, read literally: loops over single weights, in plain Python.

It shares no code with the library. A block is all weights of some neighbouring rows and inputs, which are kept together
or not at all; blocks of equally many rows are ranked among themselves.
"""

import math

Matrix = list[list[float]]
Mask = list[list[bool]]
Block = list[tuple[int, int]]


def blocks_of(rows: int, inputs: int, height: int, width: int) -> list[Block]:
    """All blocks, those of the first rows first, and of these those of the first inputs."""
    return [
        [(i, j) for i in range(top, min(rows, top + height)) for j in range(left, left + width)]
        for top in range(0, rows, height)
        for left in range(0, inputs, width)
    ]


def _by_size(blocks: list[Block]) -> list[list[Block]]:
    """The blocks of each size, large ones first."""
    return [
        [block for block in blocks if len(block) == size] for size in sorted({len(b) for b in blocks}, reverse=True)
    ]


def _score(block: Block, values: Matrix, *, finite: bool) -> float:
    """The sum of magnitudes: NaN counts as 0, and so does what is infinite where scores are ``finite``."""
    total = 0.0
    for i, j in block:
        value = abs(values[i][j])
        total += 0.0 if math.isnan(value) or (finite and math.isinf(value)) else value
    return total


def _best(blocks: list[Block], scores: list[float], count: int) -> list[Block]:
    order = sorted(range(len(blocks)), key=lambda place: (-scores[place], place))
    return [blocks[place] for place in order[:count]]


def _mask(kept: list[Block], rows: int, inputs: int) -> list[list[int]]:
    mask = [[0] * inputs for _ in range(rows)]
    for block in kept:
        for i, j in block:
            mask[i][j] = 1
    return mask


def _count(blocks: list[Block], rows: int, budget: int) -> int:
    """How many of equally large blocks may be kept of a budget for all rows."""
    if not blocks:
        return 0
    theirs = len({i for block in blocks for i, _ in block})
    return budget * theirs // rows // len(blocks[0])


def initial(blocks: list[Block], scores: list[float], shape: tuple[int, int], *, budget: int) -> list[list[int]]:
    """The first mask, from a score for each block."""
    score = {block[0]: one for block, one in zip(blocks, scores, strict=True)}
    kept: list[Block] = []
    for some in _by_size(blocks):
        kept += _best(some, [score[block[0]] for block in some], _count(some, shape[0], budget))
    return _mask(kept, *shape)


def rigl(blocks: list[Block], weight: Matrix, growth: Matrix, mask: Mask, *, drop_fraction: float) -> list[list[int]]:
    """Drop the blocks of the smallest sums of |w|, grow as many where those of |g| are largest."""
    new: list[Block] = []
    for some in _by_size(blocks):
        kept = [block for block in some if mask[block[0][0]][block[0][1]]]
        stay = _best(
            kept, [_score(block, weight, finite=False) for block in kept], len(kept) - int(len(kept) * drop_fraction)
        )
        others = [block for block in some if block not in stay]
        new += stay
        new += _best(others, [_score(block, growth, finite=True) for block in others], len(kept) - len(stay))
    return _mask(new, len(mask), len(mask[0]))


def gmp(blocks: list[Block], weight: Matrix, mask: Mask, *, count: int) -> list[list[int]]:
    """Keep the blocks of the largest sums of |w|, of those that are left."""
    new: list[Block] = []
    for some in _by_size(blocks):
        kept = [block for block in some if mask[block[0][0]][block[0][1]]]
        new += _best(kept, [_score(block, weight, finite=False) for block in kept], _count(some, len(mask), count))
    return _mask(new, len(mask), len(mask[0]))
