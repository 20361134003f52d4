"""The tasks of a condensed convolution. Importing it imports Numba.

Owns the way of data through them: by tiles of output positions, or where no panel fits, by packed samples.
"""

from typing import Any, Final

import numpy as np

from srigl_fx.runtime.cpu.kernels import conv, job, patches
from srigl_fx.runtime.cpu.kernels.activations import activate_row
from srigl_fx.runtime.cpu.kernels.compiled import compiled
from srigl_fx.runtime.cpu.kernels.copies import add_floats, copy_floats, copy_rows
from srigl_fx.runtime.cpu.kernels.plan import CACHE_LINE, COLUMNS, LANES
from srigl_fx.runtime.cpu.kernels.tiles import (
    BLOCK_GROUPS,
    clear_columns,
    first_output,
    is_limit,
    multiply,
    multiply_shared,
    put_rest,
    start_tile,
    tile_memory,
    width_of,
)
from srigl_fx.runtime.cpu.kernels.vector import allocate, floats, ints, release, shorts, words

Pointer = Any
_PIECES_BYTES: Final = (
    patches.MOST_PIECES * patches.PIECE_WORDS + patches.TAP_WORDS
) * 8  # bytes: a tile's pieces, and a tap

_conv_pack, _conv_rows = compiled(conv.conv_pack), compiled(conv.conv_rows)
_conv_offsets, _conv_plan = compiled(conv.conv_tap_offsets), compiled(conv.conv_plan)


@compiled
def _fill_taps(j: Pointer, pieces: int, count: int, block: int, width: int, inputs: int) -> None:
    """What all taps of one group of channels read at a tile's positions; ``pieces`` is followed by room for a tap."""
    geometry = words(j[job.GEOMETRY])
    kernel_d, kernel_h, kernel_w = geometry[conv.KERNEL_D], geometry[conv.KERNEL_H], geometry[conv.KERNEL_W]
    channels, taps = geometry[conv.CHANNELS] // geometry[conv.GROUPS], kernel_d * kernel_h * kernel_w
    at = pieces + patches.MOST_PIECES * patches.PIECE_WORDS * 8
    tap = words(at)
    for t in range(taps):
        tap[0], tap[1], tap[2] = t // kernel_w // kernel_h, t // kernel_w % kernel_h, t % kernel_w
        row = inputs + (taps - 1 - t if geometry[conv.FLIPPED] else t) * width * 4
        patches.fill_tap(geometry, j[job.X], pieces, count, block * channels, channels, at, row, taps * width * 4)


@compiled
def _store_positions(j: Pointer, first: int, columns: int, width: int, o0: int, o1: int, out: int) -> None:
    """The outputs ``o0 <= o < o1`` of a tile, which may end in another sample than it starts in."""
    geometry, n = words(j[job.GEOMETRY]), j[job.OUT_FEATURES]
    plane = geometry[conv.OUT_D] * geometry[conv.OUT_H] * geometry[conv.OUT_W]
    activation, has_residual = j[job.ACTIVATION], j[job.RESIDUAL] != 0
    if not has_residual:
        activate_row(floats(out + o0 * width * 4), (o1 - o0) * width, activation)
    c = 0
    while c < columns:
        sample, position = (first + c) // plane, (first + c) % plane
        count = min(columns - c, plane - position)
        for o in range(o0, o1):
            at = ((sample * n + o) * plane + position) * 4
            found = out + (o * width + c) * 4
            if has_residual:
                add_floats(j[job.RESIDUAL] + at, found, count)
                activate_row(floats(found), count, activation)
            copy_floats(found, j[job.Y] + at, count)
        c += count


def _tile_task(name: str, add: Any) -> Any:
    """A task: a share of the filters for one tile of output positions, counted through all samples.

    ``add`` computes groups of filters.
    """

    def run(j: Pointer, task: int) -> None:
        splits, count = j[job.ROW_SPLITS], j[job.PANEL_COUNT]
        geometry = words(j[job.GEOMETRY])
        tile, part = task // splits, task % splits
        first = tile * COLUMNS
        plane = geometry[conv.OUT_D] * geometry[conv.OUT_H] * geometry[conv.OUT_W]
        positions = j[job.BATCH] * plane
        columns = min(COLUMNS, positions - first)
        width = width_of(columns)
        in_features, n = j[job.IN_FEATURES], j[job.OUT_FEATURES]
        block_rows = n // geometry[conv.GROUPS]
        sample, position = first // plane, first % plane
        in_one_plane = position + columns <= plane
        in_place = in_one_plane and columns == width and is_limit(j[job.ACTIVATION])
        y = j[job.Y] + (sample * n * plane + position) * 4 if in_place else 0
        memory = tile_memory(in_features, n, BLOCK_GROUPS + _PIECES_BYTES // 8)
        if memory == 0:
            j[job.FAILED] = 1
            return
        out = (memory + CACHE_LINE - 1) // CACHE_LINE * CACHE_LINE
        cursors = words(out + (n + 1) * COLUMNS * 4)
        pieces = out + (n + 1) * COLUMNS * 4 + (BLOCK_GROUPS + 1) * 8
        inputs = out + (n + 1) * COLUMNS * 4 + (BLOCK_GROUPS + _PIECES_BYTES // 8 + 8) // 8 * CACHE_LINE
        pieces_count = patches.cut_pieces(geometry, first, columns, words(pieces))
        clear_columns(floats(inputs + in_features * width * 4), 1, 0, width)
        rows, last, g0 = ints(j[job.PANEL_ROWS]), count * (part + 1) // splits, count * part // splits
        o0, filled = first_output(j, g0), -1
        while o0 < n:
            g1 = g0
            block = -1 if g0 >= last else int(rows[g0 * LANES]) // block_rows
            while g1 < min(last, g0 + BLOCK_GROUPS) and int(rows[g1 * LANES]) // block_rows == block:
                g1 += 1
            if block != filled and block >= 0:
                if geometry[conv.POINTWISE] != 0 and columns == COLUMNS and in_one_plane:
                    at = j[job.X] + ((sample * geometry[conv.CHANNELS] + block * in_features) * plane + position) * 4
                    copy_rows(at, plane * 4, inputs, COLUMNS * 4, in_features)
                else:
                    _fill_taps(j, pieces, pieces_count, block, width, inputs)
                if columns < width:
                    clear_columns(floats(inputs), in_features, columns, width)
                filled = block
            o1 = n if g1 == count and part == splits - 1 else first_output(j, g1)
            start_tile(j, g0, g1, o0, o1, width, out)
            add(j, in_features, width, inputs, g0, g1, out, cursors, y, plane * 4)
            if y != 0:
                put_rest(j, g0, g1, o0, o1, width, out, y, plane * 4)
            else:
                _store_positions(j, first, columns, width, o0, o1, out)
            if g1 == last:
                break
            g0, o0 = g1, o1
        release(memory)

    run.__name__ = name
    return run


conv_tile_task, conv_shared_tile_task = (
    _tile_task(name, add) for name, add in (("conv_tile_task", multiply), ("conv_shared_tile_task", multiply_shared))
)


def conv_pack_task(j: Pointer, task: int) -> None:
    """A share of the channels of one sample, packed."""
    splits = j[job.ROW_SPLITS]
    within, part = task // splits, task % splits
    geometry = words(j[job.GEOMETRY])
    channels = geometry[conv.CHANNELS]
    packed = floats(j[job.PACKED] + within * j[job.PACKED_SIZE] * 4)
    first, last = channels * part // splits, channels * (part + 1) // splits
    _conv_pack(floats(j[job.X]), packed, geometry, j[job.SAMPLE] + within, first, last, np.float32(0))


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
    memory = allocate(conv.ACCUMULATORS * 4 + CACHE_LINE)
    if memory == 0:
        j[job.FAILED] = 1
        return
    accumulators = floats((memory + CACHE_LINE - 1) // CACHE_LINE * CACHE_LINE)
    index_rows, shared = ints(j[job.INDEX_ROWS]), j[job.INDEX_ROWS] != 0
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
        _conv_rows(
            packed,
            values,
            indices,
            active,
            bias,
            y,
            geometry,
            offsets,
            accumulators,
            sample,
            first,
            last,
            index_rows,
            shared,
        )
    else:
        long = ints(j[job.INDICES])
        _conv_rows(
            packed,
            values,
            long,
            active,
            bias,
            y,
            geometry,
            offsets,
            accumulators,
            sample,
            first,
            last,
            index_rows,
            shared,
        )
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
