"""How stored values become float32: one at a time, and 16 at a time in a vector register.

Owns, for each dtype of :mod:`srigl_fx.runtime.value_types`, one function of each kind, named as the dtype is. It must
not know in what order values are stored.
"""

from collections.abc import Callable
from typing import Any, Final

import numba as typed_numba
import numpy as np
from llvmlite import ir

from srigl_fx.runtime.cpu.kernels import vector as v
from srigl_fx.runtime.cpu.kernels.plan import LANES
from srigl_fx.runtime.cpu.kernels.vector import VECTOR_BYTES, as_float, floats, number, shorts, signed_bytes
from srigl_fx.runtime.value_types import VALUE_TYPES

numba: Any = typed_numba  # half of its functions are annotated
Scalar = Callable[[int, int], float]  # (the values' address, a position) -> float32
Vector = Callable[[Any, Any, int, bool], Any]  # (builder, address, which vector, whether float16 is native) -> vector


def _float32(values: int, position: int) -> float:
    return floats(values)[position]  # type: ignore[no-any-return]


def _bfloat16(values: int, position: int) -> float:
    return as_float(int(shorts(values)[position]) << 16)


def _float16(values: int, position: int) -> float:
    bits = int(shorts(values)[position])
    sign, exponent, fraction = bits & 0x8000, bits >> 10 & 0x1F, bits & 0x3FF
    if exponent == 0:  # a denormal: the fraction in units of 2**-24
        return as_float(sign << 16 | 0x33800000) * fraction
    if exponent == 0x1F:  # infinity or NaN
        return as_float(sign << 16 | 0x7F800000 | fraction << 13)
    return as_float(sign << 16 | (exponent + 112) << 23 | fraction << 13)


def _int8(values: int, position: int) -> float:
    return np.float32(signed_bytes(values)[position])  # type: ignore[return-value]


def _float32_vector(b: Any, at: Any, which: int, native: bool) -> Any:
    return v.load(b, b.add(at, number(VECTOR_BYTES * which)), v.FLOATS, 64)


def _bfloat16_vector(b: Any, at: Any, which: int, native: bool) -> Any:
    wide = b.zext(v.load(b, b.add(at, number(VECTOR_BYTES // 2 * which)), v.SHORTS, 32), v.INTS)
    return b.bitcast(b.shl(wide, v.lanes(16)), v.FLOATS)


def _float16_vector(b: Any, at: Any, which: int, native: bool) -> Any:
    half = b.add(at, number(VECTOR_BYTES // 2 * which))
    if native:
        return b.fpext(v.load(b, half, ir.VectorType(ir.HalfType(), LANES), 32), v.FLOATS)
    bits = b.zext(v.load(b, half, v.SHORTS, 32), v.INTS)
    size = b.and_(bits, v.lanes(0x7FFF))
    # The bits of a float16, moved to where float32 has them, are 2**-112 times its value; but infinity and NaN.
    scaled = b.bitcast(b.shl(size, v.lanes(13)), v.FLOATS)
    finite = b.bitcast(b.fmul(scaled, ir.Constant(v.FLOATS, [2.0**112] * LANES)), v.INTS)
    special = b.or_(b.shl(size, v.lanes(13)), v.lanes(0x7F800000))
    number_ = b.select(b.icmp_unsigned(">=", size, v.lanes(0x7C00)), special, finite)
    sign = b.shl(b.and_(bits, v.lanes(0x8000)), v.lanes(16))
    return b.bitcast(b.or_(number_, sign), v.FLOATS)


_SCALARS: Final[dict[str, Scalar]] = {"float32": _float32, "bfloat16": _bfloat16, "float16": _float16, "int8": _int8}
_VECTORS: Final[dict[str, Vector]] = {
    "float32": _float32_vector,
    "bfloat16": _bfloat16_vector,
    "float16": _float16_vector,
}


def vector_of(value_type: int) -> Vector:
    """What writes the instructions that load 16 values of a dtype, given by its number."""
    return _VECTORS[VALUE_TYPES[value_type].name]


def _compiled(function: Callable[..., Any]) -> Any:
    return numba.njit(error_model="numpy")(function)


def _value_case(number: int, one: Any, otherwise: Any) -> Any:
    return _compiled(lambda values, found, i: one(values, i) if found == number else otherwise(values, found, i))


def _bytes_case(number: int, size: int, otherwise: Any) -> Any:
    return _compiled(lambda found: size if found == number else otherwise(found))


def _chains() -> tuple[Any, Any]:
    """``value_at(values, value_type, position)`` and ``value_bytes(value_type)``.

    Both ask for one dtype after the other: code that is compiled ahead of time cannot index a tuple without Python.
    They ask in the table's order: in another one, loops over bfloat16 values took 1.7 times as long.
    """
    last = _compiled(_SCALARS[VALUE_TYPES[-1].name])
    size = VALUE_TYPES[-1].numpy.itemsize
    value_at, value_bytes = _compiled(lambda values, found, i: last(values, i)), _compiled(lambda found: size)
    for place, row in reversed(list(enumerate(VALUE_TYPES[:-1]))):
        value_at = _value_case(place, _compiled(_SCALARS[row.name]), value_at)
        value_bytes = _bytes_case(place, row.numpy.itemsize, value_bytes)
    return value_at, value_bytes


value_at, value_bytes = _chains()
