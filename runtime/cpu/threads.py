"""The tasks of a job on torch's own threads, and how many of these there are in a block.

Owns how tasks are spread: over the OpenMP pool that torch computes with (the libgomp in its Linux wheels), entered the
way compiled code enters it; so the threads are those that ``torch.set_num_threads`` counts, none is started at import,
and calls from several threads of Python get teams of their own. Where there is no such pool, and in a process that was
forked from one that used it, tasks run one after another.
"""

import ctypes
import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from srigl_fx.runtime.cpu.entries import Entry, entry
from srigl_fx.runtime.cpu.kernels.job import TEAM_SIZE

_lock = threading.Lock()
_forked = False


def run(task: tuple[Entry, int], job: int, tasks: int, threads: int) -> None:
    """Run ``tasks`` tasks of the job at address ``job`` on up to ``threads`` threads; returns when all have ended.

    Args:
        task: What ``entries.entry`` gave.
        job: The job's address; it must not change meanwhile.
        tasks: How many.
        threads: torch's thread count.

    Example:
        >>> import ctypes
        >>> done = []
        >>> function = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64)(lambda job, number: done.append(number))
        >>> run((function, ctypes.cast(function, ctypes.c_void_p).value), 0, 3, 1)
        >>> done
        [0, 1, 2]
    """
    start = _pool() if threads > 1 and tasks > 1 and not _forked else None
    if start is None:
        if tasks == 1:
            task[0](job, 0)
        else:
            shared = (ctypes.c_int64 * TEAM_SIZE)(task[1], job, tasks)
            entry("serial_task")[0](ctypes.addressof(shared), 0)
    else:
        start(task[1], job, tasks, min(threads, tasks))


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """A block in which torch, and so the kernels, compute with ``count`` threads; afterwards with as many as before.

    Example:
        >>> import torch
        >>> before = torch.get_num_threads()
        >>> with torch_threads(before + 1):
        ...     torch.get_num_threads() == before + 1
        True
        >>> torch.get_num_threads() == before
        True
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _after_fork() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_after_fork)


def _pool() -> Callable[[int, int, int, int], None] | None:
    with _lock:
        return _find_pool()


@functools.cache
def _find_pool() -> Callable[[int, int, int, int], None] | None:
    import torch

    package = Path(torch.__file__).parent
    folders = package / "lib", package.with_name("torch.libs")  # of wheels that were repaired
    found = [path for folder in folders for path in sorted(folder.glob("libgomp*.so*"))]
    if not found:
        return None
    library = ctypes.CDLL(str(found[0]))
    start = library.GOMP_parallel
    start.argtypes, start.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    worker = entry("team_task")[1]
    own_number = ctypes.cast(library.omp_get_thread_num, ctypes.c_void_p).value or 0

    def run_parallel(function: int, job: int, tasks: int, threads: int) -> None:
        shared = (ctypes.c_int64 * TEAM_SIZE)(function, job, tasks, threads, own_number)
        start(worker, ctypes.addressof(shared), threads, 0)

    return run_parallel
