"""How addresses are written into instructions, and the linker for an architecture that is not this one's.

The words below are instructions as the Arm Architecture Reference Manual encodes them.
"""

import ctypes
import platform
import struct
from pathlib import Path

import pytest
from ort_support.llvm_objects import object_for

from srigl_fx.errors import LibraryError
from srigl_fx.runtime.cpu.kernels.isa import ARM, X86
from srigl_fx.runtime.ort import elf
from srigl_fx.runtime.ort.relocations import MACHINES, Machine

PREL32, ADR_PAGE, ADD_LO12 = 261, 275, 277
LOAD_1, LOAD_2, LOAD_4, LOAD_8, LOAD_16 = 278, 284, 285, 286, 299
JUMP, CALL, TABLE_PAGE, TABLE_LOAD = 282, 283, 311, 312
MACHINE = {machine.name: machine for machine in MACHINES}


def written(kind: int, word: int, place: int, value: int, machine: str = ARM) -> int:
    """The instruction at a place after a relocation."""
    image = bytearray(place + 8)
    struct.pack_into("<I", image, place, word)
    MACHINE[machine].write(image, place, kind, value)
    assert not any(image[:place])
    assert not any(image[place + 4 :])
    (found,) = struct.unpack_from("<I", image, place)
    return int(found)


@pytest.mark.parametrize(
    ("kind", "word", "place", "value", "expected"),
    [
        (ADR_PAGE, 0x90000000, 0x1004, 0x1FFF, 0x90000000),  # adrp x0, the same page
        (ADR_PAGE, 0x90000000, 0x1004, 0x2000, 0xB0000000),  # adrp x0, the next
        (ADR_PAGE, 0x90000001, 0x1FFC, 0x5678, 0x90000021),  # adrp x1, four pages on
        (ADR_PAGE, 0x90000000, 0x3000, 0x2FFF, 0xF0FFFFE0),  # adrp x0, the page before
        (ADR_PAGE, 0x9000001E, 0x0, 0xFFFFF000, 0xF07FFFFE),  # adrp x30, as far as it reaches
        (ADR_PAGE, 0x90000000, 0x0, -0x100000000, 0x90800000),
        (TABLE_PAGE, 0x90000010, 0x20, 0x10008, 0x90000090),  # adrp x16, 16 pages on
        (ADD_LO12, 0x91000021, 0x0, 0x12345, 0x910D1421),  # add x1, x1, #0x345
        (LOAD_1, 0x39400000, 0x4, 0x1FFF, 0x397FFC00),  # ldrb w0, [x0, #4095]
        (LOAD_2, 0x79400000, 0x0, 0x1FFE, 0x795FFC00),  # ldrh w0, [x0, #4094]
        (LOAD_4, 0xB9400000, 0x0, 0x5004, 0xB9400400),  # ldr w0, [x0, #4]
        (LOAD_8, 0xF9400000, 0x0, 0x5FF8, 0xF947FC00),  # ldr x0, [x0, #4088]
        (TABLE_LOAD, 0xF9400211, 0x0, 0x5010, 0xF9400A11),  # ldr x17, [x16, #16]
        (LOAD_16, 0x3DC00000, 0x0, 0x5FF0, 0x3DC3FC00),  # ldr q0, [x0, #4080]
        (CALL, 0x94000000, 0x100, 0x200, 0x94000040),  # bl, 64 instructions on
        (CALL, 0x94000000, 0x100, 0x0, 0x97FFFFC0),
        (JUMP, 0x14000000, 0x0, 0x7FFFFFC, 0x15FFFFFF),  # b, as far as it reaches
        (JUMP, 0x14000000, 0x0, -0x8000000, 0x16000000),
        (PREL32, 0x0, 0x10, 0x8, 0xFFFFFFF8),
        (PREL32, 0x0, 0x0, 0x7FFFFFFF, 0x7FFFFFFF),
    ],
)
def test_what_arm_instructions_become(kind: int, word: int, place: int, value: int, expected: int) -> None:
    assert f"{written(kind, word, place, value):#010x}" == f"{expected:#010x}"
    assert written(kind, expected, place, value) == expected, "what stood in the field before does not matter"


@pytest.mark.parametrize(
    ("machine", "kind", "value"),
    [
        (ARM, ADR_PAGE, 0x100000000),
        (ARM, ADR_PAGE, -0x100001000),
        (ARM, TABLE_PAGE, 1 << 40),
        (ARM, CALL, 0x8000000),
        (ARM, JUMP, -0x8000004),
        (ARM, PREL32, 0x80000000),
        (ARM, PREL32, -0x80000001),
        (X86, 2, 0x80000000),
        (X86, 4, -0x80000001),
    ],
)
def test_what_is_out_of_reach_is_refused(machine: str, kind: int, value: int) -> None:
    with pytest.raises(LibraryError, match=r"cannot link: something is [+-]\d+ away, which \d+ bits cannot say"):
        written(kind, 0, 0, value, machine)


@pytest.mark.parametrize(
    ("kind", "value"), [(LOAD_2, 1), (LOAD_4, 6), (LOAD_8, 12), (TABLE_LOAD, 4), (LOAD_16, 8), (CALL, 2), (JUMP, 7)]
)
def test_what_such_an_instruction_cannot_name_is_refused(kind: int, value: int) -> None:
    with pytest.raises(LibraryError, match=r"no multiple of that|where no instruction can be"):
        written(kind, 0, 0, value)


@pytest.mark.parametrize(
    ("machine", "at", "slot", "code"),
    [
        (X86, 0x1000, 0x2000, "ff25fa0f0000"),  # jmp *0xffa(%rip)
        (ARM, 0x10010, 0x20018, "90000090110e40f920021fd6"),  # adrp x16; ldr x17, [x16, #24]; br x17
    ],
)
def test_a_stub_jumps_to_what_its_slot_says(machine: str, at: int, slot: int, code: str) -> None:
    assert MACHINE[machine].stub(at, slot).hex() == code


# A function that reads a constant, writes what can be written, takes an address from the table, calls its own kind and
# the C library, and reads a table of addresses.
_PROGRAM = """
@constants = internal constant <4 x i32> <i32 1, i32 2, i32 3, i32 4>, align 16
@counter = hidden global i64 40, align 8
@names = default constant [2 x i64] [i64 ptrtoint (ptr @double to i64), i64 ptrtoint (ptr @work to i64)], align 16
declare ptr @malloc(i64)
declare void @free(ptr)
define hidden i64 @double(i64 %x) noinline {
  %y = shl i64 %x, 1
  ret i64 %y
}
define i64 @work(i64 %i) {
  %memory = call ptr @malloc(i64 64)
  %all = load volatile <4 x i32>, ptr @constants, align 16
  store volatile <4 x i32> %all, ptr %memory, align 4
  %at = getelementptr i32, ptr %memory, i64 %i
  %one = load volatile i32, ptr %at, align 4
  call void @free(ptr %memory)
  %wide = zext i32 %one to i64
  %twice = call i64 @double(i64 %wide)
  %before = load i64, ptr @counter, align 8
  %sum = add i64 %before, %twice
  store i64 %sum, ptr @counter, align 8
  ret i64 %sum
}
"""


def linked_for(architecture: str) -> bytes:
    return elf.link_shared([object_for(architecture, _PROGRAM)], exports=("work", "names"), soname="libwork.so")


@pytest.mark.skipif(platform.system() != "Linux", reason="libraries of Linux")
def test_what_is_linked_for_this_machine_runs(tmp_path: Path) -> None:
    path = tmp_path / "libwork.so"
    path.write_bytes(linked_for(platform.machine()))
    library = ctypes.CDLL(str(path))
    library.work.argtypes, library.work.restype = [ctypes.c_int64], ctypes.c_int64
    assert [library.work(i) for i in range(4)] == [42, 46, 52, 60]
    addresses = (ctypes.c_int64 * 2).in_dll(library, "names")
    assert addresses[1] == ctypes.cast(library.work, ctypes.c_void_p).value
    assert ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(addresses[0])(21) == 42
    ctypes.CDLL(None).dlclose(ctypes.c_void_p(library._handle))
    assert ctypes.CDLL(str(path)).work(0) == 62, "what is opened again is what was closed"


def program_headers(data: bytes) -> list[tuple[int, ...]]:
    """Kind, flags, offset, address, physical address, bytes in the file and in memory, alignment; of each segment."""
    (start,), (count,) = struct.unpack_from("<Q", data, 32), struct.unpack_from("<H", data, 56)
    return [struct.unpack_from("<IIQQQQQQ", data, start + 56 * i) for i in range(count)]


def dynamic_entries(data: bytes) -> dict[int, int]:
    (where,) = (header for header in program_headers(data) if header[0] == 2)
    return dict(struct.unpack_from("<QQ", data, where[2] + i) for i in range(0, where[5], 16))


@pytest.mark.parametrize("machine", MACHINES, ids=[machine.name for machine in MACHINES])
def test_a_library_is_laid_out_for_its_machine(machine: Machine) -> None:
    data = linked_for(machine.name)
    assert elf.machine_of(data, kind=elf.ET_DYN) is machine
    assert elf.machine_of(data, kind=elf.ET_REL) is None
    loaded = [header for header in program_headers(data) if header[0] == 1]
    assert [flags for _, flags, *_ in loaded] == [4, 5, 6], "read, execute, write"
    for _, _, offset, address, _, in_file, in_memory, align in loaded:
        assert align == machine.page
        assert offset == address == offset // align * align
        assert in_file <= in_memory
        assert offset + in_file <= len(data)
    ends = [address + in_memory for _, _, _, address, _, _, in_memory, _ in loaded]
    assert all(end <= following[3] for end, following in zip(ends, loaded[1:], strict=False))

    entries = dynamic_entries(data)
    relocations = [struct.unpack_from("<QQq", data, entries[7] + i) for i in range(0, entries[8], 24)]
    kinds = {info & 0xFFFFFFFF for _, info, _ in relocations}
    assert kinds == {machine.from_table, machine.relative}
    strings = data[entries[5] : entries[5] + entries[10]].split(b"\0")
    assert {b"malloc", b"free", b"work", b"names", b"libwork.so", b"libc.so.6"} <= set(strings)
    assert b"counter" not in data, "hidden names stay inside"


def test_jumps_and_addresses_of_an_arm_library_meet() -> None:
    """Decoded as a processor would: each call ends at code, each ADRP and the instruction after it at data."""
    data = linked_for(ARM)
    text, writable = (next(h for h in program_headers(data) if h[:2] == (1, flags)) for flags in (5, 6))
    words = [struct.unpack_from("<I", data, at)[0] for at in range(text[2], text[2] + text[5], 4)]
    calls, slots, pages = set(), [], {}
    for i, word in enumerate(words):
        at = text[3] + 4 * i
        if word >> 26 == 0b100101:  # bl
            offset = word & 0x3FFFFFF
            calls.add(at + 4 * (offset - (1 << 26 if offset >> 25 else 0)))
        if word & 0x9F000000 == 0x90000000:  # adrp
            number = (word >> 5 & 0x7FFFF) << 2 | word >> 29 & 3
            pages[word & 31] = (at >> 12 << 12) + ((number - (1 << 21 if number >> 20 else 0)) << 12)
        if word & 0xFFC00000 == 0xF9400000 and (word >> 5 & 31) == 16:  # ldr from x16: a stub
            slots.append(pages[16] + (word >> 10 & 0xFFF) * 8)
    assert len(calls) == 3, "malloc, free, and its own"
    assert all(text[3] <= place < text[3] + text[5] for place in calls)
    entries = dynamic_entries(data)
    relocations = [struct.unpack_from("<QQq", data, entries[7] + i) for i in range(0, entries[8], 24)]
    filled = {place for place, info, _ in relocations if info & 0xFFFFFFFF == 1025}
    assert sorted(slots) == sorted(filled)
    assert all(writable[3] <= place < writable[3] + writable[5] for place in filled)


def test_objects_of_two_architectures_are_not_one_library() -> None:
    with pytest.raises(LibraryError, match=r"cannot link libboth\.so: some objects are for x86_64, and some are not"):
        elf.link_shared(
            [object_for(X86, _PROGRAM), object_for(ARM, "define i64 @other() {\n  ret i64 1\n}")],
            exports=("work",),
            soname="libboth.so",
        )


def test_a_relocation_that_is_not_known_is_refused() -> None:
    program = "@place = external thread_local global i64\ndefine ptr @work() {\n  ret ptr @place\n}"
    for architecture in (X86, ARM):
        with pytest.raises(LibraryError, match=r"relocation type \d+ of 'place'"):
            elf.link_shared([object_for(architecture, program)], exports=("work",), soname="libwork.so")
