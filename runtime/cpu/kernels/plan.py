"""The plan of what runs where: which kernel computes a call, in which packed form, and into how many tasks it is cut.

Owns these rules, in whole numbers and without a branch on who asks: the operators of torch and the cost model call them
as they are, and Numba compiles the same functions for the operators of ONNX Runtime. It must not know how a kernel
works; :mod:`srigl_fx.runtime.cpu.kernels.table` describes them.
"""

from typing import Final

# The kernels of a linear layer; a convolution has those called ROWS and TILE.
ROWS: Final = 0  # from the canonical format, weight by weight
STRIDED: Final = 1  # the same for tensors that are feature-major
DOT: Final = 2  # from a dot panel: inputs are looked up in registers
TILE: Final = 3  # from a tile panel: 16 or 32 samples, or output positions, side by side
INT8_DOT: Final = 4  # the same two for values of eight bits, with activations that are rounded to as many
INT8_TILE: Final = 5
SHARED_TILE: Final = 6  # TILE for rows that share their inputs, by fours
INNERMOST: Final = 7  # of convolutions: from a sample panel, between tensors that have samples innermost

LEAST_FEATURE_MAJOR: Final = 16  # samples from which on a layer gains from a feature-major neighbour
WIDE_WINDOW: Final = 256  # inputs of a dot panel's window from which on its indices have two bytes
_WIDEST_WINDOW: Final = 1 << 16  # which these can name
COLUMNS: Final = 32  # of a full tile
INT8_COLUMNS: Final = 64  # of a full tile of bytes, and samples that a part of a dot panel of bytes is read for
MOST_INT8_DOT_SAMPLES: Final = 48  # from a dot panel of bytes; more take less time as a tile, used or not
INT8_STEP: Final = 32  # of which the windows of a dot panel of bytes start at a multiple
KNOWN_BYTES: Final = 3 * 4 * INT8_COLUMNS  # of what is known of 64 samples: kernels.int8_samples
_MOST_GATHERED_SAMPLES: Final = 2  # of a dot panel of bytes, where they are not looked up in registers
LANES: Final = 16  # of a vector: rows of a group, and output positions of a convolution, come in as many
STEPS: Final = 4  # kept weights of a row that a panel has beside each other
CACHE_LINE: Final = 64  # bytes
INNERMOST_POSITIONS: Final = 4  # output positions whose sums are in registers at once, at most
_INNERMOST_WINDOW: Final = 256  # channels that are read at a time: with four positions 32 or 64 KB
_MOST_INNERMOST_REACH: Final = 1 << 24  # blocks of samples that the taps of a row of a kernel, or filters, may be apart
CHUNK_FLOATS: Final = 1 << 18  # of packed samples that are held at a time, about what a second-level cache does
_MOST_TILE_INPUTS: Final = 65535  # a tile's indices are uint16, and one of them names a row of zeros
_IN_CACHE: Final = 300_000  # kept weights that a second-level cache holds
_TASK_WORK: Final = 1 << 16  # multiply-adds that are worth a task
MOST_INLINE: Final = 1 << 16  # numbers that are rounded in less time than other threads take to start
MOST_TASKS: Final = 16  # where it is not known how many threads there are


def dot_window(level: int, in_features: int, n_active: int, k: int) -> int:
    """The window of a dot panel for an instruction set of a level (``isa.level_of``); 0 where there is no such kernel.

    AVX-512 looks up 64 or 128 inputs in registers: more take longer, but leave fewer gaps, which counts where weights
    are few or come from memory. AVX2 loads each by its index: from all inputs, as two bytes can name them, so that rows
    that keep equally many weights leave no gaps at all.
    """
    if level == 0 or n_active * k == 0:
        return 0
    if level == 1:
        return max(WIDE_WINDOW, min(in_features, _WIDEST_WINDOW))
    if in_features < 64:
        return 0
    wide = in_features >= 128 and (100 * k < 3 * in_features or n_active * k > _IN_CACHE)
    return 128 if wide else 64


def most_dot_samples(level: int) -> int:
    """Up to how many samples looking inputs up for each beats laying samples side by side, with an instruction set.

    AVX2 loads inputs one by one instead, and takes as long for three samples as a tile takes for 16.

    Example:
        >>> most_dot_samples(1), most_dot_samples(2)
        (2, 5)
    """
    return 5 if level == 2 else 2


def tile_window(in_features: int, n_active: int, k: int) -> int:
    """The window of a tile panel; 0 where there is no such kernel.

    It is sized so that a row keeps about 25 weights in it: then few slots of the panel stay empty, and the inputs of a
    window stay in the first-level cache while all rows read them.
    """
    if in_features > _MOST_TILE_INPUTS or n_active * k == 0:
        return 0
    if 100 * k < 2 * in_features:
        return in_features
    return 512 if 100 * k < 7 * in_features else 256


def linear_kernel(
    level: int, in_features: int, n_active: int, k: int, batch: int, feature_major: bool, packed: bool
) -> int:
    """The kernel of a linear layer: ROWS, STRIDED, DOT or TILE.

    Args:
        level: That of the instruction set (``isa.level_of``).
        in_features: Inputs of the layer.
        n_active: Its rows that are not ablated.
        k: The weights that each of them keeps.
        batch: Samples of the call.
        feature_major: Whether the input or the output is.
        packed: Whether a packed weight may be kept: not where weights change from call to call.

    Example:
        >>> [linear_kernel(2, 768, 768, 77, batch, False, True) for batch in (1, 64)] == [DOT, TILE]
        True
    """
    few = not feature_major and batch <= most_dot_samples(level)
    if packed and few and dot_window(level, in_features, n_active, k) != 0:
        return DOT
    # One sample alone leaves 15 of 16 columns of a tile empty, and rows are faster. From two samples on they are not:
    # of layers too narrow for a dot panel, tiles take 1.07 times as long at worst, and 0.4 times at best.
    if packed and (feature_major or batch > 1) and tile_window(in_features, n_active, k) != 0:
        return TILE
    return STRIDED if feature_major else ROWS


def int8_window(lookup: bool, kernel: int, in_features: int, k: int) -> int:
    """The window of a panel of eight bits; 0 where there is none.

    That of a dot panel is what registers hold, where bytes are looked up in them, or else all inputs, as two bytes can
    name them. A second register takes longer to look up in, but leaves fewer gaps, which counts where weights are few.
    """
    if kernel in (ROWS, STRIDED):
        return 0
    if kernel == INT8_TILE:
        return in_features
    if not lookup:
        return max(WIDE_WINDOW, min(in_features, _WIDEST_WINDOW))
    return 128 if 100 * k < 3 * in_features else 64


def int8_linear_kernel(lookup: bool, in_features: int, n_active: int, k: int, batch: int, feature_major: bool) -> int:
    """The kernel of a linear layer with values of eight bits: INT8_DOT or INT8_TILE; any other where there are none.

    It is that of the first samples of a call: :func:`int8_linear_samples` says of how many.

    Args:
        lookup: Whether bytes are looked up in registers.
        in_features: Inputs of the layer.
        n_active: Its rows that are not ablated.
        k: The weights that each of them keeps.
        batch: Samples of the call.
        feature_major: Whether the input or the output is.

    Example:
        >>> [int8_linear_kernel(True, 768, 768, 77, batch, False) for batch in (48, 49)] == [INT8_DOT, INT8_TILE]
        True
    """
    if n_active * k == 0:
        return STRIDED if feature_major else ROWS
    most = MOST_INT8_DOT_SAMPLES if lookup else _MOST_GATHERED_SAMPLES
    if (batch <= most and not feature_major) or in_features > _MOST_TILE_INPUTS:
        return INT8_DOT
    return INT8_TILE


def int8_linear_samples(lookup: bool, kernel: int, batch: int, feature_major: bool) -> int:
    """Of how many samples of a call the plan's kernel is; those that are left are like a call of their own.

    Where bytes are looked up, few samples take less time so than as a tile, however narrow; elsewhere one or two do.

    Example:
        >>> int8_linear_samples(True, INT8_TILE, 197, False), int8_linear_samples(True, INT8_TILE, 127, False)
        (192, 127)
    """
    rest, most = batch % INT8_COLUMNS, MOST_INT8_DOT_SAMPLES if lookup else _MOST_GATHERED_SAMPLES
    if kernel == INT8_TILE and not feature_major and rest <= most and rest < batch:
        return batch - rest
    return batch


def int8_tile_columns(narrow: bool, samples: int) -> int:
    """The columns of a tile of bytes that holds so many samples, one to 64 of them.

    Args:
        narrow: Whether 32 or 48 columns take less time than 64; 16 do everywhere.
        samples: How many samples there are.

    Example:
        >>> int8_tile_columns(True, 5), int8_tile_columns(True, 33), int8_tile_columns(False, 33)
        (16, 48, 64)
    """
    columns = (samples + LANES - 1) // LANES * LANES
    return columns if narrow or columns == LANES else INT8_COLUMNS


def int8_row_bytes(in_features: int, window: int) -> int:
    """The bytes of a rounded sample that a dot panel reads; a window may reach beyond its end, and rounding does."""
    return (max(in_features, window) + 2 * CACHE_LINE - 1) // CACHE_LINE * CACHE_LINE


def int8_rounded_bytes(kernel: int, in_features: int, window: int, batch: int) -> int:
    """The bytes of all samples of a call, rounded as the kernel reads them, if all tiles are full ones."""
    if kernel == INT8_DOT:
        return batch * int8_row_bytes(in_features, window)
    return int8_known_blocks(batch) * in_features * INT8_COLUMNS


def int8_known_blocks(batch: int) -> int:
    """The blocks of what is known of samples; also the tiles of bytes that hold them."""
    return (batch + INT8_COLUMNS - 1) // INT8_COLUMNS


def int8_conv_kernel(n_active: int, k: int) -> int:
    """The kernel of a convolution with values of eight bits: INT8_TILE, and where there are none any other."""
    return ROWS if n_active * k == 0 else INT8_TILE


def conv_kernel(in_features: int, n_active: int, k: int, block_rows: int, packed: bool) -> int:
    """The kernel of a convolution, ROWS or TILE; ``block_rows`` output rows read the same inputs.

    Example:
        >>> conv_kernel(576, 64, 58, 64, True) == TILE, conv_kernel(9, 64, 3, 1, True) == ROWS
        (True, True)
    """
    if packed and block_rows >= LANES and tile_window(in_features, n_active, k) != 0:
        return TILE
    return ROWS


def may_be_innermost(channels: int, filters: int, kernel_w: int, dilation_w: int) -> bool:
    """Whether a convolution over one or two axes has a kernel for samples that are innermost.

    A panel says in int32 how many bytes inputs and outputs are apart. Sizes of up to 2 ** 31 may be given.

    Example:
        >>> may_be_innermost(2048, 512, 3, 12), may_be_innermost(1 << 20, 512, 17, 1)
        (True, False)
    """
    span = (kernel_w - 1) * dilation_w + 1
    if max(channels, filters, span) >= _MOST_INNERMOST_REACH:
        return False
    return span * channels < _MOST_INNERMOST_REACH


def innermost_samples(level: int) -> int:
    """How many samples a block has, which lie innermost together: what a register holds, or two of narrow ones.

    Example:
        >>> [innermost_samples(level) for level in (0, 1, 2)]
        [8, 8, 16]
    """
    return LANES if level == 2 else LANES // 2


def innermost_splits(blocks: int, strips: int, work: int, threads: int) -> int:
    """Into how many shares the positions of each block of samples are cut for so many threads.

    Example:
        >>> innermost_splits(1, 784, 1 << 24, 2), innermost_splits(2, 784, 1 << 24, 2)
        (8, 1)
    """
    if blocks % threads == 0 or blocks >= 4 * threads:
        return 1
    return max(1, min(strips, 4 * threads, work // _TASK_WORK))


def window_of(kernel: int, level: int, in_features: int, n_active: int, k: int) -> int:
    """The window of the panel that a kernel reads; 0 where there is none."""
    if kernel == DOT:
        return dot_window(level, in_features, n_active, k)
    if kernel == INNERMOST:
        return _INNERMOST_WINDOW
    return tile_window(in_features, n_active, k) if kernel in (TILE, SHARED_TILE) else 0


def for_shared(kernel: int, n_active: int, index_rows: int) -> int:
    """The kernel that takes the place of another for a weight whose active rows read ``index_rows`` rows of indices.

    Example:
        >>> for_shared(TILE, 8, 2) == SHARED_TILE, for_shared(TILE, 8, 8) == TILE, for_shared(DOT, 8, 2) == DOT
        (True, True, True)
    """
    return SHARED_TILE if kernel == TILE and index_rows < n_active else kernel


def few_shared(level: int, samples: int, n_active: int, index_rows: int) -> bool:
    """Whether samples take less time one or two at a time than as a tile, from a shared tile panel.

    So it is up to four where an input is loaded once for two rows at least, on average. AVX-512 looks inputs up in
    registers instead, from a dot panel.

    Example:
        >>> [few_shared(1, samples, 768, 192) for samples in (4, 5)], few_shared(1, 4, 768, 700)
        ([True, False], False)
    """
    return level != 2 and samples <= 4 and 2 * index_rows <= n_active


def linear_for_shared(kernel: int, level: int, in_features: int, n_active: int, k: int, index_rows: int) -> int:
    """The kernel that takes the place of another of a linear layer for such a weight.

    Example:
        >>> [linear_for_shared(DOT, level, 64, 8, 9, 2) == SHARED_TILE for level in (1, 2)]
        [True, False]
    """
    few = kernel == DOT and few_shared(level, 1, n_active, index_rows)
    if few and tile_window(in_features, n_active, k) != 0:
        return SHARED_TILE
    return for_shared(kernel, n_active, index_rows)


def shares(tiles: int, groups: int, work: int, threads: int) -> int:
    """Into how many shares the rows of each tile are cut so that ``threads`` threads have about equally much to do.

    Example:
        >>> shares(1, 48, 1 << 24, 2), shares(8, 48, 1 << 24, 2), shares(1, 48, 1000, 2)
        (2, 1, 1)
    """
    if threads == 1 or work < 2 * _TASK_WORK or tiles % threads == 0 or tiles >= 4 * threads:
        return 1
    return max(1, min(groups, threads, work // _TASK_WORK))


def shares_for_any(rows: int, work: int) -> int:
    """Into how many tasks ``rows`` rows of ``work`` multiply-adds are cut where nobody says how many threads there are.

    Example:
        >>> shares_for_any(768, 1 << 24), shares_for_any(768, 1 << 17), shares_for_any(4, 1 << 24)
        (16, 2, 4)
    """
    return max(1, min(work // _TASK_WORK, min(rows, MOST_TASKS)))
