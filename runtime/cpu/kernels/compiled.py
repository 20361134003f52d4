"""For which instruction set, and how, Numba compiles the kernels of this process."""

from collections.abc import Callable
from typing import Any, Final

import numba as typed_numba
import numba.extending as typed_extending

from srigl_fx.runtime.cpu.kernels import plan
from srigl_fx.runtime.cpu.kernels.isa import (
    AVX2,
    AVX512,
    BASELINE,
    NARROW_TILES,
    NEON,
    compiled_target,
    isa_of,
    level_of,
)

numba: Any = typed_numba  # half of its functions are annotated
extending: Any = typed_extending

TARGET: Final = compiled_target()
ISA: Final = isa_of(TARGET)
BYTE_PRODUCTS: Final = "vnni" in TARGET or ISA == NEON  # of four bytes with four, summed up in a lane
BYTE_LOOKUP: Final = "vbmi" in TARGET  # of bytes, in registers
# Of unsigned bytes with signed ones, two neighbours' summed up in 16 bits: these must not overflow, so the weights that
# a panel has beside each other are chosen.
BYTE_PAIRS: Final = ISA in (AVX2, AVX512) and not BYTE_PRODUCTS
NARROW: Final = TARGET in NARROW_TILES  # whether tiles of bytes have 32 or 48 columns, too
FASTMATH: Final = {"reassoc", "contract", "nsz"}  # sums may be reordered; NaN and infinity keep their meaning
REGISTERS: Final = {BASELINE: 2, AVX2: 4, AVX512: 8, NEON: 4}[ISA]  # vectors of 16 sums in flight
SAMPLES: Final = plan.innermost_samples(level_of(ISA))  # of a block that lie innermost
SAMPLE_BYTES: Final = 4 * SAMPLES


def compiled(function: Callable[..., Any]) -> Any:
    """A function that kernels can call."""
    return numba.njit(error_model="numpy", fastmath=FASTMATH)(function)


def planned(rule: Callable[..., Any]) -> Any:
    """A rule of the plan, with the rules that it asks, as a function that kernels can call."""
    for name, asked in vars(plan).items():
        if name in rule.__code__.co_names and callable(asked):
            extending.register_jitable(asked)
    return numba.njit(error_model="numpy")(rule)
