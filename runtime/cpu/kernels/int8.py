"""Eight bits: the inner loops over activations and weights of one byte.

Owns the instructions: products of bytes, the dot products of 16 rows at a time with inputs that are looked up in
registers, or loaded where bytes cannot be, and the copies that fill a tile of a convolution. The arithmetic is that of
:mod:`srigl_fx.runtime.quantisation`. It must not know how tasks are cut.

A product of four bytes with four others, summed up in an int32 lane, is one instruction where the CPU has VNNI. Others
multiply the even bytes and the odd ones as 16-bit numbers, of which no product overflows; or, where weights are packed
so that it does not saturate, two bytes with two others (``vpmaddubsw``, in :mod:`.int8_pairs`). Arm multiplies signed
bytes with each other, by one instruction or by a few.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from llvmlite import ir

from srigl_fx.runtime.cpu.kernels import vector as v
from srigl_fx.runtime.cpu.kernels.compiled import BYTE_LOOKUP, BYTE_PRODUCTS, ISA, TARGET
from srigl_fx.runtime.cpu.kernels.int8_rounding import BYTES, ORDER, PLACES, every_int
from srigl_fx.runtime.cpu.kernels.isa import AVX2, AVX512, BASELINE, NEON, NEON_I8MM
from srigl_fx.runtime.cpu.kernels.panel import SLOTS
from srigl_fx.runtime.cpu.kernels.plan import LANES, STEPS
from srigl_fx.runtime.cpu.kernels.vector import I8, I16, I32, I64, INTS, address, intrinsic, number, types

HALVES: Final = ir.VectorType(I16, 2 * LANES)
NO_SUMS: Final = ir.Constant(INTS, [0] * LANES)
AT_ONCE: Final = {BASELINE: LANES // 2, AVX2: LANES}.get(ISA, 2 * LANES)  # numbers of 16 bits that a register holds


def places(found: Iterable[int]) -> Any:
    """Which elements of two vectors, one behind the other, a shuffle takes."""
    picked = list(found)
    return ir.Constant(ir.VectorType(I32, len(picked)), picked)


def rows_of_quad(b: Any, inputs: Any, indices: Any, width: int) -> list[Any]:
    """Where the rows of a tile lie whose four indices are at an address."""
    found = [b.zext(v.load(b, b.add(indices, number(2 * step)), I16, 2), I64) for step in range(STEPS)]
    return [b.add(inputs, b.mul(index, number(width))) for index in found]


def cut(b: Any, halves: Any) -> list[Any]:
    """32 numbers of 16 bits, as many at a time as are multiplied at once."""
    whole = range(2 * LANES)
    return [b.shuffle_vector(halves, halves, places(whole[i : i + AT_ONCE])) for i in whole[::AT_ONCE]]


def multiply_halves(b: Any, one: Sequence[Any], other: Sequence[Any]) -> Any:
    """Products of 16-bit numbers, each two neighbours' added up in an int32 lane; both factors are cut."""
    name = {BASELINE: "sse2.pmadd.wd", AVX2: "avx2.pmadd.wd"}.get(ISA, "avx512.pmaddw.d.512")
    half, result = ir.VectorType(I16, AT_ONCE), ir.VectorType(I32, AT_ONCE // 2)
    function = v.declared(b, f"llvm.x86.{name}", result, [half, half])
    found = [b.call(function, pair) for pair in zip(one, other, strict=True)]
    while len(found) > 1:
        both = places(range(2 * found[0].type.count))
        found = [b.shuffle_vector(found[i], found[i + 1], both) for i in range(0, len(found), 2)]
    return found[0]


def even_and_odd(b: Any, bytes_: Any, signed: bool) -> tuple[Any, Any]:
    """The even ones of 64 bytes, and the odd ones, as 16-bit numbers."""
    halves, eight = b.bitcast(bytes_, HALVES), ir.Constant(HALVES, [8] * 2 * LANES)
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


_REGISTER: Final = ir.VectorType(I8, 16)  # of Arm
_FOUR: Final = ir.VectorType(I32, 4)


def _on_arm(b: Any, name: str, result: Any, *given: Any) -> Any:
    """One of the instructions that LLVM has names for."""
    return b.call(v.declared(b, f"llvm.aarch64.neon.{name}", result, [one.type for one in given]), given)


def _signed_products(b: Any, total: Any, one: Any, other: Any) -> Any:
    """``total`` and the sum of four products of signed bytes, in each int32 lane of a register."""
    if ISA != TARGET:
        return _on_arm(b, "sdot.v4i32.v16i8", _FOUR, total, one, other)
    eight, pairs = ir.VectorType(I16, 8), []
    for first in (0, 8):
        long = [b.sext(b.shuffle_vector(side, side, places(range(first, first + 8))), eight) for side in (one, other)]
        pairs.append(_on_arm(b, "saddlp.v4i32.v8i16", _FOUR, b.mul(*long)))
    return b.add(total, _on_arm(b, "addp.v4i32", _FOUR, *pairs))


def _multiply_on_arm(b: Any, totals: Sequence[Any], inputs: Sequence[Any], weights: Any) -> list[Any]:
    """The products of :func:`multiply_bytes`, a register of 16 bytes at a time.

    Unsigned bytes are multiplied with signed ones where there is I8MM. Elsewhere inputs are made signed by taking 128
    from each, and what they lack then, 128 times the sum of the weights, is the same for all inputs.
    """

    def registers(whole: Any, size: int) -> list[Any]:
        lanes = whole.type.count // 4
        return [b.shuffle_vector(whole, whole, places(range(i, i + lanes))) for i in range(0, size, lanes)]

    found: list[list[Any]] = [[] for _ in totals]
    sums, bytes_ = [registers(total, LANES) for total in totals], [registers(x, SLOTS) for x in inputs]
    for part, given in enumerate(registers(weights, SLOTS)):
        if TARGET == NEON_I8MM:
            for results, total, x in zip(found, sums, bytes_, strict=True):
                results.append(_on_arm(b, "usdot.v4i32.v16i8", _FOUR, total[part], x[part], given))
            continue
        every = [ir.Constant(_REGISTER, [number] * 16) for number in (1, -128)]
        lacking = _signed_products(b, ir.Constant(_FOUR, [0] * 4), given, every[0])
        lacking = b.shl(lacking, ir.Constant(_FOUR, [7] * 4))
        for results, total, x in zip(found, sums, bytes_, strict=True):
            start = b.add(total[part], lacking)
            results.append(_signed_products(b, start, b.xor(x[part], every[1]), given))
    joined = []
    for results in found:
        halves = [b.shuffle_vector(*results[i : i + 2], places(range(8))) for i in (0, 2)]
        joined.append(b.shuffle_vector(*halves, places(range(LANES))))
    return joined


def multiply_bytes(b: Any, totals: Sequence[Any], inputs: Sequence[Any], weights: Any) -> list[Any]:
    """``total + sum of four inputs times four weights``, in each int32 lane, for several vectors of unsigned inputs."""
    if ISA == NEON:
        return _multiply_on_arm(b, totals, inputs, weights)
    if BYTE_PRODUCTS:
        given = b.bitcast(weights, INTS)
        return [_multiply_quads(b, total, b.bitcast(x, INTS), given) for total, x in zip(totals, inputs, strict=True)]
    factors = [cut(b, halves) for halves in even_and_odd(b, weights, True)]
    results = []
    for total, x in zip(totals, inputs, strict=True):
        for halves, factor in zip(even_and_odd(b, x, False), factors, strict=True):
            total = b.add(total, multiply_halves(b, cut(b, halves), factor))
        results.append(total)
    return results


def _look_up(b: Any, inputs: Any, index: Any, window: int) -> Any:
    """The byte of a window that each byte of ``index`` names."""
    table = [v.load(b, b.add(inputs, number(SLOTS * i)), BYTES, 1) for i in range(window // SLOTS)]
    if len(table) == 1:
        permute = v.declared(b, "llvm.x86.avx512.permvar.qi.512", BYTES, [BYTES, BYTES])
        return b.call(permute, [table[0], index])
    permute = v.declared(b, "llvm.x86.avx512.vpermi2var.qi.512", BYTES, [BYTES, BYTES, BYTES])
    return b.call(permute, [table[0], index, table[1]])


def _load_each(b: Any, inputs: Any, indices: Any) -> Any:
    """The byte that each of 64 indices of two bytes names, at an address; one load brings four of them."""
    found = ir.Constant(BYTES, ir.Undefined)
    for slot in range(SLOTS):
        part = slot % 4
        if part == 0:
            four = v.load(b, b.add(indices, number(2 * slot)), I64, 8)
        index = b.and_(b.lshr(four, number(16 * part)) if part else four, number(0xFFFF))
        found = b.insert_element(found, v.load(b, b.add(inputs, index), I8, 1), ir.Constant(I32, slot))
    return found


def dot_group(window: int, samples: int) -> Callable[[int, int, int, int, int, int, int, int, int, int, int], None]:
    """An intrinsic that adds what 16 rows are for a few samples to the outputs of these.

    Its arguments are ``(x, x_row, phase, start, phases, offsets, scales, weight_sums, weight_scales, to, to_row)``.
    ``x`` is the first sample, of rounded bytes, and ``x_row`` the bytes to the next; ``phase`` is the first phase of a
    dot panel, ``start`` its window's start (int32). The samples' ``offsets`` (int32) and ``scales`` are neighbours, as
    are the rows' sums and scales; ``to`` are 16 outputs of the first sample, and ``to_row`` the bytes to the next's.

    Args:
        window: The inputs of a window, 64 or 128, where they are looked up in registers; elsewhere it is a wide one.
        samples: How many.
    """
    # A sum must wait four cycles for the one before it. Many samples keep the processor busy meanwhile; of one or two,
    # the even phases and the odd ones have sums of their own.
    chains = 2 if samples <= 2 and BYTE_LOOKUP else 1
    weights_at = SLOTS if BYTE_LOOKUP else 2 * SLOTS

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
                at = b.add(phase, b.mul(i, number(weights_at + SLOTS)))
                if BYTE_LOOKUP:
                    index = v.load(b, at, BYTES, 64)
                    found = [_look_up(b, b.add(row, first), index, window) for row in rows]
                else:
                    found = [_load_each(b, b.add(row, first), at) for row in rows]
                weights = v.load(b, b.add(at, number(weights_at)), BYTES, 64)
                return multiply_bytes(b, totals, found, weights)

            def one_of_each(i: Any, totals: Any) -> Any:
                found = []
                for chain in range(chains):
                    place = b.add(b.mul(i, number(chains)), number(chain))
                    found += one_phase(place, totals[chain * samples : (chain + 1) * samples])
                return found

            each = b.lshr(phases, number(chains - 1))
            totals = v.loop(b, each, [NO_SUMS] * samples * chains, one_of_each)
            if chains == 2:
                totals = [b.add(*pair) for pair in zip(totals[:samples], totals[samples:], strict=True)]
                done = b.shl(each, number(1))
                totals = v.loop(b, b.sub(phases, done), totals, lambda i, found: one_phase(b.add(i, done), found))
            sums, factors = v.load(b, weight_sums, INTS), v.load(b, weight_scales, v.FLOATS)
            for sample, total in enumerate(totals):
                at = number(4 * sample)
                offset = every_int(b, v.load(b, b.add(offsets, at), I32))
                exact = b.sitofp(b.sub(total, b.mul(offset, sums)), v.FLOATS)
                step = b.fmul(v.broadcast(b, v.load(b, b.add(scales, at), v.F32)), factors)
                place = b.add(to, b.mul(to_row, number(sample)))
                v.store(b, v.multiply_add(b, exact, step, v.load(b, place, v.FLOATS)), place)
            return context.get_dummy_value()

        return types.void(*[address] * 11), generate

    return intrinsic(dot)  # type: ignore[no-any-return]


MASKED: Final = ISA == AVX512  # whether it costs next to nothing to leave columns out


def _gather_rows(context: Any, inputs: Any, offsets: Any, count: Any, to: Any) -> Any:
    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        inputs, offsets, count, to = args

        def one_row(i: Any, carried: Any) -> Any:
            at = b.add(inputs, v.load(b, b.add(offsets, b.shl(i, number(3))), I64, 8))
            found = v.load(b, at, BYTES, 1)
            v.store(b, b.shuffle_vector(found, found, ir.Constant(PLACES, ORDER)), b.add(to, b.shl(i, number(6))), 64)
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
