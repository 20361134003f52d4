"""Batches: the multiply-adds of a tile of samples, or of positions of a convolution.

Owns the inner loop over a tile panel (:mod:`srigl_fx.runtime.cpu.kernels.panel`). A tile holds its inputs
feature-major, 16 or 32 columns wide, so that every kept weight is a broadcast multiply-add over contiguous, aligned
columns. Several rows of a group are in flight at once, to hide the latency of their sums.
"""

from collections.abc import Callable
from typing import Any

from srigl_fx.runtime.cpu.kernels import vector as v
from srigl_fx.runtime.cpu.kernels.panel import (
    FOURS,
    SHARED_BYTES,
    SHARED_VALUES,
    SHARING,
    TILE_BYTES,
    TILE_VALUES,
)
from srigl_fx.runtime.cpu.kernels.plan import LANES, STEPS
from srigl_fx.runtime.cpu.kernels.vector import VECTOR_BYTES, address, intrinsic, number, types

_Read = Callable[[Any], list[Any]]  # the columns of the input whose index is at an address


def rows_in_flight(width: int, registers: int) -> int:
    """How many rows of a tile ``width`` vectors wide sum up at once in ``registers`` vectors of 16 floats."""
    return max(1, registers // width)


def columns_in_flight(width: int, registers: int) -> int:
    """How many columns of such a tile rows sum up at once that share their inputs."""
    return min(LANES * width, LANES * registers // SHARING)


def prefetched_lines(width: int, registers: int) -> int:
    """How many cache lines of a phase each of the calls for its rows prefetches."""
    calls = LANES // rows_in_flight(width, registers)
    return -(-TILE_BYTES // VECTOR_BYTES // calls)


def prefetched_shared_lines(width: int, registers: int) -> int:
    """The same of a shared group's phase."""
    calls = FOURS * LANES * width // columns_in_flight(width, registers)
    return -(-SHARED_BYTES // VECTOR_BYTES // calls)


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

    tile = _Tile(width, unit, LANES * width)

    def add_step(b: Any, read: _Read, indices: Any, weights: Any, step: int, totals: list[Any]) -> None:
        for row in range(rows):
            found = read(b.add(indices, number(2 * (STEPS * row + step))))
            weight = tile.value(b, b.add(weights, number(4 * (STEPS * row + step))))
            for i, column in enumerate(found):
                total = row * width + i
                totals[total] = v.multiply_add(b, weight, column, totals[total])

    return _adder(tile, rows, add_step, TILE_BYTES, prefetched_lines(width, registers))


def add_four(width: int, registers: int, unit: int) -> Callable[..., None]:
    """An intrinsic that adds four rows which share their inputs, in :func:`columns_in_flight` columns.

    Its arguments are those of :func:`add_rows`, but that ``inputs``, ``out``, ``to`` and ``residual`` start with the
    first of these columns. Each column of an input is loaded once for all four rows.
    """
    tile = _Tile(width, unit, columns_in_flight(width, registers))

    def add_step(b: Any, read: _Read, indices: Any, weights: Any, step: int, totals: list[Any]) -> None:
        found = read(b.add(indices, number(2 * step)))
        for row in range(SHARING):
            weight = tile.value(b, b.add(weights, number(4 * (SHARING * step + row))))
            for i, column in enumerate(found):
                total = row * len(found) + i
                totals[total] = v.multiply_add(b, weight, column, totals[total])

    return _adder(tile, SHARING, add_step, SHARED_BYTES, prefetched_shared_lines(width, registers))


class _Tile:
    """A tile ``width`` vectors wide whose rows a panel counts in ``unit``; ``columns`` of it are computed at once."""

    def __init__(self, width: int, unit: int, columns: int) -> None:
        self.row_bytes, self.unit = VECTOR_BYTES * width, unit
        self.lanes = min(columns, LANES)
        self.vectors = columns // self.lanes
        self.kind = v.floats_of(self.lanes)

    def load(self, b: Any, at: Any, align: int) -> list[Any]:
        """The columns at an address."""
        return [v.load(b, b.add(at, number(4 * self.lanes * i)), self.kind, align) for i in range(self.vectors)]

    def columns_of(self, b: Any, inputs: Any, index: Any) -> list[Any]:
        """The columns of the input whose index is at an address."""
        row = b.zext(v.load(b, index, v.I16, 2), v.I64)
        return self.load(b, b.add(inputs, b.mul(row, number(self.row_bytes // self.unit))), 4 * self.lanes)

    def value(self, b: Any, at: Any) -> Any:
        """The value at an address, in every column."""
        return v.broadcast(b, v.load(b, at, v.F32), self.lanes)


def _adder(
    tile: _Tile,
    rows: int,
    add_step: Callable[[Any, "_Read", Any, Any, int, list[Any]], None],
    phase_bytes: int,
    lines: int,
) -> Callable[..., None]:
    """The intrinsic of :func:`add_rows`; ``add_step`` adds one of a phase's steps to the sums of all rows."""

    def either(b: Any, condition: Any, then: Callable[[], list[Any]], otherwise: Callable[[], list[Any]]) -> list[Any]:
        found = []
        with b.if_else(condition) as branches:
            for branch, compute in zip(branches, (then, otherwise), strict=True):
                with branch:
                    found.append((compute(), b.block))
        phis = [b.phi(tile.kind) for _ in range(rows * tile.vectors)]
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
                single = [tile.value(b, b.add(bias, b.shl(output, number(2)))) for output in which]
                return [total for one in single for total in [one] * tile.vectors]

            def from_tile() -> list[Any]:
                places = [b.add(out, b.mul(output, number(tile.row_bytes))) for output in which]
                return [total for place in places for total in tile.load(b, place, 4 * tile.lanes)]

            def one_phase(i: Any, totals: Any) -> Any:
                at = b.mul(i, number(phase_bytes))
                indices, weights = b.add(phase, at), b.add(values, at)
                for line in range(lines):
                    v.prefetch(b, b.add(b.add(ahead, at), number(VECTOR_BYTES * line)))
                totals = list(totals)
                for step in range(STEPS):
                    add_step(b, lambda index: tile.columns_of(b, inputs, index), indices, weights, step, totals)
                return totals

            before = either(b, b.icmp_signed("!=", bias, number(0)), from_bias, from_tile)
            after = v.loop(b, phases, before, one_phase)
            offsets = [b.mul(output, to_row) for output in which]

            def with_residual() -> list[Any]:
                added = [column for offset in offsets for column in tile.load(b, b.add(residual, offset), 4)]
                return [b.fadd(total, other) for total, other in zip(after, added, strict=True)]

            after = either(b, b.icmp_signed("!=", residual, number(0)), with_residual, lambda: after)
            lowest, highest = (v.broadcast(b, limit, tile.lanes) for limit in (low, high))
            for i, total in enumerate(after):
                column = number(4 * tile.lanes * (i % tile.vectors))
                place = b.add(b.add(to, offsets[i // tile.vectors]), column)
                total = b.select(b.fcmp_ordered("<", total, lowest), lowest, total)
                v.store(b, b.select(b.fcmp_ordered(">", total, highest), highest, total), place)
                v.prefetch(b, b.add(place, v.AHEAD), write=True)
            return context.get_dummy_value()

        return types.void(*[address] * 10, types.float32, types.float32, address), generate

    return intrinsic(add)  # type: ignore[no-any-return]


def indices_of(phase: int, lane: int) -> int:
    """Where the indices of a lane are in a phase."""
    return phase + lane * 2 * STEPS


def values_of(phase: int, lane: int) -> int:
    """Where the first value of a lane is in a phase."""
    return phase + TILE_VALUES + lane * 4 * STEPS


def shared_values_of(phase: int, four: int) -> int:
    """Where the first value of four rows is in a phase of a shared group; their indices are those of a lane."""
    return phase + SHARED_VALUES + four * 4 * STEPS * SHARING


assert LANES % rows_in_flight(1, 8) == 0
