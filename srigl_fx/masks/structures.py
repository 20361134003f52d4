"""Where the kept weights of a layer may lie, and the first mask that does so.

Owns the mask structures: constant fan-in (every active neuron keeps the same number of weights), unstructured, and
block (unstructured, but by tiles of neighbouring rows and inputs). In all, rows may share their inputs
(:mod:`srigl_fx.masks.row_groups`). Works on (n, F) matrices; it must not know
modules, layouts or how masks change during training.
"""

from typing import Literal, get_args

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
    <srigl_fx.masks.row_groups.RowGroups.shares>` gives them. Blocks are kept in the same way: column j is that of a
    tile then, whose inputs are added up or drawn for as one.

    Args:
        weight: Matrix view (n, F) of the weight: n neurons with F inputs each.
        structure: "constant_fan_in" keeps exactly ``budget // n`` weights in every row; "unstructured" keeps exactly
            ``budget`` weights anywhere, or what :meth:`~srigl_fx.masks.row_groups.RowGroups.shares` makes of it;
            "block" is the same by tiles of rows and inputs, as ``groups`` has them.
        budget: Number of weights the layer may keep.
        init: "magnitude" keeps the largest absolute values (ties to the lowest index), "random" a uniform draw;
            "dense" keeps everything, for gradual pruning down to the budget.
        generator: Source of the random draw; else unused.
        groups: Which rows share their inputs; by default none do.

    Returns:
        Bool mask (n, F) on the weight's device.

    Raises:
        StructureError: The weight is not a matrix, the budget leaves a row (a layer) without any weight, or the inputs
            are no whole tiles.

    Source: SRigL (Lasby et al., ICLR 2024), section 3; blocks, Gressmann et al., "Towards Structured Dynamic Sparse
    Pre-Training of BERT" (2021).

    Example:
        >>> weight = torch.tensor([[0.1, -3.0, 2.0], [1.0, 1.0, 1.0]])
        >>> draw = torch.Generator().manual_seed(0)
        >>> initial_mask(weight, structure="constant_fan_in", budget=4, init="magnitude", generator=draw).int().tolist()
        [[0, 1, 1], [1, 1, 0]]
    """
    if weight.ndim != 2 or weight.numel() == 0:
        raise StructureError(f"a mask is drawn on a matrix (neurons, fan-in), not on shape {tuple(weight.shape)}")
    if structure not in get_args(Structure):
        raise StructureError(f"the structure is {structure!r}; choose one of {get_args(Structure)}")
    rows, fan_in = weight.shape
    groups = RowGroups(rows=rows) if groups is None else groups
    check_tiles(groups, structure, fan_in)
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
        grouped[some] = ranked.reshape(-1, grouped.shape[1])
    return groups.expand(grouped.to(weight.device))


def check_tiles(groups: RowGroups, structure: Structure, inputs: int) -> None:
    """Require that inputs are kept together under the structure "block" alone, and are whole tiles there.

    Raises:
        StructureError: They are not.
    """
    if groups.width > 1 and structure != "block":
        raise StructureError(
            f'{groups.width} neighbouring inputs are kept together (block_width) under the structure "block" alone, '
            f"not under {structure!r}"
        )
    if inputs % groups.width:
        raise StructureError(f"{inputs} inputs are no whole blocks of {groups.width}: block_width must divide them")


def _scores(weight: Tensor, groups: RowGroups, init: MaskInit, generator: torch.Generator) -> Tensor:
    """The scores (m, F) of the inputs of each group."""
    if init == "random":
        # Drawn where the generator lives, so that the mask does not depend on the weight's device.
        shape = (len(groups), weight.shape[1] // groups.width)
        return torch.rand(shape, generator=generator, dtype=torch.float64, device=generator.device)
    if init != "magnitude":
        raise StructureError(f'the mask initialisation is {init!r}; choose "magnitude", "random" or "dense"')
    return weight.abs() if groups.single else groups.sum(weight.abs())
