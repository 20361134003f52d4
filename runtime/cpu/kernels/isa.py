"""The instruction set that the kernels of this process are compiled for.

Owns the names, for each architecture, and the choice; it must not know kernels.
"""

import ctypes
import os
import platform
from typing import Final

from srigl_fx.errors import LibraryError

ISA_VARIABLE: Final = "SRIGL_FX_ISA"
COMPILE_VARIABLE: Final = "SRIGL_FX_COMPILE_FOR"  # of the processes that compile the library
X86, ARM = "x86_64", "aarch64"  # architectures, as Linux calls them
BASELINE, AVX2, AVX512 = "x86-64", "x86-64-v3", "x86-64-v4"
NEON: Final = "aarch64"
# With what some CPUs have besides, for kernels of bytes: products of bytes (VNNI), and bytes looked up in registers.
AVX_VNNI: Final = "x86-64-v3+avxvnni"
AVX512_VNNI: Final = "x86-64-v4+avx512vnni"
AVX512_VBMI: Final = "x86-64-v4+avx512vnni+avx512vbmi"
NEON_DOT: Final = "aarch64+dotprod"  # of bytes of one kind, signed or unsigned
NEON_I8MM: Final = "aarch64+dotprod+i8mm"  # of unsigned with signed ones
TARGETS_OF: Final = {  # from the oldest to the newest
    X86: (BASELINE, AVX2, AVX_VNNI, AVX512, AVX512_VNNI, AVX512_VBMI),
    ARM: (NEON, NEON_DOT, NEON_I8MM),
}
# Where a tile of bytes with 32 or 48 columns takes less time than a full one: measured with AVX2. With AVX-512 full
# tiles have the better instructions, by their counts, and of narrow ones only those of 16 columns are used. Registers
# of 16 bytes take a tile 16 columns at a time, so that fewer columns are less work.
NARROW_TILES: Final = (BASELINE, AVX2, NEON, NEON_DOT, NEON_I8MM)

# What a CPU must have beyond the baseline, by LLVM's names.
_V3_FEATURES = ("avx", "avx2", "bmi", "bmi2", "f16c", "fma", "movbe")
_FEATURES = {
    BASELINE: (),
    AVX2: _V3_FEATURES,
    AVX512: (*_V3_FEATURES, "avx512f", "avx512dq", "avx512cd", "avx512bw", "avx512vl"),
    NEON: (),
}
# Which kernels there are: for one or a few samples none, one that loads inputs, or one that looks them up in registers.
_LEVELS = {BASELINE: 0, AVX2: 1, AVX512: 2, NEON: 1}

# What Linux says of an Arm CPU: entries of the auxiliary vector, and their bits, by LLVM's names.
AT_HWCAP, AT_HWCAP2 = 16, 26
HWCAPS: Final = {"dotprod": (AT_HWCAP, 1 << 20), "i8mm": (AT_HWCAP2, 1 << 13)}


def isa_of(target: str) -> str:
    """The instruction set that a target extends, if it does.

    Example:
        >>> isa_of("x86-64-v4+avx512vnni")
        'x86-64-v4'
    """
    return target.partition("+")[0]


def host_architecture() -> str:
    """The architecture of this machine; one that is not known counts as the first, whose baseline is plain code.

    Example:
        >>> host_architecture() in TARGETS_OF
        True
    """
    return ARM if platform.machine() in ("aarch64", "arm64") else X86


_compiled_for = os.environ.get(COMPILE_VARIABLE, "")
# Of the code that this process runs, or compiles for others.
ARCHITECTURE: Final = next(
    (name for name, targets in TARGETS_OF.items() if _compiled_for in targets), host_architecture()
)
TARGETS: Final = TARGETS_OF[ARCHITECTURE]
EVERY_ISA: Final = tuple(target for targets in TARGETS_OF.values() for target in targets if target == isa_of(target))
ISAS: Final = tuple(isa for isa in EVERY_ISA if isa in TARGETS)  # from the oldest to the newest


def level_of(isa: str) -> int:
    """What the plan knows of an instruction set, or of a target that extends it: which kernels it has.

    Example:
        >>> [level_of(isa) for isa in ("x86-64", "x86-64-v3", "x86-64-v4", "aarch64")]
        [0, 1, 2, 1]
    """
    return _LEVELS[isa_of(isa)]


def _host_features() -> dict[str, bool]:
    """What this CPU has, by LLVM's names."""
    if ARCHITECTURE == X86:
        import llvmlite.binding as llvm

        return dict(llvm.get_host_cpu_features())
    # As the operator library asks for them, which must choose as torch's operators do; LLVM does not know all of them.
    if platform.system() != "Linux":
        return {}
    ask = ctypes.CDLL(None).getauxval
    ask.argtypes, ask.restype = [ctypes.c_ulong], ctypes.c_ulong
    return {name: bool(ask(entry) & bit) for name, (entry, bit) in HWCAPS.items()}


def host_target() -> str:
    """The newest target that this CPU has, or the one that SRIGL_FX_ISA asks for.

    On architectures that are not known it is the first of all, whose kernels are plain loops.

    Raises:
        LibraryError: SRIGL_FX_ISA names one that is unknown, or that this CPU lacks.

    Example:
        >>> host_target() in TARGETS
        True
    """
    features = _host_features()
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
        >>> llvm_names("x86-64-v4+avx512vnni"), llvm_names("x86-64"), llvm_names("aarch64+dotprod")
        (('x86-64-v4', '+avx512vnni'), ('x86-64', ''), ('generic', '+dotprod'))
    """
    cpu, *features = target.split("+")
    return "generic" if cpu == NEON else cpu, ",".join(f"+{name}" for name in features)
