"""What the operators refuse of a node's inputs: each is checked before a kernel may read it.

Owns the checks of the weight's tensors and their error messages, as functions that Numba compiles ahead of time: words
in, one word out, here always an ``OrtStatus*``, 0 where all is well. A model file is untrusted: no value in it may lead
to a read or write out of bounds. It must not know how results are computed.
"""

from typing import Any

from srigl_fx.runtime.ort import abi
from srigl_fx.runtime.ort.primitives import call, inlined, linked, load, load8, load16, load32, stack, store, text
from srigl_fx.runtime.ort.refusals import refuse
from srigl_fx.runtime.quantisation import LARGEST_FAN_IN
from srigl_fx.runtime.value_types import FLOATS, NUMBERS, VALUE_TYPES, choice

# Numba takes a constant for a literal only under a name of the module's own.
_TENSOR_WORDS = abi.TENSOR_WORDS
_FLOAT32, _INT8 = NUMBERS["float32"], NUMBERS["int8"]
_WRONG_VALUES = f"input '@' must be {choice(FLOATS)}, not ONNX element type %"
_NO_BYTES = "input '@' must be int8, not ONNX element type %"
_NO_SAMPLES = "input '@' must be uint8 where x_bytes is 1, not ONNX element type %"
_TOO_WIDE = "input '@' has % columns, more than the % whose sums are int32"
_LARGEST_FAN_IN = LARGEST_FAN_IN
_INFINITY, _MINUS_ZERO = 0x7F800000, -(2**31)  # the bits of float32, as signed numbers


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
def describe_x(node: int, value: int, tensor: int) -> int:
    """``describe`` of the samples of a layer, that also insists on float32, or on bytes where they are rounded."""
    if load(node, abi.NODE_X_BYTES) == 0:
        return describe_float(node, value, text("x"), tensor)
    status = describe(node, value, text("x"), tensor)
    if status == 0 and load(tensor, abi.TENSOR_TYPE) != abi.TYPE_UINT8:
        status = refuse(node, text(_NO_SAMPLES), text("x"), load(tensor, abi.TENSOR_TYPE), 0)
    return status


@linked
def is_zero(values: int, value_type: int, place: int) -> int:
    """Whether a value is 0 or -0."""
    if value_type == _FLOAT32:
        bits = load32(values, 4 * place) & 0x7FFFFFFF
    elif value_type == _INT8:
        bits = load8(values, place)
    else:
        bits = load16(values, 2 * place) & 0x7FFF
    if bits == 0:
        return 1
    return 0


@linked
def check_indices(node: int, weights: int, values: int, rows: int, k: int) -> int:
    """Refuse an index outside [0, in_features) or not ascending within its row, but for zeros at the row's end.

    ``values`` is 0 where they are not known yet. Which rows of indices the active rows read is checked.
    """
    indices, index_type = load(weights, abi.WEIGHTS_INDICES), load(weights, abi.WEIGHTS_INDEX_TYPE)
    value_type, index_rows = load(weights, abi.WEIGHTS_VALUE_TYPE), load(weights, abi.WEIGHTS_INDEX_ROWS)
    limit = load(node, abi.NODE_IN_FEATURES)
    for row in range(rows):
        previous, ended = -1, 0
        ahead = 0 if index_rows == 0 else (load32(index_rows, 4 * row) - row) * k
        for j in range(row * k, (row + 1) * k):
            at = j + ahead
            index = load16(indices, 2 * at) if index_type == abi.TYPE_UINT16 else load32(indices, 4 * at)
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
def check_index_rows(node: int, index_rows: int, rows: int, index_count: int) -> int:
    """Refuse rows of indices that are not 0, and then the one before or the next, up to the last."""
    previous = -1
    for row in range(rows):
        found = load32(index_rows, 4 * row)
        if (found != previous and found != previous + 1) or found < 0:
            return refuse(
                node,
                text("input '@' names the row % of indices at position %, expected the one before or the next"),
                text("active"),
                found,
                row,
            )
        previous = found
    if previous != index_count - 1:
        return refuse(node, text("input '@' names % of % rows of indices"), text("active"), previous + 1, index_count)
    return 0


@linked
def check_scales(node: int, scales: int, rows: int) -> int:
    """Refuse a scale that is negative, infinite or NaN."""
    for row in range(rows):
        bits = load32(scales, 4 * row)
        if bits >= _INFINITY or (bits < 0 and bits != _MINUS_ZERO):
            message = text("input '@' holds a number at position % that is negative or not finite")
            return refuse(node, message, text("scales"), row, 0)
    return 0


@linked
def check_weights(node: int, inputs: int, weights: int) -> int:
    """Check the weight inputs against the attributes and each other, and store what a kernel needs at ``weights``.

    ``inputs`` holds the four OrtValues, and that of the scales; while a node is created, those not constant are 0 and
    are left for the run. Contents that were found good when the node was created are recognised by their address;
    those of indices and of active rows are checked as soon as both are there.
    """
    n, in_features = load(node, abi.NODE_OUT_FEATURES), load(node, abi.NODE_IN_FEATURES)
    tensor = stack(_TENSOR_WORDS)
    n_active = k = index_count = -1
    store(weights, abi.WEIGHTS_VALUE_TYPE, _FLOAT32)
    store(weights, abi.WEIGHTS_INDEX_ROWS, 0)

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
        index_count, k = load(tensor, abi.TENSOR_SHAPE), load(tensor, abi.TENSOR_SHAPE + abi.WORD)
        if index_count > n:
            return refuse(node, text("input '@' has % rows, more than % neurons"), text("indices"), index_count, n)
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
        value_type, eight_bits = _value_type(element_type), load(node, abi.NODE_EIGHT_BITS)
        if eight_bits != 0 and value_type != _INT8:
            return refuse(node, text(_NO_BYTES), text("values"), element_type, 0)
        if value_type < 0 or (eight_bits == 0 and value_type == _INT8):
            return refuse(node, text(_WRONG_VALUES), text("values"), element_type, 0)
        store(weights, abi.WEIGHTS_VALUE_TYPE, value_type)
        rank = load(tensor, abi.TENSOR_RANK)
        if rank != 2:
            return refuse(node, text("input '@' must be (n_active, k), its rank is %"), text("values"), rank, 0)
        rows, columns = load(tensor, abi.TENSOR_SHAPE), load(tensor, abi.TENSOR_SHAPE + abi.WORD)
        if rows > n:
            return refuse(node, text("input '@' has % rows, more than % neurons"), text("values"), rows, n)
        if k >= 0 and (rows < index_count or columns != k):
            return refuse(
                node, text("input '@' is (%, %), another shape than 'indices'"), text("values"), rows, columns
            )
        n_active = rows
        status = tensor_data(node, value, weights + abi.WEIGHTS_VALUES)
        if status != 0:
            return status

    value = load(inputs, abi.WEIGHTS_ACTIVE)
    has_active = value != 0
    if has_active:
        status = describe(node, value, text("active"), tensor)
        if status != 0:
            return status
        element_type, rank = load(tensor, abi.TENSOR_TYPE), load(tensor, abi.TENSOR_RANK)
        if element_type != abi.TYPE_INT32:
            return refuse(
                node, text("input '@' must be int32, not ONNX element type %"), text("active"), element_type, 0
            )
        rows = load(tensor, abi.TENSOR_SHAPE)
        shared = rank == 2 and rows == 2
        if rank != 1 and not shared:
            return refuse(
                node,
                text("input '@' must be (n_active,), or (2, n_active) where rows share indices, its rank is %"),
                text("active"),
                rank,
                0,
            )
        if shared:
            rows = load(tensor, abi.TENSOR_SHAPE + abi.WORD)
        if n_active < 0 and rows > n:
            return refuse(node, text("input '@' has % entries, more than % neurons"), text("active"), rows, n)
        if n_active >= 0 and rows != n_active:
            return refuse(node, text("input '@' has % entries, 'values' has % rows"), text("active"), rows, n_active)
        if not shared and index_count >= 0 and rows != index_count:
            return refuse(
                node, text("input '@' has % entries, 'indices' has % rows"), text("active"), rows, index_count
            )
        n_active = rows
        status = tensor_data(node, value, weights + abi.WEIGHTS_ACTIVE)
        if status != 0:
            return status
        if shared:
            store(weights, abi.WEIGHTS_INDEX_ROWS, load(weights, abi.WEIGHTS_ACTIVE) + 4 * rows)

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

    value = load(inputs, abi.WEIGHTS_SCALES) if load(node, abi.NODE_EIGHT_BITS) != 0 else 0
    if value != 0:
        status = describe_float(node, value, text("scales"), tensor)
        if status != 0:
            return status
        rank, rows = load(tensor, abi.TENSOR_RANK), load(tensor, abi.TENSOR_SHAPE)
        if rank != 1:
            return refuse(node, text("input '@' must be (n_active,), its rank is %"), text("scales"), rank, 0)
        if n_active >= 0 and rows != n_active:
            return refuse(node, text("input '@' has % entries, 'values' has % rows"), text("scales"), rows, n_active)
        if k > _LARGEST_FAN_IN:
            return refuse(node, text(_TOO_WIDE), text("indices"), k, _LARGEST_FAN_IN)
        status = tensor_data(node, value, weights + abi.WEIGHTS_SCALES)
        if status != 0:
            return status
        scales = load(weights, abi.WEIGHTS_SCALES)
        if scales != load(node, abi.NODE_CONSTANT_SCALES):
            status = check_scales(node, scales, rows)
            if status != 0:
                return status

    store(weights, abi.WEIGHTS_N_ACTIVE, n_active)
    store(weights, abi.WEIGHTS_K, k)
    active = load(weights, abi.WEIGHTS_ACTIVE)
    if has_active and active != load(node, abi.NODE_CHECKED_ACTIVE):
        status = check_active(node, active, n_active)
        if status != 0:
            return status
    if k < 0 or not has_active:
        return 0
    index_rows = load(weights, abi.WEIGHTS_INDEX_ROWS)
    same = load(weights, abi.WEIGHTS_INDICES) == load(node, abi.NODE_CHECKED_INDICES)
    if same and active == load(node, abi.NODE_CHECKED_ACTIVE):
        return 0
    if index_rows != 0:
        status = check_index_rows(node, index_rows, n_active, index_count)
        if status != 0:
            return status
    values = load(weights, abi.WEIGHTS_VALUES) if load(inputs, abi.WEIGHTS_VALUES) != 0 else 0
    return check_indices(node, weights, values, n_active, k)


FUNCTIONS = (
    describe,
    describe_float,
    describe_x,
    is_zero,
    check_indices,
    check_active,
    check_index_rows,
    check_scales,
    check_weights,
)
