"""What the CPU that loads the operator library can run.

Owns the questions, for each architecture, as functions that Numba compiles ahead of time. It must not know what is done
with the answers.
"""

from srigl_fx.runtime.cpu.kernels import isa
from srigl_fx.runtime.ort.primitives import cpuid, external, inlined, load, stack, xgetbv

_getauxval = external("getauxval", 1)

# Feature bits of cpuid leaf 1 (ecx) and leaf 7 (ebx), and the register states of xgetbv.
_LEAF1_V3 = 1 << 12 | 1 << 22 | 1 << 27 | 1 << 28 | 1 << 29  # FMA MOVBE OSXSAVE AVX F16C
_LEAF7_V3 = 1 << 3 | 1 << 5 | 1 << 8  # BMI1 AVX2 BMI2
_LEAF7_VBMI, _LEAF7_VNNI = 1 << 1, 1 << 11  # of its ecx
_LEAF7_1_AVX_VNNI = 1 << 4  # of subleaf 1, eax
_LEAF7_V4 = 1 << 16 | 1 << 17 | 1 << 28 | 1 << 30 | 1 << 31  # AVX-512 F DQ CD BW VL
_AVX_STATE, _AVX512_STATE = 0x06, 0xE6
_HWCAP, _HWCAP2 = isa.AT_HWCAP, isa.AT_HWCAP2
_DOT_BIT, _I8MM_BIT = isa.HWCAPS["dotprod"][1], isa.HWCAPS["i8mm"][1]


@inlined
def _usable_on_x86() -> int:
    """A bit for each of TARGETS that CPU and operating system support."""
    registers = stack(4)
    cpuid(0, 0, registers)
    leaves = load(registers, 0)
    cpuid(1, 0, registers)
    if leaves < 7 or load(registers, 16) & _LEAF1_V3 != _LEAF1_V3:
        return 1
    states = xgetbv()
    cpuid(7, 0, registers)
    subleaves, leaf7, more = load(registers, 0), load(registers, 8), load(registers, 16)
    if states & _AVX_STATE != _AVX_STATE or leaf7 & _LEAF7_V3 != _LEAF7_V3:
        return 1
    usable = 0b11
    if subleaves >= 1:
        cpuid(7, 1, registers)
        if load(registers, 0) & _LEAF7_1_AVX_VNNI != 0:
            usable |= 0b100
    if states & _AVX512_STATE == _AVX512_STATE and leaf7 & _LEAF7_V4 == _LEAF7_V4:
        usable |= 0b1000
        if more & _LEAF7_VNNI != 0:
            usable |= 0b10000 if more & _LEAF7_VBMI == 0 else 0b110000
    return usable


@inlined
def _usable_on_arm() -> int:
    """The same on Arm, as the operating system says."""
    if _getauxval(_HWCAP) & _DOT_BIT == 0:
        return 1
    return 0b11 if _getauxval(_HWCAP2) & _I8MM_BIT == 0 else 0b111


usable_targets = {isa.X86: _usable_on_x86, isa.ARM: _usable_on_arm}[isa.ARCHITECTURE]
