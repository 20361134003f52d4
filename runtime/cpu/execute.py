"""One call of a condensed linear operator, as jobs for the kernels; and what calls of all operators have in common.

Owns the layouts of tensors, the scratch of kernels, and the call of their tasks, as the plan has them
(:mod:`srigl_fx.runtime.cpu.kernels.plan`); operands are valid. It must not know how operators are registered, checked
or differentiated.
"""

import ctypes
import functools
import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from srigl_fx.runtime.activations import NUMBERS
from srigl_fx.runtime.cpu import threads
from srigl_fx.runtime.cpu.entries import entry
from srigl_fx.runtime.cpu.kernels import job, plan
from srigl_fx.runtime.cpu.kernels.isa import host_isa, level_of, looks_up_bytes
from srigl_fx.runtime.cpu.kernels.plan import CACHE_LINE, COLUMNS, LANES
from srigl_fx.runtime.cpu.kernels.table import KERNELS
from srigl_fx.runtime.cpu.prepared_weights import Job, index_rows_of, new_job, pack, panel_of
from srigl_fx.runtime.validation import Checked

Given = tuple[float | None, int]  # the scale that samples, or outputs, are rounded with, if one is, and its offset
_TASKS = {kernel.number: kernel.task for kernel in KERNELS if kernel.layer == "linear"}
_COLUMNS = {
    plan.TILE: COLUMNS,
    plan.SHARED_TILE: COLUMNS,
    plan.INT8_TILE: plan.INT8_COLUMNS,
}  # of the kernels that compute tiles
_FLOAT, _FLOAT_BITS = struct.Struct("f"), struct.Struct("I")
looks_up = functools.cache(looks_up_bytes)


@functools.cache
def level() -> int:
    """The number of this processor's instruction set, which the plan asks for."""
    return level_of(host_isa())


# The rules of the plan are Python here, on the path of every call: asked once for each set of sizes.
@functools.lru_cache(maxsize=4096)
def _linear_plan(
    in_features: int, n_active: int, k: int, batch: int, feature_major: bool, packed: bool, index_rows: int
) -> tuple[int, int]:
    """The kernel of a linear layer and the window of the panel that it reads."""
    kernel = plan.linear_kernel(level(), in_features, n_active, k, batch, feature_major, packed)
    kernel = plan.linear_for_shared(kernel, level(), in_features, n_active, k, index_rows)
    return kernel, plan.window_of(kernel, level(), in_features, n_active, k)


@functools.lru_cache(maxsize=4096)
def _int8_plan(in_features: int, n_active: int, k: int, batch: int, feature_major: bool) -> tuple[int, int]:
    """The same for values of eight bits."""
    kernel = plan.int8_linear_kernel(looks_up(), in_features, n_active, k, batch, feature_major)
    return kernel, plan.int8_window(looks_up(), kernel, in_features, k)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A call of an operator with all in it that does not change from call to call, where tensors lie alike.

    Attributes:
        template: The job, but for samples, outputs and residual.
        memory: What it points to, beside the operands of the weight, which have to live as long.
        shape: Of the outputs, as they lie.
        dtype: Of the outputs.
        feature_major: Whether the first axis of ``shape`` is the last one of the outputs.
        start: Runs the job; told of it and of the samples.
    """

    template: bytes
    memory: object
    shape: tuple[int, ...]
    dtype: torch.dtype
    feature_major: bool
    start: "Callable[[ctypes.Array[ctypes.c_int64], Tensor], None]"

    def __call__(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """The outputs for samples of the shape, the layout and the type that this was prepared for."""
        j = Job.from_buffer_copy(self.template)
        y = torch.empty(self.shape, dtype=self.dtype, device="cpu")
        j[job.X], j[job.Y] = x.data_ptr(), y.data_ptr()
        if residual is not None:
            residual = residual.movedim(-1, 0).contiguous() if self.feature_major else residual.contiguous()
            j[job.RESIDUAL] = residual.data_ptr()
        self.start(j, x)
        return y.movedim(0, -1) if self.feature_major else y


def may_pack(checked: Checked | None, values: Tensor, scales: Tensor | None = None) -> bool:
    """Whether a packed weight may be kept: torch must count the writes to it."""
    return checked is not None and not (values.is_inference() or (scales is not None and scales.is_inference()))


def weight_job(
    checked: Checked | None,
    planned: tuple[int, int],
    weight: Sequence[Tensor],
    in_features: int,
    block_rows: int,
    scales: Tensor | None = None,
    geometry: tuple[int, ...] = (),
) -> "ctypes.Array[ctypes.c_int64]":
    """A job for this kernel with all that is about the weight; packed is what it reads packed."""
    values, indices, active, bias = weight
    kernel, window = planned
    if window:
        found = kernel, window, values, indices, active, in_features, bias.shape[0], block_rows, scales, geometry
        if checked is not None and may_pack(checked, values, scales):
            panel = panel_of(checked, *found)
            template, memory = panel.template, panel.memory
        else:  # values of eight bits have no kernel that reads the canonical format
            template, memory = pack(*found)
        j = Job.from_buffer_copy(template)
        j.memory = memory  # type: ignore[attr-defined] # as long as the job lives
    else:
        j = new_job(values, indices, active, in_features, bias.shape[0])
        j.memory = None
    j[job.BIAS] = bias.data_ptr()
    j[job.VALUES], j[job.INDICES], j[job.ACTIVE] = values.data_ptr(), indices.data_ptr(), active.data_ptr()
    j[job.INDEX_ROWS] = index_rows_of(active)
    return j


def set_scales(j: "ctypes.Array[ctypes.c_int64]", given: Given, wanted: Given, x: Tensor) -> None:
    """What samples and outputs are rounded with, where that is given."""
    if given[0] is not None:
        j[job.X_SCALE], j[job.X_OFFSET] = _FLOAT_BITS.unpack(_FLOAT.pack(given[0]))[0], given[1]
        j[job.X_BYTES] = x.dtype is torch.uint8
    if wanted[0] is not None:
        j[job.Y_SCALE], j[job.Y_OFFSET] = _FLOAT_BITS.unpack(_FLOAT.pack(wanted[0]))[0], wanted[1]


def stored(wanted: Given) -> torch.dtype:
    """The dtype of outputs that are rounded with this scale, or stored as they are."""
    return torch.float32 if wanted[0] is None else torch.uint8


def round_samples(x: Tensor, scale: float, offset: int) -> Tensor:
    """``x`` as bytes, which lie as ``torch.empty_like`` has them."""
    y = torch.empty_like(x, dtype=torch.uint8)
    if y.stride() != x.stride():  # as x has gaps
        x = torch.empty_like(x).copy_(x)
    if not y.numel():
        return y
    j = Job()
    set_scales(j, (scale, offset), (None, 0), x)
    j[job.X], j[job.Y], j[job.BATCH] = x.data_ptr(), y.data_ptr(), y.numel()
    thread_count = torch.get_num_threads()
    j[job.ROW_SPLITS] = splits = 1 if y.numel() < plan.MOST_INLINE else thread_count
    threads.run(entry("int8_round_task"), ctypes.addressof(j), splits, thread_count)
    raise_if_failed(j)
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
    n, kind = weight[3].shape[0], stored(wanted)
    planned, batch, x_columns = _linear_form(checked, x, weight, in_features, y_feature_major, scales)
    kernel, columns = planned[0], x_columns or y_feature_major
    if kernel == plan.STRIDED or (columns and kernel == plan.INT8_DOT):
        # It is plain and slow, for hosts where an operator cannot ask for other layouts; here copies are at hand.
        y = linear(checked, x.contiguous(), weight, in_features, residual, activation, False, scales, given, wanted)
        return y.movedim(-1, 0).contiguous().movedim(0, -1) if y_feature_major else y
    if kernel == plan.ROWS and wanted[0] is not None:  # of a layer without weights; its kernel is that of floats
        y = linear(checked, x, weight, in_features, residual, activation, False, scales, given)
        return round_samples(y, wanted[0], wanted[1])
    x = x.movedim(-1, 0) if x_columns else x.contiguous()
    lead = x.shape[1:] if x_columns else x.shape[:-1]
    y = x.new_empty((n, *lead), dtype=kind).movedim(0, -1) if y_feature_major else x.new_empty((*lead, n), dtype=kind)
    if not y.numel():
        return y
    if residual is not None:
        residual = residual.movedim(-1, 0).contiguous() if y_feature_major else residual.contiguous()
    first, thread_count = 0, torch.get_num_threads()
    while True:
        settings = batch - first, x_columns, y_feature_major, activation
        j = _linear_job(checked, planned, x, weight, in_features, *settings, scales, given, wanted)
        j[job.RESIDUAL] = 0 if residual is None else residual.data_ptr() + first * n * 4
        j[job.X] = x.data_ptr() + first * in_features * x.element_size()
        j[job.Y] = y.data_ptr() + first * n * y.element_size()
        _run_linear(planned, _cut_linear(j, planned, thread_count), thread_count, j, x)
        first += j[job.BATCH]
        if first == batch:
            return y
        planned = _int8_plan(in_features, *weight[0].shape, batch - first, columns)


def prepare_linear(
    checked: Checked | None,
    x: Tensor,
    weight: Sequence[Tensor],
    in_features: int,
    activation: str,
    y_feature_major: bool,
    scales: Tensor | None = None,
    given: Given = (None, 0),
    wanted: Given = (None, 0),
) -> Prepared | None:
    """What calls of :func:`linear` share whose samples are as many and lie alike; None where it takes other steps."""
    planned, batch, x_columns = _linear_form(checked, x, weight, in_features, y_feature_major, scales)
    n, columns = weight[3].shape[0], x_columns or y_feature_major
    plain = planned[0] in (plan.STRIDED, plan.ROWS) or (columns and planned[0] == plan.INT8_DOT)
    lies = x_columns or x.is_contiguous()
    if plain or not (lies and batch * n and may_pack(checked, weight[0], scales)):
        return None
    settings = batch, x_columns, y_feature_major, activation
    j = _linear_job(checked, planned, x, weight, in_features, *settings, scales, given, wanted)
    if j[job.BATCH] != batch:  # in parts, each with a kernel of its own
        return None
    thread_count = torch.get_num_threads()
    start = functools.partial(_run_linear, planned, _cut_linear(j, planned, thread_count), thread_count)
    shape = (n, *x.shape[:-1]) if y_feature_major else (*x.shape[:-1], n)
    return Prepared(bytes(j), j.memory, shape, stored(wanted), y_feature_major, start)  # type: ignore[attr-defined]


def _linear_form(
    checked: Checked | None,
    x: Tensor,
    weight: Sequence[Tensor],
    in_features: int,
    y_feature_major: bool,
    scales: Tensor | None,
) -> tuple[tuple[int, int], int, bool]:
    """The kernel and the window that it reads, the number of samples, and whether these lie as columns."""
    values, batch = weight[0], math.prod(x.shape[:-1])
    x_columns = not x.is_contiguous() and x.dim() > 1 and x.movedim(-1, 0).is_contiguous()
    columns = x_columns or y_feature_major
    if scales is not None:
        return _int8_plan(in_features, *values.shape, batch, columns), batch, x_columns
    packed, index_rows = may_pack(checked, values), weight[1].shape[0]
    return _linear_plan(in_features, *values.shape, batch, columns, packed, index_rows), batch, x_columns


def _linear_job(
    checked: Checked | None,
    planned: tuple[int, int],
    x: Tensor,
    weight: Sequence[Tensor],
    in_features: int,
    samples: int,
    x_columns: bool,
    y_feature_major: bool,
    activation: str,
    scales: Tensor | None,
    given: Given,
    wanted: Given,
) -> "ctypes.Array[ctypes.c_int64]":
    """A job but for its tensors, of as many of the samples as one kernel computes."""
    j = weight_job(checked, planned, weight, in_features, weight[3].shape[0], scales)
    set_scales(j, given, wanted, x)
    if scales is not None:
        samples = plan.int8_linear_samples(looks_up(), planned[0], samples, x_columns or y_feature_major)
    j[job.BATCH], j[job.ACTIVATION] = samples, NUMBERS[activation]
    j[job.X_FEATURE_MAJOR], j[job.Y_FEATURE_MAJOR] = x_columns, y_feature_major
    return j


def _cut_linear(j: "ctypes.Array[ctypes.c_int64]", planned: tuple[int, int], thread_count: int) -> int:
    """Cut a job into tasks for the threads; how many."""
    kernel, batch, n_active = planned[0], j[job.BATCH], j[job.N_ACTIVE]
    tiles = -(-batch // _COLUMNS[kernel]) if kernel in _COLUMNS else 1
    j[job.ROW_SPLITS] = splits = plan.shares(tiles, n_active // LANES, batch * n_active * j[job.K], thread_count)
    return tiles * splits


def _run_linear(
    planned: tuple[int, int], tasks: int, thread_count: int, j: "ctypes.Array[ctypes.c_int64]", x: Tensor
) -> None:
    """Run the tasks of a job."""
    kernel, splits = planned[0], j[job.ROW_SPLITS]
    if splits > 1 and kernel in (plan.INT8_DOT, plan.INT8_TILE):
        _round_samples(j, x, planned, thread_count)
        j[job.ROW_SPLITS] = splits
    threads.run(entry(_TASKS[kernel]), ctypes.addressof(j), tasks, thread_count)
    raise_if_failed(j)


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


def raise_if_failed(j: "ctypes.Array[ctypes.c_int64]") -> None:
    """Raise a MemoryError where a task of the job has found none."""
    if j[job.FAILED]:
        raise MemoryError("a condensed operator found no memory for its scratch; use a smaller batch")
