"""The compiler of the CUDA kernels: the only file that names its package.

Owns which package it is. It must not know any kernel. ``numba.cuda`` is numba-cuda where that is installed. Its
successor numba-cuda-mlir has the same interface under ``numba_cuda_mlir.cuda``, but no simulator, and other means than
LLVM's to write an instruction, so that :mod:`srigl_fx.runtime.cuda.kernels.intrinsics` would have to be written anew.
"""

from collections.abc import Callable
from typing import Any, Final

from numba import cuda as _cuda

cuda: Any = _cuda

# Numba's simulator runs kernels as Python, each thread of a block as one of the process. It has no shuffles.
SIMULATED: Final = not hasattr(cuda, "shfl_xor_sync")


def device(function: Callable[..., Any]) -> Any:
    """A function that kernels call, always inlined: local arrays that it is given stay in registers."""
    return function if SIMULATED else cuda.jit(device=True, inline="always")(function)
