"""The condensed operators of torch: ``torch.ops.srigl_fx.condensed_linear`` and ``condensed_conv``.

Owns validation, the choice of kernel, allocation, the fake kernels (shapes for torch.compile and torch.export) and the
gradients. It must not know graphs or models. Importing it registers the operators; the kernels are compiled at the
first call. float32 on the CPU.

Every index is checked before a kernel reads it, once for each pair of index tensors and version of their contents:
writes that torch does not see (through ``.numpy()`` or ``.data``) escape that check.
"""

import ctypes
import functools
import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from srigl_fx.errors import FormatError
from srigl_fx.runtime.format import range_problem
from srigl_fx.runtime.jit import IndexName, entry
from srigl_fx.runtime.kernels import conv
from srigl_fx.runtime.kernels.linear import TILE, TILED_FROM_BATCH

_INDEX_NAMES: dict[torch.dtype, IndexName] = {torch.uint16: "uint16", torch.int32: "int32"}
VALUE_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
_WEIGHT = "Tensor values, Tensor indices, Tensor active, Tensor bias"

_library: Any = torch.library.Library("srigl_fx", "DEF")  # type: ignore[no-untyped-call]
_library.define(
    f"condensed_linear(Tensor x, {_WEIGHT}, int in_features, Tensor? residual=None, str activation='none', "
    "bool x_feature_major=False, bool y_feature_major=False) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    f"condensed_conv(Tensor x, {_WEIGHT}, int[] weight_shape, int[] stride, int[] padding, int[] dilation, "
    "int groups, Tensor? residual=None, str activation='none', bool transposed=False, int[] output_padding=[]) "
    "-> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": torch.relu,
    "relu6": torch.nn.functional.relu6,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda y: torch.nn.functional.gelu(y, approximate="tanh"),
    "silu": torch.nn.functional.silu,
    "hardswish": torch.nn.functional.hardswish,
}


class _Checked:
    """That one pair of index tensors was found safe, for as long as neither changes; holds neither alive."""

    __slots__ = ("active", "facts", "indices")

    def __init__(self, indices: Tensor, active: Tensor, facts: tuple[object, ...]) -> None:
        key = id(indices)
        self.indices = weakref.ref(indices, lambda _: _checked.pop(key, None))
        self.active = weakref.ref(active)
        self.facts = facts


# Single dict operations only, which are atomic; a lost entry costs one more check.
_checked: dict[int, _Checked] = {}


def _check_weight(
    op: str, values: Tensor, indices: Tensor, active: Tensor, bias: Tensor, in_features: int
) -> tuple[int, int]:
    """Validate the weight operands; return (n_active, k)."""
    shape = values.shape
    if (
        values.dtype not in VALUE_DTYPES
        or bias.dtype is not torch.float32
        or active.dtype is not torch.int32
        or indices.dtype not in _INDEX_NAMES
    ):
        raise FormatError(
            f"{op}: values must be float32, bfloat16 or float16, bias float32, indices uint16 or int32, active int32; "
            f"got {values.dtype}, "
            f"{bias.dtype}, {indices.dtype}, {active.dtype}"
        )
    if len(shape) != 2 or indices.shape != shape or active.shape != shape[:1] or bias.dim() != 1:
        raise FormatError(
            f"{op}: values and indices must both be (n_active, k), active (n_active,), bias (n,); got {tuple(shape)}, "
            f"{tuple(indices.shape)}, {tuple(active.shape)}, {tuple(bias.shape)}"
        )
    if indices.is_inference() or active.is_inference():  # these count no versions
        _check_ranges(op, indices, active, in_features, bias.shape[0])
        return shape[0], shape[1]
    facts = (
        indices._version,
        active._version,
        indices.data_ptr(),
        active.data_ptr(),
        in_features,
        bias.shape[0],
        shape,
    )
    seen = _checked.get(id(indices))
    if seen is None or seen.indices() is not indices or seen.active() is not active or seen.facts != facts:
        _check_ranges(op, indices, active, in_features, bias.shape[0])
        _checked[id(indices)] = _Checked(indices, active, facts)
    return shape[0], shape[1]


def _check_ranges(op: str, indices: Tensor, active: Tensor, in_features: int, out_features: int) -> None:
    problem = range_problem(indices.detach().numpy(), active.detach().numpy(), in_features, out_features)
    if problem:
        raise FormatError(f"{op}: {problem}; rebuild the operands with CondensedWeight.from_dense(weight, mask)")


def _check_input(op: str, x: Tensor) -> None:
    if x.dtype is not torch.float32:
        raise FormatError(f"{op}: x must be float32, not {x.dtype}; call it with x.float(), outside torch.autocast")


def _finish(op: str, y: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    return ACTIVATIONS[activation](y if residual is None else y + residual)


def _check_epilogue(op: str, shape: Sequence[int], residual: Tensor | None, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise FormatError(f"{op}: activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}")
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
    shape = _linear_shape(op, x, bias, in_features)
    _check_epilogue(op, shape, residual, activation)
    n_active, k = _check_weight(op, values, indices, active, bias, in_features)
    n = bias.shape[0]
    y = x.new_empty(shape)
    if y.numel():
        batch = y.numel() // n
        operands = _contiguous(x, values.float(), indices, active, bias)
        addresses = [operand.data_ptr() for operand in operands]
        name = _INDEX_NAMES[indices.dtype]
        if batch < TILED_FROM_BATCH:
            entry("linear", name)(*addresses, y.data_ptr(), batch, in_features, n, n_active, k)
        else:
            scratch = x.new_empty((in_features + 1) * TILE)
            arguments = batch, in_features, n, n_active, k
            entry("linear_tiled", name)(*addresses, y.data_ptr(), scratch.data_ptr(), *arguments)
    y = _finish(op, y, residual, activation)
    return _feature_major(y) if y_feature_major else y


def _feature_major(y: Tensor) -> Tensor:
    """``y`` (..., n) with the samples of one feature next to each other in memory."""
    return y.movedim(-1, 0).contiguous().movedim(0, -1)


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
    output_padding: Sequence[int],
) -> tuple[int, ...]:
    """Validate the geometry; return the output's shape. Sizes may be symbolic."""
    _check_input(op, x)
    rank = len(weight_shape) - 2
    if rank not in (1, 2, 3) or min(weight_shape) < 1 or x.dim() != rank + 2:
        raise FormatError(
            f"{op}: x must be (N, C, sizes...) and weight_shape (n, C / groups, kernel...) over one to three axes, not "
            f"{tuple(x.shape)} and {tuple(weight_shape)}"
        )
    extra = list(output_padding) or [0] * rank
    if any(len(numbers) != rank for numbers in (stride, padding, dilation, extra)):
        raise FormatError(
            f"{op}: stride, padding, dilation and output_padding must be {rank} numbers, not {stride}, {padding}, "
            f"{dilation}, {extra}"
        )
    if min(*stride, *dilation, groups) < 1 or min(*padding, *extra) < 0:
        raise FormatError(f"{op}: stride, dilation and groups must be at least 1 and padding at least 0")
    if any(extra) and not transposed:
        raise FormatError(f"{op}: output_padding {extra} is for transposed convolutions only")
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
    if min(out) < 1:
        raise FormatError(f"{op}: the kernel {tuple(kernel)} does not fit the padded input {tuple(x.shape)}")
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
    output_padding: Sequence[int] = (),
) -> Tensor:
    op = "condensed_conv"
    shape = _conv_shape(op, x, bias, weight_shape, stride, padding, dilation, groups, transposed, output_padding)
    _check_epilogue(op, shape, residual, activation)
    _, group_channels, *kernel = weight_shape
    in_features = group_channels * math.prod(kernel)
    n_active, k = _check_weight(op, values, indices, active, bias, in_features)
    if transposed:
        weight, _ = _expand(values.float(), indices, active, weight_shape[0], in_features)
        y = dense_conv(x, weight, bias, weight_shape, stride, padding, dilation, groups, True, output_padding)
        return _finish(op, y, residual, activation)
    y = x.new_empty(shape)
    if y.numel():
        lead = 3 - len(kernel)
        # In the order of the kernel's positions; the leading spatial dimensions are of size one.
        one, zero = (1,) * lead, (0,) * lead
        sizes = (x.shape[1], shape[1], groups, *one, *x.shape[2:], *one, *shape[2:], *one, *kernel)
        geometry, packed_size = _geometry((*sizes, *one, *stride, *zero, *padding, *one, *dilation, k))
        operands = _contiguous(x, values.float(), indices, active, bias)
        addresses = [operand.data_ptr() for operand in operands]
        # One allocation: the accumulators, the packed sample, and the offsets, which are int64.
        scratch = x.new_empty(conv.ACCUMULATORS + packed_size + 2 * in_features)
        accumulators = scratch.data_ptr()
        packed = accumulators + 4 * conv.ACCUMULATORS
        entry("conv", _INDEX_NAMES[indices.dtype])(
            *addresses,
            y.data_ptr(),
            ctypes.addressof(geometry),
            packed + 4 * packed_size,
            packed,
            accumulators,
            shape[0],
            n_active,
        )
    return _finish(op, y, residual, activation)


@functools.lru_cache(maxsize=1024)
def _geometry(numbers: tuple[int, ...]) -> "tuple[ctypes.Array[ctypes.c_int64], int]":
    """The geometry as the kernel reads it, shared by threads and never written, and the floats of a packed sample."""
    geometry = (ctypes.c_int64 * conv.GEOMETRY_SIZE)(*numbers)
    conv.conv_plan(geometry)
    if geometry[conv.DIRECT]:
        return geometry, 0
    size = geometry[conv.CHANNELS] * math.prod(geometry[conv.PLANES_D : conv.PACKED_W + 1])
    return geometry, (size // conv.LANES + 2) * conv.LANES


def _contiguous(x: Tensor, values: Tensor, indices: Tensor, active: Tensor, bias: Tensor) -> Sequence[Tensor]:
    """The operands, copied only where they have gaps; usually none does, and this is on the path of every call."""
    operands = x, values, indices, active, bias
    if (
        x.is_contiguous()
        and values.is_contiguous()
        and indices.is_contiguous()
        and active.is_contiguous()
        and bias.is_contiguous()
    ):
        return operands
    return [operand.contiguous() for operand in operands]


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
    output_padding: Sequence[int] = (),
) -> Tensor:
    op = "condensed_conv"
    shape = _conv_shape(op, x, bias, weight_shape, stride, padding, dilation, groups, transposed, output_padding)
    _check_epilogue(op, shape, residual, activation)
    return x.new_empty(shape)


def dense_weight(weight: Tensor, weight_shape: Sequence[int], groups: int, transposed: bool) -> Tensor:
    """The (n, F) matrix view as torch's convolutions want it: transposed ones with the input channels first."""
    shaped = weight.reshape(list(weight_shape))
    if not transposed:
        return shaped
    n, channels, *kernel = weight_shape
    return shaped.reshape(groups, n // groups, channels, *kernel).transpose(1, 2).reshape(-1, n // groups, *kernel)


def dense_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    transposed: bool,
    output_padding: Sequence[int],
) -> Tensor:
    """The same convolution by torch, with the dense (n, F) matrix view of the weight."""
    shaped = dense_weight(weight, weight_shape, groups, transposed)
    extra = list(output_padding) or [0] * len(stride)
    y: Tensor = torch.ops.aten.convolution(x, shaped, bias, stride, padding, dilation, transposed, extra, groups)
    return y


def _expand(values: Tensor, indices: Tensor, active: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """The dense (rows, columns) weight, and the flat positions of the kept weights in it."""
    positions = active.to(torch.int64)[:, None] * columns + indices.to(torch.int64)
    flat = values.new_zeros(rows * columns).scatter(0, positions.reshape(-1), values.reshape(-1))
    return flat.reshape(rows, columns), positions


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, indices, active, bias, *ctx.settings = inputs
    ctx.save_for_backward(x, values, indices, active, bias)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, values, indices, active, bias = ctx.saved_tensors
    in_features, residual, activation, _, _ = ctx.settings
    dense, positions = _expand(values.float(), indices, active, bias.shape[0], in_features)
    wanted = ctx.needs_input_grad
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (x, dense, bias)]
        y = torch.nn.functional.linear(*leaves)
        grads, grad_residual = _through(y, leaves, residual, activation, grad)
    grad_values = grads[1].reshape(-1)[positions].to(values.dtype) if wanted[1] else None
    return grads[0], grad_values, None, None, grads[2], None, grad_residual, None, None, None


def _conv_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, values, indices, active, bias = ctx.saved_tensors
    weight_shape, stride, padding, dilation, groups, residual, activation, transposed, output_padding = ctx.settings
    columns = math.prod(weight_shape[1:])
    dense, positions = _expand(values.float(), indices, active, bias.shape[0], columns)
    wanted = ctx.needs_input_grad
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (x, dense, bias)]
        y = dense_conv(*leaves, weight_shape, stride, padding, dilation, groups, transposed, output_padding)
        grads, grad_residual = _through(y, leaves, residual, activation, grad)
    grad_values = grads[1].reshape(-1)[positions].to(values.dtype) if wanted[1] else None
    return grads[0], grad_values, None, None, grads[2], *(None,) * 5, grad_residual, None, None, None


def _through(
    y: Tensor, leaves: list[Tensor], residual: Tensor | None, activation: str, grad: Tensor
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Gradients of (x, weight, bias) and the residual, through the epilogue."""
    if residual is not None:
        residual = residual.detach().requires_grad_()
        y = y + residual
    y = ACTIVATIONS[activation](y)
    grads = torch.autograd.grad(y, [*leaves, *([] if residual is None else [residual])], grad)
    return grads[:3], None if residual is None else grads[3]


torch.library.register_fake("srigl_fx::condensed_linear", _fake_linear, lib=_library)
torch.library.register_fake("srigl_fx::condensed_conv", _fake_conv, lib=_library)
torch.library.register_autograd("srigl_fx::condensed_linear", _linear_backward, setup_context=_save, lib=_library)
torch.library.register_autograd("srigl_fx::condensed_conv", _conv_backward, setup_context=_save, lib=_library)
