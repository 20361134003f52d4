"""SET: growth at random.

Owns the method's growth score and the seeds of its draws. It must not know how layers are taken apart or masks kept.
"""

from typing import ClassVar

from torch import Tensor, nn
from torch.optim import Optimizer

from srigl_fx.errors import TrainerError
from srigl_fx.train.dynamic import DynamicTrainer, Layer
from srigl_fx.train.step_counts import DEFAULT_STEP_COUNT, StepCount
from srigl_fx.train.updates import random_scores


class SET(DynamicTrainer):
    """Sparse Evolutionary Training: dynamic sparse training that grows connections at random.

    Every ``update_every`` optimizer steps, until ``stop_at`` of all steps, each layer drops its smallest weights and
    grows as many at random: anywhere in the layer of an unstructured model, within each row of a constant fan-in one.
    No dense gradient is needed, and none is captured. Each draw depends on the seed, the step and the layer's name
    alone and is made on the CPU: every process and device finds the same masks, and a resumed run those of an
    uninterrupted one.

    Args:
        model: A sparsified model.
        optimizer: Holds its masked parameters; made before or after ``sparsify``.
        total_steps: Optimizer steps of the whole training: epochs * len(loader) // accumulation.
        update_every: Optimizer steps between updates; by default a share of ``total_steps``
            (:func:`~srigl_fx.train.schedules.default_interval`).
        drop_fraction: Share of the weights replaced at first; it falls to 0 along half a cosine, as in RigL's
            comparisons (the original method keeps 0.3 throughout).
        stop_at: Share of the steps after which the masks stay as they are.
        grad_samples: Unused; accepted so that methods can be exchanged.
        auto: Update within ``optimizer.step()``; otherwise call :meth:`step` after it.
        step_count: Whose optimizer steps a weight that has grown counts: those of its "tensor", as optimizers do, or
            its own ("weight"). docs/methods.md, "First steps of grown weights".
        seed: Seeds the draws.

    Raises:
        TrainerError: An argument is out of range, no update would ever happen, the model has no masks or has a trainer
            already, or the optimizer does not fit; model and optimizer are left as they were.

    Source: Sparse Evolutionary Training (Mocanu et al., 2018).

    Example:
        >>> import torch
        >>> from srigl_fx import sparsify
        >>> model = sparsify(nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)), sparsity=0.75)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> trainer = SET(model, optimizer, total_steps=100, update_every=5, seed=1)
        >>> for _ in range(10):
        ...     optimizer.zero_grad()
        ...     model(torch.randn(8, 32)).square().sum().backward()
        ...     optimizer.step()
        >>> trainer.last_update
        10
    """

    needs_gradient: ClassVar[bool] = False

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
        seed: int = 0,
    ) -> None:
        """Check the arguments, then attach to model and optimizer."""
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TrainerError(f"seed is {seed!r}, but must be a whole number")
        self.seed = seed
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
        """Uniform scores."""
        return random_scores(layer.mask.shape, layer.generator(self.seed)).to(layer.mask.device)
