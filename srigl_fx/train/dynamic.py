"""What the dynamic methods share: the schedule's arguments, and one mask update a block of a layer.

Owns :class:`DynamicTrainer`, which takes the model's masked weights apart into :class:`Layer` matrices, and the rule
that most methods follow: drop by magnitude, grow by a score of their own. A method is a subclass that gives that
score (:meth:`~DynamicTrainer.growth`) or, where it needs more, the whole mask (:meth:`~DynamicTrainer.new_mask`). It
must not know how masks are kept between updates (:mod:`srigl_fx.train.engine`).
"""

import logging
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from srigl_fx.masks.records import SparseWeight, Structure, sparse_weights
from srigl_fx.train.base import Trainer, check_count, check_share
from srigl_fx.train.schedules import cosine_drop_fraction
from srigl_fx.train.updates import drop_and_grow

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One block of a masked weight at an update, as matrices of n neurons with F inputs each.

    Attributes:
        handle: The weight.
        index: Which of its blocks; most weights have one.
        structure: How the mask may lie.
        budget: Number of weights the block may keep.
        step: Completed optimizer steps.
        drop_fraction: Share of the weights to replace at this step.
        weight: Values (n, F), zero off the mask.
        mask: Bool mask (n, F).
        gradient: Dense gradient (n, F), also off the mask; zeros where the method needs none.
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

    def generator(self, seed: int) -> torch.Generator:
        """A generator on the CPU whose draws depend on ``seed``, the step and the layer's name alone."""
        return torch.Generator().manual_seed(zlib.crc32(f"{seed}:{self.step}:{self.name}".encode()))


class DynamicTrainer(Trainer):
    """A method that replaces connections as it trains, at multiples of ``update_every`` until ``stop_at``.

    A subclass overrides :meth:`growth`: a score for each weight, whose magnitude decides what grows. On a constant
    fan-in model growth is ranked within each row, so that the fan-in stays constant; on an unstructured one over the
    layer. A class attribute ``needs_gradient = False`` says that the score does without the dense gradient, which is
    then not captured.

    Args:
        model: A sparsified model.
        optimizer: Holds its masked parameters; made before or after ``sparsify``.
        total_steps: Optimizer steps of the whole training: epochs * len(loader) // accumulation.
        update_every: Optimizer steps between updates; 100 at batch size 4096 is the usual recipe, more at smaller ones.
        drop_fraction: Share of the weights replaced at first; it falls to 0 along half a cosine.
        stop_at: Share of the steps after which the masks stay as they are.
        grad_samples: Optimizer steps whose dense gradients count towards an update: the last ones before it.
        auto: Update within ``optimizer.step()``; otherwise call :meth:`step` after it.

    Raises:
        TrainerError: An argument is out of range, the model has no masks or has a trainer already, or the optimizer
            does not fit; model and optimizer are left as they were.

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
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        total_steps: int,
        update_every: int = 100,
        drop_fraction: float = 0.3,
        stop_at: float = 0.75,
        grad_samples: int = 1,
        auto: bool = True,
    ) -> None:
        """Check the arguments, then attach to model and optimizer."""
        check_count("total_steps", total_steps)
        check_share("drop_fraction", drop_fraction)
        self.drop_fraction = drop_fraction
        super().__init__(
            model,
            optimizer,
            total_steps=total_steps,
            update_every=update_every,
            stop_at=stop_at,
            grad_samples=grad_samples,
            auto=auto,
        )
        if self.end <= update_every:
            _log.warning(
                "no update will happen: the first would be at step %d, but updates end before step %d; lower "
                "update_every, or check that total_steps counts optimizer steps",
                update_every,
                self.end,
            )

    def growth(self, layer: Layer) -> Tensor:
        """Scores (n, F) of the layer's weights, of which the largest magnitudes grow: override this."""
        raise NotImplementedError(f"{type(self).__name__} overrides neither growth() nor new_mask()")

    def new_mask(self, layer: Layer) -> Tensor:
        """The bool mask (n, F) after this update; override it for a method that does not drop and grow."""
        return drop_and_grow(
            layer.weight,
            self.growth(layer),
            layer.mask,
            budget=layer.budget,
            drop_fraction=layer.drop_fraction,
            structure=layer.structure,
        )

    def drop_fraction_at(self, step: int) -> float:
        """The share of the weights to replace at ``step``; override it for another schedule."""
        return cosine_drop_fraction(step, initial=self.drop_fraction, end=self.end)

    def _new_masks(self, step: int, gradients: dict[str, Tensor]) -> Iterator[tuple[SparseWeight, Tensor]]:
        drop_fraction = self.drop_fraction_at(step)
        for handle in sparse_weights(self.model):
            free = not self.needs_gradient and (handle.weight.requires_grad or self.prunes_from_dense)
            if free or handle.fqn in gradients:
                yield handle, self._new_mask(handle, gradients.get(handle.fqn), step, drop_fraction)

    def _new_mask(self, handle: SparseWeight, gradient: Tensor | None, step: int, drop_fraction: float) -> Tensor:
        site, structure = handle.record.site, handle.record.structure
        assert structure is not None
        weight, mask = site.to_matrix(self._engine.whole_weight(handle)), site.to_matrix(handle.mask)
        dense = torch.zeros((), device=mask.device).expand(mask.shape)
        if gradient is not None:
            dense = site.to_matrix(self._engine.whole(handle, gradient))
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
                gradient=dense[rows],
            )
            new.append(self.new_mask(layer))
        return site.from_matrix(torch.cat(new))
