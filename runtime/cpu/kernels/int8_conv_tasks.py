"""The tasks of convolutions with values of eight bits. Importing it imports Numba.

Owns the way of data through them: a sample's bytes packed as :mod:`.conv` packs floats, and 64
neighbouring positions of a packed sample at a time: there, what a tap reads for neighbouring outputs are neighbours,
whatever the geometry is, and a tile's row is one copy.
"""

from typing import Any

import numpy as np

from srigl_fx.runtime.cpu.kernels import conv, job
from srigl_fx.runtime.cpu.kernels.activations import activate_row
from srigl_fx.runtime.cpu.kernels.compiled import compiled
from srigl_fx.runtime.cpu.kernels.copies import add_floats, copy_bytes
from srigl_fx.runtime.cpu.kernels.int8 import MASKED, every_second, gather_rows
from srigl_fx.runtime.cpu.kernels.int8_outputs import output_bytes, put_outputs
from srigl_fx.runtime.cpu.kernels.int8_rounding import TILE_ROW
from srigl_fx.runtime.cpu.kernels.int8_samples import OFFSETS, SCALES, aligned, known_of, take_row
from srigl_fx.runtime.cpu.kernels.int8_tiles import BLOCK_GROUPS, ROOM, multiply_tile
from srigl_fx.runtime.cpu.kernels.job import GROUP_ROW, GROUP_WORDS
from srigl_fx.runtime.cpu.kernels.plan import CACHE_LINE, INT8_COLUMNS, KNOWN_BYTES, LANES
from srigl_fx.runtime.cpu.kernels.tiles import first_output, is_limit, start_outputs
from srigl_fx.runtime.cpu.kernels.vector import allocate, bytes_, floats, ints, release, words

Pointer = Any
_conv_pack = compiled(conv.conv_pack)


@compiled
def _round_rows(j: Pointer, sample: int, c: int, packed: int, spare: int) -> None:
    """One channel rounded to where it is packed, row by row, where rows are read as they lie.

    Rounding writes up to 16 bytes too many, which are padding, as it takes what is behind a row for zeros: rows that
    come later write over them. ``spare`` is room for the last row, whose neighbour may be packed at the same time.
    """
    geometry, known = words(j[job.GEOMETRY]), known_of(j, sample)
    offset = ints(known + OFFSETS)[0]
    in_d, in_h, in_w = geometry[conv.IN_D], geometry[conv.IN_H], geometry[conv.IN_W]
    packed_d, packed_h, packed_w = geometry[conv.PACKED_D], geometry[conv.PACKED_H], geometry[conv.PACKED_W]
    size = packed_d * packed_h * packed_w
    for i in range(size):
        bytes_(packed)[i] = offset
    first = max(0, geometry[conv.PAD_W])
    count = min(packed_w, in_w + geometry[conv.PAD_W]) - first
    x = (sample * geometry[conv.CHANNELS] + c) * in_d * in_h * in_w + first - geometry[conv.PAD_W]
    for d in range(packed_d):
        at_d = d * geometry[conv.STRIDE_D] - geometry[conv.PAD_D]
        for h in range(packed_h):
            at_h = h * geometry[conv.STRIDE_H] - geometry[conv.PAD_H]
            if count > 0 and at_d >= 0 and at_d < in_d and at_h >= 0 and at_h < in_h:
                row, to = x + (at_d * in_h + at_h) * in_w, (d * packed_h + h) * packed_w + first
                exact = count if to + count + 2 * LANES <= size else max(0, size - to - 2 * LANES) // LANES * LANES
                if exact > 0:
                    take_row(j, row, exact, known, packed + to)
                if exact < count:
                    take_row(j, row + exact, count - exact, known, spare)
                    copy_bytes(spare, packed + to + exact, count - exact)


@compiled
def _pack_every_second(geometry: Pointer, rounded: int, packed: int, offset: int) -> None:
    """Pack one channel of rounded columns of which every second is a neighbour, as :func:`.conv.conv_pack` does.

    Whole vectors are copied, and what is too much is written over: by the padding behind a row, by the next row.
    """
    in_d, in_h, in_w = geometry[conv.IN_D], geometry[conv.IN_H], geometry[conv.IN_W]
    packed_d, packed_h, packed_w = geometry[conv.PACKED_D], geometry[conv.PACKED_H], geometry[conv.PACKED_W]
    planes_d, planes_h, planes_w = geometry[conv.PLANES_D], geometry[conv.PLANES_H], geometry[conv.PLANES_W]
    to, end = packed, packed + planes_d * planes_h * planes_w * packed_d * packed_h * packed_w
    for plane_d in range(planes_d):
        for plane_h in range(planes_h):
            for plane_w in range(planes_w):
                start = plane_w * geometry[conv.PLANE_STEP_W] - geometry[conv.PAD_W]
                first = min(packed_w, max(0, (1 - start) // 2))  # the first column that lies in x, and the last and one
                last = max(first, min(packed_w, (in_w - 1 - start) // 2 + 1))
                for d in range(packed_d):
                    at_d = plane_d * geometry[conv.PLANE_STEP_D] - geometry[conv.PAD_D] + d * geometry[conv.STRIDE_D]
                    for h in range(packed_h):
                        at_h = (
                            plane_h * geometry[conv.PLANE_STEP_H] - geometry[conv.PAD_H] + h * geometry[conv.STRIDE_H]
                        )
                        copied = first
                        if at_d >= 0 and at_d < in_d and at_h >= 0 and at_h < in_h:
                            copied, source = last, rounded + (at_d * in_h + at_h) * in_w + 2 * first + start
                            if to + last + LANES <= end:
                                every_second(source, last - first, to + first)
                            else:
                                for w in range(last - first):
                                    bytes_(to + first)[w] = bytes_(source)[2 * w]
                        for w in range(first):
                            bytes_(to)[w] = offset
                        for w in range(copied, packed_w):
                            bytes_(to)[w] = offset
                        to += packed_w


def int8_pack_task(j: Pointer, task: int) -> None:
    """A share of the channels of one sample, rounded and packed as bytes; padding is what zero is rounded to."""
    splits, geometry = j[job.ROW_SPLITS], words(j[job.GEOMETRY])
    within, part = task // splits, task % splits
    channels, sample = geometry[conv.CHANNELS], j[job.SAMPLE] + within
    plane = geometry[conv.IN_D] * geometry[conv.IN_H] * geometry[conv.IN_W]
    planes = geometry[conv.PLANES_D] * geometry[conv.PLANES_H] * geometry[conv.PLANES_W]
    spacing = geometry[conv.SPACING_D] * geometry[conv.SPACING_H] * geometry[conv.SPACING_W]
    size = planes * geometry[conv.PACKED_D] * geometry[conv.PACKED_H] * geometry[conv.PACKED_W]
    known = known_of(j, sample)
    offset = ints(known + OFFSETS)[0]
    # Rounding writes up to 16 bytes too many, and packing reads as many.
    memory = allocate(plane + 4 * CACHE_LINE)
    if memory == 0:
        j[job.FAILED] = 1
        return
    packed, rounded = j[job.PACKED] + within * j[job.PACKED_SIZE], aligned(memory)
    for c in range(channels * part // splits, channels * (part + 1) // splits):
        if planes * spacing * geometry[conv.STRIDE_W] == 1:
            _round_rows(j, sample, c, packed + c * size, rounded)
        else:
            take_row(j, (sample * channels + c) * plane, plane, known, rounded)
            if spacing == 1 and geometry[conv.STRIDE_W] == 2:
                _pack_every_second(geometry, rounded, packed + c * size, offset)
            else:
                _conv_pack(bytes_(rounded - c * plane), bytes_(packed), geometry, 0, c, c + 1, np.uint8(offset))
    release(memory)


@compiled
def _store(j: Pointer, sample: int, begin: int, end: int, o0: int, o1: int, limited: bool, out: int) -> None:
    """The outputs ``o0 <= o < o1`` at the positions ``begin <= p < end`` of a packed sample; some are of no output.

    ``limited`` is whether the activation has been applied.
    """
    geometry, n = words(j[job.GEOMETRY]), j[job.OUT_FEATURES]
    out_d, out_h, out_w = geometry[conv.OUT_D], geometry[conv.OUT_H], geometry[conv.OUT_W]
    packed_h, packed_w = geometry[conv.PACKED_H], geometry[conv.PACKED_W]
    activation, has_residual = j[job.ACTIVATION], j[job.RESIDUAL] != 0
    if not has_residual and not limited:
        activate_row(floats(out + o0 * INT8_COLUMNS * 4), (o1 - o0) * INT8_COLUMNS, activation)
    for row in range(begin // packed_w, (end - 1) // packed_w + 1):
        d, h = row // packed_h, row % packed_h
        w = max(0, begin - row * packed_w)
        count = min(out_w, end - row * packed_w) - w
        if d < out_d and h < out_h and count > 0:
            for o in range(o0, o1):
                at = (((sample * n + o) * out_d + d) * out_h + h) * out_w + w
                found = out + (o * INT8_COLUMNS + row * packed_w - begin + w) * 4
                if has_residual:
                    add_floats(j[job.RESIDUAL] + at * 4, found, count)
                    activate_row(floats(found), count, activation)
                put_outputs(j, found, at, count)


@compiled
def _spread(of_sample: int, known: int) -> None:
    """What is known of a sample, as that of each of 64 columns: scales and offsets."""
    scale, offset = floats(of_sample + SCALES)[0], ints(of_sample + OFFSETS)[0]
    for c in range(INT8_COLUMNS):
        floats(known + SCALES)[c], ints(known + OFFSETS)[c] = scale, offset


def int8_conv_task(j: Pointer, task: int) -> None:
    """A share of the filters for 64 neighbouring positions of a packed sample."""
    splits, count, geometry = j[job.ROW_SPLITS], j[job.PANEL_COUNT], words(j[job.GEOMETRY])
    packed_h, packed_w = geometry[conv.PACKED_H], geometry[conv.PACKED_W]
    last_row = (geometry[conv.OUT_D] - 1) * packed_h + geometry[conv.OUT_H] - 1
    positions = last_row * packed_w + geometry[conv.OUT_W]
    tiles = (positions + INT8_COLUMNS - 1) // INT8_COLUMNS
    within, tile, part = task // splits // tiles, task // splits % tiles, task % splits
    sample, begin = j[job.SAMPLE] + within, tile * INT8_COLUMNS
    n, groups = j[job.OUT_FEATURES], geometry[conv.GROUPS]
    planes = geometry[conv.PLANES_D] * geometry[conv.PLANES_H] * geometry[conv.PLANES_W]
    block_size = geometry[conv.CHANNELS] // groups * planes * geometry[conv.PACKED_D] * packed_h * packed_w
    out_bytes, in_features = n * INT8_COLUMNS * 4, j[job.IN_FEATURES]
    memory = allocate(ROOM + out_bytes + KNOWN_BYTES + CACHE_LINE + in_features * TILE_ROW)
    if memory == 0:
        j[job.FAILED] = 1
        return
    room = aligned(memory)
    out, packed = room + ROOM, j[job.PACKED] + within * j[job.PACKED_SIZE] + begin
    known, inputs = out + out_bytes, out + out_bytes + KNOWN_BYTES
    _spread(known_of(j, sample), known)
    group_words = words(j[job.PANEL_GROUPS])
    rows, last, g0 = ints(j[job.PANEL_ROWS]), count * (part + 1) // splits, count * part // splits
    # Where positions are outputs, one for one, those of a tile are neighbours in y, and finished there.
    plane, columns = (
        geometry[conv.OUT_D] * geometry[conv.OUT_H] * geometry[conv.OUT_W],
        min(INT8_COLUMNS, positions - begin),
    )
    size = output_bytes(j)
    neighbours = MASKED or columns == INT8_COLUMNS or size == 1
    in_place = positions == plane and neighbours and is_limit(j[job.ACTIVATION])
    y, y_row = (j[job.Y] + (sample * n * plane + begin) * size, plane * size) if in_place else (0, 0)
    o0, filled = first_output(j, g0), -1
    while o0 < n:
        g1 = g0
        block = -1 if g0 >= last else int(rows[g0 * LANES]) // (n // groups)
        while g1 < min(last, g0 + BLOCK_GROUPS) and int(rows[g1 * LANES]) // (n // groups) == block:
            g1 += 1
        # A filter reads every tenth input or so, but all filters together each input several times, and whole cache
        # lines are read twice as fast as what lies across two.
        if block != filled and block >= 0:
            gather_rows(packed + block * block_size, j[job.OFFSETS], in_features, inputs)
            filled = block
        o1 = n if g1 == count and part == splits - 1 else first_output(j, g1)
        to = out - o0 * INT8_COLUMNS * 4  # so that all blocks use the same memory, which the cache has
        multiplied = group_words[g1 * GROUP_WORDS + GROUP_ROW] - group_words[g0 * GROUP_WORDS + GROUP_ROW]
        whole = o1 - o0 == multiplied
        if in_place and whole:
            multiply_tile(j, g0, g1, inputs, known, columns, True, to, y, y_row, room)
        else:
            # Rows that are ablated are not multiplied: those of their block are limited when they are stored.
            limited = whole and j[job.RESIDUAL] == 0 and is_limit(j[job.ACTIVATION])
            start_outputs(j, g0, g1, o0, o1, INT8_COLUMNS, to)
            multiply_tile(j, g0, g1, inputs, known, columns, limited, to, 0, 0, room)
            _store(j, sample, begin, begin + columns, o0, o1, limited, to)
        if g1 == last:
            break
        g0, o0 = g1, o1
    release(memory)
