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
# With what some CPUs have besides, for kernels of bytes: products of bytes (VNNI), and bytes looked up in registers.
AVX_VNNI: Final = "x86-64-v3+avxvnni"
AVX512_VNNI: Final = "x86-64-v4+avx512vnni"
AVX512_VBMI: Final = "x86-64-v4+avx512vnni+avx512vbmi"
TARGETS: Final = (BASELINE, AVX2, AVX_VNNI, AVX512, AVX512_VNNI, AVX512_VBMI)  # from the oldest to the newest
# Where a tile of bytes with 32 or 48 columns takes less time than a full one: measured with AVX2. Elsewhere full tiles
# have the better instructions, by their counts, and of narrow ones only those of 16 columns are used.
NARROW_TILES: Final = (BASELINE, AVX2)

# What a CPU must have beyond the baseline, by LLVM's names.
_V3_FEATURES = ("avx", "avx2", "bmi", "bmi2", "f16c", "fma", "movbe")
_FEATURES = {
    BASELINE: (),
    AVX2: _V3_FEATURES,
    AVX512: (*_V3_FEATURES, "avx512f", "avx512dq", "avx512cd", "avx512bw", "avx512vl"),
}


def isa_of(target: str) -> str:
    """The instruction set that a target extends, if it does.

    Example:
        >>> isa_of("x86-64-v4+avx512vnni")
        'x86-64-v4'
    """
    return target.partition("+")[0]


def host_target() -> str:
    """The newest target that this CPU has, or the one that SRIGL_FX_ISA asks for.

    On other architectures it is the first, whose kernels are plain loops.

    Raises:
        LibraryError: SRIGL_FX_ISA names one that is unknown, or that this CPU lacks.

    Example:
        >>> host_target() in TARGETS
        True
    """
    import llvmlite.binding as llvm

    features = llvm.get_host_cpu_features()
    needed = {target: (*_FEATURES[isa_of(target)], *target.split("+")[1:]) for target in TARGETS}
    usable = [target for target in TARGETS if all(features.get(name, False) for name in needed[target])]
    wanted = os.environ.get(ISA_VARIABLE) or usable[-1]
    if wanted not in usable:
        raise LibraryError(f"{ISA_VARIABLE} is {wanted!r}, but this CPU can use: {', '.join(usable)}")
    return wanted


def host_isa() -> str:
    """The instruction set of :func:`host_target`.

    Raises:
        LibraryError: As there.

    Example:
        >>> host_isa() in ISAS
        True
    """
    return isa_of(host_target())


def looks_up_bytes() -> bool:
    """Whether kernels of bytes look inputs up in registers on this CPU, or where SRIGL_FX_ISA holds it.

    Raises:
        LibraryError: As :func:`host_target` has it.

    Example:
        >>> looks_up_bytes() == ("avx512vbmi" in host_target())
        True
    """
    return host_target() == AVX512_VBMI


def compiled_target() -> str:
    """The target to compile for: this CPU's, or ahead of time any that SRIGL_FX_COMPILE_FOR names.

    Example:
        >>> compiled_target() in TARGETS
        True
    """
    wanted = os.environ.get(COMPILE_VARIABLE)
    return wanted if wanted in TARGETS else host_target()


def llvm_names(target: str) -> tuple[str, str]:
    """What LLVM calls the CPU and the features of a target.

    Example:
        >>> llvm_names("x86-64-v4+avx512vnni"), llvm_names("x86-64")
        (('x86-64-v4', '+avx512vnni'), ('x86-64', ''))
    """
    cpu, *features = target.split("+")
    return cpu, ",".join(f"+{name}" for name in features)
