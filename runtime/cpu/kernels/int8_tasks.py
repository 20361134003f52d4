"""The tasks of linear layers with values of eight bits. Importing it imports Numba.

Owns the way of data through them: rounded samples (:mod:`.int8_samples`) are multiplied, and scaled into finished
outputs.
"""

from typing import Any, Final

from srigl_fx.runtime.cpu.kernels import job, plan
from srigl_fx.runtime.cpu.kernels.activations import activate_row
from srigl_fx.runtime.cpu.kernels.compiled import BYTE_LOOKUP, NARROW, compiled, planned
from srigl_fx.runtime.cpu.kernels.int8 import dot_group
from srigl_fx.runtime.cpu.kernels.int8_outputs import (
    output_bytes,
    put_outputs,
    put_tile_as_columns,
    put_tile_as_rows,
    spare_bytes,
)
from srigl_fx.runtime.cpu.kernels.int8_rounding import TILE_ROW
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
from srigl_fx.runtime.cpu.kernels.int8_tiles import BLOCK_GROUPS, ROOM, multiply_linear_tile
from srigl_fx.runtime.cpu.kernels.job import GROUP_AT, GROUP_PHASE, GROUP_ROW, GROUP_WORDS
from srigl_fx.runtime.cpu.kernels.linear_tasks import store_as_rows
from srigl_fx.runtime.cpu.kernels.plan import CACHE_LINE, INT8_COLUMNS, KNOWN_BYTES, LANES
from srigl_fx.runtime.cpu.kernels.tiles import first_output, start_outputs
from srigl_fx.runtime.cpu.kernels.vector import allocate, floats, ints, release, words

Pointer = Any
_DOT_GROUPS: Final = 16  # groups of rows whose outputs stay in the first-level cache
_PART_BYTES: Final = 1 << 19  # of a panel, which stay in a second-level cache
_row_bytes, _tile_columns = planned(plan.int8_row_bytes), planned(plan.int8_tile_columns)
_MOST_AT_ONCE: Final = 16 if BYTE_LOOKUP else 4  # samples of a group of rows: as many as sums fit in registers


@compiled
def _no_dot(
    window: int,
    samples: int,
    x: int,
    x_row: int,
    at: int,
    start: int,
    phases: int,
    offsets: int,
    scales: int,
    weight_sums: int,
    weight_scales: int,
    to: int,
    to_row: int,
) -> None:
    pass


def _case(samples: int, otherwise: Any) -> Any:
    """A function that adds one group for so many samples, and does what ``otherwise`` does for other numbers."""
    narrow = dot_group(64, samples)
    wide = dot_group(128, samples) if BYTE_LOOKUP else narrow

    def dot(
        window: int,
        given: int,
        x: int,
        x_row: int,
        at: int,
        start: int,
        phases: int,
        offsets: int,
        scales: int,
        weight_sums: int,
        weight_scales: int,
        to: int,
        to_row: int,
    ) -> None:
        if given != samples:
            otherwise(
                window, given, x, x_row, at, start, phases, offsets, scales, weight_sums, weight_scales, to, to_row
            )
        elif window == 64:
            narrow(x, x_row, at, start, phases, offsets, scales, weight_sums, weight_scales, to, to_row)
        else:
            wide(x, x_row, at, start, phases, offsets, scales, weight_sums, weight_scales, to, to_row)

    return compiled(dot)


_dot = _no_dot
for _samples in (1, 2, 4, 8, 16):
    if _samples <= _MOST_AT_ONCE:
        _dot = _case(_samples, _dot)


@compiled
def _largest_case(samples: int) -> int:
    """The most samples, at most so many, that are multiplied at once."""
    found = _MOST_AT_ONCE
    while found > samples:
        found //= 2
    return found


@compiled
def _multiply_group(
    j: Pointer, g: int, samples: int, x: int, x_row: int, known: int, out: int, out_row: int, spare: int
) -> None:
    """Add what a group of rows is for some samples to their outputs: the first sample's output 0 would be at ``out``.

    ``x`` are the first sample's bytes and ``known`` what is known of it; ``spare`` is room for 16 outputs.
    """
    groups, outputs = words(j[job.PANEL_GROUPS]), ints(j[job.PANEL_ROWS])
    phase, row = groups[g * GROUP_WORDS + GROUP_PHASE], groups[g * GROUP_WORDS + GROUP_ROW]
    phases = groups[(g + 1) * GROUP_WORDS + GROUP_PHASE] - phase
    rows = groups[(g + 1) * GROUP_WORDS + GROUP_ROW] - row
    at, start = j[job.PANEL] + groups[g * GROUP_WORDS + GROUP_AT], j[job.PANEL_STARTS] + phase * 4
    sums, scales = j[job.PANEL_SUMS] + g * LANES * 4, j[job.PANEL_SCALES] + g * LANES * 4
    o = int(outputs[g * LANES])
    in_place = rows == LANES and outputs[g * LANES + LANES - 1] == o + LANES - 1
    s = 0
    while s < samples:
        step = _largest_case(samples - s) if in_place else 1
        to = out + s * out_row + o * 4 if in_place else spare
        if not in_place:
            for lane in range(LANES):
                floats(spare)[lane] = 0.0
        of_x = known + 4 * s
        x_offsets, x_scales, first = of_x + OFFSETS, of_x + SCALES, x + s * x_row
        window = j[job.PANEL_WINDOW]
        _dot(window, step, first, x_row, at, start, phases, x_offsets, x_scales, sums, scales, to, out_row)
        if not in_place:
            for lane in range(rows):
                floats(out + s * out_row)[outputs[g * LANES + lane]] += floats(spare)[lane]
        s += step


@compiled
def _multiply_block(
    j: Pointer, g0: int, g1: int, first: int, samples: int, x: int, x_row: int, known: int, out: int, out_row: int
) -> None:
    """The outputs of some groups of rows for a few samples; ``out`` is room for them and one more, ``out_row`` bytes
    each.

    In y the rows of samples are often a multiple of 4 KB apart, of which a first-level cache holds few.
    """
    n, bias = j[job.OUT_FEATURES], floats(j[job.BIAS])
    o0, o1 = first_output(j, g0), first_output(j, g1)
    for s in range(samples):
        to = floats(out + s * out_row)
        if j[job.RESIDUAL] != 0:
            residual = floats(j[job.RESIDUAL] + (first + s) * n * 4)
            for o in range(o0, o1):
                to[o - o0] = bias[o] + residual[o]
        else:
            for o in range(o0, o1):
                to[o - o0] = bias[o]
    for g in range(g0, g1):
        _multiply_group(j, g, samples, x, x_row, known, out - o0 * 4, out_row, out + samples * out_row)
    for s in range(samples):
        activate_row(floats(out + s * out_row), o1 - o0, j[job.ACTIVATION])
        put_outputs(j, out + s * out_row, (first + s) * n + o0, o1 - o0)


@compiled
def _end_of_part(j: Pointer, g0: int, g1: int) -> int:
    """The last group, and one more, of those from ``g0`` on that a second-level cache holds beside some samples."""
    groups = words(j[job.PANEL_GROUPS])
    first, g = groups[g0 * GROUP_WORDS + GROUP_AT], min(g0 + 1, g1)
    while g < g1 and groups[(g + 1) * GROUP_WORDS + GROUP_AT] - first <= _PART_BYTES:
        g += 1
    return g


@compiled
def _widest_block(j: Pointer, g0: int, g1: int) -> int:
    """The most outputs of a block of groups; more than there are rows where some are ablated."""
    found, g = first_output(j, g1) - first_output(j, g0) if g0 == g1 else 0, g0
    while g < g1:
        end = min(g + _DOT_GROUPS, g1)
        found, g = max(found, first_output(j, end) - first_output(j, g)), end
    return found


def int8_dot_task(j: Pointer, task: int) -> None:
    """A share of the groups of a dot panel of eight bits, for every sample."""
    count, splits, in_features = j[job.PANEL_COUNT], j[job.ROW_SPLITS], j[job.IN_FEATURES]
    batch, g0, g1 = j[job.BATCH], count * task // splits, count * (task + 1) // splits
    x_row, shared = _row_bytes(in_features, j[job.PANEL_WINDOW]), j[job.PACKED] != 0
    # An odd number of cache lines, so that the rows of samples do not meet in the first-level cache.
    out_row = (_widest_block(j, g0, g1) * 4 // CACHE_LINE // 2 * 2 + 3) * CACHE_LINE
    out_bytes = (min(batch, _MOST_AT_ONCE) + 1) * out_row
    memory = allocate(KNOWN_BYTES + 3 * CACHE_LINE + out_bytes + (0 if shared else min(batch, INT8_COLUMNS) * x_row))
    if memory == 0:
        j[job.FAILED] = 1
        return
    out = aligned(memory)
    found, own = out + out_bytes, out + out_bytes + 2 * CACHE_LINE
    for first in range(0, batch, INT8_COLUMNS):
        samples = min(batch - first, INT8_COLUMNS)
        known, rounded = own, own + KNOWN_BYTES
        if shared:
            known, rounded = known_of(j, first), j[job.PACKED] + first * x_row
        else:
            measure_samples(j, first, samples, known, found)
            for s in range(samples):
                round_sample(j, first + s, known + 4 * s, rounded + s * x_row)
        # A panel may be too large for a second-level cache: all samples read a part of it before the next comes.
        part = g0
        while True:
            part_end = _end_of_part(j, part, g1)
            for s in range(0, samples, _MOST_AT_ONCE):
                some, x, of_x, g = min(samples - s, _MOST_AT_ONCE), rounded + s * x_row, known + 4 * s, part
                while True:
                    end = min(g + _DOT_GROUPS, part_end)
                    _multiply_block(j, g, end, first + s, some, x, x_row, of_x, out, out_row)
                    if end == part_end:
                        break
                    g = end
            if part_end == g1:
                break
            part = part_end
    release(memory)


def int8_tile_task(j: Pointer, task: int) -> None:
    """A share of the rows for one tile of up to 64 samples."""
    splits, count, n, in_features = j[job.ROW_SPLITS], j[job.PANEL_COUNT], j[job.OUT_FEATURES], j[job.IN_FEATURES]
    tile, part = task // splits, task % splits
    first = tile * INT8_COLUMNS
    columns = min(INT8_COLUMNS, j[job.BATCH] - first)
    width = _tile_columns(NARROW, columns)
    # Rounded outputs are transposed by 16 rows at a time.
    rounded = output_bytes(j) == 1
    spare_at = (n + LANES if rounded else n) * width * 4
    out_bytes, shared = spare_at + (spare_bytes(j) if rounded else 0), j[job.PACKED] != 0
    memory = allocate(
        ROOM + out_bytes + KNOWN_BYTES + (3 + FILL_LINES) * CACHE_LINE + (0 if shared else in_features * width)
    )
    if memory == 0:
        j[job.FAILED] = 1
        return
    room = aligned(memory)
    out = room + ROOM
    known, inputs = known_of(j, first), j[job.PACKED] + tile * in_features * TILE_ROW
    if not shared:
        known, scratch = out + out_bytes, out + out_bytes + KNOWN_BYTES
        inputs = scratch + FILL_LINES * CACHE_LINE
        for i in range(KNOWN_BYTES // 4):
            ints(known)[i] = 0
        measure_samples(j, first, columns, known, scratch)
        fill_tile(j, first, columns, width, 0, in_features, known, scratch, inputs)
    g0, end = count * part // splits, count * (part + 1) // splits
    o0 = first_output(j, g0)
    while o0 < n:
        g1 = min(end, g0 + BLOCK_GROUPS)
        o1 = n if g1 == count and part == splits - 1 else first_output(j, g1)
        block = out - o0 * width * 4  # so that all blocks use the same memory, which the cache has
        start_outputs(j, g0, g1, o0, o1, width, block)
        multiply_linear_tile(j, g0, g1, inputs, known, width, block, room)
        if j[job.Y_FEATURE_MAJOR] != 0:
            put_tile_as_columns(j, first, columns, width, o0, o1, block)
        elif rounded:
            put_tile_as_rows(j, first, columns, width, o0, o1, block, out + spare_at)
        else:
            store_as_rows(j, first, columns, width, o0, o1, block)
        if g1 == end:
            break
        g0, o0 = g1, o1
    release(memory)
