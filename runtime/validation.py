"""What a call of a condensed operator must be: dtypes, shapes, geometry, and indices within their range.

Owns these checks, for every device alike, and what is remembered of a weight that passed them. It must not know what
is computed, nor where.

Writes that torch does not count (through ``.numpy()`` or ``.data``) are not noticed.
"""

import functools
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

import torch
from torch import Tensor

from srigl_fx.errors import FormatError
from srigl_fx.runtime import value_types
from srigl_fx.runtime.activations import NAMES
from srigl_fx.runtime.cpu.kernels import plan
from srigl_fx.runtime.format import range_problem, shape_problem
from srigl_fx.runtime.quantisation import LARGEST_FAN_IN, given_problem

_LARGEST: Final = 1 << 31  # so that no product of sizes overflows
# The dtypes of values, and their numbers.
NUMBERS: Final = {getattr(torch, name): number for name, number in value_types.NUMBERS.items()}
_INDICES: Final = (torch.uint16, torch.int32)
_R = TypeVar("_R")


def on_one_device(op: str, function: Callable[..., _R]) -> Callable[..., _R]:
    """The function, which refuses operands on different devices before it runs.

    For the registrations that torch chooses where any operand is on another device than the CPU. Where all are on the
    CPU torch chooses the one of the CPU, which therefore needs no check, and is called without.
    """

    @functools.wraps(function)
    def checked(*arguments: Any, **given: Any) -> _R:
        found = {str(one.device) for one in (*arguments, *given.values()) if isinstance(one, Tensor)}
        if len(found) > 1:
            raise FormatError(
                f"{op}: operands are on different devices, {' and '.join(sorted(found))}; move the module and its "
                "inputs to one of them with .to(device)"
            )
        return function(*arguments, **given)

    return checked


def _check_input(op: str, x: Tensor, x_scale: float | None) -> None:
    if x.dtype is torch.uint8 and x_scale is not None:
        return
    if x.dtype is torch.uint8:
        raise FormatError(f"{op}: x is uint8, rounded with a scale that is not given; pass it as x_scale")
    if x.dtype is not torch.float32:
        raise FormatError(f"{op}: x must be float32, not {x.dtype}; call it with x.float(), outside torch.autocast")


def check_epilogue(op: str, shape: Sequence[int], residual: Tensor | None, activation: str) -> None:
    """Raise a FormatError unless the activation has a name and the residual is float32 of the output's shape."""
    if activation not in NAMES:
        raise FormatError(f"{op}: activation must be one of {', '.join(NAMES)}, not {activation!r}")
    if residual is not None and (residual.dtype is not torch.float32 or tuple(residual.shape) != tuple(shape)):
        raise FormatError(
            f"{op}: residual must be float32 of the output's shape {tuple(shape)}, not {residual.dtype} "
            f"{tuple(residual.shape)}"
        )


def linear_shape(op: str, x: Tensor, bias: Tensor, in_features: int, x_scale: float | None = None) -> tuple[int, ...]:
    """Validate the data; return the output's shape. Sizes may be symbolic."""
    _check_input(op, x, x_scale)
    if not x.dim() or x.shape[-1] != in_features:
        raise FormatError(f"{op}: x must be (..., {in_features}), not {tuple(x.shape)}")
    return (*x.shape[:-1], bias.shape[0])


def conv_shape(
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
    x_scale: float | None = None,
) -> tuple[int, ...]:
    """Validate the geometry; return the output's shape. Sizes may be symbolic."""
    _check_input(op, x, x_scale)
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


def check_arranged(
    op: str,
    arranged: bool,
    weight_shape: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    transposed: bool,
    scales: Tensor | None,
) -> None:
    """Raise a FormatError unless samples may lie innermost (:mod:`srigl_fx.runtime.arranged`), if they are to."""
    if not arranged:
        return
    if transposed or scales is not None or len(weight_shape) > 4:
        raise FormatError(
            f"{op}: only convolutions over one or two axes, not transposed and with values of floats, have arranged "
            "samples; set arranged=False"
        )
    channels = weight_shape[1] * groups
    if not plan.may_be_innermost(channels, weight_shape[0], weight_shape[-1], dilation[-1]):
        raise FormatError(
            f"{op}: {channels} channels, {weight_shape[0]} filters and a kernel {weight_shape[-1]} wide, dilated by "
            f"{dilation[-1]}, are too many for arranged samples; set arranged=False"
        )


def check_samples(op: str, x: Tensor) -> None:
    """Raise a FormatError unless this can be arranged."""
    if x.dtype is not torch.float32 or x.dim() < 3:
        raise FormatError(f"{op}: x must be float32 (N, C, sizes...), not {x.dtype} {tuple(x.shape)}")


def check_pooling(
    op: str,
    x: Tensor,
    window: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    mean: bool,
) -> tuple[int, ...]:
    """The shape of what is pooled, as (N, C, sizes...); raise a FormatError unless that can be."""
    check_samples(op, x)
    axes = x.dim() - 2
    given = {"window": window, "stride": stride, "padding": padding, "dilation": dilation}
    for name, numbers in given.items():
        least = 0 if name == "padding" else 1
        if axes > 2 or len(numbers) != axes or min(numbers) < least:
            raise FormatError(
                f"{op}: {name} is {tuple(numbers)}; x {tuple(x.shape)} needs {min(axes, 2)} numbers of at least {least}"
            )
    if mean and max(dilation) > 1:
        raise FormatError(f"{op}: a mean has no dilation, got {tuple(dilation)}")
    if any(2 * p > size for p, size in zip(padding, window, strict=True)):
        raise FormatError(f"{op}: padding {tuple(padding)} is more than half of the window {tuple(window)}")
    reaches = [d * (size - 1) + 1 for d, size in zip(dilation, window, strict=True)]
    along = zip(x.shape[2:], reaches, stride, padding, strict=True)
    out = [(size + 2 * p - reach) // step + 1 for size, reach, step, p in along]
    if min(out) < 1:
        raise FormatError(f"{op}: windows of {tuple(window)} leave no output of {tuple(x.shape)}")
    return (*x.shape[:2], *out)


def check_padding(op: str, x: Tensor, before: Sequence[int], after: Sequence[int]) -> tuple[int, ...]:
    """The shape of what is padded, as (N, C, sizes...); raise a FormatError unless that can be."""
    check_samples(op, x)
    axes = x.dim() - 2
    for name, numbers in (("before", before), ("after", after)):
        if axes > 2 or len(numbers) != axes or min(numbers) < 0:
            raise FormatError(
                f"{op}: {name} is {tuple(numbers)}; x {tuple(x.shape)} needs {min(axes, 2)} numbers of at least 0"
            )
    return (*x.shape[:2], *(size + b + a for size, b, a in zip(x.shape[2:], before, after, strict=True)))


def check_affine(op: str, x: Tensor, scale: Tensor, shift: Tensor) -> None:
    """Raise a FormatError unless each channel of what is arranged has a scale and a shift."""
    check_samples(op, x)
    for name, numbers in (("scale", scale), ("shift", shift)):
        if numbers.dtype is not torch.float32 or numbers.shape != x.shape[1:2]:
            raise FormatError(
                f"{op}: {name} must be float32 ({x.shape[1]},), not {numbers.dtype} {tuple(numbers.shape)}"
            )


def check_concat(op: str, x: Tensor, other: Tensor) -> tuple[int, ...]:
    """The shape of two tensors side by side along their channels; raise a FormatError unless that can be."""
    check_samples(op, x)
    check_samples(op, other)
    if (x.shape[0], *x.shape[2:]) != (other.shape[0], *other.shape[2:]):
        raise FormatError(f"{op}: x {tuple(x.shape)} and other {tuple(other.shape)} differ in more than channels")
    return (x.shape[0], x.shape[1] + other.shape[1], *x.shape[2:])


def check_given(
    op: str, scales: Tensor | None, x_scale: float | None, x_offset: int, y_scale: float | None, y_offset: int
) -> None:
    """Raise a FormatError unless the scales that are given for samples or outputs round, and this is in eight bits."""
    for name, what, scale, offset in (("x", "samples", x_scale, x_offset), ("y", "outputs", y_scale, y_offset)):
        if scale is None:
            continue
        if scales is None:
            raise FormatError(
                f"{op}: only {what} of a weight of int8 are rounded; got {'an' if name == 'x' else 'a'} {name}_scale "
                "without scales"
            )
        if problem := given_problem(scale, offset):
            raise FormatError(f"{op}: {name}_{problem}")


def check_rounding(op: str, x: Tensor, scale: float, offset: int) -> None:
    """Raise a FormatError unless this can be rounded so."""
    if x.dtype is not torch.float32:
        raise FormatError(f"{op}: x must be float32, not {x.dtype}")
    if problem := given_problem(scale, offset):
        raise FormatError(f"{op}: {problem}")


class Checked:
    """A pair of index tensors that passed, for as long as neither changes; holds neither alive.

    Attributes:
        packed: What the code of a device keeps of the weight, under keys of its own.
        lock: Held while one is packed.
    """

    __slots__ = ("active", "facts", "indices", "lock", "packed")

    def __init__(self, indices: Tensor, active: Tensor, facts: tuple[object, ...]) -> None:
        key = id(indices)
        self.indices = weakref.ref(indices, lambda _: _checked.pop(key, None))
        self.active = weakref.ref(active)
        self.facts = facts
        self.packed: dict[tuple[int | str, ...], Any] = {}
        self.lock = threading.Lock()


# Single dict operations only, which are atomic; a lost entry costs one more check.
_checked: dict[int, Checked] = {}


def check_weight(
    op: str,
    values: Tensor,
    indices: Tensor,
    active: Tensor,
    bias: Tensor,
    in_features: int,
    scales: Tensor | None = None,
) -> Checked | None:
    """Validate the weight operands: types and shapes at every call, indices once for each version of their contents.

    Returns:
        What is remembered of it; None for inference tensors, whose changes torch does not count.

    Raises:
        FormatError: An operand has another dtype or shape, or an index is out of range.
    """
    shape = values.shape
    if (
        values.dtype not in NUMBERS
        or bias.dtype is not torch.float32
        or active.dtype is not torch.int32
        or indices.dtype not in _INDICES
    ):
        raise FormatError(
            f"{op}: values must be {value_types.choice()}, bias float32, indices uint16 or int32, active int32; "
            f"got {values.dtype}, {bias.dtype}, {indices.dtype}, {active.dtype}"
        )
    if bias.dim() != 1 or shape_problem(shape, indices.shape, active.shape):
        raise FormatError(
            f"{op}: values and indices must both be (n_active, k), active (n_active,), bias (n,), or where rows share "
            "indices, fewer rows of these, and active (2, n_active) with the row of indices that each reads; got "
            f"{tuple(shape)}, {tuple(indices.shape)}, {tuple(active.shape)}, {tuple(bias.shape)}"
        )
    if (values.dtype is torch.int8) != (scales is not None):
        raise FormatError(f"{op}: values of int8, and no others, have scales; got {values.dtype} and scales {scales}")
    if scales is not None and (scales.dtype is not torch.float32 or scales.shape != shape[:1]):
        raise FormatError(
            f"{op}: scales must be float32 {tuple(shape[:1])}, one for each active row, not {scales.dtype} "
            f"{tuple(scales.shape)}"
        )
    if scales is not None and shape[1] > LARGEST_FAN_IN:
        raise FormatError(f"{op}: a fan-in of {shape[1]} is too large for sums of int32 (largest: {LARGEST_FAN_IN})")
    n = bias.shape[0]
    if indices.is_inference() or active.is_inference():
        _check_ranges(op, indices, active, in_features, n)
        return None
    addresses = indices.data_ptr(), active.data_ptr()
    facts = (indices._version, active._version, *addresses, in_features, n, shape)
    seen = _checked.get(id(indices))
    if seen is None or seen.facts != facts or seen.indices() is not indices or seen.active() is not active:
        _check_ranges(op, indices, active, in_features, n)
        seen = _checked[id(indices)] = Checked(indices, active, facts)
    return seen


def _check_ranges(op: str, indices: Tensor, active: Tensor, in_features: int, out_features: int) -> None:
    problem = range_problem(indices.detach().cpu().numpy(), active.detach().cpu().numpy(), in_features, out_features)
    if problem:
        raise FormatError(f"{op}: {problem}; rebuild the operands with CondensedWeight.from_dense(weight, mask)")
