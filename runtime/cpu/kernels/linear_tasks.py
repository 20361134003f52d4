"""The tasks of a condensed linear layer. Importing it imports Numba.

Owns the way of data through them: from samples, or the inputs of a tile, to finished outputs.
"""

from typing import Any, Final

import numpy as np

from srigl_fx.runtime.cpu.kernels import job, panel, plan
from srigl_fx.runtime.cpu.kernels.activations import activate_row
from srigl_fx.runtime.cpu.kernels.canonical import index_at, index_row, index_rows, row_end
from srigl_fx.runtime.cpu.kernels.compiled import ISA, compiled, planned
from srigl_fx.runtime.cpu.kernels.copies import add_floats, copy_floats, copy_rows, transpose
from srigl_fx.runtime.cpu.kernels.dot import WIDE, dot_group
from srigl_fx.runtime.cpu.kernels.few_shared import few_shared
from srigl_fx.runtime.cpu.kernels.isa import AVX2, AVX512, NEON, level_of
from srigl_fx.runtime.cpu.kernels.job import GROUP_PHASE, GROUP_ROW, GROUP_WORDS
from srigl_fx.runtime.cpu.kernels.plan import CACHE_LINE, COLUMNS, LANES
from srigl_fx.runtime.cpu.kernels.tiles import (
    BLOCK_GROUPS,
    clear_columns,
    first_output,
    is_limit,
    multiply,
    multiply_shared,
    put_rest,
    start_rows,
    start_tile,
    tile_memory,
    width_of,
)
from srigl_fx.runtime.cpu.kernels.values import value_at
from srigl_fx.runtime.cpu.kernels.vector import allocate, floats, ints, release, shorts, stack_address, words
from srigl_fx.runtime.value_types import FLOATS, NUMBERS

Pointer = Any
_ZERO: Final = np.float32(0)
_FLOAT32: Final = NUMBERS["float32"]
_LEVEL: Final = level_of(ISA)
_few = planned(plan.few_shared)


@compiled
def _is_finite(x: int, count: int) -> bool:
    found = floats(x)
    total = found[0] * 0.0
    for i in range(count):
        total += found[i] * 0.0
    return total == 0.0  # type: ignore[no-any-return]


@compiled
def _kept(j: Pointer, first: int) -> int:
    """How many weights a row keeps whose indices start at ``first``."""
    k = j[job.K]
    if j[job.INDEX_BYTES] == 2:
        return row_end(shorts(j[job.INDICES]), first, k) - first  # type: ignore[no-any-return]
    return row_end(ints(j[job.INDICES]), first, k) - first  # type: ignore[no-any-return]


@compiled
def _plain_row(x: Pointer, values: Pointer, indices: Pointer, first: int, k: int) -> Any:
    """A row whose indices start at ``first``, and its values with ``values``."""
    total = _ZERO
    for i in range(row_end(indices, first, k) - first):
        total += values[i] * x[indices[first + i]]
    return total


@compiled
def _add_exact(j: Pointer, sample: int, first: int, last: int) -> None:
    """Add the active rows ``first <= r < last`` to one sample's outputs, from the canonical format."""
    x = floats(j[job.X] + sample * j[job.IN_FEATURES] * 4)
    y = floats(j[job.Y] + sample * j[job.OUT_FEATURES] * 4)
    k, values, value_type = j[job.K], j[job.VALUES], j[job.VALUE_TYPE]
    indices, index_bytes, active = j[job.INDICES], j[job.INDEX_BYTES], ints(j[job.ACTIVE])
    for r in range(first, last):
        start = index_row(j, r) * k
        if value_type != _FLOAT32:
            total = y[active[r]]
            for i in range(_kept(j, start)):
                total += value_at(values, value_type, r * k + i) * x[index_at(indices, index_bytes, start + i)]
            y[active[r]] = total
        elif index_bytes == 2:
            y[active[r]] += _plain_row(x, floats(values + r * k * 4), shorts(indices), start, k)
        else:
            y[active[r]] += _plain_row(x, floats(values + r * k * 4), ints(indices), start, k)


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
        start_rows(j, sample, o0, o1)
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
            start = index_row(j, r) * k
            for i in range(_kept(j, start)):
                column = index_at(j[job.INDICES], j[job.INDEX_BYTES], start + i)
                value = value_at(j[job.VALUES], j[job.VALUE_TYPE], r * k + i)
                total += value * x[sample * x_sample + column * x_step]
            y[sample * y_sample + active[r] * y_step] = total
    if j[job.RESIDUAL] != 0:
        residual = floats(j[job.RESIDUAL])
        for i in range(batch * n):
            y[i] += residual[i]
    activate_row(y, batch * n, j[job.ACTIVATION])


@compiled
def _no_dot(window: int, value_type: int, x: int, at: int, start: int, phases: int, sums: int) -> None:
    """Unreachable: every window and value type has a case before it."""


def _case(window: int, value_type: int, otherwise: Any) -> Any:
    """The dot product for one window and value type; ``otherwise`` for others. LLVM makes one function of the chain."""
    group = dot_group(window, value_type)

    def dot(found: int, found_type: int, x: int, at: int, start: int, phases: int, sums: int) -> None:
        if (window == WIDE or found == window) and found_type == value_type:
            group(x, at, start, phases, sums)
        else:
            otherwise(found, found_type, x, at, start, phases, sums)

    return compiled(dot)


_dot_of = _no_dot
for _window in {AVX512: (64, 128), AVX2: (WIDE,), NEON: (WIDE,)}.get(ISA, ()):
    for _value_type in [NUMBERS[name] for name in reversed(FLOATS)]:
        _dot_of = _case(_window, _value_type, _dot_of)


@compiled
def _dot(j: Pointer, x: int, first: int, phases: int, sums: int) -> None:
    value_type, window = j[job.VALUE_TYPE], j[job.PANEL_WINDOW]
    at, start = j[job.PANEL] + first * panel.dot_bytes(value_type, window), j[job.PANEL_STARTS] + first * 4
    _dot_of(window, value_type, x, at, start, phases, sums)


def dot_task(j: Pointer, task: int) -> None:
    """A share of the groups of a dot panel, for every sample.

    Weights of zero fill a panel up, and must not meet what is not finite: such a sample is computed exactly.
    """
    count, splits, n = j[job.PANEL_COUNT], j[job.ROW_SPLITS], j[job.OUT_FEATURES]
    groups, outputs = words(j[job.PANEL_GROUPS]), ints(j[job.PANEL_ROWS])
    g0, g1 = count * task // splits, count * (task + 1) // splits
    o0 = first_output(j, g0)
    o1 = n if task == splits - 1 else first_output(j, g1)
    memory = allocate(2 * CACHE_LINE)
    if memory == 0:
        j[job.FAILED] = 1
        return
    sums_at = (memory + CACHE_LINE - 1) // CACHE_LINE * CACHE_LINE
    sums = floats(sums_at)
    in_features = j[job.IN_FEATURES]
    for sample in range(j[job.BATCH]):
        start_rows(j, sample, o0, o1)
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
            start_rows(j, sample, o0, o1)
            _add_exact(j, sample, row0, row1)
        activate_row(floats(j[job.Y] + (sample * n + o0) * 4), o1 - o0, j[job.ACTIVATION])


@compiled
def _fill_from_rows(j: Pointer, first: int, columns: int, width: int, inputs: int) -> None:
    """The samples ``first ...`` as columns of a tile."""
    in_features = j[job.IN_FEATURES]
    x, row_bytes = j[job.X] + first * in_features * 4, in_features * 4
    whole_features, whole_columns = in_features // LANES * LANES, columns // LANES * LANES
    tile = floats(inputs)
    for f in range(0, whole_features, LANES):
        for c in range(0, whole_columns, LANES):
            transpose(x + c * row_bytes + f * 4, row_bytes, inputs + (f * width + c) * 4, width * 4)
    for c in range(columns):
        source = floats(x + c * row_bytes)
        for f in range(whole_features if c < whole_columns else 0, in_features):
            tile[f * width + c] = source[f]
    clear_columns(floats(inputs), in_features, columns, width)


@compiled
def _fill_from_columns(source: int, source_row: int, rows: int, columns: int, width: int, inputs: int) -> None:
    """Rows of ``columns`` floats, ``source_row`` bytes apart."""
    if columns == COLUMNS:
        copy_rows(source, source_row, inputs, COLUMNS * 4, rows)
    else:
        for f in range(rows):
            copy_floats(source + f * source_row, inputs + f * width * 4, columns)
        clear_columns(floats(inputs), rows, columns, width)


@compiled
def store_as_rows(j: Pointer, first: int, columns: int, width: int, o0: int, o1: int, out: int) -> None:
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
            target = y + c * row_bytes + o0 * 4
            add_floats(j[job.RESIDUAL] + ((first + c) * n + o0) * 4, target, o1 - o0)
            activate_row(floats(target), o1 - o0, j[job.ACTIVATION])


@compiled
def store_as_columns(j: Pointer, first: int, columns: int, width: int, o0: int, o1: int, out: int) -> None:
    """A tile's outputs ``o0 <= o < o1``, feature-major."""
    batch = j[job.BATCH]
    for o in range(o0, o1):
        row, at = out + o * width * 4, (o * batch + first) * 4
        if j[job.RESIDUAL] != 0:
            add_floats(j[job.RESIDUAL] + at, row, columns)
        activate_row(floats(row), width, j[job.ACTIVATION])
        copy_floats(row, j[job.Y] + at, columns)


@compiled
def _fill_tile(j: Pointer, tile: int, inputs: int) -> None:
    """The inputs of a tile of samples; behind the last, a row of zeros."""
    in_features, first = j[job.IN_FEATURES], tile * COLUMNS
    columns = min(COLUMNS, j[job.BATCH] - first)
    width = width_of(columns)
    if j[job.X_FEATURE_MAJOR] != 0:
        row_bytes = j[job.BATCH] * 4
        _fill_from_columns(j[job.X] + first * 4, row_bytes, in_features, columns, width, inputs)
    else:
        _fill_from_rows(j, first, columns, width, inputs)
    clear_columns(floats(inputs + in_features * width * 4), 1, 0, width)


@compiled
def _tile_bytes(j: Pointer) -> int:
    return (j[job.IN_FEATURES] + 1) * COLUMNS * 4  # type: ignore[no-any-return]


@compiled
def _tile_of_thread(j: Pointer, task: int) -> int:
    """The address, in TILES, of the tile that holds a task's samples, filled if it is not yet.

    Tasks that share a tile of samples may run on several threads. If the task before it has the same samples and ran on
    the same thread, a task uses the tile of that one, and else it fills one of its own. Threads are told apart by the
    address of their stack (no thread id is available here).
    """
    splits, owners, thread = j[job.ROW_SPLITS], words(j[job.TILE_OWNERS]), stack_address()
    slot = task
    if task % splits != 0 and owners[2 * task - 2] == thread:
        slot = owners[2 * task - 1]
    owners[2 * task], owners[2 * task + 1] = thread, slot
    inputs = j[job.TILES] + slot * _tile_bytes(j)
    if slot == task:
        _fill_tile(j, task // splits, inputs)
    return inputs  # type: ignore[no-any-return]


def _tile_task(name: str, add: Any) -> Any:
    """A task: a share of the rows for one tile of samples, of which ``add`` computes groups."""

    def run(j: Pointer, task: int) -> None:
        splits, count, in_features = j[job.ROW_SPLITS], j[job.PANEL_COUNT], j[job.IN_FEATURES]
        tile, part = task // splits, task % splits
        first = tile * COLUMNS
        columns = min(COLUMNS, j[job.BATCH] - first)
        width = width_of(columns)
        in_place = j[job.Y_FEATURE_MAJOR] != 0 and columns == width and is_limit(j[job.ACTIVATION])
        y, y_row = (j[job.Y] + first * 4, j[job.BATCH] * 4) if in_place else (0, 0)
        pooled = j[job.TILES] != 0
        memory = tile_memory(0 if pooled else in_features, j[job.OUT_FEATURES], BLOCK_GROUPS)
        if memory == 0:
            j[job.FAILED] = 1
            return
        out = (memory + CACHE_LINE - 1) // CACHE_LINE * CACHE_LINE
        cursors = words(out + (j[job.OUT_FEATURES] + 1) * COLUMNS * 4)
        if pooled:
            inputs = _tile_of_thread(j, task)
        else:
            inputs = out + (j[job.OUT_FEATURES] + 1) * COLUMNS * 4 + (BLOCK_GROUPS + 8) // 8 * CACHE_LINE
            _fill_tile(j, tile, inputs)
        g0, end = count * part // splits, count * (part + 1) // splits
        o0 = first_output(j, g0)
        while o0 < j[job.OUT_FEATURES]:
            g1 = min(end, g0 + BLOCK_GROUPS)
            o1 = j[job.OUT_FEATURES] if g1 == count and part == splits - 1 else first_output(j, g1)
            start_tile(j, g0, g1, o0, o1, width, out)
            add(j, in_features, width, inputs, g0, g1, out, cursors, y, y_row)
            if in_place:
                put_rest(j, g0, g1, o0, o1, width, out, y, y_row)
            elif j[job.Y_FEATURE_MAJOR] != 0:
                store_as_columns(j, first, columns, width, o0, o1, out)
            else:
                store_as_rows(j, first, columns, width, o0, o1, out)
            if g1 == end:
                break
            g0, o0 = g1, o1
        release(memory)

    run.__name__ = name
    return run


tile_task = _tile_task("tile_task", multiply)
_shared_tiles = compiled(_tile_task("shared_tiles", multiply_shared))


def shared_tile_task(j: Pointer, task: int) -> None:
    """A share of the rows for one tile of samples, or for a few samples, where rows share their inputs."""
    as_rows = j[job.X_FEATURE_MAJOR] == 0 and j[job.Y_FEATURE_MAJOR] == 0
    if as_rows and _few(_LEVEL, j[job.BATCH], j[job.N_ACTIVE], index_rows(j)):
        few_shared(j, task)
    else:
        _shared_tiles(j, task)
