"""One call of a condensed operator, as jobs for the kernels.

Owns the choice of kernel, its scratch, and the cut into tasks; operands are valid and contiguous. It must not know how
operators are registered, checked or differentiated.
"""

import ctypes
import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from srigl_fx.runtime import threads
from srigl_fx.runtime.jit import entry
from srigl_fx.runtime.kernels import choice, conv, job
from srigl_fx.runtime.kernels.choice import COLUMNS, LANES
from srigl_fx.runtime.kernels.isa import ISAS, host_isa
from srigl_fx.runtime.weights import Job, Kind, Panel, _Prepared, new_job, panel_of

ACTIVATION_NUMBERS = {"none": 0, "relu": 1, "relu6": 2, "gelu": 3, "gelu_tanh": 4, "silu": 5, "hardswish": 6}

_CHUNK_FLOATS = 1 << 18  # of packed samples that are held at a time, about what a second-level cache does
_SLACK = 64  # floats behind a packed sample that may be read


@functools.cache
def _level() -> int:
    return ISAS.index(host_isa())


def _panel(
    prepared: _Prepared | None,
    kind: Kind,
    operands: Sequence[Tensor],
    in_features: int,
    block_rows: int,
) -> Panel | None:
    """The panel for a kernel, or None where the canonical format is what there is."""
    _, values, indices, active, bias = operands
    n_active, k = values.shape
    if prepared is None or not n_active * k:
        return None
    sizes = in_features, n_active, k
    window = choice.dot_window(_level(), *sizes) if kind == "dot" else choice.tile_window(*sizes)
    if not window:
        return None
    return panel_of(prepared, kind, window, values, indices, active, in_features, bias.shape[0], block_rows)


def _fill_in(j: "ctypes.Array[ctypes.c_int64]", operands: Sequence[Tensor], y: Tensor) -> None:
    x, values, indices, active, bias = operands
    j[job.X], j[job.Y], j[job.BIAS] = x.data_ptr(), y.data_ptr(), bias.data_ptr()
    j[job.VALUES], j[job.INDICES], j[job.ACTIVE] = values.data_ptr(), indices.data_ptr(), active.data_ptr()


def linear(
    prepared: _Prepared | None,
    operands: Sequence[Tensor],
    in_features: int,
    y: Tensor,
    residual: Tensor | None,
    activation: str,
    x_feature_major: bool,
    y_feature_major: bool,
) -> None:
    """Compute ``y``, which has elements; ``operands`` are x, values, indices, active and bias.

    ``x`` and ``y`` are contiguous, or their (features, samples) transposed is where so said; the residual as ``y``.
    """
    values, n = operands[1], operands[4].shape[0]
    n_active, k = values.shape
    batch = y.numel() // n
    rows_only = not (x_feature_major or y_feature_major)
    kind: Kind = "dot" if batch <= choice.MOST_DOT_SAMPLES and rows_only else "tile"
    panel = _panel(prepared, kind, operands, in_features, n)
    if panel is None and rows_only and kind == "dot" and _level() == 0 and batch > 1:
        panel, kind = _panel(prepared, "tile", operands, in_features, n), "tile"
    assert rows_only or panel is not None
    if panel is None:
        j, task = new_job(values, operands[2], operands[3], in_features, n), "rows_task"
    else:
        j, task = Job.from_buffer_copy(panel.template), f"{kind}_task"
    _fill_in(j, operands, y)
    j[job.BATCH], j[job.ACTIVATION] = batch, ACTIVATION_NUMBERS[activation]
    j[job.X_FEATURE_MAJOR], j[job.Y_FEATURE_MAJOR] = x_feature_major, y_feature_major
    j[job.RESIDUAL] = 0 if residual is None else residual.data_ptr()
    thread_count = torch.get_num_threads()
    tiles = -(-batch // COLUMNS) if task == "tile_task" else 1
    splits = choice.shares(tiles, n_active // LANES, batch * n_active * k, thread_count)
    j[job.ROW_SPLITS] = splits
    threads.run(entry(task), ctypes.addressof(j), tiles * splits, thread_count)
    _raise_if_failed(j)


def can_tile(prepared: _Prepared | None, operands: Sequence[Tensor], in_features: int) -> bool:
    """Whether the kernel that takes and gives feature-major tensors can run."""
    return _panel(prepared, "tile", operands, in_features, operands[4].shape[0]) is not None


def _raise_if_failed(j: "ctypes.Array[ctypes.c_int64]") -> None:
    if j[job.FAILED]:
        raise MemoryError("a condensed operator found no memory for its scratch; use a smaller batch")


@functools.lru_cache(maxsize=1024)
def _geometry(numbers: tuple[int, ...]) -> "tuple[ctypes.Array[ctypes.c_int64], Tensor, int, int]":
    """The geometry as kernels read it, its taps' offsets, the floats of a packed sample, and its positions.

    All are shared by threads and never written.
    """
    geometry = (ctypes.c_int64 * conv.GEOMETRY_SIZE)(*numbers)
    conv.conv_plan(geometry)
    taps = math.prod(geometry[conv.KERNEL_D : conv.KERNEL_W + 1]) * geometry[conv.CHANNELS] // geometry[conv.GROUPS]
    offsets = torch.empty(taps, dtype=torch.int64)
    j = Job()
    j[job.GEOMETRY], j[job.OFFSETS] = ctypes.addressof(geometry), offsets.data_ptr()
    entry("conv_offsets")[0](ctypes.addressof(j), 0)
    size = geometry[conv.CHANNELS] * math.prod(geometry[conv.PLANES_D : conv.PACKED_W + 1])
    if not geometry[conv.DIRECT]:
        size = (size // LANES + 2) * LANES + _SLACK
    rows = (geometry[conv.OUT_D] - 1) * geometry[conv.PACKED_H] + geometry[conv.OUT_H] - 1
    return geometry, offsets, size, rows * geometry[conv.PACKED_W] + geometry[conv.OUT_W]


def convolution(
    prepared: _Prepared | None,
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
) -> None:
    """Compute ``y``, which has elements, over one to three axes; operands, residual and ``y`` are contiguous."""
    x, values, indices, active, bias = operands
    n, _, *kernel = weight_shape
    lead = 3 - len(kernel)
    one, zero = (1,) * lead, (0,) * lead
    spacing, step, before = [1] * len(kernel), list(stride), list(padding)
    if transposed:
        spacing, step = step, spacing
        before = [d * (taps - 1) - p for d, taps, p in zip(dilation, kernel, padding, strict=True)]
    sizes = (x.shape[1], n, groups, *one, *x.shape[2:], *one, *y.shape[2:], *one, *kernel, *one, *step, *zero, *before)
    n_active, k = values.shape
    numbers = (*sizes, *one, *dilation, *one, *spacing, int(transposed), k)
    geometry, offsets, size, positions = _geometry(numbers)
    in_features, block_rows = math.prod(weight_shape[1:]), n // groups
    panel = _panel(prepared, "tile", operands, in_features, block_rows) if block_rows >= LANES else None
    if panel is None:
        values = values.float()
        j = new_job(values, indices, active, in_features, n)
    else:
        j = Job.from_buffer_copy(panel.template)
    _fill_in(j, (x, values, indices, active, bias), y)
    j[job.GEOMETRY], j[job.OFFSETS] = ctypes.addressof(geometry), offsets.data_ptr()
    j[job.ACTIVATION], j[job.BATCH] = ACTIVATION_NUMBERS[activation], x.shape[0]
    j[job.RESIDUAL] = 0 if residual is None else residual.data_ptr()
    if panel is None:
        _run_samples(j, x, bool(geometry[conv.DIRECT]), size, positions)
    else:
        outputs = y.numel() // n
        tiles, thread_count = -(-outputs // COLUMNS), torch.get_num_threads()
        splits = choice.shares(tiles, n_active // LANES, outputs * n_active * k, thread_count)
        j[job.ROW_SPLITS] = splits
        threads.run(entry("conv_tile_task"), ctypes.addressof(j), tiles * splits, thread_count)
    _raise_if_failed(j)


def _run_samples(j: "ctypes.Array[ctypes.c_int64]", x: Tensor, direct: bool, size: int, positions: int) -> None:
    """Pack and convolve the samples, a chunk at a time."""
    batch, thread_count, work = x.shape[0], torch.get_num_threads(), positions * j[job.N_ACTIVE] * j[job.K]
    chunk = batch if direct else max(1, min(batch, _CHUNK_FLOATS // size))
    packed = x if direct else x.new_empty(chunk * size)
    j[job.PACKED], j[job.PACKED_SIZE] = packed.data_ptr(), size
    address = ctypes.addressof(j)
    for first in range(0, batch, chunk):
        samples = min(chunk, batch - first)
        j[job.SAMPLE], j[job.SAMPLES] = first, samples
        if not direct:
            splits = choice.shares(samples, x.shape[1], samples * size, thread_count)
            j[job.ROW_SPLITS] = splits
            threads.run(entry("conv_pack_task"), address, samples * splits, thread_count)
        splits = choice.shares(samples, j[job.N_ACTIVE] // LANES, samples * work, thread_count)
        j[job.ROW_SPLITS] = splits
        threads.run(entry("conv_rows_task"), address, samples * splits, thread_count)
