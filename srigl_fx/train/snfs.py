"""SNFS: growth by the magnitude of the momentum.

Owns the method's growth score and the decay of its momentum. It must not know how gradients are captured.
"""

from typing import ClassVar

from torch import Tensor

from srigl_fx.train.dynamic import DynamicTrainer, Layer


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
    unused: ClassVar[frozenset[str]] = frozenset({"grad_samples"})

    def growth(self, layer: Layer) -> Tensor:
        """The decaying sum of the dense gradients."""
        return layer.gradient
