"""Static: masks that never change.

Owns the baseline method. It must not know update rules.
"""

from typing import ClassVar, Unpack

from torch import Tensor, nn
from torch.optim import Optimizer

from srigl_fx.masks.records import SparseWeight
from srigl_fx.train.arguments import DEFAULTS, TrainerOptions
from srigl_fx.train.base import Trainer


class Static(Trainer):
    """Masks that never change: gradients, weights and optimizer state stay zero off them.

    Takes the arguments that all methods share, so that methods can be exchanged, and uses none of them: no update
    ever happens and no dense gradient is captured.

    Args:
        model: A sparsified model.
        optimizer: Holds its masked parameters.
        total_steps: Unused.
        **options: The arguments that all methods share, unused as well.

    Raises:
        TrainerError: The model has no masks, has a trainer already, or the optimizer does not fit.

    Example:
        >>> import torch
        >>> from srigl_fx import sparsify
        >>> model = sparsify(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)), sparsity=0.5)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> trainer = Static(model, optimizer)
        >>> model(torch.ones(1, 8)).sum().backward()
        >>> optimizer.step()
        >>> trainer.steps, trainer.last_update
        (1, None)
    """

    needs_gradient: ClassVar[bool] = False
    grows: ClassVar[bool] = False
    changes_masks: ClassVar[bool] = False
    unused: ClassVar[frozenset[str]] = frozenset(DEFAULTS)

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        total_steps: int | None = None,
        **options: Unpack[TrainerOptions],
    ) -> None:
        """Attach to model and optimizer."""
        super().__init__(model, optimizer, total_steps=total_steps, **options)

    def _new_masks(self, step: int, gradients: dict[str, Tensor]) -> list[tuple[SparseWeight, Tensor]]:
        return []
