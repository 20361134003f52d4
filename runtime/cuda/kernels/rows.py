"""The kernel that reads the canonical format: a warp for each output and sample.

Owns what runs where no packed copy may be kept or would fit. It is plain, and slow where weights are read for many
samples.
"""

from collections.abc import Callable
from typing import Any

from srigl_fx.runtime.cuda.kernels.compiler import cuda
from srigl_fx.runtime.cuda.kernels.epilogue import finish
from srigl_fx.runtime.cuda.kernels.machine import LOAD_VALUE, ZERO, shuffle_xor


def rows_kernel(dtype: str) -> Callable[..., None]:
    """The kernel for values of this dtype. An index that repeats the one before it is padding, and is not read with.

    ``active`` ascends; a row that is not in it is ablated. ``reads`` has the row of ``indices`` of each active row.
    """
    load = LOAD_VALUE[dtype]

    def kernel(
        x: Any,
        values: Any,
        indices: Any,
        active: Any,
        reads: Any,
        bias: Any,
        residual: Any,
        y: Any,
        batch: int,
        in_features: int,
        n: int,
        n_active: int,
        k: int,
        shared: int,
        has_residual: int,
        activation: int,
        low: float,
        high: float,
    ) -> None:
        lane, warps = cuda.threadIdx.x & 31, cuda.blockDim.x >> 5
        row_blocks = (n + warps - 1) // warps
        sample = cuda.blockIdx.x // row_blocks
        row = (cuda.blockIdx.x - sample * row_blocks) * warps + (cuda.threadIdx.x >> 5)
        first, last = 0, n_active
        while first < last:  # the first active row that is not before this one
            middle = (first + last) >> 1
            if active[middle] < row:
                first = middle + 1
            else:
                last = middle
        total = ZERO
        if first < n_active and active[first] == row:
            of_row = (reads[first] if shared else first) * k
            j = lane
            while j < k:
                index = indices[of_row + j]
                if j == 0 or indices[of_row + j - 1] != index:
                    total += load(values, first * k + j) * x[sample * in_features + index]
                j += 32
        distance = 16
        while distance > 0:
            total += shuffle_xor(total, distance)
            distance >>= 1
        if lane == 0 and row < n:
            total += bias[row]
            if has_residual:
                total += residual[sample * n + row]
            y[sample * n + row] = finish(total, activation, low, high)

    return kernel
