"""What the dynamic methods share: one mask update a block of a layer, at the times that a schedule gives.

Owns :class:`DynamicTrainer`, which takes the model's masked weights apart into :class:`Layer` matrices, and the rule
that most methods follow: drop by magnitude, grow by a score of their own. A method is a subclass that gives that
score (:meth:`~DynamicTrainer.growth`) or, where it needs more, the whole mask (:meth:`~DynamicTrainer.new_mask`);
what either returns is checked here, since anybody may write one. It must not know how masks are kept between updates
(:mod:`srigl_fx.train.engine`).
"""

import logging
import zlib
from dataclasses import dataclass, replace
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from srigl_fx.errors import StructureError, TrainerError
from srigl_fx.masks.records import SparseWeight, Structure, sparse_weights
from srigl_fx.masks.row_groups import RowGroups
from srigl_fx.train.arguments import TrainerOptions
from srigl_fx.train.base import Trainer
from srigl_fx.train.selection import counts_of_rows
from srigl_fx.train.updates import drop_and_grow

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One block of a masked weight at an update, as matrices of n neurons with F inputs each.

    The matrices are for reading only: they are the model's own, not copies. An update that writes to one is an error.

    Attributes:
        handle: The weight.
        index: Which of its blocks; most weights have one.
        structure: How the mask may lie.
        budget: Number of weights the block may keep.
        step: Completed optimizer steps.
        drop_fraction: Share of the weights to replace at this step.
        weight: Values (n, F), zero off the mask.
        mask: Bool mask (n, F).
        gradient: Dense gradient (n, F), also off the mask. Of a method with ``needs_gradient = False`` there is none:
            any use is a TrainerError.
    """

    handle: SparseWeight
    index: int
    structure: Structure
    budget: int
    step: int
    drop_fraction: float
    weight: Tensor
    mask: Tensor
    gradient: Tensor

    @property
    def name(self) -> str:
        """The weight's name in the sparsified model and the block's: the same on every process and in every wrapper."""
        block = self.handle.record.site.blocks[self.index].name
        return f"{self.handle.key}:{block}" if block else self.handle.key

    @property
    def groups(self) -> RowGroups:
        """Which rows share their inputs: those that are not empty keep the same ones after every update."""
        return self.handle.record.row_groups(self.handle.record.site.blocks[self.index])

    def generator(self, seed: int) -> torch.Generator:
        """A generator on the CPU whose draws depend on ``seed``, the step and the layer's name alone."""
        return torch.Generator().manual_seed(zlib.crc32(f"{seed}:{self.step}:{self.name}".encode()))


class _Uncaptured(Tensor):
    """Stands where the dense gradient would be, if it were captured."""

    @classmethod
    def __torch_function__(cls, func: object, types: object, args: object = (), kwargs: object = None) -> Any:
        raise TrainerError(
            "layer.gradient was used, but the method's needs_gradient is False, so that no dense gradient is captured: "
            "remove needs_gradient = False from its class"
        )


_UNCAPTURED = torch.empty(0).as_subclass(_Uncaptured)


class DynamicTrainer(Trainer):
    """A method that replaces connections as it trains, at multiples of ``update_every`` until ``stop_at``.

    A subclass overrides :meth:`growth`: a score for each weight, whose magnitude decides what grows. On a constant
    fan-in model growth is ranked within each row, so that the fan-in stays constant; on an unstructured one over the
    layer. Rows that share their inputs (``sparsify(group_size=...)``) are ranked as one, by the mean of their scores'
    magnitudes. A class attribute ``needs_gradient = False`` says that the score does without the dense gradient, which
    is then not captured. What a method returns is checked at every update: a TrainerError or a StructureError names the
    method and the layer.

    Args:
        model: A sparsified model.
        optimizer: Holds its masked parameters; made before or after ``sparsify``.
        total_steps: Optimizer steps of the whole training: epochs * len(loader) // accumulation.
        **options: The arguments that all methods share: :class:`~srigl_fx.train.arguments.TrainerOptions`.

    Raises:
        TrainerError: An argument is out of range, no update would ever happen, the model has no masks or has a trainer
            already, or the optimizer does not fit; model and optimizer are left as they were.

    Source: RigL (Evci et al., 2020), algorithm 1.

    Example:
        >>> from srigl_fx import sparsify
        >>> class GrowBySign(DynamicTrainer):
        ...     def growth(self, layer: Layer) -> Tensor:
        ...         return layer.gradient.clamp(min=0)
        >>> model = sparsify(nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)), sparsity=0.75)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> trainer = GrowBySign(model, optimizer, total_steps=100, update_every=5)
        >>> for _ in range(10):
        ...     optimizer.zero_grad()
        ...     model(torch.randn(8, 32)).square().sum().backward()
        ...     optimizer.step()
        >>> trainer.last_update
        10
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, *, total_steps: int, **options: Unpack[TrainerOptions]
    ) -> None:
        """Check the arguments, then attach to model and optimizer."""
        self._check_method()
        super().__init__(model, optimizer, total_steps=total_steps, **options)

    @property
    def drop_fraction(self) -> float:
        """Share of the weights that the first updates replace."""
        return self.schedule.drop_fraction

    @drop_fraction.setter
    def drop_fraction(self, value: float) -> None:
        self.schedule = replace(self.schedule, drop_fraction=value)

    def growth(self, layer: Layer) -> Tensor:
        """Scores (n, F) of the layer's weights, of which the largest magnitudes grow: override this.

        They are a floating-point tensor on the layer's device; those that are not finite count as 0. The layer's
        tensors are for reading only.
        """
        raise NotImplementedError(f"{type(self).__name__} does not override growth()")

    def new_mask(self, layer: Layer) -> Tensor:
        """The bool mask (n, F) after this update; override it for a method that does not drop and grow.

        It keeps at least one weight and at most ``layer.budget``; with a constant fan-in each of its ``active`` rows
        that are not empty has ``min(F, layer.budget // active)``. Of the rows of one of ``layer.groups``, those that
        are not empty are equal. The layer's tensors are for reading only.
        """
        scores = self.growth(layer)
        self._check_scores(layer, scores)
        return drop_and_grow(
            layer.weight,
            scores,
            layer.mask,
            budget=layer.budget,
            drop_fraction=layer.drop_fraction,
            structure=layer.structure,
            groups=layer.groups,
        )

    def drop_fraction_at(self, step: int) -> float:
        """The share of the weights to replace at ``step``, as ``drop_schedule`` says.

        Override it for a share that depends on more than the time.
        """
        return self.schedule.drop_fraction_at(step, end=self.end)

    def _new_masks(self, step: int, gradients: dict[str, Tensor]) -> list[tuple[SparseWeight, Tensor]]:
        drop_fraction = self.drop_fraction_at(step)
        new: list[tuple[SparseWeight, Tensor]] = []
        failure: Exception | None = None
        for handle in sparse_weights(self.model):
            free = not self.needs_gradient and (handle.weight.requires_grad or self.prunes_from_dense)
            if not free and handle.fqn not in gradients:
                continue
            # Spread weights are gathered one at a time, and after an error, too: the other processes wait for them.
            weight = self._engine.whole_weight(handle)
            gradient = gradients.get(handle.fqn)
            dense = None if gradient is None else self._engine.whole(handle, gradient)
            if failure is not None:
                continue
            try:
                new.append((handle, self._new_mask(handle, weight, dense, step, drop_fraction)))
            except Exception as error:
                failure = error
        if failure is not None:
            raise failure
        return new

    def _new_mask(
        self, handle: SparseWeight, whole: Tensor, gradient: Tensor | None, step: int, drop_fraction: float
    ) -> Tensor:
        site, structure = handle.record.site, handle.record.structure
        assert structure is not None
        weight, mask = site.to_matrix(whole), site.to_matrix(handle.mask)
        dense = None if gradient is None else site.to_matrix(gradient)
        new = []
        for index, (block, budget) in enumerate(zip(site.blocks, handle.record.budgets, strict=True)):
            rows = slice(block.start, block.stop)
            layer = Layer(
                handle=handle,
                index=index,
                structure=structure,
                budget=budget,
                step=step,
                drop_fraction=drop_fraction,
                weight=weight[rows],
                mask=mask[rows],
                gradient=_UNCAPTURED if dense is None else dense[rows],
            )
            live = {"weight": layer.weight, "mask": layer.mask}
            if dense is not None:
                live["gradient"] = layer.gradient
            versions = {what: tensor._version for what, tensor in live.items()}
            try:
                new.append(self.new_mask(layer))
            except StructureError as error:  # the rule knows matrices, and not whose they are
                raise StructureError(f"{layer.name}: {error}") from error
            if written := [what for what, tensor in live.items() if tensor._version != versions[what]]:
                raise TrainerError(
                    f"{type(self).__name__} wrote to layer.{written[0]} of {layer.name}, which is for reading only: "
                    "the model may be damaged. Clone what is to be changed, and resume from the last checkpoint"
                )
            self._check_mask(layer, new[-1])
        return site.from_matrix(torch.cat(new))

    def _check_method(self) -> None:
        """Require a rule, and a decay under which old gradients fade."""
        method, decay = type(self), self.gradient_decay
        if method.growth is DynamicTrainer.growth and method.new_mask is DynamicTrainer.new_mask:
            raise TrainerError(f"{method.__name__} overrides neither growth() nor new_mask(): say what it grows")
        number = isinstance(decay, int | float) and not isinstance(decay, bool)
        if decay is not None and not (number and 0.0 < decay < 1.0):
            raise TrainerError(f"gradient_decay of {method.__name__} is {decay!r}, but must lie in (0, 1), or be None")

    def _check_scores(self, layer: Layer, scores: object) -> None:
        what = f"{type(self).__name__}.growth returned for {layer.name}"
        if not isinstance(scores, Tensor):
            raise TrainerError(f"{what} a {type(scores).__name__}, but must return a tensor of scores")
        if not scores.is_floating_point() or (scores.shape, scores.device) != (layer.mask.shape, layer.mask.device):
            raise TrainerError(
                f"{what} a {scores.dtype} {_place(scores)}, but must return a floating-point {_place(layer.mask)}"
            )
        # NaN and infinities pass through both extremes: only then is it worth looking whether anything else is there.
        if not torch.stack(scores.detach().aminmax()).isfinite().all() and not scores.isfinite().any():
            raise TrainerError(f"{what} scores of which none is finite: nothing can be ranked by them")

    def _check_mask(self, layer: Layer, new: object) -> None:
        """Require what :func:`srigl_fx.verify` will."""
        what = f"{type(self).__name__}.new_mask returned for {layer.name}"
        if not isinstance(new, Tensor):
            raise TrainerError(f"{what} a {type(new).__name__}, but must return a bool tensor")
        if (new.dtype, new.shape, new.device) != (torch.bool, layer.mask.shape, layer.mask.device):
            raise TrainerError(f"{what} a {new.dtype} {_place(new)}, but must return a torch.bool {_place(layer.mask)}")
        if fault := layer.groups.fault(new):
            raise StructureError(f"{what} a mask whose {fault}")
        counts = counts_of_rows(new)
        active, kept, least, most = torch.stack([counts.count_nonzero(), counts.sum(), *counts.aminmax()]).tolist()
        constant, inputs = layer.structure == "constant_fan_in", new.shape[1]
        if kept == 0:
            raise StructureError(f"{what} an empty mask: at least one weight must stay")
        if kept > layer.budget and self.prunes_from_dense and layer.handle.record.dense_start:
            if constant and least != most:
                raise StructureError(f"{what} fan-ins from {least} to {most}, but pruning must leave all rows the same")
            return
        if kept > layer.budget:
            raise StructureError(f"{what} a mask of {kept} weights, more than the budget of {layer.budget}")
        if not constant:
            return
        if active * inputs < layer.budget:
            raise StructureError(
                f"{what} a mask with {active} active rows of {inputs} inputs, which cannot hold the budget of "
                f"{layer.budget} weights"
            )
        fan_in = min(inputs, layer.budget // active)
        if most != fan_in or kept != active * fan_in:
            raise StructureError(
                f"{what} fan-ins {sorted(set(counts[counts > 0].tolist()))[:8]}, but with {active} active rows and a "
                f"budget of {layer.budget} weights each must have {fan_in}"
            )


def _place(tensor: Tensor) -> str:
    return f"tensor {tuple(tensor.shape)} on {tensor.device}"
