"""One call of an operator: its inputs and output, cut into tasks for the session's own threads.

Owns the two compute functions, as functions that Numba compiles ahead of time (words in, one word out). What may be
refused is ``checks``'s, arithmetic is the kernels'; it must not know how nodes are created or operators registered.
"""

from srigl_fx.runtime.kernels import conv
from srigl_fx.runtime.kernels.linear import TILE, TILED_FROM_BATCH
from srigl_fx.runtime.ort import abi
from srigl_fx.runtime.ort.checks import check_weights, describe_float, refuse, tensor_data
from srigl_fx.runtime.ort.primitives import call, external, inlined, load, stack, store, symbol, text

# Numba takes a constant for a literal only under a name of the module's own.
_TENSOR_WORDS, _WEIGHTS_WORDS, _JOB_WORDS = abi.TENSOR_WORDS, abi.WEIGHTS_WORDS, abi.JOB_WORDS
_GEOMETRY_WORDS = conv.GEOMETRY_SIZE
_ACCUMULATOR_WORDS = conv.ACCUMULATORS // 2 + 8  # and room to align them

_malloc, _free = external("malloc", 1), external("free", 1)

_TASK_WORK = 1 << 15  # multiply-adds that are worth a task of their own
_MAX_TASKS = 64
_CACHE_LINE = 64
_CHUNK_ELEMENTS = 1 << 18  # of packed samples that are held at a time, about what a second-level cache does
_MAX_ELEMENTS = 1 << 48  # of an output; more than any machine holds, few enough to count in bytes
_WEIGHT_INPUTS = len(abi.INPUTS) - 1


@inlined
def _index_kernel(node: int, table: int, index_type: int) -> int:
    return load(load(node, abi.NODE_KERNELS), table + (0 if index_type == abi.TYPE_UINT16 else abi.WORD))


def linear_rows_task(job: int, task: int) -> int:
    """The rows of one block, for every sample."""
    n_active, blocks = load(job, abi.JOB_N_ACTIVE), load(job, abi.JOB_BLOCKS)
    return call(
        load(job, abi.JOB_KERNEL),
        (
            load(job, abi.JOB_X),
            load(job, abi.JOB_VALUES),
            load(job, abi.JOB_INDICES),
            load(job, abi.JOB_ACTIVE),
            load(job, abi.JOB_BIAS),
            load(job, abi.JOB_Y),
            load(job, abi.JOB_BATCH),
            load(job, abi.JOB_IN_FEATURES),
            load(job, abi.JOB_OUT_FEATURES),
            load(job, abi.JOB_K),
            n_active * task // blocks,
            n_active * (task + 1) // blocks,
        ),
    )


def linear_tile_task(job: int, task: int) -> int:
    """All rows, for the samples of one tile."""
    in_features = load(job, abi.JOB_IN_FEATURES)
    scratch = _malloc((in_features + 1) * TILE * 4 + _CACHE_LINE)
    if scratch == 0:
        store(job, abi.JOB_OUT_OF_MEMORY, 1)
        return 0
    first = task * TILE
    call(
        load(job, abi.JOB_KERNEL),
        (
            load(job, abi.JOB_X),
            load(job, abi.JOB_VALUES),
            load(job, abi.JOB_INDICES),
            load(job, abi.JOB_ACTIVE),
            load(job, abi.JOB_BIAS),
            load(job, abi.JOB_Y),
            (scratch + _CACHE_LINE - 1) // _CACHE_LINE * _CACHE_LINE,
            first,
            min(load(job, abi.JOB_BATCH) - first, TILE),
            in_features,
            load(job, abi.JOB_OUT_FEATURES),
            load(job, abi.JOB_N_ACTIVE),
            load(job, abi.JOB_K),
        ),
    )
    return _free(scratch)


def conv_pack_task(job: int, task: int) -> int:
    """The channels of one block, for one sample of the chunk."""
    channels, blocks = load(load(job, abi.JOB_GEOMETRY), abi.WORD * conv.CHANNELS), load(job, abi.JOB_BLOCKS)
    sample, block = task // blocks, task % blocks
    return call(
        load(job, abi.JOB_KERNEL),
        (
            load(job, abi.JOB_X),
            load(job, abi.JOB_PACKED) + sample * load(job, abi.JOB_PACKED_BYTES),
            load(job, abi.JOB_GEOMETRY),
            load(job, abi.JOB_SAMPLE) + sample,
            channels * block // blocks,
            channels * (block + 1) // blocks,
        ),
    )


def conv_rows_task(job: int, task: int) -> int:
    """The filters of one block, for one sample of the chunk."""
    n_active, blocks = load(job, abi.JOB_N_ACTIVE), load(job, abi.JOB_BLOCKS)
    sample, block = task // blocks, task % blocks
    accumulators = stack(_ACCUMULATOR_WORDS)
    return call(
        load(job, abi.JOB_KERNEL),
        (
            load(job, abi.JOB_PACKED) + sample * load(job, abi.JOB_PACKED_BYTES),
            load(job, abi.JOB_VALUES),
            load(job, abi.JOB_INDICES),
            load(job, abi.JOB_ACTIVE),
            load(job, abi.JOB_BIAS),
            load(job, abi.JOB_Y),
            load(job, abi.JOB_GEOMETRY),
            load(job, abi.JOB_OFFSETS),
            (accumulators + _CACHE_LINE - 1) // _CACHE_LINE * _CACHE_LINE,
            load(job, abi.JOB_SAMPLE) + sample,
            n_active * block // blocks,
            n_active * (block + 1) // blocks,
        ),
    )


@inlined
def _blocks(rows: int, work: int) -> int:
    """Into how many tasks ``rows`` rows of ``work`` multiply-adds altogether are cut."""
    return max(1, min(work // _TASK_WORK, min(rows, _MAX_TASKS)))


@inlined
def _run_tasks(node: int, context: int, task: int, tasks: int, job: int) -> int:
    """Run the tasks on the session's own threads."""
    store(job, abi.JOB_OUT_OF_MEMORY, 0)
    status = 0
    if tasks > 1:
        status = call(load(load(node, abi.NODE_API), abi.KERNEL_CONTEXT_PARALLEL_FOR), (context, task, tasks, 0, job))
    elif tasks == 1:
        call(task, (job, 0))
    if status == 0 and load(job, abi.JOB_OUT_OF_MEMORY) != 0:
        status = refuse(node, text("not enough memory for a batch tile"), 0, 0, 0)
    return status


@inlined
def _inputs(node: int, context: int, x: int, weights: int) -> int:
    """Fetch and check the inputs of one call: ``x``'s OrtValue, and the weights."""
    api = load(node, abi.NODE_API)
    count = stack(1)
    status = call(load(api, abi.KERNEL_CONTEXT_GET_INPUT_COUNT), (context, count))
    if status != 0:
        return status
    if load(count, 0) != _WEIGHT_INPUTS + 1:
        return refuse(node, text("has % inputs, expected %"), 0, load(count, 0), _WEIGHT_INPUTS + 1)
    status = call(load(api, abi.KERNEL_CONTEXT_GET_INPUT), (context, 0, x))
    values = stack(_WEIGHT_INPUTS)
    for i in range(_WEIGHT_INPUTS):
        if status == 0:
            status = call(load(api, abi.KERNEL_CONTEXT_GET_INPUT), (context, i + 1, values + abi.WORD * i))
        if status == 0 and load(values, abi.WORD * i) == 0:
            status = refuse(node, text("input number % is missing"), 0, i + 1, 0)
    if status != 0:
        return status
    return check_weights(node, values, weights)


@inlined
def _output(node: int, context: int, shape: int, rank: int, x: int, job: int) -> int:
    """Allocate the output, and store the addresses of its and the input's elements in the job."""
    y = stack(1)
    status = call(load(load(node, abi.NODE_API), abi.KERNEL_CONTEXT_GET_OUTPUT), (context, 0, shape, rank, y))
    if status == 0:
        status = tensor_data(node, load(y, 0), job + abi.JOB_Y)
    if status == 0:
        status = tensor_data(node, x, job + abi.JOB_X)
    return status


@inlined
def _store_weights(node: int, weights: int, job: int) -> None:
    store(job, abi.JOB_VALUES, load(weights, abi.WEIGHTS_VALUES))
    store(job, abi.JOB_INDICES, load(weights, abi.WEIGHTS_INDICES))
    store(job, abi.JOB_ACTIVE, load(weights, abi.WEIGHTS_ACTIVE))
    store(job, abi.JOB_BIAS, load(weights, abi.WEIGHTS_BIAS))
    store(job, abi.JOB_N_ACTIVE, load(weights, abi.WEIGHTS_N_ACTIVE))
    store(job, abi.JOB_K, load(weights, abi.WEIGHTS_K))


def compute_linear(node: int, context: int) -> int:
    """KernelComputeV2 of CondensedLinear."""
    x, weights, tensor, job = stack(1), stack(_WEIGHTS_WORDS), stack(_TENSOR_WORDS), stack(_JOB_WORDS)
    status = _inputs(node, context, x, weights)
    if status == 0:
        status = describe_float(node, load(x, 0), text("x"), tensor)
    if status != 0:
        return status
    in_features, n = load(node, abi.NODE_IN_FEATURES), load(node, abi.NODE_OUT_FEATURES)
    rank, shape = load(tensor, abi.TENSOR_RANK), tensor + abi.TENSOR_SHAPE
    if rank < 1:
        return refuse(node, text("input '@' is a scalar, expected (..., %)"), text("x"), in_features, 0)
    last = abi.WORD * (rank - 1)
    if load(shape, last) != in_features:
        return refuse(
            node, text("the last dimension of input '@' is %, expected %"), text("x"), load(shape, last), in_features
        )
    batch = 1
    for i in range(rank - 1):
        size = load(shape, abi.WORD * i)
        if size > 0 and batch > _MAX_ELEMENTS // size:
            return refuse(node, text("input '@' has too many samples"), text("x"), 0, 0)
        batch *= size
    if batch > _MAX_ELEMENTS // n:
        return refuse(node, text("the output of % samples is too large"), 0, batch, 0)
    store(shape, last, n)
    status = _output(node, context, shape, rank, load(x, 0), job)
    if status != 0 or batch == 0:
        return status
    _store_weights(node, weights, job)
    store(job, abi.JOB_BATCH, batch)
    store(job, abi.JOB_IN_FEATURES, in_features)
    store(job, abi.JOB_OUT_FEATURES, n)
    n_active, k = load(job, abi.JOB_N_ACTIVE), load(job, abi.JOB_K)
    if n_active < n:
        kernel = load(load(node, abi.NODE_KERNELS), abi.TABLE_FILL_BIAS)
        call(kernel, (load(job, abi.JOB_BIAS), load(job, abi.JOB_Y), batch, n))
    if n_active == 0:
        return 0
    index_type = load(weights, abi.WEIGHTS_INDEX_TYPE)
    if batch >= TILED_FROM_BATCH:
        store(job, abi.JOB_KERNEL, _index_kernel(node, abi.TABLE_LINEAR_TILE, index_type))
        return _run_tasks(node, context, symbol("srigl_linear_tile_task"), (batch + TILE - 1) // TILE, job)
    blocks = _blocks(n_active, batch * n_active * k)
    store(job, abi.JOB_BLOCKS, blocks)
    store(job, abi.JOB_KERNEL, _index_kernel(node, abi.TABLE_LINEAR_ROWS, index_type))
    return _run_tasks(node, context, symbol("srigl_linear_rows_task"), blocks, job)


@inlined
def _run_conv(node: int, context: int, job: int, batch: int, plane: int, rows: int) -> int:
    """Pack and convolve the samples, a chunk at a time, in scratch that all tasks share."""
    geometry, kernels = load(job, abi.JOB_GEOMETRY), load(node, abi.NODE_KERNELS)
    n_active, k = load(job, abi.JOB_N_ACTIVE), load(job, abi.JOB_K)
    channels = load(geometry, abi.WORD * conv.CHANNELS)
    call(load(kernels, abi.TABLE_CONV_PLAN), (geometry,))
    direct = load(geometry, abi.WORD * conv.DIRECT) != 0
    size, chunk = 0, batch
    if not direct:
        size = channels
        for i in range(conv.PLANES_D, conv.PACKED_W + 1):
            if size > _MAX_ELEMENTS // load(geometry, abi.WORD * i):
                return refuse(node, text("the padded input '@' is too large"), text("x"), 0, 0)
            size *= load(geometry, abi.WORD * i)
        size = (size // conv.LANES + 2) * conv.LANES
        chunk = max(1, min(batch, _CHUNK_ELEMENTS // size))
    offsets_bytes = (load(node, abi.NODE_IN_FEATURES) * abi.WORD + _CACHE_LINE - 1) // _CACHE_LINE * _CACHE_LINE
    scratch = _malloc(offsets_bytes + chunk * size * 4 + _CACHE_LINE)
    if scratch == 0:
        return refuse(node, text("not enough memory for the padded input '@'"), text("x"), 0, 0)
    offsets = (scratch + _CACHE_LINE - 1) // _CACHE_LINE * _CACHE_LINE
    call(load(kernels, abi.TABLE_CONV_TAP_OFFSETS), (offsets, geometry))
    store(job, abi.JOB_OFFSETS, offsets)
    store(job, abi.JOB_PACKED, load(job, abi.JOB_X) if direct else offsets + offsets_bytes)
    store(job, abi.JOB_PACKED_BYTES, size * 4)
    status = first = 0
    while status == 0 and first < batch:
        samples = min(chunk, batch - first)
        store(job, abi.JOB_SAMPLE, first)
        if not direct:
            blocks = _blocks(channels, size)
            store(job, abi.JOB_BLOCKS, blocks)
            store(job, abi.JOB_KERNEL, load(kernels, abi.TABLE_CONV_PACK))
            status = _run_tasks(node, context, symbol("srigl_conv_pack_task"), samples * blocks, job)
        if status == 0:
            blocks = _blocks(n_active, n_active * k * plane)
            store(job, abi.JOB_BLOCKS, blocks)
            store(job, abi.JOB_KERNEL, rows)
            status = _run_tasks(node, context, symbol("srigl_conv_rows_task"), samples * blocks, job)
        first += samples
    _free(scratch)
    return status


def compute_conv(node: int, context: int) -> int:
    """KernelComputeV2 of CondensedConv."""
    x, weights, tensor, job = stack(1), stack(_WEIGHTS_WORDS), stack(_TENSOR_WORDS), stack(_JOB_WORDS)
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
    elements, plane = batch * n if batch <= abi.MAX_SIZE else -1, 1
    for i in range(spatial):
        axis = 3 - spatial + i  # of three
        size, kernel = load(shape, abi.WORD * (2 + i)), load(geometry, abi.WORD * (conv.KERNEL_D + axis))
        if size > abi.MAX_SIZE:
            return refuse(node, text("input '@' has a dimension of %, more than %"), text("x"), size, abi.MAX_SIZE)
        pads = load(geometry, abi.WORD * (conv.PAD_D + axis)) + load(node, abi.NODE_PADS_END + abi.WORD * axis)
        extent = load(geometry, abi.WORD * (conv.DILATION_D + axis)) * (kernel - 1) + 1
        if size + pads < extent:
            return refuse(
                node,
                text("input '@' is % long with its pads, less than the dilated kernel's %"),
                text("x"),
                size + pads,
                extent,
            )
        out = (size + pads - extent) // load(geometry, abi.WORD * (conv.STRIDE_D + axis)) + 1
        if elements > _MAX_ELEMENTS // out:
            elements = -1
        if elements >= 0:
            elements *= out
            plane = plane * out if elements > 0 else 0
        store(geometry, abi.WORD * (conv.IN_D + axis), size)
        store(geometry, abi.WORD * (conv.OUT_D + axis), out)
        store(shape, abi.WORD * (2 + i), out)
    if elements < 0:
        return refuse(node, text("the output of % samples is too large"), 0, batch, 0)
    status = _output(node, context, shape, rank, load(x, 0), job)
    if status != 0 or elements == 0:
        return status
    _store_weights(node, weights, job)
    n_active, k = load(job, abi.JOB_N_ACTIVE), load(job, abi.JOB_K)
    if n_active < n:
        fill = load(load(node, abi.NODE_KERNELS), abi.TABLE_FILL_BIAS_PLANES)
        call(fill, (load(job, abi.JOB_BIAS), load(job, abi.JOB_Y), batch, n, plane))
    if n_active == 0:
        return 0
    store(geometry, abi.WORD * conv.K, k)
    store(job, abi.JOB_GEOMETRY, geometry)
    rows = _index_kernel(node, abi.TABLE_CONV_ROWS, load(weights, abi.WEIGHTS_INDEX_TYPE))
    return _run_conv(node, context, job, batch, plane, rows)


FUNCTIONS = (
    linear_rows_task,
    linear_tile_task,
    conv_pack_task,
    conv_rows_task,
    compute_linear,
    compute_conv,
)
