"""The order in which a masked layer reads its inputs: where it is kept, and what it must be.

Owns the names of the two tensors that a layer may have beside its weight, while the order is learned
(:data:`MATRIX`) and once it is decided (:data:`ORDER`), and their check. It must not know how an order is learned, nor
how the layer applies it.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from srigl_fx.masks.records import records_on

MATRIX = "weight_permutation"
"""Parameter, (d, d) of the weight's dtype: row j says from which inputs the layer's j-th is made."""
ORDER = "weight_order"
"""Buffer, (d,) int64: the layer's j-th input is input ``order[j]``."""


def matrix_of(module: nn.Module) -> nn.Parameter | None:
    """The matrix of a layer whose order is being learned, else None.

    Example:
        >>> matrix_of(nn.Linear(3, 2))
    """
    found = getattr(module, MATRIX, None) if records_on(module) else None
    return found if isinstance(found, nn.Parameter) else None


def order_of(module: nn.Module) -> Tensor | None:
    """The order of a layer for which it is decided, else None.

    Example:
        >>> order_of(nn.Linear(3, 2))
    """
    found = getattr(module, ORDER, None) if records_on(module) else None
    return found if isinstance(found, Tensor) else None


def soft_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of ``model`` whose orders are still being learned, by name.

    Example:
        >>> soft_layers(nn.Linear(3, 2))
        {}
    """
    return {name: module for name, module in model.named_modules() if matrix_of(module) is not None}


def ordered_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of ``model`` whose orders are decided, by name.

    Example:
        >>> ordered_layers(nn.Linear(3, 2))
        {}
    """
    return {name: module for name, module in model.named_modules() if order_of(module) is not None}


def order_problem(order: object, inputs: int) -> str:
    """Why ``order`` is no order of so many inputs; "" where it is one.

    Example:
        >>> order_problem(torch.tensor([2, 0, 1]), 3), order_problem(torch.tensor([0, 0, 1]), 3)
        ('', 'it must name each of 3 inputs once')
    """
    if not isinstance(order, Tensor) or order.dtype != torch.int64 or tuple(order.shape) != (inputs,):
        found = f"{order.dtype} {tuple(order.shape)}" if isinstance(order, Tensor) else type(order).__name__
        return f"it must be torch.int64 ({inputs},), not {found}"
    same = torch.equal(order.sort().values, torch.arange(inputs, device=order.device))
    return "" if same else f"it must name each of {inputs} inputs once"


@torch.no_grad()
def faults(model: nn.Module) -> Iterator[str]:
    """What is wrong with the orders of a model's layers, learned or decided.

    Example:
        >>> list(faults(nn.Linear(3, 2)))
        []
    """
    for name, module in model.named_modules():
        where = f"{name}." if name else ""
        if (order := order_of(module)) is not None:
            weight = module.get_parameter("weight")
            if problem := order_problem(order, weight.shape[1]):
                yield f"{where}{ORDER}: {problem}; something else wrote to it: load the model's state again"
        if (matrix := matrix_of(module)) is not None and not bool((matrix.isfinite() & (matrix >= 0)).all()):
            yield (
                f"{where}{MATRIX}: it must be finite and nowhere negative; gradients that were not finite, or "
                "an optimizer whose steps nobody follows, wrote to it: resume from an earlier checkpoint"
            )


def entries(state_dict: Mapping[str, Any]) -> list[str]:
    """The names in a state_dict of what belongs to orders.

    Example:
        >>> entries({"0.weight": 1, "0.weight_mask": 2, "0.weight_order": 3})
        ['0.weight_order']
    """
    return [
        name
        for name in state_dict
        for kind in (MATRIX, ORDER)
        if name.rpartition(".")[2] == kind and f"{name.removesuffix(kind)}weight_mask" in state_dict
    ]
