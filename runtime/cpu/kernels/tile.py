"""Batches: the multiply-adds of a tile of samples, or of positions of a convolution.

Owns the inner loop over a tile panel (:mod:`srigl_fx.runtime.cpu.kernels.panel`). A tile holds its inputs
feature-major, 16 or 32 columns wide, so that every kept weight is a broadcast multiply-add over contiguous, aligned
columns. Several rows of a group are in flight at once, to hide the latency of their sums.
"""

from collections.abc import Callable
from typing import Any

from srigl_fx.runtime.cpu.kernels import vector as v
from srigl_fx.runtime.cpu.kernels.panel import STEPS, TILE_BYTES, TILE_VALUES
from srigl_fx.runtime.cpu.kernels.plan import LANES
from srigl_fx.runtime.cpu.kernels.vector import VECTOR_BYTES, address, intrinsic, number, types


def rows_in_flight(width: int, registers: int) -> int:
    """How many rows of a tile ``width`` vectors wide sum up at once in ``registers`` vectors of 16 floats."""
    return max(1, registers // width)


def prefetched_lines(width: int, registers: int) -> int:
    """How many cache lines of a phase each of the calls for its rows prefetches."""
    calls = LANES // rows_in_flight(width, registers)
    return -(-TILE_BYTES // VECTOR_BYTES // calls)


def add_rows(width: int, registers: int, unit: int) -> Callable[..., None]:
    """An intrinsic that adds a few rows of a group, over some phases.

    Its arguments are ``(inputs, phase, values, phases, outputs, bias, out, to, to_row, residual, low, high, ahead)``.
    ``inputs`` is the tile, whose rows the panel counts in ``unit``; ``phase`` and ``values`` are the first phase's
    indices and values, from the first of the rows on; ``outputs`` are the int32 output rows of :func:`rows_in_flight`
    lanes. Sums start from ``bias``, or if that is 0, from the rows of the tile ``out``. The rows of
    ``residual`` are added to them (``to_row`` bytes apart; 0 for none), the sums are limited to ``low <= sum <= high``,
    and they are stored from ``to`` on, in rows ``to_row`` bytes apart. Meanwhile these rows' share of as many phases is
    brought into the cache from ``ahead`` on.
    """
    rows = rows_in_flight(width, registers)
    row_bytes = VECTOR_BYTES * width
    lines = prefetched_lines(width, registers)

    def columns(b: Any, at: Any, align: int) -> list[Any]:
        return [v.load(b, b.add(at, number(VECTOR_BYTES * i)), v.FLOATS, align) for i in range(width)]

    def either(b: Any, condition: Any, then: Callable[[], list[Any]], otherwise: Callable[[], list[Any]]) -> list[Any]:
        found = []
        with b.if_else(condition) as branches:
            for branch, compute in zip(branches, (then, otherwise), strict=True):
                with branch:
                    found.append((compute(), b.block))
        phis = [b.phi(v.FLOATS) for _ in range(rows * width)]
        for values, block in found:
            for phi, value in zip(phis, values, strict=True):
                phi.add_incoming(value, block)
        return phis

    def add(
        context: Any,
        inputs: Any,
        phase: Any,
        values: Any,
        phases: Any,
        outputs: Any,
        bias: Any,
        out: Any,
        to: Any,
        to_row: Any,
        residual: Any,
        low: Any,
        high: Any,
        ahead: Any,
    ) -> Any:
        def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
            inputs, phase, values, phases, outputs, bias, out, to, to_row, residual, low, high, ahead = args
            which = [b.zext(v.load(b, b.add(outputs, number(4 * row)), v.I32), v.I64) for row in range(rows)]

            def from_bias() -> list[Any]:
                single = [v.load(b, b.add(bias, b.shl(output, number(2))), v.F32) for output in which]
                return [total for one in single for total in [v.broadcast(b, one)] * width]

            def from_tile() -> list[Any]:
                places = [b.add(out, b.mul(output, number(row_bytes))) for output in which]
                return [total for place in places for total in columns(b, place, 64)]

            def one_phase(i: Any, totals: Any) -> Any:
                at = b.mul(i, number(TILE_BYTES))
                indices, weights = b.add(phase, at), b.add(values, at)
                for line in range(lines):
                    v.prefetch(b, b.add(b.add(ahead, at), number(VECTOR_BYTES * line)))
                totals = list(totals)
                for step in range(STEPS):
                    for row in range(rows):
                        index = b.zext(v.load(b, b.add(indices, number(2 * (STEPS * row + step))), v.I16, 2), v.I64)
                        source = b.add(inputs, b.mul(index, number(row_bytes // unit)))
                        weight = v.load(b, b.add(weights, number(4 * (STEPS * row + step))), v.F32)
                        weight = v.broadcast(b, weight)
                        for i, column in enumerate(columns(b, source, 64)):
                            total = row * width + i
                            totals[total] = v.multiply_add(b, weight, column, totals[total])
                return totals

            before = either(b, b.icmp_signed("!=", bias, number(0)), from_bias, from_tile)
            after = v.loop(b, phases, before, one_phase)
            offsets = [b.mul(output, to_row) for output in which]

            def with_residual() -> list[Any]:
                added = [column for offset in offsets for column in columns(b, b.add(residual, offset), 4)]
                return [b.fadd(total, other) for total, other in zip(after, added, strict=True)]

            after = either(b, b.icmp_signed("!=", residual, number(0)), with_residual, lambda: after)
            lowest, highest = v.broadcast(b, low), v.broadcast(b, high)
            for i, total in enumerate(after):
                place = b.add(b.add(to, offsets[i // width]), number(VECTOR_BYTES * (i % width)))
                total = b.select(b.fcmp_ordered("<", total, lowest), lowest, total)
                v.store(b, b.select(b.fcmp_ordered(">", total, highest), highest, total), place)
                v.prefetch(b, b.add(place, v.AHEAD), write=True)
            return context.get_dummy_value()

        return types.void(*[address] * 10, types.float32, types.float32, address), generate

    return intrinsic(add)  # type: ignore[no-any-return]


def phase_of(panel: int, phase: int, lane: int) -> int:
    """Where the indices of a lane are in a phase."""
    return panel + phase * TILE_BYTES + lane * 2 * STEPS


def values_of(panel: int, phase: int, lane: int) -> int:
    """Where the first value of a lane is in a phase."""
    return panel + phase * TILE_BYTES + TILE_VALUES + lane * 4 * STEPS


assert LANES % rows_in_flight(1, 8) == 0
