"""The operators as ONNX Runtime sees them: registration, the choice of instruction set, creating a node.

Owns these as functions that Numba compiles ahead of time (words in, one word out). A node is immutable once created, so
that any number of runs may share it. What may be refused is for ``attributes`` and ``checks`` to say, one call is
``compute``'s; it must not know how it is compiled or linked.
"""

from srigl_fx.runtime.cpu.kernels import isa
from srigl_fx.runtime.ort import abi, attributes, checks, compute, compute_arranged, panels, refusals, runs
from srigl_fx.runtime.ort.attributes import read_attributes, read_flag, read_padding, read_pooling, read_rounding
from srigl_fx.runtime.ort.checks import check_weights
from srigl_fx.runtime.ort.panels import block_samples
from srigl_fx.runtime.ort.primitives import (
    call,
    exchange,
    external,
    inlined,
    load,
    load8,
    load32,
    stack,
    store,
    store8,
    symbol,
    text,
)
from srigl_fx.runtime.ort.processors import usable_targets

# Numba takes a constant for a literal only under a name of the module's own.
_DOMAIN = abi.DOMAIN
_TARGETS = ",".join(isa.TARGETS)
_ISA_VARIABLE = isa.ISA_VARIABLE
_UNKNOWN_ISA = f"{isa.ISA_VARIABLE} must be one of {', '.join(isa.TARGETS)}; set it to one of these, or unset it"
_MISSING_ISA = f"{isa.ISA_VARIABLE} names an instruction set that this CPU lacks; set it to an older one, or unset it"
_TOO_OLD = f"the srigl_fx operators need ONNX Runtime {'.'.join(map(str, abi.MINIMUM_ONNXRUNTIME))} or newer"
_WEIGHTS_WORDS = abi.WEIGHTS_WORDS

_calloc, _free, _getenv = external("calloc", 2), external("free", 1), external("getenv", 1)

_WEIGHT_INPUTS, _MOST_WEIGHT_INPUTS = len(abi.INPUTS) - 1, len(abi.INPUTS)
_FLOAT_BASES = len(abi.FLOAT_BASES)
_ROUND_KIND, _ARRANGE_KIND, _MAX_POOL_KIND, _, _PAD_KIND, _AFFINE_KIND, _CONCAT_KIND = (
    abi.OPERATORS.index(name) for name in abi.NO_LAYERS
)
_ACTIVATIONS = len(abi.SUFFIXES)
_DIGITS = (ord("0"), ord("9"))
_DOT, _COMMA = ord("."), ord(",")


@inlined
def _prepare(node: int, info: int) -> int:
    """Check attributes and constant inputs, and remember whose contents were good."""
    api = load(node, abi.NODE_API)
    status = read_attributes(node, info)
    if status != 0:
        return status
    constants, weights, is_constant = stack(_MOST_WEIGHT_INPUTS), stack(_WEIGHTS_WORDS), stack(1)
    store(constants, abi.WEIGHTS_SCALES, 0)
    store(weights, abi.WEIGHTS_SCALES, 0)
    for i in range(_WEIGHT_INPUTS + load(node, abi.NODE_EIGHT_BITS)):
        store(is_constant, 0, 0)
        store(constants, abi.WORD * i, 0)
        store(weights, abi.WORD * i, 0)
        status = call(
            load(api, abi.KERNEL_INFO_GET_CONSTANT_INPUT_TENSOR), (info, i + 1, is_constant, constants + abi.WORD * i)
        )
        if status != 0:
            return status
        if load32(is_constant, 0) == 0:
            store(constants, abi.WORD * i, 0)
    status = check_weights(node, constants, weights)
    if status == 0:
        store(node, abi.NODE_CONSTANT_VALUES, load(weights, abi.WEIGHTS_VALUES))
        store(node, abi.NODE_CONSTANT_SCALES, load(weights, abi.WEIGHTS_SCALES))
        if load(constants, abi.WEIGHTS_ACTIVE) != 0:  # without it, indices are not checked yet
            store(node, abi.NODE_CHECKED_INDICES, load(weights, abi.WEIGHTS_INDICES))
        store(node, abi.NODE_CHECKED_ACTIVE, load(weights, abi.WEIGHTS_ACTIVE))
    return status


def create(op: int, api: int, info: int, out: int) -> int:
    """CreateKernelV2: a node, or why it is refused."""
    node = _calloc(1, abi.NODE_SIZE)
    if node == 0:
        return call(load(api, abi.CREATE_STATUS), (abi.ERROR_FAIL, text("srigl_fx: not enough memory for a node")))
    store(node, abi.NODE_API, api)
    kind = load(op, abi.OP_KIND)
    level = kind // (2 * _ACTIVATIONS * _FLOAT_BASES)
    store(node, abi.NODE_BASE, kind // (2 * _ACTIVATIONS) % _FLOAT_BASES)
    store(node, abi.NODE_EIGHT_BITS, min(1, level))
    store(node, abi.NODE_Y_BYTES, level // 2)
    store(node, abi.NODE_RESIDUAL, kind // _ACTIVATIONS % 2)
    store(node, abi.NODE_ACTIVATION, kind % _ACTIVATIONS)
    store(node, abi.NODE_OPERATOR, load(op, abi.OP_NAME))
    store(node, abi.NODE_KERNELS, load(symbol("srigl_state"), abi.STATE_KERNELS))
    store(node, abi.NODE_BLOCK, block_samples(node))
    size = stack(1)
    store(size, 0, abi.NODE_NAME_SIZE)
    status = call(load(api, abi.KERNEL_INFO_GET_NODE_NAME), (info, node + abi.NODE_NAME, size))
    if status != 0:  # a name too long for a message
        call(load(api, abi.RELEASE_STATUS), (status,))
        store8(node, abi.NODE_NAME, 0)
    if kind == _ROUND_KIND:
        status = read_rounding(node, info)
    elif kind == _ARRANGE_KIND:
        status = read_flag(node, info, text("back"), node + abi.NODE_ARRANGED)
    elif kind == _PAD_KIND:
        status = read_padding(node, info)
    elif kind >= _AFFINE_KIND:
        status = 0  # neither these nor concatenations have attributes
    elif kind >= _MAX_POOL_KIND:
        status = read_pooling(node, info, kind - _MAX_POOL_KIND)
    else:
        status = _prepare(node, info)
    if status != 0:
        _free(node)
        node = 0
    store(out, 0, node)
    return status


def destroy(node: int) -> int:
    """KernelDestroy."""
    _free(load(node, abi.NODE_DOT_PANEL))
    _free(load(node, abi.NODE_TILE_PANEL))
    return _free(node)


def get_name(op: int) -> int:
    """GetName."""
    return load(op, abi.OP_NAME)


def get_input_type(op: int, index: int) -> int:
    """GetInputType: float32, but int32 active; the types of values and indices are checked by ``checks``, and that of
    samples which may be bytes.
    """
    kind = load(op, abi.OP_KIND)
    may_be_bytes = kind // (2 * _ACTIVATIONS * _FLOAT_BASES) > 0
    if kind >= _ROUND_KIND:
        return abi.TYPE_FLOAT
    if index == 1 or index == 2 or (index == 0 and may_be_bytes):
        return abi.TYPE_UNDEFINED
    return abi.TYPE_INT32 if index == 3 else abi.TYPE_FLOAT


def get_input_count(op: int) -> int:
    """GetInputTypeCount."""
    kind = load(op, abi.OP_KIND)
    if kind >= _ROUND_KIND:
        return 3 if kind == _AFFINE_KIND else 2 if kind == _CONCAT_KIND else 1
    return _WEIGHT_INPUTS + 1 + kind // _ACTIVATIONS % 2 + min(1, kind // (2 * _ACTIVATIONS * _FLOAT_BASES))


def get_output_type(op: int, index: int) -> int:
    """GetOutputType: float32, or bytes."""
    kind = load(op, abi.OP_KIND)
    if kind >= _ARRANGE_KIND:
        return abi.TYPE_FLOAT
    return abi.TYPE_UINT8 if kind // (2 * _ACTIVATIONS * _FLOAT_BASES) > 1 else abi.TYPE_FLOAT


def zero(op: int, index: int) -> int:
    """Nothing, required, default memory, no provider but the CPU's: ONNX Runtime's meaning of 0."""
    return 0


def one(op: int, index: int) -> int:
    """One output, since version 1: ONNX Runtime's meaning of 1."""
    return 1


def any_version(op: int) -> int:
    """GetEndVersion: no end."""
    return abi.MAX_SIZE


@inlined
def _position(name: int, names: int) -> int:
    """Where a string is in a list of strings with commas between, counted from 0; -1 if it is not."""
    position = at = 0
    while True:
        i = 0
        while load8(name, i) != 0 and load8(name, i) != _COMMA and load8(name, i) == load8(names, at + i):
            i += 1
        if load8(name, i) == 0 and (load8(names, at + i) == 0 or load8(names, at + i) == _COMMA):
            return position
        while load8(names, at) != 0 and load8(names, at) != _COMMA:
            at += 1
        if load8(names, at) == 0:
            return -1
        at += 1
        position += 1


@inlined
def _is_too_old(version: int) -> bool:
    """Whether a version string such as "1.16.3" is before the first ONNX Runtime that works."""
    numbers = stack(2)
    store(numbers, 0, 0)
    store(numbers, abi.WORD, 0)
    part = i = 0
    while part < 2 and load8(version, i) != 0:
        character = load8(version, i)
        if character == _DOT:
            part += 1
        elif _DIGITS[0] <= character <= _DIGITS[1] and i < 12:
            store(numbers, abi.WORD * part, load(numbers, abi.WORD * part) * 10 + character - _DIGITS[0])
        i += 1
    major, minor = load(numbers, 0), load(numbers, abi.WORD)
    first_major, first_minor = abi.MINIMUM_ONNXRUNTIME
    return major < first_major or (major == first_major and minor < first_minor)


@inlined
def _choose_kernels(api: int, state: int) -> int:
    """Store the kernel table of the newest instruction set, or of an older one that the environment asks for."""
    usable, chosen = usable_targets(), 0
    while usable >> chosen + 1 != 0:
        chosen += 1
    wanted = _getenv(text(_ISA_VARIABLE))
    if wanted != 0 and load8(wanted, 0) != 0:
        chosen = _position(wanted, text(_TARGETS))
        if chosen < 0:
            message = text(_UNKNOWN_ISA)
            return call(load(api, abi.CREATE_STATUS), (abi.ERROR_INVALID_ARGUMENT, message))
        if usable >> chosen & 1 == 0:
            message = text(_MISSING_ISA)
            return call(load(api, abi.CREATE_STATUS), (abi.ERROR_INVALID_ARGUMENT, message))
    store(state, abi.STATE_KERNELS, symbol("srigl_kernels") + chosen * abi.TABLE_SIZE)
    return 0


def register(options: int, base: int) -> int:
    """RegisterCustomOps: add both operators, in a domain that is created once, to these session options."""
    get_api = load(base, abi.GET_API)
    api = 0
    if not _is_too_old(call(load(base, abi.GET_VERSION_STRING), ())):  # asked in vain, GetApi would write to stderr
        api = call(get_api, (abi.API_VERSION,))
    if api == 0:
        message = text(_TOO_OLD)
        return call(load(call(get_api, (1,)), abi.CREATE_STATUS), (abi.ERROR_FAIL, message))
    state = symbol("srigl_state")
    status = _choose_kernels(api, state)
    if status != 0:
        return status
    domain = load(state, abi.STATE_DOMAIN)
    if domain == 0:
        created = stack(1)
        status = call(load(api, abi.CREATE_CUSTOM_OP_DOMAIN), (text(_DOMAIN), created))
        if status != 0:
            return status
        domain = load(created, 0)
        for kind in range(len(abi.OPERATORS)):
            op = symbol("srigl_operators") + kind * abi.OP_SIZE
            status = call(load(api, abi.CUSTOM_OP_DOMAIN_ADD), (domain, op))
            if status != 0:
                return status
        exchange(state + abi.STATE_DOMAIN, 0, domain)  # complete for others too, should two threads come here at once
    return call(load(api, abi.ADD_CUSTOM_OP_DOMAIN), (options, domain))


FUNCTIONS = (
    *refusals.FUNCTIONS,
    *attributes.FUNCTIONS,
    *checks.FUNCTIONS,
    *panels.FUNCTIONS,
    *runs.FUNCTIONS,
    *compute.FUNCTIONS,
    *compute_arranged.FUNCTIONS,
    create,
    destroy,
    get_name,
    get_input_type,
    get_input_count,
    get_output_type,
    zero,
    one,
    any_version,
    register,
)

# What each field of OrtCustomOp holds: a number, a constant text, or the function that ONNX Runtime calls.
_COMMON_FIELDS = {
    abi.OP_VERSION: abi.API_VERSION,
    abi.OP_GET_NAME: get_name,
    abi.OP_GET_EXECUTION_PROVIDER_TYPE: zero,
    abi.OP_GET_INPUT_TYPE: get_input_type,
    abi.OP_GET_INPUT_TYPE_COUNT: get_input_count,
    abi.OP_GET_OUTPUT_TYPE: get_output_type,
    abi.OP_GET_OUTPUT_TYPE_COUNT: one,
    abi.OP_KERNEL_DESTROY: destroy,
    abi.OP_GET_INPUT_CHARACTERISTIC: zero,
    abi.OP_GET_OUTPUT_CHARACTERISTIC: zero,
    abi.OP_GET_INPUT_MEMORY_TYPE: zero,
    abi.OP_GET_VARIADIC_INPUT_MIN_ARITY: one,
    abi.OP_GET_VARIADIC_INPUT_HOMOGENEITY: one,
    abi.OP_GET_VARIADIC_OUTPUT_MIN_ARITY: one,
    abi.OP_GET_VARIADIC_OUTPUT_HOMOGENEITY: one,
    abi.OP_CREATE_KERNEL_V2: create,
    abi.OP_GET_START_VERSION: one,
    abi.OP_GET_END_VERSION: any_version,
}
_LAYERS = (compute.compute_linear, compute.compute_conv, compute.compute_conv)
_COMPUTE = {name: _LAYERS[abi.BASES.index(base) % 3] for name, (base, _, _) in abi.operator_names().items()}
_COMPUTE |= {abi.ROUND: compute.compute_round, abi.ARRANGE: compute_arranged.compute_arrange}
_COMPUTE |= dict.fromkeys(abi.POOLS, compute_arranged.compute_pool)
_COMPUTE |= {abi.PAD: compute_arranged.compute_pad, abi.CONCAT: compute_arranged.compute_concat}
_COMPUTE |= {abi.AFFINE: compute_arranged.compute_affine}
OPERATOR_FIELDS = tuple(
    {
        **_COMMON_FIELDS,
        abi.OP_KERNEL_COMPUTE_V2: _COMPUTE[name],
        abi.OP_KIND: kind,
        abi.OP_NAME: name,
    }
    for kind, name in enumerate(abi.OPERATORS)
)
