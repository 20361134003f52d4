"""The functions of :mod:`srigl_fx.runtime.cuda.kernels.intrinsics` for Numba's simulator, which lacks them.

Owns their meaning in Python. Pointers are objects that check each index (:class:`Pointer`); a vector load whose address
would not be aligned is an error here, as it is on the machine.
"""

import math
import threading
from typing import Any, Final

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
_HELD: Final = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
FLOAT: Final = np.dtype(np.float32)


class Pointer:
    """A flat array as a kernel sees one: no length, no negative index; what lies outside is an error.

    Example:
        >>> import numpy as np
        >>> numbers = Pointer(np.arange(3))
        >>> int(numbers[2])
        2
        >>> numbers[-1]
        Traceback (most recent call last):
        IndexError: element -1 of 3
    """

    def __init__(self, array: Array) -> None:
        self.array = array.reshape(-1)
        assert self.array.base is not None or self.array is array, "a copy would take the writes"

    def _checked(self, index: int) -> int:
        if not 0 <= index < len(self.array):
            raise IndexError(f"element {index} of {len(self.array)}")
        return index

    def __getitem__(self, index: int) -> Any:
        return self.array[self._checked(index)]

    def __setitem__(self, index: int, value: float) -> None:
        self.array[self._checked(index)] = value

    def load(self, index: int, count: int) -> Array:
        """``count`` elements that are aligned to as many."""
        if index % count:
            raise IndexError(f"a load of {count} elements from {index} is not aligned")
        self._checked(index + count - 1)
        return self.array[self._checked(index) : index + count]


def exp(x: float) -> float:
    """As on the machine: infinite, rather than an error, where it is too large."""
    return math.exp(x) if x < 709 or math.isnan(x) else math.inf


erf, tanh = math.erf, math.tanh


def load_offsets4(pointer: Pointer, index: int) -> tuple[int, ...]:
    """Four numbers of 16 bits."""
    return tuple(pointer.load(index, 4).tolist())


def _load_value(pointer: Pointer, index: int) -> Any:
    return np.float32(pointer[index])


def _load_values4(pointer: Pointer, index: int) -> Any:
    return tuple(pointer.load(index, 4).astype(np.float32))


LOAD_VALUE: Final = dict.fromkeys(_HELD, _load_value)
LOAD_VALUES4: Final = dict.fromkeys(_HELD, _load_values4)


def _place(array: Array, index: int, count: int) -> slice:
    if index % count or not 0 <= index <= len(array) - count:
        raise IndexError(f"{count} elements of shared memory from {index} of {len(array)}")
    return slice(index, index + count)


def shared_load1(array: Array, index: int) -> Any:
    """One float."""
    return array[_place(array, index, 1)][0]


def shared_load2(array: Array, index: int) -> tuple[Any, ...]:
    """Two floats."""
    return tuple(array[_place(array, index, 2)])


def shared_load4(array: Array, index: int) -> tuple[Any, ...]:
    """Four floats."""
    return tuple(array[_place(array, index, 4)])


def _shared_store(array: Array, index: int, *numbers: float) -> None:
    array[_place(array, index, len(numbers))] = numbers


shared_store1 = shared_store2 = shared_store4 = _shared_store


# What the threads of the one block that runs hand over: the simulator computes blocks one after the other.
_HANDED_OVER: Final[dict[int, float]] = {}


def shuffle_xor(number: float, distance: int) -> float:
    """The number of the lane whose place differs in this bit.

    All threads of the block wait for each other, rather than those of the warp: a kernel must have all of them call
    this equally often, which is more than the machine asks for.
    """
    thread: Any = threading.current_thread()
    _HANDED_OVER[thread.thread_id] = number
    thread.syncthreads()
    theirs = _HANDED_OVER[thread.thread_id ^ distance]
    thread.syncthreads()
    return theirs
