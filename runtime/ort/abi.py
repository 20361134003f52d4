"""The binary interface between ONNX Runtime and the operator library: slots, struct offsets, our own layouts.

Owns numbers only, each a byte offset unless it says otherwise; it must not know what is done with them. ONNX Runtime's
part follows ``onnxruntime_c_api.h`` as of API version 17 (ONNX Runtime 1.17), whose tables only ever grow at the end.
"""

from typing import Final

from srigl_fx.runtime.activations import ACTIVATIONS
from srigl_fx.runtime.cpu.kernels.table import TASKS

API_VERSION: Final = 17
MINIMUM_ONNXRUNTIME: Final = (1, 17)
DOMAIN: Final = "srigl_fx"
DOMAIN_VERSION: Final = 1
INPUTS: Final = ("x", "values", "indices", "active", "bias")
SCALES: Final = "scales"  # the input after these, of operators with values of eight bits
FLOAT_BASES: Final = ("CondensedLinear", "CondensedConv", "CondensedConvTranspose")
EIGHT_BITS: Final = "Int8"
BYTES: Final = "Bytes"  # of operators with values of eight bits whose outputs are rounded to as many
BASES: Final = (
    *FLOAT_BASES,
    *(base + EIGHT_BITS for base in FLOAT_BASES),
    *(base + EIGHT_BITS + BYTES for base in FLOAT_BASES),
)
ROUND: Final = "RoundSamples"  # of the operators that are no layers
ARRANGE: Final = "ArrangeSamples"
MAX_POOL: Final = "MaxPoolSamples"
MEAN_POOL: Final = "MeanPoolSamples"
POOLS: Final = (MAX_POOL, MEAN_POOL)
PAD: Final = "PadSamples"
AFFINE: Final = "AffineSamples"
CONCAT: Final = "ConcatSamples"
NO_LAYERS: Final = {  # with their inputs, by name
    ROUND: ("x",),
    ARRANGE: ("x",),
    **dict.fromkeys(POOLS, ("x",)),
    PAD: ("x",),
    AFFINE: ("x", "scale", "shift"),
    CONCAT: ("x", "other"),
}
SUFFIXES: Final = {row.name: row.suffix for row in ACTIVATIONS}  # of the operators that apply an activation
ENTRY_POINT: Final = "RegisterCustomOps"
TASKS_TABLE: Final = "SriglTasks"  # the addresses of all tasks, by instruction set, for torch

WORD: Final = 8  # bytes of a pointer, and of every field of our own

# OrtApiBase
GET_API: Final = 0 * WORD
GET_VERSION_STRING: Final = 1 * WORD

# OrtApi
CREATE_STATUS: Final = 0 * WORD
GET_ERROR_MESSAGE: Final = 2 * WORD
CREATE_CUSTOM_OP_DOMAIN: Final = 26 * WORD
CUSTOM_OP_DOMAIN_ADD: Final = 27 * WORD
ADD_CUSTOM_OP_DOMAIN: Final = 28 * WORD
GET_TENSOR_MUTABLE_DATA: Final = 51 * WORD
GET_TENSOR_ELEMENT_TYPE: Final = 60 * WORD
GET_DIMENSIONS_COUNT: Final = 61 * WORD
GET_DIMENSIONS: Final = 62 * WORD
GET_TENSOR_TYPE_AND_SHAPE: Final = 65 * WORD
KERNEL_INFO_GET_ATTRIBUTE_FLOAT: Final = 85 * WORD
KERNEL_INFO_GET_ATTRIBUTE_INT64: Final = 86 * WORD
KERNEL_CONTEXT_GET_INPUT_COUNT: Final = 88 * WORD
KERNEL_CONTEXT_GET_INPUT: Final = 90 * WORD
KERNEL_CONTEXT_GET_OUTPUT: Final = 91 * WORD
RELEASE_STATUS: Final = 93 * WORD
RELEASE_TENSOR_TYPE_AND_SHAPE_INFO: Final = 99 * WORD
KERNEL_INFO_GET_ATTRIBUTE_ARRAY_INT64: Final = 163 * WORD
KERNEL_INFO_GET_NODE_NAME: Final = 244 * WORD
KERNEL_INFO_GET_CONSTANT_INPUT_TENSOR: Final = 249 * WORD
KERNEL_CONTEXT_PARALLEL_FOR: Final = 274 * WORD

# OrtErrorCode and ONNXTensorElementDataType (values, not offsets)
ERROR_FAIL: Final = 1
ERROR_INVALID_ARGUMENT: Final = 2
TYPE_UNDEFINED: Final = 0
TYPE_FLOAT: Final = 1
TYPE_UINT8: Final = 2
TYPE_UINT16: Final = 4
TYPE_INT32: Final = 6

# OrtCustomOp: callbacks at multiples of a word; what is not named here stays zero.
OP_VERSION: Final = 0
OP_GET_NAME: Final = 16
OP_GET_EXECUTION_PROVIDER_TYPE: Final = 24
OP_GET_INPUT_TYPE: Final = 32
OP_GET_INPUT_TYPE_COUNT: Final = 40
OP_GET_OUTPUT_TYPE: Final = 48
OP_GET_OUTPUT_TYPE_COUNT: Final = 56
OP_KERNEL_DESTROY: Final = 72
OP_GET_INPUT_CHARACTERISTIC: Final = 80
OP_GET_OUTPUT_CHARACTERISTIC: Final = 88
OP_GET_INPUT_MEMORY_TYPE: Final = 96
OP_GET_VARIADIC_INPUT_MIN_ARITY: Final = 104
OP_GET_VARIADIC_INPUT_HOMOGENEITY: Final = 112
OP_GET_VARIADIC_OUTPUT_MIN_ARITY: Final = 120
OP_GET_VARIADIC_OUTPUT_HOMOGENEITY: Final = 128
OP_CREATE_KERNEL_V2: Final = 136
OP_KERNEL_COMPUTE_V2: Final = 144
OP_GET_START_VERSION: Final = 160
OP_GET_END_VERSION: Final = 168
OP_KIND: Final = 208  # first byte after ONNX Runtime's struct: our index into OPERATORS
OP_NAME: Final = 216  # and the address of its name
OP_SIZE: Final = 224

# Our process-wide state: the domain that is created once, and the kernel table of the chosen instruction set.
STATE_DOMAIN, STATE_KERNELS = (WORD * i for i in range(2))
STATE_SIZE: Final = 2 * WORD

# The kernel table of one instruction set: the tasks of kernels.table, a word each.
TABLE: Final = {task: WORD * i for i, task in enumerate(TASKS)}
TABLE_SIZE: Final = WORD * len(TASKS)

# One node: what its attributes and constant inputs say. Immutable once created, but for the panels, of which each is
# written once, complete.
(
    NODE_API,
    NODE_KERNELS,
    NODE_BASE,
    NODE_EIGHT_BITS,
    NODE_RESIDUAL,
    NODE_ACTIVATION,
    NODE_OPERATOR,
    NODE_IN_FEATURES,
    NODE_OUT_FEATURES,
    NODE_SPATIAL_RANK,
    NODE_X_SCALE,  # the bits of a float32, or 0 where none is given
    NODE_X_OFFSET,
    NODE_X_BYTES,  # 1 where x is rounded already
    NODE_Y_BYTES,  # 1 where outputs are rounded
    NODE_Y_SCALE,  # the bits of the float32 that they are rounded with
    NODE_Y_OFFSET,
    NODE_X_FEATURE_MAJOR,
    NODE_Y_FEATURE_MAJOR,
    NODE_BLOCK,  # of how many samples a block is that lie innermost
    NODE_ARRANGED,  # 1 where samples lie innermost; where they are to be as they were; of pooling, where it is a mean
    NODE_CHECKED_INDICES,
    NODE_CHECKED_ACTIVE,
    NODE_CONSTANT_VALUES,
    NODE_CONSTANT_SCALES,
    NODE_DOT_PANEL,
    NODE_TILE_PANEL,
    NODE_NAME,
) = (WORD * i for i in range(27))
NODE_NAME_SIZE: Final = 128
NODE_PADS_END: Final = NODE_NAME + NODE_NAME_SIZE  # 3 words
NODE_OUTPUT_PADDING: Final = NODE_PADS_END + 3 * WORD  # 3 words
NODE_GEOMETRY: Final = (
    NODE_OUTPUT_PADDING + 3 * WORD
)  # the int64 array of kernels/conv.py, without the sizes of x and y
NODE_SIZE: Final = NODE_GEOMETRY + 40 * WORD
BASE_LINEAR, BASE_TRANSPOSED = 0, 2  # positions in FLOAT_BASES

# The weight inputs of one call, in the order of INPUTS without x, and of SCALES, and what their shapes say.
(
    WEIGHTS_VALUES,
    WEIGHTS_INDICES,
    WEIGHTS_ACTIVE,
    WEIGHTS_BIAS,
    WEIGHTS_SCALES,
    WEIGHTS_N_ACTIVE,
    WEIGHTS_K,
    WEIGHTS_INDEX_TYPE,
    WEIGHTS_VALUE_TYPE,
    WEIGHTS_INDEX_ROWS,  # where it is said which row of indices each active row reads; 0 where each has its own
) = (WORD * i for i in range(10))
WEIGHTS_WORDS: Final = 10

# A tensor's description.
TENSOR_TYPE: Final = 0
TENSOR_RANK: Final = 1 * WORD
TENSOR_SHAPE: Final = 2 * WORD
MAX_RANK: Final = 64
TENSOR_WORDS: Final = 2 + MAX_RANK

# Bounds that keep every product of sizes within 64 bits.
MAX_SIZE: Final = 2**31 - 1  # of a dimension, of in_features, of the number of neurons
MAX_STEP: Final = 2**20  # of a stride, a pad or a dilation


def operator_name(base: str, residual: bool, activation: str) -> str:
    """The operator of domain ``srigl_fx`` with this epilogue.

    Args:
        base: One of ``BASES``.
        residual: Whether it adds one more input before the activation.
        activation: One of ``SUFFIXES``.

    Example:
        >>> operator_name("CondensedConv", True, "relu"), operator_name("CondensedLinear", False, "none")
        ('CondensedConvAddRelu', 'CondensedLinear')
    """
    return f"{base}{'Add' if residual else ''}{SUFFIXES[activation]}"


def operator_names() -> dict[str, tuple[str, bool, str]]:
    """The names of all layers' operators, each with what :func:`operator_name` makes it of.

    Example:
        >>> operator_names()["CondensedLinearGeluTanh"]
        ('CondensedLinear', False, 'gelu_tanh')
    """
    parts = [(base, residual, kind) for base in BASES for residual in (False, True) for kind in SUFFIXES]
    return {operator_name(*part): part for part in parts}


def inputs_of(base: str, residual: bool) -> tuple[str, ...]:
    """The inputs of an operator, by its base and whether it adds a residual.

    Example:
        >>> inputs_of("CondensedLinearInt8", True)
        ('x', 'values', 'indices', 'active', 'bias', 'scales', 'residual')
    """
    scales = (SCALES,) if has_scales(base) else ()
    return (*INPUTS, *scales, *(("residual",) if residual else ()))


def has_scales(base: str) -> bool:
    """Whether the values of the operators with this base name have eight bits.

    Example:
        >>> has_scales("CondensedConv"), has_scales("CondensedConvInt8"), has_scales("CondensedConvInt8Bytes")
        (False, True, True)
    """
    return EIGHT_BITS in base


def float_base(base: str) -> str:
    """The base name of the same operators with values of more bits.

    Example:
        >>> float_base("CondensedConvInt8Bytes")
        'CondensedConv'
    """
    return base.partition(EIGHT_BITS)[0]


OPERATORS: Final = (*operator_names(), *NO_LAYERS)  # layers by base, then residual, then activation
