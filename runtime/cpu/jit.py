"""The kernels as machine code for this process, compiled by Numba when first needed.

Owns just-in-time compilation and how the result is called: through ctypes, which takes plain addresses, costs about a
microsecond and releases the GIL. It must not know torch, and validates nothing.
"""

import ctypes
import os
import threading
from collections.abc import Callable
from typing import Any

from srigl_fx.runtime.cpu.kernels.isa import ISA_VARIABLE

Entry = Callable[[int, int], None]

_entries: dict[str, tuple[Entry, int]] = {}
_keep: list[Any] = []  # the compiled code lives as long as its cfunc object
_lock = threading.Lock()


def entry(name: str) -> tuple[Entry, int]:
    """A task of the kernels as a function of a job's address and a number, and its address; from any thread.

    Example:
        >>> import numpy as np
        >>> from srigl_fx.runtime.cpu.kernels import job
        >>> j = np.zeros(job.SIZE, np.int64)
        >>> x, w, y = np.array([[2, 3]], np.float32), np.array([[5]], np.float32), np.empty((1, 2), np.float32)
        >>> columns, rows, bias = np.array([[1]], np.uint16), np.array([0], np.int32), np.array([0.5, 7], np.float32)
        >>> fields = (job.X, job.VALUES, job.INDICES, job.ACTIVE, job.BIAS, job.Y)
        >>> for field, array in zip(fields, (x, w, columns, rows, bias, y)):
        ...     j[field] = array.ctypes.data
        >>> j[[job.BATCH, job.IN_FEATURES, job.OUT_FEATURES, job.N_ACTIVE, job.K]] = 1, 2, 2, 1, 1
        >>> j[[job.INDEX_BYTES, job.ROW_SPLITS]] = 2, 1
        >>> run, address = entry("rows_task")
        >>> run(j.ctypes.data, 0)
        >>> y.tolist()
        [[15.5, 7.0]]
    """
    found = _entries.get(name)
    if found is None:
        with _lock:
            found = _entries.get(name)
            if found is None:
                found = _entries[name] = _compile(name)
    return found


def _compile(name: str) -> tuple[Entry, int]:
    import numba as typed_numba

    numba: Any = typed_numba  # half of its functions are annotated
    if wanted := os.environ.get(ISA_VARIABLE):
        # What Numba generates around the kernels' own vector code is held to the same instruction set.
        numba.config.CPU_NAME, numba.config.CPU_FEATURES = wanted, ""
    from srigl_fx.runtime.cpu.kernels import tasks, training_tasks

    types = numba.types
    signature = types.void(types.CPointer(types.int64), types.int64)
    function = (tasks.TASKS | training_tasks.TASKS)[name]
    compiled = numba.cfunc(signature, fastmath=tasks.FASTMATH, error_model="numpy")(function)
    _keep.append(compiled)
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)(compiled.address), int(compiled.address)
