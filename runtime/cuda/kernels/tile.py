"""The kernel for many samples: a window of inputs of many samples lies in shared memory, transposed on the way there.

Owns its loops. A warp computes several rows of outputs one after another, and each lane 1, 2 or 4 samples of them,
with sums in registers: a kept weight is one load that all lanes share, and one vector load and as many multiply-adds
for each lane. In shared memory, the samples of input ``i`` change places by exclusive-or with ``i & 31``, so that no
two lanes of a warp meet in a bank when they store what they loaded along the inputs.
"""

from collections.abc import Callable
from typing import Any

from srigl_fx.runtime.cuda.kernels.compiler import cuda, device
from srigl_fx.runtime.cuda.kernels.epilogue import finish
from srigl_fx.runtime.cuda.kernels.machine import ADD, FLOAT, LOAD_VALUES4, PUT, ZERO, load_offsets4, shared_load1


def tile_kernel(dtype: str, samples: int, outputs: int) -> Callable[..., None]:
    """The kernel for values of this dtype with so many samples a lane and outputs a warp.

    The packed weight is cut into windows of inputs, and in each into rows; ``starts`` has where the row's steps of four
    weights begin, in that order. An offset is ``i * 32 + (i & 31)`` for an input ``i`` of its window; that of padding
    says ``window``, where zeros lie. The first ``n_active`` of ``rows`` have weights. A block has at most
    ``window + 1`` rows, as finished outputs take the place of the inputs.
    """
    load, add, put = LOAD_VALUES4[dtype], ADD[samples], PUT[samples]
    span, halvings = 32 * samples, samples.bit_length() - 1
    all_sums = outputs * samples  # the compiler wants constants

    @device
    def fill(
        tile: Any, staged: Any, x: Any, batch: int, in_features: int, first: int, start: int, count: int, columns: int
    ) -> None:
        """Inputs ``start`` to ``start + count`` of the samples from ``first``."""
        lane, warp, warps = cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5, cuda.blockDim.x >> 5
        unit = warp
        units = count if columns else ((count + 31) >> 5) << 5
        while unit < units:
            # The lanes go along what lies contiguously: along the samples, or along the inputs.
            i = unit if columns else (unit & -32) + lane
            place = lane if columns else unit & 31
            if i < count:
                for p in range(samples):
                    sample = first + place * samples + p
                    staged[p] = ZERO
                    if sample < batch:
                        staged[p] = x[(start + i) * batch + sample] if columns else x[sample * in_features + start + i]
                put(tile, (i * 32 + (place ^ (i & 31))) * samples, staged, 0)
            unit += warps

    def kernel(
        x: Any,
        values: Any,
        offsets: Any,
        starts: Any,
        rows: Any,
        bias: Any,
        residual: Any,
        y: Any,
        batch: int,
        in_features: int,
        n: int,
        n_active: int,
        window: int,
        x_columns: int,
        y_columns: int,
        has_residual: int,
        activation: int,
        low: float,
        high: float,
    ) -> None:
        tile = cuda.shared.array(0, FLOAT)
        sums = cuda.local.array(all_sums, FLOAT)
        staged = cuda.local.array(samples, FLOAT)
        lane, warp, warps = cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5, cuda.blockDim.x >> 5
        row_blocks = (n + warps * outputs - 1) // (warps * outputs)
        first = cuda.blockIdx.x // row_blocks
        first_row = (cuda.blockIdx.x - first * row_blocks) * warps * outputs
        row = first_row + warp * outputs
        first *= span

        for q in range(all_sums):
            sums[q] = ZERO
        for p in range(samples):
            staged[p] = ZERO
        if warp == 0:
            put(tile, (window * 32 + lane) * samples, staged, 0)
        start, place = 0, row
        while start < in_features:
            fill(tile, staged, x, batch, in_features, first, start, min(window, in_features - start), x_columns)
            cuda.syncthreads()
            if row < n_active:
                j = starts[place]
                weights, inputs = load(values, j * 4), load_offsets4(offsets, j * 4)
                for q in range(outputs):
                    end = starts[place + q + 1] if row + q < n_active else j
                    while j < end:
                        a, b, c, d = weights
                        e, f, g, h = inputs
                        j += 1  # what comes next is loaded before this is computed; it may be the next row's
                        weights, inputs = load(values, j * 4), load_offsets4(offsets, j * 4)
                        add(sums, q * samples, a, tile, (e ^ lane) * samples)
                        add(sums, q * samples, b, tile, (f ^ lane) * samples)
                        add(sums, q * samples, c, tile, (g ^ lane) * samples)
                        add(sums, q * samples, d, tile, (h ^ lane) * samples)
            cuda.syncthreads()
            start += window
            place += n_active

        for q in range(outputs):
            r = warp * outputs + q
            put(tile, (r * 32 + (lane ^ (r & 31))) * samples, sums, q * samples)
        cuda.syncthreads()
        # Neighbouring lanes write neighbours: samples where these are columns, else rows.
        outer, outer_count = warp, warps * outputs if y_columns else span
        inner_count = span if y_columns else warps * outputs
        while outer < outer_count:
            inner = lane
            while inner < inner_count:
                r, s = (outer, inner) if y_columns else (inner, outer)
                if first_row + r < n and first + s < batch:
                    output = rows[first_row + r]
                    at = output * batch + first + s if y_columns else (first + s) * n + output
                    found = (r * 32 + ((s >> halvings) ^ (r & 31))) * samples + (s & (samples - 1))
                    total = shared_load1(tile, found) + bias[output]
                    if has_residual:
                        total += residual[at]
                    y[at] = finish(total, activation, low, high)
                inner += 32
            outer += warps

    return kernel
