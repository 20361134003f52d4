"""One call of an operator: its inputs and output, and the kernel that computes it.

Owns the compute functions, as functions that Numba compiles ahead of time (words in, one word out). What may be
refused is ``checks``'s, how a kernel's work is shared is ``runs``'s, arithmetic is the kernels'; it must not know how
nodes are created or operators registered.
"""

from srigl_fx.runtime.cpu.kernels import conv, job, plan
from srigl_fx.runtime.cpu.kernels.compiled import planned
from srigl_fx.runtime.ort import abi
from srigl_fx.runtime.ort.checks import check_weights, describe_float, describe_x, tensor_data
from srigl_fx.runtime.ort.panels import find_panel, free_panel, kernel, make_panel, store_weights
from srigl_fx.runtime.ort.primitives import call, external, inlined, linked, load, load32, stack, store, text
from srigl_fx.runtime.ort.refusals import refuse
from srigl_fx.runtime.ort.runs import (
    MAX_ELEMENTS,
    field,
    run_byte_rows,
    run_byte_tiles,
    run_innermost,
    run_positions,
    run_rounding,
    run_rows,
    run_samples,
    run_tasks,
    run_tiles,
    set_field,
)

# Numba takes a constant for a literal only under a name of the module's own.
_TENSOR_WORDS, _WEIGHTS_WORDS, _JOB_WORDS = abi.TENSOR_WORDS, abi.WEIGHTS_WORDS, job.SIZE
_GEOMETRY_WORDS = conv.GEOMETRY_SIZE
_MAX_ELEMENTS = MAX_ELEMENTS
_FLOAT_BYTES = 4
_malloc, _free, _memcpy = external("malloc", 1), external("free", 1), external("memcpy", 3)
_DOT, _TILE, _SHARED_TILE, _STRIDED = plan.DOT, plan.TILE, plan.SHARED_TILE, plan.STRIDED
_INT8_DOT, _INT8_TILE, _INNERMOST = plan.INT8_DOT, plan.INT8_TILE, plan.INNERMOST
_WEIGHT_INPUTS, _MOST_WEIGHT_INPUTS = len(abi.INPUTS) - 1, len(abi.INPUTS)
_NO_PANEL = "not enough memory for its packed weight"
_NO_OUTPUTS = "not enough memory for its outputs before they are rounded"
_conv_kernel, _int8_conv_kernel = planned(plan.conv_kernel), planned(plan.int8_conv_kernel)
_for_shared = planned(plan.for_shared)

_PLAN_LINEAR, _ROWS_TASK, _STRIDED_TASK, _DOT_TASK, _CONV_PLAN = (
    abi.TABLE[task] for task in ("plan_linear", "rows_task", "strided_task", "dot_task", "conv_plan")
)
_TILE_TASK, _SHARED_TILE_TASK, _CONV_TILE, _CONV_SHARED_TILE = (
    abi.TABLE[task] for task in ("tile_task", "shared_tile_task", "conv_tile_task", "conv_shared_tile_task")
)
_CONV_INNERMOST = abi.TABLE["conv_innermost_task"]


@inlined
def _start_job(node: int, panel: int, weights: int, j: int) -> None:
    """Fill in what does not depend on the call, from the panel if there is one."""
    for i in range(_JOB_WORDS):
        store(j, abi.WORD * i, load(panel, abi.WORD * i) if panel != 0 else 0)
    if panel == 0:
        store_weights(node, weights, j)
    set_field(j, job.BIAS, load(weights, abi.WEIGHTS_BIAS))
    set_field(j, job.ACTIVATION, load(node, abi.NODE_ACTIVATION))
    set_field(j, job.X_SCALE, load(node, abi.NODE_X_SCALE))
    set_field(j, job.X_OFFSET, load(node, abi.NODE_X_OFFSET))
    set_field(j, job.X_BYTES, load(node, abi.NODE_X_BYTES))
    set_field(j, job.Y_SCALE, load(node, abi.NODE_Y_SCALE))
    set_field(j, job.Y_OFFSET, load(node, abi.NODE_Y_OFFSET))


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
    set_field(j, job.X, load(data, 0))
    set_field(j, job.Y, load(data, abi.WORD))
    set_field(j, job.RESIDUAL, load(data, 2 * abi.WORD))
    set_field(j, job.BATCH, batch)
    set_field(j, job.X_FEATURE_MAJOR, x_columns)
    set_field(j, job.Y_FEATURE_MAJOR, y_columns)


@inlined
def _output_bytes(node: int) -> int:
    """The bytes of an output."""
    return 1 if load(node, abi.NODE_Y_BYTES) != 0 else _FLOAT_BYTES


@linked
def _run_linear(node: int, context: int, number: int, j: int, batch: int) -> int:
    work = batch * field(j, job.N_ACTIVE) * field(j, job.K)
    if number == _TILE:
        return run_tiles(node, context, kernel(node, _TILE_TASK), j, batch, work)
    if number == _SHARED_TILE:
        return run_tiles(node, context, kernel(node, _SHARED_TILE_TASK), j, batch, work)
    if number == _INT8_TILE:
        return run_byte_tiles(node, context, j, batch, work)
    if number == _INT8_DOT:
        return run_byte_rows(node, context, j, batch, work)
    if number == _DOT:
        return run_rows(node, context, kernel(node, _DOT_TASK), field(j, job.PANEL_COUNT), j, work)
    y, count, memory, status = field(j, job.Y), batch * load(node, abi.NODE_OUT_FEATURES), 0, 0
    if load(node, abi.NODE_Y_BYTES) != 0:  # of a layer without weights: the kernels are those of floats
        memory = _malloc(count * _FLOAT_BYTES)
        if memory == 0:
            return refuse(node, text(_NO_OUTPUTS), 0, 0, 0)
        set_field(j, job.Y, memory)
    if number == _STRIDED:
        status = run_tasks(node, context, kernel(node, _STRIDED_TASK), 1, j)
    else:
        status = run_rows(node, context, kernel(node, _ROWS_TASK), field(j, job.N_ACTIVE), j, work)
    if status == 0 and memory != 0:
        status = run_rounding(node, context, j, memory, y, count)
    _free(memory)
    return status


def compute_linear(node: int, context: int) -> int:
    """KernelComputeV2 of CondensedLinear and those with epilogues."""
    x, weights, tensor, j, data = stack(1), stack(_WEIGHTS_WORDS), stack(_TENSOR_WORDS), stack(_JOB_WORDS), stack(3)
    status = _inputs(node, context, x, weights)
    if status == 0:
        status = describe_x(node, load(x, 0), tensor)
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
    first = 0
    while status == 0 and first < batch:
        _start_job(node, 0, weights, j)
        _set_call(j, data, batch - first, x_columns, y_columns)
        call(kernel(node, _PLAN_LINEAR), (j, 1))
        number, samples, panel, made = field(j, job.KERNEL), field(j, job.SAMPLES), 0, 0
        if number in (_DOT, _TILE, _SHARED_TILE, _INT8_DOT, _INT8_TILE):
            panel = find_panel(node, weights, number, n)
            if panel == 0 and load(node, abi.NODE_EIGHT_BITS) != 0:
                panel = made = make_panel(node, weights, number, n)
                if made == 0:
                    return refuse(node, text(_NO_PANEL), 0, 0, 0)
            if panel == 0:  # weights that are not constant, or no memory
                call(kernel(node, _PLAN_LINEAR), (j, 0))
                number = field(j, job.KERNEL)
            else:
                _start_job(node, panel, weights, j)
        _set_call(j, data, samples, x_columns, y_columns)
        status = _run_linear(node, context, number, j, samples)
        free_panel(made)
        # Only rows are computed in several parts.
        x_bytes = 1 if load(node, abi.NODE_X_BYTES) != 0 else _FLOAT_BYTES
        store(data, 0, load(data, 0) + samples * in_features * x_bytes)
        store(data, abi.WORD, load(data, abi.WORD) + samples * n * _output_bytes(node))
        if load(data, 2 * abi.WORD) != 0:
            store(data, 2 * abi.WORD, load(data, 2 * abi.WORD) + samples * n * _FLOAT_BYTES)
        first += samples
    return status


@linked
def _run_arranged(node: int, context: int, weights: int, geometry: int, data: int, batch: int) -> int:
    """The whole blocks of a convolution's samples, if these lie innermost; ``data`` then points behind them."""
    block = load(node, abi.NODE_BLOCK)
    whole = batch // block * block
    n, block_rows = load(node, abi.NODE_OUT_FEATURES), load(node, abi.NODE_OUT_FEATURES)
    block_rows //= load(geometry, abi.WORD * conv.GROUPS)
    panel, made, j = find_panel(node, weights, _INNERMOST, block_rows), 0, stack(_JOB_WORDS)
    if panel == 0:
        panel = made = make_panel(node, weights, _INNERMOST, block_rows)
        if made == 0:
            return refuse(node, text(_NO_PANEL), 0, 0, 0)
    _start_job(node, panel, weights, j)
    _set_call(j, data, whole, 0, 0)
    set_field(j, job.GEOMETRY, geometry)
    inputs, positions = load(geometry, abi.WORD * conv.CHANNELS), 1
    for i in range(3):
        inputs *= load(geometry, abi.WORD * (conv.IN_D + i))
        positions *= load(geometry, abi.WORD * (conv.OUT_D + i))
    work = whole * positions * field(j, job.N_ACTIVE) * field(j, job.K)
    status = run_innermost(node, context, kernel(node, _CONV_INNERMOST), j, whole // block, positions, work)
    free_panel(made)
    store(data, 0, load(data, 0) + whole * inputs * _FLOAT_BYTES)
    store(data, abi.WORD, load(data, abi.WORD) + whole * n * positions * _FLOAT_BYTES)
    if load(data, 2 * abi.WORD) != 0:
        store(data, 2 * abi.WORD, load(data, 2 * abi.WORD) + whole * n * positions * _FLOAT_BYTES)
    return status


def compute_conv(node: int, context: int) -> int:
    """KernelComputeV2 of CondensedConv, CondensedConvTranspose and those with epilogues."""
    x, weights, tensor, j, data = stack(1), stack(_WEIGHTS_WORDS), stack(_TENSOR_WORDS), stack(_JOB_WORDS), stack(3)
    status = _inputs(node, context, x, weights)
    if status == 0:
        status = describe_x(node, load(x, 0), tensor)
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
    block = load(node, abi.NODE_BLOCK)
    if load(node, abi.NODE_ARRANGED) != 0 and batch >= block:
        status = _run_arranged(node, context, weights, geometry, data, batch)
        elements = elements // batch * (batch % block)
        batch %= block
        if status != 0 or batch == 0:
            return status
    block_rows = n // load(geometry, abi.WORD * conv.GROUPS)
    in_features, panel = load(node, abi.NODE_IN_FEATURES), 0
    n_active, k = load(weights, abi.WEIGHTS_N_ACTIVE), load(weights, abi.WEIGHTS_K)
    number = _conv_kernel(in_features, n_active, k, block_rows, True)
    if load(weights, abi.WEIGHTS_INDEX_ROWS) != 0 and n_active > 0:
        number = _for_shared(number, n_active, load32(load(weights, abi.WEIGHTS_INDEX_ROWS), 4 * (n_active - 1)) + 1)
    if load(node, abi.NODE_EIGHT_BITS) != 0:
        number = _int8_conv_kernel(n_active, k)
    made = 0
    if number in (_TILE, _SHARED_TILE, _INT8_TILE):
        panel = find_panel(node, weights, number, block_rows)
    if panel == 0 and number == _INT8_TILE:
        panel = made = make_panel(node, weights, number, block_rows)
        if made == 0:
            return refuse(node, text(_NO_PANEL), 0, 0, 0)
    _start_job(node, panel, weights, j)
    _set_call(j, data, batch, 0, 0)
    store(geometry, abi.WORD * conv.K, k)
    set_field(j, job.GEOMETRY, geometry)
    call(kernel(node, _CONV_PLAN), (j, 0))
    if panel == 0 or number == _INT8_TILE:
        memory, y = 0, field(j, job.Y)
        if panel == 0 and load(node, abi.NODE_Y_BYTES) != 0:  # of a layer without weights: the kernel is that of floats
            memory = _malloc(elements * _FLOAT_BYTES)
            if memory == 0:
                return refuse(node, text(_NO_OUTPUTS), 0, 0, 0)
            set_field(j, job.Y, memory)
        status = run_samples(node, context, weights, j, geometry, batch, panel)
        if status == 0 and memory != 0:
            status = run_rounding(node, context, j, memory, y, elements)
        _free(memory)
        free_panel(made)
        return status
    positions = elements // n
    task = kernel(node, _CONV_SHARED_TILE if number == _SHARED_TILE else _CONV_TILE)
    return run_positions(node, context, task, j, positions, positions * n_active * k)


def compute_round(node: int, context: int) -> int:
    """KernelComputeV2 of RoundSamples."""
    api, x, y, tensor, j, data = (
        load(node, abi.NODE_API),
        stack(1),
        stack(1),
        stack(_TENSOR_WORDS),
        stack(_JOB_WORDS),
        stack(2),
    )
    status = call(load(api, abi.KERNEL_CONTEXT_GET_INPUT), (context, 0, x))
    if status == 0:
        status = describe_float(node, load(x, 0), text("x"), tensor)
    if status != 0:
        return status
    rank, shape, count = load(tensor, abi.TENSOR_RANK), tensor + abi.TENSOR_SHAPE, 1
    for i in range(rank):
        count *= load(shape, abi.WORD * i)  # x has as many elements, which is no overflow
    status = call(load(api, abi.KERNEL_CONTEXT_GET_OUTPUT), (context, 0, shape, rank, y))
    if status == 0:
        status = tensor_data(node, load(x, 0), data)
    if status == 0:
        status = tensor_data(node, load(y, 0), data + abi.WORD)
    if status != 0 or count == 0:
        return status
    for i in range(_JOB_WORDS):
        store(j, abi.WORD * i, 0)
    set_field(j, job.Y_SCALE, load(node, abi.NODE_Y_SCALE))
    set_field(j, job.Y_OFFSET, load(node, abi.NODE_Y_OFFSET))
    return run_rounding(node, context, j, load(data, 0), load(data, abi.WORD), count)


FUNCTIONS = (_run_linear, _run_arranged, compute_linear, compute_conv, compute_round)
