"""All that a thread or an operator can ask of the kernels, by name. Importing it imports Numba.

Owns the list. Each is a function of a job (:mod:`srigl_fx.runtime.kernels.job`) and a number, for tasks the task's, so
that any pool of threads can run them; tasks write disjoint outputs. A process compiles them for one instruction set.
"""

from typing import Any, Final

from srigl_fx.runtime.kernels import choice, job, panel
from srigl_fx.runtime.kernels.compiled import FASTMATH, ISA, compiled
from srigl_fx.runtime.kernels.conv_tasks import conv_offsets, conv_pack_task, conv_plan, conv_rows_task, conv_tile_task
from srigl_fx.runtime.kernels.isa import ISAS
from srigl_fx.runtime.kernels.linear_tasks import dot_task, rows_task, strided_task, tile_task
from srigl_fx.runtime.kernels.vector import floats

__all__ = ["FASTMATH", "TASKS"]

Pointer = Any
_LEVEL: Final = ISAS.index(ISA)
_dot_window, _tile_window = compiled(choice.dot_window), compiled(choice.tile_window)


def choose_window(j: Pointer, is_tile: int) -> None:
    """Choose the window of a panel; 0 where there is no panel of this kind."""
    in_features, n_active, k = j[job.IN_FEATURES], j[job.N_ACTIVE], j[job.K]
    j[job.PANEL_IS_TILE] = is_tile
    if is_tile != 0:
        j[job.PANEL_WINDOW] = _tile_window(in_features, n_active, k)
    else:
        j[job.PANEL_WINDOW] = _dot_window(_LEVEL, in_features, n_active, k)


def phase_size(j: Pointer, unused: int) -> None:
    """Store the bytes of a phase as the address of the panel, which is still to come."""
    j[job.PANEL] = panel.TILE_BYTES if j[job.PANEL_IS_TILE] != 0 else panel.dot_bytes(j[job.VALUE_TYPE])


def widen_values(j: Pointer, target: int) -> None:
    """Copy the values to an address, as float32."""
    wide = floats(target)
    for i in range(j[job.N_ACTIVE] * j[job.K]):
        wide[i] = panel.value_at(j[job.VALUES], j[job.VALUE_TYPE], i)


TASKS = (
    panel.measure_panel,
    panel.fill_panel,
    choose_window,
    phase_size,
    rows_task,
    strided_task,
    dot_task,
    tile_task,
    conv_plan,
    conv_offsets,
    conv_pack_task,
    conv_tile_task,
    conv_rows_task,
    widen_values,
)
