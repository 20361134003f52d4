"""What one thread does: a task of a job, from inputs to finished outputs. Importing it imports Numba.

Owns the way of data through a task: fill a tile, multiply, apply the epilogue, store. A task is a function of a job
(:mod:`srigl_fx.runtime.kernels.job`) and a number, so that any pool of threads can run it. Tasks write disjoint
outputs. They are compiled for one instruction set a process.
"""

from collections.abc import Callable
from typing import Any, Final

import numba as typed_numba
import numpy as np

from srigl_fx.runtime.kernels import choice, conv, job, panel
from srigl_fx.runtime.kernels.activations import activate_row
from srigl_fx.runtime.kernels.choice import COLUMNS
from srigl_fx.runtime.kernels.dot import GATHERS, LOADS, dot_group
from srigl_fx.runtime.kernels.isa import AVX2, AVX512, BASELINE, ISAS, compiled_isa
from srigl_fx.runtime.kernels.job import BFLOAT16, FLOAT16, FLOAT32
from srigl_fx.runtime.kernels.panel import GROUP_PHASE, GROUP_ROW, GROUP_WORDS, LANES
from srigl_fx.runtime.kernels.tile import add_rows, phase_of, rows_in_flight, values_of
from srigl_fx.runtime.kernels.vector import allocate, floats, ints, release, shorts, transpose, words

numba: Any = typed_numba  # half of its functions are annotated
Pointer = Any

ISA: Final = compiled_isa()
FASTMATH = {"reassoc", "contract", "nsz"}  # sums may be reordered; NaN and infinity keep their meaning
_INPUT_BYTES: Final = 24 << 10  # of a tile's inputs that are read before moving on; with a window, a first-level cache
_BLOCK_GROUPS: Final = 32  # groups of rows whose sums stay in the second-level cache
_CACHE_LINE: Final = 64
_ZERO: Final = np.float32(0)
_REGISTERS: Final = {BASELINE: 2, AVX2: 4, AVX512: 8}[ISA]  # vectors of sums in flight


def _compiled(function: Callable[..., Any]) -> Any:
    return numba.njit(error_model="numpy", fastmath=FASTMATH)(function)


def _windowed(window: int, value_type: int) -> Any:
    return dot_group({AVX512: window, AVX2: GATHERS}.get(ISA, LOADS), value_type)


_dot_64, _dot_128 = _windowed(64, FLOAT32), _windowed(128, FLOAT32)
_dot_64_bfloat16, _dot_128_bfloat16 = _windowed(64, BFLOAT16), _windowed(128, BFLOAT16)
_dot_64_float16, _dot_128_float16 = _windowed(64, FLOAT16), _windowed(128, FLOAT16)
_add_16, _add_32, _add_64 = (add_rows(width, _REGISTERS) for width in (1, 2, 4))
_rows_16, _rows_32, _rows_64 = (rows_in_flight(width, _REGISTERS) for width in (1, 2, 4))
_phase_of, _values_of = _compiled(phase_of), _compiled(values_of)
_conv_pack, _conv_rows = _compiled(conv.conv_pack), _compiled(conv.conv_rows)
_conv_offsets, _conv_plan = _compiled(conv.conv_tap_offsets), _compiled(conv.conv_plan)
_dot_window, _tile_window = _compiled(choice.dot_window), _compiled(choice.tile_window)
_LEVEL: Final = ISAS.index(ISA)


@_compiled
def _is_finite(x: int, count: int) -> bool:
    found = floats(x)
    total = found[0] * 0.0
    for i in range(count):
        total += found[i] * 0.0
    return total == 0.0  # type: ignore[no-any-return]


@_compiled
def _first_output(j: Pointer, group: int) -> int:
    """The first output row that goes with a group; all groups together have all rows, ablated ones too."""
    if group == 0:
        return 0
    if group >= j[job.PANEL_COUNT]:
        return j[job.OUT_FEATURES]  # type: ignore[no-any-return]
    return int(ints(j[job.PANEL_ROWS])[group * LANES])


@_compiled
def _start_rows(j: Pointer, sample: int, first: int, last: int) -> None:
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


@_compiled
def _plain_row(x: Pointer, values: Pointer, indices: Pointer, first: int, k: int) -> float:
    total = _ZERO
    for i in range(first, first + k):
        total += values[i] * x[indices[i]]
    return total  # type: ignore[no-any-return]


@_compiled
def _add_exact(j: Pointer, sample: int, first: int, last: int) -> None:
    """Add the active rows ``first <= r < last`` to one sample's outputs, from the canonical format."""
    x = floats(j[job.X] + sample * j[job.IN_FEATURES] * 4)
    y = floats(j[job.Y] + sample * j[job.OUT_FEATURES] * 4)
    k, values, value_type = j[job.K], j[job.VALUES], j[job.VALUE_TYPE]
    indices, index_bytes, active = j[job.INDICES], j[job.INDEX_BYTES], ints(j[job.ACTIVE])
    for r in range(first, last):
        if value_type != FLOAT32:
            total = y[active[r]]
            for i in range(r * k, r * k + k):
                total += panel.value_at(values, value_type, i) * x[panel.index_at(indices, index_bytes, i)]
            y[active[r]] = total
        elif index_bytes == 2:
            y[active[r]] += _plain_row(x, floats(values), shorts(indices), r * k, k)
        else:
            y[active[r]] += _plain_row(x, floats(values), ints(indices), r * k, k)


def rows_task(j: Pointer, task: int) -> None:
    """A share of the rows for every sample, from the canonical format: where no panel fits, and on the baseline."""
    n_active, n, splits = j[job.N_ACTIVE], j[job.OUT_FEATURES], j[job.ROW_SPLITS]
    active = ints(j[job.ACTIVE])
    first, last = n_active * task // splits, n_active * (task + 1) // splits
    o0 = 0 if task == 0 else (n if first >= n_active else int(active[first]))
    o1 = n if last >= n_active else int(active[last])
    if task == splits - 1:
        o1 = n
    for sample in range(j[job.BATCH]):
        _start_rows(j, sample, o0, o1)
        _add_exact(j, sample, first, last)
        activate_row(floats(j[job.Y] + (sample * n + o0) * 4), o1 - o0, j[job.ACTIVATION])


def strided_task(j: Pointer, task: int) -> None:
    """All of a feature-major job that no panel fits, from the canonical format: plain and slow."""
    batch, n, in_features, k = j[job.BATCH], j[job.OUT_FEATURES], j[job.IN_FEATURES], j[job.K]
    x, y, bias, active = floats(j[job.X]), floats(j[job.Y]), floats(j[job.BIAS]), ints(j[job.ACTIVE])
    x_sample, x_step = (1, batch) if j[job.X_FEATURE_MAJOR] != 0 else (in_features, 1)
    y_sample, y_step = (1, batch) if j[job.Y_FEATURE_MAJOR] != 0 else (n, 1)
    for sample in range(batch):
        for o in range(n):
            y[sample * y_sample + o * y_step] = bias[o]
        for r in range(j[job.N_ACTIVE]):
            total = y[sample * y_sample + active[r] * y_step]
            for i in range(r * k, r * k + k):
                column = panel.index_at(j[job.INDICES], j[job.INDEX_BYTES], i)
                total += panel.value_at(j[job.VALUES], j[job.VALUE_TYPE], i) * x[sample * x_sample + column * x_step]
            y[sample * y_sample + active[r] * y_step] = total
    if j[job.RESIDUAL] != 0:
        residual = floats(j[job.RESIDUAL])
        for i in range(batch * n):
            y[i] += residual[i]
    activate_row(y, batch * n, j[job.ACTIVATION])


@_compiled
def _dot(j: Pointer, x: int, first: int, phases: int, sums: int) -> None:
    value_type = j[job.VALUE_TYPE]
    at, start = j[job.PANEL] + first * panel.dot_bytes(value_type), j[job.PANEL_STARTS] + first * 4
    if j[job.PANEL_WINDOW] == 64:
        if value_type == FLOAT32:
            _dot_64(x, at, start, phases, sums)
        elif value_type == BFLOAT16:
            _dot_64_bfloat16(x, at, start, phases, sums)
        else:
            _dot_64_float16(x, at, start, phases, sums)
    elif value_type == FLOAT32:
        _dot_128(x, at, start, phases, sums)
    elif value_type == BFLOAT16:
        _dot_128_bfloat16(x, at, start, phases, sums)
    else:
        _dot_128_float16(x, at, start, phases, sums)


def dot_task(j: Pointer, task: int) -> None:
    """A share of the groups of a dot panel, for every sample.

    Weights of zero fill a panel up, and must not meet what is not finite: such a sample is computed exactly.
    """
    count, splits, n = j[job.PANEL_COUNT], j[job.ROW_SPLITS], j[job.OUT_FEATURES]
    groups, outputs = words(j[job.PANEL_GROUPS]), ints(j[job.PANEL_ROWS])
    g0, g1 = count * task // splits, count * (task + 1) // splits
    o0 = _first_output(j, g0)
    o1 = n if task == splits - 1 else _first_output(j, g1)
    memory = allocate(2 * _CACHE_LINE)
    if memory == 0:
        j[job.FAILED] = 1
        return
    sums_at = (memory + _CACHE_LINE - 1) // _CACHE_LINE * _CACHE_LINE
    sums = floats(sums_at)
    in_features = j[job.IN_FEATURES]
    for sample in range(j[job.BATCH]):
        _start_rows(j, sample, o0, o1)
    for g in range(g0, g1):
        first, row = groups[g * GROUP_WORDS + GROUP_PHASE], groups[g * GROUP_WORDS + GROUP_ROW]
        phases = groups[(g + 1) * GROUP_WORDS + GROUP_PHASE] - first
        rows = groups[(g + 1) * GROUP_WORDS + GROUP_ROW] - row
        for sample in range(j[job.BATCH]):
            _dot(j, j[job.X] + sample * in_features * 4, first, phases, sums_at)
            y = floats(j[job.Y] + sample * n * 4)
            for lane in range(rows):
                y[outputs[g * LANES + lane]] += sums[lane]
    release(memory)
    row0, row1 = groups[g0 * GROUP_WORDS + GROUP_ROW], groups[g1 * GROUP_WORDS + GROUP_ROW]
    for sample in range(j[job.BATCH]):
        if not _is_finite(j[job.X] + sample * in_features * 4, in_features):
            _start_rows(j, sample, o0, o1)
            _add_exact(j, sample, row0, row1)
        activate_row(floats(j[job.Y] + (sample * n + o0) * 4), o1 - o0, j[job.ACTIVATION])


@_compiled
def _fill_from_rows(j: Pointer, first: int, columns: int, width: int, inputs: int, f0: int, f1: int) -> None:
    """The samples ``first ...`` as columns of a tile, their inputs ``f0 <= f < f1``."""
    in_features = j[job.IN_FEATURES]
    x, row_bytes = j[job.X] + first * in_features * 4, in_features * 4
    whole_features, whole_columns = f0 + (f1 - f0) // LANES * LANES, columns // LANES * LANES
    tile = floats(inputs)
    for f in range(f0, whole_features, LANES):
        for c in range(0, whole_columns, LANES):
            transpose(x + c * row_bytes + f * 4, row_bytes, inputs + (f * width + c) * 4, width * 4)
    for c in range(columns):
        source = floats(x + c * row_bytes)
        for f in range(whole_features if c < whole_columns else f0, f1):
            tile[f * width + c] = source[f]
    _clear_columns(floats(inputs + f0 * width * 4), f1 - f0, columns, width)


@_compiled
def _clear_columns(tile: Pointer, rows: int, columns: int, width: int) -> None:
    for f in range(rows):
        for c in range(columns, width):
            tile[f * width + c] = 0.0


@_compiled
def _fill_from_columns(source: int, source_row: int, rows: int, columns: int, width: int, inputs: int) -> None:
    """Rows of ``columns`` floats, ``source_row`` bytes apart."""
    for f in range(rows):
        row, tile = floats(source + f * source_row), floats(inputs + f * width * 4)
        for c in range(columns):
            tile[c] = row[c]
    _clear_columns(floats(inputs), rows, columns, width)


@_compiled
def _fill_from_taps(packed: int, offsets: int, rows: int, columns: int, width: int, inputs: int) -> None:
    """A row for each tap of a packed sample, ``columns`` positions from the tap's offset on."""
    at = words(offsets)
    for f in range(rows):
        row, tile = floats(packed + at[f] * 4), floats(inputs + f * width * 4)
        for c in range(columns):
            tile[c] = row[c]
    _clear_columns(floats(inputs), rows, columns, width)


@_compiled
def _add_phases(j: Pointer, g: int, first: int, phases: int, width: int, inputs: int, out: int) -> None:
    """Add some phases of a group to its rows of the output tile."""
    at, outputs = j[job.PANEL], j[job.PANEL_ROWS] + g * LANES * 4
    if width == 64:
        for lane in range(0, LANES, _rows_64):
            indices, values = _phase_of(at, first, lane), _values_of(at, first, lane)
            _add_64(inputs, indices, values, phases, outputs + 4 * lane, out)
    elif width == 32:
        for lane in range(0, LANES, _rows_32):
            indices, values = _phase_of(at, first, lane), _values_of(at, first, lane)
            _add_32(inputs, indices, values, phases, outputs + 4 * lane, out)
    else:
        for lane in range(0, LANES, _rows_16):
            indices, values = _phase_of(at, first, lane), _values_of(at, first, lane)
            _add_16(inputs, indices, values, phases, outputs + 4 * lane, out)


@_compiled
def _multiply(
    j: Pointer, in_features: int, width: int, inputs: int, g0: int, g1: int, out: int, cursors: Pointer
) -> None:
    """Add all that groups ``g0 <= g < g1`` compute; all groups read a part of the inputs before any reads the next."""
    groups, starts = words(j[job.PANEL_GROUPS]), ints(j[job.PANEL_STARTS])
    # Few enough inputs for a first-level cache, enough for twenty weights a row before its sums are put away.
    step = max(_INPUT_BYTES // (4 * width), 20 * in_features // max(1, j[job.K]))
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
                _add_phases(j, g, first, last - first, width, inputs, out)
                cursors[g - g0] = last


@_compiled
def _start_tile(j: Pointer, first: int, last: int, width: int, out: int) -> None:
    """Let the outputs ``first <= o < last`` start as their bias."""
    bias = floats(j[job.BIAS])
    for o in range(first, last):
        row, start = floats(out + o * width * 4), bias[o]
        for c in range(width):
            row[c] = start


@_compiled
def _store_as_rows(j: Pointer, first: int, columns: int, width: int, o0: int, o1: int, out: int) -> None:
    """A tile's outputs ``o0 <= o < o1`` as rows of samples."""
    n = j[job.OUT_FEATURES]
    y, row_bytes = j[job.Y] + first * n * 4, n * 4
    if j[job.RESIDUAL] == 0:
        activate_row(floats(out + o0 * width * 4), (o1 - o0) * width, j[job.ACTIVATION])
    whole_outputs, whole_columns = o0 + (o1 - o0) // LANES * LANES, columns // LANES * LANES
    for o in range(o0, whole_outputs, LANES):
        for c in range(0, whole_columns, LANES):
            transpose(out + (o * width + c) * 4, width * 4, y + c * row_bytes + o * 4, row_bytes)
    tile = floats(out)
    for c in range(columns):
        target = floats(y + c * row_bytes)
        for o in range(whole_outputs if c < whole_columns else o0, o1):
            target[o] = tile[o * width + c]
    if j[job.RESIDUAL] != 0:
        for c in range(columns):
            target = floats(y + c * row_bytes + o0 * 4)
            residual = floats(j[job.RESIDUAL] + ((first + c) * n + o0) * 4)
            for o in range(o1 - o0):
                target[o] += residual[o]
            activate_row(target, o1 - o0, j[job.ACTIVATION])


@_compiled
def _store_as_columns(j: Pointer, first: int, columns: int, width: int, o0: int, o1: int, out: int) -> None:
    """A tile's outputs ``o0 <= o < o1``, feature-major."""
    batch = j[job.BATCH]
    for o in range(o0, o1):
        row, target = floats(out + o * width * 4), floats(j[job.Y] + (o * batch + first) * 4)
        if j[job.RESIDUAL] != 0:
            residual = floats(j[job.RESIDUAL] + (o * batch + first) * 4)
            for c in range(columns):
                row[c] += residual[c]
        activate_row(row, width, j[job.ACTIVATION])
        for c in range(columns):
            target[c] = row[c]


@_compiled
def _width(columns: int) -> int:
    return 16 if columns <= 16 else (32 if columns <= 32 else 64)


@_compiled
def _tile_memory(in_features: int, outputs: int, groups: int) -> int:
    """Scratch of one task: outputs and one more, a cursor for each group of a block, inputs and a row of zeros."""
    floats_ = (in_features + 1 + outputs + 1) * COLUMNS
    return allocate(floats_ * 4 + (groups + 8) // 8 * _CACHE_LINE + _CACHE_LINE)


@_compiled
def _fill_tile(j: Pointer, tile: int, inputs: int, f0: int, f1: int) -> None:
    """The inputs ``f0 <= f < f1`` of a tile of samples; behind the last input, a row of zeros."""
    in_features, first = j[job.IN_FEATURES], tile * COLUMNS
    columns = min(COLUMNS, j[job.BATCH] - first)
    width = _width(columns)
    if j[job.X_FEATURE_MAJOR] != 0:
        row_bytes = j[job.BATCH] * 4
        source, target = j[job.X] + first * 4 + f0 * row_bytes, inputs + f0 * width * 4
        _fill_from_columns(source, row_bytes, f1 - f0, columns, width, target)
    else:
        _fill_from_rows(j, first, columns, width, inputs, f0, f1)
    if f1 == in_features:
        _clear_columns(floats(inputs + in_features * width * 4), 1, 0, width)


@_compiled
def _tile_bytes(j: Pointer) -> int:
    return (j[job.IN_FEATURES] + 1) * COLUMNS * 4  # type: ignore[no-any-return]


def fill_task(j: Pointer, task: int) -> None:
    """A share of the inputs of one of the tiles that tasks share."""
    splits, in_features = j[job.ROW_SPLITS], j[job.IN_FEATURES]
    tile, part = task // splits, task % splits
    blocks = (in_features + LANES - 1) // LANES
    f0, f1 = blocks * part // splits * LANES, min(in_features, blocks * (part + 1) // splits * LANES)
    _fill_tile(j, tile, j[job.INPUTS] + tile * _tile_bytes(j), f0, f1)


def tile_task(j: Pointer, task: int) -> None:
    """A share of the rows for one tile of samples."""
    splits, count, in_features = j[job.ROW_SPLITS], j[job.PANEL_COUNT], j[job.IN_FEATURES]
    tile, part = task // splits, task % splits
    first = tile * COLUMNS
    columns = min(COLUMNS, j[job.BATCH] - first)
    width = _width(columns)
    shared = j[job.INPUTS] != 0
    memory = _tile_memory(0 if shared else in_features, j[job.OUT_FEATURES], _BLOCK_GROUPS)
    if memory == 0:
        j[job.FAILED] = 1
        return
    out = (memory + _CACHE_LINE - 1) // _CACHE_LINE * _CACHE_LINE
    cursors = words(out + (j[job.OUT_FEATURES] + 1) * COLUMNS * 4)
    if shared:
        inputs = j[job.INPUTS] + tile * _tile_bytes(j)
    else:
        inputs = out + (j[job.OUT_FEATURES] + 1) * COLUMNS * 4 + (_BLOCK_GROUPS + 8) // 8 * _CACHE_LINE
        _fill_tile(j, tile, inputs, 0, in_features)
    g0, end = count * part // splits, count * (part + 1) // splits
    o0 = _first_output(j, g0)
    while o0 < j[job.OUT_FEATURES]:
        g1 = min(end, g0 + _BLOCK_GROUPS)
        o1 = j[job.OUT_FEATURES] if g1 == count and part == splits - 1 else _first_output(j, g1)
        _start_tile(j, o0, o1, width, out)
        _multiply(j, in_features, width, inputs, g0, g1, out, cursors)
        if j[job.Y_FEATURE_MAJOR] != 0:
            _store_as_columns(j, first, columns, width, o0, o1, out)
        else:
            _store_as_rows(j, first, columns, width, o0, o1, out)
        if g1 == end:
            break
        g0, o0 = g1, o1
    release(memory)


@_compiled
def _store_positions(j: Pointer, sample: int, begin: int, end: int, width: int, o0: int, o1: int, out: int) -> None:
    """A tile's outputs at the packed positions ``begin <= p < end``, without those between the output's rows."""
    geometry = words(j[job.GEOMETRY])
    out_d, out_h, out_w = geometry[conv.OUT_D], geometry[conv.OUT_H], geometry[conv.OUT_W]
    packed_h, packed_w = geometry[conv.PACKED_H], geometry[conv.PACKED_W]
    plane = out_d * out_h * out_w
    activation, has_residual = j[job.ACTIVATION], j[job.RESIDUAL] != 0
    if not has_residual:
        activate_row(floats(out + o0 * width * 4), (o1 - o0) * width, activation)
    for row in range(begin // packed_w, (end - 1) // packed_w + 1):
        d = row // packed_h
        h = row - d * packed_h
        w = max(0, begin - row * packed_w)
        count = min(out_w, end - row * packed_w) - w
        if h < out_h and count > 0:
            source = row * packed_w - begin + w
            target = (d * out_h + h) * out_w + w
            for o in range(o0, o1):
                at = ((sample * j[job.OUT_FEATURES] + o) * plane + target) * 4
                y, found = floats(j[job.Y] + at), floats(out + (o * width + source) * 4)
                if has_residual:
                    residual = floats(j[job.RESIDUAL] + at)
                    for p in range(count):
                        y[p] = found[p] + residual[p]
                    activate_row(y, count, activation)
                else:
                    for p in range(count):
                        y[p] = found[p]


@_compiled
def conv_positions(geometry: Pointer) -> int:
    """The packed positions that a sample's outputs lie among."""
    rows = (geometry[conv.OUT_D] - 1) * geometry[conv.PACKED_H] + geometry[conv.OUT_H] - 1
    return rows * geometry[conv.PACKED_W] + geometry[conv.OUT_W]  # type: ignore[no-any-return]


def conv_tile_task(j: Pointer, task: int) -> None:
    """A share of the filters for one tile of positions of one packed sample."""
    splits, count = j[job.ROW_SPLITS], j[job.PANEL_COUNT]
    geometry = words(j[job.GEOMETRY])
    positions = conv_positions(geometry)
    tiles = (positions + COLUMNS - 1) // COLUMNS
    tile, part = task // splits % tiles, task % splits
    within = task // splits // tiles
    sample = j[job.SAMPLE] + within
    begin = tile * COLUMNS
    end = min(positions, begin + COLUMNS)
    width = _width(end - begin)
    in_features, n = j[job.IN_FEATURES], j[job.OUT_FEATURES]
    blocks = geometry[conv.GROUPS]
    block_rows, block_floats = n // blocks, geometry[conv.CHANNELS] // blocks
    for i in range(conv.PLANES_D, conv.PACKED_W + 1):
        block_floats *= geometry[i]
    memory = _tile_memory(in_features, n, _BLOCK_GROUPS)
    if memory == 0:
        j[job.FAILED] = 1
        return
    out = (memory + _CACHE_LINE - 1) // _CACHE_LINE * _CACHE_LINE
    cursors = words(out + (n + 1) * COLUMNS * 4)
    inputs = out + (n + 1) * COLUMNS * 4 + (_BLOCK_GROUPS + 8) // 8 * _CACHE_LINE
    _clear_columns(floats(inputs + in_features * width * 4), 1, 0, width)
    packed = j[job.PACKED] + within * j[job.PACKED_SIZE] * 4
    last, g0 = count * (part + 1) // splits, count * part // splits
    o0, filled = _first_output(j, g0), -1
    while o0 < n:
        g1 = g0
        block = -1 if g0 >= last else int(ints(j[job.PANEL_ROWS])[g0 * LANES]) // block_rows
        while g1 < min(last, g0 + _BLOCK_GROUPS) and int(ints(j[job.PANEL_ROWS])[g1 * LANES]) // block_rows == block:
            g1 += 1
        if block != filled and block >= 0:
            source = packed + (block * block_floats + begin) * 4
            _fill_from_taps(source, j[job.OFFSETS], in_features, end - begin, width, inputs)
            filled = block
        o1 = n if g1 == count and part == splits - 1 else _first_output(j, g1)
        _start_tile(j, o0, o1, width, out)
        _multiply(j, in_features, width, inputs, g0, g1, out, cursors)
        _store_positions(j, sample, begin, end, width, o0, o1, out)
        if g1 == last:
            break
        g0, o0 = g1, o1
    release(memory)


def conv_pack_task(j: Pointer, task: int) -> None:
    """A share of the channels of one sample, packed."""
    splits = j[job.ROW_SPLITS]
    within, part = task // splits, task % splits
    geometry = words(j[job.GEOMETRY])
    channels = geometry[conv.CHANNELS]
    packed = floats(j[job.PACKED] + within * j[job.PACKED_SIZE] * 4)
    first, last = channels * part // splits, channels * (part + 1) // splits
    _conv_pack(floats(j[job.X]), packed, geometry, j[job.SAMPLE] + within, first, last)


def conv_rows_task(j: Pointer, task: int) -> None:
    """A share of the filters for one packed sample, from the canonical format: where no panel fits, as depthwise.

    The values are float32.
    """
    splits, n, n_active = j[job.ROW_SPLITS], j[job.OUT_FEATURES], j[job.N_ACTIVE]
    within, part = task // splits, task % splits
    geometry, active = words(j[job.GEOMETRY]), ints(j[job.ACTIVE])
    first, last = n_active * part // splits, n_active * (part + 1) // splits
    o0 = 0 if part == 0 else (n if first >= n_active else int(active[first]))
    o1 = n if part == splits - 1 or last >= n_active else int(active[last])
    memory = allocate(conv.ACCUMULATORS * 4 + _CACHE_LINE)
    if memory == 0:
        j[job.FAILED] = 1
        return
    accumulators = floats((memory + _CACHE_LINE - 1) // _CACHE_LINE * _CACHE_LINE)
    sample = j[job.SAMPLE] + within
    plane = geometry[conv.OUT_D] * geometry[conv.OUT_H] * geometry[conv.OUT_W]
    y, bias, values = floats(j[job.Y]), floats(j[job.BIAS]), floats(j[job.VALUES])
    for o in range(o0, o1):
        for p in range(plane):
            y[(sample * n + o) * plane + p] = bias[o]
    at = j[job.X] if geometry[conv.DIRECT] else j[job.PACKED] + within * j[job.PACKED_SIZE] * 4
    packed, offsets = floats(at), words(j[job.OFFSETS])
    if j[job.INDEX_BYTES] == 2:
        indices = shorts(j[job.INDICES])
        _conv_rows(packed, values, indices, active, bias, y, geometry, offsets, accumulators, sample, first, last)
    else:
        long = ints(j[job.INDICES])
        _conv_rows(packed, values, long, active, bias, y, geometry, offsets, accumulators, sample, first, last)
    release(memory)
    if j[job.RESIDUAL] != 0:
        residual = floats(j[job.RESIDUAL])
        for p in range((sample * n + o0) * plane, (sample * n + o1) * plane):
            y[p] += residual[p]
    activate_row(floats(j[job.Y] + (sample * n + o0) * plane * 4), (o1 - o0) * plane, j[job.ACTIVATION])


def conv_offsets(j: Pointer, unused: int) -> None:
    """Write where a packed sample's taps start."""
    _conv_offsets(words(j[job.OFFSETS]), words(j[job.GEOMETRY]))


def conv_plan(j: Pointer, unused: int) -> None:
    """Complete the geometry of a convolution, whose sizes and settings are filled in."""
    _conv_plan(words(j[job.GEOMETRY]))


def choose_window(j: Pointer, is_tile: int) -> None:
    """Choose the window of a panel; 0 where there is no panel of this kind."""
    in_features, n_active, k = j[job.IN_FEATURES], j[job.N_ACTIVE], j[job.K]
    j[job.PANEL_IS_TILE] = is_tile
    if is_tile != 0:
        j[job.PANEL_WINDOW] = _tile_window(in_features, n_active, k)
    else:
        j[job.PANEL_WINDOW] = _dot_window(_LEVEL, in_features, n_active, k)


def phase_size(j: Pointer, unused: int) -> None:
    """Store the bytes of a phase as the address of the panel, which is still to come."""
    j[job.PANEL] = panel.TILE_BYTES if j[job.PANEL_IS_TILE] != 0 else panel.dot_bytes(j[job.VALUE_TYPE])


def widen_values(j: Pointer, target: int) -> None:
    """Copy the values to an address, as float32."""
    wide = floats(target)
    for i in range(j[job.N_ACTIVE] * j[job.K]):
        wide[i] = panel.value_at(j[job.VALUES], j[job.VALUE_TYPE], i)


TASKS = (
    panel.measure_panel,
    panel.fill_panel,
    choose_window,
    phase_size,
    rows_task,
    strided_task,
    dot_task,
    fill_task,
    tile_task,
    conv_plan,
    conv_offsets,
    conv_pack_task,
    conv_tile_task,
    conv_rows_task,
    widen_values,
)
