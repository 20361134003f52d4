"""The packed weight of a convolution with samples innermost: a sample panel.

Owns its layout. It has a part for each group of the convolution, row of its kernel and window of channels, in this
order: then the inputs of a part at a few positions stay in the caches while all rows read them, and parts whose inputs
are padding are left out. A part has all output rows of its group, ablated ones too, those with the fewest weights
first, as a loop that ends after another count than the one before costs more than the weight. A row is eight bytes,
how far its output is from the first row's and its number of weights, as int32, and then eight bytes for each weight:
how far its inputs are from what the first tap reads, and the value as float32. Four neighbouring rows that share their
inputs stand as one, with four values for each weight; a part has all of these before the single ones, and says how
many they are. The panel depends on nothing but the layer and the instruction set, which says how many samples a block
has: neither on the sizes of the images nor on the number of samples.
"""

from collections.abc import Callable
from typing import Any, Final

import numba as typed_numba

from srigl_fx.runtime.cpu.kernels import conv, job
from srigl_fx.runtime.cpu.kernels.canonical import index_of, sharing_rows
from srigl_fx.runtime.cpu.kernels.compiled import SAMPLE_BYTES
from srigl_fx.runtime.cpu.kernels.innermost import SHARING, START_BYTES, entry_bytes
from srigl_fx.runtime.cpu.kernels.job import GROUP_AT, GROUP_SHARED, GROUP_WORDS
from srigl_fx.runtime.cpu.kernels.values import value_at
from srigl_fx.runtime.cpu.kernels.vector import floats, ints, words

numba: Any = typed_numba  # half of its functions are annotated
Pointer = Any
_SINGLE, _SHARED = entry_bytes(1), entry_bytes(SHARING)
_ABLATED: Final = -1
_INT: Final = 4  # bytes
_TAKEN: Final = -2  # a row that stands with one before it


def _compiled(function: Callable[..., Any]) -> Any:
    return numba.njit(error_model="numpy")(function)


@_compiled
def _row_length(j: Pointer, row: int) -> int:
    """How many weights an active row has: an index that repeats the one before is padding."""
    end = j[job.K]
    while end > 1 and index_of(j, row, end - 1) == index_of(j, row, end - 2):
        end -= 1
    return end  # type: ignore[no-any-return]


@_compiled
def panel_windows(j: Pointer) -> int:
    """Into how many windows the channels of a group are cut."""
    geometry = words(j[job.GEOMETRY])
    channels, window = geometry[conv.CHANNELS] // geometry[conv.GROUPS], j[job.PANEL_WINDOW]
    return (channels + window - 1) // window  # type: ignore[no-any-return]


@_compiled
def _are_four(j: Pointer, row: int) -> bool:
    """Whether an active row and the three after it share their inputs, and are neighbours in one group of filters."""
    active, four = ints(j[job.ACTIVE]), row + SHARING
    if j[job.INDEX_ROWS] == 0 or four > j[job.N_ACTIVE] or int(active[four - 1]) - int(active[row]) != SHARING - 1:
        return False
    block = j[job.OUT_FEATURES] // words(j[job.GEOMETRY])[conv.GROUPS]
    if int(active[four - 1]) // block != int(active[row]) // block:
        return False
    return sharing_rows(j, row, SHARING) == SHARING  # type: ignore[no-any-return]


@_compiled
def measure_sample_panel(j: Pointer) -> None:
    """Count parts and bytes of a sample panel into the job."""
    geometry, n = words(j[job.GEOMETRY]), j[job.OUT_FEATURES]
    parts, size, starts, row = geometry[conv.KERNEL_H] * panel_windows(j), 0, n, 0
    while row < j[job.N_ACTIVE]:
        if _are_four(j, row):
            size, starts, row = size + _row_length(j, row) * _SHARED, starts - SHARING + 1, row + SHARING
        else:
            size, row = size + _row_length(j, row) * _SINGLE, row + 1
    j[job.PANEL_COUNT], j[job.PANEL_PHASES] = geometry[conv.GROUPS] * parts, 0
    # Behind the last part are two int32 for each output, which are needed while it is filled.
    j[job.PANEL_BYTES] = parts * starts * START_BYTES + size + n * 2 * _INT


@_compiled
def _is_in_part(j: Pointer, index: int, tap_row: int, window: int) -> bool:
    """Whether an input of a filter belongs to a row of the kernel and to a window of channels."""
    geometry = words(j[job.GEOMETRY])
    kernel_h, kernel_w = geometry[conv.KERNEL_H], geometry[conv.KERNEL_W]
    within = index // kernel_w
    return within % kernel_h == tap_row and within // kernel_h // j[job.PANEL_WINDOW] == window  # type: ignore[no-any-return]


@_compiled
def _fill_row(j: Pointer, o: int, row: int, rows: int, tap_row: int, window: int, count: int, to: int) -> int:
    """Write a part's ``count`` weights of an output row, or of ``rows`` that share inputs; returns where they end."""
    geometry, k = words(j[job.GEOMETRY]), j[job.K]
    channels, n, groups = geometry[conv.CHANNELS], j[job.OUT_FEATURES], geometry[conv.GROUPS]
    kernel_h, kernel_w = geometry[conv.KERNEL_H], geometry[conv.KERNEL_W]
    first_channel = o // (n // groups) * (channels // groups)
    ints(to)[0], ints(to)[1] = o * SAMPLE_BYTES, count
    to += START_BYTES
    for i in range(_row_length(j, row) if count else 0):
        index = index_of(j, row, i)
        if _is_in_part(j, index, tap_row, window):
            channel = first_channel + index // kernel_w // kernel_h
            tap = index % kernel_w * geometry[conv.DILATION_W]
            ints(to)[0] = (tap * channels + channel) * SAMPLE_BYTES
            for r in range(rows):
                floats(to + _INT)[r] = value_at(j[job.VALUES], j[job.VALUE_TYPE], (row + r) * k + i)
            to += _SINGLE if rows == 1 else _SHARED
    return to


@_compiled
def _fill_part(j: Pointer, part: int, tap_row: int, window: int, to: int, rows: Pointer, counts: Pointer) -> int:
    """Write a part of the panel; returns where it ends."""
    geometry, groups = words(j[job.GEOMETRY]), words(j[job.PANEL_GROUPS])
    group_rows = j[job.OUT_FEATURES] // geometry[conv.GROUPS]
    first = part // (geometry[conv.KERNEL_H] * panel_windows(j)) * group_rows
    most = 0
    for o in range(first, first + group_rows):
        counts[o] = 0
        row = int(rows[o])
        if row >= 0:
            for i in range(_row_length(j, row)):
                if _is_in_part(j, index_of(j, row, i), tap_row, window):
                    counts[o] += 1
            most = max(most, int(counts[o]))
    fours, last = 0, first + group_rows - 1
    for together in (SHARING, 1):
        for count in range(most + 1):
            for o in range(first, first + group_rows):
                leads = o < last and int(rows[o + 1]) == _TAKEN and int(rows[o]) != _TAKEN
                if int(counts[o]) == count and int(rows[o]) != _TAKEN and leads == (together == SHARING):
                    to = _fill_row(j, o, int(rows[o]), together, tap_row, window, count, to)
                    fours += 1 if leads else 0
    groups[part * GROUP_WORDS + GROUP_SHARED] = fours
    return to


@_compiled
def fill_sample_panel(j: Pointer) -> None:
    """Write a sample panel whose size is known, and where each of its parts starts."""
    geometry, groups, active = words(j[job.GEOMETRY]), words(j[job.PANEL_GROUPS]), ints(j[job.ACTIVE])
    n = j[job.OUT_FEATURES]
    rows = ints(j[job.PANEL] + j[job.PANEL_BYTES] - n * 2 * _INT)
    counts = ints(j[job.PANEL] + j[job.PANEL_BYTES] - n * _INT)
    for o in range(n):
        rows[o] = _ABLATED
    row = 0
    while row < j[job.N_ACTIVE]:
        o = int(active[row])
        rows[o] = row
        row += 1
        if _are_four(j, row - 1):
            for i in range(1, SHARING):
                rows[o + i] = _TAKEN
            row += SHARING - 1
    to, part = j[job.PANEL], 0
    for _ in range(geometry[conv.GROUPS]):
        for tap_row in range(geometry[conv.KERNEL_H]):
            for window in range(panel_windows(j)):
                groups[part * GROUP_WORDS + GROUP_AT] = to - j[job.PANEL]
                to = _fill_part(j, part, tap_row, window, to, rows, counts)
                part += 1
