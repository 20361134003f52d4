"""What the kernels ask of the machine beyond Numba's own functions: loads of several numbers at once, and shuffles.

Owns the instructions, as LLVM has them. :mod:`srigl_fx.runtime.cuda.kernels.simulated` has the same functions for the
simulator. An index counts elements. A load of several is one instruction, its index a multiple of their number.
Weights are read past the L1 cache's coherence ("nc"): nothing may write to them while a kernel runs.
"""

from collections.abc import Callable
from math import erf as erf
from math import exp as exp
from math import tanh as tanh
from typing import Any, Final

from llvmlite import ir
from numba.cuda import types as _types
from numba.cuda.extending import intrinsic

from srigl_fx.runtime.cuda.kernels.compiler import cuda, device

types: Any = _types
FLOAT: Final = types.float32
_FLOAT, _SHORT, _HALF, _INT = ir.FloatType(), ir.IntType(16), ir.HalfType(), ir.IntType(32)
_GLOBAL, _SHARED = 1, 3  # LLVM's numbers of the address spaces
_WARP: Final = 0xFFFFFFFF  # all lanes

Widen = Callable[[Any, Any], Any]  # a loaded number as the one that is computed with


def _as_loaded(builder: Any, number: Any) -> Any:
    return number


def _from_short(builder: Any, number: Any) -> Any:
    return builder.zext(number, _INT)


def _from_bfloat16(builder: Any, number: Any) -> Any:
    return builder.bitcast(builder.shl(builder.zext(number, _INT), _INT(16)), _FLOAT)


def _from_half(builder: Any, number: Any) -> Any:
    return builder.fpext(number, _FLOAT)


def _parts(builder: Any, vector: Any, count: int, widen: Widen) -> list[Any]:
    if count == 1:
        return [widen(builder, vector)]
    return [widen(builder, builder.extract_element(vector, _INT(i))) for i in range(count)]


def _load(builder: Any, pointer: Any, index: Any, space: int, kind: Any, count: int) -> Any:
    place = builder.gep(
        builder.addrspacecast(builder.bitcast(pointer, kind.as_pointer()), kind.as_pointer(space)), [index]
    )
    if count > 1:
        place = builder.bitcast(place, ir.VectorType(kind, count).as_pointer(space))
    loaded = builder.load(place, align=count * {_FLOAT: 4, _SHORT: 2, _HALF: 2}[kind])
    if space == _GLOBAL:
        loaded.set_metadata("invariant.load", builder.module.add_metadata([]))
    return loaded


def _global_load(kind: Any, count: int, result: Any, widen: Widen) -> Any:
    """A load of ``count`` numbers of global memory that nothing writes to, from a pointer."""

    @intrinsic
    def load(context: Any, pointer: Any, index: Any) -> Any:
        returned = result if count == 1 else types.UniTuple(result, count)

        def code(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            vector = _load(builder, arguments[0], arguments[1], _GLOBAL, kind, count)
            parts = _parts(builder, vector, count, widen)
            return parts[0] if count == 1 else target.make_tuple(builder, returned, parts)

        return returned(pointer, types.int64), code

    return load


def _shared_load(count: int) -> Any:
    """A load of ``count`` floats of shared memory, from an array."""

    @intrinsic
    def load(context: Any, array: Any, index: Any) -> Any:
        returned = types.float32 if count == 1 else types.UniTuple(types.float32, count)

        def code(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            data = target.make_array(signature.args[0])(target, builder, arguments[0]).data
            parts = _parts(builder, _load(builder, data, arguments[1], _SHARED, _FLOAT, count), count, _as_loaded)
            return parts[0] if count == 1 else target.make_tuple(builder, returned, parts)

        return returned(array, types.int32), code

    return load


def _shared_store(count: int) -> Any:
    """A store of ``count`` floats to shared memory: the array, the index, the floats."""

    def code(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, index, *numbers = arguments
        data = target.make_array(signature.args[0])(target, builder, array).data
        place = builder.gep(builder.addrspacecast(data, _FLOAT.as_pointer(_SHARED)), [index])
        if count == 1:
            builder.store(numbers[0], place, align=4)
        else:
            kind = ir.VectorType(_FLOAT, count)
            vector: Any = ir.Constant(kind, ir.Undefined)
            for i, number in enumerate(numbers):
                vector = builder.insert_element(vector, number, _INT(i))
            builder.store(vector, builder.bitcast(place, kind.as_pointer(_SHARED)), align=4 * count)
        return target.get_dummy_value()

    one = types.float32
    if count == 1:

        @intrinsic
        def store1(context: Any, array: Any, index: Any, a: Any) -> Any:
            return types.void(array, types.int32, one), code

        return store1
    if count == 2:

        @intrinsic
        def store2(context: Any, array: Any, index: Any, a: Any, b: Any) -> Any:
            return types.void(array, types.int32, one, one), code

        return store2

    @intrinsic
    def store4(context: Any, array: Any, index: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
        return types.void(array, types.int32, one, one, one, one), code

    return store4


load_offsets4 = _global_load(_SHORT, 4, types.int32, _from_short)
LOAD_VALUE: Final = {
    "float32": _global_load(_FLOAT, 1, types.float32, _as_loaded),
    "bfloat16": _global_load(_SHORT, 1, types.float32, _from_bfloat16),
    "float16": _global_load(_HALF, 1, types.float32, _from_half),
}
LOAD_VALUES4: Final = {
    "float32": _global_load(_FLOAT, 4, types.float32, _as_loaded),
    "bfloat16": _global_load(_SHORT, 4, types.float32, _from_bfloat16),
    "float16": _global_load(_HALF, 4, types.float32, _from_half),
}
shared_load1, shared_load2, shared_load4 = _shared_load(1), _shared_load(2), _shared_load(4)
shared_store1, shared_store2, shared_store4 = _shared_store(1), _shared_store(2), _shared_store(4)


@device
def shuffle_xor(number: float, distance: int) -> float:
    """The number of the lane whose place differs in this bit; all lanes of the warp must ask."""
    return cuda.shfl_xor_sync(_WARP, number, distance)  # type: ignore[no-any-return]
