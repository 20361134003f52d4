"""The packed copies of a condensed weight that CUDA kernels read.

Owns their layouts, by NumPy. It must not know kernels' loops, nor devices. Values of any dtype are copied as they are;
those of padding are zero, and their offsets say where the kernel keeps zeros, so that no input is read for padding.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from srigl_fx.runtime.format import is_padding

Array = NDArray[Any]
FOUR: Final = 4  # entries that are loaded at once
LANES: Final = 32
LARGEST_WINDOW: Final = 2046  # whose zeros have an offset of 16 bits
LARGEST_IN_FEATURES: Final = 65535  # of rows of fours, likewise


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A packed weight.

    Attributes:
        values: (entries,) of the weight's dtype.
        offsets: uint16 (entries,).
        rows: int32 (n,), the active rows in their order, and then the ablated ones.
        starts: int32 (windows * n_active + 1,), where each row's fours begin in each window; empty for rows of fours.
        k: Entries of a row; 0 with windows.
    """

    values: Array
    offsets: Array
    rows: Array
    starts: Array
    k: int

    @property
    def nbytes(self) -> int:
        """The bytes of all arrays."""
        return int(self.values.nbytes + self.offsets.nbytes + self.rows.nbytes + self.starts.nbytes)


def _ordered(active: Array, n: int) -> Array:
    ablated = np.ones(n, np.bool_)
    ablated[active] = False
    return np.concatenate([active, np.flatnonzero(ablated)]).astype(np.int32)


def pack_rows(values: Array, indices: Array, active: Array, in_features: int, n: int) -> Packed:
    """Rows of fours: each row padded to a multiple of four entries.

    Args:
        values: (n_active, k) of any dtype whose zero has no bits set.
        indices: Integers (n_active, k), of each row.
        active: Integers (n_active,).
        in_features: The inputs of the layer, :data:`LARGEST_IN_FEATURES` at most.
        n: The outputs of the layer.

    Example:
        >>> packed = pack_rows(np.ones((1, 3)), np.array([[0, 2, 2]]), np.array([1]), 5, 3)
        >>> packed.values.tolist(), packed.offsets.tolist(), packed.rows.tolist()
        ([1.0, 1.0, 0.0, 0.0], [0, 2, 5, 5], [1, 0, 2])
    """
    kept = ~is_padding(indices)
    shape = len(values), -(-values.shape[1] // FOUR) * FOUR
    padded, offsets = np.zeros(shape, values.dtype), np.full(shape, in_features, np.uint16)
    padded[:, : values.shape[1]][kept] = values[kept]
    offsets[:, : values.shape[1]][kept] = indices[kept]
    none = np.zeros(0, np.int32)
    return Packed(
        values=padded.reshape(-1), offsets=offsets.reshape(-1), rows=_ordered(active, n), starts=none, k=shape[1]
    )


def place_of(inputs: Array, window: int) -> Array:
    """The offsets of inputs in a window of so many.

    Example:
        >>> place_of(np.array([0, 1, 31, 32, 40]), 40).tolist()
        [0, 33, 1023, 1024, 0]
    """
    inside = inputs.astype(np.int64) % window
    return inside * LANES + inside % LANES


def pack_windows(values: Array, indices: Array, active: Array, in_features: int, n: int, window: int) -> Packed:
    """Windows of rows: the entries of each row that lie in a window are neighbours, padded to a multiple of four.

    One four of padding stands at the end, which is loaded and not computed.

    Args:
        values: (n_active, k) of any dtype whose zero has no bits set.
        indices: Integers (n_active, k), of each row, ascending.
        active: Integers (n_active,).
        in_features: The inputs of the layer.
        n: The outputs of the layer.
        window: Inputs of a window, :data:`LARGEST_WINDOW` at most.

    Example:
        >>> packed = pack_windows(np.array([[1.0, 2.0, 3.0]]), np.array([[0, 1, 40]]), np.array([0]), 64, 1, 32)
        >>> packed.values.tolist()
        [1.0, 2.0, 0.0, 0.0, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
        >>> packed.offsets.tolist()[:6], packed.starts.tolist()
        ([0, 33, 1024, 1024, 264, 1024], [0, 1, 2])
    """
    n_active, k = values.shape
    windows = -(-in_features // window)
    kept = ~is_padding(indices)
    rows = np.broadcast_to(np.arange(n_active)[:, None], kept.shape)[kept]
    steps = np.broadcast_to(np.arange(k), kept.shape)[kept]
    inputs = indices[kept].astype(np.int64)
    segments = inputs // window * n_active + rows
    counts = np.bincount(segments, minlength=windows * n_active)
    starts = np.concatenate([[0], np.cumsum(-(-counts // FOUR))])
    # Kept entries stand first in their row, in the order of their inputs: those of earlier windows come before.
    before = np.cumsum(counts.reshape(windows, n_active), axis=0) - counts.reshape(windows, n_active)
    places = starts[segments] * FOUR + steps - before.reshape(-1)[segments]
    entries = (int(starts[-1]) + 1) * FOUR
    packed = np.zeros(entries, values.dtype)
    offsets = np.full(entries, window * LANES + window % LANES, np.uint16)
    packed[places], offsets[places] = values[kept], place_of(inputs, window)
    return Packed(values=packed, offsets=offsets, rows=_ordered(active, n), starts=starts.astype(np.int32), k=0)
