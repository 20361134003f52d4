"""The tasks of what stands between convolutions with samples innermost: pooling, padding, and bringing samples there.

Importing it imports Numba. Concatenation and padding write a tensor into a larger one. Each task treats the blocks of
samples, and in a call of its own the samples behind the last block, which lie as they were.
"""

from typing import Any, Final

import numpy as np

from srigl_fx.runtime.cpu.kernels import conv, job
from srigl_fx.runtime.cpu.kernels.compiled import SAMPLE_BYTES, SAMPLES, compiled
from srigl_fx.runtime.cpu.kernels.copies import copy_floats, transpose_of
from srigl_fx.runtime.cpu.kernels.innermost import pool_largest, pool_mean
from srigl_fx.runtime.cpu.kernels.vector import as_float, floats, words

Pointer = Any
_transpose: Final = transpose_of(SAMPLES)
_INFINITY: Final = np.float32(np.inf)


@compiled
def _taps_inside(start: int, taps: int, dilation: int, size: int) -> Any:
    """The first of the taps from a position on that lies in the image, and the one after the last such."""
    first, end = max(0, (dilation - 1 - start) // dilation), min(taps, (size - 1 - start) // dilation + 1)
    return first, max(first, end)


def pool_samples_task(j: Pointer, task: int) -> None:
    """A share of the pooled positions of one block of samples: the largest number of each window, or (KERNEL is 1) the
    mean, to which padding adds zeros.
    """
    geometry, splits = words(j[job.GEOMETRY]), j[job.ROW_SPLITS]
    block, part = task // splits, task % splits
    channels, in_h, in_w = geometry[conv.CHANNELS], geometry[conv.IN_H], geometry[conv.IN_W]
    out_w, kernel_h, kernel_w = geometry[conv.OUT_W], geometry[conv.KERNEL_H], geometry[conv.KERNEL_W]
    down, right = geometry[conv.DILATION_H], geometry[conv.DILATION_W]
    size, positions = channels * SAMPLE_BYTES, geometry[conv.OUT_H] * out_w
    x, y = j[job.X] + block * in_h * in_w * size, j[job.Y] + block * positions * size
    share = np.float32(1) / np.float32(kernel_h * kernel_w)
    for position in range(positions * part // splits, positions * (part + 1) // splits):
        top = position // out_w * geometry[conv.STRIDE_H] - geometry[conv.PAD_H]
        left = position % out_w * geometry[conv.STRIDE_W] - geometry[conv.PAD_W]
        row, row_end = _taps_inside(top, kernel_h, down, in_h)
        column, column_end = _taps_inside(left, kernel_w, right, in_w)
        inputs = x + ((top + row * down) * in_w + left + column * right) * size
        rows, columns, to = row_end - row, column_end - column, y + position * size
        if j[job.KERNEL] != 0:
            pool_mean(inputs, down * in_w * size, rows, right * size, columns, channels, to, share)
        else:
            pool_largest(inputs, down * in_w * size, rows, right * size, columns, channels, to, share)


@compiled
def _pool_columns(y: Pointer, x: Pointer, tap: int, step: int, first: int, end: int, mean: bool) -> None:
    """Pool a row of the output with a tap of a row of the image, from a column to the one before ``end``."""
    if mean:
        for i in range(first, end):
            y[i] += x[i * step + tap]
    else:
        for i in range(first, end):
            found = x[i * step + tap]
            y[i] = found if found > y[i] or found != found else y[i]


@compiled
def _pool_row(y: Pointer, x: Pointer, tap: int, step: int, first: int, end: int, mean: bool) -> None:
    """The same; with the usual steps known, it is a loop over vectors."""
    if step == 1:
        _pool_columns(y, x, tap, 1, first, end, mean)
    elif step == 2:
        _pool_columns(y, x, tap, 2, first, end, mean)
    else:
        _pool_columns(y, x, tap, step, first, end, mean)


def pool_rest_task(j: Pointer, task: int) -> None:
    """A share of the channels of a sample behind the last block, which lies as it was, pooled as by the task above."""
    geometry, splits, mean = words(j[job.GEOMETRY]), j[job.ROW_SPLITS], j[job.KERNEL] != 0
    sample, part = task // splits, task % splits
    channels, in_h, in_w = geometry[conv.CHANNELS], geometry[conv.IN_H], geometry[conv.IN_W]
    out_h, out_w = geometry[conv.OUT_H], geometry[conv.OUT_W]
    kernel_h, kernel_w = geometry[conv.KERNEL_H], geometry[conv.KERNEL_W]
    down, right, step = geometry[conv.DILATION_H], geometry[conv.DILATION_W], geometry[conv.STRIDE_W]
    share = np.float32(1) / np.float32(kernel_h * kernel_w)
    for channel in range(channels * part // splits, channels * (part + 1) // splits):
        plane = sample * channels + channel
        for out_row in range(out_h):
            y = floats(j[job.Y] + (plane * out_h + out_row) * out_w * 4)
            for i in range(out_w):
                y[i] = np.float32(0) if mean else -_INFINITY
            top = out_row * geometry[conv.STRIDE_H] - geometry[conv.PAD_H]
            row, row_end = _taps_inside(top, kernel_h, down, in_h)
            for r in range(row, row_end):
                x = floats(j[job.X] + (plane * in_h + top + r * down) * in_w * 4)
                for c in range(kernel_w):
                    tap = c * right - geometry[conv.PAD_W]  # that of the first column, which may lie before the image
                    first, end = max(0, (step - 1 - tap) // step), min(out_w, (in_w - 1 - tap) // step + 1)
                    _pool_row(y, x, tap, step, first, max(first, end), mean)
            if mean:
                for i in range(out_w):
                    y[i] *= share


def arrange_task(j: Pointer, task: int) -> None:
    """A share of one block of samples brought to where it has the samples innermost, or (KERNEL is 1) back.

    IN_FEATURES are its channels, OUT_FEATURES the positions of each.
    """
    splits, channels, positions = j[job.ROW_SPLITS], j[job.IN_FEATURES], j[job.OUT_FEATURES]
    block, part = task // splits, task % splits
    size = SAMPLE_BYTES * channels * positions
    back = j[job.KERNEL] != 0
    apart, innermost = (j[job.Y], j[job.X]) if back else (j[job.X], j[job.Y])
    apart, innermost = apart + block * size, innermost + block * size
    sample_step, position_step = channels * positions * 4, channels * SAMPLE_BYTES
    first, last = positions * part // splits, positions * (part + 1) // splits
    while first < last:
        end = min(last, first + SAMPLES)
        for channel in range(channels):
            rows, lines = apart + (channel * positions + first) * 4, innermost + first * position_step
            lines += channel * SAMPLE_BYTES
            if end - first == SAMPLES and back:
                _transpose(lines, position_step, rows, sample_step)
            elif end - first == SAMPLES:
                _transpose(rows, sample_step, lines, position_step)
            else:
                for p in range(end - first):
                    for sample in range(SAMPLES):
                        row, line = floats(rows + sample * sample_step), floats(lines + p * position_step)
                        if back:
                            row[p] = line[sample]
                        else:
                            line[sample] = row[p]
        first = end


@compiled
def _fill(at: int, count: int, value: float) -> None:
    found = floats(at)
    for i in range(count):
        found[i] = value


def place_task(j: Pointer, task: int) -> None:
    """A share of the rows of a tensor written into a larger one, whose rows and groups of rows are longer.

    BATCH groups have OUT_FEATURES rows of IN_FEATURES floats. Before and behind each row are K and BLOCK_ROWS floats,
    before the first and behind the last row of a group SAMPLE and SAMPLES rows. Where KERNEL is 1, all that gets the
    float whose bits are Y_SCALE; else it is left to others.
    """
    rows, size, before, after = j[job.OUT_FEATURES], j[job.IN_FEATURES], j[job.K], j[job.BLOCK_ROWS]
    above, below, fills = j[job.SAMPLE], j[job.SAMPLES], j[job.KERNEL] != 0
    value, width, height = as_float(j[job.Y_SCALE]), before + size + after, above + rows + below
    total, splits = j[job.BATCH] * height, j[job.ROW_SPLITS]
    for placed in range(total * task // splits, total * (task + 1) // splits):
        group, row = placed // height, placed % height - above
        to = j[job.Y] + placed * width * 4
        if row >= 0 and row < rows:
            copy_floats(j[job.X] + (group * rows + row) * size * 4, to + before * 4, size)
            if fills:
                _fill(to, before, value)
                _fill(to + (before + size) * 4, after, value)
        elif fills:
            _fill(to, width, value)


@compiled
def _affine(x: Pointer, y: Pointer, count: int, scale: float, shift: float) -> None:
    for i in range(count):
        y[i] = x[i] * scale + shift


def affine_task(j: Pointer, task: int) -> None:
    """A share of the rows of a tensor, of which each channel is multiplied with a number and has one added to it.

    BATCH rows have IN_FEATURES channels of K floats; SCALES and BIAS have a number for each channel.
    """
    channels, size, splits = j[job.IN_FEATURES], j[job.K], j[job.ROW_SPLITS]
    scales, shifts = floats(j[job.SCALES]), floats(j[job.BIAS])
    for row in range(j[job.BATCH] * task // splits, j[job.BATCH] * (task + 1) // splits):
        at = row * channels * size * 4
        for channel in range(channels):
            x, y = floats(j[job.X] + at), floats(j[job.Y] + at)
            if size == SAMPLES:  # a known count is one vector, or two
                _affine(x, y, SAMPLES, scales[channel], shifts[channel])
            else:
                _affine(x, y, size, scales[channel], shifts[channel])
            at += size * 4
