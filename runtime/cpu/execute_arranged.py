"""One call of what stands between convolutions with samples innermost, as jobs for the kernels.

Owns how the blocks of samples, and those behind the last block, are shared out; operands are valid and contiguous. It
must not know how operators are registered, checked or differentiated.
"""

import ctypes
import math
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from srigl_fx.runtime.arranged import block_samples, whole_blocks
from srigl_fx.runtime.cpu import threads
from srigl_fx.runtime.cpu.entries import entry
from srigl_fx.runtime.cpu.execute_conv import geometry_numbers, plain_geometry
from srigl_fx.runtime.cpu.kernels import job, plan
from srigl_fx.runtime.cpu.kernels.plan import LANES
from srigl_fx.runtime.cpu.prepared_weights import Job


def arrange(x: Tensor, y: Tensor, back: bool) -> None:
    """Write ``x`` with its samples innermost to ``y``, or ``back``; both are contiguous, with channels at axis 1."""
    whole, thread_count = whole_blocks(x.shape[0]), torch.get_num_threads()
    y[whole:] = x[whole:]
    positions = math.prod(x.shape[2:])
    if not whole or not positions * x.shape[1]:
        return
    j = Job()
    j[job.X], j[job.Y], j[job.KERNEL] = x.data_ptr(), y.data_ptr(), int(back)
    j[job.IN_FEATURES], j[job.OUT_FEATURES] = x.shape[1], positions
    blocks = whole // block_samples()
    j[job.ROW_SPLITS] = splits = plan.innermost_splits(blocks, -(-positions // LANES), x.numel(), thread_count)
    threads.run(entry("arrange_task"), ctypes.addressof(j), blocks * splits, thread_count)


def pool(
    x: Tensor,
    y: Tensor,
    window: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    mean: bool,
) -> None:
    """Pool ``x``, whose samples are arranged, into ``y``; both are contiguous, with one or two axes."""
    batch, channels, thread_count = *x.shape[:2], torch.get_num_threads()
    whole, positions = whole_blocks(batch), math.prod(y.shape[2:])
    if not y.numel():
        return
    numbers = geometry_numbers(
        x.shape, (channels, channels, *window), stride, padding, dilation, channels, False, y.shape, 0
    )
    geometry = plain_geometry(numbers)
    # Of blocks the positions are shared out, of the samples behind them the channels.
    for task, first, samples, each, parts in (
        ("pool_samples_task", 0, whole, block_samples(), -(-positions // LANES)),
        ("pool_rest_task", whole, batch - whole, 1, channels),
    ):
        if samples:
            j, blocks, work = Job(), samples // each, samples * channels * positions * math.prod(window)
            j[job.X], j[job.Y], j[job.KERNEL] = x[first:].data_ptr(), y[first:].data_ptr(), int(mean)
            j[job.GEOMETRY] = ctypes.addressof(geometry)
            j[job.ROW_SPLITS] = splits = plan.innermost_splits(blocks, parts, work, thread_count)
            threads.run(entry(task), ctypes.addressof(j), blocks * splits, thread_count)


def pad(x: Tensor, y: Tensor, before: Sequence[int], after: Sequence[int], value: float) -> None:
    """Write ``x``, whose samples are arranged, to ``y``, with ``value`` before and behind each of one or two axes."""
    lead, (batch, channels) = [0] * (4 - x.dim()), x.shape[:2]
    (above, left), (below, right), (rows, columns) = [*lead, *before], [*lead, *after], [*lead, *x.shape[2:]]
    rows, whole, block = max(rows, len(lead)), whole_blocks(batch), block_samples()
    # Of blocks a number is a position's channels, of the samples behind them the rows of each channel are a group.
    for first, samples, groups, each in ((0, whole, whole // block, channels * block), (whole, batch - whole, 0, 1)):
        groups = groups or samples * channels
        if samples and y.numel():
            around = left * each, right * each, above, below
            _place(x[first:], y[first:], groups, rows, columns * each, around, value)


def concat(x: Tensor, other: Tensor, y: Tensor) -> None:
    """Write the channels of ``x`` and then of ``other``, whose samples are arranged, to ``y``."""
    batch, channels = y.shape[:2]
    positions, whole, block, at = math.prod(y.shape[2:]), whole_blocks(batch), block_samples(), 0
    for part in (x, other):
        own = part.shape[1]
        for first, groups, each in ((0, whole // block * positions, block), (whole, batch - whole, positions)):
            if groups and own * positions:
                around = at * each, (channels - at - own) * each, 0, 0
                _place(part[first:], y[first:], groups, 1, own * each, around, None)
        at += own


def _place(
    x: Tensor, y: Tensor, groups: int, rows: int, size: int, around: tuple[int, int, int, int], value: float | None
) -> None:
    """Write groups of rows into longer ones (``place_task``), and the value, if there is one, around them."""
    j, thread_count = Job(), torch.get_num_threads()
    j[job.X], j[job.Y] = x.data_ptr(), y.data_ptr()
    j[job.BATCH], j[job.OUT_FEATURES], j[job.IN_FEATURES] = groups, rows, size
    j[job.K], j[job.BLOCK_ROWS], j[job.SAMPLE], j[job.SAMPLES] = around
    if value is not None:
        j[job.KERNEL], j[job.Y_SCALE] = 1, struct.unpack("i", struct.pack("f", value))[0]
    total = groups * (rows + around[2] + around[3])
    j[job.ROW_SPLITS] = splits = plan.innermost_splits(1, total, total * (size + sum(around[:2])), thread_count)
    threads.run(entry("place_task"), ctypes.addressof(j), splits, thread_count)


def affine(x: Tensor, y: Tensor, scale: Tensor, shift: Tensor) -> None:
    """Write ``x``, whose samples are arranged, times ``scale`` plus ``shift``, a number for each channel, to ``y``."""
    j, thread_count = Job(), torch.get_num_threads()
    j[job.SCALES], j[job.BIAS], j[job.IN_FEATURES] = scale.data_ptr(), shift.data_ptr(), x.shape[1]
    positions, whole, block = math.prod(x.shape[2:]), whole_blocks(x.shape[0]), block_samples()
    for first, rows, each in ((0, whole // block * positions, block), (whole, x.shape[0] - whole, positions)):
        if rows and x.numel():
            j[job.X], j[job.Y], j[job.BATCH], j[job.K] = x[first:].data_ptr(), y[first:].data_ptr(), rows, each
            work = rows * each * x.shape[1]
            j[job.ROW_SPLITS] = splits = plan.innermost_splits(1, rows, work, thread_count)
            threads.run(entry("affine_task"), ctypes.addressof(j), splits, thread_count)
