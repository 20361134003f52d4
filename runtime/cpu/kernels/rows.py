"""The rows of a weight in the canonical format, as a job names them.

Owns how an index is read, which row of indices an active row has, and where its padding starts. It must not know what
is made of them.
"""

from collections.abc import Callable
from typing import Any

import numba as typed_numba

from srigl_fx.runtime.cpu.kernels import job
from srigl_fx.runtime.cpu.kernels.vector import ints, shorts

numba: Any = typed_numba  # half of its functions are annotated
Pointer = Any


def compiled_plainly(function: Callable[..., Any]) -> Any:
    """A function that kernels can call, for work in whole numbers."""
    return numba.njit(error_model="numpy")(function)


@compiled_plainly
def index_at(indices: int, index_bytes: int, position: int) -> int:
    """An index of the canonical format."""
    if index_bytes == 2:
        return int(shorts(indices)[position])
    return int(ints(indices)[position])


@compiled_plainly
def index_row(j: Pointer, row: int) -> int:
    """The row of indices that an active row reads."""
    return row if j[job.INDEX_ROWS] == 0 else int(ints(j[job.INDEX_ROWS])[row])


@compiled_plainly
def index_of(j: Pointer, row: int, i: int) -> int:
    """The input of an active row's weight ``i``."""
    return index_at(j[job.INDICES], j[job.INDEX_BYTES], index_row(j, row) * j[job.K] + i)  # type: ignore[no-any-return]


@compiled_plainly
def row_length(j: Pointer, row: int) -> int:
    """How many weights an active row has: an index that repeats the one before is padding."""
    end = j[job.K]
    while end > 1 and index_of(j, row, end - 1) == index_of(j, row, end - 2):
        end -= 1
    return end  # type: ignore[no-any-return]
