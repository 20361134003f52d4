"""All that a thread or an operator can ask of the kernels, by name. Importing it imports Numba.

Owns the functions behind :mod:`srigl_fx.runtime.cpu.kernels.table`. Each is a function of a job
(:mod:`srigl_fx.runtime.cpu.kernels.job`) and a number, for tasks the task's, so that any pool of threads can run them;
tasks write disjoint outputs. A process compiles them for one instruction set.
"""

from typing import Any, Final

from srigl_fx.runtime.cpu.kernels import job, panel, plan, table
from srigl_fx.runtime.cpu.kernels.canonical import index_rows
from srigl_fx.runtime.cpu.kernels.compiled import BYTE_LOOKUP, FASTMATH, ISA, SAMPLES, planned
from srigl_fx.runtime.cpu.kernels.conv_tasks import (
    conv_offsets,
    conv_pack_task,
    conv_plan,
    conv_rows_task,
    conv_shared_tile_task,
    conv_tile_task,
)
from srigl_fx.runtime.cpu.kernels.innermost_moves import (
    affine_task,
    arrange_task,
    place_task,
    pool_rest_task,
    pool_samples_task,
)
from srigl_fx.runtime.cpu.kernels.innermost_tasks import conv_innermost_task
from srigl_fx.runtime.cpu.kernels.int8_conv_tasks import int8_conv_task, int8_pack_task
from srigl_fx.runtime.cpu.kernels.int8_samples import int8_fill_task, int8_round_task, int8_scales_task
from srigl_fx.runtime.cpu.kernels.int8_tasks import int8_dot_task, int8_tile_task
from srigl_fx.runtime.cpu.kernels.isa import level_of
from srigl_fx.runtime.cpu.kernels.linear_tasks import (
    dot_task,
    rows_task,
    shared_tile_task,
    strided_task,
    tile_task,
)
from srigl_fx.runtime.cpu.kernels.values import value_at
from srigl_fx.runtime.cpu.kernels.vector import floats
from srigl_fx.runtime.value_types import NUMBERS

__all__ = ["FASTMATH", "TASKS"]

Pointer = Any
_LEVEL: Final = level_of(ISA)
_INT8: Final = NUMBERS["int8"]
_linear_kernel, _window_of = planned(plan.linear_kernel), planned(plan.window_of)
_int8_linear_kernel, _int8_window = planned(plan.int8_linear_kernel), planned(plan.int8_window)
_int8_linear_samples, _for_shared = planned(plan.int8_linear_samples), planned(plan.linear_for_shared)


def plan_linear(j: Pointer, packed: int) -> None:
    """Store the kernel that the plan has for a linear call whose weight may be packed, or may not, and its samples."""
    columns = j[job.X_FEATURE_MAJOR] + j[job.Y_FEATURE_MAJOR] != 0
    sizes = j[job.IN_FEATURES], j[job.N_ACTIVE], j[job.K]
    j[job.SAMPLES] = j[job.BATCH]
    if j[job.VALUE_TYPE] == _INT8:
        j[job.KERNEL] = _int8_linear_kernel(BYTE_LOOKUP, *sizes, j[job.BATCH], columns)
        j[job.SAMPLES] = _int8_linear_samples(BYTE_LOOKUP, j[job.KERNEL], j[job.BATCH], columns)
    else:
        kernel = _linear_kernel(_LEVEL, *sizes, j[job.BATCH], columns, packed != 0)
        j[job.KERNEL] = _for_shared(kernel, _LEVEL, *sizes, index_rows(j))


def plan_panel(j: Pointer, kernel: int) -> None:
    """Store a kernel and the window of the panel that it reads, 0 where there is none; and a block's samples."""
    j[job.KERNEL] = kernel
    j[job.SAMPLES] = SAMPLES
    if kernel == plan.INT8_DOT or kernel == plan.INT8_TILE:
        j[job.PANEL_WINDOW] = _int8_window(BYTE_LOOKUP, kernel, j[job.IN_FEATURES], j[job.K])
    else:
        j[job.PANEL_WINDOW] = _window_of(kernel, _LEVEL, j[job.IN_FEATURES], j[job.N_ACTIVE], j[job.K])


def widen_values(j: Pointer, target: int) -> None:
    """Copy the values to an address, as float32."""
    wide = floats(target)
    for i in range(j[job.N_ACTIVE] * j[job.K]):
        wide[i] = value_at(j[job.VALUES], j[job.VALUE_TYPE], i)


_FUNCTIONS = (
    *(rows_task, strided_task, dot_task, tile_task, shared_tile_task, int8_dot_task, int8_tile_task),
    *(conv_rows_task, conv_tile_task, conv_shared_tile_task, conv_innermost_task, int8_conv_task),
    *(panel.measure_panel, panel.fill_panel, plan_linear, plan_panel),
    *(conv_plan, conv_offsets, conv_pack_task, widen_values, int8_scales_task),
    *(int8_pack_task, int8_fill_task, int8_round_task, arrange_task, pool_samples_task, pool_rest_task),
    *(place_task, affine_task),
)
TASKS = {function.__name__: function for function in _FUNCTIONS}
assert tuple(TASKS) == table.TASKS  # the library's tables of symbols are made from those
