"""One call of an operator that stands between convolutions with samples innermost.

Owns the compute functions of bringing samples there and back, of pooling, of padding, of an affine map of
each channel and of concatenation, as functions
that Numba compiles ahead of time (words in, one word out). It must not know how nodes are created or operators
registered.
"""

from srigl_fx.runtime.cpu.kernels import conv, job, plan
from srigl_fx.runtime.ort import abi
from srigl_fx.runtime.ort.checks import describe_float, tensor_data
from srigl_fx.runtime.ort.panels import kernel
from srigl_fx.runtime.ort.primitives import call, external, linked, load, stack, store, text
from srigl_fx.runtime.ort.refusals import refuse
from srigl_fx.runtime.ort.runs import MAX_ELEMENTS, run_innermost, set_field

# Numba takes a constant for a literal only under a name of the module's own.
_TENSOR_WORDS, _JOB_WORDS, _GEOMETRY_WORDS = abi.TENSOR_WORDS, job.SIZE, conv.GEOMETRY_SIZE
_MAX_ELEMENTS, _LANES, _FLOAT_BYTES = MAX_ELEMENTS, plan.LANES, 4
_MAX_WINDOW = 1 << 20  # of what counts of a window for the work that there is
_memcpy = external("memcpy", 3)
_ARRANGE, _POOL, _POOL_REST, _PLACE, _AFFINE = (
    abi.TABLE[task] for task in ("arrange_task", "pool_samples_task", "pool_rest_task", "place_task", "affine_task")
)


def compute_arrange(node: int, context: int) -> int:
    """KernelComputeV2 of ArrangeSamples."""
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
    rank, shape, positions = load(tensor, abi.TENSOR_RANK), tensor + abi.TENSOR_SHAPE, 1
    if rank < 3:
        return refuse(node, text("input '@' has rank %, expected 3 or more"), text("x"), rank, 0)
    batch, channels = load(shape, 0), load(shape, abi.WORD)
    for i in range(2, rank):
        positions *= load(shape, abi.WORD * i)  # x has as many elements, which is no overflow
    status = call(load(api, abi.KERNEL_CONTEXT_GET_OUTPUT), (context, 0, shape, rank, y))
    if status == 0:
        status = tensor_data(node, load(x, 0), data)
    if status == 0:
        status = tensor_data(node, load(y, 0), data + abi.WORD)
    sample, block = channels * positions * _FLOAT_BYTES, load(node, abi.NODE_BLOCK)
    if status != 0 or batch * sample == 0:
        return status
    blocks = batch // block
    done = blocks * block * sample
    _memcpy(load(data, abi.WORD) + done, load(data, 0) + done, batch % block * sample)
    if blocks == 0:
        return 0
    for i in range(_JOB_WORDS):
        store(j, abi.WORD * i, 0)
    set_field(j, job.X, load(data, 0))
    set_field(j, job.Y, load(data, abi.WORD))
    set_field(j, job.KERNEL, load(node, abi.NODE_ARRANGED))
    set_field(j, job.IN_FEATURES, channels)
    set_field(j, job.OUT_FEATURES, positions)
    return run_innermost(node, context, kernel(node, _ARRANGE), j, blocks, positions, batch * channels * positions)


def compute_pool(node: int, context: int) -> int:
    """KernelComputeV2 of MaxPoolSamples and MeanPoolSamples."""
    api, x, y, tensor = load(node, abi.NODE_API), stack(1), stack(1), stack(_TENSOR_WORDS)
    j, data, geometry = stack(_JOB_WORDS), stack(2), stack(_GEOMETRY_WORDS)
    status = call(load(api, abi.KERNEL_CONTEXT_GET_INPUT), (context, 0, x))
    if status == 0:
        status = describe_float(node, load(x, 0), text("x"), tensor)
    if status != 0:
        return status
    rank, shape, spatial = load(tensor, abi.TENSOR_RANK), tensor + abi.TENSOR_SHAPE, load(node, abi.NODE_SPATIAL_RANK)
    if rank != spatial + 2:
        return refuse(node, text("input '@' has rank %, expected %"), text("x"), rank, spatial + 2)
    for i in range(conv.GEOMETRY_SIZE):
        store(geometry, abi.WORD * i, load(node, abi.NODE_GEOMETRY + abi.WORD * i))
    batch, channels, size, positions, window = load(shape, 0), load(shape, abi.WORD), _FLOAT_BYTES, 1, 1
    store(geometry, abi.WORD * conv.CHANNELS, channels)
    size *= channels
    for i in range(spatial):
        axis, given = 3 - spatial + i, load(shape, abi.WORD * (2 + i))
        before, taps = load(geometry, abi.WORD * (conv.PAD_D + axis)), load(geometry, abi.WORD * (conv.KERNEL_D + axis))
        after = load(node, abi.NODE_PADS_END + abi.WORD * axis)
        reach = load(geometry, abi.WORD * (conv.DILATION_D + axis)) * (taps - 1) + 1
        if given > abi.MAX_SIZE:
            return refuse(node, text("input '@' has a dimension of %, more than %"), text("x"), given, abi.MAX_SIZE)
        if 2 * before > reach or 2 * after > reach:
            return refuse(node, text("attribute '@' is more than half of a window of %"), text("pads"), reach, 0)
        if given + before + after < reach:
            return refuse(
                node,
                text("input '@' is % long with its pads, less than the dilated kernel's %"),
                text("x"),
                given + before + after,
                reach,
            )
        out = (given + before + after - reach) // load(geometry, abi.WORD * (conv.STRIDE_D + axis)) + 1
        store(geometry, abi.WORD * (conv.IN_D + axis), given)
        store(geometry, abi.WORD * (conv.OUT_D + axis), out)
        store(shape, abi.WORD * (2 + i), out)
        # Pads are at most half a window, so that there are no more windows than twice the elements of x.
        size, positions, window = size * given, positions * out, window * taps
    status = call(load(api, abi.KERNEL_CONTEXT_GET_OUTPUT), (context, 0, shape, rank, y))
    if status == 0:
        status = tensor_data(node, load(x, 0), data)
    if status == 0:
        status = tensor_data(node, load(y, 0), data + abi.WORD)
    if status != 0 or batch * channels == 0:
        return status
    for i in range(_JOB_WORDS):
        store(j, abi.WORD * i, 0)
    set_field(j, job.GEOMETRY, geometry)
    set_field(j, job.KERNEL, load(node, abi.NODE_ARRANGED))
    set_field(j, job.X, load(data, 0))
    set_field(j, job.Y, load(data, abi.WORD))
    block = load(node, abi.NODE_BLOCK)
    blocks = batch // block
    whole, work = blocks * block, channels * positions * min(window, _MAX_WINDOW)
    if blocks > 0:
        status = run_innermost(node, context, kernel(node, _POOL), j, blocks, positions, whole * work)
    set_field(j, job.X, load(data, 0) + whole * size)
    set_field(j, job.Y, load(data, abi.WORD) + whole * channels * positions * _FLOAT_BYTES)
    if status == 0 and whole < batch:
        status = run_innermost(
            node, context, kernel(node, _POOL_REST), j, batch - whole, channels * _LANES, (batch - whole) * work
        )
    return status


@linked
def _place(node: int, context: int, j: int, x: int, y: int, groups: int, rows: int, size: int) -> int:
    """Write groups of rows into longer ones: the job says what is around them (``place_task``)."""
    width = size + load(j, abi.WORD * job.K) + load(j, abi.WORD * job.BLOCK_ROWS)
    total = groups * (rows + load(j, abi.WORD * job.SAMPLE) + load(j, abi.WORD * job.SAMPLES))
    set_field(j, job.X, x)
    set_field(j, job.Y, y)
    set_field(j, job.BATCH, groups)
    set_field(j, job.OUT_FEATURES, rows)
    set_field(j, job.IN_FEATURES, size)
    if total * width == 0:
        return 0
    return run_innermost(node, context, kernel(node, _PLACE), j, 1, total * _LANES, total * width)


def compute_pad(node: int, context: int) -> int:
    """KernelComputeV2 of PadSamples."""
    api, x, y, tensor = load(node, abi.NODE_API), stack(1), stack(1), stack(_TENSOR_WORDS)
    j, data = stack(_JOB_WORDS), stack(2)
    status = call(load(api, abi.KERNEL_CONTEXT_GET_INPUT), (context, 0, x))
    if status == 0:
        status = describe_float(node, load(x, 0), text("x"), tensor)
    if status != 0:
        return status
    rank, shape, spatial = load(tensor, abi.TENSOR_RANK), tensor + abi.TENSOR_SHAPE, load(node, abi.NODE_SPATIAL_RANK)
    if rank != spatial + 2:
        return refuse(node, text("input '@' has rank %, expected %"), text("x"), rank, spatial + 2)
    batch, channels, rows, columns = load(shape, 0), load(shape, abi.WORD), 1, load(shape, abi.WORD * (rank - 1))
    if spatial == 2:
        rows = load(shape, abi.WORD * 2)
    elements = batch * channels  # of x, which is there
    for i in range(spatial):
        axis, given = 3 - spatial + i, load(shape, abi.WORD * (2 + i))
        out = given + load(node, abi.NODE_GEOMETRY + abi.WORD * (conv.PAD_D + axis))
        out += load(node, abi.NODE_PADS_END + abi.WORD * axis)
        if given > abi.MAX_SIZE:
            return refuse(node, text("input '@' has a dimension of %, more than %"), text("x"), given, abi.MAX_SIZE)
        if out > 0 and elements > _MAX_ELEMENTS // out:
            return refuse(node, text("the output of % samples is too large"), 0, batch, 0)
        elements *= out
        store(shape, abi.WORD * (2 + i), out)
    status = call(load(api, abi.KERNEL_CONTEXT_GET_OUTPUT), (context, 0, shape, rank, y))
    if status == 0:
        status = tensor_data(node, load(x, 0), data)
    if status == 0:
        status = tensor_data(node, load(y, 0), data + abi.WORD)
    if status != 0 or elements == 0:
        return status
    geometry, block = node + abi.NODE_GEOMETRY, load(node, abi.NODE_BLOCK)
    whole, each = batch // block * block, channels * block
    for i in range(_JOB_WORDS):
        store(j, abi.WORD * i, 0)
    set_field(j, job.KERNEL, 1)
    set_field(j, job.Y_SCALE, load(node, abi.NODE_Y_SCALE))
    set_field(j, job.SAMPLE, load(geometry, abi.WORD * conv.PAD_H))
    set_field(j, job.SAMPLES, load(node, abi.NODE_PADS_END + abi.WORD))
    left, right = load(geometry, abi.WORD * conv.PAD_W), load(node, abi.NODE_PADS_END + abi.WORD * 2)
    set_field(j, job.K, left * each)
    set_field(j, job.BLOCK_ROWS, right * each)
    status = _place(node, context, j, load(data, 0), load(data, abi.WORD), whole // block, rows, columns * each)
    if status != 0 or whole == batch:
        return status
    set_field(j, job.K, left)
    set_field(j, job.BLOCK_ROWS, right)
    rest = (batch - whole) * channels
    behind = load(data, abi.WORD) + elements // batch * whole * _FLOAT_BYTES
    return _place(
        node, context, j, load(data, 0) + whole * channels * rows * columns * _FLOAT_BYTES, behind, rest, rows, columns
    )


def compute_concat(node: int, context: int) -> int:
    """KernelComputeV2 of ConcatSamples."""
    api, x, y, tensor, shape = load(node, abi.NODE_API), stack(1), stack(1), stack(_TENSOR_WORDS), stack(_TENSOR_WORDS)
    j, data, channels, other = stack(_JOB_WORDS), stack(3), 0, stack(_TENSOR_WORDS)
    status = call(load(api, abi.KERNEL_CONTEXT_GET_INPUT), (context, 0, x))
    if status == 0:
        status = describe_float(node, load(x, 0), text("x"), tensor)
    if status == 0:
        status = tensor_data(node, load(x, 0), data)
    if status == 0:
        status = call(load(api, abi.KERNEL_CONTEXT_GET_INPUT), (context, 1, x))
    if status == 0:
        status = describe_float(node, load(x, 0), text("other"), other)
    if status == 0:
        status = tensor_data(node, load(x, 0), data + abi.WORD)
    if status != 0:
        return status
    rank, found = load(tensor, abi.TENSOR_RANK), load(other, abi.TENSOR_RANK)
    if rank < 3:
        return refuse(node, text("input '@' has rank %, expected 3 or more"), text("x"), rank, 0)
    if found != rank:
        return refuse(node, text("input '@' has rank %, expected %"), text("other"), found, rank)
    positions = 1
    for i in range(rank):
        size = load(tensor, abi.TENSOR_SHAPE + abi.WORD * i)
        given = load(other, abi.TENSOR_SHAPE + abi.WORD * i)
        if i != 1 and given != size:
            return refuse(node, text("input '@' has a dimension of %, expected %"), text("other"), given, size)
        store(shape, abi.WORD * i, size + given if i == 1 else size)
        if i > 1:
            positions *= size
    batch, channels, block = load(shape, 0), load(shape, abi.WORD), load(node, abi.NODE_BLOCK)
    if channels > abi.MAX_SIZE:
        return refuse(node, text("the output has % channels, more than %"), 0, channels, abi.MAX_SIZE)
    status = call(load(api, abi.KERNEL_CONTEXT_GET_OUTPUT), (context, 0, shape, rank, y))
    if status == 0:
        status = tensor_data(node, load(y, 0), data + 2 * abi.WORD)
    if status != 0 or batch * positions * channels == 0:
        return status
    for i in range(_JOB_WORDS):
        store(j, abi.WORD * i, 0)
    whole, start = batch // block * block, 0
    for part in range(2):
        own = load(tensor if part == 0 else other, abi.TENSOR_SHAPE + abi.WORD)
        source, target = load(data, abi.WORD * part), load(data, 2 * abi.WORD)
        for rest in range(2):
            # Of blocks each position is a row, of the samples behind them each sample.
            groups = whole // block * positions if rest == 0 else batch - whole
            each = block if rest == 0 else positions
            set_field(j, job.K, start * each)
            set_field(j, job.BLOCK_ROWS, (channels - start - own) * each)
            if status == 0 and own > 0:
                status = _place(node, context, j, source, target, groups, 1, own * each)
            source += whole * own * positions * _FLOAT_BYTES
            target += whole * channels * positions * _FLOAT_BYTES
        start += own
    return status


@linked
def _channel_numbers(node: int, context: int, index: int, name: int, channels: int, tensor: int, out: int) -> int:
    """Store the address of an input that has a number for each channel."""
    value = stack(1)
    status = call(load(load(node, abi.NODE_API), abi.KERNEL_CONTEXT_GET_INPUT), (context, index, value))
    if status == 0:
        status = describe_float(node, load(value, 0), name, tensor)
    if status != 0:
        return status
    rank, size = load(tensor, abi.TENSOR_RANK), load(tensor, abi.TENSOR_SHAPE)
    if rank != 1:
        return refuse(node, text("input '@' has rank %, expected %"), name, rank, 1)
    if size != channels:
        return refuse(node, text("input '@' has % entries, expected %"), name, size, channels)
    return tensor_data(node, load(value, 0), out)


def compute_affine(node: int, context: int) -> int:
    """KernelComputeV2 of AffineSamples."""
    api, x, y, tensor, other = load(node, abi.NODE_API), stack(1), stack(1), stack(_TENSOR_WORDS), stack(_TENSOR_WORDS)
    j, data = stack(_JOB_WORDS), stack(4)
    status = call(load(api, abi.KERNEL_CONTEXT_GET_INPUT), (context, 0, x))
    if status == 0:
        status = describe_float(node, load(x, 0), text("x"), tensor)
    if status != 0:
        return status
    rank, shape, positions = load(tensor, abi.TENSOR_RANK), tensor + abi.TENSOR_SHAPE, 1
    if rank < 3:
        return refuse(node, text("input '@' has rank %, expected 3 or more"), text("x"), rank, 0)
    batch, channels, block = load(shape, 0), load(shape, abi.WORD), load(node, abi.NODE_BLOCK)
    for i in range(2, rank):
        positions *= load(shape, abi.WORD * i)  # x has as many elements, which is no overflow
    status = _channel_numbers(node, context, 1, text("scale"), channels, other, data + 2 * abi.WORD)
    if status == 0:
        status = _channel_numbers(node, context, 2, text("shift"), channels, other, data + 3 * abi.WORD)
    if status == 0:
        status = call(load(api, abi.KERNEL_CONTEXT_GET_OUTPUT), (context, 0, shape, rank, y))
    if status == 0:
        status = tensor_data(node, load(x, 0), data)
    if status == 0:
        status = tensor_data(node, load(y, 0), data + abi.WORD)
    if status != 0 or batch * channels * positions == 0:
        return status
    for i in range(_JOB_WORDS):
        store(j, abi.WORD * i, 0)
    set_field(j, job.SCALES, load(data, 2 * abi.WORD))
    set_field(j, job.BIAS, load(data, 3 * abi.WORD))
    set_field(j, job.IN_FEATURES, channels)
    whole = batch // block * block
    for rest in range(2):
        rows = whole // block * positions if rest == 0 else batch - whole
        done = rest * whole * channels * positions * _FLOAT_BYTES
        size = block if rest == 0 else positions
        set_field(j, job.X, load(data, 0) + done)
        set_field(j, job.Y, load(data, abi.WORD) + done)
        set_field(j, job.BATCH, rows)
        set_field(j, job.K, size)
        if status == 0 and rows > 0:
            status = run_innermost(node, context, kernel(node, _AFFINE), j, 1, rows * _LANES, rows * size * channels)
    return status


FUNCTIONS = (
    *(_place, _channel_numbers),
    *(compute_arrange, compute_pool, compute_pad, compute_affine, compute_concat),
)
