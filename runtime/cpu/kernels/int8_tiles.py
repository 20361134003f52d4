"""The loops over the rows of a weight for one tile of bytes. Importing it imports Numba.

Owns which row function stores a row's outputs, and where. Linear layers and convolutions fill tiles, and finish what is
not finished here.
"""

from typing import Any, Final

import numpy as np

from srigl_fx.runtime.cpu.kernels import job
from srigl_fx.runtime.cpu.kernels.compiled import NARROW, compiled
from srigl_fx.runtime.cpu.kernels.copies import copy_bytes
from srigl_fx.runtime.cpu.kernels.int8_outputs import output_bytes, output_inverse
from srigl_fx.runtime.cpu.kernels.int8_rows import (
    ADD_LAID,
    FULL,
    LAID_BYTES,
    LAY_OUT,
    NARROW_ROWS,
    NARROW_SUMMED_ROWS,
    byte_row,
    byte_row_added,
    part_row,
    part_row_added,
    part_summed_row,
    part_summed_row_added,
    summed_byte_row,
    summed_byte_row_added,
    summed_row,
    summed_row_added,
    tile_row,
    tile_row_added,
)
from srigl_fx.runtime.cpu.kernels.int8_samples import OFFSETS, SCALES
from srigl_fx.runtime.cpu.kernels.job import GROUP_AT, GROUP_QUADS, GROUP_ROW, GROUP_WORDS
from srigl_fx.runtime.cpu.kernels.plan import INT8_COLUMNS, LANES, STEPS
from srigl_fx.runtime.cpu.kernels.quads import QUAD_VALUES, quads_of, rows_together
from srigl_fx.runtime.cpu.kernels.tiles import least, most
from srigl_fx.runtime.cpu.kernels.vector import floats, ints, words

Pointer = Any
TILE_FLOATS: Final = 4 * INT8_COLUMNS  # bytes of a row of outputs of a tile
BLOCK_GROUPS: Final = 4  # groups of rows whose outputs stay in the first-level cache
_LAID_QUADS: Final = 32  # fours of inputs that are laid out at a time, in a first-level cache
ROOM: Final = LANES * TILE_FLOATS + _LAID_QUADS * FULL * LAID_BYTES  # bytes that rows need which share their indices
_INFINITY: Final[Any] = np.float32(np.inf)
_ZERO: Final[Any] = np.float32(0)


def _row_of(plain: Any, added: Any, part: Any, part_added: Any, rounded: Any, rounded_added: Any) -> Any:
    """A function that stores the outputs of one row, by those for outputs with a residual, parts of a tile, and bytes.

    Those for bytes store 64 of them: where fewer columns are used, they are copied from the row's place in ``out``.
    """

    def store_row(
        j: Pointer,
        r: int,
        inputs: int,
        first: int,
        quads: int,
        known: int,
        columns: int,
        low: float,
        high: float,
        out: int,
        y: int,
        y_row: int,
    ) -> None:
        o = int(ints(j[job.PANEL_ROWS])[r])
        total, factor = int(ints(j[job.PANEL_SUMS])[r]), floats(j[job.PANEL_SCALES])[r]
        start, scales, offsets = floats(j[job.BIAS])[o], known + SCALES, known + OFFSETS
        is_whole, inverse, plus = columns == INT8_COLUMNS, output_inverse(j), j[job.Y_OFFSET]
        as_bytes, wider = y != 0 and output_bytes(j) == 1, 4 // output_bytes(j)  # the residual than outputs
        residual = j[job.RESIDUAL] + (y - j[job.Y]) * wider if y != 0 and j[job.RESIDUAL] != 0 else 0
        place, more = y + o * y_row, residual + o * y_row * wider
        to = out + o * TILE_FLOATS if y == 0 or (as_bytes and not is_whole) else place
        x = inputs
        if as_bytes and residual == 0:
            rounded(x, first, quads, offsets, scales, total, factor, start, 0, low, high, to, columns, inverse, plus)
        elif as_bytes:
            rounded_added(
                x, first, quads, offsets, scales, total, factor, start, more, low, high, to, columns, inverse, plus
            )
        elif y == 0 or (is_whole and residual == 0):
            plain(x, first, quads, offsets, scales, total, factor, start, 0, low, high, to, columns, inverse, plus)
        elif is_whole:
            added(x, first, quads, offsets, scales, total, factor, start, more, low, high, to, columns, inverse, plus)
        elif residual == 0:
            part(x, first, quads, offsets, scales, total, factor, start, 0, low, high, to, columns, inverse, plus)
        else:
            part_added(
                x, first, quads, offsets, scales, total, factor, start, more, low, high, to, columns, inverse, plus
            )
        if as_bytes and not is_whole:
            copy_bytes(to, place, columns)

    return compiled(store_row)


def _narrow_row_of(plain: Any, width: int) -> Any:
    """The same for a tile of so many columns, fewer than 64: all outputs of a row go to its place in ``out``."""

    def store_row(
        j: Pointer,
        r: int,
        inputs: int,
        first: int,
        quads: int,
        known: int,
        columns: int,
        low: float,
        high: float,
        out: int,
        y: int,
        y_row: int,
    ) -> None:
        o = int(ints(j[job.PANEL_ROWS])[r])
        total, factor = int(ints(j[job.PANEL_SUMS])[r]), floats(j[job.PANEL_SCALES])[r]
        start, scales, offsets, to = floats(j[job.BIAS])[o], known + SCALES, known + OFFSETS, out + o * width * 4
        plain(inputs, first, quads, offsets, scales, total, factor, start, 0, low, high, to, width, _ZERO, 0)

    return compiled(store_row)


_store_row = _row_of(tile_row, tile_row_added, part_row, part_row_added, byte_row, byte_row_added)
_store_summed_row = _row_of(
    *(summed_row, summed_row_added, part_summed_row, part_summed_row_added, summed_byte_row, summed_byte_row_added)
)


def _multiply(parts: int, store_row: Any, store_summed_row: Any) -> Any:
    """The loop over the rows of groups for tiles of 16 columns times ``parts``."""
    row_bytes, lay_out, add_laid = parts * LANES * 4, LAY_OUT[parts - 1], ADD_LAID[parts - 1]

    def sum_shared_rows(j: Pointer, at: int, rows: int, inputs: int, scratch: int) -> None:
        """The sums of rows that share their indices: an int32 a row and column at ``scratch``, which has ROOM bytes."""
        quads, sums = quads_of(j[job.K]), ints(scratch)
        for i in range(rows * parts * LANES):
            sums[i] = 0
        laid, values = scratch + LANES * TILE_FLOATS, at + quads * QUAD_VALUES
        for first in range(0, quads, _LAID_QUADS):
            count = min(_LAID_QUADS, quads - first)
            lay_out(inputs, at + first * QUAD_VALUES, count, laid)
            for r in range(rows):
                add_laid(laid, values + (r * quads + first) * STEPS, count, scratch + r * row_bytes)

    sum_shared = compiled(sum_shared_rows)

    def multiply(
        j: Pointer,
        g0: int,
        g1: int,
        inputs: int,
        known: int,
        columns: int,
        limited: bool,
        out: int,
        y: int,
        y_row: int,
        scratch: int,
    ) -> None:
        groups, shared_quads = words(j[job.PANEL_GROUPS]), quads_of(j[job.K])
        low, high = (least(j[job.ACTIVATION]), most(j[job.ACTIVATION])) if limited else (-_INFINITY, _INFINITY)
        for g in range(g0, g1):
            row, at = groups[g * GROUP_WORDS + GROUP_ROW], j[job.PANEL] + groups[g * GROUP_WORDS + GROUP_AT]
            rows = groups[(g + 1) * GROUP_WORDS + GROUP_ROW] - row
            single_quads, lane = groups[g * GROUP_WORDS + GROUP_QUADS], 0
            while lane < rows:
                count = rows_together(j, row + lane, rows - lane)
                quads = single_quads if count == 1 else shared_quads
                if count > 1:
                    sum_shared(j, at, count, inputs, scratch)
                for i in range(count):
                    r = g * LANES + lane + i
                    if count > 1:
                        store_summed_row(
                            j, r, scratch + i * row_bytes, at, quads, known, columns, low, high, out, y, y_row
                        )
                    else:
                        store_row(j, r, inputs, at, quads, known, columns, low, high, out, y, y_row)
                at += quads * (QUAD_VALUES + STEPS * count)
                lane += count

    return compiled(multiply)


# (job, g0, g1, the tile's bytes, what is known of its columns, how many are used, limited, out, y, y_row, scratch):
# stores what groups ``g0 <= g < g1`` compute in the tile ``out``. If ``y`` is not 0, the outputs of the columns that
# are used are stored there instead, in rows ``y_row`` bytes apart, with the residual added, and rounded if y has bytes.
# ``limited`` is whether the activation, which must be one that :func:`~.tiles.is_limit` then, is applied. ``scratch``
# is room for ROOM bytes.
multiply_tile = _multiply(FULL, _store_row, _store_summed_row)
_multiply_16, _multiply_32, _multiply_48 = (
    _multiply(
        parts,
        _narrow_row_of(NARROW_ROWS[parts - 1], parts * LANES),
        _narrow_row_of(NARROW_SUMMED_ROWS[parts - 1], parts * LANES),
    )
    for parts in range(1, FULL)
)


@compiled
def multiply_linear_tile(
    j: Pointer, g0: int, g1: int, inputs: int, known: int, width: int, out: int, scratch: int
) -> None:
    """Store what groups ``g0 <= g < g1`` compute for a tile of ``width`` columns in ``out``, which has as many."""
    if width == 16:
        _multiply_16(j, g0, g1, inputs, known, width, False, out, 0, 0, scratch)
    elif NARROW and width == 32:
        _multiply_32(j, g0, g1, inputs, known, width, False, out, 0, 0, scratch)
    elif NARROW and width == 48:
        _multiply_48(j, g0, g1, inputs, known, width, False, out, 0, 0, scratch)
    else:
        multiply_tile(j, g0, g1, inputs, known, width, False, out, 0, 0, scratch)
