"""What kernels take from the machine: instructions when they are compiled, Python when they are simulated.

Owns the choice between :mod:`srigl_fx.runtime.cuda.kernels.intrinsics` and its counterpart for the simulator.
"""

from importlib import import_module
from typing import Any, Final

import numpy as np

from srigl_fx.runtime.cuda.kernels.compiler import SIMULATED, device

ZERO: Final = np.float32(0)
_source: Any = import_module(f"srigl_fx.runtime.cuda.kernels.{'simulated' if SIMULATED else 'intrinsics'}")
FLOAT: Final = _source.FLOAT  # of arrays in shared memory and in registers
erf, exp, tanh = _source.erf, _source.exp, _source.tanh
LOAD_VALUE: Final = _source.LOAD_VALUE
LOAD_VALUES4: Final = _source.LOAD_VALUES4
load_offsets4, shuffle_xor = _source.load_offsets4, _source.shuffle_xor
shared_load1, shared_load2, shared_load4 = _source.shared_load1, _source.shared_load2, _source.shared_load4
shared_store1, shared_store2, shared_store4 = _source.shared_store1, _source.shared_store2, _source.shared_store4


@device
def _add1(sums: Any, first: int, value: float, tile: Any, index: int) -> None:
    sums[first] += value * shared_load1(tile, index)


@device
def _add2(sums: Any, first: int, value: float, tile: Any, index: int) -> None:
    a, b = shared_load2(tile, index)
    sums[first] += value * a
    sums[first + 1] += value * b


@device
def _add4(sums: Any, first: int, value: float, tile: Any, index: int) -> None:
    a, b, c, d = shared_load4(tile, index)
    sums[first] += value * a
    sums[first + 1] += value * b
    sums[first + 2] += value * c
    sums[first + 3] += value * d


# For as many samples that are neighbours in shared memory: sums[first + s] += value * tile[index + s].
ADD: Final = {1: _add1, 2: _add2, 4: _add4}


@device
def _put1(tile: Any, index: int, numbers: Any, first: int) -> None:
    shared_store1(tile, index, numbers[first])


@device
def _put2(tile: Any, index: int, numbers: Any, first: int) -> None:
    shared_store2(tile, index, numbers[first], numbers[first + 1])


@device
def _put4(tile: Any, index: int, numbers: Any, first: int) -> None:
    shared_store4(tile, index, numbers[first], numbers[first + 1], numbers[first + 2], numbers[first + 3])


# The other way: tile[index + s] = numbers[first + s].
PUT: Final = {1: _put1, 2: _put2, 4: _put4}
