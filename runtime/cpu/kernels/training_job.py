"""One product of sparse training, as the array of int64 that its kernels read.

Owns the positions in it; addresses are plain integers. How packed activations and the matrix lie is said in
:mod:`srigl_fx.runtime.cpu.kernels.chunks`.
"""

from typing import Final

CHUNK: Final = 64  # samples that lie next to each other: four vectors

# Fields. DENSE holds samples as they are outside, with SAMPLE_STRIDE and FEATURE_STRIDE floats between neighbours.
(
    PACKED,
    DENSE,
    SAMPLE_STRIDE,
    FEATURE_STRIDE,
    BATCH,
    FEATURES,
    STARTS,
    INDICES,
    VALUES,
    BIAS,
    ROWS,
    BLOCKS,
    OUT,
    GRADIENT,
    PARTS,
    FAILED,
    SIZE,
) = range(17)
