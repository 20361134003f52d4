"""Operators that multiply bytes, as QuantizeLinear and DequantizeLinear around a product of floats.

Owns the reading of ``QLinearConv``, ``QLinearMatMul``, ``QGemm``, ``ConvInteger`` and ``MatMulInteger``, as ONNX
Runtime's quantisation writes them. It must not know how sparse a weight is, nor which numbers the condensed operators
carry.

Rules:
    1. ``QLinearConv``, ``QLinearMatMul`` and ``QGemm`` are a product of dequantised bytes, whose result is quantised.
       Their bias is int32, in steps of the two scales.
    2. The sums of ``MatMulInteger`` and ``ConvInteger`` are those of bytes that are worth 1 each. They must be read as
       floats, by ``Cast`` in the same graph, as dynamic quantisation does: float32 has not all numbers of int32.
    3. The zero point of their samples is found at each call. 128 is taken for it, and the difference, times the sum of
       each output's weights, is added: that is the same sum. Where zeros are padded it is not, and the bytes are
       dequantised with the zero point that was found.
"""

import math
from typing import Any

import numpy as np
import onnx_ir as ir

from srigl_fx.onnx_condensing.constants import Array, attribute, constant, input_of, source_name
from srigl_fx.onnx_condensing.drafts import Draft, Names
from srigl_fx.onnx_condensing.expansion import Expansion, Product
from srigl_fx.runtime.costs.cost_model import ONNXRUNTIME
from srigl_fx.runtime.quantisation import OFFSET

_CONVOLUTION = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")
# The places of the weight, and of its scale and zero point, among the inputs.
_LAYERS = {"QLinearConv": (3, 4, 5), "QLinearMatMul": (3, 4, 5), "QGemm": (3, 4, 5)}
_SUMS = {"MatMulInteger": (1, None, 3), "ConvInteger": (1, None, 3)}
BYTE_OPERATORS = frozenset(_LAYERS | _SUMS)


def of_bytes(node: ir.Node, names: Names) -> Expansion | None:
    """One of these operators with a constant weight as a product of floats; None where the weight is computed.

    Example:
        >>> values = [ir.val(name) for name in "abcdefgh"]
        >>> empty = ir.Model(ir.Graph([], [], nodes=[]), ir_version=9)
        >>> of_bytes(ir.node("QLinearMatMul", values), Names(empty)) is None
        True
    """
    place, scale_place, zero_place = (_LAYERS | _SUMS)[node.op_type]
    weight = constant(input_of(node, place))
    if weight is None or constant(input_of(node, 0)) is not None:
        return None
    name = source_name(input_of(node, place))
    is_convolution = node.op_type in ("QLinearConv", "ConvInteger")
    shape = weight.shape if is_convolution or attribute(node, "transB", 0) else weight.shape[::-1]
    expansion = Expansion(node=node, operator=node.op_type, shapes={name: shape}, is_rounded=True)
    scale: Array | None = np.ones((), np.float32) if scale_place is None else constant(input_of(node, scale_place))
    zero = constant(input_of(node, zero_place))
    if scale is None or (zero is None and input_of(node, zero_place) is not None):
        expansion.refused = "the scale or the zero point of its weight is computed"
    elif weight.ndim < 2 or (not is_convolution and weight.ndim != 2):
        expansion.refused = f"its weight has {weight.ndim} axes"
    elif weight.dtype not in (np.uint8, np.int8):
        expansion.refused = f"its weight is {weight.dtype}"
    if expansion.refused or scale is None:
        return expansion
    draft = Draft(names, node.name or name)
    axis = 0 if is_convolution or attribute(node, "transB", 0) else 1
    zero = np.zeros((), weight.dtype) if zero is None else zero
    arrays = [weight, *(_for_outputs(one) for one in (scale, zero))]
    w = draft.add(
        "DequantizeLinear",
        *(draft.constant(one, kind) for one, kind in zip(arrays, ("weight", "scale", "zero_point"), strict=True)),
        shape=weight.shape,
        axis=axis,
    )
    make = _layer if node.op_type in _LAYERS else _sums
    expansion.refused = make(expansion, draft, w, weight, zero)
    if expansion.refused:
        draft.let_go()
        return expansion
    expansion.draft = draft
    product = next(one for one in draft.nodes if one.op_type in ("Conv", "MatMul", "Gemm"))
    expansion.products = [Product(node=product, weight=name)]
    return expansion


def _for_outputs(array: Array) -> Array:
    """One number, or one for each output."""
    return array.reshape(()) if array.size == 1 else array.reshape(-1)


def _is_one(value: ir.Value | None) -> bool:
    """Whether a value is known to be one number."""
    return value is not None and value.shape is not None and all(size == 1 for size in value.shape)


def _layer(expansion: Expansion, draft: Draft, w: ir.Value, weight: Array, zero: Array) -> str:
    """Rule 1; why not, or ""."""
    node = expansion.node
    x, x_scale, x_zero = (input_of(node, i) for i in range(3))
    has_bias_first = node.op_type == "QGemm"  # in front of the scale of the outputs
    y_scale, y_zero = (input_of(node, i + has_bias_first) for i in (6, 7))
    bias = input_of(node, 6 if has_bias_first else 8)
    if x is None or not (_is_one(x_scale) and (x_zero is None or _is_one(x_zero))):
        return "its input has several scales, or unknown ones"
    if attribute(node, "transA", 0):
        return "its input is transposed"
    # What ONNX does not infer behind operators of ONNX Runtime's own, weights say, but for products of any rank.
    rank = None if node.op_type == "QLinearMatMul" else weight.ndim
    shape = list(x.shape) if x.shape is not None else [None] * rank if rank else None
    samples = draft.add("DequantizeLinear", x, x_scale, x_zero, shape=shape)
    given: list[ir.Value | None] = [samples, w]
    factor = attribute(node, "alpha", 1.0) if node.op_type == "QGemm" else 1.0
    if bias is not None:
        steps, one, other = constant(bias), constant(x_scale), constant(input_of(node, 4))
        if steps is None or one is None or other is None:
            return "its bias is computed, or its scale is"
        worth = steps.astype(np.float64) * one.reshape(-1) * other.reshape(-1) * factor
        given.append(draft.constant(worth.reshape(-1).astype(np.float32), "bias"))
    known = node.outputs[0].shape
    out: list[Any] | None = list(known) if known is not None else None
    if out is None and rank:
        out = [None, next(iter(expansion.shapes.values()))[0], *[None] * (rank - 2)]
    attributes: dict[str, Any] = {}
    if node.op_type == "QLinearConv":
        attributes = {name: attribute(node, name, None) for name in _CONVOLUTION}
    elif node.op_type == "QGemm":
        attributes = {"transB": attribute(node, "transB", 0), "alpha": factor}
    operator = {"QLinearConv": "Conv", "QLinearMatMul": "MatMul", "QGemm": "Gemm"}[node.op_type]
    y = draft.add(operator, *given, shape=out, **attributes)
    if y_scale is not None:
        dtype = node.outputs[0].dtype or (y_zero.dtype if y_zero is not None else None) or ir.DataType.UINT8
        y = draft.add("QuantizeLinear", y, y_scale, y_zero, shape=out, dtype=dtype)
    expansion.replaced, expansion.outputs = node.outputs, [y]
    if y_scale is not None:  # is rounded by a node of its own
        elements = math.prod(size for size in (out or [])[1:] if isinstance(size, int))
        expansion.overhead = lambda batch: ONNXRUNTIME.dense_call + batch * elements / ONNXRUNTIME.move_rate
    return ""


def _sums(expansion: Expansion, draft: Draft, w: ir.Value, weight: Array, zero: Array) -> str:
    """Rules 2 and 3; why not, or ""."""
    node = expansion.node
    x, x_zero = node.inputs[0], input_of(node, 2)
    readers = [use.node for use in node.outputs[0].uses()]
    floats = int(ir.DataType.FLOAT)
    if node.outputs[0].is_graph_output() or not all(
        one.op_type == "Cast" and int(attribute(one, "to", 0)) == floats for one in readers
    ):
        return "its sums are not read as float32 alone"
    if any(one.graph is not node.graph for one in readers):
        return "its sums are read inside a branch or a loop"
    if x is None or x.dtype != ir.DataType.UINT8:
        return "its input is not uint8"
    if x_zero is not None and not _is_one(x_zero):
        return "the zero point of its input is not known to be one number"
    out = node.outputs[0].shape
    shape = None if out is None else list(out)
    one = draft.constant(np.ones((), np.float32), "one")
    is_convolution = node.op_type == "ConvInteger"
    attributes = {name: attribute(node, name, None) for name in _CONVOLUTION} if is_convolution else {}
    operator = "Conv" if is_convolution else "MatMul"
    is_padded = is_convolution and (any(attribute(node, "pads", None) or []) or _pads_by_size(node))
    known = None if x_zero is None else constant(x_zero)
    point = x_zero
    if not is_padded and x_zero is not None and known is None:
        point = draft.constant(np.full((), OFFSET, np.uint8), "offset")
    samples = draft.add("DequantizeLinear", x, one, point, shape=None if x.shape is None else list(x.shape))
    y = draft.add(operator, samples, w, shape=shape, **attributes)
    if point is not x_zero:
        steps = weight.astype(np.int64) - (zero.astype(np.int64).reshape(_along(weight, is_convolution, zero)))
        totals = steps.reshape(len(steps), -1).sum(axis=1) if is_convolution else steps.sum(axis=0)
        wide = draft.add("Cast", x_zero, shape=[], to=floats)
        wide = draft.add("Reshape", wide, draft.constant(np.zeros(0, np.int64), "scalar"), shape=[])
        difference = draft.add("Sub", draft.constant(np.float32(OFFSET), "offset"), wide, shape=[])
        if is_convolution:
            totals = totals.reshape(-1, *[1] * (weight.ndim - 2))
        worth = draft.constant(totals.astype(np.float32), "totals")
        correction = draft.add("Mul", difference, worth, shape=list(totals.shape))
        y = draft.add("Add", y, correction, shape=shape)
    expansion.replaced = [reader.outputs[0] for reader in readers]
    expansion.outputs = [y]
    if len(readers) != 1:
        return "its sums are read several times, or never"
    calls = len(draft.nodes) - 3
    expansion.overhead = lambda batch: calls * ONNXRUNTIME.dense_call
    return ""


def _pads_by_size(node: ir.Node) -> bool:
    return attribute(node, "auto_pad", "NOTSET") in ("SAME_UPPER", "SAME_LOWER")


def _along(weight: Array, is_convolution: bool, zero: Array) -> list[int]:
    """The shape in which numbers of outputs are broadcast to a weight."""
    if zero.size == 1:
        return [1] * weight.ndim
    return [-1, *[1] * (weight.ndim - 1)] if is_convolution else [1, -1]
