"""What the operators refuse: every attribute and input of a node, checked before a kernel may read it.

Owns validation and its error messages, as functions that Numba compiles ahead of time: words in, one word out, here
always an ``OrtStatus*``, 0 where all is well. A model file is untrusted: no value in it may lead to a read or write
out of bounds, so sizes are bounded before they are multiplied. It must not know how results are computed.
"""

from typing import Any

from srigl_fx.runtime.cpu.kernels import conv
from srigl_fx.runtime.ort import abi
from srigl_fx.runtime.ort.primitives import (
    call,
    inlined,
    linked,
    load,
    load8,
    load16,
    load32,
    stack,
    store,
    store8,
    text,
)
from srigl_fx.runtime.value_types import NUMBERS, VALUE_TYPES, choice

# Numba takes a constant for a literal only under a name of the module's own.
_TENSOR_WORDS = abi.TENSOR_WORDS
_FLOAT32 = NUMBERS["float32"]
_WRONG_VALUES = f"input '@' must be {choice()}, not ONNX element type %"
_MESSAGE_SIZE = 512
_MESSAGE_WORDS = _MESSAGE_SIZE // abi.WORD
_LIST_CAPACITY = 16  # more than any list attribute of ours may hold
_NAME_MARK, _NUMBER_MARK, _MINUS, _ZERO = (ord(mark) for mark in "@%-0")


def _value_types() -> Any:
    """A function of an ONNX element type: the number of the dtype of values, or -1 where none is of that type."""

    def case(onnx: int, number: int, otherwise: Any) -> Any:
        return inlined(lambda found: number if found == onnx else otherwise(found))

    chosen = inlined(lambda found: -1)
    for number, row in enumerate(VALUE_TYPES):
        chosen = case(row.onnx, number, chosen)
    return chosen


_value_type = _value_types()


@inlined
def _append(message: int, length: int, source: int) -> int:
    """Append a C string; what does not fit is cut off."""
    i = 0
    while length < _MESSAGE_SIZE - 1 and load8(source, i) != 0:
        store8(message, length, load8(source, i))
        length += 1
        i += 1
    return length


@inlined
def _append_number(message: int, length: int, number: int) -> int:
    if length >= _MESSAGE_SIZE - 24:
        return length
    if number < 0:
        store8(message, length, _MINUS)
        length += 1
    digits = stack(3)
    rest = number if number < 0 else -number  # negative, because the smallest int64 has no positive
    count = 0
    while rest != 0 or count == 0:
        digit = -(rest % -10)
        store8(digits, count, _ZERO + digit)
        rest = (rest + digit) // 10
        count += 1
    for i in range(count):
        store8(message, length + i, load8(digits, count - 1 - i))
    return length + count


@linked
def refuse(node: int, template: int, name: int, first: int, second: int) -> int:
    """An error status "<operator> node '<name>': <template>", where @ becomes ``name`` and each % a number."""
    message = stack(_MESSAGE_WORDS)
    length = 0
    length = _append(message, length, load(node, abi.NODE_OPERATOR))
    if load8(node, abi.NODE_NAME) != 0:
        length = _append(message, length, text(" node '"))
        length = _append(message, length, node + abi.NODE_NAME)
        length = _append(message, length, text("'"))
    length = _append(message, length, text(": "))
    i = 0
    while load8(template, i) != 0 and length < _MESSAGE_SIZE - 1:
        character = load8(template, i)
        if character == _NAME_MARK:
            length = _append(message, length, name)
        elif character == _NUMBER_MARK:
            length = _append_number(message, length, first)
            first = second
        else:
            store8(message, length, character)
            length += 1
        i += 1
    store8(message, length, 0)
    return call(load(load(node, abi.NODE_API), abi.CREATE_STATUS), (abi.ERROR_INVALID_ARGUMENT, message))


@inlined
def tensor_data(node: int, value: int, out: int) -> int:
    """Store the address of a tensor's elements at ``out``."""
    return call(load(load(node, abi.NODE_API), abi.GET_TENSOR_MUTABLE_DATA), (value, out))


@linked
def describe(node: int, value: int, name: int, tensor: int) -> int:
    """Store type, rank and shape of the tensor ``value`` at ``tensor``; refuse what is absent or no tensor."""
    if value == 0:
        return refuse(node, text("input '@' is missing"), name, 0, 0)
    api = load(node, abi.NODE_API)
    info = stack(1)
    status = call(load(api, abi.GET_TENSOR_TYPE_AND_SHAPE), (value, info))
    if status != 0:
        return status
    description = load(info, 0)
    store(tensor, abi.TENSOR_TYPE, 0)  # the element type fills four bytes only
    status = call(load(api, abi.GET_TENSOR_ELEMENT_TYPE), (description, tensor + abi.TENSOR_TYPE))
    if status == 0:
        status = call(load(api, abi.GET_DIMENSIONS_COUNT), (description, tensor + abi.TENSOR_RANK))
    if status == 0:
        rank = load(tensor, abi.TENSOR_RANK)
        if rank > abi.MAX_RANK:
            status = refuse(node, text("input '@' has rank %, more than %"), name, rank, abi.MAX_RANK)
        else:
            status = call(load(api, abi.GET_DIMENSIONS), (description, tensor + abi.TENSOR_SHAPE, rank))
    call(load(api, abi.RELEASE_TENSOR_TYPE_AND_SHAPE_INFO), (description,))
    return status


@linked
def describe_float(node: int, value: int, name: int, tensor: int) -> int:
    """``describe`` that also insists on float32."""
    status = describe(node, value, name, tensor)
    if status == 0 and load(tensor, abi.TENSOR_TYPE) != abi.TYPE_FLOAT:
        status = refuse(
            node, text("input '@' must be float32, not ONNX element type %"), name, load(tensor, abi.TENSOR_TYPE), 0
        )
    return status


@linked
def is_zero(values: int, value_type: int, place: int) -> int:
    """Whether a value is 0 or -0."""
    bits = load16(values, 2 * place) & 0x7FFF
    if value_type == _FLOAT32:
        bits = load32(values, 4 * place) & 0x7FFFFFFF
    if bits == 0:
        return 1
    return 0


@linked
def check_indices(node: int, weights: int, values: int, rows: int, k: int) -> int:
    """Refuse an index outside [0, in_features) or not ascending within its row, but for zeros at the row's end.

    ``values`` is 0 where they are not known yet.
    """
    indices, index_type = load(weights, abi.WEIGHTS_INDICES), load(weights, abi.WEIGHTS_INDEX_TYPE)
    value_type = load(weights, abi.WEIGHTS_VALUE_TYPE)
    limit = load(node, abi.NODE_IN_FEATURES)
    for row in range(rows):
        previous, ended = -1, 0
        for j in range(row * k, (row + 1) * k):
            index = load16(indices, 2 * j) if index_type == abi.TYPE_UINT16 else load32(indices, 4 * j)
            if index < 0 or index >= limit:
                return refuse(
                    node, text("input '@', row %: % is outside [0, in_features)"), text("indices"), row, index
                )
            if index == previous and (values == 0 or is_zero(values, value_type, j) != 0):
                ended = 1
            elif index <= previous or ended != 0:
                return refuse(
                    node,
                    text("input '@', row % does not ascend: only zeros at its end may repeat an index"),
                    text("indices"),
                    row,
                    0,
                )
            previous = index
    return 0


@linked
def check_active(node: int, active: int, rows: int) -> int:
    """Refuse a neuron outside [0, n) or not ascending."""
    limit = load(node, abi.NODE_OUT_FEATURES)
    previous = -1
    for row in range(rows):
        neuron = load32(active, 4 * row)
        if neuron < 0 or neuron >= limit:
            return refuse(node, text("input '@' holds %, outside [0, %), the neurons"), text("active"), neuron, limit)
        if neuron <= previous:
            return refuse(node, text("input '@' does not ascend strictly at position %"), text("active"), row, 0)
        previous = neuron
    return 0


@linked
def check_weights(node: int, inputs: int, weights: int) -> int:
    """Check the weight inputs against the attributes and each other, and store what a kernel needs at ``weights``.

    ``inputs`` holds the four OrtValues; while a node is created, those not constant are 0 and are left for the run.
    Contents that were found good when the node was created are recognised by their address.
    """
    n, in_features = load(node, abi.NODE_OUT_FEATURES), load(node, abi.NODE_IN_FEATURES)
    tensor = stack(_TENSOR_WORDS)
    n_active = k = -1
    store(weights, abi.WEIGHTS_VALUE_TYPE, _FLOAT32)

    value = load(inputs, abi.WEIGHTS_INDICES)
    if value != 0:
        status = describe(node, value, text("indices"), tensor)
        if status != 0:
            return status
        index_type = load(tensor, abi.TENSOR_TYPE)
        if index_type != abi.TYPE_UINT16 and index_type != abi.TYPE_INT32:
            return refuse(
                node, text("input '@' must be uint16 or int32, not ONNX element type %"), text("indices"), index_type, 0
            )
        rank = load(tensor, abi.TENSOR_RANK)
        if rank != 2:
            return refuse(node, text("input '@' must be (n_active, k), its rank is %"), text("indices"), rank, 0)
        n_active, k = load(tensor, abi.TENSOR_SHAPE), load(tensor, abi.TENSOR_SHAPE + abi.WORD)
        if n_active > n:
            return refuse(node, text("input '@' has % rows, more than % neurons"), text("indices"), n_active, n)
        if k > in_features:
            return refuse(
                node, text("input '@' has % columns, more than in_features %"), text("indices"), k, in_features
            )
        store(weights, abi.WEIGHTS_INDEX_TYPE, index_type)
        status = tensor_data(node, value, weights + abi.WEIGHTS_INDICES)
        if status != 0:
            return status

    value = load(inputs, abi.WEIGHTS_VALUES)
    if value != 0:
        status = describe(node, value, text("values"), tensor)
        if status != 0:
            return status
        element_type = load(tensor, abi.TENSOR_TYPE)
        value_type = _value_type(element_type)
        if value_type < 0:
            return refuse(node, text(_WRONG_VALUES), text("values"), element_type, 0)
        store(weights, abi.WEIGHTS_VALUE_TYPE, value_type)
        rank = load(tensor, abi.TENSOR_RANK)
        if rank != 2:
            return refuse(node, text("input '@' must be (n_active, k), its rank is %"), text("values"), rank, 0)
        rows, columns = load(tensor, abi.TENSOR_SHAPE), load(tensor, abi.TENSOR_SHAPE + abi.WORD)
        if k >= 0 and (rows != n_active or columns != k):
            return refuse(
                node, text("input '@' is (%, %), another shape than 'indices'"), text("values"), rows, columns
            )
        status = tensor_data(node, value, weights + abi.WEIGHTS_VALUES)
        if status != 0:
            return status

    value = load(inputs, abi.WEIGHTS_ACTIVE)
    if value != 0:
        status = describe(node, value, text("active"), tensor)
        if status != 0:
            return status
        element_type, rank = load(tensor, abi.TENSOR_TYPE), load(tensor, abi.TENSOR_RANK)
        if element_type != abi.TYPE_INT32:
            return refuse(
                node, text("input '@' must be int32, not ONNX element type %"), text("active"), element_type, 0
            )
        rows = load(tensor, abi.TENSOR_SHAPE)
        if rank != 1:
            return refuse(node, text("input '@' must be (n_active,), its rank is %"), text("active"), rank, 0)
        if n_active >= 0 and rows != n_active:
            return refuse(node, text("input '@' has % entries, 'indices' has % rows"), text("active"), rows, n_active)
        status = tensor_data(node, value, weights + abi.WEIGHTS_ACTIVE)
        if status != 0:
            return status
        active = load(weights, abi.WEIGHTS_ACTIVE)
        if active != load(node, abi.NODE_CHECKED_ACTIVE):
            status = check_active(node, active, rows)
            if status != 0:
                return status

    value = load(inputs, abi.WEIGHTS_BIAS)
    if value != 0:
        status = describe_float(node, value, text("bias"), tensor)
        if status != 0:
            return status
        rank, rows = load(tensor, abi.TENSOR_RANK), load(tensor, abi.TENSOR_SHAPE)
        if rank != 1:
            return refuse(node, text("input '@' must be (n,), its rank is %"), text("bias"), rank, 0)
        if rows != n:
            return refuse(node, text("input '@' has % entries, weight_shape says % neurons"), text("bias"), rows, n)
        status = tensor_data(node, value, weights + abi.WEIGHTS_BIAS)
        if status != 0:
            return status

    store(weights, abi.WEIGHTS_N_ACTIVE, n_active)
    store(weights, abi.WEIGHTS_K, k)
    if k >= 0 and load(weights, abi.WEIGHTS_INDICES) != load(node, abi.NODE_CHECKED_INDICES):
        values = load(weights, abi.WEIGHTS_VALUES) if load(inputs, abi.WEIGHTS_VALUES) != 0 else 0
        return check_indices(node, weights, values, n_active, k)
    return 0


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
    if is_conv:
        store(node, abi.NODE_SPATIAL_RANK, rank - 2)
        return read_geometry(node, info, shape, rank - 2)
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
    read_steps,
    describe_float,
    refuse,
    describe,
    is_zero,
    check_indices,
    check_active,
    check_weights,
    read_int,
    read_ints,
    read_geometry,
    read_layout,
    read_attributes,
)
