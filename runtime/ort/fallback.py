"""The operators as functions of standard ONNX operators, which a model carries for hosts without the library.

Owns the function bodies. Each scatters the kept weights into the dense weight and contracts with that; as the dense
shape comes from attributes and not from ``x``, ONNX Runtime folds all but the last steps into one constant, and what
runs is a plain Gemm, MatMul, Conv or ConvTranspose with its epilogue; where values have eight bits, between the steps
that round the samples and those that scale the sums. It must not know graphs or sessions.
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
ARRANGED_ATTRIBUTES = (
    "arranged",
)  # of convolutions that may be; a host without the library leaves samples as they are
TRANSPOSED_ATTRIBUTES = ("output_padding",)
SHARED = "shared indices"  # what a function must be for if rows of some node share theirs
# Of operators with values of eight bits, with what nodes of older files have in their place: a scale of 0 is none.
GIVEN_ATTRIBUTES = {
    "x_scale": "x_scale: float = 0.0",
    "x_offset": "x_offset: int = 0",
    "x_bytes": "x_bytes: int = 0",
}
_DEFAULTS = {**GIVEN_ATTRIBUTES, "arranged": "arranged: int = 0", "back": "back: int = 0"}
OUTPUT_ATTRIBUTES = ("y_scale", "y_offset")
ROUND_ATTRIBUTES = ("x_scale", "x_offset")
ARRANGE_ATTRIBUTES = ("back",)
MEAN_ATTRIBUTES = ("kernel_shape", "strides", "pads")
MAX_ATTRIBUTES = (*MEAN_ATTRIBUTES, "dilations")
PAD_ATTRIBUTES = ("pads", "value")
_ATTRIBUTES_OF = {
    abi.ROUND: ROUND_ATTRIBUTES,
    abi.ARRANGE: ARRANGE_ATTRIBUTES,
    abi.MAX_POOL: MAX_ATTRIBUTES,
    abi.MEAN_POOL: MEAN_ATTRIBUTES,
    abi.PAD: PAD_ATTRIBUTES,
    abi.AFFINE: (),
    abi.CONCAT: (),
}

# Every constant is a tensor that states its type: graph tools take value_float, and a fill value left out, for double.
# Flat position of a kept weight = its row in the dense weight * in_features + its index; values may have 16 bits.
# Padding adds zeros to the last kept weight of its row.
_DENSE_WEIGHT = """
    one = Constant <value: tensor = int64[1] {1}> ()
    minus_one = Constant <value: tensor = int64[1] {-1}> ()
    {indices}
    {values}
    rows = Unsqueeze (wide_active, one)
    row_size = Constant <value_int: int = @in_features> ()
    row_starts = Mul (rows, row_size)
    positions = Add (row_starts, wide_indices)
    flat_positions = Reshape (positions, minus_one)
    flat_values = Reshape (wide_values, minus_one)
    size = Constant <value_int: int = @flat_size> ()
    sizes = Reshape (size, one)
    zeros = ConstantOfShape <value: tensor = float[1] {0.0}> (sizes)
    flat_weight = ScatterElements <axis: int = 0, reduction: string = "add"> (zeros, flat_positions, flat_values)
    shape = Constant <value_ints: ints = @weight_shape> ()
    weight = Reshape (flat_weight, shape)
"""
_OWN_INDICES = """
    wide_indices = Cast <to: int = 7> (indices)
    wide_active = Cast <to: int = 7> (active)
"""
# For operators of which some node has rows that share indices: behind the active rows stand those of indices that they
# read, or where a node has none, its rows in their order.
_SHARED_INDICES = """
    stored_indices = Cast <to: int = 7> (indices)
    stored_active = Cast <to: int = 7> (active)
    start = Constant <value: tensor = int64[1] {0}> ()
    first = Constant <value: tensor = int64 {0}> ()
    step = Constant <value: tensor = int64 {1}> ()
    values_shape = Shape (values)
    counts = Slice (values_shape, start, one)
    count = Squeeze (counts, start)
    own_rows = Range (first, count, step)
    flat_active = Reshape (stored_active, minus_one)
    all_rows = Concat <axis: int = 0> (flat_active, own_rows)
    ends = Add (counts, counts)
    wide_active = Slice (all_rows, start, counts)
    index_rows = Slice (all_rows, counts, ends)
    wide_indices = Gather <axis: int = 0> (stored_indices, index_rows)
"""
_VALUES = "wide_values = Cast <to: int = 1> (values)"
_SCALED_VALUES = """
    steps_of_values = Cast <to: int = 1> (values)
    value_scales = Unsqueeze (scales, one)
    wide_values = Mul (steps_of_values, value_scales)
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
# ReduceMax makes of NaN. Axes count from the front: ONNX Runtime leaves others of an empty tensor as long as they are.
_ROUNDED = """
    zero_scalar = Constant <value: tensor = float {{0.0}}> ()
    least = Constant <value: tensor = float {{7.888609052210118e-31}}> ()
    signed_limit = Constant <value: tensor = float {{127.0}}> ()
    unsigned_limit = Constant <value: tensor = float {{255.0}}> ()
    samples = {samples}
    magnitudes = Abs (samples)
    largest = ReduceMax <keepdims: int = 1> (magnitudes, one)
    smallest = ReduceMin <keepdims: int = 1> (samples, one)
    is_signed = Less (smallest, zero_scalar)
    limit = Where (is_signed, signed_limit, unsigned_limit)
    is_counted = GreaterOrEqual (largest, least)
    divisor = Where (is_counted, largest, limit)
    quotient = Div (limit, divisor)
    inverse = Where (is_counted, quotient, zero_scalar)
    step_size = Div (divisor, limit)
    finite_scale = Where (is_counted, step_size, zero_scalar)
    nothing = Mul (samples, zero_scalar)
    poison = ReduceSum <keepdims: int = 1> (nothing, one)
    found_scale = Add (finite_scale, poison)
    {given}
    bias_shape = Shape (bias)
    no_scales = ConstantOfShape <value: tensor = float[1] {{0.0}}> (bias_shape)
    row_scales = ScatterElements <axis: int = 0> (no_scales, wide_active, scales)
    factors = Mul (sample_scale, row_scales)
    no_rows = ConstantOfShape <value: tensor = bool[1] {{0}}> (bias_shape)
    active_shape = Shape (wide_active)
    are_active = ConstantOfShape <value: tensor = bool[1] {{1}}> (active_shape)
    is_active = ScatterElements <axis: int = 0> (no_rows, wide_active, are_active)
"""
_FOUND = """
    sample_scale = Identity (found_scale)
    scaled_samples = Mul (samples, inverse)
    whole_samples = Round (scaled_samples)
"""
# For operators of which some node has a scale given: where it has none, what is found has all numbers within reach.
_GIVEN = """
    given_scale = Constant <value_float: float = @x_scale> ()
    given_offset = Constant <value_int: int = @x_offset> ()
    is_given = Greater (given_scale, zero_scalar)
    one_scalar = Constant <value: tensor = float {{1.0}}> ()
    given_divisor = Where (is_given, given_scale, one_scalar)
    given_inverse = Div (one_scalar, given_divisor)
    factor = Where (is_given, given_inverse, inverse)
    sample_scale = Where (is_given, given_scale, found_scale)
    scaled_samples = Mul (samples, factor)
    some_samples = Round (scaled_samples)
    is_nan = IsNaN (some_samples)
    all_samples = Where (is_nan, zero_scalar, some_samples)
    own_offset = Constant <value: tensor = float {{128.0}}> ()
    found_offset = Where (is_signed, own_offset, zero_scalar)
    wide_offset = Cast <to: int = 1> (given_offset)
    offset = Where (is_given, wide_offset, found_offset)
    lowest = Neg (offset)
    highest = Add (lowest, unsigned_limit)
    high_samples = Max (all_samples, lowest)
    {within} = Min (high_samples, highest)
"""
# Where x may be bytes, which are rounded already: they come as the floats of these numbers.
_TAKEN_AS_BYTES = """
    byte_flag = Constant <value_int: int = @x_bytes> ()
    are_bytes = Cast <to: int = 9> (byte_flag)
    steps_of_bytes = Sub (samples, wide_offset)
    whole_samples = Where (are_bytes, steps_of_bytes, rounded_samples)
"""
_AS_FLOATS = """
    {y} = Cast <to: int = 1> ({x})
"""
# The numbers that bytes stand for, where samples are not rounded.
_AS_NUMBERS = """
    floats_of_x = Cast <to: int = 1> ({x})
    byte_flag = Constant <value_int: int = @x_bytes> ()
    are_bytes = Cast <to: int = 9> (byte_flag)
    byte_offset = Constant <value_int: int = @x_offset> ()
    wide_byte_offset = Cast <to: int = 1> (byte_offset)
    byte_scale = Constant <value_float: float = @x_scale> ()
    steps_of_bytes = Sub (floats_of_x, wide_byte_offset)
    numbers_of_bytes = Mul (steps_of_bytes, byte_scale)
    {y} = Where (are_bytes, numbers_of_bytes, floats_of_x)
"""
# Floats as bytes, as runtime.quantisation.round_with has it.
_BYTES = """
    step_of_bytes = Constant <value_float: float = @{scale}> ()
    zero_byte = Constant <value_int: int = @{offset}> ()
    wide_zero_byte = Cast <to: int = 1> (zero_byte)
    one_step = Constant <value: tensor = float {{1.0}}> ()
    no_step = Constant <value: tensor = float {{0.0}}> ()
    all_steps = Constant <value: tensor = float {{255.0}}> ()
    steps_in_one = Div (one_step, step_of_bytes)
    scaled_numbers = Mul ({x}, steps_in_one)
    whole_numbers = Round (scaled_numbers)
    are_nan = IsNaN (whole_numbers)
    known_numbers = Where (are_nan, no_step, whole_numbers)
    least_number = Neg (wide_zero_byte)
    largest_number = Add (least_number, all_steps)
    high_numbers = Max (known_numbers, least_number)
    numbers_within = Min (high_numbers, largest_number)
    shifted_numbers = Add (numbers_within, wide_zero_byte)
    {y} = Cast <to: int = 2> (shifted_numbers)
"""
_ROWS = """
    row_length = Reshape (row_size, one)
    rows_of_x = Concat <axis: int = 0> (minus_one, row_length)
"""
_LINEAR_SUMS = """
    transposed = Transpose <perm: ints = [1, 0]> (weight)
    sums = MatMul (whole_samples, transposed)
"""
_CONV_STEPS = """
    data_shape = Shape ({x})
    steps = Reshape (whole_samples, data_shape)
"""
# A row that is ablated has its bias alone, be the sample finite or not.
_LINEAR_SCALED = """
    products = Mul (sums, factors)
    kept_products = Where (is_active, products, zero_scalar)
    rows_of_y = Add (kept_products, bias)
    leading = Shape <end: int = -1> ({x})
    y_shape = Concat <axis: int = 0> (leading, bias_shape)
    {y} = Reshape <allowzero: int = 1> (rows_of_y, y_shape)
"""
# (N, n), and (n,), as they are multiplied with (N, n, sizes...).
_CONV_SCALED = """
    second = Constant <value: tensor = int64[1] {{2}}> ()
    end = Constant <value: tensor = int64[1] {{9223372036854775807}}> ()
    taps = Slice (shape, second, end)
    ones = Div (taps, taps)
    both = Constant <value: tensor = int64[2] {{0, 0}}> ()
    factors_shape = Concat <axis: int = 0> (both, ones)
    wide_factors = Reshape (factors, factors_shape)
    rows_shape = Concat <axis: int = 0> (minus_one, ones)
    wide_is_active = Reshape (is_active, rows_shape)
    wide_bias = Reshape (bias, rows_shape)
    products = Mul (sums, wide_factors)
    kept_products = Where (wide_is_active, products, zero_scalar)
    {y} = Add (kept_products, wide_bias)
"""
_ADDITION = """
    {y} = Add ({x}, residual)
"""
_ACTIVATIONS = {row.name: row.onnx for row in ACTIVATIONS}
_PERMUTATION = """
    {{y}} = Transpose <perm: ints = @{name}> ({{x}})
"""


def _contraction(base: str, exact: bool, used: Collection[str]) -> str:
    """The steps of an operator from its data to the sum with its bias, as a template."""
    given = _FOUND
    if "x_bytes" in used:
        given = _GIVEN.replace("{within}", "rounded_samples") + _TAKEN_AS_BYTES
    elif "x_scale" in used:
        given = _GIVEN.replace("{within}", "whole_samples")
    rounded = _ROUNDED.replace("{given}", given)
    of_floats = abi.float_base(base)
    if of_floats == base or not exact:
        return _CONTRACTIONS[of_floats]
    if of_floats == "CondensedLinear":
        return _ROWS + rounded.replace("{samples}", "Reshape ({x}, rows_of_x)") + _LINEAR_SUMS + _LINEAR_SCALED
    sums = _CONTRACTIONS[of_floats].replace("{x}", "steps").replace(", bias)", ")").replace("{y}", "sums")
    return rounded.replace("{samples}", "Flatten <axis: int = 1> ({x})") + _CONV_STEPS + sums + _CONV_SCALED


def attributes_of(base: str) -> tuple[str, ...]:
    """The attributes of the operators with this base name, which nodes of an exported file have all of.

    Example:
        >>> attributes_of("CondensedLinear")
        ('in_features', 'weight_shape', 'flat_size', 'x_perm', 'y_perm')
    """
    if base in abi.NO_LAYERS:
        return _ATTRIBUTES_OF[base]
    given = tuple(GIVEN_ATTRIBUTES) if abi.has_scales(base) else ()
    given += OUTPUT_ATTRIBUTES if base.endswith(abi.BYTES) else ()
    whole, base = base, abi.float_base(base)
    if base == "CondensedLinear":
        return WEIGHT_ATTRIBUTES + LINEAR_ATTRIBUTES + given
    transposed = TRANSPOSED_ATTRIBUTES if base == "CondensedConvTranspose" else ()
    arranged = ARRANGED_ATTRIBUTES if base == whole == "CondensedConv" else ()
    return WEIGHT_ATTRIBUTES + CONV_ATTRIBUTES + transposed + arranged + given


def fallback_functions(
    names: Iterable[str] = abi.OPERATORS,
    used: Mapping[str, Collection[str]] | None = None,
    *,
    exact: bool = True,
) -> "list[onnx.FunctionProto]":
    """Model-local functions of domain ``srigl_fx`` for opset 18, one for each name.

    Appended to ``ModelProto.functions``, they let a stock ONNX Runtime (1.17 or newer) run the model, as fast as its
    dense twin; where the operator library is registered, the operators are used instead.

    Args:
        names: The operators that the model uses, of :data:`srigl_fx.runtime.ort.abi.OPERATORS`.
        used: For each operator, which of ``x_perm`` and ``y_perm`` may be anything but the identity in some node, and
            ``x_scale`` and ``x_bytes`` if they may be anything but 0, and :data:`SHARED` if rows may share indices. The
            other functions leave out what that would ask for: ONNX Runtime would not remove a transposition that
            changes nothing.
        exact: Whether samples are rounded to eight bits where an operator's values are; else those operators become
            plain layers of the weights that the values stand for. Outputs that are bytes stay so.

    Example:
        >>> [(function.domain, function.name) for function in fallback_functions(["CondensedConvAddRelu"])]
        [('srigl_fx', 'CondensedConvAddRelu')]
    """
    import onnx.parser

    known = abi.operator_names()
    functions = [
        onnx.parser.parse_function(
            _NO_LAYERS[name]()
            if name in _NO_LAYERS
            else _function(name, *known[name], (used or {}).get(name, ()), exact)
        )
        for name in names
    ]
    for function in functions:
        for node in function.node:  # messages and profiles of tools name nodes by these
            node.name = f"{function.name}_{node.output[0]}"
    return functions


def _header(name: str, attributes: Collection[str], inputs: Iterable[str]) -> str:
    opset = f'<opset_import: ["" : {OPSET_VERSION}], domain: "{abi.DOMAIN}">'
    given = f"<{', '.join(attributes)}> " if attributes else ""
    return f"{opset} {name} {given}({', '.join(inputs)}) => (y)"


def _bytes_by(scale: str, offset: str) -> str:
    """The steps from floats to bytes by the attributes of these names, as a template."""
    return _BYTES.replace("{scale}", scale).replace("{offset}", offset)


def _rounding() -> str:
    steps = _bytes_by(*ROUND_ATTRIBUTES).format(x="x", y="y")
    return f"{_header(abi.ROUND, ROUND_ATTRIBUTES, ['x'])} {{ {steps} }}"


def _arranging() -> str:
    attributes = [_DEFAULTS[item] for item in ARRANGE_ATTRIBUTES]
    return f"{_header(abi.ARRANGE, attributes, ['x'])} {{ y = Identity (x) }}"


def _largest() -> str:
    given = ", ".join(f"{name}: ints = @{name}" for name in MAX_ATTRIBUTES)
    return f"{_header(abi.MAX_POOL, MAX_ATTRIBUTES, ['x'])} {{ y = MaxPool <{given}> (x) }}"


def _mean() -> str:
    given = ", ".join(f"{name}: ints = @{name}" for name in MEAN_ATTRIBUTES)
    body = f"y = AveragePool <{given}, count_include_pad: int = 1> (x)"
    return f"{_header(abi.MEAN_POOL, MEAN_ATTRIBUTES, ['x'])} {{ {body} }}"


def _padding() -> str:
    # ONNX Runtime makes zeros that a MaxPool reads that pool's own padding, which is no number, unless something is
    # between them.
    body = """
    pads = Constant <value_ints: ints = @pads> ()
    value = Constant <value_float: float = @value> ()
    padded = Pad (x, pads, value)
    y = Max (padded, padded)
"""
    return f"{_header(abi.PAD, PAD_ATTRIBUTES, ['x'])} {{ {body} }}"


def _affine() -> str:
    # (C,) -> (C, 1, ...), with as many ones as x has sizes.
    body = """
    sizes = Shape <start: int = 2> (x)
    count = Shape (sizes)
    ones = ConstantOfShape <value: tensor = int64[1] {1}> (count)
    all = Constant <value: tensor = int64[1] {-1}> ()
    each = Concat <axis: int = 0> (all, ones)
    scales = Reshape (scale, each)
    shifts = Reshape (shift, each)
    product = Mul (x, scales)
    y = Add (product, shifts)
"""
    return f"{_header(abi.AFFINE, (), abi.NO_LAYERS[abi.AFFINE])} {{ {body} }}"


def _joining() -> str:
    return f"{_header(abi.CONCAT, (), ['x', 'other'])} {{ y = Concat <axis: int = 1> (x, other) }}"


_NO_LAYERS = {
    abi.ROUND: _rounding,
    abi.ARRANGE: _arranging,
    abi.MAX_POOL: _largest,
    abi.MEAN_POOL: _mean,
    abi.PAD: _padding,
    abi.AFFINE: _affine,
    abi.CONCAT: _joining,
}


def _function(name: str, base: str, residual: bool, activation: str, used: Collection[str], exact: bool) -> str:
    before, after = (_PERMUTATION.format(name=perm) if perm in used else "" for perm in LINEAR_ATTRIBUTES)
    # The residual lies as y does.
    as_floats = (_AS_FLOATS if exact else _AS_NUMBERS) if "x_bytes" in used else ""
    steps = [
        as_floats,
        before,
        _contraction(base, exact, used),
        after,
        _ADDITION if residual else "",
        _ACTIVATIONS[activation],
        _bytes_by(*OUTPUT_ATTRIBUTES) if base.endswith(abi.BYTES) else "",
    ]
    steps = [step for step in steps if step]
    results = ["x", *(f"step{i}" for i in range(1, len(steps))), "y"]
    # ONNX Runtime before 1.30 makes MatMul and Add one Gemm, and takes any Transpose in front of it for one that swaps
    # rows and columns, even where a node's permutation changes nothing. It leaves a Sum as it is.
    total = "Sum" if "x_perm" in used else "Add"
    body = "".join(step.format(x=results[i], y=results[i + 1], sum=total) for i, step in enumerate(steps))
    attributes = [_DEFAULTS.get(item, item) for item in attributes_of(base)]
    plain = exact or not abi.has_scales(base)
    weight = _DENSE_WEIGHT.replace("{values}", _VALUES if plain else _SCALED_VALUES)
    weight = weight.replace("{indices}", _SHARED_INDICES if SHARED in used else _OWN_INDICES)
    return f"{_header(name, attributes, abi.inputs_of(base, residual))} {{ {weight} {body} }}"
