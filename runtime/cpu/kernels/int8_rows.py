"""Eight bits: the rows of a tile, in which samples lie side by side as bytes.

Owns the instructions: the outputs of one row of weights for all columns, and, for rows that share their inputs, these
laid out once and multiplied for each. Products are those of :mod:`.int8`. It must not know how tasks are cut.
"""

from collections.abc import Callable
from typing import Any, Final

from llvmlite import ir

from srigl_fx.runtime.cpu.kernels import vector as v
from srigl_fx.runtime.cpu.kernels.compiled import BYTE_PRODUCTS
from srigl_fx.runtime.cpu.kernels.copies import lane_mask, masked_load, masked_store
from srigl_fx.runtime.cpu.kernels.int8 import HALVES, NO_SUMS, even_and_odd, multiply_bytes, multiply_halves
from srigl_fx.runtime.cpu.kernels.int8_rounding import BYTES, PLACES, every_int, rounded_vector
from srigl_fx.runtime.cpu.kernels.panel import QUAD_BYTES, QUAD_VALUES, SLOTS, STEPS
from srigl_fx.runtime.cpu.kernels.plan import LANES
from srigl_fx.runtime.cpu.kernels.vector import I16, I32, I64, INTS, address, intrinsic, number, types

LAID_BYTES: Final = (4 if BYTE_PRODUCTS else 8) * SLOTS  # of four rows of a tile, as rows of weights that share them do


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
    """Four rows of a tile, whose indices are at an address, with the bytes of each column beside each other."""
    rows = []
    for step in range(STEPS):
        index = b.zext(v.load(b, b.add(indices, number(2 * step)), I16, 2), I64)
        rows.append(v.load(b, b.add(inputs, b.shl(index, number(6))), BYTES, 64))
    low, high = (_interleave(b, rows[0], rows[1], 1, half) for half in (False, True))
    low_2, high_2 = (_interleave(b, rows[2], rows[3], 1, half) for half in (False, True))
    four = [_interleave(b, low, low_2, 2, half) for half in (False, True)]
    return four + [_interleave(b, high, high_2, 2, half) for half in (False, True)]


def _lay_out(context: Any, inputs: Any, indices: Any, quads: Any, to: Any) -> Any:
    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        inputs, indices, quads, to = args

        def one_quad(i: Any, carried: Any) -> Any:
            parts = _four_inputs(b, inputs, b.add(indices, b.shl(i, number(3))))
            if not BYTE_PRODUCTS:
                parts = [half for part in parts for half in even_and_odd(b, part, False)]
            at = b.add(to, b.mul(i, number(LAID_BYTES)))
            for place, part in enumerate(parts):
                v.store(b, part, b.add(at, number(SLOTS * place)), 64)
            return carried

        v.loop(b, quads, (), one_quad)
        return context.get_dummy_value()

    return types.void(*[address] * 4), generate


# Inputs of a tile four by four, as rows that share them multiply them: (the tile's bytes, the indices, how many fours,
# where to, LAID_BYTES for each).
lay_out: Callable[[int, int, int, int], None] = intrinsic(_lay_out)


def _add_laid(context: Any, laid: Any, weights: Any, quads: Any, sums: Any) -> Any:
    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        laid, weights, quads, sums = args

        def one_quad(i: Any, totals: Any) -> Any:
            at = b.add(laid, b.mul(i, number(LAID_BYTES)))
            every = b.bitcast(every_int(b, v.load(b, b.add(weights, b.shl(i, number(2))), I32)), BYTES)
            if BYTE_PRODUCTS:
                found = [v.load(b, b.add(at, number(SLOTS * place)), BYTES, 64) for place in range(4)]
                return multiply_bytes(b, totals, found, every)
            halves = even_and_odd(b, every, True)
            results = list(totals)
            for place in range(8):
                found = v.load(b, b.add(at, number(SLOTS * place)), HALVES, 64)
                product = multiply_halves(b, found, halves[place % 2])
                results[place // 2] = b.add(results[place // 2], product)
            return results

        before = [v.load(b, b.add(sums, number(64 * i)), INTS, 64) for i in range(4)]
        for i, total in enumerate(v.loop(b, quads, before, one_quad)):
            v.store(b, total, b.add(sums, number(64 * i)), 64)
        return context.get_dummy_value()

    return types.void(*[address] * 4), generate


# Adds one row's products to its sums of 64 columns: (the inputs that were laid out, the row's weights four by four, how
# many fours, int32 sums).
add_laid: Callable[[int, int, int, int], None] = intrinsic(_add_laid)


def _tile_row(
    added: bool, partial: bool, rounded: bool = False, summed: bool = False
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
                every = every_int(b, v.load(b, b.add(at, number(QUAD_VALUES)), I32))
                return multiply_bytes(b, totals, _four_inputs(b, inputs, at), b.bitcast(every, BYTES))

            if summed:
                totals = [v.load(b, b.add(inputs, number(64 * i)), INTS, 64) for i in range(4)]
            else:
                totals = v.loop(b, quads, [NO_SUMS] * 4, one_quad)
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


# The 64 outputs of one row of weights: (the tile's bytes, the row's first quad, how many, offsets and scales of the
# columns, the sum of the row's weights, their scale, the bias, the residual, the least and the most that an output may
# be, where to put them, how many columns are used, what outputs are multiplied by where they are rounded, and the
# offset then). Sum 16 v + 4 l + j is of what lies at byte 16 l + 4 v + j of the tile's rows: the order that
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
