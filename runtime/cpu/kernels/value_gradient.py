"""The gradient of a sparse matrix's values: a dense product sampled at the kept positions.

Owns the dot products. Layouts are those of :mod:`srigl_fx.runtime.cpu.kernels.chunks`; in a job PACKED
are the inputs, GRADIENT are the output's gradients, packed alike, and OUT is what it is for, one float an entry.
"""

from collections.abc import Callable
from typing import Any, Final

from llvmlite import ir

from srigl_fx.runtime.cpu.kernels import vector as v
from srigl_fx.runtime.cpu.kernels.chunks import BLOCK_SHIFT, CHUNK_BYTES, VECTORS, Pointer, compiled
from srigl_fx.runtime.cpu.kernels.plan import LANES
from srigl_fx.runtime.cpu.kernels.training_job import (
    BATCH,
    BLOCKS,
    CHUNK,
    FEATURES,
    GRADIENT,
    INDICES,
    OUT,
    PACKED,
    PARTS,
    ROWS,
    STARTS,
)
from srigl_fx.runtime.cpu.kernels.vector import VECTOR_BYTES, address, floats, intrinsic, ints, number, shorts, types

AT_ONCE: Final = 4  # kept positions whose sums are in flight together, and are added up together at the end


def _pick(b: Any, one: Any, other: Any, lanes: list[int]) -> Any:
    return b.shuffle_vector(one, other, ir.Constant(ir.VectorType(v.I32, len(lanes)), lanes))


def _sums(b: Any, one: list[Any]) -> Any:
    """The sums over the lanes of four vectors, as a vector of four."""
    quarters = range(0, LANES, 4)

    def interleave(first: Any, second: Any, part: int) -> Any:
        within = (2 * part, LANES + 2 * part, 2 * part + 1, LANES + 2 * part + 1)
        return _pick(b, first, second, [quarter + lane for quarter in quarters for lane in within])

    def halves(first: Any, second: Any, part: int) -> Any:
        within = (2 * part, 2 * part + 1, LANES + 2 * part, LANES + 2 * part + 1)
        return _pick(b, first, second, [quarter + lane for quarter in quarters for lane in within])

    pairs = [b.fadd(*(interleave(one[i], one[i + 1], part) for part in (0, 1))) for i in (0, 2)]
    total = b.fadd(*(halves(pairs[0], pairs[1], part) for part in (0, 1)))
    for width in (8, 4):
        low, high = list(range(width)), list(range(width, 2 * width))
        total = b.fadd(_pick(b, total, total, low), _pick(b, total, total, high))
    return total


def _add_dots(context: Any, inputs: Any, index: Any, gradient: Any, groups: Any, out: Any) -> Any:
    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        inputs, index, gradient, groups, out = args
        fours = ir.VectorType(v.F32, AT_ONCE)
        own = [v.load(b, b.add(gradient, number(VECTOR_BYTES * i)), v.FLOATS, 64) for i in range(VECTORS)]

        def one_group(i: Any, _: Any) -> list[Any]:
            first = b.add(index, b.mul(i, number(2 * AT_ONCE)))
            columns = [v.load(b, b.add(first, number(2 * k)), v.I16, 2) for k in range(AT_ONCE)]
            rows = [b.add(inputs, b.mul(b.zext(column, v.I64), number(CHUNK_BYTES))) for column in columns]
            totals = [v.ZERO] * AT_ONCE
            for part in range(VECTORS):
                x = [v.load(b, b.add(row, number(VECTOR_BYTES * part)), v.FLOATS, 64) for row in rows]
                totals = [v.multiply_add(b, own[part], x[k], totals[k]) for k in range(AT_ONCE)]
            at = b.add(out, b.mul(i, number(4 * AT_ONCE)))
            v.store(b, b.fadd(v.load(b, at, fours), _sums(b, totals)), at)
            return []

        v.loop(b, groups, [], one_group)
        return context.get_dummy_value()

    return types.void(*[address] * 5), generate


# out[i] += inputs[index[i], :64] . gradient[:64] for i < 4 * groups
add_dots: Callable[[int, int, int, int, int], None] = intrinsic(_add_dots)


@compiled
def _add_entries(inputs: int, indices: int, gradient: int, begin: int, end: int, out: int) -> None:
    """Add to the entries ``begin <= i < end`` of one row what one chunk contributes."""
    groups = (end - begin) // AT_ONCE
    if groups:
        add_dots(inputs, indices + begin * 2, gradient, groups, out + begin * 4)
    columns, totals, g = shorts(indices), floats(out), floats(gradient)
    for entry in range(begin + groups * AT_ONCE, end):
        x = floats(inputs + int(columns[entry]) * CHUNK_BYTES)
        total = totals[entry]
        for c in range(CHUNK):
            total += g[c] * x[c]
        totals[entry] = total


def value_gradient_task(j: Pointer, task: int) -> None:
    """A share of the matrix's rows, over all chunks of samples."""
    rows, blocks = j[ROWS], j[BLOCKS]
    r0, r1 = rows * task // j[PARTS], rows * (task + 1) // j[PARTS]
    starts = ints(j[STARTS])
    totals = floats(j[OUT])
    for entry in range(int(starts[r0 * blocks]), int(starts[r1 * blocks])):
        totals[entry] = 0.0
    for chunk in range((j[BATCH] + CHUNK - 1) // CHUNK):
        inputs = j[PACKED] + chunk * j[FEATURES] * CHUNK_BYTES
        gradients = j[GRADIENT] + chunk * rows * CHUNK_BYTES
        for block in range(blocks):
            block_inputs = inputs + (block << BLOCK_SHIFT) * CHUNK_BYTES
            for r in range(r0, r1):
                begin, end = int(starts[r * blocks + block]), int(starts[r * blocks + block + 1])
                _add_entries(block_inputs, j[INDICES], gradients + r * CHUNK_BYTES, begin, end, j[OUT])
