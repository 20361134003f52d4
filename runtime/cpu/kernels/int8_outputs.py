"""Finished outputs of layers with values of eight bits, stored as floats or as bytes. Importing it imports Numba.

Owns both. Bytes are what the next layers read that are given one scale: they are rounded while outputs are at hand,
as :func:`srigl_fx.runtime.quantisation.round_with` has it, and nothing beside them is written, as other tasks may.
"""

from typing import Any

import numpy as np

from srigl_fx.runtime.cpu.kernels import job
from srigl_fx.runtime.cpu.kernels.activations import activate_row
from srigl_fx.runtime.cpu.kernels.compiled import compiled
from srigl_fx.runtime.cpu.kernels.copies import add_floats, copy_floats, transpose
from srigl_fx.runtime.cpu.kernels.int8_rounding import round_exactly
from srigl_fx.runtime.cpu.kernels.plan import LANES
from srigl_fx.runtime.cpu.kernels.vector import as_float, floats

Pointer = Any
_ZERO, _ONE = np.float32(0), np.float32(1)


@compiled
def output_bytes(j: Pointer) -> int:
    """The bytes of an output in y."""
    return 4 if j[job.Y_SCALE] == 0 else 1


@compiled
def output_inverse(j: Pointer) -> Any:
    """What outputs are multiplied by before they are rounded; 0 where they are not."""
    return _ZERO if j[job.Y_SCALE] == 0 else _ONE / as_float(j[job.Y_SCALE])


@compiled
def put_outputs(j: Pointer, source: int, at: int, count: int) -> None:
    """Store finished outputs, which are floats at ``source``, as those from number ``at`` on of y."""
    if j[job.Y_SCALE] == 0:
        copy_floats(source, j[job.Y] + at * 4, count)
    else:
        round_exactly(source, count, output_inverse(j), j[job.Y_OFFSET], j[job.Y] + at)


@compiled
def spare_bytes(j: Pointer) -> int:
    """The room that :func:`put_tile_as_rows` needs: 16 rows of outputs."""
    return (j[job.OUT_FEATURES] + LANES) * LANES * 4  # type: ignore[no-any-return]


@compiled
def put_tile_as_rows(j: Pointer, first: int, columns: int, width: int, o0: int, o1: int, out: int, spare: int) -> None:
    """The outputs ``o0 <= o < o1`` of a tile of ``width`` columns, rounded, as rows of samples ``first ...``.

    Up to 15 rows of the tile behind the last are read. What float outputs would be, bit for bit, is rounded: steps are
    those of :func:`~srigl_fx.runtime.cpu.kernels.linear_tasks.store_as_rows`.
    """
    n, count = j[job.OUT_FEATURES], o1 - o0
    row_bytes = (count + LANES - 1) // LANES * LANES * 4
    if j[job.RESIDUAL] == 0:
        activate_row(floats(out + o0 * width * 4), count * width, j[job.ACTIVATION])
    for c in range(0, columns, LANES):
        for o in range(o0, o1, LANES):
            transpose(out + (o * width + c) * 4, width * 4, spare + (o - o0) * 4, row_bytes)
        for lane in range(min(LANES, columns - c)):
            row, at = spare + lane * row_bytes, (first + c + lane) * n + o0
            if j[job.RESIDUAL] != 0:
                add_floats(j[job.RESIDUAL] + at * 4, row, count)
                activate_row(floats(row), count, j[job.ACTIVATION])
            put_outputs(j, row, at, count)


@compiled
def put_tile_as_columns(j: Pointer, first: int, columns: int, width: int, o0: int, o1: int, out: int) -> None:
    """The outputs ``o0 <= o < o1`` of a tile of ``width`` columns, feature-major."""
    for o in range(o0, o1):
        row, at = out + o * width * 4, o * j[job.BATCH] + first
        if j[job.RESIDUAL] != 0:
            add_floats(j[job.RESIDUAL] + at * 4, row, columns)
        activate_row(floats(row), width, j[job.ACTIVATION])
        put_outputs(j, row, at, columns)
