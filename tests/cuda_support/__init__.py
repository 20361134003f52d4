"""A GPU made of Numba's simulator, for the tests of the CUDA kernels: what would be launched is computed by Python.

Nothing here is part of the library, and nothing that it shows is a time. It stands in the place of the driver: it takes
the arguments as they are packed for a launch, and gives each kernel its memory with the lengths that the operands have,
so that an access outside of them is an error.
"""

import ctypes
import functools
import os
import struct
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from cuda_support import blocks
from srigl_fx.runtime.cuda.model import GPUS, Gpu
from srigl_fx.runtime.cuda.table import KERNELS, CudaKernel

Array = NDArray[Any]
_DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16)}
_SYMBOLS = {kernel.symbol(dtype): (kernel, dtype) for kernel in KERNELS for dtype in ("float32", "bfloat16", "float16")}


def simulate() -> None:
    """Have Numba simulate, from its first import on; skip the test where it is too late for that."""
    if "numba.cuda" not in sys.modules:
        os.environ["NUMBA_ENABLE_CUDASIM"] = "1"
        config: Any = import_module("numba").config
        config.ENABLE_CUDASIM = 1
        import_module("numba.cuda")
        del os.environ["NUMBA_ENABLE_CUDASIM"]  # other processes may compile
    if not import_module("srigl_fx.runtime.cuda.kernels.compiler").SIMULATED:
        pytest.skip("numba.cuda was imported before, and not as its simulator")
    blocks.use()


@functools.cache
def _function(kernel: CudaKernel, dtype: str) -> Callable[..., None]:
    made = import_module(f"srigl_fx.runtime.cuda.kernels.{kernel.family}")
    function: Callable[..., None] = getattr(made, f"{kernel.family}_kernel")(dtype, *kernel.settings)
    return function


def _view(address: int, dtype: str, count: int) -> Any:
    simulated: Any = import_module("srigl_fx.runtime.cuda.kernels.simulated")
    held = _DTYPES.get(dtype) or np.dtype(dtype)
    if not count:
        return simulated.Pointer(np.zeros(0, held))
    assert address, f"a pointer to {count} elements is null"
    assert address % held.itemsize == 0
    return simulated.Pointer(
        np.ctypeslib.as_array((ctypes.c_uint8 * (count * held.itemsize)).from_address(address)).view(held)
    )


def _lengths(kernel: CudaKernel, given: dict[str, Any]) -> dict[str, int]:
    """How many elements each pointer has, from the sizes of the call."""
    batch, n, n_active, in_features = (given[name] for name in ("batch", "n", "n_active", "in_features"))
    lengths = {"x": batch * in_features, "y": batch * n, "bias": n, "rows": n, "active": n_active}
    lengths |= {"residual": batch * n if given["has_residual"] else 0}
    if kernel.family == "rows":
        reads = _view(given["reads"], "int32", n_active).array if given["shared"] else np.zeros(0, np.int32)
        rows = int(reads[-1]) + 1 if len(reads) else n_active
        lengths |= {"values": n_active * given["k"], "indices": rows * given["k"], "reads": len(reads)}
    elif kernel.family == "vector":
        lengths |= {"values": n_active * given["k"], "offsets": n_active * given["k"]}
    else:
        windows = -(-in_features // given["window"])
        starts = _view(given["starts"], "int32", windows * n_active + 1).array
        entries = (int(starts[-1]) + 1) * 4
        lengths |= {"values": entries, "offsets": entries, "starts": len(starts)}
    return lengths


class SimulatedGpu:
    """In the place of :class:`srigl_fx.runtime.cuda.execute.Machine`.

    Attributes:
        gpu: The limits that plans are made for.
        launched: The names of the kernels, in their order.
        threads: Of a block, fewer than on a GPU, as each is a thread of Python; a multiple of 32.
    """

    def __init__(self, gpu: Gpu = GPUS[0], threads: int = 64) -> None:
        self.gpu, self.threads, self.launched = gpu, threads, list[str]()

    def launch(self, planned: Any, dtype: str, arguments: bytes) -> None:
        kernel, dtype = _SYMBOLS[planned.kernel.symbol(dtype)]
        kinds = kernel.signature(dtype)
        codes = {"int32": "i", "float32": "f"}
        numbers = struct.unpack("<" + "".join("Q" if kind.endswith("*") else codes[kind] for kind in kinds), arguments)
        names = [*(pointer.partition(":")[0] for pointer in kernel.pointers), *kernel.numbers, "low", "high"]
        given: dict[str, Any] = dict(zip(names, numbers, strict=True))
        lengths = _lengths(kernel, given)
        for name, kind in zip(names, kinds, strict=True):
            if kind.endswith("*"):
                given[name] = _view(given[name], kind[:-1], lengths[name])
        blocks = self._blocks(kernel, given)
        if planned.threads == self.threads:
            assert blocks == planned.blocks
        simulator: Any = import_module("numba.cuda")
        function = simulator.jit(_function(kernel, dtype))
        with np.errstate(all="ignore"):
            function[blocks, self.threads, 0, planned.shared_bytes](*[given[name] for name in names])
        self.launched.append(kernel.name)

    def _blocks(self, kernel: CudaKernel, given: dict[str, int]) -> int:
        """The grid for blocks of so many threads."""
        samples = kernel.settings[0] if kernel.settings else 1
        rows = self.threads // 32
        if kernel.family == "vector":
            rows = self.threads >> given["shift"]
        elif kernel.family == "tile":
            rows, samples = rows * kernel.settings[1], samples * 32
        return -(-given["n"] // rows) * -(-given["batch"] // samples)
