"""SET: growth at random.

Owns the method's growth score and the seeds of its draws. It must not know how layers are taken apart or masks kept.
"""

from typing import ClassVar, Unpack

from torch import Tensor, nn
from torch.optim import Optimizer

from srigl_fx.errors import TrainerError
from srigl_fx.train.arguments import TrainerOptions
from srigl_fx.train.dynamic import DynamicTrainer, Layer
from srigl_fx.train.updates import random_scores


class SET(DynamicTrainer):
    """Sparse Evolutionary Training: dynamic sparse training that grows connections at random.

    Every ``update_every`` optimizer steps, until ``stop_at`` of all steps, each layer drops its smallest weights and
    grows as many at random: anywhere in the layer of an unstructured model, within each row of a constant fan-in one.
    No dense gradient is needed, and none is captured. Each draw depends on the seed, the step and the layer's name
    alone and is made on the CPU: every process and device finds the same masks, and a resumed run those of an
    uninterrupted one.

    The drop fraction falls along half a cosine, as in RigL's comparisons of methods; the original method keeps 0.3
    throughout: ``drop_schedule="constant"``. ``grad_samples`` is not used.

    Args:
        model: A sparsified model.
        optimizer: Holds its masked parameters; made before or after ``sparsify``.
        total_steps: Optimizer steps of the whole training: epochs * len(loader) // accumulation.
        seed: Seeds the draws.
        **options: The arguments that all methods share: :class:`~srigl_fx.train.arguments.TrainerOptions`.

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
    unused: ClassVar[frozenset[str]] = frozenset({"grad_samples"})

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        total_steps: int,
        seed: int = 0,
        **options: Unpack[TrainerOptions],
    ) -> None:
        """Check the arguments, then attach to model and optimizer."""
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TrainerError(f"seed is {seed!r}, but must be a whole number")
        self.seed = seed
        super().__init__(model, optimizer, total_steps=total_steps, **options)

    def growth(self, layer: Layer) -> Tensor:
        """Uniform scores."""
        return random_scores(layer.mask.shape, layer.generator(self.seed)).to(layer.mask.device)
