"""The condensed operators of torch: ``torch.ops.srigl_fx.condensed_linear`` and ``condensed_conv2d``.

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
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from srigl_fx.errors import FormatError
from srigl_fx.runtime.format import range_problem
from srigl_fx.runtime.jit import IndexName, entry
from srigl_fx.runtime.kernels import conv
from srigl_fx.runtime.kernels.linear import TILE, TILED_FROM_BATCH

_INDEX_NAMES: dict[torch.dtype, IndexName] = {torch.uint16: "uint16", torch.int32: "int32"}
_WEIGHT = "Tensor values, Tensor indices, Tensor active, Tensor bias"

_library: Any = torch.library.Library("srigl_fx", "DEF")  # type: ignore[no-untyped-call]
_library.define(
    f"condensed_linear(Tensor x, {_WEIGHT}, int in_features) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)
_library.define(
    f"condensed_conv2d(Tensor x, {_WEIGHT}, int[] weight_shape, int[] stride, int[] padding, int[] dilation, "
    "int groups) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


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
        values.dtype is not torch.float32
        or bias.dtype is not torch.float32
        or active.dtype is not torch.int32
        or indices.dtype not in _INDEX_NAMES
    ):
        raise FormatError(
            f"{op}: values and bias must be float32, indices uint16 or int32, active int32; got {values.dtype}, "
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


def _condensed_linear(
    x: Tensor, values: Tensor, indices: Tensor, active: Tensor, bias: Tensor, in_features: int
) -> Tensor:
    op = "condensed_linear"
    _check_input(op, x)
    shape = x.shape
    if not shape or shape[-1] != in_features:
        raise FormatError(f"{op}: x must be (..., {in_features}), not {tuple(shape)}")
    n_active, k = _check_weight(op, values, indices, active, bias, in_features)
    n = bias.shape[0]
    y = x.new_empty((*shape[:-1], n))
    if not y.numel():
        return y
    batch = y.numel() // n
    operands = _contiguous(x, values, indices, active, bias)
    addresses = [operand.data_ptr() for operand in operands]
    name = _INDEX_NAMES[indices.dtype]
    if batch < TILED_FROM_BATCH:
        entry("linear", name)(*addresses, y.data_ptr(), batch, in_features, n, n_active, k)
    else:
        scratch = x.new_empty((in_features + 1) * TILE)
        entry("linear_tiled", name)(*addresses, y.data_ptr(), scratch.data_ptr(), batch, in_features, n, n_active, k)
    return y


def _conv_shape(
    op: str,
    x: Tensor,
    bias: Tensor,
    weight_shape: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> tuple[int, ...]:
    """Validate the geometry; return the output's shape. Sizes may be symbolic."""
    if len(weight_shape) != 4 or min(weight_shape) < 1 or x.dim() != 4:
        raise FormatError(
            f"{op}: x must be (N, C, H, W) and weight_shape (n, C / groups, kH, kW), not {tuple(x.shape)} and "
            f"{tuple(weight_shape)}"
        )
    if any(len(pair) != 2 for pair in (stride, padding, dilation)):
        raise FormatError(
            f"{op}: stride, padding and dilation must be two numbers, not {stride}, {padding}, {dilation}"
        )
    if min(*stride, *dilation, groups) < 1 or min(padding) < 0:
        raise FormatError(f"{op}: stride, dilation and groups must be at least 1 and padding at least 0")
    n, group_channels, kernel_h, kernel_w = weight_shape
    if n % groups or bias.shape[0] != n or x.shape[1] != group_channels * groups:
        raise FormatError(
            f"{op}: x has {x.shape[1]} channels and bias {tuple(bias.shape)}; a weight of shape {tuple(weight_shape)} "
            f"in {groups} groups needs {group_channels * groups} and ({n},)"
        )
    out = [
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel - 1) - 1) // stride[i] + 1
        for i, kernel in enumerate((kernel_h, kernel_w))
    ]
    if out[0] < 1 or out[1] < 1:
        raise FormatError(f"{op}: the kernel {kernel_h} x {kernel_w} is larger than the padded input {tuple(x.shape)}")
    return (x.shape[0], n, *out)


def _condensed_conv2d(
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
) -> Tensor:
    op = "condensed_conv2d"
    _check_input(op, x)
    shape = _conv_shape(op, x, bias, weight_shape, stride, padding, dilation, groups)
    _, group_channels, kernel_h, kernel_w = weight_shape
    n_active, k = _check_weight(op, values, indices, active, bias, group_channels * kernel_h * kernel_w)
    y = x.new_empty(shape)
    if not y.numel():
        return y
    operands = _contiguous(x, values, indices, active, bias)
    addresses = [operand.data_ptr() for operand in operands]
    batch, n, out_h, out_w = shape
    _, channels, in_h, in_w = x.shape
    # In the order of the kernel's positions; the leading spatial dimension is a plane of one.
    sizes = (channels, n, groups, 1, in_h, in_w, 1, out_h, out_w, 1, kernel_h, kernel_w)
    geometry, packed_size = _geometry((*sizes, 1, *stride, 0, *padding, 1, *dilation, k))
    in_features = group_channels * kernel_h * kernel_w
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
        batch,
        n_active,
    )
    return y


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
_library.impl("condensed_conv2d", _condensed_conv2d, "CPU")


def _fake_linear(x: Tensor, values: Tensor, indices: Tensor, active: Tensor, bias: Tensor, in_features: int) -> Tensor:
    _check_input("condensed_linear", x)
    if not x.dim() or x.shape[-1] != in_features:
        raise FormatError(f"condensed_linear: x must be (..., {in_features}), not {tuple(x.shape)}")
    return x.new_empty((*x.shape[:-1], bias.shape[0]))


def _fake_conv2d(
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
) -> Tensor:
    _check_input("condensed_conv2d", x)
    return x.new_empty(_conv_shape("condensed_conv2d", x, bias, weight_shape, stride, padding, dilation, groups))


def _expand(values: Tensor, indices: Tensor, active: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """The dense (rows, columns) weight, and the flat positions of the kept weights in it."""
    positions = active.to(torch.int64)[:, None] * columns + indices.to(torch.int64)
    flat = values.new_zeros(rows * columns).scatter(0, positions.reshape(-1), values.reshape(-1))
    return flat.reshape(rows, columns), positions


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, indices, active, bias, *ctx.geometry = inputs
    ctx.rows = bias.shape[0]
    ctx.save_for_backward(x, values, indices, active)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, values, indices, active = ctx.saved_tensors
    (in_features,) = ctx.geometry
    grad_x = grad_values = grad_bias = None
    weight, positions = _expand(values, indices, active, ctx.rows, in_features)
    rows = grad.reshape(-1, ctx.rows)
    if ctx.needs_input_grad[0]:
        grad_x = (rows @ weight).reshape(x.shape)
    if ctx.needs_input_grad[1]:
        grad_values = (rows.t() @ x.reshape(-1, in_features)).reshape(-1)[positions]
    if ctx.needs_input_grad[4]:
        grad_bias = rows.sum(0)
    return grad_x, grad_values, None, None, grad_bias, None


def _conv_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, values, indices, active = ctx.saved_tensors
    weight_shape, stride, padding, dilation, groups = ctx.geometry
    columns = weight_shape[1] * weight_shape[2] * weight_shape[3]
    weight, positions = _expand(values, indices, active, ctx.rows, columns)
    wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[4]]
    grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad, x, weight.reshape(weight_shape), [ctx.rows], stride, padding, dilation, False, [0, 0], groups, wanted
    )
    grad_values = grad_weight.reshape(-1)[positions] if wanted[1] else None
    none_for_geometry = (None,) * 5
    return (
        grad_x if wanted[0] else None,
        grad_values,
        None,
        None,
        grad_bias if wanted[2] else None,
        *none_for_geometry,
    )


torch.library.register_fake("srigl_fx::condensed_linear", _fake_linear, lib=_library)
torch.library.register_fake("srigl_fx::condensed_conv2d", _fake_conv2d, lib=_library)
torch.library.register_autograd("srigl_fx::condensed_linear", _linear_backward, setup_context=_save, lib=_library)
torch.library.register_autograd("srigl_fx::condensed_conv2d", _conv_backward, setup_context=_save, lib=_library)
