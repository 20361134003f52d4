"""Which kernel computes a call, and into how many tasks it is cut.

Owns these rules, in whole numbers, so that Numba compiles them for the operators of ONNX Runtime while those of torch
call them as they are. It must not know how a kernel works.
"""

from typing import Final

MOST_DOT_SAMPLES: Final = 5  # up to so many, looking inputs up for each beats laying samples side by side
COLUMNS: Final = 32  # of a full tile
LANES: Final = 16  # rows of a group
_MOST_TILE_INPUTS: Final = 65535  # a tile's indices are uint16, and one of them names a row of zeros
_IN_CACHE: Final = 300_000  # kept weights that a second-level cache holds
_TASK_WORK: Final = 1 << 16  # multiply-adds that are worth a task


def dot_window(level: int, in_features: int, n_active: int, k: int) -> int:
    """The window of a dot panel for an instruction set (its position in ISAS); 0 where there is no such kernel.

    AVX-512 looks up 64 or 128 inputs in registers: more take longer, but leave fewer gaps, which counts where weights
    are few or come from memory. AVX2 gathers, from as many as a byte can name.
    """
    if level == 0 or n_active * k == 0:
        return 0
    if level == 1:
        return 256
    if in_features < 64:
        return 0
    wide = in_features >= 128 and (100 * k < 3 * in_features or n_active * k > _IN_CACHE)
    return 128 if wide else 64


def tile_window(in_features: int, n_active: int, k: int) -> int:
    """The window of a tile panel, or 0: about 25 weights, so that few gaps are left and inputs stay in a near cache."""
    if in_features > _MOST_TILE_INPUTS or n_active * k == 0:
        return 0
    if 100 * k < 2 * in_features:
        return in_features
    return 512 if 100 * k < 7 * in_features else 256


def shares(tiles: int, groups: int, work: int, threads: int) -> int:
    """Into how many shares the rows of each tile are cut so that ``threads`` threads have about equally much to do.

    Example:
        >>> shares(1, 48, 1 << 24, 2), shares(8, 48, 1 << 24, 2), shares(1, 48, 1000, 2)
        (2, 1, 1)
    """
    if threads == 1 or work < 2 * _TASK_WORK or tiles % threads == 0 or tiles >= 4 * threads:
        return 1
    return max(1, min(groups, threads, work // _TASK_WORK))
