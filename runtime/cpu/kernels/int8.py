"""Eight bits: the inner loops over activations and weights of one byte.

Owns the instructions: rounding of activations, the dot products of 16 rows at a time with inputs that are looked up in
registers, and the products of a tile of samples. The arithmetic is that of :mod:`srigl_fx.runtime.quantisation`. It
must not know how tasks are cut.

A product of four bytes with four others, summed up in an int32 lane, is one instruction where the CPU has VNNI. Others
multiply the even bytes and the odd ones as 16-bit numbers, of which no product overflows (``vpmaddubsw``, which takes
bytes, would saturate).
"""

from collections.abc import Callable, Sequence
from typing import Any, Final

from llvmlite import ir

from srigl_fx.runtime.cpu.kernels import vector as v
from srigl_fx.runtime.cpu.kernels.compiled import BYTE_LOOKUP, BYTE_PRODUCTS, ISA
from srigl_fx.runtime.cpu.kernels.copies import lane_mask, masked_load, masked_store, transposed
from srigl_fx.runtime.cpu.kernels.isa import AVX2, AVX512, BASELINE
from srigl_fx.runtime.cpu.kernels.panel import QUAD_BYTES, QUAD_VALUES, SLOTS, STEPS
from srigl_fx.runtime.cpu.kernels.plan import LANES
from srigl_fx.runtime.cpu.kernels.vector import I8, I16, I32, I64, INTS, address, intrinsic, number, types
from srigl_fx.runtime.quantisation import LARGEST_UNSIGNED

BYTES: Final = ir.VectorType(I8, SLOTS)
_HALVES: Final = ir.VectorType(I16, 2 * LANES)
_PLACES: Final = ir.VectorType(I32, SLOTS)
_NOTHING: Final = ir.Constant(INTS, [0] * LANES)
_UNKNOWN: Final = ir.Constant(INTS, ir.Undefined)
TILE_ROW: Final = SLOTS  # bytes of a row of a tile: its columns
LAID_BYTES: Final = (4 if BYTE_PRODUCTS else 8) * SLOTS  # of four rows of it, as rows of weights that share them do


def _multiply_halves(b: Any, one: Any, other: Any) -> Any:
    """Products of 16-bit numbers, each two neighbours' added up in an int32 lane."""
    name, bits = {BASELINE: ("sse2.pmadd.wd", 128), AVX2: ("avx2.pmadd.wd", 256)}.get(ISA, ("avx512.pmaddw.d.512", 512))
    parts, count = 512 // bits, bits // 16
    half, result = ir.VectorType(I16, count), ir.VectorType(I32, count // 2)
    function = v.declared(b, f"llvm.x86.{name}", result, [half, half])
    found = []
    for part in range(parts):
        picked = ir.Constant(ir.VectorType(I32, count), list(range(part * count, (part + 1) * count)))
        found.append(b.call(function, [b.shuffle_vector(side, side, picked) for side in (one, other)]))
    while len(found) > 1:
        size = found[0].type.count
        both = ir.Constant(ir.VectorType(I32, 2 * size), list(range(2 * size)))
        found = [b.shuffle_vector(found[i], found[i + 1], both) for i in range(0, len(found), 2)]
    return found[0]


def _even_and_odd(b: Any, bytes_: Any, signed: bool) -> tuple[Any, Any]:
    halves, eight = b.bitcast(bytes_, _HALVES), ir.Constant(_HALVES, [8] * 2 * LANES)
    shift = b.ashr if signed else b.lshr
    return shift(b.shl(halves, eight), eight), shift(halves, eight)


def _multiply_quads(b: Any, total: Any, one: Any, other: Any) -> Any:
    """The instruction, on whole vectors where registers hold them, or else on halves."""
    parts = 1 if ISA == AVX512 else 2
    count = LANES // parts
    kind = ir.VectorType(I32, count)
    function = v.declared(b, f"llvm.x86.avx512.vpdpbusd.{32 * count}", kind, [kind] * 3)
    if parts == 1:
        return b.call(function, [total, one, other])
    found = []
    for part in range(parts):
        picked = ir.Constant(kind, list(range(part * count, (part + 1) * count)))
        found.append(b.call(function, [b.shuffle_vector(side, side, picked) for side in (total, one, other)]))
    return b.shuffle_vector(*found, ir.Constant(INTS, list(range(LANES))))


def multiply_bytes(b: Any, totals: Sequence[Any], inputs: Sequence[Any], weights: Any) -> list[Any]:
    """``total + sum of four inputs times four weights``, in each int32 lane, for several vectors of unsigned inputs."""
    if BYTE_PRODUCTS:
        given = b.bitcast(weights, INTS)
        return [_multiply_quads(b, total, b.bitcast(x, INTS), given) for total, x in zip(totals, inputs, strict=True)]
    even, odd = _even_and_odd(b, weights, True)
    results = []
    for total, x in zip(totals, inputs, strict=True):
        x_even, x_odd = _even_and_odd(b, x, False)
        total = b.add(total, _multiply_halves(b, x_even, even))
        results.append(b.add(total, _multiply_halves(b, x_odd, odd)))
    return results


def _look_up(b: Any, inputs: Any, index: Any, window: int) -> Any:
    """The byte of a window that each byte of ``index`` names."""
    if BYTE_LOOKUP:
        table = [v.load(b, b.add(inputs, number(SLOTS * i)), BYTES, 1) for i in range(window // SLOTS)]
        if len(table) == 1:
            permute = v.declared(b, "llvm.x86.avx512.permvar.qi.512", BYTES, [BYTES, BYTES])
            return b.call(permute, [table[0], index])
        permute = v.declared(b, "llvm.x86.avx512.vpermi2var.qi.512", BYTES, [BYTES, BYTES, BYTES])
        return b.call(permute, [table[0], index, table[1]])
    found = ir.Constant(BYTES, ir.Undefined)
    for slot in range(SLOTS):
        at = b.add(inputs, b.zext(b.extract_element(index, ir.Constant(I32, slot)), I64))
        found = b.insert_element(found, v.load(b, at, I8, 1), ir.Constant(I32, slot))
    return found


def dot_group(window: int, samples: int) -> Callable[[int, int, int, int, int, int, int, int, int, int, int], None]:
    """An intrinsic that adds what 16 rows are for a few samples to the outputs of these.

    Its arguments are ``(x, x_row, phase, start, phases, offsets, scales, weight_sums, weight_scales, to, to_row)``.
    ``x`` is the first sample, of rounded bytes, and ``x_row`` the bytes to the next; ``phase`` is the first phase of a
    dot panel, ``start`` its window's start (int32). The samples' ``offsets`` (int32) and ``scales`` are neighbours, as
    are the rows' sums and scales; ``to`` are 16 outputs of the first sample, and ``to_row`` the bytes to the next's.

    Args:
        window: The inputs of a window: 64 or 128 where they are looked up in registers, else up to 256.
        samples: How many.
    """
    # A sum must wait four cycles for the one before it. Many samples keep the processor busy meanwhile; of one or two,
    # the even phases and the odd ones have sums of their own.
    chains = 2 if samples <= 2 and BYTE_LOOKUP else 1

    def dot(
        context: Any,
        x: Any,
        x_row: Any,
        phase: Any,
        start: Any,
        phases: Any,
        offsets: Any,
        scales: Any,
        weight_sums: Any,
        weight_scales: Any,
        to: Any,
        to_row: Any,
    ) -> Any:
        def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
            x, x_row, phase, start, phases, offsets, scales, weight_sums, weight_scales, to, to_row = args
            rows = [b.add(x, b.mul(x_row, number(sample))) for sample in range(samples)]

            def one_phase(i: Any, totals: Any) -> Any:
                first = b.zext(v.load(b, b.add(start, b.shl(i, number(2))), I32), I64)
                at = b.add(phase, b.mul(i, number(2 * SLOTS)))
                index, weights = v.load(b, at, BYTES, 64), v.load(b, b.add(at, number(SLOTS)), BYTES, 64)
                found = [_look_up(b, b.add(row, first), index, window) for row in rows]
                return multiply_bytes(b, totals, found, weights)

            def one_of_each(i: Any, totals: Any) -> Any:
                found = []
                for chain in range(chains):
                    place = b.add(b.mul(i, number(chains)), number(chain))
                    found += one_phase(place, totals[chain * samples : (chain + 1) * samples])
                return found

            each = b.lshr(phases, number(chains - 1))
            totals = v.loop(b, each, [_NOTHING] * samples * chains, one_of_each)
            if chains == 2:
                totals = [b.add(*pair) for pair in zip(totals[:samples], totals[samples:], strict=True)]
                done = b.shl(each, number(1))
                totals = v.loop(b, b.sub(phases, done), totals, lambda i, found: one_phase(b.add(i, done), found))
            sums, factors = v.load(b, weight_sums, INTS), v.load(b, weight_scales, v.FLOATS)
            for sample, total in enumerate(totals):
                at = number(4 * sample)
                single = b.insert_element(_UNKNOWN, v.load(b, b.add(offsets, at), I32), ir.Constant(I32, 0))
                offset = b.shuffle_vector(single, _UNKNOWN, v.lanes(0))
                exact = b.sitofp(b.sub(total, b.mul(offset, sums)), v.FLOATS)
                step = b.fmul(v.broadcast(b, v.load(b, b.add(scales, at), v.F32)), factors)
                place = b.add(to, b.mul(to_row, number(sample)))
                v.store(b, v.multiply_add(b, exact, step, v.load(b, place, v.FLOATS)), place)
            return context.get_dummy_value()

        return types.void(*[address] * 11), generate

    return intrinsic(dot)  # type: ignore[no-any-return]


def _interleave(b: Any, one: Any, other: Any, size: int, high: bool) -> Any:
    """Units of ``size`` bytes in turn from two vectors, of one half of each 16 bytes."""
    count = 16 // size // 2
    picked = []
    for lane in range(4):
        for unit in range(count):
            first = lane * 16 + (unit + (count if high else 0)) * size
            picked += [*range(first, first + size), *range(SLOTS + first, SLOTS + first + size)]
    return b.shuffle_vector(one, other, ir.Constant(_PLACES, picked))


def _in_every_lane(b: Any, whole: Any) -> Any:
    return b.shuffle_vector(b.insert_element(_UNKNOWN, whole, ir.Constant(I32, 0)), _UNKNOWN, v.lanes(0))


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
                parts = [half for part in parts for half in _even_and_odd(b, part, False)]
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
            every = b.bitcast(_in_every_lane(b, v.load(b, b.add(weights, b.shl(i, number(2))), I32)), BYTES)
            if BYTE_PRODUCTS:
                found = [v.load(b, b.add(at, number(SLOTS * place)), BYTES, 64) for place in range(4)]
                return multiply_bytes(b, totals, found, every)
            halves = _even_and_odd(b, every, True)
            results = list(totals)
            for place in range(8):
                found = v.load(b, b.add(at, number(SLOTS * place)), _HALVES, 64)
                product = _multiply_halves(b, found, halves[place % 2])
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
    added: bool, partial: bool, summed: bool = False
) -> Callable[[int, int, int, int, int, int, float, float, int, float, float, int, int], None]:
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
    ) -> Any:
        def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
            inputs, weights, quads, offsets, scales, weight_sum, weight_scale, bias, residual, low, high, to = args[:12]
            used = b.sub(b.shl(number(1), args[12]), number(1))

            def one_quad(i: Any, totals: Any) -> Any:
                at = b.add(weights, b.mul(i, number(QUAD_BYTES)))
                every = _in_every_lane(b, v.load(b, b.add(at, number(QUAD_VALUES)), I32))
                return multiply_bytes(b, totals, _four_inputs(b, inputs, at), b.bitcast(every, BYTES))

            if summed:
                totals = [v.load(b, b.add(inputs, number(64 * i)), INTS, 64) for i in range(4)]
            else:
                totals = v.loop(b, quads, [_NOTHING] * 4, one_quad)
            whole = _in_every_lane(b, b.trunc(weight_sum, I32))
            factor, start, least, most = (v.broadcast(b, one) for one in (weight_scale, bias, low, high))
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
                if partial:
                    masked_store(b, y, b.add(to, at), mask)
                else:
                    v.store(b, y, b.add(to, at))
            return context.get_dummy_value()

        single = types.float32
        return types.void(*[address] * 6, single, single, address, single, single, address, address), generate

    return intrinsic(tile_row)  # type: ignore[no-any-return]


# The 64 outputs of one row of weights: (the tile's bytes, the row's first quad, how many, offsets and scales of the
# columns, the sum of the row's weights, their scale, the bias, the residual, the least and the most that an output may
# be, where to put them, how many columns are used). Sum 16 v + 4 l + j is of what lies at byte 16 l + 4 v + j of the
# tile's rows: the order that interleaving leaves. Two read no residual, and two touch no column that is not used.
tile_row, tile_row_added, part_row, part_row_added = (
    _tile_row(added, partial) for partial in (False, True) for added in (False, True)
)
# The same from sums that are there already, at the address that would be that of the tile's bytes.
summed_row, summed_row_added, part_summed_row, part_summed_row_added = (
    _tile_row(added, partial, summed=True) for partial in (False, True) for added in (False, True)
)
MASKED: Final = ISA == AVX512  # whether it costs next to nothing to leave columns out
# The columns that lie in a tile's row, byte after byte.
_ORDER: Final = [16 * w + 4 * lane + j for lane in range(4) for w in range(4) for j in range(4)]


def _gather_rows(context: Any, inputs: Any, offsets: Any, count: Any, to: Any) -> Any:
    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        inputs, offsets, count, to = args

        def one_row(i: Any, carried: Any) -> Any:
            at = b.add(inputs, v.load(b, b.add(offsets, b.shl(i, number(3))), I64, 8))
            found = v.load(b, at, BYTES, 1)
            v.store(b, b.shuffle_vector(found, found, ir.Constant(_PLACES, _ORDER)), b.add(to, b.shl(i, number(6))), 64)
            return carried

        v.loop(b, count, (), one_row)
        return context.get_dummy_value()

    return types.void(*[address] * 4), generate


# 64 neighbouring bytes from each of several places as rows of a tile: (the first place, how far each is from there
# (int64), how many, where to).
gather_rows: Callable[[int, int, int, int], None] = intrinsic(_gather_rows)


def _every_second(context: Any, source: Any, count: Any, to: Any) -> Any:
    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        source, count, to = args

        def one_vector(i: Any, carried: Any) -> Any:
            pairs = v.load(b, b.add(source, b.shl(i, number(5))), v.SHORTS, 1)
            v.store(b, b.trunc(pairs, ir.VectorType(I8, LANES)), b.add(to, b.shl(i, number(4))), 1)
            return carried

        v.loop(b, b.lshr(b.add(count, number(LANES - 1)), number(4)), (), one_vector)
        return context.get_dummy_value()

    return types.void(*[address] * 3), generate


# Every second byte: (the first, how many, where to). It reads and writes whole vectors of 16.
every_second: Callable[[int, int, int], None] = intrinsic(_every_second)


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


def _rounded(b: Any, x: Any, inverses: Any, offsets: Any) -> Any:
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


def _round_row(context: Any, x: Any, count: Any, inverse: Any, offset: Any, to: Any) -> Any:
    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        x, count, inverse, offset, to = args
        inverses, nothing = v.broadcast(b, inverse), ir.Constant(INTS, ir.Undefined)
        one = b.insert_element(nothing, b.trunc(offset, I32), ir.Constant(I32, 0))
        offsets = b.shuffle_vector(one, nothing, v.lanes(0))

        def one_vector(i: Any, carried: Any) -> Any:
            found = v.load(b, b.add(x, b.shl(i, number(6))), v.FLOATS)
            v.store(b, _rounded(b, found, inverses, offsets), b.add(to, b.shl(i, number(4))), 1)
            return carried

        whole = b.lshr(count, number(4))
        v.loop(b, whole, (), one_vector)
        rest = b.and_(count, number(LANES - 1))
        mask = lane_mask(b, b.sub(b.shl(number(1), rest), number(1)))
        last = masked_load(b, b.add(x, b.shl(whole, number(6))), mask)
        v.store(b, _rounded(b, last, inverses, offsets), b.add(to, b.shl(whole, number(4))), 1)
        return context.get_dummy_value()

    return types.void(address, address, types.float32, address, address), generate


# A sample rounded: (x, count, what it is multiplied by, its offset, where to: at any address, and there is room for the
# next 16 bytes too).
round_row: Callable[[int, int, float, int, int], None] = intrinsic(_round_row)


def _round_block(context: Any, x: Any, x_row: Any, x_step: Any, inverses: Any, offsets: Any, to: Any, rows: Any) -> Any:
    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        x, x_row, x_step, inverses, offsets, to, rows = args
        found = [
            v.load(b, b.add(x, b.add(b.mul(x_step, number(i // 4)), b.mul(x_row, number(i % 4)))), v.FLOATS)
            for i in range(LANES)
        ]
        scale, offset = v.load(b, inverses, v.FLOATS), v.load(b, offsets, INTS)
        for i, row in enumerate(transposed(b, found)):
            with b.if_then(b.icmp_signed(">", rows, number(i))):
                v.store(b, _rounded(b, row, scale, offset), b.add(to, number(TILE_ROW * i)), 16)
        return context.get_dummy_value()

    return types.void(*[address] * 7), generate


# 16 features of 16 samples, rounded, as 16 bytes of each of up to 16 rows of a tile: (the first sample's features,
# bytes to the next of four samples, bytes to the next four, 16 inverses and offsets in the same order, where to, rows).
round_block: Callable[[int, int, int, int, int, int, int], None] = intrinsic(_round_block)


def _byte_block(context: Any, x: Any, x_row: Any, x_step: Any, to: Any, rows: Any) -> Any:
    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        x, x_row, x_step, to, rows = args
        kind, found = ir.VectorType(I8, LANES), []
        for i in range(LANES):
            at = b.add(x, b.add(b.mul(x_step, number(i // 4)), b.mul(x_row, number(i % 4))))
            found.append(b.bitcast(b.zext(v.load(b, at, kind, 1), INTS), v.FLOATS))
        for i, row in enumerate(transposed(b, found)):
            with b.if_then(b.icmp_signed(">", rows, number(i))):
                v.store(b, b.trunc(b.bitcast(row, INTS), kind), b.add(to, number(TILE_ROW * i)), 16)
        return context.get_dummy_value()

    return types.void(*[address] * 5), generate


# The same of samples that are bytes already: (the first sample's features, bytes to the next of four samples, bytes to
# the next four, where to, rows).
byte_block: Callable[[int, int, int, int, int], None] = intrinsic(_byte_block)


def _round_columns(context: Any, x: Any, second: Any, inverses: Any, offsets: Any, to: Any) -> Any:
    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        x, second, inverses, offsets, to = args
        parts = []
        for i, base in enumerate((x, b.add(x, number(64)), second, b.add(second, number(64)))):
            found, scale = v.load(b, base, v.FLOATS), v.load(b, b.add(inverses, number(64 * i)), v.FLOATS)
            parts.append(_rounded(b, found, scale, v.load(b, b.add(offsets, number(64 * i)), INTS)))
        halves = [
            b.shuffle_vector(parts[i], parts[i + 1], ir.Constant(ir.VectorType(I32, 32), list(range(32))))
            for i in (0, 2)
        ]
        v.store(b, b.shuffle_vector(*halves, ir.Constant(_PLACES, _ORDER)), to, 64)
        return context.get_dummy_value()

    return types.void(*[address] * 5), generate


# 64 columns of one row, rounded, in the order of a tile's row: (the first 32, the others, inverses, offsets, where to).
round_columns: Callable[[int, int, int, int, int], None] = intrinsic(_round_columns)


def _byte_columns(context: Any, x: Any, to: Any) -> Any:
    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        x, to = args
        found = v.load(b, x, BYTES, 1)
        v.store(b, b.shuffle_vector(found, found, ir.Constant(_PLACES, _ORDER)), to, 64)
        return context.get_dummy_value()

    return types.void(address, address), generate


# The same of 64 bytes: (where they are, where to).
byte_columns: Callable[[int, int], None] = intrinsic(_byte_columns)
