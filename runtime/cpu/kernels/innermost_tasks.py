"""The task of convolutions with samples innermost.

Importing it imports Numba. Owns the way through a block of samples: strips of a few output positions in a row of the
image, and for each strip all parts of a sample panel. Only strips that reach over the left or the right border are
copied, with the zeros beside.
"""

from typing import Any, Final

import numpy as np

from srigl_fx.runtime.cpu.kernels import conv, job
from srigl_fx.runtime.cpu.kernels.activations import activate_row
from srigl_fx.runtime.cpu.kernels.compiled import REGISTERS, SAMPLE_BYTES, SAMPLES, compiled
from srigl_fx.runtime.cpu.kernels.copies import copy_floats
from srigl_fx.runtime.cpu.kernels.innermost import (
    SHARING,
    START_BYTES,
    add_positions,
    entry_bytes,
    prefetch_positions,
)
from srigl_fx.runtime.cpu.kernels.innermost_panel import panel_windows
from srigl_fx.runtime.cpu.kernels.job import GROUP_AT, GROUP_SHARED, GROUP_WORDS
from srigl_fx.runtime.cpu.kernels.plan import CACHE_LINE, INNERMOST_POSITIONS, LANES
from srigl_fx.runtime.cpu.kernels.tiles import is_limit, least, most
from srigl_fx.runtime.cpu.kernels.vector import allocate, floats, ints, release, words

Pointer = Any
_SUMS: Final = REGISTERS * LANES // SAMPLES  # of a block, that registers hold besides what is multiplied
_POSITIONS: Final = min(INNERMOST_POSITIONS, _SUMS)  # of a full strip
# Of rows that share their inputs there are four sums to a position: the 32 registers of AVX-512 have room for 16.
_SHARED_POSITIONS: Final = _POSITIONS if SAMPLES == LANES else max(1, _SUMS // SHARING)
_SINGLE_BYTES, _SHARED_BYTES = entry_bytes(1), entry_bytes(SHARING)
_INFINITY: Final = np.float32(np.inf)


def _add_part(count: int) -> Any:
    """A function that adds a part of the panel to ``count`` positions of the output.

    Its arguments are those of :func:`add_positions`, but for the address of the part, how many of its rows are four,
    and how many rows it has, in place of those of entries and their number. While rows are computed, ``ahead_lines``
    cache lines of as many positions from ``ahead`` on are asked for, ``ahead_step`` bytes from one position to the
    next.
    """
    add, prefetch = add_positions(count), prefetch_positions(count)
    together = max(size for size in range(1, _SHARED_POSITIONS + 1) if count % size == 0)
    add_four = add_positions(together, SHARING)

    @compiled
    def ask(ahead: int, ahead_step: int, line: int, end: int) -> int:
        while line < end:
            prefetch(ahead + line * CACHE_LINE, ahead_step)
            line += 1
        return line

    def add_part(
        inputs: int,
        step: int,
        part: int,
        fours: int,
        rows: int,
        bias: int,
        y: int,
        y_step: int,
        residual: int,
        low: float,
        high: float,
        ahead: int,
        ahead_step: int,
        ahead_lines: int,
    ) -> None:
        single = rows - SHARING * fours
        turns = fours * (count // together) + single
        each, line = (ahead_lines + turns - 1) // turns, 0
        end = part
        for p in range(0, count, together):  # of few positions, whose inputs stay in the first-level cache
            end = part
            for _ in range(fours):
                o, weights = int(ints(end)[0]), int(ints(end)[1])
                start = bias + o // SAMPLES if bias != 0 else 0
                at, added = y + o + p * y_step, residual + o + p * y_step if residual != 0 else 0
                add_four(inputs + p * step, step, end + START_BYTES, weights, start, at, y_step, added, low, high)
                end += START_BYTES + _SHARED_BYTES * weights
                line = ask(ahead, ahead_step, line, min(line + each, ahead_lines))
        for _ in range(single):
            o, weights = int(ints(end)[0]), int(ints(end)[1])
            start = bias + o // SAMPLES if bias != 0 else 0
            added = residual + o if residual != 0 else 0
            add(inputs, step, end + START_BYTES, weights, start, y + o, y_step, added, low, high)
            end += START_BYTES + _SINGLE_BYTES * weights
            line = ask(ahead, ahead_step, line, min(line + each, ahead_lines))

    return compiled(add_part)


def _add_up_to(known: int) -> Any:
    """The same for any number of positions up to ``known``, which comes first."""
    add_known = _add_part(known)
    fewer = _add_up_to(known - 1) if known > 1 else None

    def add(
        count: int,
        inputs: int,
        step: int,
        part: int,
        fours: int,
        rows: int,
        bias: int,
        y: int,
        y_step: int,
        residual: int,
        low: float,
        high: float,
        ahead: int,
        ahead_step: int,
        ahead_lines: int,
    ) -> None:
        sums = part, fours, rows, bias, y, y_step, residual, low, high
        following = ahead, ahead_step, ahead_lines
        if fewer is None or count == known:
            add_known(inputs, step, *sums, *following)
        else:
            fewer(count, inputs, step, *sums, *following)

    return compiled(add)


_add = _add_up_to(_POSITIONS)


@compiled
def _clear(at: int, channels: int) -> None:
    zeros = floats(at)
    for i in range(channels * SAMPLES):
        zeros[i] = 0.0


@compiled
def _copy_strip(j: Pointer, x: int, row: int, column: int, span: int, to: int) -> None:
    """Copy ``span`` positions of a row of the image from a column on, with zeros for those that are not in it.

    ``row`` is negative where all are zeros.
    """
    geometry = words(j[job.GEOMETRY])
    width, channels = geometry[conv.IN_W], geometry[conv.CHANNELS]
    low, high = min(span, max(0, -column)), min(span, max(0, width - column))
    if row < 0 or high <= low:
        _clear(to, span * channels)
        return
    size = channels * SAMPLE_BYTES
    _clear(to, low * channels)
    copy_floats(x + (row * width + column + low) * size, to + low * size, (high - low) * channels * SAMPLES)
    _clear(to + high * size, (span - high) * channels)


@compiled
def _run_strip(j: Pointer, block: int, row: int, column: int, count: int, flat: bool, scratch: int) -> None:
    """Compute ``count`` positions of an output row of a block of samples, from a column on."""
    geometry, groups = words(j[job.GEOMETRY]), words(j[job.PANEL_GROUPS])
    channels, n, conv_groups = geometry[conv.CHANNELS], j[job.OUT_FEATURES], geometry[conv.GROUPS]
    in_h, in_w, kernel_h = geometry[conv.IN_H], geometry[conv.IN_W], geometry[conv.KERNEL_H]
    out_plane = geometry[conv.OUT_H] * geometry[conv.OUT_W]
    size, y_size, step = channels * SAMPLE_BYTES, n * SAMPLE_BYTES, geometry[conv.STRIDE_W]
    x = j[job.X] + block * in_h * in_w * size
    at = block * out_plane + row * geometry[conv.OUT_W] + column
    y = j[job.Y] + at * y_size
    residual = j[job.RESIDUAL] + at * y_size if j[job.RESIDUAL] != 0 else 0
    top, left = row * geometry[conv.STRIDE_H] - geometry[conv.PAD_H], column * step - geometry[conv.PAD_W]
    span = (count - 1) * step + (geometry[conv.KERNEL_W] - 1) * geometry[conv.DILATION_W] + 1
    # The rows of the kernel that read inside the image.
    down = geometry[conv.DILATION_H]
    first, last = max(0, (down - 1 - top) // down), min(kernel_h - 1, (in_h - 1 - top) // down)
    width = in_h * in_w if flat else in_w
    outside = first > last
    if outside:
        first = last = 0
    copied = outside or left < 0 or left + span > width
    if copied:
        for tap_row in range(first, last + 1):
            _copy_strip(j, x, -1 if outside else top + tap_row * down, left, span, scratch + tap_row * span * size)
    windows, window, rows = panel_windows(j), j[job.PANEL_WINDOW], n // conv_groups
    activation = j[job.ACTIVATION]
    low, high = least(activation), most(activation)
    for group in range(conv_groups):
        for tap_row in range(first, last + 1):
            within = 0 if outside else ((top + tap_row * down) * in_w + left) * size
            inputs = scratch + tap_row * span * size if copied else x + within
            for w in range(windows):
                part = (group * kernel_h + tap_row) * windows + w
                is_last = tap_row == last and w == windows - 1
                _add(
                    count,
                    inputs,
                    step * size,
                    j[job.PANEL] + groups[part * GROUP_WORDS + GROUP_AT],
                    groups[part * GROUP_WORDS + GROUP_SHARED],
                    rows,
                    j[job.BIAS] if tap_row == first and w == 0 else 0,
                    y,
                    y_size,
                    residual if is_last else 0,
                    low if is_last else -_INFINITY,
                    high if is_last else _INFINITY,
                    x + within + count * step * size + w * window * SAMPLE_BYTES,
                    step * size,
                    (min(window, channels) * SAMPLE_BYTES + CACHE_LINE - 1) // CACHE_LINE if group == 0 else 0,
                )
    if not is_limit(activation):
        activate_row(floats(y), count * n * SAMPLES, activation)


def conv_innermost_task(j: Pointer, task: int) -> None:
    """A share of the strips of one block of samples."""
    geometry, splits = words(j[job.GEOMETRY]), j[job.ROW_SPLITS]
    block, part = task // splits, task % splits
    channels, kernel_w = geometry[conv.CHANNELS], geometry[conv.KERNEL_W]
    steps = geometry[conv.KERNEL_H] * kernel_w * geometry[conv.STRIDE_H] * geometry[conv.STRIDE_W]
    same = geometry[conv.IN_H] == geometry[conv.OUT_H] and geometry[conv.IN_W] == geometry[conv.OUT_W]
    flat = steps == 1 and same and geometry[conv.PAD_H] == 0 and geometry[conv.PAD_W] == 0
    columns = geometry[conv.OUT_H] * geometry[conv.OUT_W] if flat else geometry[conv.OUT_W]
    strips_in_row = (columns + _POSITIONS - 1) // _POSITIONS
    strips = strips_in_row * (1 if flat else geometry[conv.OUT_H])
    span = (_POSITIONS - 1) * geometry[conv.STRIDE_W] + (kernel_w - 1) * geometry[conv.DILATION_W] + 1
    memory = allocate((0 if flat else span * geometry[conv.KERNEL_H] * channels * SAMPLE_BYTES) + CACHE_LINE)
    if memory == 0:
        j[job.FAILED] = 1
        return
    scratch = (memory + CACHE_LINE - 1) // CACHE_LINE * CACHE_LINE
    for strip in range(strips * part // splits, strips * (part + 1) // splits):
        row, column = strip // strips_in_row, strip % strips_in_row * _POSITIONS
        _run_strip(j, block, row, column, min(_POSITIONS, columns - column), flat, scratch)
    release(memory)
