"""What an architecture's object files ask of a linker: kinds of relocation, and how each is written.

Owns that part of ELF (the supplements of AMD64 and of AArch64 to the System V ABI) for what the compiled kernels and
shim contain. It must not know sections and symbols, which are for :mod:`srigl_fx.runtime.ort.elf`.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from srigl_fx.errors import LibraryError
from srigl_fx.runtime.cpu.kernels.isa import ARM, X86

STUB_SIZE: Final = 16


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One architecture.

    Attributes:
        name: As Linux calls it.
        number: As ELF does.
        page: The largest page that its systems have; segments start at multiples of it.
        absolute: The kind of relocation that writes an address of eight bytes, in object files and in libraries.
        through_table: The kinds that want the address of a slot of the global offset table.
        calls: Those of calls, which may go through a stub.
        direct: Those of other places in the same library.
        from_table: The kind that fills a slot with the address of an import, in a library.
        relative: The kind that adds where a library was loaded, in a library.
        write: ``write(image, place, kind, value)`` writes a symbol's or a slot's address, with the addend, at a place.
        stub: ``stub(at, slot)``: the code at an address that jumps to where a slot says.
    """

    name: str
    number: int
    page: int
    absolute: int
    through_table: frozenset[int]
    calls: frozenset[int]
    direct: frozenset[int]
    from_table: int
    relative: int
    write: Callable[[bytearray, int, int, int], None]
    stub: Callable[[int, int], bytes]


def _within(value: int, bits: int) -> int:
    """A signed number that must fit into so many bits, as these bits."""
    if not -(1 << bits - 1) <= value < 1 << bits - 1:
        raise LibraryError(f"cannot link: something is {value:+d} away, which {bits} bits cannot say")
    return value & (1 << bits) - 1


def _write_x86(image: bytearray, place: int, kind: int, value: int) -> None:
    struct.pack_into("<I", image, place, _within(value - place, 32))


def _stub_x86(at: int, slot: int) -> bytes:
    return b"\xff\x25" + struct.pack("<i", slot - (at + 6))  # jmp *displacement(%rip)


_PC32, _PLT32 = 2, 4
_GOTPCREL, _GOTPCRELX, _REX_GOTPCRELX = 9, 41, 42

_PREL32, _ADR_PREL_PG_HI21, _ADD_ABS_LO12_NC = 261, 275, 277
_JUMP26, _CALL26, _ADR_GOT_PAGE, _LD64_GOT_LO12_NC = 282, 283, 311, 312
# How many bytes those load or store that have the low bits of an address, as an exponent of two.
_LOADS = {278: 0, 284: 1, 285: 2, 286: 3, 299: 4, _LD64_GOT_LO12_NC: 3}
_ADR_PAGES = 12  # bits of the pages that are counted by ADRP, whatever those of the system


def _with_field(image: bytearray, place: int, field: int, bits: int, at: int) -> None:
    """Put a number into some bits of an instruction."""
    (word,) = struct.unpack_from("<I", image, place)
    struct.pack_into("<I", image, place, word & ~((1 << bits) - 1 << at) | field << at)


def _set_pages(image: bytearray, place: int, pages: int) -> None:
    """Let the ADRP at a place name an address so many pages away."""
    field = _within(pages, 21)
    _with_field(image, place, field & 3, 2, 29)
    _with_field(image, place, field >> 2, 19, 5)


def _write_arm(image: bytearray, place: int, kind: int, value: int) -> None:
    if kind == _PREL32:
        struct.pack_into("<I", image, place, _within(value - place, 32))
    elif kind in (_ADR_PREL_PG_HI21, _ADR_GOT_PAGE):
        _set_pages(image, place, (value >> _ADR_PAGES) - (place >> _ADR_PAGES))
    elif kind in (_JUMP26, _CALL26):
        if (value - place) % 4:
            raise LibraryError(f"cannot link: a jump to {value:#x}, where no instruction can be")
        _with_field(image, place, _within(value - place, 28) >> 2, 26, 0)
    else:
        size = _LOADS.get(kind, 0)
        if value % (1 << size):
            raise LibraryError(f"cannot link: {1 << size} bytes are read from {value:#x}, which is no multiple of that")
        _with_field(image, place, (value & (1 << _ADR_PAGES) - 1) >> size, 12, 10)


def _stub_arm(at: int, slot: int) -> bytes:
    code = bytearray(struct.pack("<3I", 0x90000010, 0xF9400211, 0xD61F0220))  # adrp x16; ldr x17, [x16]; br x17
    _set_pages(code, 0, (slot >> _ADR_PAGES) - (at >> _ADR_PAGES))
    _write_arm(code, 4, _LD64_GOT_LO12_NC, slot)
    return bytes(code)


MACHINES: Final = (
    Machine(
        name=X86,
        number=62,
        page=4096,
        absolute=1,
        through_table=frozenset({_GOTPCREL, _GOTPCRELX, _REX_GOTPCRELX}),
        calls=frozenset({_PLT32}),
        direct=frozenset({_PC32}),
        from_table=6,
        relative=8,
        write=_write_x86,
        stub=_stub_x86,
    ),
    Machine(
        name=ARM,
        number=183,
        page=1 << 16,
        absolute=257,
        through_table=frozenset({_ADR_GOT_PAGE, _LD64_GOT_LO12_NC}),
        calls=frozenset({_JUMP26, _CALL26}),
        direct=frozenset({_PREL32, _ADR_PREL_PG_HI21, _ADD_ABS_LO12_NC} | set(_LOADS) - {_LD64_GOT_LO12_NC}),
        from_table=1025,
        relative=1027,
        write=_write_arm,
        stub=_stub_arm,
    ),
)
