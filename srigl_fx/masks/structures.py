"""Where the kept weights of a layer may lie, and the first mask that does so.

Owns the two mask structures: constant fan-in (every active neuron keeps the same number of weights) and unstructured.
In both, rows may share their inputs (:mod:`srigl_fx.masks.row_groups`). Works on (n, F) matrices; it must not know
modules, layouts or how masks change during training.
"""

from typing import Literal

import torch
from torch import Tensor

from srigl_fx.errors import StructureError
from srigl_fx.masks.records import Structure
from srigl_fx.masks.row_groups import RowGroups

MaskInit = Literal["magnitude", "random", "dense"]


def initial_mask(
    weight: Tensor,
    *,
    structure: Structure,
    budget: int,
    init: MaskInit,
    generator: torch.Generator,
    groups: RowGroups | None = None,
) -> Tensor:
    """Draw the first mask of a layer.

    Rows that share their inputs are drawn as one. Input j of group p has the score::

        magnitude   S[p, j] = sum of |w[i, j]| over the rows i of p
        random      S[p, j] uniform in [0, 1), one draw a group and input

    With a constant fan-in each group keeps its ``budget // n`` inputs of the highest score. Unstructured, the groups of
    equally many rows are ranked together, and keep as many inputs as :meth:`RowGroups.shares
    <srigl_fx.masks.row_groups.RowGroups.shares>` gives them.

    Args:
        weight: Matrix view (n, F) of the weight: n neurons with F inputs each.
        structure: "constant_fan_in" keeps exactly ``budget // n`` weights in every row; "unstructured" keeps exactly
            ``budget`` weights anywhere, or what :meth:`~srigl_fx.masks.row_groups.RowGroups.shares` makes of it.
        budget: Number of weights the layer may keep.
        init: "magnitude" keeps the largest absolute values (ties to the lowest index), "random" a uniform draw;
            "dense" keeps everything, for gradual pruning down to the budget.
        generator: Source of the random draw; else unused.
        groups: Which rows share their inputs; by default none do.

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
    groups = RowGroups(rows=rows) if groups is None else groups
    constant = structure == "constant_fan_in"
    everyone: list[tuple[slice | Tensor, int]] = [(slice(None), budget // rows)]
    shares = everyone if constant else groups.shares(budget)
    if sum(kept for _, kept in shares) < 1:
        raise StructureError(
            f"a budget of {budget} weights gives {rows} neurons of {fan_in} inputs a fan-in of 0: "
            "reduce the sparsity, widen the layer, or keep it dense"
        )
    if init == "dense":
        return torch.ones(rows, fan_in, dtype=torch.bool, device=weight.device)
    scores = _scores(weight.detach(), groups, init, generator)
    grouped = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    for some, kept in shares:
        found = scores[some] if constant else scores[some].reshape(1, -1)
        chosen = found.sort(dim=1, descending=True, stable=True).indices[:, :kept]
        ranked = torch.zeros(found.shape, dtype=torch.bool, device=found.device).scatter_(1, chosen, True)
        grouped[some] = ranked.reshape(-1, fan_in)
    return groups.expand(grouped.to(weight.device))


def _scores(weight: Tensor, groups: RowGroups, init: MaskInit, generator: torch.Generator) -> Tensor:
    """The scores (m, F) of the inputs of each group."""
    if init == "random":
        # Drawn where the generator lives, so that the mask does not depend on the weight's device.
        shape = (len(groups), weight.shape[1])
        return torch.rand(shape, generator=generator, dtype=torch.float64, device=generator.device)
    if init != "magnitude":
        raise StructureError(f'the mask initialisation is {init!r}; choose "magnitude", "random" or "dense"')
    return weight.abs() if groups.single else groups.sum(weight.abs())
