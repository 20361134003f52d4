"""Where the kept weights of a layer may lie, and the first mask that does so.

Owns the two mask structures: constant fan-in (every active neuron keeps the same number of weights) and unstructured.
Works on (n, F) matrices; it must not know modules, layouts or how masks change during training.
"""

from typing import Literal

import torch
from torch import Tensor

from srigl_fx.errors import StructureError
from srigl_fx.masks.records import Structure

MaskInit = Literal["magnitude", "random", "dense"]


def initial_mask(
    weight: Tensor, *, structure: Structure, budget: int, init: MaskInit, generator: torch.Generator
) -> Tensor:
    """Draw the first mask of a layer.

    Args:
        weight: Matrix view (n, F) of the weight: n neurons with F inputs each.
        structure: "constant_fan_in" keeps exactly ``budget // n`` weights in every row; "unstructured" keeps exactly
            ``budget`` weights anywhere.
        budget: Number of weights the layer may keep.
        init: "magnitude" keeps the largest absolute values (ties to the lowest index), "random" a uniform draw;
            "dense" keeps everything, for gradual pruning down to the budget.
        generator: Source of the random draw; else unused.

    Returns:
        Bool mask (n, F) on the weight's device.

    Raises:
        StructureError: The weight is not a matrix, or the budget leaves a row (a layer) without any weight.

    Source: SRigL (Lasby et al., ICLR 2024), section 3.

    Example:
        >>> weight = torch.tensor([[0.1, -3.0, 2.0], [1.0, 1.0, 1.0]])
        >>> draw = torch.Generator().manual_seed(0)
        >>> initial_mask(weight, structure="constant_fan_in", budget=4, init="magnitude", generator=draw).int().tolist()
        [[0, 1, 1], [1, 1, 0]]
    """
    if weight.ndim != 2 or weight.numel() == 0:
        raise StructureError(f"a mask is drawn on a matrix (neurons, fan-in), not on shape {tuple(weight.shape)}")
    if structure not in ("constant_fan_in", "unstructured"):
        raise StructureError(f'the structure is {structure!r}; choose "constant_fan_in" or "unstructured"')
    rows, fan_in = weight.shape
    scores = weight.detach().abs() if structure == "constant_fan_in" else weight.detach().abs().reshape(1, -1)
    kept = min(scores.shape[1], budget // scores.shape[0])
    if kept < 1:
        raise StructureError(
            f"a budget of {budget} weights gives {rows} neurons of {fan_in} inputs a fan-in of 0: "
            "reduce the sparsity, widen the layer, or keep it dense"
        )
    if init == "random":
        # Drawn where the generator lives, so that the mask does not depend on the weight's device.
        scores = torch.rand(scores.shape, generator=generator, dtype=torch.float64, device=generator.device)
    elif init == "dense":
        return torch.ones(rows, fan_in, dtype=torch.bool, device=weight.device)
    elif init != "magnitude":
        raise StructureError(f'the mask initialisation is {init!r}; choose "magnitude", "random" or "dense"')
    chosen = scores.sort(dim=1, descending=True, stable=True).indices[:, :kept].to(weight.device)
    mask = torch.zeros(chosen.shape[0], weight.numel() // chosen.shape[0], dtype=torch.bool, device=weight.device)
    return mask.scatter_(1, chosen, True).reshape(rows, fan_in)
