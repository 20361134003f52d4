"""The training methods a user attaches: SRigL, and masks that stay as they are.

Owns what each method adds to :class:`~srigl_fx.train.base.Trainer`: its arguments and its choice of masks. It must not
know how masks are kept (:mod:`srigl_fx.train.engine`) or computed (:mod:`srigl_fx.train.updates`).
"""

import logging
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from srigl_fx.errors import StructureError, TrainerError
from srigl_fx.masks.records import SparseWeight, sparse_weights
from srigl_fx.train.base import Trainer, check_count, check_share
from srigl_fx.train.engine import check_attachable
from srigl_fx.train.protect import protected_weights
from srigl_fx.train.schedules import cosine_drop_fraction
from srigl_fx.train.updates import AblationMode, srigl_update

_log = logging.getLogger(__name__)


class Static(Trainer):
    """Masks that never change: gradients, weights and optimizer state stay zero off them.

    Args:
        model: A sparsified model.
        optimizer: Holds its masked parameters.
        total_steps: Not needed; accepted so that methods can be exchanged.

    Raises:
        TrainerError: The model has no masks, has a trainer already, or the optimizer does not fit.

    Example:
        >>> from srigl_fx import sparsify
        >>> model = sparsify(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)), sparsity=0.5)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> trainer = Static(model, optimizer)
        >>> model(torch.ones(1, 8)).sum().backward()
        >>> optimizer.step()
        >>> trainer.steps, trainer.last_update
        (1, None)
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, *, total_steps: int | None = None) -> None:
        """Check the arguments, then attach to model and optimizer."""
        super().__init__(model, optimizer, total_steps=total_steps)

    def _new_masks(self, step: int, gradients: dict[str, Tensor]) -> list[tuple[SparseWeight, Tensor]]:
        return []


class SRigL(Trainer):
    """Structured RigL: dynamic sparse training with constant fan-in and neuron ablation.

    Every ``update_every`` optimizer steps, until ``stop_at`` of all steps, each layer drops its smallest weights,
    ablates neurons with too few salient ones and grows connections with the largest gradients, so that all active
    neurons have the same fan-in.

    Args:
        model: A model sparsified with ``structure="constant_fan_in"``.
        optimizer: Holds its masked parameters; made before or after ``sparsify``.
        total_steps: Optimizer steps of the whole training: epochs * len(loader) // accumulation.
        update_every: Optimizer steps between updates; 100 at batch size 4096 is the usual recipe, more at smaller ones.
        drop_fraction: Share of the weights replaced at first; it falls to 0 along half a cosine.
        stop_at: Share of the steps after which the masks stay as they are.
        ablation: Salient weights a neuron needs to survive (gamma_sal), as a fraction of its first fan-in or, with
            ``ablation_mode="absolute"``, as a count; None turns ablation off. A layer's own rule takes precedence.
        ablation_mode: "fraction" or "absolute".
        min_neurons: Neurons that every block of a layer keeps in any case; the budget alone demands some.
        permanent_ablation: Ablated neurons never come back.
        protect: Layers that are never ablated: "output" for those that feed the model's outputs, or names and globs.
        grad_samples: Optimizer steps before an update whose dense gradients are summed for growth.
        auto: Update within ``optimizer.step()``; else when :meth:`step` is called after it.

    Raises:
        TrainerError: An argument is out of range, the model has no masks or has a trainer already, or the optimizer
            does not fit; model and optimizer are left as they were.
        StructureError: The model's masks are unstructured.

    Source: SRigL (Lasby et al., ICLR 2024).

    Example:
        >>> from srigl_fx import sparsify
        >>> model = sparsify(nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)), sparsity=0.75)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> trainer = SRigL(model, optimizer, total_steps=100, update_every=5)
        >>> for _ in range(10):
        ...     optimizer.zero_grad()
        ...     model(torch.randn(8, 32)).square().sum().backward()
        ...     optimizer.step()
        >>> trainer.steps, trainer.last_update
        (10, 10)
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
        ablation: float | None = 0.3,
        ablation_mode: AblationMode = "fraction",
        min_neurons: int | None = None,
        permanent_ablation: bool = False,
        protect: Literal["output"] | Iterable[str] = "output",
        grad_samples: int = 1,
        auto: bool = True,
    ) -> None:
        """Check the arguments, then attach to model and optimizer."""
        check_attachable(model, optimizer)
        check_count("total_steps", total_steps)
        check_share("drop_fraction", drop_fraction)
        if ablation_mode not in ("fraction", "absolute"):
            raise TrainerError(f'ablation_mode is {ablation_mode!r}; choose "fraction" or "absolute"')
        _check_ablation("ablation", ablation, ablation_mode)
        if min_neurons is not None:
            check_count("min_neurons", min_neurons)
        for handle in sparse_weights(model):
            if handle.record.structure != "constant_fan_in":
                raise StructureError(
                    f"{handle.fqn} is {handle.record.structure}, but SRigL trains constant fan-in: sparsify with "
                    'structure="constant_fan_in", or train with Static'
                )
            for own in handle.record.ablation:
                _check_ablation(f"the ablation that a rule gives {handle.fqn}", own, ablation_mode)
        self.protected = protected_weights(model, protect)
        self.drop_fraction = drop_fraction
        self.ablation = ablation
        self.ablation_mode: AblationMode = ablation_mode
        self.min_neurons = min_neurons
        self.permanent_ablation = permanent_ablation
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

    def _new_masks(self, step: int, gradients: dict[str, Tensor]) -> list[tuple[SparseWeight, Tensor]]:
        drop_fraction = cosine_drop_fraction(step, initial=self.drop_fraction, end=self.end)
        return [
            (handle, self._new_mask(handle, gradients[handle.fqn], drop_fraction))
            for handle in sparse_weights(self.model)
            if handle.fqn in gradients
        ]

    def _new_mask(self, handle: SparseWeight, gradient: Tensor, drop_fraction: float) -> Tensor:
        site = handle.record.site
        weight, grad, mask = (site.to_matrix(tensor) for tensor in (handle.weight, gradient, handle.mask))
        new = []
        for index, (block, budget) in enumerate(zip(site.blocks, handle.record.budgets, strict=True)):
            rows = slice(block.start, block.stop)
            ablation = self._threshold(handle, index)
            new.append(
                srigl_update(
                    weight[rows],
                    grad[rows],
                    mask[rows],
                    budget=budget,
                    drop_fraction=drop_fraction,
                    ablation=ablation,
                    ablation_mode=self.ablation_mode,
                    min_neurons=self.min_neurons,
                    frozen_rows=~mask[rows].any(dim=1) if self.permanent_ablation and ablation else None,
                )
            )
        return site.from_matrix(torch.cat(new))

    def _threshold(self, handle: SparseWeight, index: int) -> float | None:
        """The ablation threshold of one block: none where ablation is forbidden, else its own, else the trainer's."""
        if handle.fqn in self.protected or not handle.record.site.blocks[index].ablatable:
            return None
        own = handle.record.ablation[index] if handle.record.ablation else None
        return self.ablation if own is None else own


def _check_ablation(name: str, value: float | None, mode: AblationMode) -> None:
    if value is None:
        return
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if mode == "fraction" and not (number and 0.0 <= value <= 1.0):
        raise TrainerError(f'{name} is {value!r}, but must lie in [0, 1]; for a count, use ablation_mode="absolute"')
    if mode == "absolute" and not (number and value >= 0 and float(value).is_integer()):
        raise TrainerError(f'{name} is {value!r}, but must be a whole number with ablation_mode="absolute"')
