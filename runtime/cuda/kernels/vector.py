"""The kernel for few samples: lanes of a warp share a row, and samples lie interleaved in shared memory.

Owns its loops. Each lane loads four weights and four places of inputs at once; a lane that has summed its share hands
the sum on by shuffles. Samples are read as they lie, row-major.
"""

from collections.abc import Callable
from typing import Any

from srigl_fx.runtime.cuda.kernels.compiler import cuda, device
from srigl_fx.runtime.cuda.kernels.epilogue import finish
from srigl_fx.runtime.cuda.kernels.machine import (
    ADD,
    FLOAT,
    LOAD_VALUES4,
    PUT,
    ZERO,
    load_offsets4,
    shuffle_xor,
)

_load4, _put4 = LOAD_VALUES4["float32"], PUT[4]


def vector_kernel(dtype: str, samples: int) -> Callable[..., None]:
    """The kernel for values of this dtype that computes 1, 2 or 4 samples at once.

    A row of the packed weight has ``k`` entries, a multiple of four. Their offsets are the inputs themselves; that of
    padding is ``in_features``, where a zero lies. The first ``n_active`` of ``rows`` have weights, the others a bias
    only. ``1 << shift`` lanes share a row. ``by_four`` says that ``x`` and its rows are aligned to 16 bytes.
    """
    load, add = LOAD_VALUES4[dtype], ADD[samples]
    staged_numbers = 4 * samples  # the compiler wants constants

    @device
    def multiply(sums: Any, tile: Any, weights: Any, places: Any) -> None:
        a, b, c, d = weights
        i, j, k, m = places
        add(sums, 0, a, tile, i * samples)
        add(sums, 0, b, tile, j * samples)
        add(sums, 0, c, tile, k * samples)
        add(sums, 0, d, tile, m * samples)

    def kernel(
        x: Any,
        values: Any,
        offsets: Any,
        rows: Any,
        bias: Any,
        residual: Any,
        y: Any,
        batch: int,
        in_features: int,
        n: int,
        n_active: int,
        k: int,
        shift: int,
        by_four: int,
        has_residual: int,
        activation: int,
        low: float,
        high: float,
    ) -> None:
        tile = cuda.shared.array(0, FLOAT)
        sums = cuda.local.array(samples, FLOAT)
        staged = cuda.local.array(staged_numbers, FLOAT)
        thread, width = cuda.threadIdx.x, cuda.blockDim.x
        in_block = width >> shift
        row_blocks = (n + in_block - 1) // in_block
        sample = cuda.blockIdx.x // row_blocks
        row = (cuda.blockIdx.x - sample * row_blocks) * in_block + (thread >> shift)
        sample *= samples

        i = thread * 4
        while i <= in_features:  # the samples, and behind them a zero for padding
            for s in range(samples):
                whole = by_four and i < in_features and sample + s < batch
                if whole:
                    a, b, c, d = _load4(x, (sample + s) * in_features + i)
                    staged[s] = a
                    staged[samples + s] = b
                    staged[2 * samples + s] = c
                    staged[3 * samples + s] = d
                else:
                    for e in range(4):
                        inside = i + e < in_features and sample + s < batch
                        staged[e * samples + s] = x[(sample + s) * in_features + i + e] if inside else ZERO
            for g in range(samples):
                _put4(tile, i * samples + 4 * g, staged, 4 * g)
            i += width * 4
        cuda.syncthreads()

        for s in range(samples):
            sums[s] = ZERO
        step = 4 << shift
        j = (thread & ((1 << shift) - 1)) * 4
        end = k if row < n_active else 0
        while j + step < end:  # two loads of each kind are on their way at once
            weights, places = load(values, row * k + j), load_offsets4(offsets, row * k + j)
            more_weights = load(values, row * k + j + step)
            more_places = load_offsets4(offsets, row * k + j + step)
            multiply(sums, tile, weights, places)
            multiply(sums, tile, more_weights, more_places)
            j += 2 * step
        if j < end:
            multiply(sums, tile, load(values, row * k + j), load_offsets4(offsets, row * k + j))

        distance = 1 << shift >> 1
        while distance > 0:
            for s in range(samples):
                sums[s] += shuffle_xor(sums[s], distance)
            distance >>= 1
        if thread & ((1 << shift) - 1) == 0 and row < n:
            output = rows[row]
            for s in range(samples):
                if sample + s < batch:
                    place = (sample + s) * n + output
                    total = sums[s] + bias[output]
                    if has_residual:
                        total += residual[place]
                    y[place] = finish(total, activation, low, high)

    return kernel
