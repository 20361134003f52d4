"""Floats moved from place to place by vectors: transposed, copied row by row, picked at a stride, added up, filled in;
and bytes copied.

Owns the intrinsics for that, which kernels call like functions; what Numba makes of such loops is scalar. It must not
know what is moved.
"""

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

from srigl_fx.runtime.cpu.kernels.plan import LANES
from srigl_fx.runtime.cpu.kernels.vector import (
    AHEAD,
    F32,
    FLOATS,
    I8,
    I16,
    I32,
    I64,
    INTS,
    VECTOR_BYTES,
    ZERO,
    address,
    broadcast,
    declared,
    floats_of,
    intrinsic,
    lanes,
    load,
    loop,
    number,
    prefetch,
    store,
    types,
)


def transposed(b: Any, rows: Sequence[Any]) -> list[Any]:
    """As many vectors as each has lanes, with rows and lanes exchanged."""
    # Log2 rounds that exchange ever larger blocks: first single floats of neighbouring rows, at last halves.
    rows, count, distance = list(rows), len(rows), 1
    places = ir.VectorType(I32, count)
    while distance < count:
        low = [i if not i & distance else i - distance + count for i in range(count)]
        high = [i + distance if not i & distance else i + count for i in range(count)]
        exchanged = list(rows)
        for i in range(count):
            if not i & distance:
                pair = rows[i], rows[i + distance]
                exchanged[i] = b.shuffle_vector(*pair, ir.Constant(places, low))
                exchanged[i + distance] = b.shuffle_vector(*pair, ir.Constant(places, high))
        rows, distance = exchanged, 2 * distance
    return rows


def transpose_of(count: int) -> Callable[[int, int, int, int], None]:
    """An intrinsic that transposes ``count`` x ``count`` floats, 8 or 16.

    Its arguments are ``(source, bytes between its rows, target, bytes between its rows)``.
    """

    def transpose(context: Any, source: Any, source_row: Any, target: Any, target_row: Any) -> Any:
        def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
            source, source_row, target, target_row = args
            rows = [load(b, b.add(source, b.mul(source_row, number(i))), floats_of(count)) for i in range(count)]
            for i, row in enumerate(transposed(b, rows)):
                store(b, row, b.add(target, b.mul(target_row, number(i))))
            return context.get_dummy_value()

        return types.void(*[address] * 4), generate

    return intrinsic(transpose)  # type: ignore[no-any-return]


transpose = transpose_of(LANES)


def lane_mask(b: Any, bits: Any) -> Any:
    """A truth value for each lane, from the 16 lowest bits of an integer."""
    return b.bitcast(b.trunc(bits, I16), ir.VectorType(ir.IntType(1), LANES))


def masked_load(b: Any, where: Any, mask: Any) -> Any:
    """The lanes that a mask names; zeros in the others, which need not exist."""
    arguments = [FLOATS.as_pointer(), I32, mask.type, FLOATS]
    function = declared(b, "llvm.masked.load.v16f32.p0", FLOATS, arguments)
    return b.call(function, [b.inttoptr(where, FLOATS.as_pointer()), ir.Constant(I32, 4), mask, ZERO])


def _every_second(b: Any, bits: Any) -> Any:
    """The 16 bits of an integer, a zero after each."""
    for distance, kept in ((8, 0x00FF00FF), (4, 0x0F0F0F0F), (2, 0x33333333), (1, 0x55555555)):
        bits = b.and_(b.or_(bits, b.shl(bits, number(distance))), number(kept))
    return bits


def _copy_lanes(stride: int) -> Callable[[int, int, int, int, int, int, int, int, int], None]:
    even = ir.Constant(INTS, list(range(0, 2 * LANES, 2)))

    def masks(b: Any, read: Any) -> list[Any]:
        wide = read if stride == 1 else _every_second(b, read)
        return [lane_mask(b, b.lshr(wide, number(LANES * i)) if i else wide) for i in range(stride)]

    def found(b: Any, at: Any, read: Sequence[Any]) -> Any:
        parts = [masked_load(b, b.add(at, number(VECTOR_BYTES * i)), mask) for i, mask in enumerate(read)]
        return b.bitcast(parts[0] if stride == 1 else b.shuffle_vector(*parts, even), INTS)

    def copy(
        context: Any,
        first: Any,
        second: Any,
        source_row: Any,
        target: Any,
        target_row: Any,
        rows: Any,
        read_first: Any,
        read_second: Any,
        written: Any,
    ) -> Any:
        def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
            first, second, source_row, target, target_row, rows, read_first, read_second, written = args
            first_masks, second_masks, kept = masks(b, read_first), masks(b, read_second), lane_mask(b, written)

            def two_sources(i: Any, at: Any) -> Any:
                prefetch(b, b.add(at[0], AHEAD))
                both = b.or_(found(b, at[0], first_masks), found(b, at[1], second_masks))
                masked_store(b, b.bitcast(both, FLOATS), at[2], kept)
                return b.add(at[0], source_row), b.add(at[1], source_row), b.add(at[2], target_row)

            def one_source(i: Any, at: Any) -> Any:
                prefetch(b, b.add(at[0], AHEAD))
                masked_store(b, b.bitcast(found(b, at[0], first_masks), FLOATS), at[1], kept)
                return b.add(at[0], source_row), b.add(at[1], target_row)

            with b.if_else(b.icmp_signed("==", read_second, number(0))) as (alone, together):
                with alone:
                    loop(b, rows, (first, target), one_source)
                with together:
                    loop(b, rows, (first, second, target), two_sources)
            return context.get_dummy_value()

        return types.void(*[address] * 9), generate

    return intrinsic(copy)  # type: ignore[no-any-return]


def _copy_rows(context: Any, source: Any, source_row: Any, target: Any, target_row: Any, rows: Any) -> Any:
    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        source, source_row, target, target_row, rows = args
        halves = number(0), number(VECTOR_BYTES)
        # Rows a multiple of 1 KB apart share few sets of a cache: what is fetched early would be gone when it is read.
        crowded = b.icmp_unsigned("==", b.and_(source_row, number(1023)), number(0))
        ahead = b.select(crowded, number(0), AHEAD)

        def one_row(i: Any, at: Any) -> Any:
            for half in halves:
                prefetch(b, b.add(b.add(at[0], ahead), half))
            for half in halves:
                store(b, load(b, b.add(at[0], half), FLOATS), b.add(at[1], half))
            return b.add(at[0], source_row), b.add(at[1], target_row)

        loop(b, rows, (source, target), one_row)
        return context.get_dummy_value()

    return types.void(*[address] * 5), generate


# Rows of 32 floats: (source, bytes between its rows, target, bytes between its rows, rows)
copy_rows: Callable[[int, int, int, int, int], None] = intrinsic(_copy_rows)


def masked_store(b: Any, value: Any, where: Any, mask: Any) -> None:
    """Write the lanes that a mask names."""
    arguments = [FLOATS, FLOATS.as_pointer(), I32, mask.type]
    function = declared(b, "llvm.masked.store.v16f32.p0", ir.VoidType(), arguments)
    b.call(function, [value, b.inttoptr(where, FLOATS.as_pointer()), ir.Constant(I32, 4), mask])


# Up to 16 floats of each of ``rows`` rows, each from one of two sources, from neighbouring places there or from every
# second one: (first source, second, bytes between rows of either, target, bytes between its rows, rows, bits of the
# lanes to read from the first, from the second, bits of those to write). What is written without being read is zero;
# what is not read need not exist.
copy_lanes, copy_even_lanes = _copy_lanes(1), _copy_lanes(2)


def _copy_spread_lanes(
    context: Any,
    source: Any,
    lane_bytes: Any,
    source_row: Any,
    target: Any,
    target_row: Any,
    rows: Any,
    read: Any,
    written: Any,
) -> Any:
    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        source, lane_bytes, source_row, target, target_row, rows, read, written = args
        mask, kept = lane_mask(b, read), lane_mask(b, written)
        places = ir.VectorType(I64, LANES)

        def everywhere(value: Any) -> Any:
            nothing = ir.Constant(places, ir.Undefined)
            return b.shuffle_vector(b.insert_element(nothing, value, ir.Constant(I32, 0)), nothing, lanes(0))

        offsets = b.mul(everywhere(lane_bytes), ir.Constant(places, list(range(LANES))))
        pointers = ir.VectorType(F32.as_pointer(), LANES)
        gather_floats = declared(b, "llvm.masked.gather.v16f32.v16p0", FLOATS, [pointers, I32, mask.type, FLOATS])

        def one_row(i: Any, at: Any) -> Any:
            addresses = b.inttoptr(b.add(everywhere(at[0]), offsets), pointers)
            found = b.call(gather_floats, [addresses, ir.Constant(I32, 4), mask, ZERO])
            masked_store(b, found, at[1], kept)
            return b.add(at[0], source_row), b.add(at[1], target_row)

        loop(b, rows, (source, target), one_row)
        return context.get_dummy_value()

    return types.void(*[address] * 8), generate


# Up to 16 floats of each of ``rows`` rows, from places that are ``lane_bytes`` apart: (source of the first lane,
# lane_bytes, bytes between rows there, target, bytes between its rows, rows, bits of the lanes to read, and to write).
copy_spread_lanes: Callable[[int, int, int, int, int, int, int, int], None] = intrinsic(_copy_spread_lanes)


def _move_floats(add: bool) -> Callable[[int, int, int], None]:
    def move(context: Any, source: Any, target: Any, count: Any) -> Any:
        def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
            source, target, count = args

            def result(from_: Any, to: Any, read: Callable[[Any], Any]) -> Any:
                return b.fadd(read(from_), read(to)) if add else read(from_)

            def one_vector(i: Any, carried: Any) -> Any:
                at = b.shl(i, number(6))
                to = b.add(target, at)
                if not add:
                    prefetch(b, b.add(to, AHEAD), write=True)
                store(b, result(b.add(source, at), to, lambda where: load(b, where, FLOATS)), to)
                return carried

            whole = b.lshr(count, number(4))
            loop(b, whole, (), one_vector)
            rest = b.and_(count, number(LANES - 1))
            with b.if_then(b.icmp_signed("!=", rest, number(0))):
                at = b.shl(whole, number(6))
                to = b.add(target, at)
                mask = lane_mask(b, b.sub(b.shl(number(1), rest), number(1)))
                masked_store(b, result(b.add(source, at), to, lambda where: masked_load(b, where, mask)), to, mask)
            return context.get_dummy_value()

        return types.void(*[address] * 3), generate

    return intrinsic(move)  # type: ignore[no-any-return]


# A number of floats copied, or added to what is there: (source, target, count). What Numba makes of such loops over two
# pointers is scalar, or asks first whether they overlap.
copy_floats, add_floats = _move_floats(add=False), _move_floats(add=True)


def _fill_floats(context: Any, target: Any, value: Any, vectors: Any) -> Any:
    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        target, value, vectors = args
        row = broadcast(b, value)

        def one_vector(i: Any, carried: Any) -> Any:
            store(b, row, b.add(target, b.shl(i, number(6))), 64)
            return carried

        loop(b, vectors, (), one_vector)
        return context.get_dummy_value()

    return types.void(address, types.float32, address), generate


fill_floats: Callable[[int, float, int], None] = intrinsic(_fill_floats)  # aligned: (target, value, vectors of 16)


def _copy_bytes(context: Any, source: Any, target: Any, count: Any) -> Any:
    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        source, target, count = args

        def move(kind: Any, at: Any) -> None:
            store(b, load(b, b.add(source, at), kind, 1), b.add(target, at), 1)

        def one_vector(i: Any, carried: Any) -> Any:
            move(ir.VectorType(I8, LANES), b.shl(i, number(4)))
            return carried

        loop(b, b.lshr(count, number(4)), (), one_vector)
        at = b.and_(count, number(-LANES))
        for size in (8, 4, 2, 1):
            used = b.and_(count, number(size))
            with b.if_then(b.icmp_signed("!=", used, number(0))):
                move(ir.IntType(8 * size), at)
            at = b.add(at, used)
        return context.get_dummy_value()

    return types.void(*[address] * 3), generate


copy_bytes: Callable[[int, int, int], None] = intrinsic(_copy_bytes)  # (source, target, count)
