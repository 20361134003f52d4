"""The tasks of linear layers with values of eight bits. Importing it imports Numba.

Owns the way of data through them: samples are rounded to eight bits, multiplied, and scaled into finished outputs.
"""

from typing import Any, Final

import numpy as np

from srigl_fx.runtime.cpu.kernels import job, panel
from srigl_fx.runtime.cpu.kernels.activations import activate_row
from srigl_fx.runtime.cpu.kernels.compiled import BYTE_LOOKUP, compiled
from srigl_fx.runtime.cpu.kernels.copies import add_floats, copy_floats
from srigl_fx.runtime.cpu.kernels.int8 import (
    TILE_ROW,
    dot_group,
    extremes,
    finish_lanes,
    finish_row,
    round_block,
    round_columns,
    round_row,
    tile_row,
)
from srigl_fx.runtime.cpu.kernels.job import GROUP_PHASE, GROUP_ROW, GROUP_WORDS
from srigl_fx.runtime.cpu.kernels.linear_tasks import start_rows, store_as_columns, store_as_rows
from srigl_fx.runtime.cpu.kernels.panel import SLOTS
from srigl_fx.runtime.cpu.kernels.plan import CACHE_LINE, INT8_COLUMNS, LANES, MOST_INT8_DOT_SAMPLES
from srigl_fx.runtime.cpu.kernels.tiles import first_output, start_outputs
from srigl_fx.runtime.cpu.kernels.vector import allocate, as_float, floats, ints, release, words
from srigl_fx.runtime.quantisation import LARGEST_UNSIGNED, LARGEST_VALUE, OFFSET, SMALLEST

Pointer = Any
_INFINITY: Final = 0x7F800000  # the bits of it
_MINUS_ZERO: Final = 0x80000000
EXTREMES: Final = 2 * CACHE_LINE  # bytes of what is found of a sample
BLOCK_GROUPS: Final = 4  # groups of rows whose outputs stay in the first-level cache
_LARGEST_VALUE, _LARGEST_UNSIGNED = np.float32(LARGEST_VALUE), np.float32(LARGEST_UNSIGNED)
_SMALLEST, _NAN, _ZERO = np.float32(SMALLEST), np.float32(np.nan), np.float32(0)


@compiled
def find_scale(found: int, inverses: Pointer, scales: Pointer, offsets: Pointer, sample: int) -> None:
    """Store by what a sample is multiplied before it is rounded, what one is worth afterwards, and its offset."""
    bits = ints(found)
    largest = top = 0
    for lane in range(LANES):
        largest = max(largest, int(bits[lane]))
        top = max(top, int(bits[LANES + lane]) & 0xFFFFFFFF)
    offset = OFFSET if top > _MINUS_ZERO else 0
    limit = _LARGEST_VALUE if offset != 0 else _LARGEST_UNSIGNED
    size = as_float(largest)
    inverse, scale = _ZERO, _ZERO
    if largest >= _INFINITY:
        scale = _NAN
    elif size >= _SMALLEST:
        inverse, scale = limit / size, size / limit
    inverses[sample], scales[sample], offsets[sample] = inverse, scale, offset


@compiled
def clear(found: int) -> None:
    """Forget what was found of a sample."""
    bits = words(found)
    for i in range(EXTREMES // 8):
        bits[i] = 0


@compiled
def aligned(address: int) -> int:
    """The first cache line that starts there or later."""
    return (address + CACHE_LINE - 1) // CACHE_LINE * CACHE_LINE


_dot_8, _dot_4, _dot_2, _dot_1 = (dot_group(64, samples) for samples in (8, 4, 2, 1))
_wide_8, _wide_4, _wide_2, _wide_1 = (dot_group(128, samples) for samples in (8, 4, 2, 1))


@compiled
def _dot(window: int, samples: int, x: int, x_row: int, at: int, start: int, phases: int, sums: int) -> None:
    """The sums of one group for 1, 2, 4 or 8 samples."""
    if window == 64 or not BYTE_LOOKUP:
        if samples == 8:
            _dot_8(x, x_row, at, start, phases, sums)
        elif samples == 4:
            _dot_4(x, x_row, at, start, phases, sums)
        elif samples == 2:
            _dot_2(x, x_row, at, start, phases, sums)
        else:
            _dot_1(x, x_row, at, start, phases, sums)
    elif samples == 8:
        _wide_8(x, x_row, at, start, phases, sums)
    elif samples == 4:
        _wide_4(x, x_row, at, start, phases, sums)
    elif samples == 2:
        _wide_2(x, x_row, at, start, phases, sums)
    else:
        _wide_1(x, x_row, at, start, phases, sums)


@compiled
def _add_lanes(j: Pointer, g: int, rows: int, finished: int, sample: int) -> None:
    """Add the finished sums of a group's rows to a sample's outputs."""
    outputs = ints(j[job.PANEL_ROWS])
    y, first = j[job.Y] + sample * j[job.OUT_FEATURES] * 4, int(outputs[g * LANES])
    if rows == LANES and outputs[g * LANES + LANES - 1] == first + LANES - 1:
        add_floats(finished, y + first * 4, LANES)
    else:
        for lane in range(rows):
            floats(y)[outputs[g * LANES + lane]] += floats(finished)[lane]


def int8_dot_task(j: Pointer, task: int) -> None:
    """A share of the groups of a dot panel of eight bits, for every sample."""
    count, splits, n, in_features = j[job.PANEL_COUNT], j[job.ROW_SPLITS], j[job.OUT_FEATURES], j[job.IN_FEATURES]
    groups, window, batch = words(j[job.PANEL_GROUPS]), j[job.PANEL_WINDOW], j[job.BATCH]
    g0, g1 = count * task // splits, count * (task + 1) // splits
    o0 = first_output(j, g0)
    o1 = n if task == splits - 1 else first_output(j, g1)
    most = min(batch, MOST_INT8_DOT_SAMPLES)
    x_row = (max(in_features, window) + 2 * SLOTS - 1) // SLOTS * SLOTS
    memory = allocate(most * x_row + 12 * CACHE_LINE + 3 * CACHE_LINE + CACHE_LINE)
    if memory == 0:
        j[job.FAILED] = 1
        return
    sums = aligned(memory)
    found, finished, numbers = sums + 8 * CACHE_LINE, sums + 10 * CACHE_LINE, sums + 11 * CACHE_LINE
    inverses, scales, offsets = floats(numbers), floats(numbers + CACHE_LINE), ints(numbers + 2 * CACHE_LINE)
    rounded = sums + 14 * CACHE_LINE
    for first in range(0, batch, MOST_INT8_DOT_SAMPLES):
        samples = min(batch - first, MOST_INT8_DOT_SAMPLES)
        for s in range(samples):
            x = j[job.X] + (first + s) * in_features * 4
            clear(found)
            extremes(x, in_features, found)
            find_scale(found, inverses, scales, offsets, s)
            round_row(x, in_features, inverses[s], int(offsets[s]), rounded + s * x_row)
            start_rows(j, first + s, o0, o1)
        for g in range(g0, g1):
            phase, row = groups[g * GROUP_WORDS + GROUP_PHASE], groups[g * GROUP_WORDS + GROUP_ROW]
            phases = groups[(g + 1) * GROUP_WORDS + GROUP_PHASE] - phase
            rows = groups[(g + 1) * GROUP_WORDS + GROUP_ROW] - row
            at, start = j[job.PANEL] + phase * 2 * SLOTS, j[job.PANEL_STARTS] + phase * 4
            weight_sums, weight_scales = j[job.PANEL_SUMS] + g * LANES * 4, j[job.PANEL_SCALES] + g * LANES * 4
            s = 0
            while s < samples:
                left = samples - s
                step = 8 if left >= 8 else (4 if left >= 4 else (2 if left >= 2 else 1))
                _dot(window, step, rounded + s * x_row, x_row, at, start, phases, sums)
                for i in range(step):
                    lanes = sums + i * CACHE_LINE
                    finish_lanes(lanes, int(offsets[s + i]), scales[s + i], weight_sums, weight_scales, finished)
                    _add_lanes(j, g, rows, finished, first + s + i)
                s += step
        for s in range(samples):
            activate_row(floats(j[job.Y] + ((first + s) * n + o0) * 4), o1 - o0, j[job.ACTIVATION])
    release(memory)


@compiled
def _scales_of_rows(j: Pointer, first: int, columns: int, found: int, natural: int, ordered: int) -> None:
    """What is known of the samples of a tile, in their order and in that of a tile's rows (zeros where none is)."""
    inverses, scales, offsets = floats(natural), floats(natural + 4 * SLOTS), ints(natural + 8 * SLOTS)
    for c in range(INT8_COLUMNS):
        inverses[c], scales[c], offsets[c] = 0.0, 0.0, 0
    in_features, batch = j[job.IN_FEATURES], j[job.BATCH]
    for c in range(columns):
        clear(found)
        if j[job.X_FEATURE_MAJOR] != 0:
            for f in range(in_features):
                extremes(j[job.X] + (f * batch + first + c) * 4, 1, found)
        else:
            extremes(j[job.X] + (first + c) * in_features * 4, in_features, found)
        find_scale(found, inverses, scales, offsets, c)
    for place in range(INT8_COLUMNS):
        lane, vector, i = place // 16, place // 4 % 4, place % 4
        column = 16 * vector + 4 * lane + i
        floats(ordered)[place], ints(ordered + 4 * SLOTS)[place] = inverses[column], offsets[column]


@compiled
def _fill_from_rows(j: Pointer, first: int, columns: int, ordered: int, staged: int, inputs: int) -> None:
    """The samples ``first ...``, rounded, as columns of a tile of bytes."""
    in_features = j[job.IN_FEATURES]
    x_row = in_features * 4
    for f in range(0, in_features, LANES):
        features = min(LANES, in_features - f)
        for lane in range(4):
            at = j[job.X] + (first + 4 * lane) * x_row + f * 4
            inverses, offsets = ordered + lane * CACHE_LINE, ordered + 4 * SLOTS + lane * CACHE_LINE
            to = inputs + f * TILE_ROW + lane * LANES
            if features == LANES and columns == INT8_COLUMNS:
                round_block(at, x_row, 16 * x_row, inverses, offsets, to, features)
            else:
                for place in range(LANES):
                    sample = 16 * (place // 4) + 4 * lane + place % 4
                    if sample < columns:
                        copy_floats(j[job.X] + (first + sample) * x_row + f * 4, staged + place * CACHE_LINE, features)
                round_block(staged, CACHE_LINE, 4 * CACHE_LINE, inverses, offsets, to, features)


@compiled
def _fill_from_columns(j: Pointer, first: int, columns: int, natural: int, staged: int, inputs: int) -> None:
    """The same from a feature-major tensor."""
    for f in range(j[job.IN_FEATURES]):
        at = j[job.X] + (f * j[job.BATCH] + first) * 4
        if columns < INT8_COLUMNS:
            copy_floats(at, staged, columns)
            at = staged
        round_columns(at, at + 2 * CACHE_LINE, natural, natural + 8 * SLOTS, inputs + f * TILE_ROW)


@compiled
def multiply_tile(j: Pointer, g0: int, g1: int, inputs: int, natural: int, sums: int, out: int) -> None:
    """Store what groups ``g0 <= g < g1`` compute in the tile ``out``; ``natural`` is what is known of the columns."""
    outputs, groups, bias = ints(j[job.PANEL_ROWS]), words(j[job.PANEL_GROUPS]), floats(j[job.BIAS])
    weight_sums, weight_scales = ints(j[job.PANEL_SUMS]), floats(j[job.PANEL_SCALES])
    quads, scales, offsets = panel.quads(j[job.K]), natural + 4 * SLOTS, natural + 8 * SLOTS
    for g in range(g0, g1):
        rows = groups[(g + 1) * GROUP_WORDS + GROUP_ROW] - groups[g * GROUP_WORDS + GROUP_ROW]
        for r in range(g * LANES, g * LANES + rows):
            o = int(outputs[r])
            tile_row(inputs, j[job.PANEL] + r * quads * panel.QUAD_BYTES, quads, sums)
            to = out + o * INT8_COLUMNS * 4
            finish_row(sums, offsets, scales, int(weight_sums[r]), weight_scales[r], bias[o], to, 4)


def int8_tile_task(j: Pointer, task: int) -> None:
    """A share of the rows for one tile of 64 samples."""
    splits, count, n, in_features = j[job.ROW_SPLITS], j[job.PANEL_COUNT], j[job.OUT_FEATURES], j[job.IN_FEATURES]
    tile, part = task // splits, task % splits
    first = tile * INT8_COLUMNS
    columns = min(INT8_COLUMNS, j[job.BATCH] - first)
    out_bytes = n * INT8_COLUMNS * 4
    memory = allocate(out_bytes + in_features * TILE_ROW + 64 * CACHE_LINE)
    if memory == 0:
        j[job.FAILED] = 1
        return
    out = aligned(memory)
    natural = out + out_bytes  # inverses, scales and offsets of 64 columns, then two of them in another order
    ordered, found, sums = natural + 12 * CACHE_LINE, natural + 20 * CACHE_LINE, natural + 22 * CACHE_LINE
    staged, inputs = natural + 26 * CACHE_LINE, natural + 42 * CACHE_LINE
    for i in range(LANES * LANES):
        floats(staged)[i] = 0.0
    _scales_of_rows(j, first, columns, found, natural, ordered)
    if j[job.X_FEATURE_MAJOR] != 0:
        _fill_from_columns(j, first, columns, natural, staged, inputs)
    else:
        _fill_from_rows(j, first, columns, ordered, staged, inputs)
    g0, end = count * part // splits, count * (part + 1) // splits
    o0 = first_output(j, g0)
    while o0 < n:
        g1 = min(end, g0 + BLOCK_GROUPS)
        o1 = n if g1 == count and part == splits - 1 else first_output(j, g1)
        block = out - o0 * INT8_COLUMNS * 4  # so that all blocks use the same memory, which the cache has
        start_outputs(j, g0, g1, o0, o1, INT8_COLUMNS, block)
        multiply_tile(j, g0, g1, inputs, natural, sums, block)
        if j[job.Y_FEATURE_MAJOR] != 0:
            store_as_columns(j, first, columns, INT8_COLUMNS, o0, o1, block)
        else:
            store_as_rows(j, first, columns, INT8_COLUMNS, o0, o1, block)
        if g1 == end:
            break
        g0, o0 = g1, o1
    release(memory)
