"""The tasks of one call, on the session's own threads: into how many a kernel's work is cut, and the memory they share.

Owns these runs, a function for each kind of kernel, as functions that Numba compiles ahead of time (words in, one word
out: an ``OrtStatus*``, 0 where all is well). A job is filled in but for what the cut decides. It must not know how
inputs are found or checked, nor which kernel is chosen.
"""

from srigl_fx.runtime.cpu.kernels import conv, job, plan
from srigl_fx.runtime.cpu.kernels.compiled import planned
from srigl_fx.runtime.ort import abi
from srigl_fx.runtime.ort.panels import kernel
from srigl_fx.runtime.ort.primitives import (
    call,
    external,
    inlined,
    linked,
    load,
    load8,
    load32,
    store,
    store8,
    store32,
    text,
)
from srigl_fx.runtime.ort.refusals import refuse
from srigl_fx.runtime.value_types import NUMBERS

# Numba takes a constant for a literal only under a name of the module's own.
_MAX_TASKS = plan.MOST_TASKS
_TASK_GROUPS = 4  # of rows, at least: a task reads all of its tile
_FEW_TILES = 4  # fewer of them share their rows out; those of a convolution fill their inputs anew for each share
_CACHE_LINE, _COLUMNS, _LANES, _INT8_COLUMNS = plan.CACHE_LINE, plan.COLUMNS, plan.LANES, plan.INT8_COLUMNS
_FLOAT32, _INT8_TILE = NUMBERS["float32"], plan.INT8_TILE
_CHUNK_ELEMENTS = plan.CHUNK_FLOATS
_SLACK = 64  # floats behind a packed sample that may be read
MAX_ELEMENTS = 1 << 48  # of a tensor; more than any machine holds, few enough to count in bytes

_malloc, _free = external("malloc", 1), external("free", 1)
_shares = planned(plan.shares_for_any)
_rounded_bytes, _known_blocks = planned(plan.int8_rounded_bytes), planned(plan.int8_known_blocks)
_KNOWN_BYTES, _MOST_INLINE = plan.KNOWN_BYTES, plan.MOST_INLINE
_INT8_DOT_TASK, _INT8_TILE_TASK, _INT8_CONV = (
    abi.TABLE[task] for task in ("int8_dot_task", "int8_tile_task", "int8_conv_task")
)
_INT8_SCALES, _INT8_PACK, _INT8_FILL, _INT8_ROUND = (
    abi.TABLE[task] for task in ("int8_scales_task", "int8_pack_task", "int8_fill_task", "int8_round_task")
)
_CONV_OFFSETS, _CONV_PACK, _CONV_ROWS, _WIDEN_VALUES = (
    abi.TABLE[task] for task in ("conv_offsets", "conv_pack_task", "conv_rows_task", "widen_values")
)


@inlined
def field(j: int, position: int) -> int:
    """A field of a job, by its position."""
    return load(j, abi.WORD * position)


@inlined
def set_field(j: int, position: int, value: int) -> None:
    """Fill in a field of a job."""
    store(j, abi.WORD * position, value)


@inlined
def run_tasks(node: int, context: int, task: int, tasks: int, j: int) -> int:
    """Run the tasks on the session's own threads."""
    status = 0
    if tasks > 1:
        status = call(load(load(node, abi.NODE_API), abi.KERNEL_CONTEXT_PARALLEL_FOR), (context, task, tasks, 0, j))
    elif tasks == 1:
        call(task, (j, 0))
    if status == 0 and field(j, job.FAILED) != 0:
        status = refuse(node, text("not enough memory for a tile"), 0, 0, 0)
    return status


@inlined
def run_rows(node: int, context: int, task: int, rows: int, j: int, work: int) -> int:
    """A kernel whose tasks are shares of the rows, or of groups of them."""
    splits = _shares(rows, work)
    set_field(j, job.ROW_SPLITS, splits)
    return run_tasks(node, context, task, splits, j)


@linked
def transpose_matrix(source: int, target: int, rows: int, columns: int, size: int) -> int:
    """Store the matrix (rows, columns) at ``source``, of elements of four bytes or one, transposed at ``target``."""
    for row in range(rows):
        for column in range(columns):
            to, found = column * rows + row, row * columns + column
            if size == 4:
                store32(target, 4 * to, load32(source, 4 * found))
            else:
                store8(target, to, load8(source, found))
    return 0


@linked
def run_rounding(node: int, context: int, j: int, source: int, target: int, count: int) -> int:
    """Round ``count`` floats with the scale of the job's outputs."""
    set_field(j, job.X, source)
    set_field(j, job.Y, target)
    set_field(j, job.BATCH, count)
    set_field(j, job.X_SCALE, field(j, job.Y_SCALE))
    set_field(j, job.X_OFFSET, field(j, job.Y_OFFSET))
    return run_rows(node, context, kernel(node, _INT8_ROUND), count // _CACHE_LINE + 1, j, count)


@linked
def _round_samples(node: int, context: int, j: int, batch: int) -> int:
    """Round all samples of a linear layer once, for tasks that share them: to PACKED, where there is room."""
    in_features = load(node, abi.NODE_IN_FEATURES)
    scales, fills, splits = kernel(node, _INT8_SCALES), kernel(node, _INT8_FILL), 1
    tasks = (batch + _LANES - 1) // _LANES if field(j, job.X_FEATURE_MAJOR) != 0 else batch
    shares = batch
    if field(j, job.KERNEL) == _INT8_TILE:
        shares = _known_blocks(batch)
        splits = max(1, _FEW_TILES // shares)
    set_field(j, job.ROW_SPLITS, splits)
    shares *= splits
    if batch * in_features < _MOST_INLINE:  # takes less time than other threads take to start
        for task in range(tasks):
            call(scales, (j, task))
        for task in range(shares):
            call(fills, (j, task))
        return run_tasks(node, context, fills, 0, j)  # whether they found memory
    status = run_tasks(node, context, scales, tasks, j)
    return run_tasks(node, context, fills, shares, j) if status == 0 else status


@inlined
def _run_rounded(node: int, context: int, task: int, tiles: int, splits: int, j: int, batch: int) -> int:
    """Tasks of a linear layer of eight bits, ``splits`` for each tile of samples."""
    memory, status, known = 0, 0, _known_blocks(batch) * _KNOWN_BYTES
    if splits > 1:
        rounded = _rounded_bytes(
            field(j, job.KERNEL), load(node, abi.NODE_IN_FEATURES), field(j, job.PANEL_WINDOW), batch
        )
        memory = _malloc(known + rounded + _CACHE_LINE)
    if memory == 0:
        splits = 1
    else:
        start = (memory + _CACHE_LINE - 1) // _CACHE_LINE * _CACHE_LINE
        for i in range(known // abi.WORD):
            store(start, abi.WORD * i, 0)
        set_field(j, job.X_SCALES, start)
        set_field(j, job.PACKED, start + known)
        status = _round_samples(node, context, j, batch)
    if status == 0:
        set_field(j, job.ROW_SPLITS, splits)
        status = run_tasks(node, context, task, tiles * splits, j)
    _free(memory)
    return status


@inlined
def run_byte_rows(node: int, context: int, j: int, batch: int, work: int) -> int:
    """The dot panel of eight bits, which reads and writes rows: tensors that lie by columns are copied."""
    in_features, n = load(node, abi.NODE_IN_FEATURES), load(node, abi.NODE_OUT_FEATURES)
    y, memory, rows = field(j, job.Y), 0, 0
    x_size = 1 if load(node, abi.NODE_X_BYTES) != 0 else 4
    y_size = 1 if load(node, abi.NODE_Y_BYTES) != 0 else 4
    if field(j, job.X_FEATURE_MAJOR) != 0 or field(j, job.Y_FEATURE_MAJOR) != 0:
        memory = _malloc(4 * batch * (in_features + 2 * n))
        if memory == 0:
            return refuse(node, text("not enough memory for copies of its tensors"), 0, 0, 0)
    if field(j, job.X_FEATURE_MAJOR) != 0:
        transpose_matrix(field(j, job.X), memory, in_features, batch, x_size)
        set_field(j, job.X, memory)
        set_field(j, job.X_FEATURE_MAJOR, 0)
    if field(j, job.Y_FEATURE_MAJOR) != 0:
        rows = memory + 4 * batch * in_features
        set_field(j, job.Y, rows)
        if field(j, job.RESIDUAL) != 0:
            transpose_matrix(field(j, job.RESIDUAL), rows + 4 * batch * n, n, batch, 4)
            set_field(j, job.RESIDUAL, rows + 4 * batch * n)
    splits = _shares(field(j, job.PANEL_COUNT), work)
    status = _run_rounded(node, context, kernel(node, _INT8_DOT_TASK), 1, splits, j, batch)
    if status == 0 and rows != 0:
        transpose_matrix(rows, y, batch, n, y_size)
    _free(memory)
    return status


@inlined
def run_tiles(node: int, context: int, task: int, j: int, batch: int, work: int) -> int:
    """Tiles of samples. The rows of few are shared by tasks, for which each thread fills them once."""
    tiles = (batch + _COLUMNS - 1) // _COLUMNS
    groups, in_features = field(j, job.PANEL_COUNT), load(node, abi.NODE_IN_FEATURES)
    splits, memory = 1, 0
    if tiles < _MAX_TASKS:
        splits = max(1, _shares(groups // _TASK_GROUPS, work) // tiles)
    tasks = tiles * splits
    if splits > 1:
        memory = _malloc(tasks * ((in_features + 1) * _COLUMNS * 4 + 2 * abi.WORD) + 2 * _CACHE_LINE)
        if memory == 0:
            splits, tasks = 1, tiles
    set_field(j, job.ROW_SPLITS, splits)
    if memory != 0:
        for i in range(2 * tasks):
            store(memory, abi.WORD * i, 0)
        set_field(j, job.TILE_OWNERS, memory)
        set_field(j, job.TILES, (memory + 2 * abi.WORD * tasks + _CACHE_LINE - 1) // _CACHE_LINE * _CACHE_LINE)
    status = run_tasks(node, context, task, tasks, j)
    if memory != 0:
        _free(memory)
    return status


@inlined
def run_byte_tiles(node: int, context: int, j: int, batch: int, work: int) -> int:
    """Tiles of 64 samples as bytes."""
    tiles, splits = _known_blocks(batch), 1
    if tiles < _FEW_TILES:
        splits = min(_shares(field(j, job.PANEL_COUNT), work), _FEW_TILES // tiles)
    return _run_rounded(node, context, kernel(node, _INT8_TILE_TASK), tiles, splits, j, batch)


@inlined
def run_positions(node: int, context: int, task: int, j: int, positions: int, work: int) -> int:
    """Tiles of a convolution's output positions."""
    tiles = (positions + _COLUMNS - 1) // _COLUMNS
    splits = 1
    if tiles < _FEW_TILES:
        splits = min(_shares(field(j, job.PANEL_COUNT), work), _FEW_TILES // tiles)
    set_field(j, job.ROW_SPLITS, splits)
    return run_tasks(node, context, task, tiles * splits, j)


@inlined
def run_innermost(node: int, context: int, task: int, j: int, blocks: int, positions: int, work: int) -> int:
    """Blocks of samples that lie innermost, whose positions few of them share out."""
    splits = 1
    if blocks < _MAX_TASKS:
        splits = max(1, min(_MAX_TASKS // blocks, _shares((positions + _LANES - 1) // _LANES, work)))
    set_field(j, job.ROW_SPLITS, splits)
    return run_tasks(node, context, task, blocks * splits, j)


@inlined
def run_samples(node: int, context: int, weights: int, j: int, geometry: int, batch: int, bytes_panel: int) -> int:
    """Pack and convolve the samples, a chunk at a time, in scratch that all tasks share.

    ``bytes_panel`` is 0 but for values of eight bits.
    """
    n_active, k = load(weights, abi.WEIGHTS_N_ACTIVE), load(weights, abi.WEIGHTS_K)
    channels = load(geometry, abi.WORD * conv.CHANNELS)
    # Where there is no weight, nothing reads what is packed, and x may be bytes.
    direct = (load(geometry, abi.WORD * conv.DIRECT) != 0 and bytes_panel == 0) or n_active * k == 0
    size, chunk = channels, batch
    for i in range(conv.PLANES_D, conv.PACKED_W + 1):
        if size > MAX_ELEMENTS // load(geometry, abi.WORD * i):
            return refuse(node, text("the padded input '@' is too large"), text("x"), 0, 0)
        size *= load(geometry, abi.WORD * i)
    packed_bytes, element = 0, 1 if bytes_panel != 0 else 4
    if not direct:
        size = (size // _LANES + 2) * _LANES + _SLACK
        chunk = max(1, min(batch, 4 * _CHUNK_ELEMENTS // (size * element)))
        packed_bytes = (chunk * size * element + _CACHE_LINE - 1) // _CACHE_LINE * _CACHE_LINE
    extra = 0  # of what is known of each sample, or the values as float32
    if bytes_panel != 0:
        extra = _known_blocks(batch) * _KNOWN_BYTES
    elif load(weights, abi.WEIGHTS_VALUE_TYPE) != _FLOAT32:
        extra = n_active * k * 4
    offsets_bytes = (load(node, abi.NODE_IN_FEATURES) * abi.WORD + _CACHE_LINE - 1) // _CACHE_LINE * _CACHE_LINE
    scratch = _malloc(offsets_bytes + packed_bytes + extra + 2 * _CACHE_LINE)
    if scratch == 0:
        return refuse(node, text("not enough memory for the padded input '@'"), text("x"), 0, 0)
    offsets = (scratch + _CACHE_LINE - 1) // _CACHE_LINE * _CACHE_LINE
    set_field(j, job.OFFSETS, offsets)
    call(kernel(node, _CONV_OFFSETS), (j, 0))
    set_field(j, job.PACKED, field(j, job.X) if direct else offsets + offsets_bytes)
    set_field(j, job.PACKED_SIZE, size)
    rows = (load(geometry, abi.WORD * conv.OUT_D) - 1) * load(geometry, abi.WORD * conv.PACKED_H)
    rows += load(geometry, abi.WORD * conv.OUT_H) - 1
    positions = rows * load(geometry, abi.WORD * conv.PACKED_W) + load(geometry, abi.WORD * conv.OUT_W)
    status, first, target, tiles = 0, 0, offsets + offsets_bytes + packed_bytes, 1
    pack, task, shared = kernel(node, _CONV_PACK), kernel(node, _CONV_ROWS), n_active
    if bytes_panel != 0:
        set_field(j, job.X_SCALES, target)
        status = run_tasks(node, context, kernel(node, _INT8_SCALES), batch, j)
        pack, task, shared = kernel(node, _INT8_PACK), kernel(node, _INT8_CONV), field(j, job.PANEL_COUNT)
        tiles = (positions + _INT8_COLUMNS - 1) // _INT8_COLUMNS
    elif extra != 0:
        call(kernel(node, _WIDEN_VALUES), (j, target))
        set_field(j, job.VALUES, target)
    while status == 0 and first < batch:
        samples = min(chunk, batch - first)
        set_field(j, job.SAMPLE, first)
        if not direct:
            splits = _shares(channels, size)
            set_field(j, job.ROW_SPLITS, splits)
            status = run_tasks(node, context, pack, samples * splits, j)
        if status == 0:
            splits = 1
            if samples * tiles < _FEW_TILES:
                splits = min(_shares(shared, positions * n_active * k), _FEW_TILES // (samples * tiles))
            set_field(j, job.ROW_SPLITS, splits)
            status = run_tasks(node, context, task, samples * tiles * splits, j)
        first += samples
    _free(scratch)
    return status


FUNCTIONS = (transpose_matrix, run_rounding, _round_samples)
