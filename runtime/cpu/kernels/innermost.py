"""Convolutions with 16 samples innermost: the multiply-adds of a few neighbouring output positions.

Owns the inner loop over a sample panel (:mod:`srigl_fx.runtime.cpu.kernels.innermost_panel`). Sixteen samples of a
channel at a position are neighbours in memory, and the channels of a position too: (H, W, C, 16). So each kept weight
is one broadcast multiply-add for each of the positions, whose inputs are read where they lie, whatever strides and
dilations are; nothing is laid out before.
"""

from collections.abc import Callable
from typing import Any

from srigl_fx.runtime.cpu.kernels import vector as v
from srigl_fx.runtime.cpu.kernels.vector import address, intrinsic, number, types

ENTRY_BYTES = 8  # of a kept weight, and of the start of a row


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


def add_positions(count: int) -> Callable[..., None]:
    """An intrinsic that adds some kept weights of a row, for 16 samples at ``count`` output positions.

    Its arguments are ``(inputs, step, entries, weights, bias, y, y_step, residual, low, high)``. ``inputs`` is what the
    first position reads, ``step`` are the bytes from there to the next one's; each of the ``weights`` entries is how
    far from there its inputs are, as int32, and its value. Sums start from the float at ``bias``, or if that is 0, from
    ``y``, which has a vector for each position, ``y_step`` bytes apart. Those of ``residual`` (0 for none) are added to
    them, the sums are limited to ``low <= sum <= high``, and they are stored in ``y``. Meanwhile the vectors behind
    those of ``y`` and ``residual``, which are wanted next, are brought into the cache.
    """

    def either(b: Any, condition: Any, then: Callable[[], list[Any]], otherwise: Callable[[], list[Any]]) -> list[Any]:
        found = []
        with b.if_else(condition) as branches:
            for branch, compute in zip(branches, (then, otherwise), strict=True):
                with branch:
                    found.append((compute(), b.block))
        phis = [b.phi(v.FLOATS) for _ in range(count)]
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
            steps, y_steps = ([b.mul(one, number(i)) for i in range(count)] for one in (step, y_step))
            behind = b.mul(y_step, number(count))
            places = [b.add(y, one) for one in y_steps]

            def from_bias() -> list[Any]:
                return [v.broadcast(b, v.load(b, bias, v.F32))] * count

            def one_weight(i: Any, totals: Any) -> Any:
                entry = b.add(entries, b.mul(i, number(ENTRY_BYTES)))
                at = b.add(inputs, b.sext(v.load(b, entry, v.I32), v.I64))
                weight = v.broadcast(b, v.load(b, b.add(entry, number(4)), v.F32))
                found = [v.load(b, b.add(at, one), v.FLOATS) for one in steps]
                return [v.multiply_add(b, weight, one, total) for one, total in zip(found, totals, strict=True)]

            before = either(
                b, b.icmp_signed("!=", bias, number(0)), from_bias, lambda: [v.load(b, at, v.FLOATS) for at in places]
            )
            after = v.loop(b, weights, before, one_weight)

            def with_residual() -> list[Any]:
                added = [b.add(residual, one) for one in y_steps]
                for at in added:
                    v.prefetch(b, b.add(at, behind))
                return [b.fadd(total, v.load(b, at, v.FLOATS)) for total, at in zip(after, added, strict=True)]

            after = either(b, b.icmp_signed("!=", residual, number(0)), with_residual, lambda: after)
            lowest, highest = v.broadcast(b, low), v.broadcast(b, high)
            for total, at in zip(after, places, strict=True):
                total = b.select(b.fcmp_ordered("<", total, lowest), lowest, total)
                v.store(b, b.select(b.fcmp_ordered(">", total, highest), highest, total), at)
                v.prefetch(b, b.add(at, behind), write=True)
            return context.get_dummy_value()

        return types.void(*[address] * 8, types.float32, types.float32), generate

    return intrinsic(add)  # type: ignore[no-any-return]
