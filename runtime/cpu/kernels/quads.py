"""The tile panel of eight bits: the kept weights of a row four by four.

Owns the layout of a group and its construction; :mod:`.panel` owns those of floats, and what lies beside all of them.
It must not know what is computed with it.

Four indices (uint16) and four values are a quad. Neighbouring rows of a group that share their indices have these
first, four by four, and then the values of each row.

Where bytes are multiplied in pairs (BYTE_PAIRS), two or three rows that share their indices are stored like others, and
the weights of a row by itself lie in an order in which the sums of two products fit 16 bits. A weight that finds no
other for that has a weight of zero beside it; then the rows of its group have more quads than others. Sums are exact,
so their order does not change them.
"""

from collections.abc import Callable
from typing import Any, Final

import numba as typed_numba

from srigl_fx.runtime.cpu.kernels import job
from srigl_fx.runtime.cpu.kernels.canonical import index_of, sharing_rows
from srigl_fx.runtime.cpu.kernels.compiled import BYTE_PAIRS
from srigl_fx.runtime.cpu.kernels.plan import LANES, STEPS
from srigl_fx.runtime.cpu.kernels.vector import bytes_, shorts, signed_bytes, words

numba: Any = typed_numba  # half of its functions are annotated
Pointer = Any
QUAD_BYTES: Final = 3 * STEPS
QUAD_VALUES: Final = 2 * STEPS  # where its values start
PAIR_LIMIT: Final = 128  # of two weights of one sign: 255 times as much is below 2 ** 15
# With AVX2 two rows that share their indices take 1.2 times as long as two by themselves, four as long as four.
_LEAST_TOGETHER: Final = 4
_WAITING: Final = 8 * 3 * LANES  # in the scratch, behind what the packing of a panel counts: room for LANES weights


def _compiled(function: Callable[..., Any]) -> Any:
    return numba.njit(error_model="numpy")(function)


@_compiled
def quads_of(k: int) -> int:
    """By how many fours a row's kept weights are stored in a tile panel of eight bits."""
    return (k + STEPS - 1) // STEPS


@_compiled
def rows_together(j: Pointer, row: int, most: int) -> int:
    """How many rows from ``row`` on, ``most`` at most, share their indices and are stored with these once."""
    rows = sharing_rows(j, row, most)
    return 1 if BYTE_PAIRS and rows < _LEAST_TOGETHER else rows


@_compiled
def quads_bytes(j: Pointer, row: int, rows: int, single: int) -> int:
    """The bytes of a group of a tile panel of eight bits, whose rows with indices of their own have so many fours."""
    end, total = row + rows, 0
    while row < end:
        count = rows_together(j, row, end - row)
        total += (single if count == 1 else quads_of(j[job.K])) * (QUAD_VALUES + STEPS * count)
        row += count
    return total


@_compiled
def _fit(one: int, other: int) -> bool:
    """Whether two products of weights with bytes have a sum of 16 bits, whatever the bytes are."""
    return max(0, one) + max(0, other) <= PAIR_LIMIT and min(0, one) + min(0, other) >= -PAIR_LIMIT


@_compiled
def _put_pair(j: Pointer, row: int, one: int, other: int, pair: int, at: int) -> None:
    """Write two weights of a row, and where their inputs are; with ``other`` below 0 the second weight is zero."""
    values, place = signed_bytes(j[job.VALUES]), at + pair // 2 * QUAD_BYTES
    step, k = pair % 2 * 2, j[job.K]
    indices, found = shorts(place), signed_bytes(place + QUAD_VALUES)
    indices[step], found[step] = index_of(j, row, one), values[row * k + one]
    indices[step + 1] = index_of(j, row, one if other < 0 else other)
    found[step + 1] = 0 if other < 0 else values[row * k + other]


@_compiled
def _pair_up(j: Pointer, row: int, scratch: int, at: int) -> int:
    """Bring the kept weights of a row into pairs that fit, near their order; returns how many pairs there are.

    Where ``at`` is not 0, the pairs are written there. Weights that wait for another have one sign, as others fit, and
    all but one have more than half of the limit. Where too many wait, the first is given none.
    """
    values, waiting, k, pairs, count = signed_bytes(j[job.VALUES]), words(scratch + _WAITING), j[job.K], 0, 0
    for i in range(k):
        if i > 0 and index_of(j, row, i) == index_of(j, row, i - 1):
            continue  # padding
        taken = 0
        while taken < count and not _fit(values[row * k + i], values[row * k + waiting[taken]]):
            taken += 1
        found = taken < count
        if found or count == LANES:
            taken = taken if found else 0
            if at != 0:
                _put_pair(j, row, waiting[taken], i if found else -1, pairs, at)
            pairs += 1
            count -= 1
            for later in range(taken, count):
                waiting[later] = waiting[later + 1]
        if not found:
            waiting[count] = i
            count += 1
    for place in range(count):
        if at != 0:
            _put_pair(j, row, waiting[place], -1, pairs, at)
        pairs += 1
    return pairs


@_compiled
def single_quads(j: Pointer, row: int, rows: int, scratch: int) -> int:
    """In how many fours the rows of a group that have indices of their own are stored."""
    found, end = quads_of(j[job.K]), row + rows
    if BYTE_PAIRS:
        while row < end:
            count = rows_together(j, row, end - row)
            if count == 1:
                found = max(found, (_pair_up(j, row, scratch, 0) + 1) // 2)
            row += count
    return found  # type: ignore[no-any-return]


@_compiled
def fill_quads(j: Pointer, row: int, rows: int, single: int, scratch: int, group: int) -> None:
    """A group of a tile panel of eight bits; zeros fill up its rows."""
    k, values = j[job.K], bytes_(j[job.VALUES])
    end, at = row + rows, group
    while row < end:
        count = rows_together(j, row, end - row)
        if BYTE_PAIRS and count == 1:
            for i in range(single * QUAD_BYTES):
                bytes_(at)[i] = 0
            _pair_up(j, row, scratch, at)
            at += single * QUAD_BYTES
            row += 1
            continue
        steps = quads_of(k) * STEPS
        # One row alone has its values behind every four indices, several have theirs behind all indices.
        apart, values_at = (QUAD_BYTES, at + QUAD_VALUES) if count == 1 else (QUAD_VALUES, at + 2 * steps)
        value_apart = QUAD_BYTES if count == 1 else STEPS
        for i in range(steps):
            quad, step = i // STEPS, i % STEPS
            index = index_of(j, row, i) if i < k else 0
            kept = i < k and (i == 0 or index != index_of(j, row, i - 1))
            shorts(at + quad * apart)[step] = index
            for r in range(count):
                place = values_at + r * steps + quad * value_apart
                bytes_(place)[step] = values[(row + r) * k + i] if kept else 0
        at += quads_of(k) * (QUAD_VALUES + STEPS * count)
        row += count
