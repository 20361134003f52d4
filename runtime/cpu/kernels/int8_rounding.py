"""Eight bits: floats measured and rounded to bytes.

Owns the instructions for that, and the order of a tile's columns, in which some of them store what they round. The
arithmetic is that of :mod:`srigl_fx.runtime.quantisation`. It must not know where floats come from, nor jobs.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final

from llvmlite import ir

from srigl_fx.runtime.cpu.kernels import vector as v
from srigl_fx.runtime.cpu.kernels.copies import lane_mask, masked_load, transposed
from srigl_fx.runtime.cpu.kernels.panel import SLOTS
from srigl_fx.runtime.cpu.kernels.plan import LANES
from srigl_fx.runtime.cpu.kernels.vector import I8, I32, I64, INTS, address, intrinsic, number, types
from srigl_fx.runtime.quantisation import LARGEST_UNSIGNED

BYTES: Final = ir.VectorType(I8, SLOTS)
PLACES: Final = ir.VectorType(I32, SLOTS)
TILE_ROW: Final = SLOTS  # bytes of a row of a full tile: its columns
# The columns that lie in such a row, byte after byte.
ORDER: Final = [16 * w + 4 * lane + j for lane in range(4) for w in range(4) for j in range(4)]
_NOTHING: Final = ir.Constant(INTS, [0] * LANES)


def _seen(b: Any, bits: Any, found: Sequence[Any]) -> list[Any]:
    """The larger of the bits of floats and those found before: without the sign, and with it."""

    def larger(one: Any, other: Any) -> Any:
        return b.select(b.icmp_unsigned(">", one, other), one, other)

    return [larger(b.and_(bits, v.lanes(0x7FFFFFFF)), found[0]), larger(bits, found[1])]


def _extremes(context: Any, x: Any, count: Any, to: Any) -> Any:
    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        x, count, to = args

        def one_vector(i: Any, found: Any) -> Any:
            return _seen(b, v.load(b, b.add(x, b.shl(i, number(6))), INTS), found)

        whole = b.lshr(count, number(4))
        before = [v.load(b, b.add(to, number(64 * i)), INTS) for i in range(2)]
        found = v.loop(b, whole, before, one_vector)
        rest = b.and_(count, number(LANES - 1))
        mask = lane_mask(b, b.sub(b.shl(number(1), rest), number(1)))
        last = b.bitcast(masked_load(b, b.add(x, b.shl(whole, number(6))), mask), INTS)
        for i, value in enumerate(_seen(b, last, found)):
            v.store(b, value, b.add(to, number(64 * i)))
        return context.get_dummy_value()

    return types.void(*[address] * 3), generate


# Over floats, lane by lane, the largest of their bits without the sign, and with it: (x, count, 2 x 16 uint32, which
# hold what was found before). Among all lanes the former is the largest magnitude, and at least that of infinity where
# something is not finite; the latter is above 0x80000000 where something is negative.
extremes: Callable[[int, int, int], None] = intrinsic(_extremes)


def _column_extremes(context: Any, x: Any, x_row: Any, rows: Any, columns: Any, to: Any) -> Any:
    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        x, x_row, rows, columns, to = args
        mask = lane_mask(b, b.sub(b.shl(number(1), columns), number(1)))

        def one_row(i: Any, found: Any) -> Any:
            return _seen(b, b.bitcast(masked_load(b, b.add(x, b.mul(i, x_row)), mask), INTS), found)

        for i, value in enumerate(v.loop(b, rows, [_NOTHING] * 2, one_row)):
            v.store(b, value, b.add(to, number(64 * i)))
        return context.get_dummy_value()

    return types.void(*[address] * 5), generate


# The same over each of up to 16 columns: (the first row, bytes to the next, rows, columns, where to put 2 x 16 uint32).
column_extremes: Callable[[int, int, int, int, int], None] = intrinsic(_column_extremes)


def rounded_vector(b: Any, x: Any, inverses: Any, offsets: Any) -> Any:
    """16 floats as bytes: to the nearest whole number, ties to even, plus the offset, within 0 ... 255; NaN as zero."""
    # One instruction. Adding 1.5 * 2**23 would do the same, but where it is fused with the product, which then is not
    # rounded, a number in some ten thousands differs between instruction sets.
    function = v.declared(b, "llvm.lrint.v16i32.v16f32", INTS, [v.FLOATS])
    steps = b.fmul(x, inverses)
    # Within reach before they are converted, as a conversion out of range means nothing.
    steps = b.select(b.fcmp_ordered("ord", steps, steps), steps, v.ZERO)
    least, most = (b.sitofp(b.sub(v.lanes(limit), offsets), v.FLOATS) for limit in (0, LARGEST_UNSIGNED))
    steps = b.select(b.fcmp_ordered("<", steps, least), least, steps)
    steps = b.select(b.fcmp_ordered(">", steps, most), most, steps)
    return b.trunc(b.add(b.call(function, [steps]), offsets), ir.VectorType(I8, LANES))


def every_int(b: Any, whole: Any) -> Any:
    """The low 32 bits of an integer in every lane."""
    nothing = ir.Constant(INTS, ir.Undefined)
    low = b.trunc(whole, I32) if whole.type == I64 else whole
    one = b.insert_element(nothing, low, ir.Constant(I32, 0))
    return b.shuffle_vector(one, nothing, v.lanes(0))


def _store_some(b: Any, value: Any, where: Any, count: Any) -> None:
    """The first of 16 bytes, fewer than all; nothing behind them is written."""
    halves = b.bitcast(value, ir.VectorType(I64, 2))
    rest, high = (b.extract_element(halves, ir.Constant(I32, i)) for i in range(2))
    for size in (8, 4, 2, 1):
        used = b.and_(count, number(size))
        is_used = b.icmp_signed("!=", used, number(0))
        with b.if_then(is_used):
            v.store(b, b.trunc(rest, ir.IntType(8 * size)) if size < 8 else rest, where, 1)
        rest = b.select(is_used, high, rest) if size == 8 else b.lshr(rest, b.shl(used, number(3)))
        where = b.add(where, used)


def _round_row(exact: bool) -> Callable[[int, int, float, int, int], None]:
    def round_row(context: Any, x: Any, count: Any, inverse: Any, offset: Any, to: Any) -> Any:
        def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
            x, count, inverse, offset, to = args
            inverses, offsets = v.broadcast(b, inverse), every_int(b, offset)

            def one_vector(i: Any, carried: Any) -> Any:
                found = v.load(b, b.add(x, b.shl(i, number(6))), v.FLOATS)
                v.store(b, rounded_vector(b, found, inverses, offsets), b.add(to, b.shl(i, number(4))), 1)
                return carried

            whole = b.lshr(count, number(4))
            v.loop(b, whole, (), one_vector)
            rest = b.and_(count, number(LANES - 1))
            mask = lane_mask(b, b.sub(b.shl(number(1), rest), number(1)))
            source, target = b.add(x, b.shl(whole, number(6))), b.add(to, b.shl(whole, number(4)))
            if exact:
                with b.if_then(b.icmp_signed("!=", rest, number(0))):
                    last = masked_load(b, source, mask)
                    _store_some(b, rounded_vector(b, last, inverses, offsets), target, rest)
            else:
                last = masked_load(b, source, mask)
                v.store(b, rounded_vector(b, last, inverses, offsets), target, 1)
            return context.get_dummy_value()

        return types.void(address, address, types.float32, address, address), generate

    return intrinsic(round_row)  # type: ignore[no-any-return]


# Floats rounded: (x, count, what they are multiplied by, their offset, where to: at any address). The first is for
# where there is room for the next 16 bytes too; the second writes nothing there.
round_row, round_exactly = _round_row(False), _round_row(True)


def _round_block(
    context: Any, x: Any, x_row: Any, x_step: Any, inverses: Any, offsets: Any, to: Any, to_row: Any, rows: Any
) -> Any:
    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        x, x_row, x_step, inverses, offsets, to, to_row, rows = args
        found = [
            v.load(b, b.add(x, b.add(b.mul(x_step, number(i // 4)), b.mul(x_row, number(i % 4)))), v.FLOATS)
            for i in range(LANES)
        ]
        scale, offset = v.load(b, inverses, v.FLOATS), v.load(b, offsets, INTS)
        for i, row in enumerate(transposed(b, found)):
            with b.if_then(b.icmp_signed(">", rows, number(i))):
                v.store(b, rounded_vector(b, row, scale, offset), b.add(to, b.mul(to_row, number(i))), 16)
        return context.get_dummy_value()

    return types.void(*[address] * 8), generate


# 16 features of 16 samples, rounded, as 16 bytes of each of up to 16 rows of a tile: (the first sample's features,
# bytes to the next of four samples, bytes to the next four, 16 inverses and offsets in the same order, where to, bytes
# of the tile's rows, how many of them).
round_block: Callable[[int, int, int, int, int, int, int, int], None] = intrinsic(_round_block)


def _byte_block(context: Any, x: Any, x_row: Any, x_step: Any, to: Any, to_row: Any, rows: Any) -> Any:
    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        x, x_row, x_step, to, to_row, rows = args
        kind, found = ir.VectorType(I8, LANES), []
        for i in range(LANES):
            at = b.add(x, b.add(b.mul(x_step, number(i // 4)), b.mul(x_row, number(i % 4))))
            found.append(b.bitcast(b.zext(v.load(b, at, kind, 1), INTS), v.FLOATS))
        for i, row in enumerate(transposed(b, found)):
            with b.if_then(b.icmp_signed(">", rows, number(i))):
                v.store(b, b.trunc(b.bitcast(row, INTS), kind), b.add(to, b.mul(to_row, number(i))), 16)
        return context.get_dummy_value()

    return types.void(*[address] * 6), generate


# The same of samples that are bytes already: (the first sample's features, bytes to the next of four samples, bytes to
# the next four, where to, bytes of the tile's rows, how many of them).
byte_block: Callable[[int, int, int, int, int, int], None] = intrinsic(_byte_block)


def _round_columns(context: Any, x: Any, second: Any, inverses: Any, offsets: Any, to: Any) -> Any:
    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        x, second, inverses, offsets, to = args
        parts = []
        for i, base in enumerate((x, b.add(x, number(64)), second, b.add(second, number(64)))):
            found, scale = v.load(b, base, v.FLOATS), v.load(b, b.add(inverses, number(64 * i)), v.FLOATS)
            parts.append(rounded_vector(b, found, scale, v.load(b, b.add(offsets, number(64 * i)), INTS)))
        halves = [
            b.shuffle_vector(parts[i], parts[i + 1], ir.Constant(ir.VectorType(I32, 32), list(range(32))))
            for i in (0, 2)
        ]
        v.store(b, b.shuffle_vector(*halves, ir.Constant(PLACES, ORDER)), to, 64)
        return context.get_dummy_value()

    return types.void(*[address] * 5), generate


# 64 columns of one row, rounded, in the order of a full tile's row: (the first 32, the others, inverses, offsets, where
# to).
round_columns: Callable[[int, int, int, int, int], None] = intrinsic(_round_columns)


def _byte_columns(context: Any, x: Any, to: Any) -> Any:
    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        x, to = args
        found = v.load(b, x, BYTES, 1)
        v.store(b, b.shuffle_vector(found, found, ir.Constant(PLACES, ORDER)), to, 64)
        return context.get_dummy_value()

    return types.void(address, address), generate


# The same of 64 bytes: (where they are, where to).
byte_columns: Callable[[int, int], None] = intrinsic(_byte_columns)


def _round_few(context: Any, x: Any, inverses: Any, offsets: Any, to: Any) -> Any:
    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        x, inverses, offsets, to = args
        found, scale, offset = v.load(b, x, v.FLOATS), v.load(b, inverses, v.FLOATS), v.load(b, offsets, INTS)
        v.store(b, rounded_vector(b, found, scale, offset), to, 16)
        return context.get_dummy_value()

    return types.void(*[address] * 4), generate


# 16 columns of one row, rounded, as they lie: (the first, inverses, offsets, where to).
round_few: Callable[[int, int, int, int], None] = intrinsic(_round_few)
