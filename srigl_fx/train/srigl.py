"""SRigL: structured RigL with neuron ablation.

Owns the method's arguments, and which layers are ablated at which threshold. It must not know how masks are kept
(:mod:`srigl_fx.train.engine`) or computed (:mod:`srigl_fx.train.updates`).
"""

from collections.abc import Iterable, Sequence
from typing import Literal, Unpack

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from srigl_fx.errors import StructureError, TrainerError
from srigl_fx.masks.records import SparseWeight
from srigl_fx.train.arguments import TrainerOptions
from srigl_fx.train.checks import check_count, check_share
from srigl_fx.train.dynamic import DynamicTrainer, Layer
from srigl_fx.train.protect import Protection, protected_weights, warn_of_unknown
from srigl_fx.train.updates import AblationMode, srigl_update

Revival = Literal["scaled", "reference"]


class SRigL(DynamicTrainer):
    """Structured RigL: dynamic sparse training with constant fan-in and neuron ablation.

    Every ``update_every`` optimizer steps, until ``stop_at`` of all steps, each layer drops its smallest weights,
    ablates neurons with too few salient ones and grows connections with the largest gradients, so that all active
    neurons have the same fan-in. Neurons that share their inputs (``sparsify(group_size=...)``) drop and grow them
    together, and are ablated one by one; :func:`~srigl_fx.train.updates.srigl_update` has the rule.

    Args:
        model: A model sparsified with ``structure="constant_fan_in"``.
        optimizer: Holds its masked parameters; made before or after ``sparsify``.
        total_steps: Optimizer steps of the whole training: epochs * len(loader) // accumulation.
        ablation: Salient weights a neuron needs to survive (gamma_sal), as a fraction of its first fan-in or, with
            ``ablation_mode="absolute"``, as a count; None turns ablation off. A layer's own rule takes precedence.
            Which threshold, and where: docs/methods.md, "Which neurons are ablated".
        ablation_mode: "fraction" or "absolute".
        min_neurons: Neurons that every block of a layer keeps in any case; the budget alone demands some.
        permanent_ablation: Ablated neurons never come back.
        revival: How the gradients of ablated neurons compare with those of the others. A neuron without weights that
            feeds a batch normalisation has zero variance, which magnifies its gradients by 1 / sqrt(eps), some 300
            times: it would come back whatever it is worth. "scaled" brings an ablated neuron whose mean gradient
            exceeds that of every other neuron in the layer down to their mean; "reference" takes it as it is.
        protect: Layers that are never ablated: "auto" for those whose neurons others count on, "output" for those that
            feed the model's outputs, "none", or names and globs besides "auto"; see
            :func:`~srigl_fx.train.protect.protected_weights`.
        warn_ablated: The log says so, once, when an update ablates more than this share of a layer's active neurons.
        **options: The arguments that all methods share: :class:`~srigl_fx.train.arguments.TrainerOptions`.

    Raises:
        TrainerError: An argument is out of range, no update would ever happen, the model has no masks or has a trainer
            already, or the optimizer does not fit; model and optimizer are left as they were.
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
        ablation: float | None = 0.3,
        ablation_mode: AblationMode = "fraction",
        min_neurons: int | None = None,
        permanent_ablation: bool = False,
        revival: Revival = "scaled",
        protect: Protection | Iterable[str] = "auto",
        warn_ablated: float = 0.5,
        **options: Unpack[TrainerOptions],
    ) -> None:
        """Check the arguments, then attach to model and optimizer."""
        if ablation_mode not in ("fraction", "absolute"):
            raise TrainerError(f'ablation_mode is {ablation_mode!r}; choose "fraction" or "absolute"')
        _check_ablation("ablation", ablation, ablation_mode)
        if revival not in ("scaled", "reference"):
            raise TrainerError(f'revival is {revival!r}; choose "scaled" or "reference"')
        if min_neurons is not None:
            check_count("min_neurons", min_neurons)
        check_share("warn_ablated", warn_ablated)
        self.ablation = ablation
        self.ablation_mode: AblationMode = ablation_mode
        self.min_neurons = min_neurons
        self.permanent_ablation = permanent_ablation
        self.revival: Revival = revival
        self.protected: dict[str, str] = {}
        self.warn_ablated = warn_ablated
        self._protect = protect
        self._may_ablate = bool(ablation)
        self._shrunk: list[str] = []
        super().__init__(model, optimizer, total_steps=total_steps, **options)
        if self._may_ablate and protect not in ("output", "none"):
            warn_of_unknown(model, self.protected)

    def _check_weights(self, model: nn.Module, weights: Sequence[SparseWeight]) -> None:
        for handle in weights:
            if handle.record.structure != "constant_fan_in":
                raise StructureError(
                    f"{handle.fqn} is {handle.record.structure}, but SRigL trains constant fan-in: sparsify with "
                    'structure="constant_fan_in", or train with RigL'
                )
            for own in handle.record.ablation:
                _check_ablation(f"the ablation that a rule gives {handle.fqn}", own, self.ablation_mode)
                self._may_ablate |= bool(own)
        self.protected = protected_weights(model, self._protect)

    def _new_masks(self, step: int, gradients: dict[str, Tensor]) -> list[tuple[SparseWeight, Tensor]]:
        self._shrunk.clear()
        new = super()._new_masks(step, gradients)
        if self._shrunk:
            self._log_once(
                "ablated",
                "the update at step %d ablated more than %g of the active neurons of %s%s: if that is not meant, lower "
                "ablation (%s), name the layers in protect=[...], or raise warn_ablated",
                step,
                self.warn_ablated,
                ", ".join(self._shrunk[:5]),
                " and others" if len(self._shrunk) > 5 else "",
                self.ablation,
            )
        return new

    def new_mask(self, layer: Layer) -> Tensor:
        """Drop, ablate and grow."""
        new = self._updated(layer)
        active = layer.mask.any(dim=1)
        lost, before = torch.stack([(active & ~new.any(dim=1)).sum(), active.sum()]).tolist()
        if lost > self.warn_ablated * before:
            self._shrunk.append(f"{layer.name} ({lost} of {before})")
        return new

    def _updated(self, layer: Layer) -> Tensor:
        ablation = self._threshold(layer.handle, layer.index)
        scaled = self.revival == "scaled" and ablation and not self.permanent_ablation
        return srigl_update(
            layer.weight,
            scale_dead_rows(layer.gradient, layer.mask) if scaled else layer.gradient,
            layer.mask,
            budget=layer.budget,
            drop_fraction=layer.drop_fraction,
            ablation=ablation,
            ablation_mode=self.ablation_mode,
            min_neurons=self.min_neurons,
            frozen_rows=~layer.mask.any(dim=1) if self.permanent_ablation and ablation else None,
            groups=layer.groups,
        )

    def _threshold(self, handle: SparseWeight, index: int) -> float | None:
        """The ablation threshold of one block: none where ablation is forbidden, else its own, else the trainer's."""
        if handle.fqn in self.protected or not handle.record.site.blocks[index].ablatable:
            return None
        own = handle.record.ablation[index] if handle.record.ablation else None
        return self.ablation if own is None else own


def scale_dead_rows(gradient: Tensor, mask: Tensor) -> Tensor:
    """Bring magnified gradients of rows without any weight down to the level of the others.

    A dead row whose mean |g| exceeds that of every live row is scaled to the mean of the live ones. Batch
    normalisation exceeds it by far; without it hardly any row does, and nothing changes.

    Args:
        gradient: Dense gradient (n, F); values that are not finite count as 0.
        mask: Bool mask (n, F).

    Returns:
        The gradient itself, or a copy with scaled rows.

    Example:
        >>> gradient = torch.tensor([[1.0, -3.0], [30.0, 10.0], [1.0, 1.0]])
        >>> scale_dead_rows(gradient, torch.tensor([[True, False], [False, False], [False, False]])).tolist()
        [[1.0, -3.0], [3.0, 1.0], [1.0, 1.0]]
    """
    live = mask.any(dim=1)
    if bool(live.all()) or not bool(live.any()):
        return gradient
    rows = torch.linalg.vector_norm(gradient, 1, dim=1, dtype=torch.promote_types(gradient.dtype, torch.float32))
    if not bool(rows.isfinite().all()):
        odd = ~rows.isfinite()
        rows[odd] = gradient[odd].nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).abs().sum(dim=1, dtype=rows.dtype)
    magnified = ~live & (rows > rows[live].max())
    if not bool(magnified.any()):
        return gradient
    return gradient * torch.where(magnified, rows[live].mean() / rows, 1.0)[:, None]


def _check_ablation(name: str, value: float | None, mode: AblationMode) -> None:
    if value is None:
        return
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if mode == "fraction" and not (number and 0.0 <= value <= 1.0):
        raise TrainerError(f'{name} is {value!r}, but must lie in [0, 1]; for a count, use ablation_mode="absolute"')
    if mode == "absolute" and not (number and value >= 0 and float(value).is_integer()):
        raise TrainerError(f'{name} is {value!r}, but must be a whole number with ablation_mode="absolute"')
