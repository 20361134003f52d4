"""The activation functions that kernels apply to what they computed, one float32 at a time.

Owns their arithmetic: a function for each row of :mod:`srigl_fx.runtime.activations`, made from the row where that has
limits, and by its name elsewhere. It must not know kernels. Branch-free and without calls, so that LLVM vectorises any
loop over them; NaN and infinity give what torch's functions give, those in float64 for gelu (in float32 it has a NaN at
infinity). Importing it imports Numba.

The three polynomials are weighted least-squares fits in float64 on 1600 or more points, the weights multiplied by the
error and the fit repeated until the greatest error no longer falls (Lawson's iteration), then rounded to float32.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba as typed_numba
import numpy as np
from llvmlite import ir
from numba.extending import intrinsic as typed_intrinsic

from srigl_fx.errors import SriglError
from srigl_fx.runtime.activations import ACTIVATIONS, Activation

Pointer = Any
Function = TypeVar("Function", bound=Callable[..., Any])
numba: Any = typed_numba  # half of its functions are annotated
intrinsic: Any = typed_intrinsic
types: Any = numba.types

_F32, _I32 = ir.FloatType(), ir.IntType(32)
# Adding it rounds a float to an integer, which then is in the low bits of the sum.
_ROUNDER, _ROUNDER_BITS = 1.5 * 2**23, 0x4B400000

# Numba would compute in float64 with Python's numbers.
_ZERO, _HALF, _ONE = (np.float32(number) for number in (0, 0.5, 1))
_SIXTH = np.float32(1 / 6)
_TWO = np.float32(2)
_LOWEST, _HIGHEST = np.float32(-127), np.float32(128)  # the exponents whose bits make zero and infinity
_LOG2_E = np.float32(np.log2(np.e))
_HALF_LOG2_E = np.float32(0.5 * np.log2(np.e))
# -2 sqrt(2 / pi) log2(e) (x + 0.044715 x^3): sigmoid(2 u) is (1 + tanh(u)) / 2.
_TANH_1 = np.float32(2 * np.sqrt(2 / np.pi) * np.log2(np.e))
_TANH_3 = np.float32(2 * np.sqrt(2 / np.pi) * np.log2(np.e) * 0.044715)
# 2^r = 1 + r (E1 + r (E2 + ...)) for abs(r) <= 1/2, within 2e-8 of its value.
_E1, _E2, _E3, _E4, _E5, _E6 = (
    np.float32(number)
    for number in (0.69314718246, 0.24022647738, 0.05550332367, 0.00961843692, 0.00133988750, 0.00015353362)
)
# tanh(x) = x + x^3 (H1 + x^2 (H2 + ...)) for abs(x) <= 0.625, within 5e-9 of its value.
_NEAR = np.float32(0.625)
_H1, _H2, _H3, _H4, _H5 = (
    np.float32(number) for number in (-0.33333280683, 0.13331441581, -0.05373970047, 0.02063904144, -0.00570493378)
)
# exp(x^2 / 2) P(X < -x) = t (Q1 + t (Q2 + ...)) with t = 1 / (1 + 0.3 x) for 0 <= x <= 13 and X standard normal, within
# 2e-7 of its value; the weights favour the absolute error of gelu, which is 3e-9.
_T = np.float32(0.3)
_Q1, _Q2, _Q3, _Q4, _Q5, _Q6, _Q7, _Q8 = (
    np.float32(number)
    for number in (
        0.11961761117,
        0.12094240636,
        0.09867539257,
        0.13285848498,
        -0.06220384315,
        0.21603164077,
        -0.16305387020,
        0.03713226691,
    )
)


def _compiled(function: Function) -> Function:
    """Compile for other compiled functions; the flags keep the meaning of NaN and infinity."""
    flags = {"reassoc", "contract", "nsz"}
    return cast(Function, numba.njit(fastmath=flags, error_model="numpy")(function))


@intrinsic  # type: ignore[untyped-decorator]
def _round_bits(context: Any, x: Any) -> Any:
    """The integer nearest to ``x``, for abs(x) < 2^22, without a call; as bits, since flags cancel float additions."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits = builder.bitcast(builder.fadd(args[0], ir.Constant(_F32, _ROUNDER)), _I32)
        return builder.sub(bits, ir.Constant(_I32, _ROUNDER_BITS))

    return types.int32(types.float32), generate


@intrinsic  # type: ignore[untyped-decorator]
def _power_of_two(context: Any, n: Any) -> Any:
    """2^n for ``n`` from -127 (taken for zero) to 128 (infinity), put together from its bits."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        exponent = builder.add(args[0], ir.Constant(_I32, 127))
        return builder.bitcast(builder.shl(exponent, ir.Constant(_I32, 23)), _F32)

    return types.float32(types.int32), generate


@_compiled
def exp2(x: np.float32) -> np.float32:
    """2^x; below 2^-126.5 zero, from 2^127.5 on infinity.

    Its relative error is below 2e-7.

    Example:
        >>> float(exp2(np.float32(-3))), float(exp2(np.float32(-np.inf)))
        (0.125, 0.0)
    """
    x = _LOWEST if x < _LOWEST else x
    x = _HIGHEST if x > _HIGHEST else x
    whole = _round_bits(x)
    r = x - np.float32(whole)
    power: np.float32 = _power_of_two(whole)
    return power * (_ONE + r * (_E1 + r * (_E2 + r * (_E3 + r * (_E4 + r * (_E5 + r * _E6))))))


@_compiled
def hardswish(x: np.float32) -> np.float32:
    """``x * relu6(x + 3) / 6``.

    Example:
        >>> round(float(hardswish(np.float32(1))), 4), float(hardswish(np.float32(4)))
        (0.6667, 4.0)
    """
    gate = x * _SIXTH + _HALF
    gate = _ZERO if gate < _ZERO else gate
    return x * (_ONE if gate > _ONE else gate)


@_compiled
def silu(x: np.float32) -> np.float32:
    """``x`` times its logistic function.

    Example:
        >>> round(float(silu(np.float32(1))), 4)
        0.7311
    """
    return x / (_ONE + exp2(-_LOG2_E * x))


@_compiled
def gelu_tanh(x: np.float32) -> np.float32:
    """GELU by its tanh formula (Hendrycks and Gimpel, 2016).

    Example:
        >>> round(float(gelu_tanh(np.float32(1))), 4)
        0.8412
    """
    return x / (_ONE + exp2(-x * (_TANH_1 + _TANH_3 * (x * x))))


@_compiled
def gelu(x: np.float32) -> np.float32:
    """``x`` times the probability that a standard normal variable is below ``x`` (Hendrycks and Gimpel, 2016).

    Example:
        >>> round(float(gelu(np.float32(1))), 4)
        0.8413
    """
    t = _ONE / (_ONE + _T * abs(x))
    fit = t * (_Q1 + t * (_Q2 + t * (_Q3 + t * (_Q4 + t * (_Q5 + t * (_Q6 + t * (_Q7 + t * _Q8)))))))
    tail = exp2(-_HALF_LOG2_E * (x * x)) * fit
    return x * (tail if x < _ZERO else _ONE - tail)


@_compiled
def tanh(x: np.float32) -> np.float32:
    """The hyperbolic tangent; by a polynomial near 0, where the formula with powers would lose all digits.

    Example:
        >>> round(float(tanh(np.float32(1))), 4), bool(tanh(np.float32(-1e-20)) == np.float32(-1e-20))
        (0.7616, True)
    """
    size = abs(x)
    z = x * x
    near = x + x * z * (_H1 + z * (_H2 + z * (_H3 + z * (_H4 + z * _H5))))
    far = _ONE - _TWO / (_ONE + exp2(_TWO * _LOG2_E * size))
    far = -far if x < _ZERO else far
    return near if size < _NEAR else far


@_compiled
def sigmoid(x: np.float32) -> np.float32:
    """The logistic function.

    Example:
        >>> round(float(sigmoid(np.float32(1))), 4), float(sigmoid(np.float32(-np.inf)))
        (0.7311, 0.0)
    """
    return _ONE / (_ONE + exp2(-_LOG2_E * x))


def _limiting(low: float, high: float) -> Any:
    """A function that limits a number; NaN stays, as it does in torch."""
    least, most = np.float32(low), np.float32(high)

    def limit(x: np.float32) -> np.float32:
        x = least if x < least else x
        return most if x > most else x

    return _compiled(limit)


def function_of(row: Activation) -> Any:
    """The compiled function of one float32 that a row stands for.

    Raises:
        SriglError: The row has no limits, and there is no function of its name here.

    Example:
        >>> float(function_of(ACTIVATIONS[2])(np.float32(7)))
        6.0
    """
    if row.limits is not None:
        return _limiting(*row.limits)
    if row.name not in globals():
        raise SriglError(
            f"the activation {row.name!r} has no limits, and {__name__} no function of that name: write it, or give "
            "the row its limits if it does nothing but limit its input"
        )
    return globals()[row.name]


def _case(number: int, function: Any, otherwise: Any) -> Any:
    """Apply ``function`` where the activation has this number; LLVM makes one function of the chain of cases."""

    def apply(y: Pointer, count: int, kind: int) -> None:
        if kind == number:
            for i in range(count):
                y[i] = function(y[i])
        else:
            otherwise(y, count, kind)

    return _compiled(apply)


@_compiled
def _leave(y: Pointer, count: int, kind: int) -> None:
    """No activation."""


_apply = _leave
for _number, _row in reversed(list(enumerate(ACTIVATIONS))[1:]):
    _apply = _case(_number, function_of(_row), _apply)


@_compiled
def activate_row(y: Pointer, count: int, kind: int) -> None:
    """Apply the activation of number ``kind`` to ``count`` floats, in place.

    Not callable from Python, as ``y`` is a pointer to float32.

    Args:
        y: What to change.
        count: How many floats.
        kind: A number of :mod:`srigl_fx.runtime.activations`; any other leaves ``y`` as it is.

    Example:
        >>> signature = types.void(types.CPointer(types.float32), types.int64, types.int64)
        >>> compiled = numba.cfunc(signature)(activate_row.py_func)
        >>> y, relu = np.array([-1, 2], np.float32), 1
        >>> compiled.ctypes(y.ctypes.data_as(compiled.ctypes.argtypes[0]), y.size, relu)
        >>> y.tolist()
        [0.0, 2.0]
    """
    _apply(y, count, kind)
