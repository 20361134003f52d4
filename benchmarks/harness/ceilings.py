"""What the machine can do: bytes read a second from each cache and memory, multiply-adds a second, on one thread.

Owns the loops, written in LLVM's own language so that no compiler's taste is measured, and the time below which a cell
cannot go. It must not know the contenders.
"""

import csv
import ctypes
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harness.machine import cache_bytes, cpu_flags

ACCUMULATORS = 12  # more than latency times throughput of any core's FMA units
MEMORY_BUFFER = 1 << 30
# What the sparse loop reads, one after the other: inputs, weights, and as many indices.
INPUT_BYTES, VALUE_BYTES, ENTRIES = 16384, 4096, 768
ROUNDS = 7

_LOOP = """
define void @sweep(ptr %x, ptr %y, i64 %groups, i64 %repeats) {{
entry:
  %factor = load <{lanes} x float>, ptr %y, align 4
  br label %outer
outer:
  %turn = phi i64 [0, %entry], [%next_turn, %outer_end]
  {outer_phis}
  br label %inner
inner:
  %group = phi i64 [0, %outer], [%next_group, %inner]
  {inner_phis}
  %first = mul i64 %group, {accumulators}
  {steps}
  %next_group = add i64 %group, 1
  %more = icmp slt i64 %next_group, %groups
  br i1 %more, label %inner, label %outer_end
outer_end:
  %next_turn = add i64 %turn, 1
  %again = icmp slt i64 %next_turn, %repeats
  br i1 %again, label %outer, label %done
done:
  {stores}
  ret void
}}
declare <{lanes} x float> @llvm.fma.v{lanes}f32(<{lanes} x float>, <{lanes} x float>, <{lanes} x float>)
"""


@dataclass(frozen=True, kw_only=True)
class Level:
    """A buffer: the smallest cache that can hold it, or memory; its bytes, and the bytes read from it a second."""

    name: str
    buffer: int
    rate: float


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """What one thread reaches.

    Attributes:
        levels: Buffers in caches and memory, small ones first.
        register_fmas: Multiply-adds a second with all operands in registers.
        load_fmas: The same where each vector of multiply-adds loads one operand from the first cache.
        sparse_fmas: The same where, besides, each two vectors share a weight and the index that says where they are,
            loaded from there too: what a sparse kernel must do, and nothing else.
    """

    levels: tuple[Level, ...]
    register_fmas: float
    load_fmas: float
    sparse_fmas: float

    def limit(self, moved: int, fmas: int) -> tuple[float, str]:
        """Seconds below which nothing moves so many bytes and does so many multiply-adds, and what limits it.

        Example:
            >>> ceilings = Ceilings(levels=(Level(name="L2", buffer=100, rate=10.0),), register_fmas=2.0, load_fmas=1.0,
            ...     sparse_fmas=0.9)
            >>> ceilings.limit(20, 1), ceilings.limit(20, 5)
            ((2.0, 'bytes from L2'), (5.0, 'multiply-adds'))
        """
        rate, name = self._read(moved)
        return max((moved / rate, f"bytes from {name}"), (fmas / self.load_fmas, "multiply-adds"))

    def _read(self, nbytes: int) -> tuple[float, str]:
        """Bytes a second read from a buffer of this size, between the measured sizes by their logarithms."""
        sizes = [math.log(level.buffer) for level in self.levels]
        rates = [math.log(level.rate) for level in self.levels]
        rate = math.exp(float(np.interp(math.log(max(1, nbytes)), sizes, rates)))
        return rate, next((level.name for level in self.levels if nbytes <= level.buffer), self.levels[-1].name)


def lanes() -> int:
    """Floats in the widest vector register."""
    flags = cpu_flags()
    return 16 if "avx512f" in flags else 8 if "avx2" in flags else 4


def _dense_steps(width: int, *, load: bool) -> list[str]:
    """Multiply-adds of one vector after the other, or of a register without ``load``."""
    vector = f"<{width} x float>"
    steps = []
    for i in range(ACCUMULATORS):
        if load:
            steps += [
                f"%place{i} = add i64 %first, {i}",
                f"%at{i} = getelementptr {vector}, ptr %x, i64 %place{i}",
                f"%operand{i} = load {vector}, ptr %at{i}, align {4 * width}",
            ]
        operand = f"%operand{i}" if load else "%factor"
        arguments = ", ".join(f"{vector} {name}" for name in (operand, "%factor", f"%sum{i}"))
        steps.append(f"%new{i} = call {vector} @llvm.fma.v{width}f32({arguments})")
    return steps


def _sparse_steps(width: int) -> list[str]:
    """Multiply-adds of two vectors for each weight, where its index says."""
    vector = f"<{width} x float>"
    steps = ["%entry0 = lshr i64 %first, 1"]
    for i in range(0, ACCUMULATORS, 2):
        steps += [
            f"%entry{i}a = add i64 %entry0, {i // 2 + INPUT_BYTES // 4}",
            f"%value_at{i} = getelementptr float, ptr %x, i64 %entry{i}a",
            f"%value{i} = load float, ptr %value_at{i}, align 4",
            f"%lone{i} = insertelement {vector} undef, float %value{i}, i32 0",
            f"%weight{i} = shufflevector {vector} %lone{i}, {vector} undef, <{width} x i32> zeroinitializer",
            f"%entry{i}b = add i64 %entry0, {i // 2 + (INPUT_BYTES + VALUE_BYTES) // 2}",
            f"%index_at{i} = getelementptr i16, ptr %x, i64 %entry{i}b",
            f"%short{i} = load i16, ptr %index_at{i}, align 2",
            f"%index{i} = zext i16 %short{i} to i64",
            f"%at{i} = getelementptr i64, ptr %x, i64 %index{i}",
            f"%at{i + 1} = getelementptr {vector}, ptr %at{i}, i64 1",
        ]
        for j in (i, i + 1):
            steps += [
                f"%operand{j} = load {vector}, ptr %at{j}, align {4 * width}",
                f"%new{j} = call {vector} @llvm.fma.v{width}f32("
                f"{vector} %operand{j}, {vector} %weight{i}, {vector} %sum{j})",
            ]
    return steps


def _assembly(width: int, steps: list[str]) -> str:
    """LLVM code that goes ``repeats`` times over groups of vectors of x, each vector into an accumulator of its own."""
    numbers = range(ACCUMULATORS)
    vector = f"<{width} x float>"
    stores = []
    for i in numbers:
        stores += [
            f"%to{i} = getelementptr {vector}, ptr %y, i64 {i}",
            f"store {vector} %new{i}, ptr %to{i}, align 4",
        ]
    between = "\n  "
    return _LOOP.format(
        lanes=width,
        accumulators=ACCUMULATORS,
        outer_phis=between.join(
            f"%kept{i} = phi {vector} [zeroinitializer, %entry], [%new{i}, %outer_end]" for i in numbers
        ),
        inner_phis=between.join(f"%sum{i} = phi {vector} [%kept{i}, %outer], [%new{i}, %inner]" for i in numbers),
        steps=between.join(steps),
        stores=between.join(stores),
    )


def _compiled(code: str) -> tuple[Callable[[int, int, int, int], None], object]:
    """The loop as a function of (x, y, groups, repeats), and what keeps its machine code alive."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=2
    )
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(code), machine)
    engine.finalize_object()
    prototype = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
    return prototype(engine.get_function_address("sweep")), engine


def register_loop() -> Callable[[int], None]:
    """Multiply-adds in registers alone, so many times over; it may run in several threads at once."""
    width = lanes()
    loop, keep = _compiled(_assembly(width, _dense_steps(width, load=False)))

    def run(repeats: int, keep: object = keep) -> None:
        y = np.empty(ACCUMULATORS * width, np.float32)
        loop(0, y.ctypes.data, 1, repeats)

    return run


def measure_ceilings(seconds: float = 0.1, largest: int = MEMORY_BUFFER) -> Ceilings:
    """Measure them; the best of a few rounds counts, as it is what the machine can do.

    Args:
        seconds: Of each round.
        largest: Bytes of the largest buffer; each is twice the one before.
    """
    width = lanes()
    group = ACCUMULATORS * width * 4
    caches = cache_bytes() or {1: 32 << 10, 2: 1 << 20, 3: 16 << 20}
    sizes = [min(caches[1] // 2, largest)]
    while 2 * sizes[-1] <= largest:
        sizes.append(2 * sizes[-1])
    buffer = np.ones(sizes[-1] // 4 + width, np.float32)
    x = -(-buffer.ctypes.data // 64) * 64
    y = np.ones(ACCUMULATORS * width, np.float32)
    loads, keep_loads = _compiled(_assembly(width, _dense_steps(width, load=True)))
    registers, keep_registers = _compiled(_assembly(width, _dense_steps(width, load=False)))
    sparse, keep_sparse = _compiled(_assembly(width, _sparse_steps(width)))

    def rate(loop: Callable[[int, int, int, int], None], nbytes: int) -> float:
        """Multiply-adds a second over the first ``nbytes`` of the buffer."""
        groups, repeats, best = max(1, (nbytes - 64) // group), 1, 0.0
        for _ in range(ROUNDS):
            start = time.perf_counter()
            loop(x, y.ctypes.data, groups, repeats)
            taken = time.perf_counter() - start
            best = max(best, groups * repeats * ACCUMULATORS * width / taken)
            repeats = max(1, int(repeats * seconds / taken))
        return best

    levels = []
    for size in sizes:
        name = next((f"L{level}" for level, capacity in caches.items() if size <= capacity), "memory")
        levels.append(Level(name=name, buffer=size, rate=4 * rate(loads, size)))
    # Inputs, weights and indices, in the places that the loop has for them: INPUT_BYTES hold so many pairs of vectors.
    pairs = INPUT_BYTES // (8 * width)
    order = np.random.default_rng(0).integers(0, pairs, ENTRIES) * width  # in units of 8 bytes
    first = (x - buffer.ctypes.data) // 4 + (INPUT_BYTES + VALUE_BYTES) // 4
    buffer[first : first + ENTRIES // 2] = order.astype(np.uint16).view(np.float32)
    ceilings = Ceilings(
        levels=tuple(levels),
        register_fmas=rate(registers, levels[0].buffer),
        load_fmas=levels[0].rate / 4,
        sparse_fmas=rate(sparse, ENTRIES * 2 * width * 4 + 64),
    )
    del keep_loads, keep_registers, keep_sparse
    return ceilings


def write_ceilings(path: Path, ceilings: Ceilings) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("name", "buffer", "rate"))
        writer.writerow(("register FMAs", 0, f"{ceilings.register_fmas:.6e}"))
        writer.writerow(("load FMAs", 0, f"{ceilings.load_fmas:.6e}"))
        writer.writerow(("sparse FMAs", 0, f"{ceilings.sparse_fmas:.6e}"))
        writer.writerows((level.name, level.buffer, f"{level.rate:.6e}") for level in ceilings.levels)


def read_ceilings(path: Path) -> Ceilings:
    with path.open(newline="", encoding="utf-8") as file:
        rows = [(row["name"], int(row["buffer"]), float(row["rate"])) for row in csv.DictReader(file)]
    return Ceilings(
        levels=tuple(Level(name=name, buffer=buffer, rate=rate) for name, buffer, rate in rows[3:]),
        register_fmas=rows[0][2],
        load_fmas=rows[1][2],
        sparse_fmas=rows[2][2],
    )
