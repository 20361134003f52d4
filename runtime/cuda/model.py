"""How long a CUDA kernel should take: bytes, wavefronts of shared memory and instructions, against a GPU's limits.

Owns the limits of GPUs and the arithmetic of prediction; the plan asks it. It must not know kernels' loops, tensors or
drivers. Nothing of it was fitted to a measurement: wavefronts and instructions are counted in the machine code of the
inner loops, bandwidths are what data sheets or published micro-benchmarks say.
"""

import math
from dataclasses import dataclass
from typing import Final

from srigl_fx.runtime.cuda.table import CudaKernel


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """The limits of a GPU.

    Attributes:
        name: Of the model.
        multiprocessors: How many it has.
        clock: Cycles a second, sustained.
        shared_of_block: Bytes of shared memory that one block may have at most.
        shared: Bytes of shared memory of a multiprocessor.
        memory: Bytes a second from its memory.
    """

    name: str
    multiprocessors: int
    clock: float
    shared_of_block: int
    shared: int
    memory: float


GPUS: Final = (
    Gpu(
        name="H200",
        multiprocessors=132,
        clock=1.75e9,
        shared_of_block=227 << 10,
        shared=228 << 10,
        memory=4.8e12,
    ),
    Gpu(
        name="H100",
        multiprocessors=132,
        clock=1.75e9,
        shared_of_block=227 << 10,
        shared=228 << 10,
        memory=3.35e12,
    ),
    Gpu(
        name="A100",
        multiprocessors=108,
        clock=1.41e9,
        shared_of_block=163 << 10,
        shared=164 << 10,
        memory=2.0e12,
    ),
)
CACHE_BYTES: Final = 24  # that a multiprocessor takes from the level-2 cache in a cycle, all of them at once
REGISTERS, THREADS, SCHEDULERS, RESERVED = (
    65536,
    2048,
    4,
    1 << 10,
)  # of a multiprocessor; shared bytes kept by each block
LAUNCH: Final = 2.5e-6  # seconds from one kernel's end to the next one's work, in a graph
# Of 32 lanes that read from places at random: one word each, and four words each in four parts of eight lanes.
CONFLICTS: Final = {1: 3.5, 2: 5.2, 4: 9.6}
# Instructions of a step of four weights beside its multiply-adds, as counted in the machine code (sm_90).
STEP_INSTRUCTIONS: Final = 42
ROW_INSTRUCTIONS: Final = 14  # of a row in a window, beside its steps


@dataclass(frozen=True, kw_only=True)
class Layer:
    """The sizes that decide.

    Attributes:
        in_features: Inputs.
        n: Outputs.
        n_active: Outputs that are not ablated.
        k: Kept weights of each.
        value_bytes: Of one stored value.
    """

    in_features: int
    n: int
    n_active: int
    k: int
    value_bytes: int = 4


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a launch should take.

    Attributes:
        seconds: All in all.
        blocks: Of the launch.
        resident: Blocks that a multiprocessor has at once.
        bound: What it waits for: "memory", "cache", "shared memory", "instructions" or "launch".
    """

    seconds: float
    blocks: int
    resident: int
    bound: str


def resident_blocks(gpu: Gpu, threads: int, registers: int, shared_bytes: int) -> int:
    """How many blocks fit on a multiprocessor side by side.

    Example:
        >>> resident_blocks(GPUS[0], 256, 128, 193 * 512), resident_blocks(GPUS[2], 256, 128, 193 * 512)
        (2, 1)
    """
    by_registers = REGISTERS // (-(-registers // 8) * 8 * threads)
    return min(by_registers, THREADS // threads, gpu.shared // (shared_bytes + RESERVED), 32)


def steps_of(kept: float) -> float:
    """Fours that a row's entries in a window take on average, if so many lie there on average, at random.

    Example:
        >>> round(steps_of(20.0), 2), round(steps_of(0.1), 2)
        (5.38, 0.1)
    """
    total, chance, reach = 0.0, math.exp(-kept), int(kept + 12 * math.sqrt(kept) + 12)
    for count in range(1, reach):
        chance *= kept / count
        total += chance * -(-count // 4)
    return total


def predict(
    gpu: Gpu, kernel: CudaKernel, layer: Layer, batch: int, blocks: int, shared_bytes: int, window: int
) -> Prediction:
    """The time of a launch of so many blocks with so much shared memory each."""
    resident = max(1, resident_blocks(gpu, kernel.threads, kernel.registers, shared_bytes))
    weights = layer.n_active * layer.k * (layer.value_bytes + 2)
    moved = (weights + 4 * batch * (layer.in_features + layer.n)) / gpu.memory
    samples = kernel.settings[0] if kernel.settings else 1
    if kernel.family == "tile":
        outputs = kernel.settings[1]
        rows, windows = kernel.threads // 32 * outputs, -(-layer.in_features // window)
        steps = steps_of(layer.k * min(window, layer.in_features) / layer.in_features)
        density = layer.n_active / max(1, layer.n)
        of_shared = rows * density * windows * steps * (4 * samples + 2)
        issued = rows * density * windows * (steps * (STEP_INSTRUCTIONS + 4 * samples) + ROW_INSTRUCTIONS) / SCHEDULERS
        read = 4 * layer.in_features * 32 * samples + weights * rows / max(1, layer.n)
    else:
        shared_rows = max(1.0, layer.n / max(1, blocks // -(-batch // samples)))
        entries = shared_rows * layer.k
        conflicts = CONFLICTS[samples] if kernel.family == "vector" else 16.0  # through the cache, from global memory
        of_shared = entries / 32 * conflicts + layer.in_features * samples / 32
        issued = entries / 32 * (16 + 2 * samples) / SCHEDULERS
        read = 4 * layer.in_features * samples + entries * (layer.value_bytes + 2)
    parts = {
        "shared memory": of_shared / gpu.clock,
        "instructions": issued / gpu.clock,
        "cache": read / CACHE_BYTES / gpu.clock,
    }
    in_turn = -(-blocks // gpu.multiprocessors)  # blocks that one multiprocessor computes
    slowest = max(parts, key=lambda name: parts[name])
    # With one block alone nothing hides its loads.
    one = sum(parts.values()) - parts["instructions"] if min(resident, in_turn) == 1 else parts[slowest]
    computed = in_turn * one
    seconds, bound = max((computed, slowest), (moved, "memory"), (LAUNCH, "launch"))
    return Prediction(seconds=seconds + LAUNCH, blocks=blocks, resident=resident, bound=bound)
