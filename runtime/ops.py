"""The operators of torch: ``torch.ops.srigl_fx.condensed_linear``, ``condensed_conv``, ``round_samples``,
``arrange_samples``, ``pool_samples``, ``pad_samples``, ``affine_samples`` and ``concat_samples``.

Owns schemas, the fake kernels (shapes for torch.compile and torch.export), and which code a device has. It must not
know graphs or models, nor how anything is computed.

Importing this module registers the operators, and is what a process needs that loads a program of torch.export or a
package of AOTInductor which was made from a lowered module. It imports torch; the kernels come
from the operator library where it is built, and are compiled at the first call else.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from srigl_fx.errors import FormatError
from srigl_fx.runtime import arranged
from srigl_fx.runtime.cpu import execute, execute_arranged, execute_conv
from srigl_fx.runtime.cuda import execute as gpu
from srigl_fx.runtime.dense import dense_conv as dense_conv
from srigl_fx.runtime.dense import dense_weight as dense_weight
from srigl_fx.runtime.gradients import conv_backward, linear_backward, save
from srigl_fx.runtime.quantisation import LARGEST_FILTER
from srigl_fx.runtime.validation import (
    check_affine,
    check_arranged,
    check_concat,
    check_epilogue,
    check_given,
    check_padding,
    check_pooling,
    check_rounding,
    check_samples,
    check_weight,
    conv_shape,
    linear_shape,
    on_one_device,
)

_WEIGHT = "Tensor values, Tensor indices, Tensor active, Tensor bias"
# With values of int8: how x is rounded, rather than by what it holds; and how y is, rather than stored as floats.
_GIVEN = "float? x_scale=None, int x_offset=0, float? y_scale=None, int y_offset=0"

_library: Any = torch.library.Library("srigl_fx", "DEF")  # type: ignore[no-untyped-call]
_library.define(
    f"condensed_linear(Tensor x, {_WEIGHT}, int in_features, Tensor? residual=None, str activation='none', "
    f"bool x_feature_major=False, bool y_feature_major=False, Tensor? scales=None, {_GIVEN}) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    f"condensed_conv(Tensor x, {_WEIGHT}, int[] weight_shape, int[] stride, int[] padding, int[] dilation, "
    "int groups, Tensor? residual=None, str activation='none', bool transposed=False, int[]? output_padding=None, "
    f"Tensor? scales=None, {_GIVEN}, bool arranged=False) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)

_library.define("arrange_samples(Tensor x, bool back=False) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.define(
    "pool_samples(Tensor x, int[] window, int[] stride, int[] padding, int[] dilation, bool mean=False) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "pad_samples(Tensor x, int[] before, int[] after, float value=0.0) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define("affine_samples(Tensor x, Tensor scale, Tensor shift) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.define("concat_samples(Tensor x, Tensor other) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.define("round_samples(Tensor x, float scale, int offset) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def _refuse_forward_mode(op: str) -> None:
    """Refuse to run where tangents would be lost, which are zero then without a word.

    Raises:
        NotImplementedError: In ``torch.func.jvp``, ``jacfwd``, or another forward-mode derivative.
    """
    if forward_ad._current_level >= 0:
        raise NotImplementedError(f"{op} has no forward-mode derivative: use reverse mode, torch.autograd.grad")


def _condensed_linear(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    active: Tensor,
    bias: Tensor,
    in_features: int,
    residual: Tensor | None = None,
    activation: str = "none",
    x_feature_major: bool = False,
    y_feature_major: bool = False,
    scales: Tensor | None = None,
    x_scale: float | None = None,
    x_offset: int = 0,
    y_scale: float | None = None,
    y_offset: int = 0,
) -> Tensor:
    op = "condensed_linear"
    _refuse_forward_mode(op)
    check_epilogue(op, linear_shape(op, x, bias, in_features, x_scale), residual, activation)
    checked = check_weight(op, values, indices, active, bias, in_features, scales)
    check_given(op, scales, x_scale, x_offset, y_scale, y_offset)
    weight, given, wanted = _contiguous(values, indices, active, bias), (x_scale, x_offset), (y_scale, y_offset)
    if x.is_cuda:
        gpu.refuse_eight_bits(op, scales)
        return gpu.linear(checked, x, weight, in_features, residual, activation, y_feature_major)
    return execute.linear(checked, x, weight, in_features, residual, activation, y_feature_major, scales, given, wanted)


def _condensed_conv(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    active: Tensor,
    bias: Tensor,
    weight_shape: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    residual: Tensor | None = None,
    activation: str = "none",
    transposed: bool = False,
    output_padding: Sequence[int] | None = None,
    scales: Tensor | None = None,
    x_scale: float | None = None,
    x_offset: int = 0,
    y_scale: float | None = None,
    y_offset: int = 0,
    arranged: bool = False,
) -> Tensor:
    op = "condensed_conv"
    _refuse_forward_mode(op)
    geometry = weight_shape, stride, padding, dilation, groups, transposed, output_padding
    shape = conv_shape(op, x, bias, *geometry, x_scale)
    check_epilogue(op, shape, residual, activation)
    in_features = math.prod(weight_shape[1:])
    if scales is not None and in_features > LARGEST_FILTER:
        raise FormatError(
            f"{op}: a filter of {in_features} inputs is too large for values of int8 (largest: {LARGEST_FILTER}); "
            "store them in float32"
        )
    checked = check_weight(op, values, indices, active, bias, in_features, scales)
    check_given(op, scales, x_scale, x_offset, y_scale, y_offset)
    check_arranged(op, arranged, weight_shape, dilation, groups, transposed, scales)
    if x.is_cuda:
        weight = values, indices, active, bias
        gpu.refuse_eight_bits(op, scales)
        steps = stride, padding, dilation, groups
        return gpu.convolution(x, weight, weight_shape, *steps, residual, activation, transposed, output_padding)
    y = x.new_empty(shape, dtype=_stored(y_scale))
    if y.numel():
        residual = None if residual is None else residual.contiguous()
        operands = x.contiguous(), *_contiguous(values, indices, active, bias)
        if arranged:
            shown = weight_shape, stride, padding, dilation
            execute_conv.innermost_convolution(checked, operands, *shown, groups, y, residual, activation)
            return y
        settings = weight_shape, stride, padding, dilation, groups, transposed
        given = (x_scale, x_offset), (y_scale, y_offset)
        execute_conv.convolution(checked, operands, *settings, y, residual, activation, scales, *given)
    return y


def _stored(y_scale: float | None) -> torch.dtype:
    """The dtype of outputs that are rounded with this scale, or stored as they are."""
    return torch.float32 if y_scale is None else torch.uint8


def _contiguous(values: Tensor, indices: Tensor, active: Tensor, bias: Tensor) -> Sequence[Tensor]:
    """The weight, copied only where it has gaps; usually it has none, and this is on the path of every call."""
    weight = values, indices, active, bias
    if values.is_contiguous() and indices.is_contiguous() and active.is_contiguous() and bias.is_contiguous():
        return weight
    return [operand.contiguous() for operand in weight]


_library.impl("condensed_linear", _condensed_linear, "CPU")
_library.impl("condensed_conv", _condensed_conv, "CPU")
_library.impl("condensed_linear", on_one_device("condensed_linear", _condensed_linear), "CUDA")
_library.impl("condensed_conv", on_one_device("condensed_conv", _condensed_conv), "CUDA")


def _fake_linear(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    active: Tensor,
    bias: Tensor,
    in_features: int,
    residual: Tensor | None = None,
    activation: str = "none",
    x_feature_major: bool = False,
    y_feature_major: bool = False,
    scales: Tensor | None = None,
    x_scale: float | None = None,
    x_offset: int = 0,
    y_scale: float | None = None,
    y_offset: int = 0,
) -> Tensor:
    shape = linear_shape("condensed_linear", x, bias, in_features, x_scale)
    check_epilogue("condensed_linear", shape, residual, activation)
    if not y_feature_major:
        return x.new_empty(shape, dtype=_stored(y_scale))
    return x.new_empty((shape[-1], *shape[:-1]), dtype=_stored(y_scale)).movedim(0, -1)


def _fake_conv(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    active: Tensor,
    bias: Tensor,
    weight_shape: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    residual: Tensor | None = None,
    activation: str = "none",
    transposed: bool = False,
    output_padding: Sequence[int] | None = None,
    scales: Tensor | None = None,
    x_scale: float | None = None,
    x_offset: int = 0,
    y_scale: float | None = None,
    y_offset: int = 0,
    arranged: bool = False,
) -> Tensor:
    op = "condensed_conv"
    geometry = weight_shape, stride, padding, dilation, groups, transposed, output_padding
    shape = conv_shape(op, x, bias, *geometry, x_scale)
    check_epilogue(op, shape, residual, activation)
    check_arranged(op, arranged, weight_shape, dilation, groups, transposed, scales)
    return x.new_empty(shape, dtype=_stored(y_scale))


def _round_samples(x: Tensor, scale: float, offset: int) -> Tensor:
    _refuse_forward_mode("round_samples")
    check_rounding("round_samples", x, scale, offset)
    return execute.round_samples(x, scale, offset)


def _fake_round_samples(x: Tensor, scale: float, offset: int) -> Tensor:
    return torch.empty_like(x, dtype=torch.uint8)


def _arrange_samples(x: Tensor, back: bool = False) -> Tensor:
    _refuse_forward_mode("arrange_samples")
    check_samples("arrange_samples", x)
    if not x.is_cpu:  # no kernel of other devices has samples innermost
        return x.clone(memory_format=torch.contiguous_format)
    y = x.new_empty(x.shape)
    execute_arranged.arrange(x.contiguous(), y, back)
    return y


def _fake_arrange_samples(x: Tensor, back: bool = False) -> Tensor:
    check_samples("arrange_samples", x)
    return x.new_empty(x.shape)


def _save_arranged(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.back = inputs[1]


def _arrange_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return ARRANGE(grad, not ctx.back), None


def _pool_samples(
    x: Tensor, window: list[int], stride: list[int], padding: list[int], dilation: list[int], mean: bool = False
) -> Tensor:
    _refuse_forward_mode("pool_samples")
    settings = window, stride, padding, dilation, mean
    shape = check_pooling("pool_samples", x, *settings)
    if not x.is_cpu:
        return arranged.pool(x, *settings).contiguous()
    y = x.new_empty(shape)
    execute_arranged.pool(x.contiguous(), y, *settings)
    return y


def _fake_pool_samples(
    x: Tensor, window: list[int], stride: list[int], padding: list[int], dilation: list[int], mean: bool = False
) -> Tensor:
    return x.new_empty(check_pooling("pool_samples", x, window, stride, padding, dilation, mean))


def _save_pooled(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.settings = inputs[1:]


def _pool_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (x,) = ctx.saved_tensors
    with torch.enable_grad():
        plain = ARRANGE(x.detach(), True).requires_grad_()
        y = arranged.pool(plain, *ctx.settings)
    (found,) = torch.autograd.grad(y, plain, ARRANGE(grad, True))
    return ARRANGE(found), None, None, None, None, None


def _pad_samples(x: Tensor, before: list[int], after: list[int], value: float = 0.0) -> Tensor:
    _refuse_forward_mode("pad_samples")
    shape = check_padding("pad_samples", x, before, after)
    if not x.is_cpu:
        return arranged.pad(x, before, after, value)
    y = x.new_empty(shape)
    execute_arranged.pad(x.contiguous(), y, before, after, value)
    return y


def _fake_pad_samples(x: Tensor, before: list[int], after: list[int], value: float = 0.0) -> Tensor:
    return x.new_empty(check_padding("pad_samples", x, before, after))


def _save_padded(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.settings = inputs[1:3]


def _pad_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    before, after = ctx.settings
    return ARRANGE(arranged.pad(ARRANGE(grad, True), [-p for p in before], [-p for p in after], 0.0)), None, None, None


def _affine_samples(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    _refuse_forward_mode("affine_samples")
    check_affine("affine_samples", x, scale, shift)
    if not x.is_cpu:
        return arranged.affine(x, scale, shift).contiguous()
    y = x.new_empty(x.shape)
    execute_arranged.affine(x.contiguous(), y, scale.contiguous(), shift.contiguous())
    return y


def _fake_affine_samples(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    check_affine("affine_samples", x, scale, shift)
    return x.new_empty(x.shape)


def _save_affine(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _affine_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, scale = ctx.saved_tensors
    plain, axes = ARRANGE(grad, True), (0, *range(2, grad.dim()))
    return AFFINE(grad, scale, torch.zeros_like(scale)), (plain * ARRANGE(x, True)).sum(axes), plain.sum(axes)


def _concat_samples(x: Tensor, other: Tensor) -> Tensor:
    _refuse_forward_mode("concat_samples")
    shape = check_concat("concat_samples", x, other)
    if not x.is_cpu:
        return torch.cat((x, other), 1)
    y = x.new_empty(shape)
    execute_arranged.concat(x.contiguous(), other.contiguous(), y)
    return y


def _fake_concat_samples(x: Tensor, other: Tensor) -> Tensor:
    return x.new_empty(check_concat("concat_samples", x, other))


def _save_joined(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.channels = inputs[0].shape[1]


def _concat_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    plain = ARRANGE(grad, True)
    return ARRANGE(plain[:, : ctx.channels]), ARRANGE(plain[:, ctx.channels :])


for _op, _fake in (("condensed_linear", _fake_linear), ("condensed_conv", _fake_conv)):
    torch.library.register_fake(f"srigl_fx::{_op}", on_one_device(_op, _fake), lib=_library)
torch.library.register_autograd("srigl_fx::condensed_linear", linear_backward, setup_context=save, lib=_library)
torch.library.register_autograd("srigl_fx::condensed_conv", conv_backward, setup_context=save, lib=_library)
_library.impl("round_samples", _round_samples, "CPU")
torch.library.register_fake("srigl_fx::round_samples", _fake_round_samples, lib=_library)

_library.impl("arrange_samples", _arrange_samples, "CPU")
_library.impl("arrange_samples", _arrange_samples, "CUDA")
torch.library.register_fake("srigl_fx::arrange_samples", _fake_arrange_samples, lib=_library)
torch.library.register_autograd(
    "srigl_fx::arrange_samples", _arrange_backward, setup_context=_save_arranged, lib=_library
)
_library.impl("pool_samples", _pool_samples, "CPU")
_library.impl("pool_samples", _pool_samples, "CUDA")
torch.library.register_fake("srigl_fx::pool_samples", _fake_pool_samples, lib=_library)
torch.library.register_autograd("srigl_fx::pool_samples", _pool_backward, setup_context=_save_pooled, lib=_library)
for _name, _move, _fake_move, _save, _backward in (
    ("pad_samples", _pad_samples, _fake_pad_samples, _save_padded, _pad_backward),
    ("affine_samples", _affine_samples, _fake_affine_samples, _save_affine, _affine_backward),
    ("concat_samples", _concat_samples, _fake_concat_samples, _save_joined, _concat_backward),
):
    _library.impl(_name, _move, "CPU")
    _library.impl(_name, _move, "CUDA")
    torch.library.register_fake(f"srigl_fx::{_name}", _fake_move, lib=_library)
    torch.library.register_autograd(f"srigl_fx::{_name}", _backward, setup_context=_save, lib=_library)

LINEAR = torch.ops.srigl_fx.condensed_linear.default
CONV = torch.ops.srigl_fx.condensed_conv.default
ROUND = torch.ops.srigl_fx.round_samples.default
ARRANGE = torch.ops.srigl_fx.arrange_samples.default
POOL = torch.ops.srigl_fx.pool_samples.default
PAD = torch.ops.srigl_fx.pad_samples.default
AFFINE = torch.ops.srigl_fx.affine_samples.default
CONCAT = torch.ops.srigl_fx.concat_samples.default
"""The operators as graphs call them."""
