"""The condensed operators' formulas in torch's own dense operators.

Owns the activations by torch, with the check that their rows name operators of torch, the dense weight and its
convolution: what runs where no kernel does, and what is differentiated. It must not know kernels or gradients.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from srigl_fx.errors import SriglError
from srigl_fx.runtime.activations import ACTIVATIONS, Activation


def function_of(row: Activation) -> Callable[[Tensor], Tensor]:
    """The function of torch that a row stands for.

    Raises:
        SriglError: The row names no ATen operator of one tensor, or its ``settings`` are not all of the operator's
            other arguments.

    Example:
        >>> function_of(ACTIVATIONS[1])(torch.tensor([-1.0, 2.0]))
        tensor([0., 2.])
    """
    if not row.aten:
        return lambda y: y
    operator: Any = getattr(getattr(torch.ops.aten, row.aten, None), "default", None)
    taken = [argument.name for argument in operator._schema.arguments] if operator is not None else []
    if taken[:1] != ["self"]:
        raise SriglError(
            f"the activation {row.name!r}: {row.aten!r} is no ATen operator of one tensor. What torch computes by "
            "several operators cannot be an activation: a graph has those in its place"
        )
    # An argument that is left out would be fused at any value that a graph gives it.
    if open_ := [name for name in taken[1:] if name not in row.settings]:
        raise SriglError(f"the activation {row.name!r}: its settings must say {', '.join(open_)} of aten.{row.aten}")
    if unknown := [name for name in row.settings if name not in taken[1:]]:
        raise SriglError(f"the activation {row.name!r}: aten.{row.aten} takes {taken}, not {', '.join(unknown)}")
    return functools.partial(operator, **row.settings)


FUNCTIONS = {row.name: function_of(row) for row in ACTIVATIONS}


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
    output_padding: Sequence[int] | None,
) -> Tensor:
    """The same convolution by torch, with the dense (n, F) matrix view of the weight."""
    shaped = dense_weight(weight, weight_shape, groups, transposed)
    extra = list(output_padding or ()) or [0] * len(stride)
    y: Tensor = torch.ops.aten.convolution(x, shaped, bias, stride, padding, dilation, transposed, extra, groups)
    return y


def expand(values: Tensor, indices: Tensor, active: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """The dense (rows, columns) weight, and the flat positions (n_active, k) of the entries in it."""
    indices, active = of_each_row(indices, active)
    positions = active[:, None] * columns + indices
    kept = values.masked_fill(is_padding(positions), 0)
    flat = values.new_zeros(rows * columns).scatter_add(0, positions.reshape(-1), kept.reshape(-1))
    return flat.reshape(rows, columns), positions


def of_each_row(indices: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """Indices (n_active, k) and active rows (n_active,) in int64, whether rows share their indices or not."""
    indices, active = indices.to(torch.int64), active.to(torch.int64)
    return (indices, active) if active.dim() == 1 else (indices.index_select(0, active[1]), active[0])


def is_padding(positions: Tensor) -> Tensor:
    """Which entries pad their row, as they repeat the position before them: bool (n_active, k)."""
    repeated = torch.zeros(positions.shape, dtype=torch.bool, device=positions.device)
    repeated[:, 1:] = positions[:, 1:] == positions[:, :-1]
    return repeated
