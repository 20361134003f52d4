"""The mask engine: hooks that keep a model sparse while any optimizer trains it.

Owns the hooks on the optimizer, the weights under management (:mod:`srigl_fx.train.managed`), and what happens to
weight and optimizer state when a mask changes. It must not know schedules or update rules: a trainer asks for
gradients and sets masks.

The stored weight is exactly zero off its mask. Gradients are masked in place as soon as they are accumulated, so that
clipping and the optimizer only ever see masked ones. Weights and state are written only where something can have moved
them off the mask: an optimizer that is not known to work element by element, or anybody else who wrote to a tensor
since we last saw it, which its version tells. None of this waits for the device.
"""

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from srigl_fx.errors import TrainerError
from srigl_fx.masks.attached import attach, forget
from srigl_fx.masks.invariants import check_sound, values_off
from srigl_fx.masks.projection import keep_only
from srigl_fx.masks.records import SparseWeight, sparse_weights
from srigl_fx.masks.shards import held, is_sharded
from srigl_fx.train.attach import Attachable, check_attachable, check_held
from srigl_fx.train.distributed import gather, processes_of, reshard
from srigl_fx.train.managed import ManagedWeight
from srigl_fx.train.optimizer_state import MaskedState, keeps_zeros
from srigl_fx.train.state import layout
from srigl_fx.train.step_counts import StepCounts
from srigl_fx.train.stepping import StepHook, StepHooks
from srigl_fx.train.strays import Strays
from srigl_fx.train.window import GradientWindow
from srigl_fx.train.young import FindCondensed

_log = logging.getLogger(__name__)

_PATIENCE = 20  # backward passes, each for gradients of its own, after which a step should have come
_WARY = 6  # steps behind a change of masks at which weights are looked at: who keeps others writes them back then


class MaskEngine:
    """Keeps the masked weights of ``model`` sparse while ``optimizer`` trains them.

    Attributes:
        processes: Those that train the model together.
        window: The dense gradients that are captured for an update.
        counts: The steps of each weight since it grew, where they are counted.
        watching: Whether the host may wait before the next step to learn who else writes to the weights.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        on_step: Callable[[Tensor | None], None],
        settings: Mapping[str, Any] | None = None,
        *,
        count_steps: bool = False,
        found: Attachable | None = None,
    ) -> None:
        """Attach hooks to the model's masked parameters and to the optimizer; processes start from equal masks.

        Args:
            model: A sparsified model.
            optimizer: Holds all of its masked parameters that require gradients.
            on_step: Called after every optimizer step, once the weights are masked; its argument is the gradient
                scaler's overflow flag, where the optimizer was given one.
            settings: What else must be the same on all processes that train the model.
            count_steps: Weights that grow make the steps of their own age, not of their parameter's.
            found: What :func:`~srigl_fx.train.attach.check_attachable` said, where it was asked.

        Raises:
            TrainerError: Nothing is masked, a trainer is attached already, the optimizer does not fit, or another
                process trains something else; nothing is attached then.
            InvariantError: The model of a single process is not what its masks say.
        """
        found = check_attachable(model, optimizer) if found is None else found
        given, optimizer, handles = optimizer, found.optimizer, found.weights
        self.processes = processes_of(model)
        self.processes.check_agreed(
            {**{f"the weight {name}": value for name, value in layout(model, handles).items()}, **(settings or {})},
            "build, sparsify and train alike on all of them",
        )
        self._detached = self.watching = False
        self._model = model
        self._optimizer = optimizer
        self._states = MaskedState(optimizer)
        self._on_step = on_step
        self._managed: dict[str, ManagedWeight] = {}
        self.window = GradientWindow(model, self.processes, self._managed)
        self._hooks: list[RemovableHandle] = []
        self._steps = StepHooks(optimizer, self._before_step, self._after_step)
        self.counts = StepCounts(self._steps.optimizers, lambda: self._managed) if count_steps else None
        if self.counts is not None:
            self.counts.check(handles)
        self._wary = 0
        self._strays = Strays(optimizer, given)
        self.processes.copy_first([handle.mask for handle in handles])
        self.processes.copy_first([handle.weight for handle in handles if not is_sharded(handle.weight)])
        if self.processes.group is None:
            check_sound(model, handles)
        elif off := values_off(model, handles):
            # Each process may have drawn weights or masks of its own, and has just been given those of the first.
            _log.warning(
                "attaching a trainer sets %d weights off the masks of the first process to zero, the first in %s",
                sum(off.values()),
                next(iter(off)),
            )
        self._manage(handles)
        # Young weights are moved between the step and the look at the weights behind it.
        if self.counts is not None:
            self._hooks += self._steps.after_each(self.counts.after_step)
        self._steps.register()
        if self.counts is not None:
            self._hooks += self._steps.before_each(self.counts.before_step)

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer whose steps are followed, without what only passes calls on to it."""
        return self._optimizer

    @property
    def weights(self) -> list[SparseWeight]:
        """The masked weights that train, in registration order."""
        return [managed.handle for managed in self._managed.values() if managed.parameter is not None]

    @torch.no_grad()
    def refresh(self) -> None:
        """Look the weights up anew: hook Parameters that were replaced, added or unfrozen, and project everything.

        Raises:
            TrainerError: The engine was detached, or the optimizer does not hold a weight that trains.
        """
        self.check_attached()
        reshard(self._model)
        handles = sparse_weights(self._model)
        check_held(handles, self._optimizer)
        if self.counts is not None:
            self.counts.check(handles)
        self._manage(handles)

    def _manage(self, handles: Iterable[SparseWeight]) -> None:
        """Hook these weights, which are all that are masked, and project them."""
        self._elementwise = keeps_zeros(self._optimizer)
        self._parameters_held = _count_parameters(self._optimizer)
        known = dict(self._managed)
        self._managed.clear()  # others hold on to this very dict
        for handle in handles:
            managed = known.pop(handle.fqn, None) or ManagedWeight(handle)
            managed.handle, managed.slices = handle, held(handle.weight)
            self._managed[handle.fqn] = managed
            attach(handle.owner, self)
            if handle.weight.requires_grad and (handle.weight is not managed.parameter or managed.swapped):
                managed.hook(self._on_gradient(handle.fqn))
                managed.look_early(self.window.capturing)
            self._project(managed)
        for managed in known.values():
            managed.unhook()

    def check_attached(self) -> None:
        """Require that the engine was not detached.

        Raises:
            TrainerError: It was.
        """
        if self._detached:
            raise TrainerError("this trainer was detached: attach a new one, and load the state into that")

    def refresh_if_changed(self) -> None:
        """Look the weights up anew if masked ones were added to the model, or taken out of it."""
        if [handle.fqn for handle in sparse_weights(self._model)] != list(self._managed):
            self.refresh()

    def whole(self, handle: SparseWeight, own: Tensor) -> Tensor:
        """All of a tensor of a weight's shape, of which ``own`` is this process's part."""
        managed = self._managed[handle.fqn]
        return own if managed.slices is None else gather(own, handle.weight)

    def whole_weight(self, handle: SparseWeight) -> Tensor:
        """All of a weight's values, also where this process holds only a part."""
        return self.whole(handle, self._managed[handle.fqn].own(handle.weight).detach())

    def check_processes(self, new: Mapping[str, Tensor] | None = None, **agreed: int) -> None:
        """Require equal masks on all processes, also after those in ``new``, and equal values of what is given."""
        handles = sparse_weights(self._model)
        if agreed:
            self.processes.check_agreed(agreed, "load the same state on all of them")
        masks = [(new or {}).get(handle.fqn, handle.mask) for handle in handles]
        self.processes.check_same_masks([handle.fqn for handle in handles], masks)

    @torch.no_grad()
    def set_mask(self, handle: SparseWeight, new: Tensor) -> None:
        """Write a new mask, in place; entries that leave or enter it become zero in weight and optimizer state."""
        managed = self._managed[handle.fqn]
        staying, grown = new & handle.mask, new & ~handle.mask
        handle.mask.copy_(new)
        if managed.slices is not None:
            staying, grown = staying[managed.slices], grown[managed.slices]
        keep_only(own := managed.own(handle.weight), staying)
        managed.weight_version = own._version
        managed.project_gradient()
        self._states.begin_anew(managed, staying)
        managed.know_mask()
        self._wary = _WARY
        if self.counts is not None:
            self.counts.begin(managed, grown)

    def trust(
        self,
        handle: SparseWeight,
        is_kept: Callable[[Tensor], bool] | None,
        find_condensed: FindCondensed | None = None,
    ) -> None:
        """Leave gradients of a weight as they arrive where ``is_kept`` says that they are zero off the mask.

        ``find_condensed`` gives the optimizer's state of the weight while it is kept elsewhere.
        """
        managed = self._managed[handle.fqn]
        managed.is_kept, managed.find_condensed = is_kept, find_condensed

    def before_each_step(self, hook: StepHook) -> None:
        """Call a trainer's own hook, too, before every step of the optimizer and of those inside it."""
        self._hooks += self._steps.before_each(hook)

    def follow(self, owner: nn.Module) -> None:
        """Hook the parameters of ``owner`` again whose content was swapped."""
        for managed in self._managed.values():
            if managed.handle.owner is owner and managed.swapped and not self._detached:
                managed.hook(self._on_gradient(managed.handle.fqn))

    @torch.no_grad()
    def faults(self) -> Iterator[str]:
        """What keeps the engine from keeping the model sparse, and what it has left wrong; for ``verify``."""
        reshard(self._model)
        for name, managed in self._managed.items():
            if managed.swapped:
                yield (
                    f"{name}: the parameter was given other content (torch.utils.swap_tensors) since the trainer "
                    "hooked it, so that its gradients are not seen: call trainer.engine.refresh()"
                )
            weight = managed.handle.weight
            if managed.parameter is None or not managed.knows_mask():
                continue
            grad = None if weight.grad is None else managed.own(weight.grad)
            stray = grad is not None and managed.left_as(grad) and bool((grad.ne(0) & ~managed.mask).any())
            if stray or not managed.projection.fits(managed.handle.mask):
                yield (
                    f"{name}: the trainer masks by another mask than the model has: something wrote to the mask in a "
                    "way that its version does not tell (through .data, say). Write to the mask itself"
                )

    def detach(self) -> None:
        """Remove every hook; the model stays as it is, and so does what was captured. A second call does nothing."""
        self._detached = True
        for managed in self._managed.values():
            managed.unhook()
            forget(managed.handle.owner, self)
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._steps.remove()

    def _on_gradient(self, name: str) -> Callable[[Tensor], None]:
        """What a parameter's hook calls."""
        engine = weakref.ref(self)  # a strong reference would tie our life to the parameter's, not the optimizer's

        def on_gradient(parameter: Tensor) -> None:
            if (alive := engine()) is not None:
                managed = alive._managed[name]
                # Some show the optimizer other weights than the model: schedule-free averages, noise inside a step.
                if alive._wary == _WARY:
                    alive._strays.note(managed, inside_step=alive._steps.running)
                managed.take_gradient(parameter, capture=alive.window.capturing)
                if managed.rounds == _PATIENCE:
                    alive._strays.tell_of_steps(_PATIENCE)

        return on_gradient

    @torch.no_grad()
    def _before_step(self, *_: Any) -> None:
        """Project what changed since we last saw it: gradients (clipping, unscaling, noise), weights, masks."""
        if _count_parameters(self._optimizer) != self._parameters_held:
            self.refresh()
            return
        for managed in self._managed.values():
            weight = managed.handle.weight
            if weight is not managed.parameter and weight.requires_grad:
                self.refresh()
                return
            if not managed.knows_mask():
                self._project(managed)
                continue
            if managed.parameter is None:
                continue
            own, grad = managed.own(weight), weight.grad
            # Under backward(create_graph=True) a second backward needs the weight as it is: not without cause, then.
            watched = (self.watching or self._strays.written or self._wary > 0) and not (
                grad is not None and grad.requires_grad
            )
            if own._version != managed.weight_version or watched:
                self._strays.note(managed)
                managed.project(weight)
            if grad is not None and not managed.left_as(managed.own(grad)):
                if not managed.arrived:
                    self._strays.take_unseen(managed, capture=self.window.capturing)
                managed.project(grad)
            if managed.swapped:
                managed.hook(self._on_gradient(managed.handle.fqn))
        self._strays.tell(self._managed, wait=self.watching)

    @torch.no_grad()
    def _after_step(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._wary = max(0, self._wary - 1)
        closure = any(callable(given) for given in (*args[1:], *kwargs.values()))
        for managed in self._managed.values():
            managed.arrived, managed.rounds = False, 0
            if managed.parameter is not None:
                # A closure makes gradients, and may write to them, after the look at them before the step.
                grad = managed.parameter.grad if closure else None
                unseen = grad is not None and not managed.left_as(managed.own(grad))
                if self._states.mask(managed, force=not self._elementwise or unseen):
                    managed.project(managed.parameter)
                managed.weight_version = managed.own(managed.parameter)._version
        self._on_step(getattr(self._optimizer, "found_inf", None))

    def _project(self, managed: ManagedWeight) -> None:
        """Set weight, gradient and state to zero off the mask as it is now."""
        weight = managed.handle.weight
        managed.project(weight)
        # Not again before the first step: a second backward would miss the weight as it was.
        managed.weight_version = managed.own(weight)._version
        managed.project_gradient()
        self._states.mask(managed, force=True)
        managed.know_mask()
        if managed.young is not None:
            managed.young = managed.young.within(managed.mask)


def _count_parameters(optimizer: Optimizer) -> int:
    return sum(len(group["params"]) for group in optimizer.param_groups)
