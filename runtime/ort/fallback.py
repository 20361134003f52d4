"""The operators as functions of standard ONNX operators, which a model carries for hosts without the library.

Owns the two function bodies. Each scatters the kept weights into the dense weight and multiplies with that; as the
dense shape comes from attributes and not from ``x``, ONNX Runtime folds all but the last step into one constant, and
what runs is a plain Gemm, MatMul or Conv. It must not know graphs or sessions.
"""

from typing import TYPE_CHECKING

from srigl_fx.runtime.ort import abi

if TYPE_CHECKING:
    import onnx

OPSET_VERSION = 18
IR_VERSION = 9  # the newest that ONNX Runtime 1.17 reads
WEIGHT_ATTRIBUTES = ("in_features", "weight_shape", "flat_size")
CONV_ATTRIBUTES = ("strides", "pads", "dilations", "group")

# flat position of a kept weight = its row in the dense weight * in_features + its index
_DENSE_WEIGHT = """
    wide_indices = Cast <to: int = 7> (indices)
    wide_active = Cast <to: int = 7> (active)
    one = Constant <value_ints: ints = [1]> ()
    rows = Unsqueeze (wide_active, one)
    row_size = Constant <value_int: int = @in_features> ()
    row_starts = Mul (rows, row_size)
    positions = Add (row_starts, wide_indices)
    minus_one = Constant <value_ints: ints = [-1]> ()
    flat_positions = Reshape (positions, minus_one)
    flat_values = Reshape (values, minus_one)
    size = Constant <value_int: int = @flat_size> ()
    sizes = Reshape (size, one)
    zeros = ConstantOfShape (sizes)
    flat_weight = ScatterElements <axis: int = 0> (zeros, flat_positions, flat_values)
    shape = Constant <value_ints: ints = @weight_shape> ()
    weight = Reshape (flat_weight, shape)
"""
_LINEAR = """
    transposed = Transpose <perm: ints = [1, 0]> (weight)
    product = MatMul (x, transposed)
    y = Add (product, bias)
"""
_CONV = """
    y = Conv <strides: ints = @strides, pads: ints = @pads, dilations: ints = @dilations, group: int = @group>
        (x, weight, bias)
"""


def fallback_functions() -> "list[onnx.FunctionProto]":
    """The model-local functions ``CondensedLinear`` and ``CondensedConv`` of domain ``srigl_fx``, for opset 18.

    Appended to ``ModelProto.functions``, they let a stock ONNX Runtime (1.17 or newer) run the model, as fast as its
    dense twin; where the operator library is registered, the operators are used instead.

    Example:
        >>> [(function.domain, function.name) for function in fallback_functions()]
        [('srigl_fx', 'CondensedLinear'), ('srigl_fx', 'CondensedConv')]
    """
    import onnx.parser

    functions = []
    bodies = ((_LINEAR, WEIGHT_ATTRIBUTES), (_CONV, (*WEIGHT_ATTRIBUTES, *CONV_ATTRIBUTES)))
    for name, (body, attributes) in zip(abi.OPERATORS, bodies, strict=True):
        signature = f"{name} <{', '.join(attributes)}> ({', '.join(abi.INPUTS)}) => (y)"
        header = f'<opset_import: ["" : {OPSET_VERSION}], domain: "{abi.DOMAIN}">'
        functions.append(onnx.parser.parse_function(f"{header} {signature} {{ {_DENSE_WEIGHT} {body} }}"))
    return functions
