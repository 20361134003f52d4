"""GMP: gradual magnitude pruning, from a dense model down to the budgets.

Owns the method's schedule of counts, the opening of the masks and the mark that says pruning is under way. It must
not know how masks are kept.
"""

from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from srigl_fx.errors import InvariantError, TrainerError
from srigl_fx.masks.budgets import budget as count_at
from srigl_fx.masks.records import SparseWeight, set_dense_start, sparse_weights
from srigl_fx.masks.shards import local, part
from srigl_fx.train.arguments import TrainerOptions
from srigl_fx.train.dynamic import DynamicTrainer, Layer
from srigl_fx.train.schedules import cubic_sparsity, last_update_step
from srigl_fx.train.updates import gmp_update


class GMP(DynamicTrainer):
    """Gradual magnitude pruning: every weight trains at first, and the smallest are removed step by step.

    All masks are opened when the trainer attaches. Every ``update_every`` optimizer steps each layer keeps its largest
    weights, fewer and fewer along a cubic schedule; at the last update below ``stop_at`` of all steps each has exactly
    what its budget allows. With an unstructured model weights are ranked over the layer, with a constant fan-in one
    within each row, so that all rows have the same fan-in throughout. Rows that share their inputs are pruned together.
    Nothing grows again, and no dense gradient is captured.

    ``sparsify(model, mask_init="dense", ...)`` keeps the weights to start from, of a new or a trained model; otherwise
    those it removed start at zero. That holds for a model which GMP has pruned before, too: a second trainer opens its
    masks anew.

    Frozen weights are pruned as well, unlike with the other methods, since each layer must meet its budget; to keep a
    frozen layer whole, ``sparsify`` it with the rule None.

    Args:
        model: A sparsified model.
        optimizer: Holds its masked parameters; made before or after ``sparsify``.
        total_steps: Optimizer steps of the whole training: epochs * len(loader) // accumulation.
        **options: The arguments that all methods share: :class:`~srigl_fx.train.arguments.TrainerOptions`.
            ``drop_fraction``, ``drop_schedule``, ``grad_samples`` and ``step_count`` are not used.

    Raises:
        TrainerError: An argument is out of range, no update would ever happen, the model has no masks or has a trainer
            already, or the optimizer does not fit; model and optimizer are left as they were.

    Source: To Prune, or Not to Prune (Zhu & Gupta, 2017).

    Example:
        >>> from srigl_fx import sparsify
        >>> model = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> model = sparsify(model, sparsity=0.75, distribution="uniform", mask_init="dense")
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> trainer = GMP(model, optimizer, total_steps=20, update_every=5)
        >>> fan_in = []
        >>> for _ in range(20):
        ...     optimizer.zero_grad()
        ...     model(torch.randn(8, 32)).square().sum().backward()
        ...     optimizer.step()
        ...     fan_in.append(int(model[0].weight_mask[0].sum()))
        >>> fan_in[::5]
        [32, 11, 8, 8]
    """

    needs_gradient: ClassVar[bool] = False
    prunes_from_dense: ClassVar[bool] = True
    grows: ClassVar[bool] = False
    unused: ClassVar[frozenset[str]] = frozenset({"drop_fraction", "drop_schedule", "grad_samples", "step_count"})

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, *, total_steps: int, **options: Unpack[TrainerOptions]
    ) -> None:
        """Check the arguments, then attach to model and optimizer and open the masks."""
        super().__init__(model, optimizer, total_steps=total_steps, **options)
        self._last = last_update_step(every=self.update_every, end=self.end)
        set_dense_start(model, True)
        for handle in sparse_weights(model):
            self._engine.set_mask(handle, torch.ones_like(handle.mask))

    def new_mask(self, layer: Layer) -> Tensor:
        """The largest of the layer's weights, as many as the schedule leaves."""
        size = layer.mask.numel()
        sparsity = cubic_sparsity(layer.step, final=1 - layer.budget / size, end=self._last)
        count = max(layer.budget, count_at(size, 1 - sparsity))
        return gmp_update(layer.weight, layer.mask, count=count, structure=layer.structure, groups=layer.groups)

    def check_state_dict(self, state: dict[str, Any]) -> None:
        """Also whether the state has a mask for each weight."""
        super().check_state_dict(state)
        extra = state.get("extra")
        masks = extra.get("masks") if isinstance(extra, dict) else None
        handles = sparse_weights(self.model)
        if not isinstance(masks, dict) or not all(_fits(masks.get(item.key), item) for item in handles):
            raise TrainerError("the trainer's state is damaged at masks; load another checkpoint")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume, once model and optimizer have loaded theirs; the masks come from the trainer's state."""
        self.check_state_dict(state)
        for handle in sparse_weights(self.model):
            mask = state["extra"]["masks"][handle.key].to(handle.mask.device)
            if bool(((local(handle.weight.detach()) != 0) & ~part(mask, handle.weight)).any()):
                raise InvariantError(
                    f"{handle.fqn}: weights off the mask are not zero: the trainer's state is of another run, or the "
                    "model has not loaded its own; load the model of the same checkpoint first"
                )
        super().load_state_dict(state)
        self._mark()

    def _update(self) -> None:
        super()._update()
        self._mark()

    def _mark(self) -> None:
        """Once the last update is done, masks must meet their budgets."""
        set_dense_start(self.model, self.last_update is None or self.last_update < self._last)

    def _extra_state(self) -> dict[str, Any]:
        # Attaching opens the masks that the model may have loaded already: they are needed once more.
        return {"masks": {handle.key: handle.mask.clone() for handle in sparse_weights(self.model)}}

    def _load_extra_state(self, state: dict[str, Any]) -> None:
        for handle in sparse_weights(self.model):
            mask = state["extra"]["masks"][handle.key]
            self._engine.set_mask(handle, mask.to(handle.mask.device))


def _fits(mask: object, handle: SparseWeight) -> bool:
    return isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == handle.mask.shape
