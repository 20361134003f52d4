"""The kernels as machine code for this process: from the operator library where there is one, else compiled by Numba.

Owns where the code comes from and how it is called: through ctypes, which takes plain addresses, costs about a
microsecond and releases the GIL. The library holds the same kernels, compiled ahead of time for each instruction set,
so that nothing has to be compiled here; both give the same bits. It must not know torch, and validates nothing.
"""

import ctypes
import functools
import logging
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any

from srigl_fx.runtime.cpu.kernels.isa import ARCHITECTURE, ARM, ISA_VARIABLE, TARGETS, host_target, llvm_names
from srigl_fx.runtime.cpu.kernels.table import TASKS, TORCH_TASKS

Entry = Callable[[int, int], None]

_Function = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)
_entries: dict[str, tuple[Entry, int]] = {}
_keep: list[Any] = []  # code lives as long as the library that is loaded, or Numba's object
_lock = threading.Lock()
_logger = logging.getLogger(__name__)


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
                address = _in_library().get(name) or _compile(name)
                found = _entries[name] = _Function(address), address
    return found


@functools.cache
def _in_library() -> Mapping[str, int]:
    """The addresses of this process's instruction set in the operator library; empty where that is not built."""
    from srigl_fx.runtime.ort import abi
    from srigl_fx.runtime.ort.library import library_status

    path = library_status().path
    if path is None:
        return {}
    names = (*TASKS, *TORCH_TASKS)
    try:
        loaded = ctypes.CDLL(str(path))
        words = (ctypes.c_int64 * (len(TARGETS) * len(names))).in_dll(loaded, abi.TASKS_TABLE)
    except (OSError, ValueError) as error:
        _logger.warning("%s cannot be used (%s); kernels are compiled in this process", path, error)
        return {}
    _keep.append(loaded)
    first = TARGETS.index(host_target()) * len(names)
    return dict(zip(names, words[first : first + len(names)], strict=True))


def _compile(name: str) -> int:
    import numba as typed_numba

    numba: Any = typed_numba  # half of its functions are annotated
    if os.environ.get(ISA_VARIABLE) or ARCHITECTURE == ARM:
        # What Numba generates around the kernels' own vector code is held to the same instruction set; on Arm always,
        # as not all that kernels know of a processor is known to LLVM.
        numba.config.CPU_NAME, numba.config.CPU_FEATURES = llvm_names(host_target())
    from srigl_fx.runtime.cpu.kernels import tasks, torch_tasks

    types = numba.types
    signature = types.void(types.CPointer(types.int64), types.int64)
    function = (tasks.TASKS | torch_tasks.TASKS)[name]
    compiled = numba.cfunc(signature, fastmath=tasks.FASTMATH, error_model="numpy")(function)
    _keep.append(compiled)
    return int(compiled.address)
