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
from typing import Any

from srigl_fx.runtime.cpu.jit import Entry

_lock = threading.Lock()
_forked = False


def run(task: tuple[Entry, int], job: int, tasks: int, threads: int) -> None:
    """Run ``tasks`` tasks of the job at address ``job`` on up to ``threads`` threads; returns when all have ended.

    Args:
        task: What ``jit.entry`` gave.
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
            _one_after_another()(task[1], job, tasks)
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

    found = sorted(Path(torch.__file__).parent.joinpath("lib").glob("libgomp*.so*"))
    if not found:
        return None
    library = ctypes.CDLL(str(found[0]))
    start = library.GOMP_parallel
    start.argtypes, start.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    worker = _compile_worker(library)

    def run_parallel(function: int, job: int, tasks: int, threads: int) -> None:
        shared = (ctypes.c_int64 * 4)(function, job, tasks, threads)
        start(worker, ctypes.addressof(shared), threads, 0)

    return run_parallel


@functools.cache
def _one_after_another() -> Callable[[int, int, int], None]:
    """A compiled loop over the tasks: (function, job, tasks)."""
    import numba as typed_numba

    numba: Any = typed_numba
    word, call = numba.types.int64, _caller()

    def work(function, job, tasks):  # type: ignore[no-untyped-def]
        for number in range(tasks):
            call(function, job, number)

    compiled = numba.cfunc(numba.types.void(word, word, word))(work)
    _keep.append(compiled)
    return ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)(compiled.address)


def _compile_worker(library: Any) -> int:
    """The address of what each thread of a team runs: every ``threads``-th task, from its own number on."""
    import numba as typed_numba

    numba: Any = typed_numba
    types, call = numba.types, _caller()
    own_number = library.omp_get_thread_num
    own_number.restype, own_number.argtypes = ctypes.c_int, []

    def work(shared):  # type: ignore[no-untyped-def]
        for number in range(own_number(), shared[2], shared[3]):
            call(shared[0], shared[1], number)

    compiled = numba.cfunc(types.void(types.CPointer(types.int64)))(work)
    _keep.append(compiled)
    return int(compiled.address)


def _caller() -> Any:
    """An intrinsic that calls the function at an address: (function, job, number)."""
    import numba as typed_numba
    from llvmlite import ir
    from numba.extending import intrinsic as typed_intrinsic

    types: Any = typed_numba.types
    intrinsic: Any = typed_intrinsic

    @intrinsic  # type: ignore[untyped-decorator]
    def call(context: Any, function: Any, job: Any, number: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            word = ir.IntType(64)
            kind = ir.FunctionType(ir.VoidType(), [word, word]).as_pointer()
            builder.call(builder.inttoptr(args[0], kind), args[1:])
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), generate

    return call


_keep: list[Any] = []  # the compiled code lives as long as its cfunc object
