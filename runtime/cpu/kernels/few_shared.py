"""A few samples from a shared tile panel, one or two at a time. Importing it imports Numba.

Owns the inner loops and the way of a group's sums to the outputs. An input that four rows share is loaded once, into
four lanes, and meets their weights, which lie side by side; a row that shares with none loads its own, one by one.
AVX-512 looks inputs up in registers instead (:mod:`srigl_fx.runtime.cpu.kernels.dot`), from a panel of its own.
"""

from collections.abc import Callable
from typing import Any, Final

from llvmlite import ir

from srigl_fx.runtime.cpu.kernels import job, panel
from srigl_fx.runtime.cpu.kernels import vector as v
from srigl_fx.runtime.cpu.kernels.activations import activate_row
from srigl_fx.runtime.cpu.kernels.compiled import compiled
from srigl_fx.runtime.cpu.kernels.copies import copy_floats
from srigl_fx.runtime.cpu.kernels.job import GROUP_AT, GROUP_PHASE, GROUP_SHARED, GROUP_WORDS
from srigl_fx.runtime.cpu.kernels.panel import (
    FOURS,
    SHARED_BYTES,
    SHARED_VALUES,
    SHARING,
    SLOTS,
    TILE_BYTES,
    TILE_UNIT,
    TILE_VALUES,
)
from srigl_fx.runtime.cpu.kernels.plan import CACHE_LINE, LANES, STEPS
from srigl_fx.runtime.cpu.kernels.tiles import first_output, start_rows
from srigl_fx.runtime.cpu.kernels.vector import (
    I64,
    VECTOR_BYTES,
    address,
    allocate,
    floats,
    intrinsic,
    ints,
    number,
    release,
    types,
    words,
)

Pointer = Any
_AT_ONCE: Final = 2  # samples, whose sums the registers hold
_AHEAD: Final = 2048  # bytes: a phase that is read so much later is brought into a near cache
_PAIR: Final = 2 * SHARING  # lanes: four rows at two steps
_SUMS: Final = 4 * SLOTS  # bytes of a group's sums of one sample
_FOUR_FLOATS: Final = ir.VectorType(v.F32, SHARING)
_PAIR_FLOATS: Final = v.floats_of(_PAIR)
_NO_PAIR: Final = ir.Constant(_PAIR_FLOATS, [0.0] * _PAIR)


def _picked(count: int) -> Any:
    return ir.Constant(ir.VectorType(v.I32, count), list(range(count)))


def _input_at(b: Any, four: Any, step: int, unit: int) -> Any:
    """How far the input is from the first, in bytes, whose index is one of four in a word."""
    index = b.and_(b.lshr(four, number(16 * step)) if step else four, number(0xFFFF))
    # A panel counts inputs in multiples of TILE_UNIT, or one by one; they are four bytes each.
    return b.lshr(index, number(2)) if unit == TILE_UNIT else b.shl(index, number(2))


def _in_four_lanes(b: Any, at: Any) -> Any:
    unknown = ir.Constant(_FOUR_FLOATS, ir.Undefined)
    one = b.insert_element(unknown, v.load(b, at, v.F32), ir.Constant(v.I32, 0))
    return b.shuffle_vector(one, unknown, ir.Constant(ir.VectorType(v.I32, SHARING), [0] * SHARING))


def _shared_phase(b: Any, rows: list[Any], at: Any, totals: list[Any], unit: int) -> list[Any]:
    """Add a phase of a shared group: for each sample and four, two sums of pairs of steps."""
    found = list(totals)
    for four in range(FOURS):
        indices = v.load(b, b.add(at, number(2 * STEPS * four)), I64, 8)
        places = [_input_at(b, indices, step, unit) for step in range(STEPS)]
        for pair in range(STEPS // 2):
            start = SHARED_VALUES + 4 * SHARING * (STEPS * four + 2 * pair)
            weights = v.load(b, b.add(at, number(start)), _PAIR_FLOATS, 32)
            for sample, row in enumerate(rows):
                one, other = (_in_four_lanes(b, b.add(row, places[2 * pair + i])) for i in (0, 1))
                both = b.shuffle_vector(one, other, _picked(_PAIR))
                total = sample * FOURS + four
                found[total] = v.multiply_add(b, both, weights, found[total])
    return found


def _own_phase(b: Any, rows: list[Any], at: Any, totals: list[Any], unit: int) -> list[Any]:
    """Add a phase of a group whose rows have indices of their own: four rows at four steps in a vector."""
    found = list(totals)
    for part in range(STEPS):
        words_at = [v.load(b, b.add(at, number(2 * (LANES * part + 4 * i))), I64, 8) for i in range(4)]
        places = [_input_at(b, word, step, unit) for word in words_at for step in range(STEPS)]
        weights = v.load(b, b.add(at, number(TILE_VALUES + VECTOR_BYTES * part)), v.FLOATS, 32)  # behind a shared group
        for sample, row in enumerate(rows):
            inputs = ir.Constant(v.FLOATS, ir.Undefined)
            for lane, place in enumerate(places):
                inputs = b.insert_element(inputs, v.load(b, b.add(row, place), v.F32), ir.Constant(v.I32, lane))
            total = sample * STEPS + part
            found[total] = v.multiply_add(b, inputs, weights, found[total])
    return found


def _group(shared: bool, samples: int, unit: int) -> Callable[[int, int, int, int, int], None]:
    """An intrinsic ``(x, x_row, phase, phases, sums)``: the sums of a group's rows for one or two samples.

    ``x`` is the first sample, ``x_row`` the bytes to the next, ``phase`` the group's first; ``sums`` are _SUMS bytes
    for each sample: in a shared group those of a four's rows at even steps, then at odd ones; in others of a row's.
    """
    size, add = (SHARED_BYTES, _shared_phase) if shared else (TILE_BYTES, _own_phase)
    zero = _NO_PAIR if shared else v.ZERO

    def group(context: Any, x: Any, x_row: Any, phase: Any, phases: Any, sums: Any) -> Any:
        def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
            x, x_row, phase, phases, sums = args
            rows = [x, b.add(x, x_row)][:samples]

            def one_phase(i: Any, totals: Any) -> Any:
                at = b.add(phase, b.mul(i, number(size)))
                for line in range(0, size, VECTOR_BYTES):
                    v.prefetch(b, b.add(at, number(_AHEAD + line)))
                return add(b, rows, at, totals, unit)

            for place, total in enumerate(v.loop(b, phases, [zero] * 4 * samples, one_phase)):
                at = _SUMS * (place // 4) + 4 * total.type.count * (place % 4)
                v.store(b, total, b.add(sums, number(at)))
            return context.get_dummy_value()

        return types.void(*[address] * 5), generate

    return intrinsic(group)  # type: ignore[no-any-return]


_groups = {
    (shared, samples, unit): _group(shared, samples, unit)
    for shared in (False, True)
    for samples in range(1, _AT_ONCE + 1)
    for unit in (1, TILE_UNIT)
}


def _either(shared: bool, samples: int) -> Any:
    """The group's sums by either unit."""
    small, large = _groups[shared, samples, 1], _groups[shared, samples, TILE_UNIT]

    def either(unit: int, x: int, x_row: int, phase: int, phases: int, sums: int) -> None:
        if unit == 1:
            small(x, x_row, phase, phases, sums)
        else:
            large(x, x_row, phase, phases, sums)

    return compiled(either)


_own_one, _own_two, _shared_one, _shared_two = (_either(shared, n) for shared in (False, True) for n in (1, 2))


@compiled
def _add_sums(j: Pointer, g: int, shared: bool, sums_at: int, y_at: int) -> None:
    """Add a group's sums to the outputs of its lanes; a lane without a row has none."""
    outputs, sums, y = ints(j[job.PANEL_ROWS] + g * LANES * 4), floats(sums_at), floats(y_at)
    for lane in range(LANES):
        o = int(outputs[lane])
        if o >= j[job.OUT_FEATURES]:
            continue
        if shared:
            at = lane // SHARING * _PAIR + lane % SHARING
            y[o] += sums[at] + sums[at + SHARING]
        else:
            y[o] += (sums[4 * lane] + sums[4 * lane + 1]) + (sums[4 * lane + 2] + sums[4 * lane + 3])


@compiled
def few_shared(j: Pointer, task: int) -> None:
    """A share of the groups of a shared tile panel, for every sample.

    Samples are copied, with the zero behind them that the weights of zero meet which fill a panel up.
    """
    count, splits, n, in_features = j[job.PANEL_COUNT], j[job.ROW_SPLITS], j[job.OUT_FEATURES], j[job.IN_FEATURES]
    batch, groups = j[job.BATCH], words(j[job.PANEL_GROUPS])
    g0, g1 = count * task // splits, count * (task + 1) // splits
    o0 = first_output(j, g0)
    o1 = n if task == splits - 1 else first_output(j, g1)
    row = (in_features + LANES) // LANES * CACHE_LINE
    memory = allocate(batch * row + _AT_ONCE * _SUMS + CACHE_LINE)
    if memory == 0:
        j[job.FAILED] = 1
        return
    sums = (memory + CACHE_LINE - 1) // CACHE_LINE * CACHE_LINE
    x, unit = sums + _AT_ONCE * _SUMS, panel.tile_unit(in_features)
    for sample in range(batch):
        copy_floats(j[job.X] + sample * in_features * 4, x + sample * row, in_features)
        floats(x + sample * row)[in_features] = 0.0
        start_rows(j, sample, o0, o1)
    for g in range(g0, g1):
        found = g * GROUP_WORDS
        phases = groups[found + GROUP_WORDS + GROUP_PHASE] - groups[found + GROUP_PHASE]
        phase, shared = j[job.PANEL] + groups[found + GROUP_AT], groups[found + GROUP_SHARED] != 0
        sample = 0
        while sample < batch:
            at, samples = x + sample * row, min(_AT_ONCE, batch - sample)
            if shared and samples == 1:
                _shared_one(unit, at, row, phase, phases, sums)
            elif shared:
                _shared_two(unit, at, row, phase, phases, sums)
            elif samples == 1:
                _own_one(unit, at, row, phase, phases, sums)
            else:
                _own_two(unit, at, row, phase, phases, sums)
            for i in range(samples):
                _add_sums(j, g, shared, sums + i * _SUMS, j[job.Y] + (sample + i) * n * 4)
            sample += samples
    release(memory)
    for sample in range(batch):
        activate_row(floats(j[job.Y] + (sample * n + o0) * 4), o1 - o0, j[job.ACTIVATION])
