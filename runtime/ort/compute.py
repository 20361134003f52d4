"""One call of an operator: its inputs and output, cut into tasks for the session's own threads.

Owns the two compute functions, as functions that Numba compiles ahead of time (words in, one word out). What may be
refused is ``checks``'s, arithmetic is the kernels'; it must not know how nodes are created or operators registered.
"""

from srigl_fx.runtime.cpu.kernels import conv, job, plan
from srigl_fx.runtime.cpu.kernels.compiled import planned
from srigl_fx.runtime.ort import abi
from srigl_fx.runtime.ort.checks import check_weights, describe_float, tensor_data
from srigl_fx.runtime.ort.panels import find_panel, kernel, store_weights
from srigl_fx.runtime.ort.primitives import call, external, inlined, load, stack, store, text
from srigl_fx.runtime.ort.refusals import refuse
from srigl_fx.runtime.value_types import NUMBERS

# Numba takes a constant for a literal only under a name of the module's own.
_TENSOR_WORDS, _WEIGHTS_WORDS, _JOB_WORDS = abi.TENSOR_WORDS, abi.WEIGHTS_WORDS, job.SIZE
_GEOMETRY_WORDS = conv.GEOMETRY_SIZE

_malloc, _free = external("malloc", 1), external("free", 1)

_MAX_TASKS = plan.MOST_TASKS
_TASK_GROUPS = 4  # of rows, at least: a task reads all of its tile
_FEW_TILES = 4  # of a convolution: fewer of them share their rows out, each filling its inputs anew
_CACHE_LINE, _COLUMNS, _LANES = plan.CACHE_LINE, plan.COLUMNS, plan.LANES
_DOT, _TILE, _STRIDED = plan.DOT, plan.TILE, plan.STRIDED
_FLOAT32 = NUMBERS["float32"]
_CHUNK_ELEMENTS = plan.CHUNK_FLOATS
_SLACK = 64  # floats behind a packed sample that may be read
_MAX_ELEMENTS = 1 << 48  # of an output; more than any machine holds, few enough to count in bytes
_WEIGHT_INPUTS, _MOST_WEIGHT_INPUTS = len(abi.INPUTS) - 1, len(abi.INPUTS)
_INT8_DOT, _INT8_TILE, _INT8_COLUMNS = plan.INT8_DOT, plan.INT8_TILE, plan.INT8_COLUMNS
_NO_PANEL = "values of eight bits must be constants of the file, with indices, active and scales, or memory is short"
_shares, _conv_kernel = planned(plan.shares_for_any), planned(plan.conv_kernel)
_int8_conv_kernel = planned(plan.int8_conv_kernel)

_PLAN_LINEAR, _ROWS_TASK, _STRIDED_TASK, _DOT_TASK, _TILE_TASK = (
    abi.TABLE[task] for task in ("plan_linear", "rows_task", "strided_task", "dot_task", "tile_task")
)
_INT8_DOT_TASK, _INT8_TILE_TASK, _INT8_CONV, _INT8_SCALES, _INT8_PACK = (
    abi.TABLE[task]
    for task in ("int8_dot_task", "int8_tile_task", "int8_conv_task", "int8_scales_task", "int8_pack_task")
)
_CONV_PLAN, _CONV_OFFSETS, _CONV_PACK, _CONV_TILE, _CONV_ROWS, _WIDEN_VALUES = (
    abi.TABLE[task]
    for task in ("conv_plan", "conv_offsets", "conv_pack_task", "conv_tile_task", "conv_rows_task", "widen_values")
)


@inlined
def _field(j: int, position: int) -> int:
    return load(j, abi.WORD * position)


@inlined
def _set_field(j: int, position: int, value: int) -> None:
    store(j, abi.WORD * position, value)


@inlined
def _run_tasks(node: int, context: int, task: int, tasks: int, j: int) -> int:
    """Run the tasks on the session's own threads."""
    status = 0
    if tasks > 1:
        status = call(load(load(node, abi.NODE_API), abi.KERNEL_CONTEXT_PARALLEL_FOR), (context, task, tasks, 0, j))
    elif tasks == 1:
        call(task, (j, 0))
    if status == 0 and _field(j, job.FAILED) != 0:
        status = refuse(node, text("not enough memory for a tile"), 0, 0, 0)
    return status


@inlined
def _start_job(node: int, panel: int, weights: int, j: int) -> None:
    """Fill in what does not depend on the call, from the panel if there is one."""
    for i in range(_JOB_WORDS):
        store(j, abi.WORD * i, load(panel, abi.WORD * i) if panel != 0 else 0)
    if panel == 0:
        store_weights(node, weights, j)
    _set_field(j, job.BIAS, load(weights, abi.WEIGHTS_BIAS))
    _set_field(j, job.ACTIVATION, load(node, abi.NODE_ACTIVATION))


@inlined
def _inputs(node: int, context: int, x: int, weights: int) -> int:
    """Fetch and check the inputs of one call: ``x``'s OrtValue, and the weights."""
    api = load(node, abi.NODE_API)
    count = stack(1)
    status = call(load(api, abi.KERNEL_CONTEXT_GET_INPUT_COUNT), (context, count))
    if status != 0:
        return status
    inputs = _WEIGHT_INPUTS + load(node, abi.NODE_EIGHT_BITS)
    expected = inputs + 1 + load(node, abi.NODE_RESIDUAL)
    if load(count, 0) != expected:
        return refuse(node, text("has % inputs, expected %"), 0, load(count, 0), expected)
    status = call(load(api, abi.KERNEL_CONTEXT_GET_INPUT), (context, 0, x))
    values = stack(_MOST_WEIGHT_INPUTS)
    store(weights, abi.WEIGHTS_SCALES, 0)
    for i in range(inputs):
        if status == 0:
            status = call(load(api, abi.KERNEL_CONTEXT_GET_INPUT), (context, i + 1, values + abi.WORD * i))
        if status == 0 and load(values, abi.WORD * i) == 0:
            status = refuse(node, text("input number % is missing"), 0, i + 1, 0)
    if status != 0:
        return status
    return check_weights(node, values, weights)


@inlined
def _output(node: int, context: int, shape: int, rank: int, x: int, data: int) -> int:
    """Allocate the output; store where the elements of input, output and residual (0 if none) are at ``data``."""
    api = load(node, abi.NODE_API)
    y = stack(1)
    status = call(load(api, abi.KERNEL_CONTEXT_GET_OUTPUT), (context, 0, shape, rank, y))
    if status == 0:
        status = tensor_data(node, load(y, 0), data + abi.WORD)
    if status == 0:
        status = tensor_data(node, x, data)
    store(data, 2 * abi.WORD, 0)
    if status == 0 and load(node, abi.NODE_RESIDUAL) != 0:
        tensor = stack(_TENSOR_WORDS)
        place = _WEIGHT_INPUTS + load(node, abi.NODE_EIGHT_BITS) + 1
        status = call(load(api, abi.KERNEL_CONTEXT_GET_INPUT), (context, place, y))
        if status == 0:
            status = describe_float(node, load(y, 0), text("residual"), tensor)
        if status == 0:
            same = load(tensor, abi.TENSOR_RANK) == rank
            for i in range(rank):
                if same and load(tensor, abi.TENSOR_SHAPE + abi.WORD * i) != load(shape, abi.WORD * i):
                    same = False
            if not same:
                status = refuse(node, text("input '@' has another shape than the output"), text("residual"), 0, 0)
        if status == 0:
            status = tensor_data(node, load(y, 0), data + 2 * abi.WORD)
    return status


@inlined
def _set_call(j: int, data: int, batch: int, x_columns: int, y_columns: int) -> None:
    _set_field(j, job.X, load(data, 0))
    _set_field(j, job.Y, load(data, abi.WORD))
    _set_field(j, job.RESIDUAL, load(data, 2 * abi.WORD))
    _set_field(j, job.BATCH, batch)
    _set_field(j, job.X_FEATURE_MAJOR, x_columns)
    _set_field(j, job.Y_FEATURE_MAJOR, y_columns)


@inlined
def _run_tiles(node: int, context: int, j: int, batch: int, work: int) -> int:
    """Tiles of samples. The rows of few are shared by tasks, for which each thread fills them once."""
    tiles = (batch + _COLUMNS - 1) // _COLUMNS
    groups, in_features = _field(j, job.PANEL_COUNT), load(node, abi.NODE_IN_FEATURES)
    splits, memory = 1, 0
    if tiles < _MAX_TASKS:
        splits = max(1, _shares(groups // _TASK_GROUPS, work) // tiles)
    tasks = tiles * splits
    if splits > 1:
        memory = _malloc(tasks * ((in_features + 1) * _COLUMNS * 4 + 2 * abi.WORD) + 2 * _CACHE_LINE)
        if memory == 0:
            splits, tasks = 1, tiles
    _set_field(j, job.ROW_SPLITS, splits)
    if memory != 0:
        for i in range(2 * tasks):
            store(memory, abi.WORD * i, 0)
        _set_field(j, job.TILE_OWNERS, memory)
        _set_field(j, job.TILES, (memory + 2 * abi.WORD * tasks + _CACHE_LINE - 1) // _CACHE_LINE * _CACHE_LINE)
    status = _run_tasks(node, context, kernel(node, _TILE_TASK), tasks, j)
    if memory != 0:
        _free(memory)
    return status


@inlined
def _run_byte_tiles(node: int, context: int, task: int, j: int, columns: int, work: int) -> int:
    """Tiles of bytes, of samples or of a convolution's output positions."""
    tiles = (columns + _INT8_COLUMNS - 1) // _INT8_COLUMNS
    splits = 1
    if tiles < _FEW_TILES:
        splits = min(_shares(_field(j, job.PANEL_COUNT), work), _FEW_TILES // tiles)
    _set_field(j, job.ROW_SPLITS, splits)
    return _run_tasks(node, context, task, tiles * splits, j)


def compute_linear(node: int, context: int) -> int:
    """KernelComputeV2 of CondensedLinear and those with epilogues."""
    x, weights, tensor, j, data = stack(1), stack(_WEIGHTS_WORDS), stack(_TENSOR_WORDS), stack(_JOB_WORDS), stack(3)
    status = _inputs(node, context, x, weights)
    if status == 0:
        status = describe_float(node, load(x, 0), text("x"), tensor)
    if status != 0:
        return status
    in_features, n = load(node, abi.NODE_IN_FEATURES), load(node, abi.NODE_OUT_FEATURES)
    rank, shape = load(tensor, abi.TENSOR_RANK), tensor + abi.TENSOR_SHAPE
    if rank < 1:
        return refuse(node, text("input '@' is a scalar, expected (..., %)"), text("x"), in_features, 0)
    x_columns, y_columns = load(node, abi.NODE_X_FEATURE_MAJOR), load(node, abi.NODE_Y_FEATURE_MAJOR)
    where = 0 if x_columns != 0 else abi.WORD * (rank - 1)
    if load(shape, where) != in_features:
        if x_columns != 0:
            return refuse(
                node,
                text("the first dimension of input '@' is %, expected %"),
                text("x"),
                load(shape, where),
                in_features,
            )
        return refuse(
            node, text("the last dimension of input '@' is %, expected %"), text("x"), load(shape, where), in_features
        )
    batch = 1
    for i in range(rank):
        size = load(shape, abi.WORD * i)
        if abi.WORD * i != where:
            if size > 0 and batch > _MAX_ELEMENTS // size:
                return refuse(node, text("input '@' has too many samples"), text("x"), 0, 0)
            batch *= size
    if batch > _MAX_ELEMENTS // n:
        return refuse(node, text("the output of % samples is too large"), 0, batch, 0)
    if x_columns == y_columns:
        store(shape, where, n)
    elif x_columns != 0:
        for i in range(rank - 1):
            store(shape, abi.WORD * i, load(shape, abi.WORD * (i + 1)))
        store(shape, abi.WORD * (rank - 1), n)
    else:
        for i in range(rank - 1):
            store(shape, abi.WORD * (rank - 1 - i), load(shape, abi.WORD * (rank - 2 - i)))
        store(shape, 0, n)
    status = _output(node, context, shape, rank, load(x, 0), data)
    if status != 0 or batch == 0:
        return status
    _start_job(node, 0, weights, j)
    _set_call(j, data, batch, x_columns, y_columns)
    call(kernel(node, _PLAN_LINEAR), (j, 1))
    number, panel = _field(j, job.KERNEL), 0
    if number in (_DOT, _TILE, _INT8_DOT, _INT8_TILE):
        panel = find_panel(node, weights, number, n)
        if panel == 0 and load(node, abi.NODE_EIGHT_BITS) != 0:
            return refuse(node, text(_NO_PANEL), 0, 0, 0)
        if panel == 0:  # weights that are not constant, or no memory
            call(kernel(node, _PLAN_LINEAR), (j, 0))
            number = _field(j, job.KERNEL)
        else:
            _start_job(node, panel, weights, j)
            _set_call(j, data, batch, x_columns, y_columns)
    work = batch * _field(j, job.N_ACTIVE) * _field(j, job.K)
    if number == _TILE:
        return _run_tiles(node, context, j, batch, work)
    if number == _INT8_TILE:
        return _run_byte_tiles(node, context, kernel(node, _INT8_TILE_TASK), j, batch, work)
    if number == _STRIDED:
        return _run_tasks(node, context, kernel(node, _STRIDED_TASK), 1, j)
    task, rows = kernel(node, _ROWS_TASK), _field(j, job.N_ACTIVE)
    if number == _DOT:
        task, rows = kernel(node, _DOT_TASK), _field(j, job.PANEL_COUNT)
    elif number == _INT8_DOT:
        task, rows = kernel(node, _INT8_DOT_TASK), _field(j, job.PANEL_COUNT)
    splits = _shares(rows, work)
    _set_field(j, job.ROW_SPLITS, splits)
    return _run_tasks(node, context, task, splits, j)


@inlined
def _run_positions(node: int, context: int, j: int, positions: int, work: int) -> int:
    """Tiles of a convolution's output positions."""
    tiles = (positions + _COLUMNS - 1) // _COLUMNS
    splits = 1
    if tiles < _FEW_TILES:
        splits = min(_shares(_field(j, job.PANEL_COUNT), work), _FEW_TILES // tiles)
    _set_field(j, job.ROW_SPLITS, splits)
    return _run_tasks(node, context, kernel(node, _CONV_TILE), tiles * splits, j)


@inlined
def _run_samples(node: int, context: int, weights: int, j: int, geometry: int, batch: int, bytes_panel: int) -> int:
    """Pack and convolve the samples, a chunk at a time, in scratch that all tasks share.

    ``bytes_panel`` is 0 but for values of eight bits.
    """
    n_active, k = load(weights, abi.WEIGHTS_N_ACTIVE), load(weights, abi.WEIGHTS_K)
    channels = load(geometry, abi.WORD * conv.CHANNELS)
    direct = load(geometry, abi.WORD * conv.DIRECT) != 0 and bytes_panel == 0
    size, chunk = channels, batch
    for i in range(conv.PLANES_D, conv.PACKED_W + 1):
        if size > _MAX_ELEMENTS // load(geometry, abi.WORD * i):
            return refuse(node, text("the padded input '@' is too large"), text("x"), 0, 0)
        size *= load(geometry, abi.WORD * i)
    packed_bytes, element = 0, 1 if bytes_panel != 0 else 4
    if not direct:
        size = (size // _LANES + 2) * _LANES + _SLACK
        chunk = max(1, min(batch, 4 * _CHUNK_ELEMENTS // (size * element)))
        packed_bytes = (chunk * size * element + _CACHE_LINE - 1) // _CACHE_LINE * _CACHE_LINE
    extra = 0  # of what is known of each sample, or the values as float32
    if bytes_panel != 0:
        extra = batch * 12
    elif load(weights, abi.WEIGHTS_VALUE_TYPE) != _FLOAT32:
        extra = n_active * k * 4
    offsets_bytes = (load(node, abi.NODE_IN_FEATURES) * abi.WORD + _CACHE_LINE - 1) // _CACHE_LINE * _CACHE_LINE
    scratch = _malloc(offsets_bytes + packed_bytes + extra + 2 * _CACHE_LINE)
    if scratch == 0:
        return refuse(node, text("not enough memory for the padded input '@'"), text("x"), 0, 0)
    offsets = (scratch + _CACHE_LINE - 1) // _CACHE_LINE * _CACHE_LINE
    _set_field(j, job.OFFSETS, offsets)
    call(kernel(node, _CONV_OFFSETS), (j, 0))
    _set_field(j, job.PACKED, _field(j, job.X) if direct else offsets + offsets_bytes)
    _set_field(j, job.PACKED_SIZE, size)
    rows = (load(geometry, abi.WORD * conv.OUT_D) - 1) * load(geometry, abi.WORD * conv.PACKED_H)
    rows += load(geometry, abi.WORD * conv.OUT_H) - 1
    positions = rows * load(geometry, abi.WORD * conv.PACKED_W) + load(geometry, abi.WORD * conv.OUT_W)
    status, first, target, tiles = 0, 0, offsets + offsets_bytes + packed_bytes, 1
    pack, task, shared = kernel(node, _CONV_PACK), kernel(node, _CONV_ROWS), n_active
    if bytes_panel != 0:
        _set_field(j, job.X_SCALES, target)
        status = _run_tasks(node, context, kernel(node, _INT8_SCALES), batch, j)
        pack, task, shared = kernel(node, _INT8_PACK), kernel(node, _INT8_CONV), _field(j, job.PANEL_COUNT)
        tiles = (positions + _INT8_COLUMNS - 1) // _INT8_COLUMNS
    elif extra != 0:
        call(kernel(node, _WIDEN_VALUES), (j, target))
        _set_field(j, job.VALUES, target)
    while status == 0 and first < batch:
        samples = min(chunk, batch - first)
        _set_field(j, job.SAMPLE, first)
        if not direct:
            splits = _shares(channels, size)
            _set_field(j, job.ROW_SPLITS, splits)
            status = _run_tasks(node, context, pack, samples * splits, j)
        if status == 0:
            splits = 1
            if samples * tiles < _FEW_TILES:
                splits = min(_shares(shared, positions * n_active * k), _FEW_TILES // (samples * tiles))
            _set_field(j, job.ROW_SPLITS, splits)
            status = _run_tasks(node, context, task, samples * tiles * splits, j)
        first += samples
    _free(scratch)
    return status


def compute_conv(node: int, context: int) -> int:
    """KernelComputeV2 of CondensedConv, CondensedConvTranspose and those with epilogues."""
    x, weights, tensor, j, data = stack(1), stack(_WEIGHTS_WORDS), stack(_TENSOR_WORDS), stack(_JOB_WORDS), stack(3)
    status = _inputs(node, context, x, weights)
    if status == 0:
        status = describe_float(node, load(x, 0), text("x"), tensor)
    if status != 0:
        return status
    spatial, n = load(node, abi.NODE_SPATIAL_RANK), load(node, abi.NODE_OUT_FEATURES)
    rank, shape = load(tensor, abi.TENSOR_RANK), tensor + abi.TENSOR_SHAPE
    if rank != spatial + 2:
        return refuse(node, text("input '@' has rank %, expected %"), text("x"), rank, spatial + 2)
    geometry = stack(_GEOMETRY_WORDS)
    for i in range(conv.GEOMETRY_SIZE):
        store(geometry, abi.WORD * i, load(node, abi.NODE_GEOMETRY + abi.WORD * i))
    batch, channels = load(shape, 0), load(geometry, abi.WORD * conv.CHANNELS)
    if load(shape, abi.WORD) != channels:
        return refuse(node, text("input '@' has % channels, expected %"), text("x"), load(shape, abi.WORD), channels)
    store(shape, abi.WORD, n)
    elements = batch * n if batch <= abi.MAX_SIZE else -1
    transposed = load(node, abi.NODE_BASE) == abi.BASE_TRANSPOSED
    for i in range(spatial):
        axis = 3 - spatial + i  # of three
        size, taps = load(shape, abi.WORD * (2 + i)), load(geometry, abi.WORD * (conv.KERNEL_D + axis))
        if size > abi.MAX_SIZE:
            return refuse(node, text("input '@' has a dimension of %, more than %"), text("x"), size, abi.MAX_SIZE)
        before = load(geometry, abi.WORD * (conv.PAD_D + axis))
        pads = before + load(node, abi.NODE_PADS_END + abi.WORD * axis)
        stride = load(geometry, abi.WORD * (conv.STRIDE_D + axis))
        reach = load(geometry, abi.WORD * (conv.DILATION_D + axis)) * (taps - 1)
        out = 0
        if transposed:
            extra = load(node, abi.NODE_OUTPUT_PADDING + abi.WORD * axis)
            out = (size - 1) * stride + reach + 1 + extra - pads
            store(geometry, abi.WORD * (conv.PAD_D + axis), reach - before)
            store(geometry, abi.WORD * (conv.SPACING_D + axis), stride)
            store(geometry, abi.WORD * (conv.STRIDE_D + axis), 1)
            if size == 0 or out < 1:
                return refuse(node, text("input '@' is % long: its pads leave no output"), text("x"), size, 0)
        else:
            if size + pads < reach + 1:
                return refuse(
                    node,
                    text("input '@' is % long with its pads, less than the dilated kernel's %"),
                    text("x"),
                    size + pads,
                    reach + 1,
                )
            out = (size + pads - reach - 1) // stride + 1
        if elements > _MAX_ELEMENTS // out:
            elements = -1
        if elements >= 0:
            elements *= out
        store(geometry, abi.WORD * (conv.IN_D + axis), size)
        store(geometry, abi.WORD * (conv.OUT_D + axis), out)
        store(shape, abi.WORD * (2 + i), out)
    if transposed:
        store(geometry, abi.WORD * conv.FLIPPED, 1)
    if elements < 0:
        return refuse(node, text("the output of % samples is too large"), 0, batch, 0)
    status = _output(node, context, shape, rank, load(x, 0), data)
    if status != 0 or elements == 0:
        return status
    block_rows = n // load(geometry, abi.WORD * conv.GROUPS)
    in_features, panel = load(node, abi.NODE_IN_FEATURES), 0
    n_active, k = load(weights, abi.WEIGHTS_N_ACTIVE), load(weights, abi.WEIGHTS_K)
    if load(node, abi.NODE_EIGHT_BITS) != 0:
        if _int8_conv_kernel(n_active, k) == _INT8_TILE:
            panel = find_panel(node, weights, _INT8_TILE, block_rows)
            if panel == 0:
                return refuse(node, text(_NO_PANEL), 0, 0, 0)
    elif _conv_kernel(in_features, n_active, k, block_rows, True) == _TILE:
        panel = find_panel(node, weights, _TILE, block_rows)
    _start_job(node, panel, weights, j)
    _set_call(j, data, batch, 0, 0)
    store(geometry, abi.WORD * conv.K, k)
    _set_field(j, job.GEOMETRY, geometry)
    call(kernel(node, _CONV_PLAN), (j, 0))
    if panel == 0 or load(node, abi.NODE_EIGHT_BITS) != 0:
        return _run_samples(node, context, weights, j, geometry, batch, panel)
    positions = elements // n
    return _run_positions(node, context, j, positions, positions * n_active * k)


FUNCTIONS = (compute_linear, compute_conv)
