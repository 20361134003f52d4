"""Batches: the multiply-adds of a tile of samples, or of positions of a convolution.

Owns the inner loop over a tile panel (:mod:`srigl_fx.runtime.kernels.panel`). A tile holds its inputs feature-major,
16 or 32 columns wide, so that every kept weight is a broadcast multiply-add over contiguous, aligned columns.
Several rows of a group are in flight at once, to hide the latency of their sums.
"""

from collections.abc import Callable
from typing import Any

from srigl_fx.runtime.kernels import vector as v
from srigl_fx.runtime.kernels.panel import LANES, STEPS, TILE_BYTES, TILE_VALUES
from srigl_fx.runtime.kernels.vector import VECTOR_BYTES, address, intrinsic, number, types


def rows_in_flight(width: int, registers: int) -> int:
    """How many rows of a tile ``width`` vectors wide sum up at once in ``registers`` vectors of 16 floats."""
    return max(1, registers // width)


def prefetched_lines(width: int, registers: int) -> int:
    """How many cache lines of a phase each of the calls for its rows prefetches."""
    calls = LANES // rows_in_flight(width, registers)
    return -(-TILE_BYTES // VECTOR_BYTES // calls)


def add_rows(width: int, registers: int) -> Callable[[int, int, int, int, int, int, int], None]:
    """An intrinsic ``(inputs, phase, values, phases, outputs, out, ahead)``: a few rows of a group, over some phases.

    ``inputs`` is the tile; ``phase`` and ``values`` are the first phase's indices and values, from the first of the
    rows on; ``outputs`` are the int32 output rows of :func:`rows_in_flight` lanes, all valid, and ``out`` the tile that
    they are added to. From ``ahead`` on, these rows' share of as many phases is brought into the cache meanwhile.
    """
    rows = rows_in_flight(width, registers)
    row_bytes = VECTOR_BYTES * width
    lines = prefetched_lines(width, registers)

    def add(context: Any, inputs: Any, phase: Any, values: Any, phases: Any, outputs: Any, out: Any, ahead: Any) -> Any:
        def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
            inputs, phase, values, phases, outputs, out, ahead = args
            places = []
            for row in range(rows):
                output = b.zext(v.load(b, b.add(outputs, number(4 * row)), v.I32), v.I64)
                places.append(b.add(out, b.mul(output, number(row_bytes))))

            def columns(at: Any) -> list[Any]:
                return [v.load(b, b.add(at, number(VECTOR_BYTES * i)), v.FLOATS, 64) for i in range(width)]

            def one_phase(i: Any, totals: Any) -> Any:
                at = b.mul(i, number(TILE_BYTES))
                indices, weights = b.add(phase, at), b.add(values, at)
                for line in range(lines):
                    v.prefetch(b, b.add(b.add(ahead, at), number(VECTOR_BYTES * line)))
                packed = [v.load(b, b.add(indices, number(2 * STEPS * row)), v.I64, 8) for row in range(rows)]
                totals = list(totals)
                for step in range(STEPS):
                    for row in range(rows):
                        index = b.lshr(packed[row], number(16 * step)) if step else packed[row]
                        index = b.and_(index, number(0xFFFF)) if step < STEPS - 1 else index
                        source = b.add(inputs, b.mul(index, number(row_bytes)))
                        weight = v.load(b, b.add(weights, number(VECTOR_BYTES * step + 4 * row)), v.F32)
                        weight = v.broadcast(b, weight)
                        for i, column in enumerate(columns(source)):
                            total = row * width + i
                            totals[total] = v.multiply_add(b, weight, column, totals[total])
                return totals

            before = [column for place in places for column in columns(place)]
            after = v.loop(b, phases, before, one_phase)
            for row in range(rows):
                for i in range(width):
                    v.store(b, after[row * width + i], b.add(places[row], number(VECTOR_BYTES * i)), 64)
            return context.get_dummy_value()

        return types.void(*[address] * 7), generate

    return intrinsic(add)  # type: ignore[no-any-return]


def phase_of(panel: int, phase: int, lane: int) -> int:
    """Where the indices of a lane are in a phase."""
    return panel + phase * TILE_BYTES + lane * 2 * STEPS


def values_of(panel: int, phase: int, lane: int) -> int:
    """Where the first value of a lane is in a phase."""
    return panel + phase * TILE_BYTES + TILE_VALUES + lane * 4


assert LANES % rows_in_flight(1, 8) == 0
