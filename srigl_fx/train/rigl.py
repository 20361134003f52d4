"""RigL: growth by the magnitude of the dense gradient.

Owns the method's growth score and the order of the original, in which an update takes the place of a weight step. It
must not know how layers are taken apart or masks kept.
"""

from typing import Any, Unpack

from torch import Tensor, nn
from torch.optim import Optimizer

from srigl_fx.train.arguments import TrainerOptions
from srigl_fx.train.dynamic import DynamicTrainer, Layer
from srigl_fx.train.schedules import is_update_step


class RigL(DynamicTrainer):
    """Dynamic sparse training that grows connections where the gradient is largest.

    Every ``update_every`` optimizer steps, until ``stop_at`` of all steps, each layer drops its smallest weights and
    grows as many where the dense gradient is largest: anywhere in the layer of an unstructured model, within each row
    of a constant fan-in one (that is SRigL without ablation).

    Args:
        model: A sparsified model.
        optimizer: Holds its masked parameters; made before or after ``sparsify``.
        total_steps: Optimizer steps of the whole training: epochs * len(loader) // accumulation.
        replace_step: On the step of an update, change the masks only, as the original does: all gradients of the
            optimizer are set to None before it steps, so that weights, biases and state stay. By default the weights
            move first, as in SRigL's experiments.
        **options: The arguments that all methods share: :class:`~srigl_fx.train.arguments.TrainerOptions`.

    Raises:
        TrainerError: An argument is out of range, no update would ever happen, the model has no masks or has a trainer
            already, or the optimizer does not fit; model and optimizer are left as they were.

    Source: RigL (Evci et al., 2020).

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from srigl_fx import sparsify
        >>> model = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> model = sparsify(model, sparsity=0.75, structure="unstructured")
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> trainer = RigL(model, optimizer, total_steps=100, update_every=5)
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
        replace_step: bool = False,
        **options: Unpack[TrainerOptions],
    ) -> None:
        """Check the arguments, then attach to model and optimizer."""
        self.replace_step = replace_step
        super().__init__(model, optimizer, total_steps=total_steps, **options)
        if replace_step:
            self._engine.before_each_step(self._hold_weights)

    def growth(self, layer: Layer) -> Tensor:
        """The dense gradient."""
        return layer.gradient

    def _hold_weights(self, optimizer: Optimizer, *_: Any) -> None:
        if self._near_update and is_update_step(self.steps + 1, every=self.update_every, end=self.end):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
