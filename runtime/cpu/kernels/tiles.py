"""Tiles: what the tasks that multiply them have in common. Importing it imports Numba.

Owns a tile's memory, and the way through it: outputs start as their bias, then all groups of rows add what they
compute. A tile has a row for each input, and one of zeros behind the last, in columns that are samples or positions.
Outputs are stored in a tile too, or directly in y, if the columns are contiguous there.
"""

from typing import Any, Final

import numpy as np

from srigl_fx.runtime.activations import ACTIVATIONS
from srigl_fx.runtime.cpu.kernels import job
from srigl_fx.runtime.cpu.kernels.activations import activate_row
from srigl_fx.runtime.cpu.kernels.compiled import REGISTERS, compiled
from srigl_fx.runtime.cpu.kernels.copies import add_floats, copy_floats, fill_floats
from srigl_fx.runtime.cpu.kernels.job import GROUP_AT, GROUP_PHASE, GROUP_ROW, GROUP_SHARED, GROUP_WORDS
from srigl_fx.runtime.cpu.kernels.panel import FOURS, SHARED_BYTES, SHARING, TILE_BYTES, TILE_UNIT, tile_unit
from srigl_fx.runtime.cpu.kernels.plan import CACHE_LINE, COLUMNS, LANES
from srigl_fx.runtime.cpu.kernels.tile import (
    add_four,
    add_rows,
    columns_in_flight,
    indices_of,
    prefetched_lines,
    prefetched_shared_lines,
    rows_in_flight,
    shared_values_of,
    values_of,
)
from srigl_fx.runtime.cpu.kernels.vector import allocate, floats, ints, words

Pointer = Any
BLOCK_GROUPS: Final = 32  # groups of rows whose sums stay in the second-level cache
_LIMITS: Final = {number: row.limits for number, row in enumerate(ACTIVATIONS) if row.limits is not None}
_LIMIT_BITS: Final = sum(1 << number for number in _LIMITS)
_INFINITY: Final = np.float32(np.inf)
_INPUT_BYTES: Final = 24 << 10  # of a tile's inputs that are read before moving on; with a window, a first-level cache
_SHARED_PARTS: Final = 2  # as many times where four rows share them: they come from a second-level cache fast enough

_indices_of, _values_of, _shared_values_of = compiled(indices_of), compiled(values_of), compiled(shared_values_of)


def _add_group(width: int, unit: int) -> Any:
    """A function that adds some phases of a group to all of its rows, in tiles ``width`` vectors wide.

    Its arguments are those of :func:`add_rows`, but for the address of the first phase in place of those of indices and
    values; ``following`` is that of the phase that is read next.
    """
    add, step = add_rows(width, REGISTERS, unit), rows_in_flight(width, REGISTERS)
    lines = prefetched_lines(width, REGISTERS)

    def add_group(
        first: int,
        phases: int,
        inputs: int,
        outputs: int,
        bias: int,
        out: int,
        to: int,
        to_row: int,
        residual: int,
        low: float,
        high: float,
        following: int,
    ) -> None:
        for lane in range(0, LANES, step):
            indices, values = _indices_of(first, lane), _values_of(first, lane)
            ahead = following + lane // step * lines * CACHE_LINE
            rows = outputs + 4 * lane
            add(inputs, indices, values, phases, rows, bias, out, to, to_row, residual, low, high, ahead)

    return compiled(add_group)


def _add_shared_group(width: int, unit: int) -> Any:
    """The same for a group of rows that share their inputs by fours."""
    add, step = add_four(width, REGISTERS, unit), columns_in_flight(width, REGISTERS)
    parts, lines = LANES * width // step, prefetched_shared_lines(width, REGISTERS)

    def add_group(
        first: int,
        phases: int,
        inputs: int,
        outputs: int,
        bias: int,
        out: int,
        to: int,
        to_row: int,
        residual: int,
        low: float,
        high: float,
        following: int,
    ) -> None:
        for four in range(FOURS):
            indices, values = _indices_of(first, four), _shared_values_of(first, four)
            rows = outputs + 4 * SHARING * four
            for part in range(parts):
                ahead, column = following + (four * parts + part) * lines * CACHE_LINE, part * step * 4
                from_, sums, target = inputs + column, out + column, to + column
                added = 0 if residual == 0 else residual + column
                add(from_, indices, values, phases, rows, bias, sums, target, to_row, added, low, high, ahead)

    return compiled(add_group)


def _add_any(of_groups: Any) -> Any:
    """A function that adds some phases of a group, in a tile of either width whose rows are counted in either unit."""
    add_16, add_32 = (of_groups(width, TILE_UNIT) for width in (1, 2))
    add_16_of_many, add_32_of_many = (of_groups(width, 1) for width in (1, 2))

    def add(
        unit: int,
        width: int,
        first: int,
        phases: int,
        inputs: int,
        outputs: int,
        bias: int,
        out: int,
        to: int,
        to_row: int,
        residual: int,
        low: float,
        high: float,
        following: int,
    ) -> None:
        if unit == TILE_UNIT and width == COLUMNS:
            add_32(first, phases, inputs, outputs, bias, out, to, to_row, residual, low, high, following)
        elif unit == TILE_UNIT:
            add_16(first, phases, inputs, outputs, bias, out, to, to_row, residual, low, high, following)
        elif width == COLUMNS:
            add_32_of_many(first, phases, inputs, outputs, bias, out, to, to_row, residual, low, high, following)
        else:
            add_16_of_many(first, phases, inputs, outputs, bias, out, to, to_row, residual, low, high, following)

    return compiled(add)


_add, _add_shared = _add_any(_add_group), _add_any(_add_shared_group)


@compiled
def start_rows(j: Pointer, sample: int, first: int, last: int) -> None:
    """Let the outputs ``first <= o < last`` of a sample start as their bias and residual."""
    n, bias = j[job.OUT_FEATURES], floats(j[job.BIAS])
    y = floats(j[job.Y] + sample * n * 4)
    if j[job.RESIDUAL] != 0:
        residual = floats(j[job.RESIDUAL] + sample * n * 4)
        for o in range(first, last):
            y[o] = bias[o] + residual[o]
    else:
        for o in range(first, last):
            y[o] = bias[o]


@compiled
def first_output(j: Pointer, group: int) -> int:
    """The first output row that goes with a group; all groups together have all rows, ablated ones too."""
    if group == 0:
        return 0
    if group >= j[job.PANEL_COUNT]:
        return j[job.OUT_FEATURES]  # type: ignore[no-any-return]
    return int(ints(j[job.PANEL_ROWS])[group * LANES])


@compiled
def width_of(columns: int) -> int:
    """The columns of a tile that holds so many."""
    return 16 if columns <= 16 else COLUMNS


@compiled
def tile_memory(in_features: int, outputs: int, groups: int) -> Any:
    """Scratch of one task: outputs and one more, a cursor for each group of a block, inputs and a row of zeros."""
    floats_ = (in_features + 1 + outputs + 1) * COLUMNS
    return allocate(floats_ * 4 + (groups + 8) // 8 * CACHE_LINE + CACHE_LINE)


@compiled
def clear_columns(tile: Pointer, rows: int, columns: int, width: int) -> None:
    """Set the columns from ``columns`` on to zero."""
    for f in range(rows):
        for c in range(columns, width):
            tile[f * width + c] = 0.0


@compiled
def _are_whole(j: Pointer, g0: int, g1: int, first: int, last: int) -> bool:
    """Whether groups ``g0 <= g < g1`` compute all outputs ``first <= o < last``, with a row in each lane."""
    groups = words(j[job.PANEL_GROUPS])
    rows = groups[g1 * GROUP_WORDS + GROUP_ROW] - groups[g0 * GROUP_WORDS + GROUP_ROW]
    return rows == (g1 - g0) * LANES and rows == last - first  # type: ignore[no-any-return]


@compiled
def _is_whole(j: Pointer, g: int) -> bool:
    """Whether a group has a row in each lane."""
    groups = words(j[job.PANEL_GROUPS])
    return groups[(g + 1) * GROUP_WORDS + GROUP_ROW] - groups[g * GROUP_WORDS + GROUP_ROW] == LANES  # type: ignore[no-any-return]


@compiled
def start_outputs(j: Pointer, g0: int, g1: int, first: int, last: int, width: int, out: int) -> None:
    """Let the outputs ``first <= o < last`` start as their bias, if not all of them are of whole groups."""
    bias = floats(j[job.BIAS])
    if not _are_whole(j, g0, g1, first, last):
        for o in range(first, last):
            fill_floats(out + o * width * 4, bias[o], width // LANES)


@compiled
def start_tile(j: Pointer, g0: int, g1: int, first: int, last: int, width: int, out: int) -> None:
    """The same, and zeros in the row after the last, for lanes without one."""
    start_outputs(j, g0, g1, first, last, width, out)
    fill_floats(out + j[job.OUT_FEATURES] * width * 4, 0.0, width // LANES)


@compiled
def _put(j: Pointer, first: int, last: int, width: int, out: int, y: int, y_row: int) -> None:
    for o in range(first, last):
        found = out + o * width * 4
        if j[job.RESIDUAL] != 0:
            add_floats(j[job.RESIDUAL] + y - j[job.Y] + o * y_row, found, width)
        activate_row(floats(found), width, j[job.ACTIVATION])
        copy_floats(found, y + o * y_row, width)


@compiled
def put_rest(j: Pointer, g0: int, g1: int, first: int, last: int, width: int, out: int, y: int, y_row: int) -> None:
    """Put those outputs ``first <= o < last`` in their place that :func:`multiply` has left in the tile."""
    if not _are_whole(j, g0, g1, first, last):
        outputs, o = ints(j[job.PANEL_ROWS]), first
        for g in range(g0, g1):
            if _is_whole(j, g):
                for lane in range(LANES):
                    row = int(outputs[g * LANES + lane])
                    _put(j, o, row, width, out, y, y_row)
                    o = row + 1
        _put(j, o, last, width, out, y, y_row)


@compiled
def is_limit(activation: int) -> bool:
    """Whether an activation, if any, only limits its input."""
    return _LIMIT_BITS >> activation & 1 == 1


def _limit(end: int) -> Any:
    """A function of an activation's number: its least result (``end`` 0) or its greatest (1), if it is a limit."""

    def case(number: int, limit: Any, otherwise: Any) -> Any:
        return compiled(lambda activation: limit if activation == number else otherwise(activation))

    none = np.float32((-np.inf, np.inf)[end])
    chosen = compiled(lambda activation: none)
    for number, limits in _LIMITS.items():
        chosen = case(number, np.float32(limits[end]), chosen)
    return chosen


least, most = _limit(0), _limit(1)  # of an activation's number


@compiled
def _phase_at(groups: Pointer, g: int, phase: int, may_share: bool) -> int:
    """How far a phase of a group is from the first of the panel, in bytes."""
    if not may_share:
        return phase * TILE_BYTES
    found = g * GROUP_WORDS
    size = TILE_BYTES if groups[found + GROUP_SHARED] == 0 else SHARED_BYTES
    return groups[found + GROUP_AT] + (phase - groups[found + GROUP_PHASE]) * size  # type: ignore[no-any-return]


def _multiply(may_share: bool) -> Any:
    """:data:`multiply`, or :data:`multiply_shared`."""
    parts = _SHARED_PARTS if may_share else 1

    def multiply(
        j: Pointer,
        in_features: int,
        width: int,
        inputs: int,
        g0: int,
        g1: int,
        out: int,
        cursors: Pointer,
        y: int,
        y_row: int,
    ) -> None:
        groups, starts, at = words(j[job.PANEL_GROUPS]), ints(j[job.PANEL_STARTS]), j[job.PANEL]
        unit = tile_unit(in_features)
        low, high = least(j[job.ACTIVATION]), most(j[job.ACTIVATION])
        added = j[job.RESIDUAL] + y - j[job.Y] if y != 0 and j[job.RESIDUAL] != 0 else 0
        # Few enough inputs for a first-level cache, enough for twenty weights a row before its sums are put away.
        step = max(_INPUT_BYTES // (4 * width), 20 * in_features // max(1, j[job.K])) * parts
        for g in range(g0, g1):
            cursors[g - g0] = groups[g * GROUP_WORDS + GROUP_PHASE]
        limit = 0
        while limit < in_features:
            limit += step
            for g in range(g0, g1):
                first, end = cursors[g - g0], groups[(g + 1) * GROUP_WORDS + GROUP_PHASE]
                last = first
                while last < end and starts[last] < limit:
                    last += 1
                if last > first:
                    cursors[g - g0] = last
                    following = g + 1 if g + 1 < g1 else g0
                    ahead = at + _phase_at(groups, following, cursors[following - g0], may_share)
                    whole = _is_whole(j, g)
                    bias = j[job.BIAS] if whole and first == groups[g * GROUP_WORDS + GROUP_PHASE] else 0
                    to, row, residual, lowest, highest = out, width * 4, 0, -_INFINITY, _INFINITY
                    if whole and y != 0 and last == end:
                        to, row, residual, lowest, highest = y, y_row, added, low, high
                    phases, rows = last - first, j[job.PANEL_ROWS] + g * LANES * 4
                    phase = at + _phase_at(groups, g, first, may_share)
                    if may_share and groups[g * GROUP_WORDS + GROUP_SHARED] != 0:
                        _add_shared(
                            unit,
                            width,
                            phase,
                            phases,
                            inputs,
                            rows,
                            bias,
                            out,
                            to,
                            row,
                            residual,
                            lowest,
                            highest,
                            ahead,
                        )
                    else:
                        _add(
                            unit,
                            width,
                            phase,
                            phases,
                            inputs,
                            rows,
                            bias,
                            out,
                            to,
                            row,
                            residual,
                            lowest,
                            highest,
                            ahead,
                        )

    return compiled(multiply)


# Compute what groups ``g0 <= g < g1`` of a tile panel do; all groups read a part of the inputs before any reads the
# next: (the job, the inputs of a tile, its width, where it is, g0, g1, the tile ``out``, a cursor for each group, y,
# the bytes of a row of it). Outputs are stored in the tile ``out``. If ``y`` is not 0, the finished outputs of whole
# groups are stored at ``y`` instead, in rows ``y_row`` bytes apart; the activation must be one that :func:`is_limit`
# then. The other is for a shared tile panel.
multiply, multiply_shared = (_multiply(may_share) for may_share in (False, True))
