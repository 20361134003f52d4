"""Condensed weights made ready for the kernels: packed where they read a panel.

Owns the panels that are kept with a weight, and when they are out of date. It must not know what is computed with
them. Nothing here keeps a weight alive.

Writes to values that torch does not count (through ``.numpy()`` or ``.data``) are noticed where the values can train:
fused optimizers and gradient scalers write so, and these values are compared at each call.
"""

import ctypes
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from srigl_fx.runtime.cpu.entries import entry
from srigl_fx.runtime.cpu.kernels import job, plan
from srigl_fx.runtime.validation import NUMBERS, Checked

Job = ctypes.c_int64 * job.SIZE
_CACHE_LINE = plan.CACHE_LINE
_LANE_DTYPES = np.float32, np.int32  # of the scales and the sums of a panel's lanes
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # a dtype that is equal if the bits are, by its bytes


@dataclass(frozen=True, eq=False)
class Panel:
    """A packed weight: a job with everything in it that does not change from call to call, and its memory."""

    template: bytes
    memory: tuple[Any, ...]
    nbytes: int
    values: "weakref.ref[Tensor]"
    scales: "weakref.ref[Tensor] | None"
    content: Tensor | None
    facts: tuple[object, ...]

    def is_of(self, values: Tensor, scales: Tensor | None, facts: tuple[object, ...]) -> bool:
        """Whether it was made from these values, not from others that had their memory before, and as they are now."""
        if self.facts != facts or self.values() is not values:
            return False
        if scales is not None and (self.scales is None or self.scales() is not scales):
            return False
        if self.content is None:
            return not can_train(values)
        bits = _BITS[values.itemsize]
        return torch.equal(self.content.view(bits), values.detach().contiguous().view(bits))


def can_train(values: Tensor) -> bool:
    """Whether an optimizer may write to values, which some do without a word to torch."""
    return values.requires_grad or isinstance(values, torch.nn.Parameter)


def panel_of(
    checked: Checked,
    kernel: int,
    window: int,
    values: Tensor,
    indices: Tensor,
    active: Tensor,
    in_features: int,
    out_features: int,
    block_rows: int,
    scales: Tensor | None = None,
    geometry: "tuple[int, ...]" = (),
) -> Panel:
    """The weight packed for a kernel, from memory or anew; neither values nor scales are inference tensors.

    ``geometry`` is that of a convolution (:mod:`srigl_fx.runtime.cpu.kernels.conv`), for panels that depend on it, with
    the sizes of images left out. Packing takes about as long as computing a few samples.
    """
    facts: tuple[object, ...] = values._version, values.data_ptr(), values.dtype, window, geometry
    if scales is not None:
        facts += scales._version, scales.data_ptr()
    found = checked.packed.get((kernel, block_rows))
    if found is None or not found.is_of(values, scales, facts):
        with checked.lock:
            found = checked.packed.get((kernel, block_rows))
            if found is None or not found.is_of(values, scales, facts):
                arrays = values.detach().contiguous(), indices.contiguous(), active.contiguous()
                sizes = in_features, out_features, block_rows
                template, memory = pack(kernel, window, *arrays, *sizes, scales, geometry)
                nbytes = sum(array.nbytes for array in memory)
                content = values.detach().clone().contiguous() if can_train(values) else None
                of_scales = None if scales is None else weakref.ref(scales)
                found = Panel(template, memory, nbytes, weakref.ref(values), of_scales, content, facts)
                checked.packed[kernel, block_rows] = found
    return found


def pack(
    kernel: int,
    window: int,
    values: Tensor,
    indices: Tensor,
    active: Tensor,
    in_features: int,
    out_features: int,
    block_rows: int,
    scales: Tensor | None = None,
    geometry: "tuple[int, ...]" = (),
) -> "tuple[bytes, tuple[NDArray[Any], ...]]":
    """A job with everything in it that does not change from call to call, and the memory that it points to."""
    j = new_job(values, indices, active, in_features, out_features)
    given = None if scales is None else scales.detach().contiguous()
    j[job.SCALES] = 0 if given is None else given.data_ptr()
    j[job.BLOCK_ROWS], j[job.PANEL_WINDOW], j[job.KERNEL] = block_rows, window, kernel
    numbers = (ctypes.c_int64 * len(geometry))(*geometry)
    j[job.GEOMETRY] = ctypes.addressof(numbers) if geometry else 0
    scratch = np.zeros(job.SCRATCH_WORDS, np.int64)
    address = ctypes.addressof(j)
    entry("measure_panel")[0](address, scratch.ctypes.data)
    count, phases = j[job.PANEL_COUNT], j[job.PANEL_PHASES]
    memory = np.empty(j[job.PANEL_BYTES] + _CACHE_LINE, np.uint8)
    groups = np.empty((count + 1) * job.GROUP_WORDS, np.int64)
    starts, rows = np.empty(phases, np.int32), np.empty(count * plan.LANES, np.int32)
    j[job.PANEL] = -(-memory.ctypes.data // _CACHE_LINE) * _CACHE_LINE
    j[job.PANEL_GROUPS], j[job.PANEL_STARTS] = groups.ctypes.data, starts.ctypes.data
    j[job.PANEL_ROWS] = rows.ctypes.data
    lane_scales, lane_sums = (np.empty(count * plan.LANES if given is not None else 0, kind) for kind in _LANE_DTYPES)
    j[job.PANEL_SCALES], j[job.PANEL_SUMS] = lane_scales.ctypes.data, lane_sums.ctypes.data
    entry("fill_panel")[0](address, scratch.ctypes.data)
    return bytes(j), (memory, groups, starts, rows, lane_scales, lane_sums)


def index_rows_of(active: Tensor) -> int:
    """Where it is said which row of indices each active row reads; 0 where each has its own."""
    return active.data_ptr() + active.shape[1] * active.itemsize if active.dim() == 2 else 0


def new_job(values: Tensor, indices: Tensor, active: Tensor, in_features: int, out_features: int) -> Any:
    """A job with the fields of a weight; the tensors must be contiguous, and live as long as it is used."""
    j = Job()
    j[job.VALUES], j[job.INDICES], j[job.ACTIVE] = values.data_ptr(), indices.data_ptr(), active.data_ptr()
    j[job.INDEX_ROWS] = index_rows_of(active)
    j[job.VALUE_TYPE], j[job.INDEX_BYTES] = NUMBERS[values.dtype], indices.itemsize
    j[job.IN_FEATURES], j[job.OUT_FEATURES] = in_features, out_features
    j[job.N_ACTIVE], j[job.K] = values.shape
    return j
