"""Vectors of 16 floats in LLVM's terms, for kernels whose inner loop Numba cannot express.

Owns the instructions that the kernels' intrinsics are made of, and typed views of addresses. Vectors are always 16
lanes wide: on instruction sets with narrower registers LLVM cuts them. It must not know any layout.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numba
import numba.extending
from llvmlite import ir

from srigl_fx.runtime.cpu.kernels.plan import LANES

VECTOR_BYTES = 4 * LANES

types: Any = numba.types
intrinsic: Any = numba.extending.intrinsic
address = types.int64

I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
FLOATS, INTS, SHORTS = (ir.VectorType(item, LANES) for item in (F32, I32, I16))
_FLOATS_BY_COUNT = {8: ir.VectorType(F32, 8), 16: FLOATS}
ZERO = ir.Constant(FLOATS, [0.0] * LANES)


def _view(pointee: Any) -> Callable[[int], Any]:
    def view(context: Any, where: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(pointee)(address), generate

    return intrinsic(view)  # type: ignore[no-any-return]


# What lies at an address, as a pointer that Numba can index.
floats, words, ints, shorts, bytes_, signed_bytes = (
    _view(item) for item in (types.float32, types.int64, types.int32, types.uint16, types.uint8, types.int8)
)


def number(value: int) -> Any:
    """An int64 constant."""
    return ir.Constant(I64, value)


def lanes(value: int) -> Any:
    """The same int32 in every lane."""
    return ir.Constant(INTS, [value] * LANES)


def load(b: Any, where: Any, kind: Any, align: int = 4) -> Any:
    """What lies at an address."""
    loaded = b.load(b.inttoptr(where, kind.as_pointer()))
    loaded.align = align
    return loaded


def store(b: Any, value: Any, where: Any, align: int = 4) -> None:
    """Write a vector to an address."""
    b.store(value, b.inttoptr(where, value.type.as_pointer())).align = align


def declared(b: Any, name: str, result: Any, arguments: Sequence[Any]) -> Any:
    """A function of LLVM's or of C's, declared in the module at most once."""
    found = b.module.globals.get(name)
    return ir.Function(b.module, ir.FunctionType(result, arguments), name) if found is None else found


def multiply_add(b: Any, one: Any, other: Any, total: Any) -> Any:
    """``one * other + total``, fused where the instruction set can."""
    kind = total.type
    return b.call(declared(b, f"llvm.fmuladd.v{kind.count}f32", kind, [kind] * 3), [one, other, total])


def floats_of(count: int) -> Any:
    """The type of 16 floats, or of 8 where registers hold no more."""
    return _FLOATS_BY_COUNT[count]


def broadcast(b: Any, value: Any, count: int = LANES) -> Any:
    """One float in every lane."""
    unknown = ir.Constant(floats_of(count), ir.Undefined)
    places = ir.Constant(ir.VectorType(I32, count), [0] * count)
    return b.shuffle_vector(b.insert_element(unknown, value, ir.Constant(I32, 0)), unknown, places)


def table_lookup(b: Any, table: Sequence[Any], index: Any, shift: int) -> Any:
    """``table[index >> shift]`` lane by lane, for tables of two, four or eight vectors (AVX-512).

    Bits above those that the table needs are ignored.
    """
    permute = declared(b, "llvm.x86.avx512.vpermi2var.ps.512", FLOATS, [FLOATS, INTS, FLOATS])
    low = b.lshr(index, lanes(shift)) if shift else index
    found = [b.call(permute, [table[i], low, table[i + 1]]) for i in range(0, len(table), 2)]
    bit = 5
    while len(found) > 1:
        # The bit that chooses, brought to the sign.
        chosen = b.icmp_signed("<", b.shl(index, lanes(31 - bit - shift)), lanes(0))
        found = [b.select(chosen, found[i + 1], found[i]) for i in range(0, len(found), 2)]
        bit += 1
    return found[0]


def load_each(b: Any, base: Any, indices: Any) -> Any:
    """``floats(base)[i]`` lane by lane, for 16 indices of two bytes at an address; one load brings four of them."""
    found = ir.Constant(FLOATS, ir.Undefined)
    for lane in range(LANES):
        part = lane % 4
        if part == 0:
            four = load(b, b.add(indices, number(2 * lane)), I64, 8)
        index = b.and_(b.lshr(four, number(16 * part)) if part else four, number(0xFFFF))
        number_at = load(b, b.add(base, b.shl(index, number(2))), F32)
        found = b.insert_element(found, number_at, ir.Constant(I32, lane))
    return found


def loop(b: Any, count: Any, carried: Sequence[Any], body: Callable[[Any, Sequence[Any]], Sequence[Any]]) -> list[Any]:
    """``for i in range(count): carried = body(i, carried)`` over an int64 ``count``; returns what is carried out."""
    before, inside, after = b.block, b.append_basic_block("inside"), b.append_basic_block("after")
    b.cbranch(b.icmp_signed(">", count, number(0)), inside, after)
    b.position_at_end(inside)
    i = b.phi(I64)
    values = [b.phi(item.type) for item in carried]
    results = list(body(i, values))
    following = b.add(i, number(1))
    end = b.block
    for phi, first, again in ((i, number(0), following), *zip(values, carried, results, strict=True)):
        phi.add_incoming(first, before)
        phi.add_incoming(again, end)
    b.cbranch(b.icmp_signed("<", following, count), inside, after)
    b.position_at_end(after)
    finals = [b.phi(item.type) for item in carried]
    for phi, first, again in zip(finals, carried, results, strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(again, end)
    return finals


def _as_float(context: Any, bits: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.trunc(args[0], I32), F32)

    return types.float32(types.int64), generate


as_float: Callable[[int], float] = intrinsic(_as_float)  # the float32 with these bits


def _c_function(name: str, result: Any) -> Callable[[int], Any]:
    def call(context: Any, argument: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            native = I64 if result is address else ir.VoidType()
            value = builder.call(declared(builder, name, native, [I64]), args)
            return value if result is address else context.get_dummy_value()

        return result(address), generate

    return intrinsic(call)  # type: ignore[no-any-return]


allocate = _c_function("malloc", address)  # bytes of scratch, or 0
release = _c_function("free", types.void)


def _stack_address(context: Any) -> Any:
    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.ptrtoint(b.alloca(I64), I64)

    return address(), generate


stack_address: Callable[[], int] = intrinsic(_stack_address)  # somewhere in the caller's frame


AHEAD = number(4 * VECTOR_BYTES)  # two tiles' columns: rows are too far apart for the processor to guess the next


def prefetch(b: Any, where: Any, *, write: bool = False) -> None:
    """Ask for the cache line at an address, which need not exist."""
    function = declared(b, "llvm.prefetch.p0", ir.VoidType(), [I8.as_pointer(), I32, I32, I32])
    at = b.inttoptr(where, I8.as_pointer())
    b.call(function, [at, ir.Constant(I32, int(write)), ir.Constant(I32, 2), ir.Constant(I32, 1)])
