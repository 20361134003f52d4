"""One call of a condensed convolution, as jobs for the kernels.

Owns its geometry, the scratch of kernels, and the call of their tasks, as the plan has them
(:mod:`srigl_fx.runtime.cpu.kernels.plan`); operands are valid. It must not know how operators are registered, checked
or differentiated.
"""

import ctypes
import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from srigl_fx.runtime.activations import NUMBERS
from srigl_fx.runtime.arranged import block_samples, whole_blocks
from srigl_fx.runtime.cpu import threads
from srigl_fx.runtime.cpu.entries import entry
from srigl_fx.runtime.cpu.execute import (
    Given,
    Prepared,
    level,
    looks_up,
    may_pack,
    raise_if_failed,
    round_samples,
    set_scales,
    stored,
    weight_job,
)
from srigl_fx.runtime.cpu.kernels import conv, job, plan
from srigl_fx.runtime.cpu.kernels.plan import COLUMNS, LANES
from srigl_fx.runtime.cpu.kernels.table import KERNELS
from srigl_fx.runtime.cpu.prepared_weights import Job
from srigl_fx.runtime.validation import Checked

_TASKS = {kernel.number: kernel.task for kernel in KERNELS if kernel.layer == "convolution"}
_SLACK = 64  # floats behind a packed sample that may be read


@functools.lru_cache(maxsize=4096)
def _conv_plan(
    in_features: int, n_active: int, k: int, block_rows: int, packed: bool, index_rows: int
) -> tuple[int, int]:
    """The kernel of a convolution and the window of the panel that it reads."""
    kernel = plan.conv_kernel(in_features, n_active, k, block_rows, packed)
    kernel = plan.for_shared(kernel, n_active, index_rows)
    return kernel, plan.window_of(kernel, level(), in_features, n_active, k)


@functools.lru_cache(maxsize=1024)
def _geometry(numbers: tuple[int, ...]) -> "tuple[ctypes.Array[ctypes.c_int64], Tensor, int, int]":
    """The geometry as kernels read it, its taps' offsets, the elements of a packed sample, and its positions.

    All are shared by threads and never written.
    """
    geometry = (ctypes.c_int64 * conv.GEOMETRY_SIZE)(*numbers)
    conv.conv_plan(geometry)
    taps = math.prod(geometry[conv.KERNEL_D : conv.KERNEL_W + 1]) * geometry[conv.CHANNELS] // geometry[conv.GROUPS]
    offsets = torch.empty(taps, dtype=torch.int64)
    j = Job()
    j[job.GEOMETRY], j[job.OFFSETS] = ctypes.addressof(geometry), offsets.data_ptr()
    entry("conv_offsets")[0](ctypes.addressof(j), 0)
    rows = (geometry[conv.OUT_D] - 1) * geometry[conv.PACKED_H] + geometry[conv.OUT_H] - 1
    return geometry, offsets, _packed_size(geometry), rows * geometry[conv.PACKED_W] + geometry[conv.OUT_W]


def convolution(
    checked: Checked | None,
    operands: Sequence[Tensor],
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    transposed: bool,
    y: Tensor,
    residual: Tensor | None,
    activation: str,
    scales: Tensor | None = None,
    given: Given = (None, 0),
    wanted: Given = (None, 0),
) -> None:
    """Compute ``y``, which has elements, over one to three axes; operands, residual and ``y`` are contiguous."""
    x, *weight = operands
    settings = weight_shape, stride, padding, dilation, groups, transposed
    planned = _planned(checked, weight, weight_shape, groups, scales)
    if planned[0] == plan.ROWS and wanted[0] is not None:  # of a layer without weights; its kernel is that of floats
        floats = torch.empty_like(y, dtype=torch.float32)
        convolution(checked, operands, *settings, floats, residual, activation, scales, given)
        y.copy_(round_samples(floats, wanted[0], wanted[1]))
        return
    if planned[0] == plan.ROWS:
        x, weight[0] = x.float(), weight[0].float()
    j, start = _conv_job(checked, planned, x, weight, *settings, y.shape, activation, scales, given, wanted)
    j[job.X], j[job.Y] = x.data_ptr(), y.data_ptr()
    j[job.RESIDUAL] = 0 if residual is None else residual.data_ptr()
    start(j, x)


def prepare_convolution(
    checked: Checked | None,
    x: Tensor,
    weight: Sequence[Tensor],
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    transposed: bool,
    shape: Sequence[int],
    activation: str,
    scales: Tensor | None = None,
    given: Given = (None, 0),
    wanted: Given = (None, 0),
) -> Prepared | None:
    """What calls of :func:`convolution` share whose samples have one shape; None where it takes other steps.

    ``shape`` is that of the outputs.
    """
    planned = _planned(checked, weight, weight_shape, groups, scales)
    fits = planned[0] != plan.ROWS and x.is_contiguous() and may_pack(checked, weight[0], scales)
    count: int = math.prod(shape)
    if not (fits and count):
        return None
    settings = weight_shape, stride, padding, dilation, groups, transposed
    j, start = _conv_job(checked, planned, x, weight, *settings, shape, activation, scales, given, wanted)
    return Prepared(bytes(j), j.memory, tuple(shape), stored(wanted), False, start)  # type: ignore[attr-defined]


def _planned(
    checked: Checked | None, weight: Sequence[Tensor], weight_shape: Sequence[int], groups: int, scales: Tensor | None
) -> tuple[int, int]:
    """The kernel of a convolution and the window of the panel that it reads."""
    values, indices = weight[:2]
    in_features: int = math.prod(weight_shape[1:])
    n_active, k = values.shape
    if scales is not None:
        kernel = plan.int8_conv_kernel(n_active, k)
        return kernel, plan.int8_window(looks_up(), kernel, in_features, k)
    packed, block_rows = may_pack(checked, values), weight_shape[0] // groups
    return _conv_plan(in_features, n_active, k, block_rows, packed, indices.shape[0])


def _conv_job(
    checked: Checked | None,
    planned: tuple[int, int],
    x: Tensor,
    weight: Sequence[Tensor],
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    transposed: bool,
    shape: Sequence[int],
    activation: str,
    scales: Tensor | None,
    given: Given,
    wanted: Given,
) -> "tuple[ctypes.Array[ctypes.c_int64], Callable[[ctypes.Array[ctypes.c_int64], Tensor], None]]":
    """A job but for its tensors, and what runs it."""
    n, (n_active, k) = weight_shape[0], weight[0].shape
    numbers = geometry_numbers(x.shape, weight_shape, stride, padding, dilation, groups, transposed, shape, k)
    geometry, offsets, size, positions = _geometry(numbers)
    j = weight_job(checked, planned, weight, math.prod(weight_shape[1:]), n // groups, scales)
    set_scales(j, given, wanted, x)
    j[job.GEOMETRY], j[job.OFFSETS] = ctypes.addressof(geometry), offsets.data_ptr()
    j[job.ACTIVATION], j[job.BATCH] = NUMBERS[activation], x.shape[0]
    j.memory = j.memory, geometry, offsets  # type: ignore[attr-defined]
    if scales is not None and planned[0] == plan.INT8_TILE:
        return j, functools.partial(_run_byte_samples, size, positions)
    if planned[0] == plan.ROWS:
        return j, functools.partial(_run_samples, bool(geometry[conv.DIRECT]), size, positions)
    outputs, thread_count = math.prod(shape) // n, torch.get_num_threads()
    tiles = -(-outputs // COLUMNS)
    j[job.ROW_SPLITS] = splits = plan.shares(tiles, n_active // LANES, outputs * n_active * k, thread_count)
    return j, functools.partial(_run_tiles, _TASKS[planned[0]], tiles * splits, thread_count)


def geometry_numbers(
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    transposed: bool,
    shape: Sequence[int],
    k: int,
) -> tuple[int, ...]:
    """What is given of the geometry that kernels read; ``shape`` is that of the outputs."""
    n, _, *taps = weight_shape
    lead = 3 - len(taps)
    one, zero = (1,) * lead, (0,) * lead
    spacing, step, before = [1] * len(taps), list(stride), list(padding)
    if transposed:
        spacing, step = step, spacing
        before = [d * (size - 1) - p for d, size, p in zip(dilation, taps, padding, strict=True)]
    sizes = (x_shape[1], n, groups, *one, *x_shape[2:], *one, *shape[2:], *one, *taps, *one, *step, *zero, *before)
    return (*sizes, *one, *dilation, *one, *spacing, int(transposed), k)


def innermost_convolution(
    checked: Checked | None,
    operands: Sequence[Tensor],
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    y: Tensor,
    residual: Tensor | None,
    activation: str,
) -> None:
    """Compute ``y`` where it, ``x`` and the residual have samples innermost (:mod:`srigl_fx.runtime.arranged`).

    Samples behind the last whole block are computed as :func:`convolution` has it. All tensors are contiguous.
    """
    x, *weight = operands
    batch, settings = x.shape[0], (weight_shape, stride, padding, dilation, groups, False)
    whole = whole_blocks(batch)
    if whole:
        (n_active, k), n, in_features = weight[0].shape, weight_shape[0], math.prod(weight_shape[1:])
        numbers = geometry_numbers(x.shape, *settings, y.shape, k)
        geometry = plain_geometry(numbers)
        without_sizes = tuple(0 if conv.IN_D <= i <= conv.OUT_W else one for i, one in enumerate(numbers))
        planned = plan.INNERMOST, plan.window_of(plan.INNERMOST, level(), in_features, n_active, k)
        j = weight_job(checked, planned, weight, in_features, n // groups, None, without_sizes)
        j[job.GEOMETRY], j[job.ACTIVATION] = ctypes.addressof(geometry), NUMBERS[activation]
        j[job.X], j[job.Y], j[job.BATCH] = x.data_ptr(), y.data_ptr(), whole
        j[job.RESIDUAL] = 0 if residual is None else residual.data_ptr()
        blocks, positions, thread_count = whole // block_samples(), math.prod(y.shape[2:]), torch.get_num_threads()
        splits = plan.innermost_splits(blocks, -(-positions // LANES), whole * positions * n_active * k, thread_count)
        j[job.ROW_SPLITS] = splits
        _run_tiles(_TASKS[plan.INNERMOST], blocks * splits, thread_count, j, x)
    if whole < batch:
        rest = None if residual is None else residual[whole:]
        convolution(checked, (x[whole:], *weight), *settings, y[whole:], rest, activation)


@functools.lru_cache(maxsize=1024)
def plain_geometry(numbers: tuple[int, ...]) -> "ctypes.Array[ctypes.c_int64]":
    """The geometry for kernels that have no packed samples; shared by threads and never written."""
    return (ctypes.c_int64 * conv.GEOMETRY_SIZE)(*numbers)


def _run_tiles(task: str, tasks: int, thread_count: int, j: "ctypes.Array[ctypes.c_int64]", x: Tensor) -> None:
    """Run the tasks of a kernel that fills its tiles from the samples themselves."""
    threads.run(entry(task), ctypes.addressof(j), tasks, thread_count)
    raise_if_failed(j)


def _packed_size(geometry: "ctypes.Array[ctypes.c_int64]") -> int:
    """The elements of a packed sample, with those behind it that may be read."""
    size = geometry[conv.CHANNELS] * math.prod(geometry[conv.PLANES_D : conv.PACKED_W + 1])
    return (size // LANES + 2) * LANES + _SLACK


def _run_samples(direct: bool, size: int, positions: int, j: "ctypes.Array[ctypes.c_int64]", x: Tensor) -> None:
    """Pack and convolve the samples, a chunk at a time."""
    batch, thread_count, work = x.shape[0], torch.get_num_threads(), positions * j[job.N_ACTIVE] * j[job.K]
    chunk = batch if direct else max(1, min(batch, plan.CHUNK_FLOATS // size))
    packed = x if direct else x.new_empty(chunk * size)
    j[job.PACKED], j[job.PACKED_SIZE] = packed.data_ptr(), size
    address = ctypes.addressof(j)
    for first in range(0, batch, chunk):
        samples = min(chunk, batch - first)
        j[job.SAMPLE], j[job.SAMPLES] = first, samples
        if not direct:
            splits = plan.shares(samples, x.shape[1], samples * size, thread_count)
            j[job.ROW_SPLITS] = splits
            threads.run(entry("conv_pack_task"), address, samples * splits, thread_count)
        splits = plan.shares(samples, j[job.N_ACTIVE] // LANES, samples * work, thread_count)
        j[job.ROW_SPLITS] = splits
        threads.run(entry("conv_rows_task"), address, samples * splits, thread_count)
    raise_if_failed(j)


def _run_byte_samples(size: int, positions: int, j: "ctypes.Array[ctypes.c_int64]", x: Tensor) -> None:
    """The same for values of eight bits: samples are rounded as they are packed."""
    batch, thread_count = x.shape[0], torch.get_num_threads()
    chunk = max(1, min(batch, 4 * plan.CHUNK_FLOATS // size))
    packed = x.new_empty(chunk * size, dtype=torch.uint8)
    known = x.new_empty(plan.int8_known_blocks(batch) * plan.KNOWN_BYTES, dtype=torch.uint8)
    j[job.PACKED], j[job.PACKED_SIZE], j[job.X_SCALES] = packed.data_ptr(), size, known.data_ptr()
    address, tiles = ctypes.addressof(j), -(-positions // plan.INT8_COLUMNS)
    threads.run(entry("int8_scales_task"), address, batch, thread_count)
    for first in range(0, batch, chunk):
        samples = min(chunk, batch - first)
        j[job.SAMPLE], j[job.SAMPLES] = first, samples
        splits = plan.shares(samples, x.shape[1], samples * size, thread_count)
        j[job.ROW_SPLITS] = splits
        threads.run(entry("int8_pack_task"), address, samples * splits, thread_count)
        work = samples * positions * j[job.N_ACTIVE] * j[job.K]
        splits = plan.shares(samples * tiles, j[job.N_ACTIVE] // LANES, work, thread_count)
        j[job.ROW_SPLITS] = splits
        threads.run(entry("int8_conv_task"), address, samples * tiles * splits, thread_count)
    raise_if_failed(j)
