"""How long a layer takes in each of its forms, estimated: a roofline with a handful of constants.

Owns the formulas and the constants; which kernel computes what is the plan's. It must not know torch, nor measure
anything: :mod:`srigl_fx.runtime.costs.calibration` fits the constants to a machine, and ``benchmarks/cost_model.py``
checks the formulas.

After Williams, Waterman and Patterson, "Roofline: an insightful visual performance model" (2009), from the counts of
multiply-adds and bytes, with the cost of the call on top; memory and arithmetic overlap where a kernel streams its
weights, and add up where it copies data first.
"""

from dataclasses import dataclass, replace
from typing import Literal

from srigl_fx.runtime.cpu.kernels import plan
from srigl_fx.runtime.cpu.kernels.isa import (
    AVX2,
    AVX512,
    AVX512_VBMI,
    AVX512_VNNI,
    AVX_VNNI,
    BASELINE,
    ISAS,
    NARROW_TILES,
    NEON,
    NEON_DOT,
    NEON_I8MM,
    TARGETS,
    level_of,
)

Form = Literal["dense", "condensed", "shrunk"]
Kernel = Literal["dot", "tile"]

_PARALLEL = 0.85  # what a further thread adds
_GAPS = 1.3  # places in a dot panel for each kept weight
_SPARSEST = 32  # inputs for each place in a dot panel, at most: four places a row in a window of 128
_LEVEL = level_of(ISAS[-1])
# How many times as fast as those of float32 the kernels of eight bits are on one processor: dot, narrow tiles, and full
# ones; measured with each target on one core of an AMD EPYC of the Zen 4 generation, with 3072 inputs, 768 rows, 10 %
# kept. All of AVX2 was measured on one of the Zen 3 generation; for the other targets the instructions of the narrow
# tiles' loops were counted, for AVX-512 without VNNI those of full tiles, too, and for Arm those of all.
_EIGHT_BITS = {
    BASELINE: (1.5, 1.1, 1.3),
    AVX2: (1.1, 1.3, 2.1),
    AVX_VNNI: (1.3, 1.3, 2.5),
    AVX512: (0.55, 1.2, 2.2),
    AVX512_VNNI: (0.55, 1.2, 2.8),
    AVX512_VBMI: (2.6, 1.2, 2.7),
    NEON: (1.2, 1.0, 1.1),
    NEON_DOT: (1.3, 1.1, 1.5),
    NEON_I8MM: (1.3, 1.3, 2.0),
}
# Of the time of a row of eight bits by itself: what laying inputs out takes, which rows that share them do once, and
# what each row takes then. Where bytes are multiplied in pairs, rows by themselves are faster, and those that share
# their inputs are not: with AVX2 groups of 2, 4, 8 and 16 take 1.2, 1, 0.83 and 0.77 times as long. Before that, groups
# of two, four and eight were 1.2, 1.5 and 1.8 times as fast; on other targets nothing was measured.
_SHARING, _SHARING_IN_PAIRS = (0.4, 0.6), (1.1, 0.7)
_IN_PAIRS = (AVX2, AVX512)  # where bytes are multiplied so
_WIDER = 1.1  # a column there of a tile of 32 or 48, of one of a full tile
_FURTHER = 0.25  # of the time of the first: samples whose bytes are looked up by indices that are there already


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a layer has to compute.

    Attributes:
        rows: n, the rows of the weight's matrix view.
        fan_in: F, its columns.
        active: Rows that are not ablated.
        kept: Weights kept in all.
        columns: How often each weight is used: samples, times output positions for a convolution.
        value_bytes: Bytes of a stored value.
        convolution: Whether it is a convolution.
        eight_bits: Whether values and activations have eight bits.
        index_rows: The rows of indices that the active rows read, where some share them; 0 where each has its own.
    """

    rows: int
    fan_in: int
    active: int
    kept: int
    columns: int
    value_bytes: int = 4
    convolution: bool = False
    eight_bits: bool = False
    index_rows: int = 0


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The constants. The defaults are those of one core with AVX-512 (Intel Xeon, 2.7 GHz).

    Attributes:
        dense_rate: Multiply-adds a second of a dense layer with many columns.
        bandwidth: Bytes a second at which weights are read that do not fit into the core's own cache.
        cached_bandwidth: Bytes a second at which others are.
        cache_bytes: The size of that cache (the second level, of one core).
        dot_rate: Stored weights a second of the dot kernel, gaps included, for one column and from the cache.
        tile_rate: Multiply-adds a second of the tile kernel.
        move_rate: Elements a second that are brought into, or out of, the layout of the tile kernel.
        dense_call: Seconds to call a dense operator.
        condensed_call: Seconds to call a condensed one.
        level: That of the instruction set (``isa.level_of``).
        target: What kernels of eight bits are compiled for, its position in TARGETS.
    """

    dense_rate: float = 90e9
    bandwidth: float = 27e9
    cached_bandwidth: float = 80e9
    cache_bytes: int = 2 << 20
    dot_rate: float = 9e9
    tile_rate: float = 45e9
    move_rate: float = 4e9
    dense_call: float = 3e-6
    condensed_call: float = 6e-6
    level: int = _LEVEL
    target: int = len(TARGETS) - 1

    def with_threads(self, threads: int) -> "Machine":
        """The same machine with more threads than one.

        Example:
            >>> Machine(dense_rate=100e9).with_threads(2).dense_rate
            185000000000.0
        """
        factor = 1 + _PARALLEL * (threads - 1)
        names = ("dense_rate", "bandwidth", "cached_bandwidth", "dot_rate", "tile_rate", "move_rate")
        return replace(self, **{name: factor * getattr(self, name) for name in names})


# One core with AVX-512 under ONNX Runtime, which calls a dense operator and one of ours alike. What a file will run on
# is not known when it is written: the constants of the machine that writes it are no better guess, and would have the
# same model give other files elsewhere.
ONNXRUNTIME = Machine(condensed_call=Machine.dense_call)


def estimate(work: Work, machine: Machine) -> dict[Form, float]:
    """Estimated seconds of one call in each form; "shrunk" only where rows are ablated.

    Example:
        >>> work = Work(rows=768, fan_in=3072, active=768, kept=768 * 307, columns=1)
        >>> seconds = estimate(work, Machine())
        >>> round(1e6 * seconds["dense"]), round(1e6 * seconds["condensed"])
        (353, 40)
    """
    seconds: dict[Form, float] = {"dense": dense(work, machine), "condensed": condensed(work, machine)}
    if 0 < work.active < work.rows:
        # The output is written once more, with the ablated rows in it.
        widened = 3 * machine.dense_call + 2 * work.rows * work.columns / machine.move_rate
        seconds["shrunk"] = dense(replace(work, rows=work.active), machine) + widened
    return seconds


def kernel_for(work: Work, machine: Machine) -> Kernel:
    """The kind of kernel that computes the condensed layer, by its arithmetic: sample by sample, or tiles of columns.

    Example:
        >>> work = Work(rows=768, fan_in=768, active=768, kept=768 * 77, columns=1)
        >>> kernel_for(work, Machine()), kernel_for(replace(work, columns=64), Machine())
        ('dot', 'tile')
    """
    if work.convolution:
        return "tile"
    k = -(-work.kept // max(1, work.active))
    if work.eight_bits:
        lookup = TARGETS[machine.target] == AVX512_VBMI
        found = plan.int8_linear_kernel(lookup, work.fan_in, work.active, k, work.columns, False)
        return "tile" if found == plan.INT8_TILE else "dot"
    kernel = plan.linear_kernel(machine.level, work.fan_in, work.active, k, work.columns, False, True)
    return "tile" if kernel == plan.TILE else "dot"


def dense(work: Work, machine: Machine) -> float:
    """Estimated seconds of the dense layer.

    Example:
        >>> work = Work(rows=1000, fan_in=1000, active=1000, kept=1, columns=1000)
        >>> dense(work, Machine(dense_rate=1e9, bandwidth=8e9, dense_call=0.5))
        1.501
    """
    weights = work.rows * work.fan_in
    reading = 4 * weights / (machine.cached_bandwidth if 4 * weights <= machine.cache_bytes else machine.bandwidth)
    if work.columns == 1:
        return machine.dense_call + reading
    # A matrix product first copies the weights into an order of its own.
    return machine.dense_call + 2 * reading + weights * work.columns / machine.dense_rate


def condensed(work: Work, machine: Machine) -> float:
    """Estimated seconds of the condensed layer.

    The rates of eight bits are those of float32, times what was once measured for the target.

    Example:
        >>> work = Work(rows=1000, fan_in=1000, active=1000, kept=10**5, columns=1)
        >>> condensed(work, Machine(dot_rate=1.3e5, condensed_call=0.5))
        1.5
    """
    again = 1.0
    columns = float(-(-work.columns // plan.LANES) * plan.LANES)
    if work.eight_bits:
        target = TARGETS[machine.target]
        if not work.convolution:
            kernel = plan.INT8_TILE if kernel_for(work, machine) == "tile" else plan.INT8_DOT
            first = plan.int8_linear_samples(target == AVX512_VBMI, kernel, work.columns, False)
            if first < work.columns:
                parts = [condensed(replace(work, columns=part), machine) for part in (first, work.columns - first)]
                return sum(parts) - machine.condensed_call
        dot, narrow, tile = _EIGHT_BITS[target]
        again = _FURTHER if target == AVX512_VBMI else 1.0
        machine = replace(machine, dot_rate=dot * machine.dot_rate, tile_rate=tile * machine.tile_rate)
        columns = _tile_columns(work, target, tile / narrow)
    if kernel_for(work, machine) == "dot":
        if _loads_once(work, machine):
            machine = replace(machine, dot_rate=machine.dot_rate * _sharing(work, TARGETS[machine.target]))
        stored = max(_GAPS * work.kept, work.active * work.fan_in / _SPARSEST)
        size = stored * (work.value_bytes + 1)
        reading = 0.0 if size <= machine.cache_bytes else size / machine.bandwidth
        samples = 1 + (work.columns - 1) * again
        return machine.condensed_call + max(samples * stored / machine.dot_rate, reading)
    if work.index_rows:
        machine = replace(machine, tile_rate=machine.tile_rate * _sharing(work, TARGETS[machine.target]))
    moved = work.columns * (work.fan_in + work.rows) / machine.move_rate  # a convolution's windows one by one
    return machine.condensed_call + work.kept * columns / machine.tile_rate + moved


def _loads_once(work: Work, machine: Machine) -> bool:
    """Whether an input of a few samples is loaded once for the rows that share it."""
    if work.eight_bits or not work.index_rows:
        return False
    k = -(-work.kept // max(1, work.active))
    sizes = work.fan_in, work.active, k
    return plan.linear_for_shared(plan.DOT, machine.level, *sizes, work.index_rows) == plan.SHARED_TILE


def _sharing(work: Work, target: str) -> float:
    """How many times as fast rows are multiplied as they were if none shared its inputs."""
    if work.eight_bits:
        once, each = _SHARING_IN_PAIRS if target in _IN_PAIRS else _SHARING
        return max(1.0, 1 / (each + once * work.index_rows / work.active))
    # Four rows that share their inputs take as long as two others.
    fours = max(work.index_rows, work.active / 4)
    return max(1.0, work.active / (2 * fours))


def _tile_columns(work: Work, target: str, narrow: float) -> float:
    """The columns that tiles of eight bits compute, used or not; one of a narrow tile counts as ``narrow`` of them."""
    rest = work.columns % plan.INT8_COLUMNS
    if rest == 0:
        return work.columns
    last = plan.INT8_COLUMNS if work.convolution else plan.int8_tile_columns(target in NARROW_TILES, rest)
    if plan.LANES < last < plan.INT8_COLUMNS and target in _IN_PAIRS:
        narrow = _WIDER
    return work.columns - rest + last * (narrow if last < plan.INT8_COLUMNS else 1)
