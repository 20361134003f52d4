"""The operators as functions of standard ONNX operators, which a model carries for hosts without the library.

Owns the function bodies. Each scatters the kept weights into the dense weight and contracts with that; as the dense
shape comes from attributes and not from ``x``, ONNX Runtime folds all but the last steps into one constant, and what
runs is a plain Gemm, MatMul, Conv or ConvTranspose with its epilogue. It must not know graphs or sessions.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

from srigl_fx.runtime.activations import ACTIVATIONS
from srigl_fx.runtime.ort import abi

if TYPE_CHECKING:
    import onnx

OPSET_VERSION = 18
IR_VERSION = 9  # the newest that ONNX Runtime 1.17 reads
WEIGHT_ATTRIBUTES = ("in_features", "weight_shape", "flat_size")
LINEAR_ATTRIBUTES = ("x_perm", "y_perm")
CONV_ATTRIBUTES = ("strides", "pads", "dilations", "group")
TRANSPOSED_ATTRIBUTES = ("output_padding",)

# Every constant is a tensor that states its type: graph tools take value_float, and a fill value left out, for double.
# Flat position of a kept weight = its row in the dense weight * in_features + its index; values may have 16 bits.
# Padding adds zeros to the last kept weight of its row.
_DENSE_WEIGHT = """
    wide_indices = Cast <to: int = 7> (indices)
    wide_active = Cast <to: int = 7> (active)
    wide_values = Cast <to: int = 1> (values)
    one = Constant <value: tensor = int64[1] {1}> ()
    rows = Unsqueeze (wide_active, one)
    row_size = Constant <value_int: int = @in_features> ()
    row_starts = Mul (rows, row_size)
    positions = Add (row_starts, wide_indices)
    minus_one = Constant <value: tensor = int64[1] {-1}> ()
    flat_positions = Reshape (positions, minus_one)
    flat_values = Reshape (wide_values, minus_one)
    size = Constant <value_int: int = @flat_size> ()
    sizes = Reshape (size, one)
    zeros = ConstantOfShape <value: tensor = float[1] {0.0}> (sizes)
    flat_weight = ScatterElements <axis: int = 0, reduction: string = "add"> (zeros, flat_positions, flat_values)
    shape = Constant <value_ints: ints = @weight_shape> ()
    weight = Reshape (flat_weight, shape)
"""
# What follows is chained: {x} is the step before, {y} the step itself.
_CONTRACTIONS = {
    "CondensedLinear": """
    transposed = Transpose <perm: ints = [1, 0]> (weight)
    product = MatMul ({x}, transposed)
    {y} = {sum} (product, bias)
""",
    "CondensedConv": """
    {y} = Conv <strides: ints = @strides, pads: ints = @pads, dilations: ints = @dilations, group: int = @group>
        ({x}, weight, bias)
""",
    # (n, C / groups, kernel...) -> (groups, n / groups, C / groups, -1) -> (C, n / groups, kernel...)
    "CondensedConvTranspose": """
    zero = Constant <value: tensor = int64[1] {{0}}> ()
    two = Constant <value: tensor = int64[1] {{2}}> ()
    last = Constant <value: tensor = int64[1] {{9223372036854775807}}> ()
    group_count = Constant <value_int: int = @group> ()
    group_counts = Reshape (group_count, one)
    n = Slice (shape, zero, one)
    group_rows = Div (n, group_counts)
    channels = Slice (shape, one, two)
    kernel = Slice (shape, two, last)
    grouped_shape = Concat <axis: int = 0> (group_counts, group_rows, channels, minus_one)
    grouped = Reshape (weight, grouped_shape)
    swapped = Transpose <perm: ints = [0, 2, 1, 3]> (grouped)
    swapped_shape = Concat <axis: int = 0> (minus_one, group_rows, kernel)
    swapped_weight = Reshape (swapped, swapped_shape)
    {y} = ConvTranspose <strides: ints = @strides, pads: ints = @pads, dilations: ints = @dilations,
        group: int = @group, output_padding: ints = @output_padding> ({x}, swapped_weight, bias)
""",
}
# With values of eight bits: samples are rounded as runtime.quantisation has it, contracted without a bias, and scaled.
# Sums are float32 here, and exact up to 2**24. A sample that is not finite makes its scale NaN, whatever a host's
# ReduceMax makes of NaN.
_ROUNDED = """
    zero_scalar = Constant <value: tensor = float {{0.0}}> ()
    least = Constant <value: tensor = float {{7.888609052210118e-31}}> ()
    signed_limit = Constant <value: tensor = float {{127.0}}> ()
    unsigned_limit = Constant <value: tensor = float {{255.0}}> ()
    samples = {flat}
    sample_axis = Constant <value: tensor = int64[1] {{-1}}> ()
    magnitudes = Abs (samples)
    largest = ReduceMax <keepdims: int = 1> (magnitudes, sample_axis)
    smallest = ReduceMin <keepdims: int = 1> (samples, sample_axis)
    is_signed = Less (smallest, zero_scalar)
    limit = Where (is_signed, signed_limit, unsigned_limit)
    is_counted = GreaterOrEqual (largest, least)
    whole = Div (limit, largest)
    inverse = Where (is_counted, whole, zero_scalar)
    step_size = Div (largest, limit)
    finite_scale = Where (is_counted, step_size, zero_scalar)
    nothing = Mul (samples, zero_scalar)
    poison = ReduceSum <keepdims: int = 1> (nothing, sample_axis)
    sample_scale = Add (finite_scale, poison)
    scaled_samples = Mul (samples, inverse)
    whole_samples = Round (scaled_samples)
    steps = {back}
    scale_zeros = ConstantOfShape <value: tensor = float[1] {{0.0}}> (bias_shape)
    row_scales = ScatterElements <axis: int = 0> (scale_zeros, wide_active, scales)
"""
_BIAS_SHAPE = """
    bias_shape = Shape (bias)
"""
_LINEAR_SCALED = """
    factors = Mul (sample_scale, row_scales)
    scaled_product = Mul (sums, factors)
    {y} = {sum} (scaled_product, bias)
"""
# (N, n, sizes...) as (N, n, -1), beside (N, 1, 1) and (n, 1).
_CONV_SCALED = """
    sums_shape = Shape (sums)
    rows_shape = Constant <value: tensor = int64[3] {{0, 0, -1}}> ()
    flat_sums = Reshape (sums, rows_shape)
    second_axis = Constant <value: tensor = int64[1] {{1}}> ()
    sample_scales = Unsqueeze (sample_scale, second_axis)
    column_scales = Unsqueeze (row_scales, second_axis)
    column_bias = Unsqueeze (bias, second_axis)
    factors = Mul (sample_scales, column_scales)
    scaled_product = Mul (flat_sums, factors)
    biased = Add (scaled_product, column_bias)
    {y} = Reshape (biased, sums_shape)
"""
_ADDITION = """
    {y} = Add ({x}, residual)
"""
_ACTIVATIONS = {row.name: row.onnx for row in ACTIVATIONS}
_PERMUTATION = """
    {{y}} = Transpose <perm: ints = @{name}> ({{x}})
"""


def _contraction(base: str) -> str:
    """The steps of an operator from its data to the sum with its bias, as a template."""
    if not base.endswith(abi.EIGHT_BITS):
        return _CONTRACTIONS[base]
    of_floats = base.removesuffix(abi.EIGHT_BITS)
    linear = of_floats == "CondensedLinear"
    flat, back = ("Identity ({x})", "Identity (whole_samples)") if linear else _FLAT_SAMPLES
    exact = _CONTRACTIONS[of_floats].replace(", bias)", ")").replace("{x}", "steps")
    if linear:
        exact = exact.replace("    {y} = {sum} (product)\n", "").replace("product = ", "sums = ")
    shape = "" if linear else "    data_shape = Shape ({x})\n"
    scaled = _LINEAR_SCALED if linear else _CONV_SCALED
    rounded = _ROUNDED.replace("{flat}", flat).replace("{back}", back)
    return _BIAS_SHAPE + shape + rounded + exact.replace("{y}", "sums") + scaled


_FLAT_SAMPLES = "Flatten <axis: int = 1> ({x})", "Reshape (whole_samples, data_shape)"


def attributes_of(base: str) -> tuple[str, ...]:
    """The attributes of the operators with this base name, all of them mandatory.

    Example:
        >>> attributes_of("CondensedLinear")
        ('in_features', 'weight_shape', 'flat_size', 'x_perm', 'y_perm')
    """
    base = base.removesuffix(abi.EIGHT_BITS)
    if base == "CondensedLinear":
        return WEIGHT_ATTRIBUTES + LINEAR_ATTRIBUTES
    transposed = TRANSPOSED_ATTRIBUTES if base == "CondensedConvTranspose" else ()
    return WEIGHT_ATTRIBUTES + CONV_ATTRIBUTES + transposed


def fallback_functions(
    names: Iterable[str] = abi.OPERATORS, permuted: Mapping[str, Collection[str]] | None = None
) -> "list[onnx.FunctionProto]":
    """Model-local functions of domain ``srigl_fx`` for opset 18, one for each name.

    Appended to ``ModelProto.functions``, they let a stock ONNX Runtime (1.17 or newer) run the model, as fast as its
    dense twin; where the operator library is registered, the operators are used instead.

    Args:
        names: The operators that the model uses, as :func:`srigl_fx.runtime.ort.abi.operator_names` lists them.
        permuted: For each operator that some node uses with one, which of ``x_perm`` and ``y_perm`` may be anything but
            the identity. The other functions leave them out: ONNX Runtime would not remove a transposition that changes
            nothing.

    Example:
        >>> [(function.domain, function.name) for function in fallback_functions(["CondensedConvAddRelu"])]
        [('srigl_fx', 'CondensedConvAddRelu')]
    """
    import onnx.parser

    known = abi.operator_names()
    functions = [
        onnx.parser.parse_function(_function(name, *known[name], (permuted or {}).get(name, ()))) for name in names
    ]
    for function in functions:
        for node in function.node:  # messages and profiles of tools name nodes by these
            node.name = f"{function.name}_{node.output[0]}"
    return functions


def _function(name: str, base: str, residual: bool, activation: str, permuted: Collection[str]) -> str:
    before, after = (_PERMUTATION.format(name=perm) if perm in permuted else "" for perm in LINEAR_ATTRIBUTES)
    # The residual lies as y does.
    steps = [before, _contraction(base), after, _ADDITION if residual else "", _ACTIVATIONS[activation]]
    steps = [step for step in steps if step]
    results = ["x", *(f"step{i}" for i in range(1, len(steps))), "y"]
    # ONNX Runtime before 1.30 makes MatMul and Add one Gemm, and takes any Transpose in front of it for one that swaps
    # rows and columns, even where a node's permutation changes nothing. It leaves a Sum as it is.
    total = "Sum" if "x_perm" in permuted else "Add"
    body = "".join(step.format(x=results[i], y=results[i + 1], sum=total) for i, step in enumerate(steps))
    inputs = abi.inputs_of(base, residual)
    header = f'<opset_import: ["" : {OPSET_VERSION}], domain: "{abi.DOMAIN}">'
    signature = f"{name} <{', '.join(attributes_of(base))}> ({', '.join(inputs)}) => (y)"
    return f"{header} {signature} {{ {_DENSE_WEIGHT} {body} }}"
