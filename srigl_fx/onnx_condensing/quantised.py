"""What an operator of eight bits needs of a contraction that a file computes from rounded samples and weights.

Owns the reading of ``QuantizeLinear`` and ``DequantizeLinear`` around a contraction, and which of them the operators'
arithmetic carries exactly. It must not know how sparse a weight is, nor write.

Rules:
    1. The input is dequantised from bytes with one scale and one zero point; the weight from whole numbers with one
       scale for each output, or for all. Then sums are those of whole numbers, as in the operators.
    2. The operators read uint8 with a zero point of 0 or 128. Of int8, all numbers are 128 more there: their
       ``QuantizeLinear`` is written anew; where no such node makes them, what they stand for is rounded once more, to
       the same numbers.
    3. With another zero point z, 128 is taken for it, and what that adds to each sum, (z - 128) times the sum of the
       row's weights, is taken off the bias. Where zeros are padded they would not be z, so that this is in float32.
    4. Weights are bytes once their zero point is taken off, -128 too, which our own rounding does not make but the
       operators multiply with; a fan-in must leave room in 32 bits.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from srigl_fx.onnx_condensing.constants import Array, constant, steps
from srigl_fx.onnx_condensing.match import Contraction, matrix_view
from srigl_fx.runtime.quantisation import (
    LARGEST_FAN_IN,
    LARGEST_FILTER,
    LARGEST_UNSIGNED,
    LARGEST_VALUE,
    OFFSET,
    given_problem,
)


@dataclass(frozen=True, kw_only=True)
class EightBits:
    """A contraction of whole numbers.

    Attributes:
        x: What the input is dequantised from: uint8, or int8 if ``signed``.
        signed: Whether it is int8.
        zero: The zero point of uint8: 0 to 255.
        scale: The scale of the input.
        values: int8 (n, F), the weight's whole numbers.
        scales: float32 (n,), what one of them is worth.
    """

    x: ir.Value
    signed: bool
    zero: int
    scale: float
    values: Array
    scales: Array

    @property
    def offset(self) -> int:
        """What the operators take for zero."""
        return self.zero if self.zero in (0, OFFSET) else OFFSET

    @property
    def correction(self) -> Array:
        """float32 (n,), what is to be added to the bias (rule 3 of the module)."""
        totals = self.values.sum(axis=1, dtype=np.int64)
        steps = self.scale * self.scales.astype(np.float64)
        return np.asarray((self.offset - self.zero) * totals * steps, dtype=np.float32)


def eight_bits(one: Contraction) -> EightBits | str:
    """The whole numbers of a contraction, or why it has none that the operators can carry.

    Returns:
        The numbers; or the reason, "" where the file does not round both samples and weights.

    Example:
        >>> x, w = ir.val("x", dtype=ir.DataType.FLOAT, shape=[2, 4]), ir.val("w", const_value=ir.tensor([[1.0]] * 4))
        >>> eight_bits(Contraction(node=ir.node("MatMul", [x, w]), weight="w", matrix=np.ones((1, 4))))
        ''
    """
    samples, weight = one.x.producer(), steps(one.node.inputs[1])
    if weight is None or samples is None or samples.op_type != "DequantizeLinear" or samples.domain not in _ONNX:
        return ""
    read = _samples(samples)
    if isinstance(read, str):
        return read
    x, signed, zero, scale = read
    numbers, scales = (matrix_view(one.node, np.broadcast_to(part, weight[0].shape)) for part in weight)
    scales = scales * np.float32(one.factor)
    if (scales != scales[:, :1]).any():
        return "the scales of its weight differ within an output"
    scales = np.ascontiguousarray(scales[:, 0], np.float32) if scales.size else np.zeros(len(scales), np.float32)
    if not (np.isfinite(scales).all() and (scales >= 0).all()):
        return "the scales of its weight are not all finite and positive"
    if numbers.size and not -OFFSET <= numbers.min() <= numbers.max() <= LARGEST_VALUE:
        beyond = numbers.flat[np.abs(numbers).argmax()]
        return f"its weight holds {beyond} steps, and -{OFFSET} to {LARGEST_VALUE} can be stored"
    if problem := _too_large(one, numbers):
        return problem
    if zero not in (0, OFFSET) and one.convolution is not None and any(one.convolution["pads"]):
        shown = zero - OFFSET if signed else zero
        return f"its input has the zero point {shown}, and is padded"
    return EightBits(x=x, signed=signed, zero=zero, scale=scale, values=numbers.astype(np.int8), scales=scales)


_ONNX = ("", "ai.onnx")


def _samples(node: ir.Node) -> tuple[ir.Value, bool, int, float] | str:
    """The bytes that a DequantizeLinear reads, whether they are signed, their zero point as uint8, and their scale."""
    x, scale = node.inputs[0], constant(node.inputs[1])
    zero = constant(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else np.zeros(1, np.uint8)
    if x is None or scale is None or zero is None:
        return "the scale of its input is computed"
    if scale.size != 1 or zero.size != 1:
        return "its input has several scales"
    has_zero = len(node.inputs) > 2 and node.inputs[2] is not None  # which is of the same type
    dtype = x.dtype or (ir.DataType.from_numpy(zero.dtype) if has_zero else ir.DataType.UNDEFINED)
    if dtype not in (ir.DataType.UINT8, ir.DataType.INT8):
        return f"its input is {dtype.name.lower()} that is dequantised"
    signed = dtype == ir.DataType.INT8
    number, offset = float(np.float32(scale.item())), int(zero.item()) + (OFFSET if signed else 0)
    if scale.dtype != np.float32 or given_problem(number, 0) or not 0 <= offset <= LARGEST_UNSIGNED:
        return "the scale of its input is no scale of eight bits"
    return x, signed, offset, number


def quantiser(x: ir.Value) -> ir.Node | None:
    """The QuantizeLinear that makes bytes of floats with one scale and one zero point, if that is what makes them.

    Example:
        >>> quantiser(ir.val("x")) is None
        True
    """
    node = x.producer()
    if node is None or node.op_type != "QuantizeLinear" or node.domain not in _ONNX or len(node.inputs) < 2:
        return None
    parts: list[Any] = [constant(part) for part in node.inputs[1:3] if part is not None]
    return node if all(part is not None and part.size == 1 for part in parts) else None


def _too_large(one: Contraction, numbers: Array) -> str:
    kept = int((numbers != 0).sum(axis=1).max(initial=0))
    if kept > LARGEST_FAN_IN:
        return f"an output keeps {kept} weights, and {LARGEST_FAN_IN} are the most of eight bits"
    if one.convolution is not None and numbers.shape[1] > LARGEST_FILTER:
        return f"its filters have {numbers.shape[1]} inputs, and {LARGEST_FILTER} are the most of eight bits"
    return ""
