"""The packed form of a condensed weight that the fast kernels read: panels of 16 rows.

Owns the layout and its construction from the canonical format; it must not know what is computed with it.

Sixteen active rows form a group, one lane each. A group is a sequence of phases; in each, every row contributes its
next STEPS kept weights, as far as they lie in the phase's window of ``window`` inputs, which starts at the first input
that any of the rows still needs. A row that has fewer adds weights of zero. As windows follow the weights, any pattern
can be packed, and on uniform random masks 90 % sparse just 14 % (window 128) or 5 % (256) of what is stored are zeros.

Two kinds of panels hold a phase as
- dot: a byte for each row and step, relative to the window's start, then the values as stored;
- tile: a uint16 for each row and step, the input times :func:`tile_unit`, then the values as float32. A weight of zero
  that was added names the input after the last, of which a tile keeps a row of zeros.
Indices are stored row by row, and so are a tile panel's values; those of a dot panel step by step, but for values of
eight bits, of which four of a row are multiplied at once.

Values of eight bits have a tile panel of their own: a phase for each group, with the kept weights of each row four by
four: four indices (uint16), then four values. Beside both kinds lie each lane's scale, and the sum of its values.
"""

from collections.abc import Callable
from typing import Any, Final

import numba as typed_numba

from srigl_fx.runtime.cpu.kernels import job
from srigl_fx.runtime.cpu.kernels.job import GROUP_PHASE, GROUP_ROW, GROUP_WORDS
from srigl_fx.runtime.cpu.kernels.plan import INT8_DOT, INT8_STEP, INT8_TILE, LANES, TILE
from srigl_fx.runtime.cpu.kernels.values import value_at, value_bytes
from srigl_fx.runtime.cpu.kernels.vector import bytes_, floats, ints, shorts, signed_bytes, words

numba: Any = typed_numba  # half of its functions are annotated
Pointer = Any
STEPS: Final = 4
SLOTS: Final = LANES * STEPS
TILE_BYTES: Final = 6 * SLOTS  # of one phase
TILE_UNIT: Final = 16  # the largest
TILE_VALUES: Final = 2 * SLOTS  # where its values start
DOT_VALUES: Final = SLOTS
QUAD_BYTES: Final = 3 * STEPS  # of a tile panel of eight bits
QUAD_VALUES: Final = 2 * STEPS  # where its values start
_NONE: Final = 1 << 40


def _compiled(function: Callable[..., Any]) -> Any:
    return numba.njit(error_model="numpy")(function)


@_compiled
def dot_bytes(value_type: int) -> int:
    """The bytes of one phase of a dot panel."""
    return SLOTS * (1 + int(value_bytes(value_type)))


@_compiled
def quads(k: int) -> int:
    """By how many fours a row's kept weights are stored in a tile panel of eight bits."""
    return (k + STEPS - 1) // STEPS


@_compiled
def phase_bytes(j: Pointer) -> int:
    """The bytes of one phase of the panel that the job's kernel reads."""
    kernel = j[job.KERNEL]
    if kernel == TILE:
        return TILE_BYTES
    if kernel == INT8_TILE:
        return LANES * quads(j[job.K]) * QUAD_BYTES  # type: ignore[no-any-return]
    return dot_bytes(j[job.VALUE_TYPE])  # type: ignore[no-any-return]


@_compiled
def tile_unit(in_features: int) -> int:
    """What the inputs of a tile panel are counted in, where it can be so much that addressing them takes no shift."""
    return TILE_UNIT if (in_features + 1) * TILE_UNIT <= 1 << 16 else 1


@_compiled
def index_at(indices: int, index_bytes: int, position: int) -> int:
    """An index of the canonical format."""
    if index_bytes == 2:
        return int(shorts(indices)[position])
    return int(ints(indices)[position])


@_compiled
def row_end(indices: Pointer, first: int, k: int) -> int:
    """Where the kept weights of a row of the canonical format end: an index that repeats the one before is padding."""
    end = first + k
    while end - first > 1 and indices[end - 1] == indices[end - 2]:
        end -= 1
    return end


@_compiled
def _group_rows(j: Pointer, row: int) -> int:
    """How many rows the group that starts with ``row`` has."""
    active, n_active, block_rows = ints(j[job.ACTIVE]), j[job.N_ACTIVE], j[job.BLOCK_ROWS]
    block = int(active[row]) // block_rows
    rows = 1
    while rows < LANES and row + rows < n_active and int(active[row + rows]) // block_rows == block:
        rows += 1
    return rows


@_compiled
def _next_index(j: Pointer, row: int, lane: int, cursors: Pointer) -> int:
    """The input of a lane's next kept weight, or _NONE where its row ends, or its padding starts."""
    k, cursor = j[job.K], cursors[lane]
    if cursor == k:
        return _NONE
    position = (row + lane) * k + cursor
    index = index_at(j[job.INDICES], j[job.INDEX_BYTES], position)
    if cursor > 0 and index == index_at(j[job.INDICES], j[job.INDEX_BYTES], position - 1):
        return _NONE
    return index  # type: ignore[no-any-return]


@_compiled
def _window_start(j: Pointer, row: int, rows: int, cursors: Pointer) -> int:
    """Where the next window of a group starts, or _NONE at its end. A window ends within the inputs where it can."""
    start = _NONE
    for lane in range(rows):
        start = min(start, _next_index(j, row, lane, cursors))
    if start != _NONE:
        # Bytes that lie across two cache lines take twice as long to read, half of which this spares them; windows of
        # 64 inputs then leave a tenth more gaps.
        if j[job.KERNEL] == INT8_DOT and j[job.PANEL_WINDOW] <= 2 * SLOTS:
            start = start // INT8_STEP * INT8_STEP
        start = max(0, min(start, j[job.IN_FEATURES] - j[job.PANEL_WINDOW]))
    return start


@_compiled
def _next_in_window(j: Pointer, row: int, rows: int, lane: int, cursors: Pointer, end: int) -> int:
    """The position of a lane's next kept weight if it lies before ``end``, else -1."""
    if lane < rows and _next_index(j, row, lane, cursors) < end:
        cursors[lane] += 1
        return (row + lane) * j[job.K] + cursors[lane] - 1  # type: ignore[no-any-return]
    return -1


def measure_panel(j: Pointer, scratch: int) -> None:
    """Count groups and phases of a panel into the job. ``scratch`` is the address of LANES int64."""
    cursors = words(scratch)
    groups = phases = row = 0
    while row < j[job.N_ACTIVE]:
        rows = _group_rows(j, row)
        for lane in range(LANES):
            cursors[lane] = 0
        start = _NONE if j[job.KERNEL] == INT8_TILE else _window_start(j, row, rows, cursors)
        phases += 1 if j[job.KERNEL] == INT8_TILE else 0
        while start != _NONE:
            for lane in range(rows):
                for _ in range(STEPS):
                    _next_in_window(j, row, rows, lane, cursors, start + j[job.PANEL_WINDOW])
            phases += 1
            start = _window_start(j, row, rows, cursors)
        groups += 1
        row += rows
    j[job.PANEL_COUNT] = groups
    j[job.PANEL_PHASES] = phases


@_compiled
def _copy_value(target: int, source: int, size: int) -> None:
    """Copy a value as it is stored; a zero where ``source`` is 0."""
    if size == 4:
        ints(target)[0] = 0 if source == 0 else ints(source)[0]
    elif size == 2:
        shorts(target)[0] = 0 if source == 0 else shorts(source)[0]
    else:
        bytes_(target)[0] = 0 if source == 0 else bytes_(source)[0]


@_compiled
def _fill_phase(j: Pointer, row: int, rows: int, phase: int, start: int, cursors: Pointer) -> None:
    value_type, is_tile = j[job.VALUE_TYPE], j[job.KERNEL] == TILE
    at = j[job.PANEL] + phase * phase_bytes(j)
    wide, narrow = shorts(at), bytes_(at)
    values, indices, index_bytes = j[job.VALUES], j[job.INDICES], j[job.INDEX_BYTES]
    size = value_bytes(value_type)
    for lane in range(LANES):
        for step in range(STEPS):
            place = lane * STEPS + step
            slot = place if size == 1 else step * LANES + lane
            position = _next_in_window(j, row, rows, lane, cursors, start + j[job.PANEL_WINDOW])
            if is_tile:
                index = j[job.IN_FEATURES] if position < 0 else index_at(indices, index_bytes, position)
                wide[place] = index * tile_unit(j[job.IN_FEATURES])
                floats(at + TILE_VALUES)[place] = 0.0 if position < 0 else value_at(values, value_type, position)
            else:
                narrow[place] = 0 if position < 0 else index_at(indices, index_bytes, position) - start
                _copy_value(at + DOT_VALUES + slot * size, 0 if position < 0 else values + position * size, size)


@_compiled
def _fill_quads(j: Pointer, row: int, rows: int, phase: int) -> None:
    """A group of a tile panel of eight bits; zeros fill up its rows, and lanes without one."""
    k, values, indices, index_bytes = j[job.K], bytes_(j[job.VALUES]), j[job.INDICES], j[job.INDEX_BYTES]
    size = quads(k) * QUAD_BYTES
    for lane in range(LANES):
        at = j[job.PANEL] + phase * phase_bytes(j) + lane * size
        for i in range(quads(k) * STEPS):
            quad, step, position = at + i // STEPS * QUAD_BYTES, i % STEPS, (row + lane) * k + i
            index = value = 0
            if lane < rows and i < k:
                index = index_at(indices, index_bytes, position)
                if i == 0 or index != index_at(indices, index_bytes, position - 1):
                    value = int(values[position])
            shorts(quad)[step] = index
            bytes_(quad + QUAD_VALUES)[step] = value


@_compiled
def _fill_scales(j: Pointer, row: int, rows: int, group: int) -> None:
    """Each lane's scale, and the sum of its values."""
    k, given = j[job.K], floats(j[job.SCALES])
    scales, sums = floats(j[job.PANEL_SCALES]), ints(j[job.PANEL_SUMS])
    for lane in range(LANES):
        total, scale = 0, 0.0
        if lane < rows:
            first, scale = (row + lane) * k, given[row + lane]
            for position in range(first, first + k):
                repeated = position > first and (
                    index_at(j[job.INDICES], j[job.INDEX_BYTES], position)
                    == index_at(j[job.INDICES], j[job.INDEX_BYTES], position - 1)
                )
                if not repeated:
                    total += signed_bytes(j[job.VALUES])[position]
        scales[group * LANES + lane], sums[group * LANES + lane] = scale, total


def fill_panel(j: Pointer, scratch: int) -> None:
    """Write a panel whose sizes are known: phases, where each group starts, each phase's window, each lane's output.

    A lane without a row is given the output after the last. ``scratch`` is as for :func:`measure_panel`.
    """
    cursors, groups = words(scratch), words(j[job.PANEL_GROUPS])
    starts, outputs, active = ints(j[job.PANEL_STARTS]), ints(j[job.PANEL_ROWS]), ints(j[job.ACTIVE])
    phase = group = row = 0
    while row < j[job.N_ACTIVE]:
        rows = _group_rows(j, row)
        groups[group * GROUP_WORDS + GROUP_PHASE] = phase
        groups[group * GROUP_WORDS + GROUP_ROW] = row
        for lane in range(LANES):
            outputs[group * LANES + lane] = active[row + lane] if lane < rows else j[job.OUT_FEATURES]
            cursors[lane] = 0
        if j[job.SCALES] != 0:
            _fill_scales(j, row, rows, group)
        start = _NONE
        if j[job.KERNEL] == INT8_TILE:
            _fill_quads(j, row, rows, phase)
            starts[phase] = 0
            phase += 1
        else:
            start = _window_start(j, row, rows, cursors)
        while start != _NONE:
            starts[phase] = start
            _fill_phase(j, row, rows, phase, start, cursors)
            phase += 1
            start = _window_start(j, row, rows, cursors)
        group += 1
        row += rows
    groups[group * GROUP_WORDS + GROUP_PHASE] = phase
    groups[group * GROUP_WORDS + GROUP_ROW] = row
