"""The kernels that training asks for, by name; they are no part of the operator library. Importing it imports Numba.

Owns the functions behind the training rows of :mod:`srigl_fx.runtime.cpu.kernels.table`. Each is a function of a job
(:mod:`srigl_fx.runtime.cpu.kernels.chunks`) and a task's number.
"""

from srigl_fx.runtime.cpu.kernels import table
from srigl_fx.runtime.cpu.kernels.chunks import pack_task, product_task
from srigl_fx.runtime.cpu.kernels.value_gradient import value_gradient_task

TASKS = {function.__name__: function for function in (pack_task, product_task, value_gradient_task)}
assert tuple(TASKS) == table.TRAINING_TASKS
