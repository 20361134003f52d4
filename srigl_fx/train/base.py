"""What all training methods share: following the schedule, postponing updates, saving and resuming.

Owns :class:`Trainer`, which counts optimizer steps and asks its subclass for new masks when an update is due. It must
not know how any method chooses them.
"""

import logging
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from srigl_fx.errors import TrainerError
from srigl_fx.masks.records import SparseWeight
from srigl_fx.train.engine import MaskEngine, check_attachable
from srigl_fx.train.schedules import captures_gradient, end_step, is_update_step
from srigl_fx.train.state import STATE_VERSION, check_layout, check_state, layout, plain, shape

_log = logging.getLogger(__name__)


class Trainer(ABC):
    """A training method, attached to a sparsified model and its optimizer.

    The training loop stays ordinary: every ``optimizer.step()`` keeps the model sparse, and every ``update_every``-th
    changes the masks, after the weights have moved.

    Attributes:
        model: The model.
        update_every: Optimizer steps between updates.
        end: Updates happen at steps below this one.
        auto: Whether updates happen within ``optimizer.step()``.
        last_update: The step of the last update, None before the first.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        total_steps: int | None,
        update_every: int = 1,
        stop_at: float = 0.0,
        grad_samples: int = 1,
        auto: bool = True,
    ) -> None:
        """Check everything, then attach; see the subclasses for the arguments."""
        check_attachable(model, optimizer)
        if total_steps is not None:
            check_count("total_steps", total_steps)
        check_count("update_every", update_every)
        check_count("grad_samples", grad_samples)
        check_share("stop_at", stop_at)
        if grad_samples > update_every:
            raise TrainerError(f"grad_samples is {grad_samples}, but only {update_every} steps lie between two updates")
        self.model = model
        self.update_every = update_every
        self.grad_samples = grad_samples
        self.end = 0 if total_steps is None else end_step(total_steps, stop_at)
        self.auto = auto
        self.last_update: int | None = None
        self._steps = 0
        self._overflows: Tensor | None = None
        self._due = False
        self._changed_at: int | None = None
        self._logged: set[str] = set()
        self._engine = MaskEngine(model, optimizer, self._after_step)
        self._prepare()

    @property
    def steps(self) -> int:
        """Completed optimizer steps, without those a gradient scaler skipped."""
        if self._overflows is not None:
            self._steps -= int(self._overflows)
            self._overflows = None
        return self._steps

    def step(self) -> bool:
        """Update the masks if that is due, and say whether the last optimizer step changed the topology.

        Needed after ``optimizer.step()`` with ``auto=False`` only; with ``auto=True`` it just answers.
        """
        if self._due and not self.auto:
            self._update()
            self._prepare()
        return self._changed_at == self.steps

    def detach(self) -> None:
        """Remove all hooks: the model keeps its masks, but nothing keeps the weights zero off them any more."""
        self._engine.detach()

    def state_dict(self, include_gradients: bool = False) -> dict[str, Any]:
        """What a resume needs besides the state of model and optimizer.

        Args:
            include_gradients: Also the gradients of the unfinished step, for a save between two micro-batches.
        """
        state: dict[str, Any] = {
            "version": STATE_VERSION,
            "method": type(self).__name__,
            "steps": self.steps,
            "last_update": self.last_update,
            "update_due": self._due,
            "weights": layout(self.model),
            "captured": self._engine.captured(inside_step=include_gradients),
        }
        if include_gradients:
            state["gradients"] = {
                plain(name): parameter.grad.clone()
                for name, parameter in self.model.named_parameters()
                if parameter.grad is not None
            }
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume, once model and optimizer have loaded theirs.

        Raises:
            TrainerError: The state is of another version, method or model; nothing is changed then.
            StructureError: The state is of another sparsity or structure; nothing is changed then.
        """
        check_state(state, type(self).__name__)
        check_layout(state["weights"], layout(self.model))
        gradients: dict[str, Tensor] = state.get("gradients", {})
        parameters = {plain(name): parameter for name, parameter in self.model.named_parameters()}
        if unknown := [name for name, grad in gradients.items() if shape(parameters.get(name)) != grad.shape]:
            raise TrainerError(f"the state holds gradients that fit no parameter of the model: {', '.join(unknown)}")
        self._steps, self._overflows = state["steps"], None
        self.last_update, self._due = state["last_update"], state["update_due"]
        self._changed_at = None
        for name, grad in gradients.items():
            parameters[name].grad = grad.to(parameters[name].device).clone()
        self._engine.refresh()
        self._prepare()
        self._engine.restore_captured(state["captured"])

    @abstractmethod
    def _new_masks(self, step: int, gradients: dict[str, Tensor]) -> list[tuple[SparseWeight, Tensor]]:
        """The masks after the update at ``step``, for the weights whose dense gradients are given by name."""

    def _after_step(self, overflow: Tensor | None) -> None:
        before = self._steps
        self._steps += 1
        if overflow is not None:
            # A fused optimizer skips the step itself: counted on the device, and read only where it matters.
            skipped = (overflow != 0).to(torch.int64)
            self._overflows = skipped if self._overflows is None else self._overflows + skipped
        if (self._engine.capturing or self._captures(self._steps)) and self.steps > before:
            self._due |= is_update_step(self.steps, every=self.update_every, end=self.end)
            self._due &= self.steps < self.end
            if not self._due:
                self._engine.keep_gradients()
            elif self.auto:
                self._update()
        self._prepare()

    def _captures(self, steps: int) -> bool:
        return captures_gradient(steps, every=self.update_every, end=self.end, samples=self.grad_samples)

    def _prepare(self) -> None:
        """Get ready for the gradients of the next step."""
        capturing = self._due or self._captures(self._steps)
        if not capturing:
            self._engine.drop_gradients()
        self._engine.capturing = capturing

    @torch.no_grad()
    def _update(self) -> None:
        """Change the masks, or leave the update due where the gradients do not allow it."""
        found = {handle.fqn: self._engine.gradient(handle) for handle in self._engine.weights}
        gradients = {name: gradient for name, gradient in found.items() if gradient is not None}
        infinite = [name for name, gradient in gradients.items() if not bool(torch.isfinite(gradient).all())]
        if infinite or not gradients:
            cause = "infinite" if infinite else "none"
            what = f"non-finite gradients, first of {infinite[0]}" if infinite else "no gradients"
            self._log_once(cause, "update at step %d postponed: %s", self.steps, what)
            self._engine.drop_gradients()
            return
        if without := [name for name in found if name not in gradients]:
            self._log_once("partial", "masks without a gradient stay at step %d: %s", self.steps, ", ".join(without))
        masks = self._new_masks(self.steps, gradients)
        changed = [(handle, mask) for handle, mask in masks if not torch.equal(handle.mask, mask)]
        for handle, mask in changed:
            self._engine.set_mask(handle, mask)
        if changed:
            self._changed_at = self.steps
        self.last_update, self._due = self.steps, False
        self._engine.drop_gradients()

    def _log_once(self, cause: str, message: str, *details: object) -> None:
        if cause not in self._logged:
            self._logged.add(cause)
            _log.warning(message, *details)


def check_count(name: str, value: object) -> None:
    """Require a whole number of at least 1.

    Example:
        >>> check_count("update_every", 100)
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise TrainerError(f"{name} is {value!r}, but must be a whole number of at least 1")


def check_share(name: str, value: object) -> None:
    """Require a number in [0, 1].

    Example:
        >>> check_share("stop_at", 0.75)
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
        raise TrainerError(f"{name} is {value!r}, but must be a number in [0, 1]")
