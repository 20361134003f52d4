"""Calls of condensed operators past torch's dispatcher, for programs that make the same ones again and again.

Owns what is remembered of a layer between such calls, when it still holds, and that gradients are recorded. It must not
know graphs, nor what is computed; who calls sees to it that nothing has to observe the operator: no tracing, no modes.
"""

import math
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from srigl_fx.runtime.cpu.execute import Prepared, prepare_linear
from srigl_fx.runtime.cpu.execute_conv import prepare_convolution
from srigl_fx.runtime.cpu.prepared_weights import can_train
from srigl_fx.runtime.gradients import conv_backward, linear_backward, save
from srigl_fx.runtime.ops import LINEAR
from srigl_fx.runtime.validation import check_weight

_Weight = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]  # values, indices, active, bias, scales
_LEADING = 5  # arguments of both operators: x and the weight
_MOST = 64  # shapes of samples that are remembered of a layer
TENSORS = ("x", "values", "indices", "active", "bias", "residual", "scales")
"""The operands of both operators that are tensors; the others are settings."""


class DirectCall:
    """An operator with its settings, which is called with tensors.

    The first call with samples of a shape goes through torch, which checks everything, and the others to the kernels,
    as long as neither the weight nor how samples lie has changed.

    Args:
        operator: ``torch.ops.srigl_fx.condensed_linear.default`` or ``condensed_conv.default``.
        settings: Its arguments but those in ``TENSORS``, by name; what is missing has its default.

    Example:
        >>> import numpy as np
        >>> from srigl_fx.runtime.format import CondensedWeight
        >>> dense = np.array([[0, 2.0], [3.0, 0]], np.float32)
        >>> weight = CondensedWeight.from_dense(dense, dense != 0, np.ones(2))
        >>> parts = [torch.from_numpy(part) for part in (weight.values, weight.indices, weight.active, weight.bias)]
        >>> call = DirectCall(LINEAR, {"in_features": 2})
        >>> with torch.no_grad():
        ...     [call(torch.ones(1, 2), *parts, None, None).tolist() for _ in range(2)]
        [[[3.0, 4.0]], [[3.0, 4.0]]]
    """

    def __init__(self, operator: torch._ops.OpOverload, settings: Mapping[str, Any]) -> None:
        schema = operator._schema.arguments
        defaults = {one.name: one.default_value for one in schema if one.name not in TENSORS}
        self._names = [one.name for one in schema][_LEADING:]
        self._operator, self._settings = operator, {**defaults, **settings}
        self._known: _Known | None = None

    def __call__(
        self,
        x: Tensor,
        values: Tensor,
        indices: Tensor,
        active: Tensor,
        bias: Tensor,
        residual: Tensor | None,
        scales: Tensor | None,
    ) -> Tensor:
        """What the operator gives."""
        if torch.is_grad_enabled() and (
            x.requires_grad
            or bias.requires_grad
            or values.requires_grad
            or (residual is not None and residual.requires_grad)
        ):
            # What torch makes of a registered backward looks up the default of each argument, at each call.
            record: Any = _Recorded.apply
            y: Tensor = record(x, values, indices, active, bias, residual, scales, self)
            return y
        return self.computed(x, values, indices, active, bias, residual, scales)

    def computed(
        self,
        x: Tensor,
        values: Tensor,
        indices: Tensor,
        active: Tensor,
        bias: Tensor,
        residual: Tensor | None,
        scales: Tensor | None,
    ) -> Tensor:
        """The same where no gradients are recorded."""
        known, key = self._known, _key(x)
        held = known is not None and known.is_of(values, indices, active, bias, scales)
        if known is not None and held and key in known.prepared:
            found = known.prepared[key]
            if found is not None and (residual is None or _fits(residual, found)):
                return found(x, residual)
            key = None  # it takes other steps
        operands = x, values, indices, active, bias
        y: Tensor = self._operator(*operands, residual=residual, scales=scales, **self._settings)
        if key is not None:
            self._learn(key, x, (values, indices, active, bias, scales), y, known if held else None)
        return y

    def _learn(self, key: "_Key", x: Tensor, weight: _Weight, y: Tensor, known: "_Known | None") -> None:
        """Remember how a call goes that has just succeeded."""
        if not all(part is None or _is_plain(part) for part in weight) or can_train(weight[0]):
            return
        if known is None or len(known.prepared) >= _MOST:
            known = self._known = _Known(weight)
        known.prepared[key] = self._prepare(x, weight, y)

    def _prepare(self, x: Tensor, weight: _Weight, y: Tensor) -> Prepared | None:
        """What further calls share; None where they need the operator."""
        *_, scales = weight
        parts, given, activation = weight[:4], self._settings, self._settings["activation"]
        if not all(part.is_contiguous() for part in parts) or given.get("arranged"):
            return None
        rounding = (given["x_scale"], given["x_offset"]), (given["y_scale"], given["y_offset"])
        if self._operator is LINEAR:
            inputs = given["in_features"]
            checked = check_weight("condensed_linear", *parts, inputs, scales)
            columns = given["y_feature_major"]
            return prepare_linear(checked, x, parts, inputs, activation, columns, scales, *rounding)
        shape = given["weight_shape"]
        checked = check_weight("condensed_conv", *parts, math.prod(shape[1:]), scales)
        settings = shape, given["stride"], given["padding"], given["dilation"], given["groups"], given["transposed"]
        return prepare_convolution(checked, x, parts, *settings, y.shape, activation, scales, *rounding)

    def arguments(self, residual: Tensor | None, scales: Tensor | None) -> list[Any]:
        """The arguments behind x and the weight, in the operator's order."""
        given = {**self._settings, "residual": residual, "scales": scales}
        return [given[name] for name in self._names]

    def gradients(self, ctx: Any, grad: Tensor) -> list[Tensor | None]:
        """The gradients of x, the weight and the residual, for what ``save`` has kept."""
        found = (linear_backward if self._operator is LINEAR else conv_backward)(ctx, grad)
        return [*found[:_LEADING], found[_LEADING + self._names.index("residual")]]


class _Recorded(torch.autograd.Function):
    """A call whose gradients are wanted: computed as any other, with the operator's own backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        indices: Tensor,
        active: Tensor,
        bias: Tensor,
        residual: Tensor | None,
        scales: Tensor | None,
        call: DirectCall,
    ) -> Tensor:
        y = call.computed(x, values, indices, active, bias, residual, scales)
        ctx.call = call
        save(ctx, (x, values, indices, active, bias, *call.arguments(residual, scales)), y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (*ctx.call.gradients(ctx, grad), None, None)


_Key = tuple[Any, ...]


class _Known:
    """A weight as it was when calls with it were prepared; held alive by others.

    A bias is read anew by each call, and need not be the same tensor, only one that lies as the other did.
    """

    __slots__ = ("facts", "parts", "prepared", "scales")

    def __init__(self, weight: _Weight) -> None:
        self.parts = tuple(weakref.ref(part) for part in weight[:3])
        self.scales = None if weight[4] is None else weakref.ref(weight[4])
        self.facts = _facts(*weight)
        self.prepared: dict[_Key, Prepared | None] = {}

    def is_of(self, values: Tensor, indices: Tensor, active: Tensor, bias: Tensor, scales: Tensor | None) -> bool:
        """Whether this is the weight, and nothing was written to it since; never so for values that may be trained."""
        parts = self.parts
        return (
            parts[0]() is values
            and parts[1]() is indices
            and parts[2]() is active
            and (scales is None if self.scales is None else self.scales() is scales)
            and self.facts == _facts(values, indices, active, bias, scales)
            and not bias.is_neg()
            and type(bias) in (Tensor, torch.nn.Parameter)
            and not can_train(values)
        )


def _facts(values: Tensor, indices: Tensor, active: Tensor, bias: Tensor, scales: Tensor | None) -> tuple[object, ...]:
    """What changes with the contents of a weight and with where it is, and all that is asked of a bias."""
    facts = (
        *(values._version, values.data_ptr(), values.dtype, values.numel()),
        *(indices._version, indices.data_ptr(), active._version, active.data_ptr()),
        *(bias.data_ptr(), bias.dtype, bias.numel(), bias.is_contiguous()),
    )
    return facts if scales is None else (*facts, scales._version, scales.data_ptr())


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is numbers in this machine's memory, whose changes torch counts."""
    strided = tensor.is_cpu and tensor.layout is torch.strided and not tensor.is_neg()
    return type(tensor) in (Tensor, torch.nn.Parameter) and strided and not tensor.is_inference()


def _key(x: Tensor) -> _Key | None:
    """What has to be the same for samples that a call was prepared for; None for samples of another kind."""
    if type(x) is not Tensor or not x.is_cpu or x.layout is not torch.strided or x.is_neg():
        return None
    if x.is_contiguous():
        return x.shape, x.dtype, torch.get_num_threads()
    return x.shape, x.dtype, torch.get_num_threads(), x.stride()


def _fits(residual: Tensor, found: Prepared) -> bool:
    shape = (*found.shape[1:], found.shape[0]) if found.feature_major else found.shape
    return _key(residual) is not None and residual.dtype is torch.float32 and tuple(residual.shape) == tuple(shape)
