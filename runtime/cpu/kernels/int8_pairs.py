"""Eight bits: a row of weights for a tile of bytes, where two bytes are multiplied with two others.

Owns the instructions. ``vpmaddubsw`` adds up two products in 16 bits, which hold the sum as the panel has chosen the
weights that lie beside each other (:mod:`.quads`); multiplied by one, two such sums are added up in 32 bits. It must
not know what becomes of the sums.
"""

from collections.abc import Sequence
from typing import Any

from llvmlite import ir

from srigl_fx.runtime.cpu.kernels import vector as v
from srigl_fx.runtime.cpu.kernels.compiled import ISA
from srigl_fx.runtime.cpu.kernels.int8 import places, rows_of_quad
from srigl_fx.runtime.cpu.kernels.isa import AVX512
from srigl_fx.runtime.cpu.kernels.plan import INT8_COLUMNS, LANES, STEPS
from srigl_fx.runtime.cpu.kernels.quads import QUAD_BYTES, QUAD_VALUES
from srigl_fx.runtime.cpu.kernels.vector import I8, I16, I32, number

_NAMES = {32: ("avx2.pmadd.ub.sw", "avx2.pmadd.wd"), 64: ("avx512.pmaddubs.w.512", "avx512.pmaddw.d.512")}
_WIDEST = 64 if ISA == AVX512 else 32  # bytes of a register
_NARROW = 32  # bytes of a register that narrow tiles are multiplied in


def _interleaved(b: Any, one: Any, other: Any, size: int, high: bool) -> Any:
    """Units of ``size`` bytes in turn from two registers, of one half of each 16 bytes."""
    count, picked = 16 // size // 2, list[int]()
    for lane in range(one.type.count // 16):
        for unit in range(count):
            first = lane * 16 + (unit + (count if high else 0)) * size
            picked += [*range(first, first + size), *range(one.type.count + first, one.type.count + first + size)]
    return b.shuffle_vector(one, other, places(picked))


def _add_quad(b: Any, totals: Sequence[Any], rows: Sequence[Any], weights: Any) -> list[Any]:
    """``total + products`` of a register of each of four rows, with their four weights in each int32 lane.

    Total ``i`` is of columns ``4 i`` to ``4 i + 3`` of each 16.
    """
    count = rows[0].type.count
    sums, products = ir.VectorType(I16, count // 2), ir.VectorType(I32, count // 4)
    multiply, add_up = (
        v.declared(b, f"llvm.x86.{name}", *kinds)
        for name, kinds in zip(_NAMES[count], ((sums, [rows[0].type] * 2), (products, [sums] * 2)), strict=True)
    )
    pairs = [_interleaved(b, rows[i], rows[i + 1], 1, high) for i in (0, 2) for high in (False, True)]
    fours = [_interleaved(b, pairs[half], pairs[half + 2], 2, high) for half in (0, 1) for high in (False, True)]
    ones = ir.Constant(sums, [1] * sums.count)
    found = [b.call(add_up, [b.call(multiply, [four, weights]), ones]) for four in fours]
    return [b.add(total, product) for total, product in zip(totals, found, strict=True)]


def _weights(b: Any, quads: Sequence[Any], count: int) -> Any:
    """The four weights of a quad in each int32 lane of a register, or those of two in its halves."""
    kind = ir.VectorType(I32, count // 4)
    unknown, first = ir.Constant(kind, ir.Undefined), ir.Constant(I32, 0)
    every = [
        b.shuffle_vector(b.insert_element(unknown, quad, first), unknown, places([0] * kind.count)) for quad in quads
    ]
    if len(every) > 1:
        half = kind.count // 2
        every = [b.shuffle_vector(*every, places([*range(half), *range(kind.count + half, 2 * kind.count)]))]
    return b.bitcast(every[0], ir.VectorType(I8, count))


def _registers(b: Any, rows: Sequence[Any], at: int, count: int) -> list[Any]:
    """So many bytes of each of four rows, which lie at multiples of 16."""
    return [v.load(b, b.add(row, number(at)), ir.VectorType(I8, count), LANES) for row in rows]


def _side_by_side(b: Any, rows: Sequence[Any], others: Sequence[Any], at: int) -> list[Any]:
    """16 bytes of each of four rows, and beside them those of four others."""
    both = zip(_registers(b, rows, at, LANES), _registers(b, others, at, LANES), strict=True)
    return [b.shuffle_vector(*pair, places(range(_NARROW))) for pair in both]


def _by_columns(b: Any, totals: Sequence[Any]) -> list[Any]:
    """The sums of the first 16 columns of a narrow register and of the others, in the order of the columns."""
    joined = [b.shuffle_vector(*totals[i : i + 2], places(range(LANES))) for i in (0, 2)]
    return [
        b.shuffle_vector(*joined, places(8 * i + 4 * half + column for i in range(STEPS) for column in range(4)))
        for half in (0, 1)
    ]


def _full_sums(b: Any, inputs: Any, weights: Any, quads: Any) -> list[Any]:
    """The sums of a full tile, in the order that interleaving leaves."""
    count, none = INT8_COLUMNS // _WIDEST, ir.Constant(ir.VectorType(I32, _WIDEST // 4), [0] * (_WIDEST // 4))

    def one_quad(i: Any, totals: Sequence[Any]) -> list[Any]:
        at = b.add(weights, b.mul(i, number(QUAD_BYTES)))
        rows = rows_of_quad(b, inputs, at, INT8_COLUMNS)
        every, found = _weights(b, [v.load(b, b.add(at, number(QUAD_VALUES)), I32)], _WIDEST), list[Any]()
        for part in range(count):  # one by one, so that registers hold what is at hand
            of_part = _registers(b, rows, part * _WIDEST, _WIDEST)
            found += _add_quad(b, totals[STEPS * part : STEPS * (part + 1)], of_part, every)
        return found

    found = v.loop(b, quads, [none] * (STEPS * count), one_quad)
    if count == 1:
        return found
    return [b.shuffle_vector(found[i], found[STEPS + i], places(range(LANES))) for i in range(STEPS)]


def _narrow_sums(b: Any, inputs: Any, weights: Any, quads: Any, parts: int) -> list[Any]:
    """The sums of a tile of 16, 32 or 48 columns, in their order.

    Of 16 columns the halves of a register have different quads, whose sums are added up in the end.
    """
    none, wide, odd = ir.Constant(ir.VectorType(I32, _NARROW // 4), [0] * (_NARROW // 4)), parts >= 2, parts % 2 == 1

    def add(i: Any, totals: Sequence[Any], last: bool) -> list[Any]:
        """One quad, or two where 16 columns are left over; the last of an odd number has one of zeros beside it."""
        taken = [i] if last or not odd else [b.shl(i, number(1)), b.add(b.shl(i, number(1)), number(1))]
        places_ = [b.add(weights, b.mul(quad, number(QUAD_BYTES))) for quad in taken]
        rows = [rows_of_quad(b, inputs, at, parts * LANES) for at in places_]
        given = [v.load(b, b.add(at, number(QUAD_VALUES)), I32) for at in places_]
        found = list(totals)
        if wide:
            for of_quad, one in zip(rows, given, strict=True):
                registers = _registers(b, of_quad, 0, _NARROW)
                found[:STEPS] = _add_quad(b, found[:STEPS], registers, _weights(b, [one], _NARROW))
        if odd:
            both = [given[0], ir.Constant(I32, 0) if last else given[1]]
            registers = _side_by_side(b, rows[0], rows[-1], (parts - 1) * LANES)
            found[-STEPS:] = _add_quad(b, found[-STEPS:], registers, _weights(b, both, _NARROW))
        return found

    start, found = [none] * (STEPS * (wide + odd)), list[Any]()
    if odd:
        totals = v.loop(b, b.lshr(quads, number(1)), start, lambda i, totals: add(i, totals, False))
        left = b.and_(quads, number(1))
        totals = v.loop(b, left, totals, lambda i, totals: add(b.sub(quads, number(1)), totals, True))
    else:
        totals = v.loop(b, quads, start, lambda i, totals: add(i, totals, False))
    if wide:
        found += _by_columns(b, totals[:STEPS])
    if odd:
        found.append(b.add(*_by_columns(b, totals[-STEPS:])))
    return found


def sums_of_pairs(b: Any, inputs: Any, weights: Any, quads: Any, parts: int) -> list[Any]:
    """A row's sums for a tile of 16 columns times ``parts``: an int32 vector for each 16.

    Args:
        b: Where instructions are added.
        inputs: The address of the tile's bytes.
        weights: That of the row's first quad.
        quads: How many it has.
        parts: Sixteenths of columns, four for a full tile.
    """
    if parts * LANES == INT8_COLUMNS:
        return _full_sums(b, inputs, weights, quads)
    return _narrow_sums(b, inputs, weights, quads, parts)
