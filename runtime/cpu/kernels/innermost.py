"""Convolutions and pooling with samples innermost: what is done at a few neighbouring output positions.

Owns the inner loop over a sample panel (:mod:`srigl_fx.runtime.cpu.kernels.innermost_panel`), and that over a window
which is pooled. The samples of a block, 8 or with AVX-512 16, are neighbours in memory, and the channels of a position
too: (H, W, C, samples). So each kept weight is one broadcast multiply-add for each of the positions, whose inputs are
read where they lie, whatever strides and dilations are; nothing is laid out before.
"""

from collections.abc import Callable
from typing import Any, Final

from llvmlite import ir

from srigl_fx.runtime.cpu.kernels import vector as v
from srigl_fx.runtime.cpu.kernels.compiled import SAMPLE_BYTES, SAMPLES
from srigl_fx.runtime.cpu.kernels.vector import address, intrinsic, number, types

START_BYTES: Final = 8  # of what a row of a part starts with
SHARING: Final = 4  # rows that share their inputs and are computed together
_FLOATS: Final = v.floats_of(SAMPLES)


def entry_bytes(rows: int) -> int:
    """The bytes of a kept weight of each of ``rows`` rows that share its input."""
    return 4 + 4 * rows


def prefetch_positions(count: int) -> Callable[[int, int], None]:
    """An intrinsic of an address and a step that asks for ``count`` cache lines, so far apart."""

    def prefetch(context: Any, where: Any, step: Any) -> Any:
        def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
            where, step = args
            for i in range(count):
                v.prefetch(b, b.add(where, b.mul(step, number(i))))
            return context.get_dummy_value()

        return types.void(address, address), generate

    return intrinsic(prefetch)  # type: ignore[no-any-return]


def add_positions(count: int, rows: int = 1) -> Callable[..., None]:
    """An intrinsic that adds some kept weights of a row, for a block of samples at ``count`` output positions.

    Its arguments are ``(inputs, step, entries, weights, bias, y, y_step, residual, low, high)``. ``inputs`` is what the
    first position reads, ``step`` are the bytes from there to the next one's; each of the ``weights`` entries is how
    far from there its inputs are, as int32, and its value. Sums start from the float at ``bias``, or if that is 0, from
    ``y``, which has a vector for each position, ``y_step`` bytes apart. Those of ``residual`` (0 for none) are added to
    them, the sums are limited to ``low <= sum <= high``, and they are stored in ``y``. Meanwhile the vectors behind
    those of ``y`` and ``residual``, which are wanted next, are brought into the cache.

    Of several ``rows`` that share their inputs, an entry has as many values, and an input is loaded once for all. Their
    outputs, biases and residuals are neighbours.
    """
    each = range(count * rows)  # sums: those of a row's positions, then the next row's

    def either(b: Any, condition: Any, then: Callable[[], list[Any]], otherwise: Callable[[], list[Any]]) -> list[Any]:
        found = []
        with b.if_else(condition) as branches:
            for branch, compute in zip(branches, (then, otherwise), strict=True):
                with branch:
                    found.append((compute(), b.block))
        phis = [b.phi(_FLOATS) for _ in each]
        for values, block in found:
            for phi, value in zip(phis, values, strict=True):
                phi.add_incoming(value, block)
        return phis

    def add(
        context: Any,
        inputs: Any,
        step: Any,
        entries: Any,
        weights: Any,
        bias: Any,
        y: Any,
        y_step: Any,
        residual: Any,
        low: Any,
        high: Any,
    ) -> Any:
        def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
            inputs, step, entries, weights, bias, y, y_step, residual, low, high = args
            steps = [b.mul(step, number(i)) for i in range(count)]
            y_steps = [b.add(b.mul(y_step, number(i % count)), number(i // count * SAMPLE_BYTES)) for i in each]
            behind = b.mul(y_step, number(count))
            places = [b.add(y, one) for one in y_steps]

            def from_bias() -> list[Any]:
                found = [v.broadcast(b, v.load(b, b.add(bias, number(4 * row)), v.F32), SAMPLES) for row in range(rows)]
                return [found[i // count] for i in each]

            def one_weight(i: Any, totals: Any) -> Any:
                entry = b.add(entries, b.mul(i, number(entry_bytes(rows))))
                at = b.add(inputs, b.sext(v.load(b, entry, v.I32), v.I64))
                values = [v.load(b, b.add(entry, number(4 + 4 * row)), v.F32) for row in range(rows)]
                weight = [v.broadcast(b, value, SAMPLES) for value in values]
                found = [v.load(b, b.add(at, one), _FLOATS) for one in steps]
                return [v.multiply_add(b, weight[i // count], found[i % count], totals[i]) for i in each]

            before = either(
                b, b.icmp_signed("!=", bias, number(0)), from_bias, lambda: [v.load(b, at, _FLOATS) for at in places]
            )
            after = v.loop(b, weights, before, one_weight)

            def with_residual() -> list[Any]:
                added = [b.add(residual, one) for one in y_steps]
                for at in added:
                    v.prefetch(b, b.add(at, behind))
                return [b.fadd(total, v.load(b, at, _FLOATS)) for total, at in zip(after, added, strict=True)]

            after = either(b, b.icmp_signed("!=", residual, number(0)), with_residual, lambda: after)
            lowest, highest = v.broadcast(b, low, SAMPLES), v.broadcast(b, high, SAMPLES)
            for total, at in zip(after, places, strict=True):
                total = b.select(b.fcmp_ordered("<", total, lowest), lowest, total)
                v.store(b, b.select(b.fcmp_ordered(">", total, highest), highest, total), at)
                v.prefetch(b, b.add(at, behind), write=True)
            return context.get_dummy_value()

        return types.void(*[address] * 8, types.float32, types.float32), generate

    return intrinsic(add)  # type: ignore[no-any-return]


def _pool(mean: bool) -> Callable[..., None]:
    """An intrinsic that pools a window of a few vectors, of neighbouring channels at one position.

    Its arguments are ``(inputs, row_step, rows, step, columns, vectors, y, share)``: the first of the window's inputs,
    the bytes from one of its rows to the next and how many there are, the same of its columns, how many vectors lie
    side by side there and in ``y``, and what a sum is multiplied with. A NaN in a window is its largest number, as
    PyTorch has it.
    """

    def pool(
        context: Any, inputs: Any, row_step: Any, rows: Any, step: Any, columns: Any, vectors: Any, y: Any, share: Any
    ) -> Any:
        def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
            inputs, row_step, rows, step, columns, vectors, y, share = args
            first = 0.0 if mean else float("-inf")

            def one_vector(i: Any, _: Any) -> Any:
                beside = b.mul(i, number(SAMPLE_BYTES))

                def one_row(row: Any, totals: Any) -> Any:
                    start = b.add(b.add(inputs, beside), b.mul(row, row_step))

                    def one_column(column: Any, totals: Any) -> Any:
                        found = v.load(b, b.add(start, b.mul(column, step)), _FLOATS)
                        if mean:
                            return [b.fadd(totals[0], found)]
                        larger = b.or_(b.fcmp_ordered(">", found, totals[0]), b.fcmp_unordered("uno", found, found))
                        return [b.select(larger, found, totals[0])]

                    return v.loop(b, columns, totals, one_column)

                (total,) = v.loop(b, rows, [ir.Constant(_FLOATS, [first] * SAMPLES)], one_row)
                v.store(b, b.fmul(total, v.broadcast(b, share, SAMPLES)) if mean else total, b.add(y, beside))
                return []

            v.loop(b, vectors, [], one_vector)
            return context.get_dummy_value()

        return types.void(*[address] * 7, types.float32), generate

    return intrinsic(pool)  # type: ignore[no-any-return]


pool_largest, pool_mean = _pool(mean=False), _pool(mean=True)
