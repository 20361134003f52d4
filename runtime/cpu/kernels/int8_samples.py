"""Samples rounded to eight bits: what is known of each, and their bytes for kernels. Importing it imports Numba.

Owns both. A task that has all rows of a weight to multiply rounds the samples itself, where it needs them; tasks that
share the rows of some samples read what :func:`int8_scales_task` and :func:`int8_fill_task` made before.

What is known of 64 samples is a block of three planes, each of 64 numbers: what they are multiplied by before they are
rounded, what one is worth afterwards (float32), and their offsets (int32).
"""

from typing import Any, Final

import numpy as np

from srigl_fx.runtime.cpu.kernels import conv, job, plan
from srigl_fx.runtime.cpu.kernels.compiled import NARROW, compiled, planned
from srigl_fx.runtime.cpu.kernels.copies import copy_bytes, copy_floats
from srigl_fx.runtime.cpu.kernels.int8_rounding import (
    TILE_ROW,
    byte_block,
    byte_columns,
    column_extremes,
    extremes,
    round_block,
    round_columns,
    round_exactly,
    round_few,
    round_row,
)
from srigl_fx.runtime.cpu.kernels.plan import CACHE_LINE, INT8_COLUMNS, INT8_DOT, KNOWN_BYTES, LANES
from srigl_fx.runtime.cpu.kernels.vector import allocate, as_float, floats, ints, release, words
from srigl_fx.runtime.quantisation import LARGEST_UNSIGNED, LARGEST_VALUE, OFFSET, SMALLEST

Pointer = Any
SCALES: Final = 4 * INT8_COLUMNS  # bytes from a sample's inverse to its scale
OFFSETS: Final = 8 * INT8_COLUMNS  # and to its offset
FILL_LINES: Final = 26  # cache lines of scratch for :func:`fill_tile`
_INFINITY: Final = 0x7F800000  # the bits of it
_MINUS_ZERO: Final = 0x80000000
_LARGEST_VALUE, _LARGEST_UNSIGNED = np.float32(LARGEST_VALUE), np.float32(LARGEST_UNSIGNED)
_SMALLEST, _NAN, _ZERO, _ONE = np.float32(SMALLEST), np.float32(np.nan), np.float32(0), np.float32(1)
_row_bytes, _tile_columns = planned(plan.int8_row_bytes), planned(plan.int8_tile_columns)


@compiled
def aligned(address: int) -> int:
    """The first cache line that starts there or later."""
    return (address + CACHE_LINE - 1) // CACHE_LINE * CACHE_LINE


@compiled
def known_of(j: Pointer, sample: int) -> int:
    """Where what is known of a sample starts, in X_SCALES."""
    return j[job.X_SCALES] + sample // INT8_COLUMNS * KNOWN_BYTES + sample % INT8_COLUMNS * 4  # type: ignore[no-any-return]


@compiled
def _clear(found: int) -> None:
    bits = words(found)
    for i in range(2 * CACHE_LINE // 8):
        bits[i] = 0


@compiled
def _put_known(largest: int, top: int, known: int) -> None:
    """Store what the largest bits of a sample, without the sign and with it, say of it."""
    offset = OFFSET if top > _MINUS_ZERO else 0
    limit = _LARGEST_VALUE if offset != 0 else _LARGEST_UNSIGNED
    size = as_float(largest)
    inverse, scale = _ZERO, _ZERO
    if largest >= _INFINITY:
        scale = _NAN
    elif size >= _SMALLEST:
        inverse, scale = limit / size, size / limit
    floats(known)[0], floats(known + SCALES)[0], ints(known + OFFSETS)[0] = inverse, scale, offset


@compiled
def _put_given(j: Pointer, known: int) -> None:
    """Store the scale that is given for all samples."""
    scale = as_float(j[job.X_SCALE])
    floats(known)[0], floats(known + SCALES)[0], ints(known + OFFSETS)[0] = _ONE / scale, scale, j[job.X_OFFSET]


@compiled
def _measure_sample(x: int, size: int, known: int, found: int) -> None:
    """Store what is known of the sample of ``size`` floats at ``x``; ``found`` is two cache lines of scratch."""
    _clear(found)
    extremes(x, size, found)
    bits, largest, top = ints(found), 0, 0
    for lane in range(LANES):
        largest = max(largest, int(bits[lane]))
        top = max(top, int(bits[LANES + lane]) & 0xFFFFFFFF)
    _put_known(largest, top, known)


@compiled
def _measure_columns(j: Pointer, first: int, columns: int, known: int, found: int) -> None:
    """The same for up to 16 samples of a feature-major tensor."""
    column_extremes(j[job.X] + first * 4, j[job.BATCH] * 4, j[job.IN_FEATURES], columns, found)
    bits = ints(found)
    for lane in range(columns):
        _put_known(int(bits[lane]), int(bits[LANES + lane]) & 0xFFFFFFFF, known + 4 * lane)


@compiled
def measure_samples(j: Pointer, first: int, columns: int, known: int, found: int) -> None:
    """Store what is known of samples ``first ...`` of a linear layer."""
    if j[job.X_SCALE] != 0:
        for c in range(columns):
            _put_given(j, known + 4 * c)
    elif j[job.X_FEATURE_MAJOR] != 0:
        for c in range(0, columns, LANES):
            _measure_columns(j, first + c, min(LANES, columns - c), known + 4 * c, found)
    else:
        row_bytes = j[job.IN_FEATURES] * 4
        for c in range(columns):
            _measure_sample(j[job.X] + (first + c) * row_bytes, j[job.IN_FEATURES], known + 4 * c, found)


def int8_scales_task(j: Pointer, task: int) -> None:
    """What is known of one sample, or of 16 if the tensor is feature-major."""
    memory = allocate(3 * CACHE_LINE)
    if memory == 0:
        j[job.FAILED] = 1
        return
    found = aligned(memory)
    if j[job.GEOMETRY] != 0 and j[job.X_SCALE] != 0:
        _put_given(j, known_of(j, task))
    elif j[job.GEOMETRY] != 0:
        geometry = words(j[job.GEOMETRY])
        size = geometry[conv.CHANNELS] * geometry[conv.IN_D] * geometry[conv.IN_H] * geometry[conv.IN_W]
        _measure_sample(j[job.X] + task * size * 4, size, known_of(j, task), found)
    elif j[job.X_FEATURE_MAJOR] != 0:
        first = task * LANES
        measure_samples(j, first, min(LANES, j[job.BATCH] - first), known_of(j, first), found)
    else:
        measure_samples(j, task, 1, known_of(j, task), found)
    release(memory)


@compiled
def take_row(j: Pointer, first: int, count: int, known: int, to: int) -> None:
    """Elements ``first ...`` of x as bytes; there is room for 16 more of them."""
    if j[job.X_BYTES] != 0:
        copy_bytes(j[job.X] + first, to, count)
    else:
        round_row(j[job.X] + first * 4, count, floats(known)[0], int(ints(known + OFFSETS)[0]), to)


@compiled
def round_sample(j: Pointer, sample: int, known: int, to: int) -> None:
    """A sample of a linear layer as a row of bytes."""
    take_row(j, sample * j[job.IN_FEATURES], j[job.IN_FEATURES], known, to)


@compiled
def _fill_from_rows(
    j: Pointer, first: int, columns: int, width: int, f0: int, f1: int, known: int, scratch: int, to: int
) -> None:
    in_features, ordered, staged = j[job.IN_FEATURES], scratch, scratch + 8 * CACHE_LINE
    of_bytes = j[job.X_BYTES] != 0
    size = 1 if of_bytes else 4
    x_row = in_features * size
    # Which sample is at a place of a tile's row: a full one has four of each 16 after each other.
    four, sixteen = (16, 4) if width == INT8_COLUMNS else (4, 16)
    for place in range(width):  # what is known in the order of a tile's rows
        column = sixteen * (place // 16) + four * (place // 4 % 4) + place % 4
        floats(ordered)[place], ints(ordered + 4 * INT8_COLUMNS)[place] = 0.0, 0
        if column < columns:
            floats(ordered)[place] = floats(known)[column]
            ints(ordered + 4 * INT8_COLUMNS)[place] = ints(known + OFFSETS)[column]
    for i in range(LANES * LANES):
        floats(staged)[i] = 0.0
    for f in range(f0, f1, LANES):
        features = min(LANES, f1 - f)
        for lane in range(width // LANES):
            at, row, step = j[job.X] + (first + sixteen * lane) * x_row + f * size, x_row, four * x_row
            inverses, offsets = ordered + lane * CACHE_LINE, ordered + 4 * INT8_COLUMNS + lane * CACHE_LINE
            target = to + f * width + lane * LANES
            if features < LANES or columns < width:
                for place in range(LANES):
                    sample = sixteen * lane + four * (place // 4) + place % 4
                    source = j[job.X] + (first + sample) * x_row + f * size
                    if sample < columns and of_bytes:
                        copy_bytes(source, staged + place * CACHE_LINE, features)
                    elif sample < columns:
                        copy_floats(source, staged + place * CACHE_LINE, features)
                at, row, step = staged, CACHE_LINE, 4 * CACHE_LINE
            if of_bytes:
                byte_block(at, row, step, target, width, features)
            else:
                round_block(at, row, step, inverses, offsets, target, width, features)


@compiled
def _fill_from_columns(
    j: Pointer, first: int, columns: int, width: int, f0: int, f1: int, known: int, staged: int, to: int
) -> None:
    for i in range(INT8_COLUMNS):
        floats(staged)[i] = 0.0
    for f in range(f0, f1):
        at, target = f * j[job.BATCH] + first, to + f * width
        if j[job.X_BYTES] != 0:
            at += j[job.X]
            if columns < width:
                copy_bytes(at, staged, columns)
                at = staged
            if width == INT8_COLUMNS:
                byte_columns(at, target)
            else:
                copy_bytes(at, target, width)
        else:
            at = j[job.X] + at * 4
            if columns < width:
                copy_floats(at, staged, columns)
                at = staged
            if width == INT8_COLUMNS:
                round_columns(at, at + 2 * CACHE_LINE, known, known + OFFSETS, target)
            else:
                for c in range(0, width, LANES):
                    round_few(at + c * 4, known + c * 4, known + OFFSETS + c * 4, target + c)


@compiled
def fill_tile(
    j: Pointer, first: int, columns: int, width: int, f0: int, f1: int, known: int, scratch: int, to: int
) -> None:
    """The features ``f0 <= f < f1`` of samples ``first ...``, rounded, as rows of a tile with ``width`` columns."""
    if j[job.X_FEATURE_MAJOR] != 0:
        _fill_from_columns(j, first, columns, width, f0, f1, known, scratch, to)
    else:
        _fill_from_rows(j, first, columns, width, f0, f1, known, scratch, to)


def int8_fill_task(j: Pointer, task: int) -> None:
    """The bytes of one sample, or a share of the features of a tile, in PACKED."""
    in_features = j[job.IN_FEATURES]
    if j[job.KERNEL] == INT8_DOT:
        to = j[job.PACKED] + task * _row_bytes(in_features, j[job.PANEL_WINDOW])
        round_sample(j, task, known_of(j, task), to)
        return
    splits, blocks = j[job.ROW_SPLITS], (in_features + LANES - 1) // LANES
    tile, part = task // splits, task % splits
    memory = allocate(FILL_LINES * CACHE_LINE)
    if memory == 0:
        j[job.FAILED] = 1
        return
    first = tile * INT8_COLUMNS
    f0, f1 = blocks * part // splits * LANES, min(in_features, blocks * (part + 1) // splits * LANES)
    to = j[job.PACKED] + tile * in_features * TILE_ROW
    columns = min(INT8_COLUMNS, j[job.BATCH] - first)
    fill_tile(j, first, columns, _tile_columns(NARROW, columns), f0, f1, known_of(j, first), aligned(memory), to)
    release(memory)


def int8_round_task(j: Pointer, task: int) -> None:
    """A share of BATCH floats, rounded with the scale that is given, as as many bytes at Y."""
    splits, count = j[job.ROW_SPLITS], j[job.BATCH]
    blocks = (count + CACHE_LINE - 1) // CACHE_LINE
    first, last = blocks * task // splits * CACHE_LINE, min(count, blocks * (task + 1) // splits * CACHE_LINE)
    inverse: Any = _ONE / as_float(j[job.X_SCALE])
    offset = j[job.X_OFFSET]
    round_exactly(j[job.X] + first * 4, last - first, inverse, offset, j[job.Y] + first)
