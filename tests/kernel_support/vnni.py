"""The instruction vpdpbusd, for a processor that is emulated without it: decoded, and computed with NumPy.

Both encodings, with 128 to 512 bits, without masks, are known, as Intel's manual of instructions has them: to each
32-bit word of the sums, four products of unsigned bytes (the second operand) and signed bytes (the third) are added.
"""

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np

OPCODE = 0x50
LONGEST, SHORTEST = 12, 5
REGISTERS = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{i}" for i in range(8, 16)))
NO_INDEX, RELATIVE = 4, 5


@dataclass(frozen=True)
class Instruction:
    """Registers of vectors by number; the third operand is one (``register``) or lies in memory.

    Attributes:
        sums: What is added to.
        unsigned: The second operand.
        register: The third operand, or None.
        base: The address's register, or "rip".
        index: Another register, times ``scale``, or None.
        scale: 1, 2, 4 or 8.
        offset: Bytes.
        broadcast: Whether one word of memory is taken for all.
        vector: Bytes of a vector.
    """

    sums: int
    unsigned: int
    register: int | None
    base: str | None
    index: str | None
    scale: int
    offset: int
    broadcast: bool
    vector: int


def decode(code: bytes) -> tuple[Instruction, int] | None:
    """The instruction that ``code`` starts with, and its length; None where it is another one."""
    if code[0] == 0x62:
        p0, p1, p2, opcode, modrm = code[1:6]
        mask, kind, wide, at = p2 & 7, p0 & 0xF, p1 & 0x87, 6
        vector, broadcast = 16 << (p2 >> 5 & 3), bool(p2 & 0x10)
        unsigned = (~p1 >> 3 & 15) | (~p2 >> 3 & 1) << 4
        high = (~p0 >> 4 & 1) << 4
        found = kind == 2 and wide == 0b101 and not mask
    elif code[0] == 0xC4:
        p0, p1, opcode, modrm = code[1:5]
        at, vector, broadcast = 5, 16 << (p1 >> 2 & 1), False
        unsigned, high = ~p1 >> 3 & 15, 0
        found = p0 & 0x1F == 2 and p1 & 0x83 == 1
    else:
        return None
    if not found or opcode != OPCODE:
        return None
    r, x, b = ((~p0 >> bit & 1) << 3 for bit in (7, 6, 5))
    sums = modrm >> 3 & 7 | r | high
    mode, rm = modrm >> 6, modrm & 7
    if mode == 3:
        third = rm | b | (x << 1 if code[0] == 0x62 else 0)
        return Instruction(sums, unsigned, third, None, None, 1, 0, False, vector), at
    base: str | None = REGISTERS[rm | b]
    index, scale = None, 1
    if rm == NO_INDEX:
        sib, at = code[at], at + 1
        scale, number = 1 << (sib >> 6), sib >> 3 & 7 | x
        index = None if number == NO_INDEX else REGISTERS[number]
        base = None if sib & 7 == RELATIVE and mode == 0 else REGISTERS[sib & 7 | b]
    elif rm == RELATIVE and mode == 0:
        base = "rip"
    size = 1 if mode == 1 else 4 if mode == 2 or base in (None, "rip") else 0
    offset = int.from_bytes(code[at : at + size], "little", signed=True)
    if mode == 1 and code[0] == 0x62:
        offset *= 4 if broadcast else vector
    return Instruction(sums, unsigned, None, base, index, scale, offset, broadcast, vector), at + size


def before(end: int) -> Instruction | None:
    """The instruction that ends at an address of this process, if it is this one."""
    code = ctypes.string_at(end - LONGEST, LONGEST)
    found = [decode(code[LONGEST - size :] + bytes(LONGEST)) for size in range(SHORTEST, LONGEST + 1)]
    fitting = [it[0] for size, it in enumerate(found, SHORTEST) if it is not None and it[1] == size]
    return fitting[0] if len(fitting) == 1 else None


def execute(state: Any) -> bool:
    """Compute the instruction that ends at ``rip`` on the registers of ``state``; False where it is another one."""
    found = before(state.rip)
    if found is None:
        return False
    vectors = state.zmm
    sums = _bytes(vectors[found.sums])[: found.vector].view(np.int32)
    unsigned = _bytes(vectors[found.unsigned])[: found.vector]
    if found.register is not None:
        third = _bytes(vectors[found.register])[: found.vector]
    else:
        place = found.offset + (0 if found.base is None else getattr(state, found.base))
        place += 0 if found.index is None else getattr(state, found.index) * found.scale
        size = 4 if found.broadcast else found.vector
        third = np.resize(np.frombuffer(ctypes.string_at(place % 2**64, size), np.uint8), found.vector)
    products = unsigned.astype(np.int32) * third.view(np.int8).astype(np.int32)
    result = np.zeros(64, np.uint8)  # bits above the vector become zero
    result[: found.vector] = (sums + products.reshape(-1, 4).sum(1, dtype=np.int32)).view(np.uint8)
    vectors[found.sums].q = result.view(np.uint64).tolist()
    state.zmm = vectors
    return True


def _bytes(vector: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.array(vector.q, np.uint64).view(np.uint8)
