"""SNFS: growth by the magnitude of the momentum.

Owns the method's growth score and the decay of its momentum. It must not know how gradients are captured.
"""

from typing import ClassVar

from torch import Tensor, nn
from torch.optim import Optimizer

from srigl_fx.train.dynamic import DynamicTrainer, Layer
from srigl_fx.train.step_counts import DEFAULT_STEP_COUNT, StepCount


class SNFS(DynamicTrainer):
    """Sparse Networks from Scratch: dynamic sparse training that grows connections where the momentum is largest.

    As :class:`~srigl_fx.train.rigl.RigL`, with the decaying sum of all dense gradients so far in place of the last
    one. The optimizer's own momentum is zero off the mask and knows nothing of inactive weights, so the trainer keeps
    a sum of its own: the memory of one more dense gradient per masked weight, and one pass over it at every step. It
    is part of ``state_dict()``. Several processes each sum their own gradients; the sums are joined at updates.

    The arguments are those of :class:`~srigl_fx.train.dynamic.DynamicTrainer`; ``grad_samples`` is not used. Budgets
    stay within their layers: the redistribution between layers of the original method would change the recorded
    budgets.

    Source: Sparse Networks from Scratch (Dettmers & Zettlemoyer, 2019).

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from srigl_fx import sparsify
        >>> model = sparsify(nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)), sparsity=0.75)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> trainer = SNFS(model, optimizer, total_steps=100, update_every=5)
        >>> for _ in range(10):
        ...     optimizer.zero_grad()
        ...     model(torch.randn(8, 32)).square().sum().backward()
        ...     optimizer.step()
        >>> trainer.last_update
        10
    """

    gradient_decay: ClassVar[float | None] = 0.9

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        total_steps: int,
        update_every: int | None = None,
        drop_fraction: float = 0.3,
        stop_at: float = 0.75,
        grad_samples: int = 1,
        auto: bool = True,
        step_count: StepCount = DEFAULT_STEP_COUNT,
    ) -> None:
        """Check the arguments, then attach to model and optimizer."""
        super().__init__(
            model,
            optimizer,
            total_steps=total_steps,
            update_every=update_every,
            drop_fraction=drop_fraction,
            stop_at=stop_at,
            auto=auto,
            step_count=step_count,
        )

    def growth(self, layer: Layer) -> Tensor:
        """The decaying sum of the dense gradients."""
        return layer.gradient
