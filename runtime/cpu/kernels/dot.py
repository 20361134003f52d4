"""One or a few samples: dot products of 16 rows at a time with inputs that are looked up in registers.

Owns the inner loop over a dot panel (:mod:`srigl_fx.runtime.cpu.kernels.panel`): a phase's window of the sample is
loaded into vector registers, and each step looks 16 inputs up in them, one for each row of the group. AVX-512 alone
looks up in registers; AVX2 loads each input from the first-level cache, by indices of which one load brings four. Its
instruction that gathers takes twice as long for each.
"""

from collections.abc import Callable
from typing import Any, Final

from srigl_fx.runtime.cpu.kernels import vector as v
from srigl_fx.runtime.cpu.kernels.panel import SLOTS
from srigl_fx.runtime.cpu.kernels.plan import LANES, STEPS
from srigl_fx.runtime.cpu.kernels.values import vector_of
from srigl_fx.runtime.cpu.kernels.vector import VECTOR_BYTES, address, intrinsic, number, types
from srigl_fx.runtime.value_types import VALUE_TYPES

WIDE: Final = 0  # in place of a window: a wide one, whose inputs are loaded one by one
_LARGEST: Final = 128  # of the windows that are looked up
_AHEAD = 4096  # bytes: a phase that is read so much later is brought into the second-level cache


def dot_group(window: int, value_type: int) -> Callable[[int, int, int, int, int], None]:
    """An intrinsic ``(x, phase, start, phases, sums)``: 16 sums over ``phases`` phases of one group.

    ``x`` is the sample, ``phase`` the first phase of the panel, ``start`` its window's start (int32), ``sums`` 16
    floats; all are addresses but the count.

    Args:
        window: 64 or 128 inputs, looked up in registers (AVX-512); or WIDE (AVX2).
        value_type: How values are stored: a number of :mod:`srigl_fx.runtime.value_types`.
    """
    values_at = SLOTS * (2 if window == WIDE else 1)
    size, load_values = values_at + SLOTS * VALUE_TYPES[value_type].numpy.itemsize, vector_of(value_type)

    def dot(context: Any, x: Any, phase: Any, start: Any, phases: Any, sums: Any) -> Any:
        def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
            x, phase, start, phases, sums = args

            def one_phase(i: Any, totals: Any) -> Any:
                first = b.zext(v.load(b, b.add(start, b.shl(i, number(2))), v.I32), v.I64)
                inputs = b.add(x, b.shl(first, number(2)))
                at = b.add(phase, b.mul(i, number(size)))
                if window in (_LARGEST, WIDE):  # the panel may not be in a near cache
                    for line in range(0, size, VECTOR_BYTES):
                        v.prefetch(b, b.add(at, number(_AHEAD + line)))
                index = v.load(b, at, v.INTS, 64)
                table = [v.load(b, b.add(inputs, number(VECTOR_BYTES * i)), v.FLOATS) for i in range(window // LANES)]
                results = []
                for step in range(STEPS):
                    weights = load_values(b, b.add(at, number(values_at)), step, True)
                    if window == WIDE:
                        found = v.load_each(b, inputs, b.add(at, number(2 * LANES * step)))
                    else:
                        found = v.table_lookup(b, table, index, 8 * step)
                    results.append(v.multiply_add(b, found, weights, totals[step]))
                return results

            one, two, three, four = v.loop(b, phases, [v.ZERO] * STEPS, one_phase)
            v.store(b, b.fadd(b.fadd(one, two), b.fadd(three, four)), sums)
            return context.get_dummy_value()

        return types.void(*[address] * 5), generate

    return intrinsic(dot)  # type: ignore[no-any-return]
