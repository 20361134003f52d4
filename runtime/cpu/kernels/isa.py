"""The instruction set that the kernels of this process are compiled for.

Owns the names and the choice; it must not know kernels.
"""

import os
from typing import Final

from srigl_fx.errors import LibraryError

ISA_VARIABLE: Final = "SRIGL_FX_ISA"
COMPILE_VARIABLE: Final = "SRIGL_FX_COMPILE_FOR"  # of the processes that compile the library
ISAS: Final = ("x86-64", "x86-64-v3", "x86-64-v4")  # from the oldest to the newest
BASELINE, AVX2, AVX512 = ISAS

# What a CPU must have beyond the baseline, by LLVM's names.
_V3_FEATURES = ("avx", "avx2", "bmi", "bmi2", "f16c", "fma", "movbe")
_FEATURES = {
    BASELINE: (),
    AVX2: _V3_FEATURES,
    AVX512: (*_V3_FEATURES, "avx512f", "avx512dq", "avx512cd", "avx512bw", "avx512vl"),
}


def host_isa() -> str:
    """The newest instruction set that this CPU has, or the one that SRIGL_FX_ISA asks for.

    On other architectures it is the first, whose kernels are plain loops.

    Raises:
        LibraryError: SRIGL_FX_ISA names one that is unknown, or that this CPU lacks.

    Example:
        >>> host_isa() in ISAS
        True
    """
    import llvmlite.binding as llvm

    features = llvm.get_host_cpu_features()
    usable = [isa for isa in ISAS if all(features.get(name, False) for name in _FEATURES[isa])]
    wanted = os.environ.get(ISA_VARIABLE) or usable[-1]
    if wanted not in usable:
        raise LibraryError(f"{ISA_VARIABLE} is {wanted!r}, but this CPU can use: {', '.join(usable)}")
    return wanted


def compiled_isa() -> str:
    """The instruction set to compile for: this CPU's, or ahead of time any that SRIGL_FX_COMPILE_FOR names.

    Example:
        >>> compiled_isa() in ISAS
        True
    """
    wanted = os.environ.get(COMPILE_VARIABLE)
    return wanted if wanted in ISAS else host_isa()
