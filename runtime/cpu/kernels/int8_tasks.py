"""The tasks of linear layers with values of eight bits. Importing it imports Numba.

Owns the way of data through them: rounded samples (:mod:`.int8_samples`) are multiplied, and scaled into finished
outputs.
"""

from typing import Any, Final

from srigl_fx.runtime.cpu.kernels import job, panel, plan
from srigl_fx.runtime.cpu.kernels.activations import activate_row
from srigl_fx.runtime.cpu.kernels.compiled import BYTE_LOOKUP, compiled, planned
from srigl_fx.runtime.cpu.kernels.copies import add_floats
from srigl_fx.runtime.cpu.kernels.int8 import TILE_ROW, dot_group, finish_lanes, finish_row, tile_row
from srigl_fx.runtime.cpu.kernels.int8_samples import (
    FILL_LINES,
    OFFSETS,
    SCALES,
    aligned,
    fill_tile,
    known_of,
    measure_samples,
    round_sample,
)
from srigl_fx.runtime.cpu.kernels.job import GROUP_PHASE, GROUP_ROW, GROUP_WORDS
from srigl_fx.runtime.cpu.kernels.linear_tasks import start_rows, store_as_columns, store_as_rows
from srigl_fx.runtime.cpu.kernels.panel import SLOTS
from srigl_fx.runtime.cpu.kernels.plan import CACHE_LINE, INT8_COLUMNS, KNOWN_BYTES, LANES, MOST_INT8_DOT_SAMPLES
from srigl_fx.runtime.cpu.kernels.tiles import first_output, start_outputs
from srigl_fx.runtime.cpu.kernels.vector import allocate, floats, ints, release, words

Pointer = Any
BLOCK_GROUPS: Final = 4  # groups of rows whose outputs stay in the first-level cache
_row_bytes = planned(plan.int8_row_bytes)


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
    x_row, shared = _row_bytes(in_features, window), j[job.PACKED] != 0
    memory = allocate(KNOWN_BYTES + 12 * CACHE_LINE + (0 if shared else min(batch, MOST_INT8_DOT_SAMPLES) * x_row))
    if memory == 0:
        j[job.FAILED] = 1
        return
    sums = aligned(memory)
    found, finished, own = sums + 8 * CACHE_LINE, sums + 10 * CACHE_LINE, sums + 11 * CACHE_LINE
    for first in range(0, batch, MOST_INT8_DOT_SAMPLES):
        samples = min(batch - first, MOST_INT8_DOT_SAMPLES)
        known, rounded = own, own + KNOWN_BYTES
        if shared:
            known, rounded = known_of(j, first), j[job.PACKED] + first * x_row
        else:
            measure_samples(j, first, samples, known, found)
        for s in range(samples):
            if not shared:
                round_sample(j, first + s, known + 4 * s, rounded + s * x_row)
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
                    lanes, of_sample = sums + i * CACHE_LINE, known + 4 * (s + i)
                    scale, offset = floats(of_sample + SCALES)[0], int(ints(of_sample + OFFSETS)[0])
                    finish_lanes(lanes, offset, scale, weight_sums, weight_scales, finished)
                    _add_lanes(j, g, rows, finished, first + s + i)
                s += step
        for s in range(samples):
            activate_row(floats(j[job.Y] + ((first + s) * n + o0) * 4), o1 - o0, j[job.ACTIVATION])
    release(memory)


@compiled
def multiply_tile(j: Pointer, g0: int, g1: int, inputs: int, known: int, sums: int, out: int) -> None:
    """Store what groups ``g0 <= g < g1`` compute in the tile ``out``; ``known`` is what is known of the columns."""
    outputs, groups, bias = ints(j[job.PANEL_ROWS]), words(j[job.PANEL_GROUPS]), floats(j[job.BIAS])
    weight_sums, weight_scales = ints(j[job.PANEL_SUMS]), floats(j[job.PANEL_SCALES])
    quads, scales, offsets = panel.quads(j[job.K]), known + SCALES, known + OFFSETS
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
    out_bytes, shared = n * INT8_COLUMNS * 4, j[job.PACKED] != 0
    memory = allocate(
        out_bytes + KNOWN_BYTES + (7 + FILL_LINES) * CACHE_LINE + (0 if shared else in_features * TILE_ROW)
    )
    if memory == 0:
        j[job.FAILED] = 1
        return
    out = aligned(memory)
    sums = out + out_bytes
    known, inputs = known_of(j, first), j[job.PACKED] + tile * in_features * TILE_ROW
    if not shared:
        known, scratch = sums + 4 * CACHE_LINE, sums + 4 * CACHE_LINE + KNOWN_BYTES
        inputs = scratch + FILL_LINES * CACHE_LINE
        for i in range(KNOWN_BYTES // 4):
            ints(known)[i] = 0
        measure_samples(j, first, columns, known, scratch)
        fill_tile(j, first, columns, 0, in_features, known, scratch, inputs)
    g0, end = count * part // splits, count * (part + 1) // splits
    o0 = first_output(j, g0)
    while o0 < n:
        g1 = min(end, g0 + BLOCK_GROUPS)
        o1 = n if g1 == count and part == splits - 1 else first_output(j, g1)
        block = out - o0 * INT8_COLUMNS * 4  # so that all blocks use the same memory, which the cache has
        start_outputs(j, g0, g1, o0, o1, INT8_COLUMNS, block)
        multiply_tile(j, g0, g1, inputs, known, sums, block)
        if j[job.Y_FEATURE_MAJOR] != 0:
            store_as_columns(j, first, columns, INT8_COLUMNS, o0, o1, block)
        else:
            store_as_rows(j, first, columns, INT8_COLUMNS, o0, o1, block)
        if g1 == end:
            break
        g0, o0 = g1, o1
    release(memory)
