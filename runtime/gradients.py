"""The gradients of the condensed operators.

Owns what their backward computes: for linear layers from the kept weights alone, where that is faster, else densely. It
must not know how the operators are checked or executed. Second derivatives are refused.

The products of a linear layer are an operator of their own, into which torch.compile and torch.export do not look.
"""

import math
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from srigl_fx.errors import FormatError
from srigl_fx.runtime.arranged import arrange, arrange_back
from srigl_fx.runtime.cpu.training_products import Pattern, pack
from srigl_fx.runtime.dense import FUNCTIONS, dense_conv, expand, is_padding, of_each_row
from srigl_fx.runtime.validation import on_one_device

_library: Any = torch.library.Library("srigl_fx", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(
    "condensed_linear_gradients(Tensor gradient, Tensor x, Tensor values, Tensor indices, Tensor active, bool of_x, "
    "bool of_values) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep what the backward of either operator needs."""
    x, values, indices, active, bias, *settings = inputs
    place = next(i for i, setting in enumerate(settings) if setting is None or isinstance(setting, Tensor))
    ctx.settings = [*settings[:place], *settings[place + 1 :]]
    ctx.save_for_backward(x, values, indices, active, bias, settings[place])


def linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of condensed_linear's arguments.

    Raises:
        FormatError: It is to be differentiated again, or its values have eight bits.
    """
    _refuse_second_derivatives("condensed_linear")
    x, values, indices, active, bias, residual = ctx.saved_tensors
    in_features, activation, _, _, scales, *_ = ctx.settings
    _refuse_eight_bits("condensed_linear", scales)
    wanted = ctx.needs_input_grad
    if activation != "none":
        operands = (t.detach() for t in (x, values, indices, active, bias))
        before = torch.ops.srigl_fx.condensed_linear(*operands, in_features, residual)
        with torch.enable_grad():
            before = before.detach().requires_grad_()
            (grad,) = torch.autograd.grad(FUNCTIONS[activation](before), before, grad)
    of_x, of_values = torch.ops.srigl_fx.condensed_linear_gradients(
        grad, x.detach(), values.detach(), indices, active, wanted[0], wanted[1]
    )
    of_bias = grad.reshape(-1, bias.shape[0]).sum(0) if wanted[4] else None
    of_residual = None if residual is None else grad
    return (
        of_x if wanted[0] else None,
        of_values if wanted[1] else None,
        None,
        None,
        of_bias,
        None,
        of_residual,
        *(None,) * 8,
    )


def conv_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of condensed_conv's arguments, by torch's dense convolution.

    Raises:
        FormatError: It is to be differentiated again, or its values have eight bits.
    """
    _refuse_second_derivatives("condensed_conv")
    x, values, indices, active, bias, residual = ctx.saved_tensors
    weight_shape, stride, padding, dilation, groups, activation, transposed, output_padding, scales, *_, arranged = (
        ctx.settings
    )
    _refuse_eight_bits("condensed_conv", scales)
    columns = math.prod(weight_shape[1:])
    dense, positions = expand(values.float(), indices, active, bias.shape[0], columns)
    arranged = arranged and x.is_cpu
    if arranged:  # torch's own convolution wants samples as they are
        x, grad = arrange_back(x), arrange_back(grad)
        residual = None if residual is None else arrange_back(residual)
    with torch.enable_grad():
        x, dense, bias = leaves = [t.detach().requires_grad_() for t in (x, dense, bias)]
        y = dense_conv(x, dense, bias, weight_shape, stride, padding, dilation, groups, transposed, output_padding)
        if residual is not None:
            leaves.append(residual.detach().requires_grad_())
            y = y + leaves[-1]
        grads = torch.autograd.grad(FUNCTIONS[activation](y), leaves, grad)
    grad_values = None
    if ctx.needs_input_grad[1]:
        grad_values = grads[1].reshape(-1)[positions].masked_fill(is_padding(positions), 0).to(values.dtype)
    of_x, of_residual = grads[0], None if residual is None else grads[3]
    if arranged:
        of_x, of_residual = arrange(of_x), None if of_residual is None else arrange(of_residual)
    return of_x, grad_values, None, None, grads[2], *(None,) * 5, of_residual, *(None,) * 9


def _refuse_eight_bits(op: str, scales: Tensor | None) -> None:
    if scales is not None:
        raise FormatError(
            f"{op}: values of eight bits, and activations that are rounded to as many, have no gradient: lower the "
            "model with value_dtype=torch.float32 to train it"
        )


def _refuse_second_derivatives(op: str) -> None:
    if torch.is_grad_enabled():
        raise FormatError(
            f"{op}: second derivatives are not supported: call backward() without create_graph=True, or differentiate "
            "the model before it is lowered"
        )


def _linear_gradients(
    gradient: Tensor, x: Tensor, values: Tensor, indices: Tensor, active: Tensor, of_x: bool, of_values: bool
) -> tuple[Tensor, Tensor]:
    n, in_features = gradient.shape[-1], x.shape[-1]
    g, flat = gradient.reshape(-1, n), x.reshape(-1, in_features)
    if not gradient.is_cpu:
        return _dense_linear_gradients(g, flat, values, indices, active, of_x, of_values, x.shape)
    kept, pattern = _pattern(indices, active, n, in_features)
    grad_x, grad_values = x.new_empty(0), values.new_empty(0)
    if pattern.pays(flat.shape[0]):
        packed = pack(g)
        if of_x:
            entries = values.float().reshape(-1)
            entries = entries if kept is None else entries.index_select(0, kept)
            grad_x = pattern.multiply_transposed(entries, packed).reshape(x.shape)
        if of_values:
            grad_values = pattern.value_gradient(pack(flat), packed)
    else:
        if of_x:
            dense, _ = expand(values.float(), indices, active, n, in_features)
            grad_x = (g @ dense).reshape(x.shape)
        if of_values:
            grad_values = (g.t() @ flat).reshape(-1).index_select(0, pattern.positions)
    if of_values:
        if kept is not None:
            grad_values = grad_values.new_zeros(values.numel()).index_copy_(0, kept, grad_values)
        grad_values = grad_values.reshape(values.shape).to(values.dtype)
    return grad_x, grad_values


def _dense_linear_gradients(
    g: Tensor,
    flat: Tensor,
    values: Tensor,
    indices: Tensor,
    active: Tensor,
    of_x: bool,
    of_values: bool,
    shape: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """The same by torch's own products of the dense matrix, which never wait for the host."""
    dense, positions = expand(values.float(), indices, active, g.shape[1], flat.shape[1])
    grad_x = (g @ dense).reshape(shape) if of_x else flat.new_empty(0)
    if not of_values:
        return grad_x, values.new_empty(0)
    of_entries = (g.t() @ flat).reshape(-1)[positions]
    return grad_x, of_entries.masked_fill(is_padding(positions), 0).to(values.dtype)


def _fake_linear_gradients(
    gradient: Tensor, x: Tensor, values: Tensor, indices: Tensor, active: Tensor, of_x: bool, of_values: bool
) -> tuple[Tensor, Tensor]:
    return (
        x.new_empty(x.shape) if of_x else x.new_empty(0),
        values.new_empty(values.shape) if of_values else values.new_empty(0),
    )


_OP = "condensed_linear_gradients"
_library.impl(_OP, _linear_gradients, "CPU")
_library.impl(_OP, on_one_device(_OP, _linear_gradients), "CUDA")
torch.library.register_fake(f"srigl_fx::{_OP}", on_one_device(_OP, _fake_linear_gradients), lib=_library)

# By the id of the indices, for as long as they live; single dict operations only, which are atomic.
_patterns: dict[int, tuple["weakref.ref[Tensor]", tuple[object, ...], tuple[Tensor | None, Pattern]]] = {}


def _pattern(indices: Tensor, active: Tensor, n: int, in_features: int) -> tuple[Tensor | None, Pattern]:
    """Where a weight has entries that are no padding, None for everywhere, and their pattern.

    Both are from memory unless the weight changed. The operands are those of a forward that checked them.
    """
    key, counted = id(indices), not (indices.is_inference() or active.is_inference())
    facts: tuple[object, ...] = (n, in_features, indices.data_ptr(), active.data_ptr())
    if counted:
        facts += (indices._version, active._version)
        found = _patterns.get(key)
        if found is not None and found[0]() is indices and found[1] == facts:
            return found[2]
    columns, rows = of_each_row(indices, active)
    rows, kept = rows[:, None].expand(columns.shape), ~is_padding(columns)
    pattern = Pattern(rows[kept], columns[kept], n, in_features)
    made = None if bool(kept.all()) else kept.reshape(-1).nonzero().reshape(-1), pattern
    if counted:
        _patterns[key] = weakref.ref(indices, lambda _: _patterns.pop(key, None)), facts, made
    return made
