"""Which CUDA kernel a call takes, and how it is launched.

Owns the rule: of the kernels that can, the one that the model predicts to be fastest. It must not know tensors,
drivers, or kernels' loops.
"""

import functools
from dataclasses import dataclass
from typing import Final

from srigl_fx.errors import CudaError
from srigl_fx.runtime.cuda.model import Gpu, Layer, Prediction, predict
from srigl_fx.runtime.cuda.packed import FOUR, LANES, LARGEST_IN_FEATURES
from srigl_fx.runtime.cuda.table import KERNELS, CudaKernel

WINDOW: Final = 192  # inputs in shared memory; with 128 samples two blocks fit on an H100, and one on any other
MOST_BLOCKS: Final = (1 << 31) - 1


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How a call is computed.

    Attributes:
        kernel: By which kernel.
        blocks: Of the grid.
        threads: Of a block.
        shared_bytes: Of dynamic shared memory.
        shift: Of rows of fours: ``1 << shift`` lanes share a row.
        prediction: What the model says.
    """

    kernel: CudaKernel
    blocks: int
    threads: int
    shared_bytes: int
    shift: int
    prediction: Prediction


def shared_bytes(kernel: CudaKernel, in_features: int) -> int:
    """The shared memory of a block.

    Example:
        >>> from srigl_fx.runtime.cuda.table import BY_NAME
        >>> [shared_bytes(BY_NAME[name], 10) for name in ("rows_uint16", "vector4", "tile4x16")]
        [0, 192, 98816]
    """
    if kernel.family == "vector":
        return (in_features // FOUR + 1) * FOUR * kernel.settings[0] * 4
    return (WINDOW + 1) * LANES * kernel.settings[0] * 4 if kernel.family == "tile" else 0


def lanes_shift(gpu: Gpu, n: int, k: int, threads: int) -> int:
    """How many lanes share a row: enough for all multiprocessors, and not many more than its fours.

    Example:
        >>> from srigl_fx.runtime.cuda.model import GPUS
        >>> [lanes_shift(GPUS[0], n, k, 512) for n, k in ((768, 307), (4096, 410), (65536, 410), (4096, 8))]
        [5, 4, 3, 1]
    """
    shift = 5
    while shift > 3 and (n << (shift - 1)) >= gpu.multiprocessors * threads // 2:
        shift -= 1
    while shift > 0 and (1 << (shift - 1)) * FOUR >= k:
        shift -= 1
    return shift


def _launch(gpu: Gpu, kernel: CudaKernel, layer: Layer, batch: int) -> Launch:
    shift = lanes_shift(gpu, layer.n, layer.k, kernel.threads)
    if kernel.family == "vector":
        rows, samples = kernel.threads >> shift, kernel.settings[0]
    elif kernel.family == "tile":
        rows, samples = kernel.threads // LANES * kernel.settings[1], LANES * kernel.settings[0]
    else:
        rows, samples = kernel.threads // LANES, 1
    blocks, needed = -(-layer.n // rows) * -(-batch // samples), shared_bytes(kernel, layer.in_features)
    return Launch(
        kernel=kernel,
        blocks=blocks,
        threads=kernel.threads,
        shared_bytes=needed,
        shift=shift,
        prediction=predict(gpu, kernel, layer, batch, blocks, needed, WINDOW),
    )


@functools.lru_cache(maxsize=4096)
def plan(gpu: Gpu, layer: Layer, batch: int, index: str, packed: bool, columns: bool) -> Launch:
    """The launch of a linear layer.

    Args:
        gpu: Where.
        layer: Its sizes.
        batch: The number of samples, at least one.
        index: The dtype of stored indices.
        packed: Whether packed copies of the weight may be kept.
        columns: Whether samples or outputs lie feature-major, which only tiles read and write.

    Raises:
        CudaError: There are too many samples for one launch.

    Example:
        >>> from srigl_fx.runtime.cuda.model import GPUS
        >>> layer = Layer(in_features=4096, n=4096, n_active=4096, k=410)
        >>> [plan(GPUS[0], layer, batch, "uint16", True, False).kernel.name for batch in (1, 8, 64, 2048)]
        ['vector1', 'vector4', 'tile1x4', 'tile4x16']
        >>> plan(GPUS[0], layer, 1, "uint16", False, False).kernel.name
        'rows_uint16'
    """
    found = candidates(gpu, layer, batch, index, packed, columns)
    if not found:
        raise CudaError(
            f"{batch} samples of a layer of {layer.n} outputs take more than the {MOST_BLOCKS} blocks that a launch "
            "may have; cut the batch into parts"
        )
    return min(found, key=lambda launch: launch.prediction.seconds)


def candidates(gpu: Gpu, layer: Layer, batch: int, index: str, packed: bool, columns: bool) -> list[Launch]:
    """All launches that compute a call."""
    found = []
    for kernel in KERNELS:
        least, most = kernel.samples
        if kernel.family == "rows":
            possible = not packed and kernel.name == f"rows_{index}"
        elif kernel.family == "vector":
            possible = packed and not columns and layer.in_features <= LARGEST_IN_FEATURES
        else:
            possible = packed
        possible = possible and least <= batch and (most is None or batch <= most)
        launch = _launch(gpu, kernel, layer, batch)
        if possible and launch.shared_bytes <= gpu.shared_of_block and launch.blocks <= MOST_BLOCKS:
            found.append(launch)
    return found
