"""Products with a sparse matrix of any pattern, for training: samples in chunks of 64, features in rows.

Owns the packing of activations and the multiply-adds. It must not know which of a layer's three products it computes.

Packed activations are (chunks, features, 64): 64 samples of one feature lie next to each other, the last chunk is
filled up with zeros. The matrix is in compressed sparse rows, cut into blocks of columns whose activations stay in the
second-level cache: ``starts[row * blocks + block]`` is the first entry of a row in a block, an index is a uint16
relative to its block. The fields of a job are in :mod:`srigl_fx.runtime.cpu.kernels.training_job`.
"""

from collections.abc import Callable
from typing import Any, Final

import numba as typed_numba

from srigl_fx.runtime.cpu.kernels import vector as v
from srigl_fx.runtime.cpu.kernels.copies import transpose
from srigl_fx.runtime.cpu.kernels.plan import LANES
from srigl_fx.runtime.cpu.kernels.training_job import (
    BATCH,
    BIAS,
    BLOCKS,
    CHUNK,
    DENSE,
    FAILED,
    FEATURE_STRIDE,
    FEATURES,
    INDICES,
    PACKED,
    PARTS,
    ROWS,
    SAMPLE_STRIDE,
    STARTS,
    VALUES,
)
from srigl_fx.runtime.cpu.kernels.vector import (
    VECTOR_BYTES,
    address,
    allocate,
    floats,
    intrinsic,
    ints,
    number,
    release,
    types,
)

numba: Any = typed_numba
Pointer = Any

CHUNK_BYTES: Final = 4 * CHUNK
BLOCK_SHIFT: Final = 10  # 1024 columns of a chunk are 256 KB
BLOCK: Final = 1 << BLOCK_SHIFT
VECTORS: Final = CHUNK // LANES
ROWS_AT_ONCE: Final = 512  # sums of 128 KB
FASTMATH: Final = {"reassoc", "contract", "nsz"}  # NaN and infinity keep their meaning


def compiled(function: Callable[..., Any]) -> Any:
    """A function that tasks call."""
    return numba.njit(fastmath=FASTMATH, error_model="numpy")(function)


def _add_row(context: Any, inputs: Any, index: Any, values: Any, count: Any, out: Any) -> Any:
    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        inputs, index, values, count, out = args

        def columns(at: Any) -> list[Any]:
            return [v.load(b, b.add(at, number(VECTOR_BYTES * i)), v.FLOATS, 64) for i in range(VECTORS)]

        def one(i: Any, totals: Any) -> Any:
            column = b.zext(v.load(b, b.add(index, b.mul(i, number(2))), v.I16, 2), v.I64)
            weight = v.broadcast(b, v.load(b, b.add(values, b.mul(i, number(4))), v.F32))
            source = columns(b.add(inputs, b.mul(column, number(CHUNK_BYTES))))
            return [v.multiply_add(b, weight, x, total) for x, total in zip(source, totals, strict=True)]

        for i, total in enumerate(v.loop(b, count, columns(out), one)):
            v.store(b, total, b.add(out, number(VECTOR_BYTES * i)), 64)
        return context.get_dummy_value()

    return types.void(*[address] * 5), generate


# out[:64] += sum over i < count of values[i] * inputs[index[i], :64]
add_row: Callable[[int, int, int, int, int], None] = intrinsic(_add_row)


@compiled
def _share(count: int, part: int, parts: int) -> int:
    """Where a part begins; parts are whole vectors, but for the last."""
    return count if part == parts else count * part // parts // LANES * LANES


def pack_task(j: Pointer, task: int) -> None:
    """A share of the features of one chunk of samples, from DENSE into PACKED."""
    chunk, part = task // j[PARTS], task % j[PARTS]
    features, first = j[FEATURES], chunk * CHUNK
    f0, f1 = _share(features, part, j[PARTS]), _share(features, part + 1, j[PARTS])
    columns = min(CHUNK, j[BATCH] - first)
    packed = j[PACKED] + chunk * features * CHUNK_BYTES
    sample_stride, feature_stride = j[SAMPLE_STRIDE], j[FEATURE_STRIDE]
    source = j[DENSE] + first * sample_stride * 4
    whole = columns // LANES * LANES
    if feature_stride == 1:
        blocks_end = f0 + (f1 - f0) // LANES * LANES
        for f in range(f0, blocks_end, LANES):
            for c in range(0, whole, LANES):
                at = source + (c * sample_stride + f) * 4
                transpose(at, sample_stride * 4, packed + f * CHUNK_BYTES + c * 4, CHUNK_BYTES)
    for f in range(f0, f1):
        row, given = floats(packed + f * CHUNK_BYTES), floats(source + f * feature_stride * 4)
        done = whole if feature_stride == 1 and f < f0 + (f1 - f0) // LANES * LANES else 0
        if sample_stride == 1:
            for c in range(columns):
                row[c] = given[c]
        else:
            for c in range(done, columns):
                row[c] = given[c * sample_stride]
        for c in range(columns, CHUNK):
            row[c] = 0.0


def product_task(j: Pointer, task: int) -> None:
    """A share of the matrix's rows for one chunk, into DENSE."""
    chunk, part = task // j[PARTS], task % j[PARTS]
    rows, blocks, first = j[ROWS], j[BLOCKS], chunk * CHUNK
    r0, end_row = _share(rows, part, j[PARTS]), _share(rows, part + 1, j[PARTS])
    inputs, starts = j[PACKED] + chunk * j[FEATURES] * CHUNK_BYTES, ints(j[STARTS])
    memory = allocate((ROWS_AT_ONCE + 1) * CHUNK_BYTES)
    if memory == 0:
        j[FAILED] = 1
        return
    sums = memory + CHUNK_BYTES - memory % CHUNK_BYTES
    while r0 < end_row:
        r1 = min(end_row, r0 + ROWS_AT_ONCE)
        for r in range(r0, r1):
            row, start = floats(sums + (r - r0) * CHUNK_BYTES), numba.float32(0.0)
            if j[BIAS] != 0:
                start = floats(j[BIAS])[r]
            for c in range(CHUNK):
                row[c] = start
        for block in range(blocks):
            at = inputs + (block << BLOCK_SHIFT) * CHUNK_BYTES
            for r in range(r0, r1):
                begin, end = int(starts[r * blocks + block]), int(starts[r * blocks + block + 1])
                if begin < end:
                    total = sums + (r - r0) * CHUNK_BYTES
                    add_row(at, j[INDICES] + begin * 2, j[VALUES] + begin * 4, end - begin, total)
        _store(j, first, min(CHUNK, j[BATCH] - first), r0, r1, sums)
        r0 = r1
    release(memory)


@compiled
def _store(j: Pointer, first: int, columns: int, r0: int, r1: int, sums: int) -> None:
    """The sums of the rows ``r0 <= r < r1`` in the layout of DENSE."""
    sample_stride, feature_stride = j[SAMPLE_STRIDE], j[FEATURE_STRIDE]
    target = j[DENSE] + first * sample_stride * 4
    whole_rows, whole = r0, 0
    if feature_stride == 1:
        whole_rows, whole = r0 + (r1 - r0) // LANES * LANES, columns // LANES * LANES
        for c in range(0, whole, LANES):
            for r in range(r0, whole_rows, LANES):
                at = target + (c * sample_stride + r) * 4
                transpose(sums + (r - r0) * CHUNK_BYTES + c * 4, CHUNK_BYTES, at, sample_stride * 4)
    for r in range(r0, r1):
        row, to = floats(sums + (r - r0) * CHUNK_BYTES), floats(target + r * feature_stride * 4)
        if sample_stride == 1:
            for c in range(columns):
                to[c] = row[c]
        else:
            for c in range(whole if r < whole_rows else 0, columns):
                to[c * sample_stride] = row[c]
