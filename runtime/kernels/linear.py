"""The condensed linear kernels, as loops over raw pointers.

Owns the arithmetic of ``CondensedLinear``; it must not know who calls it, and checks nothing: the caller has
validated every index. All tensors are contiguous; ``values`` and ``indices`` are (n_active, k), ``active`` is
(n_active,), ``bias`` is (out_features,), ``x`` is (batch, in_features), ``y`` is (batch, out_features).
"""

from typing import Any

Pointer = Any
TILE = 64  # batch columns of one tile: four 512-bit accumulators
# From this batch on, samples are computed a tile at a time, whatever its filling: the tile breaks even with single dot
# products at 16 samples (80 % sparse) to 32 (95 %).
TILED_FROM_BATCH = 24


def fill_bias(bias: Pointer, y: Pointer, batch: int, out_features: int) -> None:
    """Write the bias into every row of ``y``: what an ablated neuron yields."""
    for b in range(batch):
        for o in range(out_features):
            y[b * out_features + o] = bias[o]


def linear_rows(
    x: Pointer,
    values: Pointer,
    indices: Pointer,
    active: Pointer,
    bias: Pointer,
    y: Pointer,
    batch: int,
    in_features: int,
    out_features: int,
    k: int,
    first: int,
    last: int,
) -> None:
    """Compute the active rows ``first <= r < last`` for every sample, one dot product each (small batches)."""
    for b in range(batch):
        for r in range(first, last):
            o = active[r]
            total = bias[o]
            for j in range(k):
                total += values[r * k + j] * x[b * in_features + indices[r * k + j]]
            y[b * out_features + o] = total


def linear_tile(
    x: Pointer,
    values: Pointer,
    indices: Pointer,
    active: Pointer,
    bias: Pointer,
    y: Pointer,
    scratch: Pointer,
    first_sample: int,
    samples: int,
    in_features: int,
    out_features: int,
    n_active: int,
    k: int,
) -> None:
    """Compute all active rows for ``samples <= TILE`` samples from ``first_sample`` (large batches).

    ``scratch`` holds ``(in_features + 1) * TILE`` floats: the samples feature-major, then one accumulator row. Every
    kept weight is then a broadcast multiply-add over contiguous samples.
    """
    for b in range(samples):
        for i in range(in_features):
            scratch[i * TILE + b] = x[(first_sample + b) * in_features + i]
    for i in range(in_features):
        for b in range(samples, TILE):
            scratch[i * TILE + b] = 0.0
    total = in_features * TILE
    for r in range(n_active):
        o = active[r]
        for b in range(TILE):
            scratch[total + b] = bias[o]
        whole = k // 4 * 4
        for j in range(0, whole, 4):
            p = r * k + j
            v0 = values[p]
            v1 = values[p + 1]
            v2 = values[p + 2]
            v3 = values[p + 3]
            i0 = int(indices[p]) * TILE
            i1 = int(indices[p + 1]) * TILE
            i2 = int(indices[p + 2]) * TILE
            i3 = int(indices[p + 3]) * TILE
            for b in range(TILE):
                scratch[total + b] += (
                    v0 * scratch[i0 + b] + v1 * scratch[i1 + b] + v2 * scratch[i2 + b] + v3 * scratch[i3 + b]
                )
        for j in range(whole, k):
            v0 = values[r * k + j]
            i0 = int(indices[r * k + j]) * TILE
            for b in range(TILE):
                scratch[total + b] += v0 * scratch[i0 + b]
        for b in range(samples):
            y[(first_sample + b) * out_features + o] = scratch[total + b]
