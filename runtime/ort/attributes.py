"""The attributes of a node: read, checked, and stored in it.

Owns which attributes a node may have and within which bounds, as functions that Numba compiles ahead of time: words in,
one word out, an ``OrtStatus*``, 0 where all is well. A model file is untrusted: sizes are bounded before they are
multiplied. It must not know inputs, or how results are computed.
"""

import numpy as np

from srigl_fx.runtime.cpu.kernels import conv, plan
from srigl_fx.runtime.cpu.kernels.compiled import planned
from srigl_fx.runtime.ort import abi
from srigl_fx.runtime.ort.primitives import call, inlined, linked, load, load8, load32, stack, store, text
from srigl_fx.runtime.ort.refusals import refuse
from srigl_fx.runtime.quantisation import LARGEST_FILTER, OFFSET, SMALLEST

# Numba takes a constant for a literal only under a name of the module's own.
_LARGEST_FILTER, _OFFSET = LARGEST_FILTER, OFFSET
_SMALLEST, _INFINITY = (int(np.float32(number).view(np.int32)) for number in (SMALLEST, np.inf))  # as bits
_may_be_innermost = planned(plan.may_be_innermost)
_LIST_CAPACITY = 16  # more than any list attribute of ours may hold


@inlined
def _is_missing(api: int, status: int) -> bool:
    """Whether ONNX Runtime says that an attribute is not there at all, rather than of another type."""
    message, expected = call(load(api, abi.GET_ERROR_MESSAGE), (status,)), text("No attribute")
    i = 0
    while load8(expected, i) != 0 and load8(expected, i) == load8(message, i):
        i += 1
    return load8(expected, i) == 0


@linked
def read_int(node: int, info: int, name: int, default: int, out: int) -> int:
    """Store an int attribute at ``out``; one that is missing is ``default``, or refused where that is negative."""
    api = load(node, abi.NODE_API)
    status = call(load(api, abi.KERNEL_INFO_GET_ATTRIBUTE_INT64), (info, name, out))
    if status == 0:
        return 0
    missing = _is_missing(api, status)
    call(load(api, abi.RELEASE_STATUS), (status,))
    if not missing:
        return refuse(node, text("attribute '@' must be an int"), name, 0, 0)
    if default < 0:
        return refuse(node, text("attribute '@' is missing"), name, 0, 0)
    store(out, 0, default)
    return 0


@linked
def read_scale(node: int, info: int, name: int, optional: int, out: int) -> int:
    """Store the bits of a scale at ``out``; 0, where it is optional, if it is 0 or missing."""
    api, found = load(node, abi.NODE_API), stack(1)
    store(found, 0, 0)
    status = call(load(api, abi.KERNEL_INFO_GET_ATTRIBUTE_FLOAT), (info, name, found))
    if status != 0:
        missing = _is_missing(api, status)
        call(load(api, abi.RELEASE_STATUS), (status,))
        if not missing:
            return refuse(node, text("attribute '@' must be a float"), name, 0, 0)
        if optional == 0:
            return refuse(node, text("attribute '@' is missing"), name, 0, 0)
    bits = load32(found, 0)
    store(out, 0, bits)
    if bits >= _SMALLEST and bits < _INFINITY:
        return 0
    if optional == 0:
        return refuse(node, text("attribute '@' must be a finite number of at least 2**-100"), name, 0, 0)
    if bits != 0:
        return refuse(node, text("attribute '@' must be 0 or a finite number of at least 2**-100"), name, 0, 0)
    return 0


@linked
def read_offset(node: int, info: int, name: int, out: int) -> int:
    """Store an offset at ``out``."""
    status = read_int(node, info, name, 0, out)
    if status == 0 and load(out, 0) != 0 and load(out, 0) != _OFFSET:
        return refuse(node, text("attribute '@' is %, expected 0 or %"), name, load(out, 0), _OFFSET)
    return status


@linked
def read_given(node: int, info: int) -> int:
    """Store the scales and the offsets with which samples are rounded, if with given ones, and outputs, if they are.

    Older files have none.
    """
    status = read_scale(node, info, text("x_scale"), 1, node + abi.NODE_X_SCALE)
    if status == 0:
        status = read_offset(node, info, text("x_offset"), node + abi.NODE_X_OFFSET)
    if status == 0:
        status = read_int(node, info, text("x_bytes"), 0, node + abi.NODE_X_BYTES)
    if status != 0:
        return status
    rounded = load(node, abi.NODE_X_BYTES)
    if rounded != 0 and rounded != 1:
        return refuse(node, text("attribute '@' is %, expected 0 or 1"), text("x_bytes"), rounded, 0)
    if rounded == 1 and load(node, abi.NODE_X_SCALE) == 0:
        return refuse(node, text("attribute '@' is 1 without an x_scale"), text("x_bytes"), 0, 0)
    if load(node, abi.NODE_Y_BYTES) != 0:
        status = read_scale(node, info, text("y_scale"), 0, node + abi.NODE_Y_SCALE)
        if status == 0:
            status = read_offset(node, info, text("y_offset"), node + abi.NODE_Y_OFFSET)
    return status


@linked
def read_rounding(node: int, info: int) -> int:
    """Store the scale and the offset of a node that rounds and does nothing else, as those of its outputs."""
    status = read_scale(node, info, text("x_scale"), 0, node + abi.NODE_Y_SCALE)
    if status == 0:
        status = read_offset(node, info, text("x_offset"), node + abi.NODE_Y_OFFSET)
    return status


@linked
def read_flag(node: int, info: int, name: int, out: int) -> int:
    """Store an int attribute that is 0, as where it is missing, or 1."""
    status = read_int(node, info, name, 0, out)
    if status == 0 and load(out, 0) != 0 and load(out, 0) != 1:
        return refuse(node, text("attribute '@' is %, expected 0 or 1"), name, load(out, 0), 0)
    return status


@linked
def read_arranged(node: int, info: int) -> int:
    """Store whether the samples of a convolution, whose geometry is known, lie innermost, as they may."""
    status = read_flag(node, info, text("arranged"), node + abi.NODE_ARRANGED)
    if status != 0 or load(node, abi.NODE_ARRANGED) == 0:
        return status
    geometry = node + abi.NODE_GEOMETRY
    if load(node, abi.NODE_BASE) == abi.BASE_TRANSPOSED or load(node, abi.NODE_EIGHT_BITS) != 0:
        return refuse(node, text("attribute '@' is 1 for another operator than CondensedConv"), text("arranged"), 0, 0)
    if load(node, abi.NODE_SPATIAL_RANK) > 2:
        return refuse(
            node, text("attribute '@' is 1 for three spatial axes, expected one or two"), text("arranged"), 0, 0
        )
    channels, kernel_w = load(geometry, abi.WORD * conv.CHANNELS), load(geometry, abi.WORD * conv.KERNEL_W)
    filters, dilation_w = load(geometry, abi.WORD * conv.OUT_CHANNELS), load(geometry, abi.WORD * conv.DILATION_W)
    if not _may_be_innermost(channels, filters, kernel_w, dilation_w):
        return refuse(
            node, text("attribute '@' is 1 for a kernel % wide of % channels"), text("arranged"), kernel_w, channels
        )
    return 0


@linked
def read_ints(node: int, info: int, name: int, out: int, count: int) -> int:
    """Store a list attribute at ``out`` and its length at ``count``: -1 if it is missing."""
    api = load(node, abi.NODE_API)
    store(count, 0, _LIST_CAPACITY)
    status = call(load(api, abi.KERNEL_INFO_GET_ATTRIBUTE_ARRAY_INT64), (info, name, out, count))
    if status == 0:
        return 0
    missing = _is_missing(api, status)
    call(load(api, abi.RELEASE_STATUS), (status,))
    if not missing:
        return refuse(node, text("attribute '@' must be a list of at most % ints"), name, _LIST_CAPACITY, 0)
    store(count, 0, -1)
    return 0


@linked
def read_steps(node: int, info: int, name: int, expected: int, smallest: int, steps: int) -> int:
    """Read strides, pads or dilations; a list that is missing leaves the defaults that ``steps`` holds."""
    given, count = stack(_LIST_CAPACITY), stack(1)
    status = read_ints(node, info, name, given, count)
    if status != 0 or load(count, 0) == -1:
        return status
    if load(count, 0) != expected:
        return refuse(node, text("attribute '@' has % entries, expected %"), name, load(count, 0), expected)
    for i in range(expected):
        step = load(given, abi.WORD * i)
        if step < smallest or step > abi.MAX_STEP:
            return refuse(node, text("attribute '@' holds %, outside its bounds up to %"), name, step, abi.MAX_STEP)
        store(steps, abi.WORD * i, step)
    return 0


@linked
def read_geometry(node: int, info: int, shape: int, spatial: int) -> int:
    """Check Conv's attributes and store them in the node, shifted to three spatial dimensions."""
    n, group_channels = load(shape, 0), load(shape, abi.WORD)
    geometry = node + abi.NODE_GEOMETRY
    lead = abi.WORD * (3 - spatial)  # the leading dimensions, all of size one
    group = stack(1)
    status = read_int(node, info, text("group"), 1, group)
    if status != 0:
        return status
    groups = load(group, 0)
    if groups < 1 or groups > n or n % groups != 0:
        return refuse(node, text("attribute '@' is %, which does not divide % filters"), text("group"), groups, n)
    if group_channels * groups > abi.MAX_SIZE:
        return refuse(node, text("attribute '@' gives % channels, more than %"), text("group"), groups, abi.MAX_SIZE)
    for i in range(conv.GEOMETRY_SIZE):
        store(geometry, abi.WORD * i, 1)
    store(geometry, abi.WORD * conv.FLIPPED, 0)
    for i in range(3):
        store(geometry, abi.WORD * (conv.PAD_D + i), 0)
        store(node, abi.NODE_PADS_END + abi.WORD * i, 0)
    store(geometry, abi.WORD * conv.CHANNELS, group_channels * groups)
    store(geometry, abi.WORD * conv.OUT_CHANNELS, n)
    store(geometry, abi.WORD * conv.GROUPS, groups)
    for i in range(spatial):
        store(geometry + lead, abi.WORD * (conv.KERNEL_D + i), load(shape, abi.WORD * (2 + i)))
    status = read_steps(node, info, text("strides"), spatial, 1, geometry + lead + abi.WORD * conv.STRIDE_D)
    if status != 0:
        return status
    status = read_steps(node, info, text("dilations"), spatial, 1, geometry + lead + abi.WORD * conv.DILATION_D)
    if status != 0:
        return status
    pads = stack(6)
    for i in range(6):
        store(pads, abi.WORD * i, 0)
    if load(node, abi.NODE_BASE) == abi.BASE_TRANSPOSED:
        status = read_steps(node, info, text("output_padding"), spatial, 0, node + lead + abi.NODE_OUTPUT_PADDING)
        if status != 0:
            return status
    status = read_steps(node, info, text("pads"), 2 * spatial, 0, pads)
    for i in range(spatial):
        store(geometry + lead, abi.WORD * (conv.PAD_D + i), load(pads, abi.WORD * i))
        store(node + lead, abi.NODE_PADS_END + abi.WORD * i, load(pads, abi.WORD * (spatial + i)))
    return status


@linked
def read_pooling(node: int, info: int, mean: int) -> int:
    """Check the attributes of pooling and store them in the node, shifted to three spatial dimensions."""
    given, count, geometry, pads = stack(_LIST_CAPACITY), stack(1), node + abi.NODE_GEOMETRY, stack(6)
    store(node, abi.NODE_ARRANGED, mean)
    status = read_ints(node, info, text("kernel_shape"), given, count)
    if status != 0:
        return status
    spatial = load(count, 0)
    if spatial == -1:
        return refuse(node, text("attribute '@' is missing"), text("kernel_shape"), 0, 0)
    if spatial < 1 or spatial > 2:
        return refuse(node, text("attribute '@' has % entries, expected 1 or 2"), text("kernel_shape"), spatial, 0)
    store(node, abi.NODE_SPATIAL_RANK, spatial)
    lead = abi.WORD * (3 - spatial)
    for i in range(conv.GEOMETRY_SIZE):
        store(geometry, abi.WORD * i, 1)
    for i in range(6):
        store(pads, abi.WORD * i, 0)
    kernel_shape = geometry + lead + abi.WORD * conv.KERNEL_D
    status = read_steps(node, info, text("kernel_shape"), spatial, 1, kernel_shape)
    if status == 0:
        status = read_steps(node, info, text("strides"), spatial, 1, geometry + lead + abi.WORD * conv.STRIDE_D)
    if status == 0 and mean == 0:
        status = read_steps(node, info, text("dilations"), spatial, 1, geometry + lead + abi.WORD * conv.DILATION_D)
    if status == 0:
        status = read_steps(node, info, text("pads"), 2 * spatial, 0, pads)
    for i in range(3):
        store(geometry, abi.WORD * (conv.PAD_D + i), 0)
        store(node, abi.NODE_PADS_END + abi.WORD * i, 0)
    for i in range(spatial):
        store(geometry + lead, abi.WORD * (conv.PAD_D + i), load(pads, abi.WORD * i))
        store(node + lead, abi.NODE_PADS_END + abi.WORD * i, load(pads, abi.WORD * (spatial + i)))
    return status


@linked
def read_padding(node: int, info: int) -> int:
    """Check the attributes of padding, which are those of ONNX Pad, and store them in the node as those of pooling."""
    given, count, api = stack(_LIST_CAPACITY), stack(1), load(node, abi.NODE_API)
    status = read_ints(node, info, text("pads"), given, count)
    if status != 0:
        return status
    if load(count, 0) == -1:
        return refuse(node, text("attribute '@' is missing"), text("pads"), 0, 0)
    rank = load(count, 0) // 2
    if load(count, 0) != 2 * rank or rank < 3 or rank > 4:
        return refuse(node, text("attribute '@' has % entries, expected 6 or 8"), text("pads"), load(count, 0), 0)
    store(node, abi.NODE_SPATIAL_RANK, rank - 2)
    geometry = node + abi.NODE_GEOMETRY
    for i in range(3):
        store(geometry, abi.WORD * (conv.PAD_D + i), 0)
        store(node, abi.NODE_PADS_END + abi.WORD * i, 0)
    for i in range(2 * rank):
        pad, axis = load(given, abi.WORD * i), i % rank
        if pad < 0 or pad > abi.MAX_STEP:
            return refuse(node, text("attribute '@' holds %, outside [0, 2**20]"), text("pads"), pad, 0)
        if axis < 2 and pad != 0:
            return refuse(node, text("attribute '@' pads samples or channels by %"), text("pads"), pad, 0)
        place = abi.WORD * (5 - rank + axis - 2)
        if axis >= 2 and i < rank:
            store(geometry, abi.WORD * conv.PAD_D + place, pad)
        elif axis >= 2:
            store(node, abi.NODE_PADS_END + place, pad)
    value = stack(1)
    store(value, 0, 0)
    status = call(load(api, abi.KERNEL_INFO_GET_ATTRIBUTE_FLOAT), (info, text("value"), value))
    if status != 0:
        missing = _is_missing(api, status)
        call(load(api, abi.RELEASE_STATUS), (status,))
        if not missing:
            return refuse(node, text("attribute '@' must be a float"), text("value"), 0, 0)
    store(node, abi.NODE_Y_SCALE, load32(value, 0))
    return 0


@linked
def read_attributes(node: int, info: int) -> int:
    """Check every attribute and store it in the node."""
    found, shape, count = stack(1), stack(_LIST_CAPACITY), stack(1)
    status = read_int(node, info, text("in_features"), -1, found)
    if status != 0:
        return status
    in_features = load(found, 0)
    if in_features < 1 or in_features > abi.MAX_SIZE:
        return refuse(node, text("attribute '@' is %, outside [1, %]"), text("in_features"), in_features, abi.MAX_SIZE)
    status = read_ints(node, info, text("weight_shape"), shape, count)
    if status != 0:
        return status
    rank = load(count, 0)
    if rank == -1:
        return refuse(node, text("attribute '@' is missing"), text("weight_shape"), 0, 0)
    is_conv = load(node, abi.NODE_BASE) != abi.BASE_LINEAR
    if is_conv and (rank < 3 or rank > 5):
        return refuse(node, text("attribute '@' has % entries, expected 3 to 5"), text("weight_shape"), rank, 0)
    if not is_conv and rank != 2:
        return refuse(node, text("attribute '@' has % entries, expected 2"), text("weight_shape"), rank, 0)
    fan_in = 1
    for i in range(rank):
        size = load(shape, abi.WORD * i)
        if size < 1 or size > abi.MAX_SIZE:
            return refuse(node, text("attribute '@' holds %, outside [1, %]"), text("weight_shape"), size, abi.MAX_SIZE)
        if i > 0:
            fan_in *= size
            if fan_in > in_features:
                return refuse(
                    node, text("attribute '@' does not multiply to in_features %"), text("weight_shape"), in_features, 0
                )
    if fan_in != in_features:
        return refuse(
            node, text("attribute '@' does not multiply to in_features %"), text("weight_shape"), in_features, 0
        )
    if is_conv and in_features > _LARGEST_FILTER and load(node, abi.NODE_EIGHT_BITS) != 0:
        return refuse(
            node,
            text("attribute '@' is %, too much for values of int8"),
            text("in_features"),
            in_features,
            0,
        )
    n = load(shape, 0)
    status = read_int(node, info, text("flat_size"), -1, found)
    if status != 0:
        return status
    if load(found, 0) != n * in_features:
        return refuse(
            node, text("attribute '@' is %, weight_shape gives %"), text("flat_size"), load(found, 0), n * in_features
        )
    store(node, abi.NODE_IN_FEATURES, in_features)
    store(node, abi.NODE_OUT_FEATURES, n)
    if load(node, abi.NODE_EIGHT_BITS) != 0:
        status = read_given(node, info)
        if status != 0:
            return status
    if is_conv:
        store(node, abi.NODE_SPATIAL_RANK, rank - 2)
        status = read_geometry(node, info, shape, rank - 2)
        return read_arranged(node, info) if status == 0 else status
    status = read_layout(node, info, text("x_perm"), 1, node + abi.NODE_X_FEATURE_MAJOR)
    if status != 0:
        return status
    return read_layout(node, info, text("y_perm"), 0, node + abi.NODE_Y_FEATURE_MAJOR)


@linked
def read_layout(node: int, info: int, name: int, first: int, out: int) -> int:
    """Store whether a permutation says that features come first; ``first`` is what it then starts with, 0 for the last.

    ``x_perm`` brings the stored ``x`` to (..., in_features), ``y_perm`` brings (..., n) to what is stored.
    """
    given, count = stack(_LIST_CAPACITY), stack(1)
    status = read_ints(node, info, name, given, count)
    if status != 0:
        return status
    rank = load(count, 0)
    identity = moved = 1
    for i in range(rank):
        axis = load(given, abi.WORD * i)
        if axis != i:
            identity = 0
        if axis != ((i + 1) % rank if first == 1 else (i + rank - 1) % rank):
            moved = 0
    if identity == 0 and moved == 0:
        return refuse(node, text("attribute '@' neither keeps the order nor puts features first"), name, 0, 0)
    store(out, 0, 0 if identity != 0 else 1)
    return 0


FUNCTIONS = (
    *(read_int, read_scale, read_offset, read_given, read_rounding),
    *(read_flag, read_arranged, read_ints, read_steps, read_geometry, read_pooling, read_padding),
    *(read_layout, read_attributes),
)
