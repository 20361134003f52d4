"""Tasks of the kernels on an emulated processor, so that instruction sets that this CPU lacks are tested, too.

A plugin of pytest (``-p kernel_support.emulated``), for ``SRIGL_FX_ISA`` set to any x86-64 target. The machine code of
the operator library runs in Bochs (the package bochscpu-python) on this process's own memory: its page tables map the
process's addresses to themselves, and Bochs asks for a page when it is first touched. The processor that Bochs emulates
has AVX-512 and VBMI, but no VNNI; the one instruction of VNNI that the kernels use is computed here (``vnni.py``).
"""

import ctypes
import mmap
import os
import struct
import sys
from collections.abc import Callable
from typing import Any

import bochscpu
import bochscpu.cpu
import bochscpu.memory
import llvmlite.binding as llvm
import numpy as np
import pytest

from kernel_support import vnni
from srigl_fx.runtime.cpu import entries, threads
from srigl_fx.runtime.cpu.kernels import isa

PAGE = 4096
GIGABYTE = 1 << 30  # the tables map pages of this size
ROOM = 16  # gigabytes that the process may map later, on each side of what it has
TABLES = 64  # at physical page 1, below the first gigabyte that is mapped
PRESENT, LARGE = 0b111, 0x80  # writable, for all; a page at this level
LOWER_HALF = 1 << 47  # where programs are
STACK = 1 << 20
UNDEFINED = b"\x0f\x0b"  # an instruction that no processor has
INVALID_OPCODE = 6
CODE_SEGMENT, DATA_SEGMENT = (0x10, 0x209B), (0x18, 0xCF3)  # selector and attributes, 64 bits
XSAVE, SSE = 1 << 18, (1 << 9) | (1 << 10)  # of CR4
ALL_VECTORS = 0xE7  # of XCR0: x87, SSE, AVX, AVX-512
MASKED = 0x1F80  # of MXCSR: no exceptions of floating point
WORD = (1 << 64) - 1
_status: list[int] = []
ARCH_PRCTL, GET_FS = 158, 0x1003  # a call of Linux on x86-64


class Processor:
    """A processor that calls functions in this process's memory, and runs them itself."""

    def __init__(self) -> None:
        self.session = bochscpu.Session()
        self.session.missing_page_handler = self._map_page
        self.hook = bochscpu.Hook()
        self.hook.exception = self._on_exception
        self.tables, self.stack = mmap.mmap(-1, TABLES * PAGE), mmap.mmap(-1, STACK)
        for i in range(TABLES):
            bochscpu.memory.page_insert((i + 1) * PAGE, address_of(self.tables) + i * PAGE)
        self.stack[:2] = UNDEFINED  # what functions return to
        self.places: dict[int, int] = {}  # of a gigabyte of physical memory: that of addresses
        self.fault: tuple[int, int] | None = None
        self._map_addresses()

    def call(self, address: int, *arguments: int) -> None:
        """Run a function of up to four integers to its end.

        Raises:
            RuntimeError: It did what the processor refuses.
        """
        self.session.cpu.state = self._state_before(address, arguments)
        while True:
            self.fault = None
            self.session.run([self.hook])
            state = self.session.cpu.state
            if state.rip == address_of(self.stack) + len(UNDEFINED):
                return
            if self.fault is None or self.fault[0] != INVALID_OPCODE or not vnni.execute(state):
                code = ctypes.string_at(state.rip - 12, 12).hex(" ")
                raise RuntimeError(f"exception {self.fault} at the end of {code}, address {state.cr2:#x}")
            self.session.cpu.state = state

    def _state_before(self, address: int, arguments: tuple[int, ...]) -> Any:
        state = bochscpu.State()
        bochscpu.cpu.set_long_mode(state)
        state.cr3 = PAGE
        state.cr4 |= XSAVE | SSE
        state.xcr0, state.mxcsr, state.mxcsr_mask, state.rflags = ALL_VECTORS, MASKED, 0xFFFF, 2
        code, data = segment(*CODE_SEGMENT), segment(*DATA_SEGMENT)
        state.cs = code
        state.ds = state.es = state.ss = state.gs = data
        state.fs = segment(*DATA_SEGMENT, base=thread_pointer())
        top = STACK - 64 - 8  # as a call leaves it: eight bytes below a multiple of 16
        struct.pack_into("<Q", self.stack, top, address_of(self.stack))
        state.rsp, state.rip = address_of(self.stack) + top, address
        for name, value in zip(("rdi", "rsi", "rdx", "rcx"), arguments, strict=False):
            setattr(state, name, value & WORD)
        return state

    def _map_addresses(self) -> None:
        """Write page tables for all that the process has mapped by now, and for some gigabytes around that."""
        used: set[int] = set()
        with open("/proc/self/maps", encoding="ascii") as lines:
            for line in lines:
                start, end = (int(number, 16) for number in line.split()[0].split("-"))
                if start < LOWER_HALF:
                    used.update(range(start // GIGABYTE - ROOM, (end - 1) // GIGABYTE + 1 + ROOM))
        tables = np.frombuffer(self.tables, np.uint64).reshape(TABLES, 512)
        tables[:] = 0
        second = {index: i for i, index in enumerate(sorted({place >> 9 for place in used}), 1)}
        for index, i in second.items():
            tables[0, index] = (i + 1) * PAGE | PRESENT
        for slot, place in enumerate(used, 1):
            self.places[slot] = place
            tables[second[place >> 9], place & 511] = slot * GIGABYTE | PRESENT | LARGE

    def _map_page(self, physical: int) -> None:
        start = physical // PAGE * PAGE
        bochscpu.memory.page_insert(start, self.places[physical // GIGABYTE] * GIGABYTE + start % GIGABYTE)

    def _on_exception(self, session: Any, cpu: int, vector: int, code: int) -> None:
        self.fault = vector, code
        session.stop()


def address_of(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def thread_pointer() -> int:
    """Where this thread's own variables are, which the loader reads when it looks for a function of the C library."""
    found = ctypes.c_uint64()
    if ctypes.CDLL(None, use_errno=True).syscall(ARCH_PRCTL, GET_FS, ctypes.byref(found)):
        raise OSError(ctypes.get_errno(), "arch_prctl")
    return found.value


def segment(selector: int, attributes: int, base: int = 0) -> Any:
    """A segment of all memory."""
    found = bochscpu.Segment()
    found.present, found.selector, found.base, found.limit, found.attr = True, selector, base, 0xFFFFFFFF, attributes
    return found


def pytest_configure(config: pytest.Config) -> None:
    """Have the tasks of SRIGL_FX_ISA run on the processor, one after another."""
    target = os.environ[isa.ISA_VARIABLE]
    processor = Processor()
    features = dict.fromkeys((*isa._FEATURES[isa.isa_of(target)], *target.split("+")[1:]), True)
    llvm.get_host_cpu_features = lambda: features
    threads._forked = True

    def emulated(address: int) -> Callable[[int, int], None]:
        return lambda job, number: processor.call(address, job, number)

    vars(entries)["_Function"] = emulated
    vars(entries)["_compile"] = _no_compiler


def pytest_sessionfinish(exitstatus: int) -> None:
    """Keep the status for the end."""
    _status.append(int(exitstatus))


def pytest_unconfigure() -> None:
    """End the process here: Bochs does not outlive the interpreter's own end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(_status[0] if _status else 1)


def _no_compiler(name: str) -> int:
    raise RuntimeError(f"the operator library has to be there, and has no {name}")
