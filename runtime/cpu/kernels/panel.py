"""The packed form of a condensed weight that the fast kernels read: panels of 16 rows.

Owns the layout and its construction from the canonical format; it must not know what is computed with it.

Sixteen active rows form a group, one lane each. A group is a sequence of phases; in each, every row contributes its
next STEPS kept weights, as far as they lie in the phase's window of ``window`` inputs, which starts at the first input
that any of the rows still needs. A row that has fewer adds weights of zero. As windows follow the weights, any pattern
can be packed, and on uniform random masks 90 % sparse just 14 % (window 128) of what is stored are zeros; none but the
last step's where the window holds all inputs.

Two kinds of panels hold a phase as
- dot: a byte for each row and step, relative to the window's start, or two bytes where the window is a wide one, then
  the values as stored;
- tile: a uint16 for each row and step, the input times :func:`tile_unit`, then the values as float32. A weight of zero
  that was added names the input after the last, of which a tile keeps a row of zeros.
Indices are stored row by row, and so are a tile panel's values; those of a dot panel step by step, as are its indices
of two bytes, but for values of eight bits, of which four of a row are multiplied at once.

A shared tile panel is one of rows that share their indices by fours. Its groups are of two kinds: those of a tile
panel, for rows that have too few partners, and shared ones. The latter are four fours of up to four rows each; a phase
of theirs holds the indices of each four once, then for each step the values of its four rows. Lanes that are left have
weights of zero.

Values of eight bits have a tile panel of their own, one phase for each group (:mod:`.quads`). Beside both kinds of
panels lie each lane's scale, and the sum of its values.
"""

from collections.abc import Callable
from typing import Any, Final

import numba as typed_numba

from srigl_fx.runtime.cpu.kernels import job
from srigl_fx.runtime.cpu.kernels.canonical import index_of, index_row
from srigl_fx.runtime.cpu.kernels.job import GROUP_AT, GROUP_PHASE, GROUP_QUADS, GROUP_ROW, GROUP_SHARED, GROUP_WORDS
from srigl_fx.runtime.cpu.kernels.plan import (
    INT8_DOT,
    INT8_STEP,
    INT8_TILE,
    LANES,
    SHARED_TILE,
    STEPS,
    TILE,
    WIDE_WINDOW,
)
from srigl_fx.runtime.cpu.kernels.quads import fill_quads, quads_bytes, single_quads
from srigl_fx.runtime.cpu.kernels.values import value_at, value_bytes
from srigl_fx.runtime.cpu.kernels.vector import bytes_, floats, ints, shorts, signed_bytes, words

numba: Any = typed_numba  # half of its functions are annotated
Pointer = Any
SLOTS: Final = LANES * STEPS
TILE_BYTES: Final = 6 * SLOTS  # of one phase
TILE_UNIT: Final = 16  # the largest
TILE_VALUES: Final = 2 * SLOTS  # where its values start
SHARING: Final = 4  # rows that share their inputs, in a shared group
FOURS: Final = LANES // SHARING  # of such rows in a group
SHARED_VALUES: Final = 2 * FOURS * STEPS  # where the values of a shared group's phase start
SHARED_BYTES: Final = SHARED_VALUES + 4 * SLOTS  # of such a phase
_ROWS, _COUNTS = LANES, 2 * LANES  # in the scratch, behind a cursor for each source of indices: its rows
_NONE: Final = 1 << 40


def _compiled(function: Callable[..., Any]) -> Any:
    return numba.njit(error_model="numpy")(function)


@_compiled
def _dot_index_bytes(window: int) -> int:
    """The bytes of an index of a dot panel."""
    return 2 if window >= WIDE_WINDOW else 1


@_compiled
def dot_bytes(value_type: int, window: int) -> int:
    """The bytes of one phase of a dot panel."""
    return SLOTS * (int(_dot_index_bytes(window)) + int(value_bytes(value_type)))


@_compiled
def _phase_bytes(j: Pointer, shared: bool) -> int:
    """The bytes of one phase, of a group of this kind, of the panel that the job's kernel reads."""
    kernel = j[job.KERNEL]
    if shared:
        return SHARED_BYTES
    if kernel in (TILE, SHARED_TILE):
        return TILE_BYTES
    return dot_bytes(j[job.VALUE_TYPE], j[job.PANEL_WINDOW])  # type: ignore[no-any-return]


@_compiled
def tile_unit(in_features: int) -> int:
    """What the inputs of a tile panel are counted in, where it can be so much that addressing them takes no shift."""
    return TILE_UNIT if (in_features + 1) * TILE_UNIT <= 1 << 16 else 1


@_compiled
def _most_rows(j: Pointer, row: int) -> int:
    """How many rows a group that starts with ``row`` may have."""
    active, n_active, block_rows = ints(j[job.ACTIVE]), j[job.N_ACTIVE], j[job.BLOCK_ROWS]
    block = int(active[row]) // block_rows
    rows = 1
    while rows < LANES and row + rows < n_active and int(active[row + rows]) // block_rows == block:
        rows += 1
    return rows


@_compiled
def _take_fours(j: Pointer, row: int, rows: int, sources: Pointer) -> int:
    """Let rows from ``row`` on, ``rows`` at most, be a group of fours that share their inputs; returns how many are."""
    four = taken = 0
    while four < FOURS:
        count = 0
        while count < SHARING and taken + count < rows:
            if count > 0 and index_row(j, row + taken + count) != index_row(j, row + taken):
                break
            count += 1
        sources[_ROWS + four], sources[_COUNTS + four] = row + taken, count
        taken += count
        four += 1
    return taken


@_compiled
def _take_group(j: Pointer, row: int, sources: Pointer) -> Any:
    """The rows of the group that starts with ``row``, and whether they share their inputs; ``sources`` are set to it.

    Four rows that share their inputs take half the time of four others, and a group takes as long if it has fewer.
    """
    rows = _most_rows(j, row)
    for i in range(LANES):
        sources[i] = 0
        sources[_COUNTS + i] = 0
    if j[job.KERNEL] == SHARED_TILE:
        shared = _take_fours(j, row, rows, sources)
        if 2 * shared > rows:
            return shared, True
    for i in range(LANES):
        sources[_ROWS + i], sources[_COUNTS + i] = row + i, 1 if i < rows else 0
    return rows, False


@_compiled
def _next_index(j: Pointer, source: int, sources: Pointer) -> int:
    """The input of the next kept weight of a source, or _NONE where its rows end, or their padding starts."""
    cursor = sources[source]
    if sources[_COUNTS + source] == 0 or cursor == j[job.K]:
        return _NONE
    row = sources[_ROWS + source]
    index = index_of(j, row, cursor)
    if cursor > 0 and index == index_of(j, row, cursor - 1):
        return _NONE
    return index  # type: ignore[no-any-return]


@_compiled
def _window_start(j: Pointer, sources: Pointer) -> int:
    """Where the next window of a group starts, or _NONE at its end. A window ends within the inputs where it can."""
    start = _NONE
    for source in range(LANES):
        start = min(start, _next_index(j, source, sources))
    if start != _NONE:
        # Bytes that lie across two cache lines take twice as long to read, half of which this spares them; windows of
        # 64 inputs then leave a tenth more gaps.
        if j[job.KERNEL] == INT8_DOT and j[job.PANEL_WINDOW] <= 2 * SLOTS:
            start = start // INT8_STEP * INT8_STEP
        start = max(0, min(start, j[job.IN_FEATURES] - j[job.PANEL_WINDOW]))
    return start


@_compiled
def _next_in_window(j: Pointer, source: int, sources: Pointer, end: int) -> int:
    """Which weight of its rows the next one of a source is, if its input lies before ``end``; else -1."""
    if _next_index(j, source, sources) < end:
        sources[source] += 1
        return sources[source] - 1  # type: ignore[no-any-return]
    return -1


def measure_panel(j: Pointer, scratch: int) -> None:
    """Count groups, phases and bytes of a panel into the job. ``scratch`` is the address of SCRATCH_WORDS words."""
    sources = words(scratch)
    groups = phases = bytes_of_all = row = 0
    while row < j[job.N_ACTIVE]:
        rows, shared = _take_group(j, row, sources)
        first = phases
        start = _NONE if j[job.KERNEL] == INT8_TILE else _window_start(j, sources)
        phases += 1 if j[job.KERNEL] == INT8_TILE else 0
        while start != _NONE:
            for source in range(LANES):
                for _ in range(STEPS):
                    _next_in_window(j, source, sources, start + j[job.PANEL_WINDOW])
            phases += 1
            start = _window_start(j, sources)
        groups += 1
        if j[job.KERNEL] == INT8_TILE:
            bytes_of_all += quads_bytes(j, row, rows, single_quads(j, row, rows, scratch))
        else:
            bytes_of_all += (phases - first) * _phase_bytes(j, shared)
        row += rows
    j[job.PANEL_COUNT] = groups
    j[job.PANEL_PHASES] = phases
    j[job.PANEL_BYTES] = bytes_of_all


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
def _fill_phase(j: Pointer, at: int, start: int, sources: Pointer) -> None:
    value_type, is_tile = j[job.VALUE_TYPE], j[job.KERNEL] in (TILE, SHARED_TILE)
    wide, narrow = shorts(at), bytes_(at)
    values, k = j[job.VALUES], j[job.K]
    size, index_bytes = value_bytes(value_type), _dot_index_bytes(j[job.PANEL_WINDOW])
    for lane in range(LANES):
        row = sources[_ROWS + lane]
        for step in range(STEPS):
            place = lane * STEPS + step
            slot = place if size == 1 else step * LANES + lane
            i = _next_in_window(j, lane, sources, start + j[job.PANEL_WINDOW])
            if is_tile:
                index = j[job.IN_FEATURES] if i < 0 else index_of(j, row, i)
                wide[place] = index * tile_unit(j[job.IN_FEATURES])
                floats(at + TILE_VALUES)[place] = 0.0 if i < 0 else value_at(values, value_type, row * k + i)
            else:
                index = 0 if i < 0 else index_of(j, row, i) - start
                if index_bytes == 2:
                    wide[slot] = index
                else:
                    narrow[place] = index
                value = at + SLOTS * index_bytes + slot * size
                _copy_value(value, 0 if i < 0 else values + (row * k + i) * size, size)


@_compiled
def _fill_shared_phase(j: Pointer, at: int, start: int, sources: Pointer) -> None:
    k, value_type = j[job.K], j[job.VALUE_TYPE]
    for four in range(FOURS):
        row, rows = sources[_ROWS + four], sources[_COUNTS + four]
        for step in range(STEPS):
            place = four * STEPS + step
            i = _next_in_window(j, four, sources, start + j[job.PANEL_WINDOW])
            index = j[job.IN_FEATURES] if i < 0 else index_of(j, row, i)
            shorts(at)[place] = index * tile_unit(j[job.IN_FEATURES])
            found = floats(at + SHARED_VALUES + 4 * SHARING * place)
            for r in range(SHARING):
                found[r] = 0.0 if i < 0 or r >= rows else value_at(j[job.VALUES], value_type, (row + r) * k + i)


@_compiled
def _fill_scales(j: Pointer, row: int, rows: int, group: int) -> None:
    """Each lane's scale, and the sum of its values."""
    k, given = j[job.K], floats(j[job.SCALES])
    scales, sums = floats(j[job.PANEL_SCALES]), ints(j[job.PANEL_SUMS])
    for lane in range(LANES):
        total, scale = 0, 0.0
        if lane < rows:
            scale = given[row + lane]
            for i in range(k):
                if i == 0 or index_of(j, row + lane, i) != index_of(j, row + lane, i - 1):
                    total += signed_bytes(j[job.VALUES])[(row + lane) * k + i]
        scales[group * LANES + lane], sums[group * LANES + lane] = scale, total


@_compiled
def _fill_outputs(j: Pointer, row: int, rows: int, shared: bool, sources: Pointer, outputs: Pointer) -> None:
    """Each lane's output; a lane without a row is given the output after the last."""
    active = ints(j[job.ACTIVE])
    for lane in range(LANES):
        source, place = (lane // SHARING, lane % SHARING) if shared else (lane, 0)
        used = place < sources[_COUNTS + source]
        outputs[lane] = active[sources[_ROWS + source] + place] if used else j[job.OUT_FEATURES]


def fill_panel(j: Pointer, scratch: int) -> None:
    """Write a panel whose sizes are known: phases, where each group starts, each phase's window, each lane's output.

    ``scratch`` is as for :func:`measure_panel`.
    """
    sources, groups = words(scratch), words(j[job.PANEL_GROUPS])
    starts = ints(j[job.PANEL_STARTS])
    phase = group = row = at = 0
    while row < j[job.N_ACTIVE]:
        rows, shared = _take_group(j, row, sources)
        found = group * GROUP_WORDS
        groups[found + GROUP_PHASE], groups[found + GROUP_ROW] = phase, row
        groups[found + GROUP_AT], groups[found + GROUP_SHARED], groups[found + GROUP_QUADS] = at, 1 if shared else 0, 0
        _fill_outputs(j, row, rows, shared, sources, ints(j[job.PANEL_ROWS] + group * LANES * 4))
        if j[job.SCALES] != 0:
            _fill_scales(j, row, rows, group)
        start = _NONE
        if j[job.KERNEL] == INT8_TILE:
            single = single_quads(j, row, rows, scratch)
            groups[found + GROUP_QUADS] = single
            fill_quads(j, row, rows, single, scratch, j[job.PANEL] + at)
            starts[phase] = 0
            phase += 1
            at += quads_bytes(j, row, rows, single)
        else:
            start = _window_start(j, sources)
        while start != _NONE:
            starts[phase] = start
            if shared:
                _fill_shared_phase(j, j[job.PANEL] + at, start, sources)
            else:
                _fill_phase(j, j[job.PANEL] + at, start, sources)
            phase += 1
            at += _phase_bytes(j, shared)
            start = _window_start(j, sources)
        group += 1
        row += rows
    found = group * GROUP_WORDS
    groups[found + GROUP_PHASE], groups[found + GROUP_ROW] = phase, row
    groups[found + GROUP_AT], groups[found + GROUP_SHARED], groups[found + GROUP_QUADS] = at, 0, 0
