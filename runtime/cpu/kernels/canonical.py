"""The canonical format of a condensed weight, as kernels read it from a job.

Owns where a kept weight's input is found. It must not know packed forms.
"""

from collections.abc import Callable
from typing import Any

import numba as typed_numba

from srigl_fx.runtime.cpu.kernels import job
from srigl_fx.runtime.cpu.kernels.vector import ints, shorts

numba: Any = typed_numba  # half of its functions are annotated
Pointer = Any


def _compiled(function: Callable[..., Any]) -> Any:
    return numba.njit(error_model="numpy")(function)


@_compiled
def index_at(indices: int, index_bytes: int, position: int) -> int:
    """An index of the canonical format."""
    if index_bytes == 2:
        return int(shorts(indices)[position])
    return int(ints(indices)[position])


@_compiled
def index_row(j: Pointer, row: int) -> int:
    """The row of indices that an active row reads."""
    return row if j[job.INDEX_ROWS] == 0 else int(ints(j[job.INDEX_ROWS])[row])


@_compiled
def sharing_rows(j: Pointer, row: int, most: int) -> int:
    """How many rows from ``row`` on, ``most`` at most, share their indices."""
    rows = 1
    while rows < most and index_row(j, row + rows) == index_row(j, row):
        rows += 1
    return rows


@_compiled
def index_rows(j: Pointer) -> int:
    """How many rows of indices the active rows read."""
    n_active = j[job.N_ACTIVE]
    return n_active if n_active == 0 or j[job.INDEX_ROWS] == 0 else index_row(j, n_active - 1) + 1  # type: ignore[no-any-return]


@_compiled
def index_of(j: Pointer, row: int, i: int) -> int:
    """The input of an active row's weight ``i``."""
    return index_at(j[job.INDICES], j[job.INDEX_BYTES], index_row(j, row) * j[job.K] + i)  # type: ignore[no-any-return]


@_compiled
def row_end(indices: Pointer, first: int, k: int) -> int:
    """Where the kept weights of a row of the canonical format end: an index that repeats the one before is padding."""
    end = first + k
    while end - first > 1 and indices[end - 1] == indices[end - 2]:
        end -= 1
    return end
