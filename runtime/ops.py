"""The condensed operators of torch: ``torch.ops.srigl_fx.condensed_linear`` and ``condensed_conv``.

Owns schemas, validation and the fake kernels (shapes for torch.compile and torch.export). It
must not know graphs or models. float32 on the CPU.

Importing this module registers the operators, and is what a process needs that loads a program of torch.export or a
package of AOTInductor which was made from a lowered module. It imports torch; the kernels are compiled at the first
call.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from srigl_fx.errors import FormatError
from srigl_fx.runtime import execute
from srigl_fx.runtime.activations import NAMES
from srigl_fx.runtime.dense import dense_conv as dense_conv
from srigl_fx.runtime.dense import dense_weight as dense_weight
from srigl_fx.runtime.gradients import conv_backward, linear_backward, save
from srigl_fx.runtime.weights import check_weight

_LARGEST = 1 << 31  # so that no product of sizes overflows
_WEIGHT = "Tensor values, Tensor indices, Tensor active, Tensor bias"

_library: Any = torch.library.Library("srigl_fx", "DEF")  # type: ignore[no-untyped-call]
_library.define(
    f"condensed_linear(Tensor x, {_WEIGHT}, int in_features, Tensor? residual=None, str activation='none', "
    "bool x_feature_major=False, bool y_feature_major=False) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    f"condensed_conv(Tensor x, {_WEIGHT}, int[] weight_shape, int[] stride, int[] padding, int[] dilation, "
    "int groups, Tensor? residual=None, str activation='none', bool transposed=False, int[]? output_padding=None) "
    "-> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _check_input(op: str, x: Tensor) -> None:
    if x.dtype is not torch.float32:
        raise FormatError(f"{op}: x must be float32, not {x.dtype}; call it with x.float(), outside torch.autocast")


def _check_epilogue(op: str, shape: Sequence[int], residual: Tensor | None, activation: str) -> None:
    if activation not in NAMES:
        raise FormatError(f"{op}: activation must be one of {', '.join(NAMES)}, not {activation!r}")
    if residual is not None and (residual.dtype is not torch.float32 or tuple(residual.shape) != tuple(shape)):
        raise FormatError(
            f"{op}: residual must be float32 of the output's shape {tuple(shape)}, not {residual.dtype} "
            f"{tuple(residual.shape)}"
        )


def _linear_shape(op: str, x: Tensor, bias: Tensor, in_features: int) -> tuple[int, ...]:
    """Validate the data; return the output's shape. Sizes may be symbolic."""
    _check_input(op, x)
    if not x.dim() or x.shape[-1] != in_features:
        raise FormatError(f"{op}: x must be (..., {in_features}), not {tuple(x.shape)}")
    return (*x.shape[:-1], bias.shape[0])


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
) -> Tensor:
    op = "condensed_linear"
    _refuse_forward_mode(op)
    _check_epilogue(op, _linear_shape(op, x, bias, in_features), residual, activation)
    prepared = check_weight(op, values, indices, active, bias, in_features)
    weight = _contiguous(values, indices, active, bias)
    return execute.linear(prepared, x, weight, in_features, residual, activation, y_feature_major)


def _conv_shape(
    op: str,
    x: Tensor,
    bias: Tensor,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    transposed: bool,
    output_padding: Sequence[int] | None,
) -> tuple[int, ...]:
    """Validate the geometry; return the output's shape. Sizes may be symbolic."""
    _check_input(op, x)
    rank = len(weight_shape) - 2
    if rank not in (1, 2, 3) or min(weight_shape) < 1 or x.dim() != rank + 2:
        raise FormatError(
            f"{op}: x must be (N, C, sizes...) and weight_shape (n, C / groups, kernel...) over one to three axes, not "
            f"{tuple(x.shape)} and {tuple(weight_shape)}"
        )
    extra = list(output_padding or ()) or [0] * rank
    if any(len(numbers) != rank for numbers in (stride, padding, dilation, extra)):
        raise FormatError(
            f"{op}: stride, padding, dilation and output_padding must be {rank} numbers, not {stride}, {padding}, "
            f"{dilation}, {extra}"
        )
    if min(*stride, *dilation, groups) < 1 or min(*padding, *extra) < 0:
        raise FormatError(
            f"{op}: stride, dilation and groups must be at least 1, padding and output_padding at least 0, not "
            f"{stride}, {dilation}, {groups}, {padding}, {extra}"
        )
    if max(*stride, *dilation, *padding, *extra, groups) >= _LARGEST:
        raise FormatError(f"{op}: stride, dilation, padding, output_padding and groups must be below {_LARGEST}")
    if any(extra) and not transposed:
        raise FormatError(f"{op}: output_padding {extra} is for transposed convolutions only")
    if any(more >= max(step, reach) for more, step, reach in zip(extra, stride, dilation, strict=True)):
        raise FormatError(f"{op}: output_padding {extra} must be less than stride or dilation")
    n, group_channels, *kernel = weight_shape
    if n % groups or bias.shape[0] != n or x.shape[1] != group_channels * groups:
        raise FormatError(
            f"{op}: x has {x.shape[1]} channels and bias {tuple(bias.shape)}; a weight of shape {tuple(weight_shape)} "
            f"in {groups} groups needs {group_channels * groups} and ({n},)"
        )
    out = []
    for i, taps in enumerate(kernel):
        reach = dilation[i] * (taps - 1) + 1
        if transposed:
            out.append((x.shape[2 + i] - 1) * stride[i] - 2 * padding[i] + reach + extra[i])
        else:
            out.append((x.shape[2 + i] + 2 * padding[i] - reach) // stride[i] + 1)
    if min(out) < (0 if transposed else 1):
        raise FormatError(
            f"{op}: kernel {tuple(kernel)} and padding {tuple(padding)} leave no output of {tuple(x.shape)}"
        )
    return (x.shape[0], n, *out)


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
) -> Tensor:
    op = "condensed_conv"
    _refuse_forward_mode(op)
    shape = _conv_shape(op, x, bias, weight_shape, stride, padding, dilation, groups, transposed, output_padding)
    _check_epilogue(op, shape, residual, activation)
    in_features = math.prod(weight_shape[1:])
    prepared = check_weight(op, values, indices, active, bias, in_features)
    y = x.new_empty(shape)
    if y.numel():
        residual = None if residual is None else residual.contiguous()
        operands = x.contiguous(), *_contiguous(values, indices, active, bias)
        settings = weight_shape, stride, padding, dilation, groups, transposed
        execute.convolution(prepared, operands, *settings, y, residual, activation)
    return y


def _contiguous(values: Tensor, indices: Tensor, active: Tensor, bias: Tensor) -> Sequence[Tensor]:
    """The weight, copied only where it has gaps; usually it has none, and this is on the path of every call."""
    weight = values, indices, active, bias
    if values.is_contiguous() and indices.is_contiguous() and active.is_contiguous() and bias.is_contiguous():
        return weight
    return [operand.contiguous() for operand in weight]


_library.impl("condensed_linear", _condensed_linear, "CPU")
_library.impl("condensed_conv", _condensed_conv, "CPU")


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
) -> Tensor:
    shape = _linear_shape("condensed_linear", x, bias, in_features)
    _check_epilogue("condensed_linear", shape, residual, activation)
    if not y_feature_major:
        return x.new_empty(shape)
    return x.new_empty((shape[-1], *shape[:-1])).movedim(0, -1)


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
) -> Tensor:
    op = "condensed_conv"
    shape = _conv_shape(op, x, bias, weight_shape, stride, padding, dilation, groups, transposed, output_padding)
    _check_epilogue(op, shape, residual, activation)
    return x.new_empty(shape)


torch.library.register_fake("srigl_fx::condensed_linear", _fake_linear, lib=_library)
torch.library.register_fake("srigl_fx::condensed_conv", _fake_conv, lib=_library)
torch.library.register_autograd("srigl_fx::condensed_linear", linear_backward, setup_context=save, lib=_library)
torch.library.register_autograd("srigl_fx::condensed_conv", conv_backward, setup_context=save, lib=_library)
