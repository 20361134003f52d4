"""How the tasks of a job are called: all by one thread, or every so many-th by each thread of a team.

Owns these two loops. Both read an array of int64, whose fields are in :mod:`srigl_fx.runtime.cpu.kernels.job`. It must
not know who the threads belong to.
"""

from typing import Any

import numba as typed_numba
from llvmlite import ir

from srigl_fx.runtime.cpu.kernels import job
from srigl_fx.runtime.cpu.kernels.compiled import extending

types: Any = typed_numba.types
Pointer = Any

_WORD, _INT = ir.IntType(64), ir.IntType(32)


def _call_task(context: Any, task: Any, at: Any, i: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [_WORD, _WORD]).as_pointer()
        builder.call(builder.inttoptr(args[0], kind), args[1:])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


def _call_number(context: Any, function: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(_INT, []).as_pointer()
        return builder.zext(builder.call(builder.inttoptr(args[0], kind), []), _WORD)

    return types.int64(types.int64), generate


call_task, call_number = extending.intrinsic(_call_task), extending.intrinsic(_call_number)


def serial_task(shared: Pointer, unused: int) -> None:
    """Call all tasks, one after another."""
    for i in range(shared[job.TEAM_TASKS]):
        call_task(shared[job.TEAM_TASK], shared[job.TEAM_JOB], i)


def team_task(shared: Pointer, unused: int) -> None:
    """Call every TEAM_THREADS-th task, from the calling thread's own number on."""
    i = call_number(shared[job.TEAM_OWN_NUMBER])
    while i < shared[job.TEAM_TASKS]:  # a range of unknown step could raise, for which the library has no Python
        call_task(shared[job.TEAM_TASK], shared[job.TEAM_JOB], i)
        i += shared[job.TEAM_THREADS]
