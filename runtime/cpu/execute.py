"""One call of a condensed operator, as jobs for the kernels.

Owns the layouts of tensors, the scratch of kernels, and the call of their tasks, as the plan has them
(:mod:`srigl_fx.runtime.cpu.kernels.plan`); operands are valid. It must not know how operators are registered, checked
or differentiated.
"""

import ctypes
import functools
import math
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from srigl_fx.runtime.activations import NUMBERS
from srigl_fx.runtime.cpu import threads
from srigl_fx.runtime.cpu.entries import entry
from srigl_fx.runtime.cpu.kernels import conv, job, plan
from srigl_fx.runtime.cpu.kernels.isa import ISAS, host_isa, looks_up_bytes
from srigl_fx.runtime.cpu.kernels.plan import CACHE_LINE, COLUMNS, LANES
from srigl_fx.runtime.cpu.kernels.table import KERNELS
from srigl_fx.runtime.cpu.prepared_weights import Job, index_rows_of, new_job, pack, panel_of
from srigl_fx.runtime.validation import Checked

Given = tuple[float | None, int]  # the scale that samples, or outputs, are rounded with, if one is, and its offset
_TASKS = {kernel.number: kernel.task for kernel in KERNELS if kernel.layer == "linear"}
_CONV_TASKS = {kernel.number: kernel.task for kernel in KERNELS if kernel.layer == "convolution"}
_COLUMNS = {
    plan.TILE: COLUMNS,
    plan.SHARED_TILE: COLUMNS,
    plan.INT8_TILE: plan.INT8_COLUMNS,
}  # of the kernels that compute tiles
_SLACK = 64  # floats behind a packed sample that may be read
_FLOAT, _FLOAT_BITS = struct.Struct("f"), struct.Struct("I")
_looks_up_bytes = functools.cache(looks_up_bytes)


@functools.cache
def _level() -> int:
    return ISAS.index(host_isa())


# The rules of the plan are Python here, on the path of every call: asked once for each set of sizes.
@functools.lru_cache(maxsize=4096)
def _linear_plan(
    in_features: int, n_active: int, k: int, batch: int, feature_major: bool, packed: bool, index_rows: int
) -> tuple[int, int]:
    """The kernel of a linear layer and the window of the panel that it reads."""
    kernel = plan.linear_kernel(_level(), in_features, n_active, k, batch, feature_major, packed)
    kernel = plan.for_shared(kernel, n_active, index_rows)
    return kernel, plan.window_of(kernel, _level(), in_features, n_active, k)


@functools.lru_cache(maxsize=4096)
def _int8_plan(in_features: int, n_active: int, k: int, batch: int, feature_major: bool) -> tuple[int, int]:
    """The same for values of eight bits."""
    kernel = plan.int8_linear_kernel(_looks_up_bytes(), in_features, n_active, k, batch, feature_major)
    return kernel, plan.int8_window(_looks_up_bytes(), kernel, in_features, k)


@functools.lru_cache(maxsize=4096)
def _conv_plan(
    in_features: int, n_active: int, k: int, block_rows: int, packed: bool, index_rows: int
) -> tuple[int, int]:
    """The kernel of a convolution and the window of the panel that it reads."""
    kernel = plan.conv_kernel(in_features, n_active, k, block_rows, packed)
    kernel = plan.for_shared(kernel, n_active, index_rows)
    return kernel, plan.window_of(kernel, _level(), in_features, n_active, k)


def _may_pack(checked: Checked | None, values: Tensor, scales: Tensor | None = None) -> bool:
    """Whether a packed weight may be kept: torch must count the writes to it."""
    return checked is not None and not (values.is_inference() or (scales is not None and scales.is_inference()))


def _job(
    checked: Checked | None,
    planned: tuple[int, int],
    operands: Sequence[Tensor],
    in_features: int,
    block_rows: int,
    y: Tensor,
    scales: Tensor | None = None,
) -> "ctypes.Array[ctypes.c_int64]":
    """A job for this kernel with all that is about the operands and ``y``; packed is what it reads packed."""
    x, values, indices, active, bias = operands
    kernel, window = planned
    if window:
        found = kernel, window, values, indices, active, in_features, bias.shape[0], block_rows, scales
        if checked is not None and _may_pack(checked, values, scales):
            j = Job.from_buffer_copy(panel_of(checked, *found).template)
        else:  # values of eight bits have no kernel that reads the canonical format
            template, memory = pack(*found)
            j = Job.from_buffer_copy(template)
            j.memory = memory  # type: ignore[attr-defined] # as long as the job lives
    else:
        j = new_job(values, indices, active, in_features, bias.shape[0])
    j[job.X], j[job.Y], j[job.BIAS] = x.data_ptr(), y.data_ptr(), bias.data_ptr()
    j[job.VALUES], j[job.INDICES], j[job.ACTIVE] = values.data_ptr(), indices.data_ptr(), active.data_ptr()
    j[job.INDEX_ROWS] = index_rows_of(active)
    return j


def _set_given(j: "ctypes.Array[ctypes.c_int64]", given: Given, x: Tensor) -> None:
    scale, offset = given
    if scale is not None:
        j[job.X_SCALE], j[job.X_OFFSET] = _FLOAT_BITS.unpack(_FLOAT.pack(scale))[0], offset
        j[job.X_BYTES] = x.dtype is torch.uint8


def _set_wanted(j: "ctypes.Array[ctypes.c_int64]", wanted: Given) -> None:
    scale, offset = wanted
    if scale is not None:
        j[job.Y_SCALE], j[job.Y_OFFSET] = _FLOAT_BITS.unpack(_FLOAT.pack(scale))[0], offset


def round_samples(x: Tensor, scale: float, offset: int) -> Tensor:
    """``x`` as bytes, which lie as ``torch.empty_like`` has them."""
    y = torch.empty_like(x, dtype=torch.uint8)
    if y.stride() != x.stride():  # as x has gaps
        x = torch.empty_like(x).copy_(x)
    if not y.numel():
        return y
    j = Job()
    _set_given(j, (scale, offset), x)
    j[job.X], j[job.Y], j[job.BATCH] = x.data_ptr(), y.data_ptr(), y.numel()
    thread_count = torch.get_num_threads()
    j[job.ROW_SPLITS] = splits = 1 if y.numel() < plan.MOST_INLINE else thread_count
    threads.run(entry("int8_round_task"), ctypes.addressof(j), splits, thread_count)
    _raise_if_failed(j)
    return y


def linear(
    checked: Checked | None,
    x: Tensor,
    weight: Sequence[Tensor],
    in_features: int,
    residual: Tensor | None,
    activation: str,
    y_feature_major: bool,
    scales: Tensor | None = None,
    given: Given = (None, 0),
    wanted: Given = (None, 0),
) -> Tensor:
    """The outputs (..., n) of samples (..., in_features), with the memory of (n, ...) if so asked.

    ``x`` is read as it lies if it is contiguous, or if its (in_features, ...) transposed is and the kernel can.

    Args:
        checked: What is known about the weight.
        x: The samples.
        weight: Contiguous values, indices, active and bias, as :mod:`srigl_fx.runtime.format` has them.
        in_features: The inputs of the layer.
        residual: Of the output's shape, or None.
        activation: The activation's name.
        y_feature_major: Whether the output's transposed is to be contiguous.
        scales: Of the rows, with values of eight bits.
        given: The scale to round ``x`` with, and its offset.
        wanted: The scale to round outputs with, and its offset.
    """
    values, n = weight[0], weight[3].shape[0]
    shape = (*x.shape[:-1], n)
    batch = math.prod(shape[:-1])
    x_columns = not x.is_contiguous() and x.dim() > 1 and x.movedim(-1, 0).is_contiguous()
    columns = x_columns or y_feature_major
    if scales is not None:
        planned = kernel, _ = _int8_plan(in_features, *values.shape, batch, columns)
    else:
        packed, index_rows = _may_pack(checked, values), weight[1].shape[0]
        planned = kernel, _ = _linear_plan(in_features, *values.shape, batch, columns, packed, index_rows)
    if kernel == plan.STRIDED or (columns and kernel == plan.INT8_DOT):
        # It is plain and slow, for hosts where an operator cannot ask for other layouts; here copies are at hand.
        y = linear(checked, x.contiguous(), weight, in_features, residual, activation, False, scales, given, wanted)
        return y.movedim(-1, 0).contiguous().movedim(0, -1) if y_feature_major else y
    if kernel == plan.ROWS and wanted[0] is not None:  # of a layer without weights; its kernel is that of floats
        y = linear(checked, x, weight, in_features, residual, activation, False, scales, given)
        return round_samples(y, wanted[0], wanted[1])
    x = x.movedim(-1, 0) if x_columns else x.contiguous()
    kept = (n, *shape[:-1]) if y_feature_major else shape
    y = x.new_empty(kept, dtype=torch.float32 if wanted[0] is None else torch.uint8)
    y = y.movedim(0, -1) if y_feature_major else y
    if not y.numel():
        return y
    if residual is not None:
        residual = residual.movedim(-1, 0).contiguous() if y_feature_major else residual.contiguous()
    first, samples = 0, batch
    while True:
        j = _job(checked, planned, (x, *weight), in_features, n, y, scales)
        _set_given(j, given, x)
        _set_wanted(j, wanted)
        if scales is not None:
            samples = plan.int8_linear_samples(_looks_up_bytes(), planned[0], batch - first, columns)
        j[job.BATCH], j[job.ACTIVATION] = samples, NUMBERS[activation]
        j[job.X_FEATURE_MAJOR], j[job.Y_FEATURE_MAJOR] = x_columns, y_feature_major
        j[job.RESIDUAL] = 0 if residual is None else residual.data_ptr() + first * n * 4
        j[job.X] += first * in_features * x.element_size()
        j[job.Y] += first * n * y.element_size()
        _run_linear(j, planned, x)
        first += samples
        if first == batch:
            return y
        planned = _int8_plan(in_features, *values.shape, batch - first, columns)


def _run_linear(j: "ctypes.Array[ctypes.c_int64]", planned: tuple[int, int], x: Tensor) -> None:
    """Run a kernel on the samples of a job."""
    kernel, batch, n_active = planned[0], j[job.BATCH], j[job.N_ACTIVE]
    thread_count = torch.get_num_threads()
    tiles = -(-batch // _COLUMNS[kernel]) if kernel in _COLUMNS else 1
    splits = plan.shares(tiles, n_active // LANES, batch * n_active * j[job.K], thread_count)
    if kernel in (plan.INT8_DOT, plan.INT8_TILE) and splits > 1:
        _round_samples(j, x, planned, thread_count)
    j[job.ROW_SPLITS] = splits
    threads.run(entry(_TASKS[kernel]), ctypes.addressof(j), tiles * splits, thread_count)
    _raise_if_failed(j)


def _round_samples(j: "ctypes.Array[ctypes.c_int64]", x: Tensor, planned: tuple[int, int], thread_count: int) -> None:
    """Round all samples of a linear layer once, for tasks that share them; the job keeps what they are rounded to."""
    kernel, window = planned
    batch, in_features, columns = j[job.BATCH], j[job.IN_FEATURES], j[job.X_FEATURE_MAJOR]
    blocks = plan.int8_known_blocks(batch)
    known = x.new_zeros(blocks * plan.KNOWN_BYTES, dtype=torch.uint8)
    rounded = x.new_empty(plan.int8_rounded_bytes(kernel, in_features, window, batch) + CACHE_LINE, dtype=torch.uint8)
    j[job.X_SCALES], j[job.PACKED] = known.data_ptr(), -(-rounded.data_ptr() // CACHE_LINE) * CACHE_LINE
    j.rounded = known, rounded  # type: ignore[attr-defined] # as long as the job lives
    address, few = ctypes.addressof(j), batch * in_features < plan.MOST_INLINE
    team = 1 if few else thread_count
    threads.run(entry("int8_scales_task"), address, -(-batch // LANES) if columns else batch, team)
    shares = 1 if few or kernel == plan.INT8_DOT else max(1, thread_count // blocks)
    j[job.ROW_SPLITS] = shares
    threads.run(entry("int8_fill_task"), address, (batch if kernel == plan.INT8_DOT else blocks) * shares, team)


def _raise_if_failed(j: "ctypes.Array[ctypes.c_int64]") -> None:
    if j[job.FAILED]:
        raise MemoryError("a condensed operator found no memory for its scratch; use a smaller batch")


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
    x, values, indices, active, bias = operands
    n, _, *taps = weight_shape
    lead = 3 - len(taps)
    one, zero = (1,) * lead, (0,) * lead
    spacing, step, before = [1] * len(taps), list(stride), list(padding)
    if transposed:
        spacing, step = step, spacing
        before = [d * (size - 1) - p for d, size, p in zip(dilation, taps, padding, strict=True)]
    sizes = (x.shape[1], n, groups, *one, *x.shape[2:], *one, *y.shape[2:], *one, *taps, *one, *step, *zero, *before)
    n_active, k = values.shape
    numbers = (*sizes, *one, *dilation, *one, *spacing, int(transposed), k)
    geometry, offsets, size, positions = _geometry(numbers)
    in_features, block_rows = math.prod(weight_shape[1:]), n // groups
    if scales is not None:
        kernel = plan.int8_conv_kernel(n_active, k)
        planned = kernel, plan.int8_window(_looks_up_bytes(), kernel, in_features, k)
    else:
        packed, index_rows = _may_pack(checked, values), indices.shape[0]
        planned = kernel, _ = _conv_plan(in_features, n_active, k, block_rows, packed, index_rows)
    if kernel == plan.ROWS and wanted[0] is not None:  # of a layer without weights; its kernel is that of floats
        floats = torch.empty_like(y, dtype=torch.float32)
        settings = weight_shape, stride, padding, dilation, groups, transposed
        convolution(checked, operands, *settings, floats, residual, activation, scales, given)
        y.copy_(round_samples(floats, wanted[0], wanted[1]))
        return
    if kernel == plan.ROWS:
        x, values = x.float(), values.float()
    j = _job(checked, planned, (x, values, indices, active, bias), in_features, block_rows, y, scales)
    _set_given(j, given, x)
    _set_wanted(j, wanted)
    j[job.GEOMETRY], j[job.OFFSETS] = ctypes.addressof(geometry), offsets.data_ptr()
    j[job.ACTIVATION], j[job.BATCH] = NUMBERS[activation], x.shape[0]
    j[job.RESIDUAL] = 0 if residual is None else residual.data_ptr()
    if scales is not None and kernel == plan.INT8_TILE:
        _run_byte_samples(j, x, size, positions)
    elif kernel == plan.ROWS:
        _run_samples(j, x, bool(geometry[conv.DIRECT]), size, positions)
    else:
        outputs, thread_count = y.numel() // n, torch.get_num_threads()
        tiles = -(-outputs // COLUMNS)
        splits = plan.shares(tiles, n_active // LANES, outputs * n_active * k, thread_count)
        j[job.ROW_SPLITS] = splits
        threads.run(entry(_CONV_TASKS[kernel]), ctypes.addressof(j), tiles * splits, thread_count)
    _raise_if_failed(j)


def _packed_size(geometry: "ctypes.Array[ctypes.c_int64]") -> int:
    """The elements of a packed sample, with those behind it that may be read."""
    size = geometry[conv.CHANNELS] * math.prod(geometry[conv.PLANES_D : conv.PACKED_W + 1])
    return (size // LANES + 2) * LANES + _SLACK


def _run_samples(j: "ctypes.Array[ctypes.c_int64]", x: Tensor, direct: bool, size: int, positions: int) -> None:
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


def _run_byte_samples(j: "ctypes.Array[ctypes.c_int64]", x: Tensor, size: int, positions: int) -> None:
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
