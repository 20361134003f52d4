"""The mask updates themselves: which weights are dropped, which grow, which neurons are ablated.

Owns the update rules as pure functions on (n, F) matrices: n neurons with F inputs each. It must not know modules,
optimizers, schedules or other processes. Ties between scores go to the lowest flat index, so that every device and
every process finds the same mask.

Rows that share their inputs (``groups``) are dropped and grown for as one: each rule works on the (m, F) matrices of
the groups, whose scores are pooled (:func:`srigl_fx.train.selection.pooled`), and every row of a group that is not
ablated gets the group's new mask. Rows by themselves, the default, are groups of one, ranked by their own scores. Of
blocks, several inputs are one as well, and the matrices are (m, F / width).
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from srigl_fx.errors import StructureError
from srigl_fx.masks.records import Structure
from srigl_fx.masks.row_groups import RowGroups
from srigl_fx.masks.structures import check_tiles
from srigl_fx.train.selection import Scores, counts_of_rows, pooled, top, top_of_rows

AblationMode = Literal["fraction", "absolute"]


@torch.no_grad()
def srigl_update(
    weight: Tensor,
    grad: Tensor,
    mask: Tensor,
    *,
    budget: int,
    drop_fraction: float,
    ablation: float | None = None,
    ablation_mode: AblationMode = "fraction",
    min_neurons: int | None = None,
    frozen_rows: Tensor | None = None,
    groups: RowGroups | None = None,
) -> Tensor:
    """One SRigL update: drop the smallest weights of the layer, ablate weak neurons, grow to a constant fan-in.

    A weight is salient if it survives the drop or is among the largest gradients; a neuron with fewer salient weights
    than the threshold is ablated, and the others share its weights: each gets a fan-in of ``budget // active``. A
    neuron that was ablated before may come back. A layer whose budget is its size is returned as it is.

    With groups of rows p that share their inputs, in this order:

    1. Ablation is each neuron's own. Whether a weight is salient is found on the (n, F) matrices as without groups, as
       is which neurons A stay active; ``k = budget // |A|``.
    2. Of the e inputs that the groups kept, those with the largest mean |w| in the layer stay, ``e - int(e *
       drop_fraction)`` of them and none that is exactly zero. The mean is over the rows of p in A that had weights. A
       group holds k of them at most, its largest.
    3. Each group with rows in A grows to k inputs, where the mean |g| over these rows is largest.
    4. The rows in A keep the inputs of their group, those of a neuron that came back, too; all others keep none.

    Args:
        weight: Values (n, F), zero off the mask.
        grad: Dense gradient (n, F), also off the mask; values that are not finite count as 0.
        mask: Bool mask (n, F).
        budget: Number of weights the layer may keep, at least n; ``k0 = budget // n`` is the first fan-in.
        drop_fraction: Share of the active weights to replace, in [0, 1].
        ablation: Salient weights a neuron needs: a fraction of ``k0`` (the paper's gamma_sal) or, with
            ``ablation_mode="absolute"``, a whole number. None or 0 ablates nothing.
        ablation_mode: How ``ablation`` is read.
        min_neurons: Neurons that survive in any case; as many as hold the budget, and one more if it is a multiple of
            the fan-in, always do.
        frozen_rows: Bool (n,), True where a neuron stays ablated for good.
        groups: Which rows share their inputs; by default none do.

    Returns:
        The new bool mask (n, F); every active row has the same number of entries.

    Raises:
        StructureError: Shapes, dtypes or numbers do not fit.

    Source: SRigL (Lasby et al., ICLR 2024), section 3; without ablation, RigL (Evci et al., 2020) ranked per neuron.

    Example:
        >>> weight = torch.tensor([[0.9, -0.8, 0.0, 0.0], [0.1, 0.0, -0.7, 0.0], [0.0, 0.3, 0.0, 0.2]])
        >>> grad = torch.tensor([[0.5, -0.1, 0.2, 0.3], [0.05, -0.9, 0.15, 0.7], [0.6, 0.25, -0.35, 0.01]])
        >>> srigl_update(weight, grad, weight != 0, budget=6, drop_fraction=0.4).int().tolist()
        [[1, 1, 0, 0], [0, 1, 1, 0], [1, 1, 0, 0]]
    """
    groups = _check(weight, mask, drop_fraction, grad, groups=groups)
    rows, fan_in = mask.shape
    check_tiles(groups, "constant_fan_in", fan_in)
    if budget < rows:
        raise StructureError(f"a budget of {budget} weights gives {rows} neurons a fan-in of 0: reduce the sparsity")
    if budget >= rows * fan_in:
        return mask.clone()
    frozen = torch.zeros(rows, dtype=torch.bool, device=mask.device) if frozen_rows is None else frozen_rows
    active = ~frozen
    sizes, shared = pooled(weight, groups, mask, finite=False), groups.any(mask)
    # A weight that is exactly zero has nothing to keep: it competes by its gradient, like an inactive one.
    keep = top(_magnitudes(sizes, shared), _kept_count(shared, drop_fraction), least=1)
    kept = _count(keep)
    if threshold := _ablation_threshold(ablation, ablation_mode, budget // rows):
        own = keep if groups.single else top(_magnitudes(weight, mask), _kept_count(mask, drop_fraction), least=1)
        slopes = Scores(grad, active[:, None].expand_as(mask) if frozen.any() else None)
        counts = counts_of_rows(top(slopes, _count(mask) - _count(own)).logical_or_(own)).masked_fill(frozen, -1)
        survivors = min(rows, max(budget // fan_in + 1, min_neurons or 0))
        active &= counts >= min(threshold, int(counts.sort(descending=True).values[survivors - 1]))
    new_fan_in = min(fan_in, budget // max(1, int(active.sum())))

    if not active.all():
        survived = mask & active[:, None]
        sizes = pooled(weight, groups, survived, finite=False)
        keep = top(_magnitudes(sizes, groups.any(survived)), kept, least=1)
    held = counts_of_rows(keep)
    if int(held.max()) > new_fan_in:
        # A neuron that came back lowers the fan-in of all: a row may hold too many, and loses its smallest.
        held.clamp_(max=new_fan_in)
        keep = top_of_rows(_magnitudes(sizes, keep), held)
    growth = Scores(pooled(grad, groups, active[:, None].expand_as(mask)), ~keep)
    missing = (new_fan_in - held) * groups.any(active[:, None])[:, 0]
    new = top_of_rows(growth, missing).logical_or_(keep)
    return new if groups.single else groups.expand(new, active)  # a row by itself that is not active has none in it


@torch.no_grad()
def rigl_update(
    weight: Tensor, grad: Tensor, mask: Tensor, *, drop_fraction: float, groups: RowGroups | None = None
) -> Tensor:
    """One RigL update: drop the smallest weights of the layer and grow as many where the gradient is largest.

    A weight that was just dropped may grow again. The number of active weights does not change.

    Rows that share their inputs change them together, and groups may differ in their fan-in. The groups of equally
    many rows, the full ones and those of a rest, are ranked among themselves: of the e inputs that such groups keep,
    the ``int(e * drop_fraction)`` with the smallest mean |w| are dropped, and as many grow among them where the mean
    |g| is largest. The number of active weights does not change therefore, whatever the sizes are. Blocks of rows and
    inputs (``groups.width`` above 1) take the place of these inputs, each with the sum over its own: the L1 norm.

    Args:
        weight: Values (n, F).
        grad: Dense gradient (n, F); values that are not finite count as 0.
        mask: Bool mask (n, F).
        drop_fraction: Share of the active weights to replace, in [0, 1].
        groups: Which rows share their inputs; by default none do.

    Returns:
        The new bool mask (n, F).

    Raises:
        StructureError: Shapes, dtypes or the fraction do not fit.

    Source: RigL (Evci et al., 2020), algorithm 1; blocks, Gressmann et al. (2021).

    Example:
        >>> weight = torch.tensor([[0.9, -0.8, 0.0, 0.0], [0.1, 0.0, -0.7, 0.0], [0.0, 0.3, 0.0, 0.2]])
        >>> grad = torch.tensor([[0.5, -0.1, 0.2, 0.3], [0.05, -0.9, 0.15, 0.7], [0.6, 0.25, -0.35, 0.01]])
        >>> rigl_update(weight, grad, weight != 0, drop_fraction=0.4).int().tolist()
        [[1, 1, 0, 0], [0, 1, 1, 1], [0, 1, 0, 0]]
    """
    groups = _check(weight, mask, drop_fraction, grad, groups=groups)
    sizes, shared = pooled(weight, groups, mask, finite=False), groups.any(mask)
    slopes = pooled(grad, groups)
    new = torch.empty_like(shared)
    for some in groups.alike():
        kept = _kept_count(shared[some], drop_fraction)
        keep = top(_magnitudes(sizes[some], shared[some]), kept)
        new[some] = top(Scores(slopes[some], ~keep), _count(shared[some]) - kept).logical_or_(keep)
    return groups.expand(new)


@torch.no_grad()
def set_update(
    weight: Tensor,
    mask: Tensor,
    *,
    drop_fraction: float,
    generator: torch.Generator,
    groups: RowGroups | None = None,
) -> Tensor:
    """One SET update: drop the smallest weights of the layer and grow as many at random.

    This is what :class:`~srigl_fx.train.set.SET` does to a layer of an unstructured model, in one call: the trainer
    takes :func:`random_scores` and :func:`drop_and_grow` one by one, so that a subclass can exchange the scores.

    Args:
        weight: Values (n, F).
        mask: Bool mask (n, F).
        drop_fraction: Share of the active weights to replace, in [0, 1].
        generator: Source of the draw; the same seed gives the same mask on every device.
        groups: Which rows share their inputs, as for :func:`rigl_update`; by default none do.

    Returns:
        The new bool mask (n, F), with as many entries as the old one.

    Raises:
        StructureError: Shapes, dtypes or the fraction do not fit.

    Source: Sparse Evolutionary Training (Mocanu et al., 2018).

    Example:
        >>> weight = torch.tensor([[0.9, -0.8, 0.0, 0.0], [0.1, 0.0, -0.7, 0.0]])
        >>> new = set_update(weight, weight != 0, drop_fraction=0.5, generator=torch.Generator().manual_seed(0))
        >>> int(new.sum()), new[0, :2].tolist()
        (4, [True, True])
    """
    scores = random_scores(mask.shape, generator).to(mask.device)
    return rigl_update(weight, scores, mask, drop_fraction=drop_fraction, groups=groups)


@torch.no_grad()
def snfs_update(
    weight: Tensor, momentum: Tensor, mask: Tensor, *, drop_fraction: float, groups: RowGroups | None = None
) -> Tensor:
    """One SNFS update: drop the smallest weights of the layer and grow as many where the momentum is largest.

    This is what :class:`~srigl_fx.train.snfs.SNFS` does to a layer of an unstructured model, through
    :func:`drop_and_grow`, which knows the constant fan-in as well.

    Args:
        weight: Values (n, F).
        momentum: Decaying sum of the dense gradients (n, F); values that are not finite count as 0.
        mask: Bool mask (n, F).
        drop_fraction: Share of the active weights to replace, in [0, 1].
        groups: Which rows share their inputs, as for :func:`rigl_update`; by default none do.

    Returns:
        The new bool mask (n, F), with as many entries as the old one.

    Raises:
        StructureError: Shapes, dtypes or the fraction do not fit.

    Source: Sparse Networks from Scratch (Dettmers & Zettlemoyer, 2019), growth within a layer.

    Example:
        >>> weight = torch.tensor([[0.9, -0.8, 0.0, 0.0], [0.1, 0.0, -0.7, 0.0]])
        >>> momentum = torch.tensor([[0.0, 0.0, 0.2, 0.3], [0.0, -0.9, 0.0, 0.7]])
        >>> snfs_update(weight, momentum, weight != 0, drop_fraction=0.5).int().tolist()
        [[1, 1, 0, 0], [0, 1, 0, 1]]
    """
    return rigl_update(weight, momentum, mask, drop_fraction=drop_fraction, groups=groups)


@torch.no_grad()
def gmp_update(
    weight: Tensor,
    mask: Tensor,
    *,
    count: int,
    structure: Structure = "unstructured",
    groups: RowGroups | None = None,
) -> Tensor:
    """One step of gradual magnitude pruning: keep the ``count`` largest active weights; nothing grows.

    Rows that share their inputs lose them together, those with the smallest mean |w| first. Unstructured, the groups of
    equally many rows are ranked among themselves, and keep as many inputs as :meth:`RowGroups.shares
    <srigl_fx.masks.row_groups.RowGroups.shares>` gives them of ``count``.

    Args:
        weight: Values (n, F).
        mask: Bool mask (n, F); weights off it are not kept, whatever their value.
        count: Number of weights to keep, at least n with constant fan-in.
        structure: "unstructured" ranks the layer, and so does "block"; "constant_fan_in" keeps ``count // n`` weights
            of every row.
        groups: Which rows share their inputs; by default none do.

    Returns:
        The new bool mask (n, F), part of the old one.

    Raises:
        StructureError: Shapes or dtypes do not fit, or the count leaves a row without any weight.

    Source: To Prune, or Not to Prune (Zhu & Gupta, 2017).

    Example:
        >>> weight = torch.tensor([[0.9, -0.8, 0.3], [0.1, 0.2, -0.7]])
        >>> everything = torch.ones(2, 3, dtype=torch.bool)
        >>> gmp_update(weight, everything, count=3).int().tolist()
        [[1, 1, 0], [0, 0, 1]]
        >>> gmp_update(weight, everything, count=3, structure="constant_fan_in").int().tolist()
        [[1, 0, 0], [0, 0, 1]]
    """
    groups = _check(weight, mask, 0.0, groups=groups)
    rows = len(mask)
    check_tiles(groups, structure, mask.shape[1])
    sizes, shared = pooled(weight, groups, mask, finite=False), groups.any(mask)
    if structure == "constant_fan_in":
        if count < rows:
            raise StructureError(f"{count} weights give {rows} neurons a fan-in of 0: reduce the sparsity")
        return groups.expand(top_of_rows(_magnitudes(sizes, shared), counts_of_rows(shared).clamp(max=count // rows)))
    new = torch.empty_like(shared)
    for some, inputs in groups.shares(count):
        new[some] = top(_magnitudes(sizes[some], shared[some]), inputs)
    return groups.expand(new)


@torch.no_grad()
def drop_and_grow(
    weight: Tensor,
    growth: Tensor,
    mask: Tensor,
    *,
    budget: int,
    drop_fraction: float,
    structure: Structure,
    groups: RowGroups | None = None,
) -> Tensor:
    """Drop the smallest weights of the layer and grow where ``|growth|`` is largest: the frame of RigL, SET and SNFS.

    Args:
        weight: Values (n, F).
        growth: Scores (n, F), also off the mask; only their magnitude counts, and none where it is not finite.
        mask: Bool mask (n, F).
        budget: Number of weights the layer may keep.
        drop_fraction: Share of the active weights to replace, in [0, 1].
        structure: "unstructured" grows anywhere in the layer and keeps the number of weights as it is, and so does
            "block", tile by tile; "constant_fan_in" grows within each row, up to ``budget // n``.
        groups: Which rows share their inputs, and so drop and grow together: unstructured as in :func:`rigl_update`,
            with a constant fan-in as in :func:`srigl_update`; by default none do.

    Returns:
        The new bool mask (n, F).

    Raises:
        StructureError: Shapes, dtypes or numbers do not fit.

    Source: RigL (Evci et al., 2020), algorithm 1; per row, SRigL (Lasby et al., ICLR 2024), section 3.

    Example:
        >>> weight = torch.tensor([[0.9, -0.8, 0.0, 0.0], [0.1, 0.0, -0.7, 0.0], [0.0, 0.3, 0.0, 0.2]])
        >>> growth = torch.tensor([[0.5, -0.1, 0.2, 0.3], [0.05, -0.9, 0.15, 0.7], [0.6, 0.25, -0.35, 0.01]])
        >>> for structure in ("unstructured", "constant_fan_in"):
        ...     drop_and_grow(
        ...         weight, growth, weight != 0, budget=6, drop_fraction=0.4, structure=structure
        ...     ).int().tolist()
        [[1, 1, 0, 0], [0, 1, 1, 1], [0, 1, 0, 0]]
        [[1, 1, 0, 0], [0, 1, 1, 0], [1, 1, 0, 0]]
    """
    if structure != "constant_fan_in":
        return rigl_update(weight, growth, mask, drop_fraction=drop_fraction, groups=groups)
    return srigl_update(weight, growth, mask, budget=budget, drop_fraction=drop_fraction, groups=groups)


def random_scores(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Uniform scores in [0, 1), float64, on the generator's device: SET's growth.

    Example:
        >>> random_scores((2, 3), torch.Generator().manual_seed(0)).shape
        torch.Size([2, 3])
    """
    return torch.rand(tuple(shape), generator=generator, dtype=torch.float64, device=generator.device)


def _check(
    weight: Tensor,
    mask: Tensor,
    drop_fraction: float,
    grad: Tensor | None = None,
    *,
    groups: RowGroups | None,
) -> RowGroups:
    """Require arguments that fit one another; the groups, by default each row by itself."""
    shapes = {tuple(tensor.shape) for tensor in (weight, mask, grad) if tensor is not None}
    if len(shapes) != 1 or mask.ndim != 2:
        raise StructureError(f"weight, gradient and mask must be matrices of one shape, not of {sorted(shapes)}")
    if mask.dtype != torch.bool:
        raise StructureError(f"the mask must be a bool tensor, not {mask.dtype}")
    if not 0.0 <= drop_fraction <= 1.0:
        raise StructureError(f"the drop fraction is {drop_fraction}, but must lie in [0, 1]")
    groups = RowGroups(rows=len(mask)) if groups is None else groups
    if groups.rows != len(mask):
        raise StructureError(f"the groups are of {groups.rows} rows, but the mask has {len(mask)}")
    if fault := groups.fault(mask):
        raise StructureError(f"the mask's {fault}")
    return groups


def _magnitudes(weight: Tensor, mask: Tensor) -> Scores:
    """|w| of active weights; infinite ones, unlike gradients, are the largest."""
    return Scores(weight, mask, finite=False)


def _count(mask: Tensor) -> int:
    return int(mask.count_nonzero())


def _kept_count(mask: Tensor, drop_fraction: float) -> int:
    active = _count(mask)
    return active - int(active * drop_fraction)


def _ablation_threshold(ablation: float | None, mode: AblationMode, first_fan_in: int) -> int:
    """The number of salient weights below which a neuron is ablated; 0 where ablation is off."""
    if ablation is None or ablation == 0:
        return 0
    if not (math.isfinite(ablation) and ablation > 0):
        raise StructureError(f"the ablation threshold is {ablation}, but must be a finite number, at least 0")
    if mode == "fraction":
        return max(1, math.floor(ablation * first_fan_in + 1e-9))
    if mode == "absolute" and ablation == int(ablation):
        return int(ablation)
    raise StructureError(f'ablation {ablation} with mode {mode!r}: use a fraction, or "absolute" with a whole number')
