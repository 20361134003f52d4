"""Eight bits: the rows of a tile, in which samples lie side by side as bytes.

Owns the instructions: the outputs of one row of weights for all columns, and, for rows that share their inputs, these
laid out once and multiplied for each. Products are those of :mod:`.int8`. It must not know how tasks are cut.

A full tile has 64 columns, in the order that interleaving its rows leaves; a narrow one has 16, 32 or 48, as they are.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final

from llvmlite import ir

from srigl_fx.runtime.cpu.kernels import vector as v
from srigl_fx.runtime.cpu.kernels.compiled import BYTE_PAIRS, BYTE_PRODUCTS
from srigl_fx.runtime.cpu.kernels.copies import lane_mask, masked_load, masked_store
from srigl_fx.runtime.cpu.kernels.int8 import (
    AT_ONCE,
    NO_SUMS,
    cut,
    even_and_odd,
    multiply_bytes,
    multiply_halves,
    places,
    rows_of_quad,
)
from srigl_fx.runtime.cpu.kernels.int8_pairs import sums_of_pairs
from srigl_fx.runtime.cpu.kernels.int8_rounding import BYTES, PLACES, TILE_ROW, every_int, rounded_vector
from srigl_fx.runtime.cpu.kernels.panel import SLOTS
from srigl_fx.runtime.cpu.kernels.plan import LANES
from srigl_fx.runtime.cpu.kernels.quads import QUAD_BYTES, QUAD_VALUES
from srigl_fx.runtime.cpu.kernels.vector import I8, I16, I32, INTS, address, intrinsic, number, types

FULL: Final = TILE_ROW // LANES  # times 16 columns of a full tile
LAID_BYTES: Final = (1 if BYTE_PRODUCTS else 2) * SLOTS  # of four inputs of 16 columns, laid out
_SIXTEEN: Final = ir.VectorType(I8, LANES)


def _interleave(b: Any, one: Any, other: Any, size: int, high: bool) -> Any:
    """Units of ``size`` bytes in turn from two vectors, of one half of each 16 bytes."""
    count = 16 // size // 2
    picked = []
    for lane in range(4):
        for unit in range(count):
            first = lane * 16 + (unit + (count if high else 0)) * size
            picked += [*range(first, first + size), *range(SLOTS + first, SLOTS + first + size)]
    return b.shuffle_vector(one, other, ir.Constant(PLACES, picked))


def _four_inputs(b: Any, inputs: Any, indices: Any) -> list[Any]:
    """Four rows of a full tile, with the bytes of each column beside each other: one vector for 16 columns."""
    rows = [v.load(b, row, BYTES, 64) for row in rows_of_quad(b, inputs, indices, TILE_ROW)]
    low, high = (_interleave(b, rows[0], rows[1], 1, half) for half in (False, True))
    low_2, high_2 = (_interleave(b, rows[2], rows[3], 1, half) for half in (False, True))
    four = [_interleave(b, low, low_2, 2, half) for half in (False, True)]
    return four + [_interleave(b, high, high_2, 2, half) for half in (False, True)]


def _turned(b: Any, four: Sequence[Any]) -> Any:
    """The same of 16 columns alone, in their order."""
    halves = [b.shuffle_vector(*four[i : i + 2], places(range(2 * LANES))) for i in (0, 2)]
    joined = b.bitcast(b.shuffle_vector(*halves, places(range(SLOTS))), INTS)  # a lane has four columns of one row
    squares = b.shuffle_vector(joined, joined, places(4 * (i % 4) + i // 4 for i in range(LANES)))
    found = b.bitcast(squares, BYTES)
    return b.shuffle_vector(found, found, places(i // 16 * 16 + 4 * (i % 4) + i % 16 // 4 for i in range(SLOTS)))


def _pairs(b: Any, one: Any, other: Any) -> list[Any]:
    """Bytes of two vectors in turn as 16-bit numbers, cut for :func:`~.int8.multiply_halves`.

    As many grow at a time as a register has of them then. Cut from one long vector they would be brought together by
    slower instructions, which cross from one half of a register to the other.
    """
    found = []
    for first in range(0, LANES, AT_ONCE // 2):
        picked = places(place for column in range(first, first + AT_ONCE // 2) for place in (column, LANES + column))
        found.append(b.zext(b.shuffle_vector(one, other, picked), ir.VectorType(I16, AT_ONCE)))
    return found


def _laid(b: Any, inputs: Any, indices: Any, parts: int) -> list[list[Any]]:
    """Four rows of a tile as they are multiplied by :func:`_multiply_laid`, for each 16 columns.

    Where bytes are multiplied four by four, the four of a column lie together. Elsewhere they are 16-bit numbers, of
    which two lie together: first those of the first and the third input, then the others, each cut as registers are.
    """
    if parts == FULL:
        four = _four_inputs(b, inputs, indices)
        if BYTE_PRODUCTS:
            return [[part] for part in four]
        return [[piece for halves in even_and_odd(b, part, False) for piece in cut(b, halves)] for part in four]
    rows, found = rows_of_quad(b, inputs, indices, LANES * parts), []
    for part in range(parts):
        of_part = [v.load(b, b.add(row, number(LANES * part)), _SIXTEEN, LANES) for row in rows]
        if BYTE_PRODUCTS:
            found.append([_turned(b, of_part)])
        else:
            found.append([piece for first in (0, 1) for piece in _pairs(b, of_part[first], of_part[first + 2])])
    return found


def _multiply_laid(b: Any, totals: Sequence[Any], laid: Sequence[Sequence[Any]], weights: Any) -> list[Any]:
    """``total + sum of four inputs times four weights`` for each 16 columns; the weights are those at an address."""
    every = b.bitcast(every_int(b, v.load(b, weights, I32)), BYTES)
    if BYTE_PRODUCTS:
        return multiply_bytes(b, totals, [part[0] for part in laid], every)
    factors, results = [cut(b, halves) for halves in even_and_odd(b, every, True)], []
    for total, part in zip(totals, laid, strict=True):
        half = len(part) // 2
        for pieces, factor in zip((part[:half], part[half:]), factors, strict=True):
            total = b.add(total, multiply_halves(b, pieces, factor))
        results.append(total)
    return results


def _lay_out(parts: int) -> Callable[[int, int, int, int], None]:
    def lay_out(context: Any, inputs: Any, indices: Any, quads: Any, to: Any) -> Any:
        def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
            inputs, indices, quads, to = args

            def one_quad(i: Any, carried: Any) -> Any:
                at = b.add(to, b.mul(i, number(LAID_BYTES * parts)))
                for part in _laid(b, inputs, b.add(indices, b.shl(i, number(3))), parts):
                    size = LAID_BYTES // len(part)
                    for piece in part:
                        v.store(b, piece, at, size)
                        at = b.add(at, number(size))
                return carried

            v.loop(b, quads, (), one_quad)
            return context.get_dummy_value()

        return types.void(*[address] * 4), generate

    return intrinsic(lay_out)  # type: ignore[no-any-return]


def _add_laid(parts: int) -> Callable[[int, int, int, int], None]:
    kinds = [BYTES] if BYTE_PRODUCTS else [ir.VectorType(I16, AT_ONCE)] * (4 * LANES // AT_ONCE)
    size = LAID_BYTES // len(kinds)

    def add_laid(context: Any, laid: Any, weights: Any, quads: Any, sums: Any) -> Any:
        def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
            laid, weights, quads, sums = args

            def one_quad(i: Any, totals: Any) -> Any:
                at = b.add(laid, b.mul(i, number(LAID_BYTES * parts)))
                found = [
                    [
                        v.load(b, b.add(at, number(LAID_BYTES * part + size * n)), kind, size)
                        for n, kind in enumerate(kinds)
                    ]
                    for part in range(parts)
                ]
                return _multiply_laid(b, totals, found, b.add(weights, b.shl(i, number(2))))

            before = [v.load(b, b.add(sums, number(64 * i)), INTS, 64) for i in range(parts)]
            for i, total in enumerate(v.loop(b, quads, before, one_quad)):
                v.store(b, total, b.add(sums, number(64 * i)), 64)
            return context.get_dummy_value()

        return types.void(*[address] * 4), generate

    return intrinsic(add_laid)  # type: ignore[no-any-return]


# For tiles of 16, 32, 48 and 64 columns: inputs four by four, as rows that share them multiply them (the tile's bytes,
# the indices, how many fours, where to, LAID_BYTES for each four of 16 columns).
LAY_OUT: Final = tuple(_lay_out(parts) for parts in range(1, FULL + 1))
# And one row's products added to its sums of all columns (the inputs that were laid out, the row's weights four by
# four, how many fours, int32 sums).
ADD_LAID: Final = tuple(_add_laid(parts) for parts in range(1, FULL + 1))


def _tile_row(
    added: bool, partial: bool, rounded: bool = False, summed: bool = False, parts: int = FULL
) -> Callable[[int, int, int, int, int, int, float, float, int, float, float, int, int, float, int], None]:
    def tile_row(
        context: Any,
        inputs: Any,
        weights: Any,
        quads: Any,
        offsets: Any,
        scales: Any,
        weight_sum: Any,
        weight_scale: Any,
        bias: Any,
        residual: Any,
        low: Any,
        high: Any,
        to: Any,
        columns: Any,
        inverse: Any,
        offset: Any,
    ) -> Any:
        def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
            inputs, weights, quads, offsets, scales, weight_sum, weight_scale, bias, residual, low, high, to = args[:12]
            used = b.lshr(number(-1), b.sub(number(64), args[12]))  # one to 64 columns

            def one_quad(i: Any, totals: Any) -> Any:
                at = b.add(weights, b.mul(i, number(QUAD_BYTES)))
                return _multiply_laid(b, totals, _laid(b, inputs, at, parts), b.add(at, number(QUAD_VALUES)))

            if summed:
                totals = [v.load(b, b.add(inputs, number(64 * i)), INTS, 64) for i in range(parts)]
            elif BYTE_PAIRS:
                totals = sums_of_pairs(b, inputs, weights, quads, parts)
            else:
                totals = v.loop(b, quads, [NO_SUMS] * parts, one_quad)
            whole, y_offsets = every_int(b, weight_sum), every_int(b, args[14])
            factor, start, least, most, inverses = (
                v.broadcast(b, one) for one in (weight_scale, bias, low, high, args[13])
            )
            for i, total in enumerate(totals):
                at = number(64 * i)
                mask = lane_mask(b, b.lshr(used, number(LANES * i)))
                exact = b.sub(total, b.mul(v.load(b, b.add(offsets, at), INTS), whole))
                step = b.fmul(v.load(b, b.add(scales, at), v.FLOATS), factor)
                y = v.multiply_add(b, b.sitofp(exact, v.FLOATS), step, start)
                if added:
                    from_ = b.add(residual, at)
                    y = b.fadd(y, masked_load(b, from_, mask) if partial else v.load(b, from_, v.FLOATS))
                y = b.select(b.fcmp_ordered("<", y, least), least, y)  # a NaN stays one
                y = b.select(b.fcmp_ordered(">", y, most), most, y)
                if rounded:
                    v.store(b, rounded_vector(b, y, inverses, y_offsets), b.add(to, number(LANES * i)), 1)
                elif partial:
                    masked_store(b, y, b.add(to, at), mask)
                else:
                    v.store(b, y, b.add(to, at))
            return context.get_dummy_value()

        single = types.float32
        of_outputs = single, single, address, single, single, address, address, single, address
        return types.void(*[address] * 6, *of_outputs), generate

    return intrinsic(tile_row)  # type: ignore[no-any-return]


# The outputs of one row of weights for a full tile: (the tile's bytes, the row's first quad, how many, offsets and
# scales of the columns, the sum of the row's weights, their scale, the bias, the residual, the least and the most that
# an output may be, where to put them, how many columns are used, what outputs are multiplied by where they are rounded,
# and the offset then). Sum 16 v + 4 l + j is of what lies at byte 16 l + 4 v + j of the tile's rows: the order that
# interleaving leaves. Two read no residual, and two touch no column that is not used.
tile_row, tile_row_added, part_row, part_row_added = (
    _tile_row(added, partial) for partial in (False, True) for added in (False, True)
)
# The same rounded: 64 bytes, also where fewer columns are used; of the residual no others are read.
byte_row, byte_row_added = (_tile_row(added, True, rounded=True) for added in (False, True))
# Both from sums that are there already, at the address that would be that of the tile's bytes.
summed_row, summed_row_added, part_summed_row, part_summed_row_added = (
    _tile_row(added, partial, summed=True) for partial in (False, True) for added in (False, True)
)
summed_byte_row, summed_byte_row_added = (_tile_row(added, True, rounded=True, summed=True) for added in (False, True))
# Those of tiles of 16, 32 and 48 columns, which lie as they are.
NARROW_ROWS, NARROW_SUMMED_ROWS = (
    tuple(_tile_row(False, False, summed=summed, parts=parts) for parts in range(1, FULL)) for summed in (False, True)
)
