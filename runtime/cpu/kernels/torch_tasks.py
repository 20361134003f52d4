"""All that torch alone asks of the kernels, by name: training's products, and how threads call tasks.

Owns the functions behind TORCH_TASKS of :mod:`srigl_fx.runtime.cpu.kernels.table`; the operators of ONNX Runtime do
without. Each is a function of an array of int64 (:mod:`srigl_fx.runtime.cpu.kernels.chunks`,
:mod:`srigl_fx.runtime.cpu.kernels.team`) and a number. Importing it imports Numba.
"""

from srigl_fx.runtime.cpu.kernels import table
from srigl_fx.runtime.cpu.kernels.chunks import pack_task, product_task
from srigl_fx.runtime.cpu.kernels.team import serial_task, team_task
from srigl_fx.runtime.cpu.kernels.value_gradient import value_gradient_task

_FUNCTIONS = (pack_task, product_task, value_gradient_task, serial_task, team_task)
TASKS = {function.__name__: function for function in _FUNCTIONS}
assert tuple(TASKS) == table.TORCH_TASKS
