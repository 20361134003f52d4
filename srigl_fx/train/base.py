"""What all training methods share: following the schedule, postponing updates, saving and resuming.

Owns :class:`Trainer`, which counts optimizer steps and asks its subclass for new masks when an update is due. It must
not know how any method chooses them.
"""

import inspect
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from srigl_fx.errors import TrainerError
from srigl_fx.masks.invariants import over_budget, verify
from srigl_fx.masks.records import SparseWeight, plain
from srigl_fx.masks.shards import shard_like
from srigl_fx.train.arguments import TrainerOptions, full_signature, read_options
from srigl_fx.train.attach import check_attachable
from srigl_fx.train.checks import check_count
from srigl_fx.train.engine import MaskEngine
from srigl_fx.train.optimizer_state import check_growable
from srigl_fx.train.schedules import captures_gradient, is_update_step
from srigl_fx.train.state import STATE_VERSION, check_layout, check_state, check_tensors, layout, note_threads
from srigl_fx.train.step_counts import StepCount

_log = logging.getLogger(__name__)


class Trainer(ABC):
    """A training method, attached to a sparsified model and its optimizer.

    The training loop stays ordinary: every ``optimizer.step()`` keeps the model sparse, and every ``update_every``-th
    changes the masks, after the weights have moved.

    Attributes:
        model: The model.
        schedule: When masks change, and how much of them, as it was asked for.
        update_every: Optimizer steps between updates.
        end: Updates happen at steps below this one.
        auto: Whether updates happen within ``optimizer.step()``.
        last_update: The step of the last update, None before the first.
    """

    needs_gradient: ClassVar[bool] = True
    """Whether updates look at the dense gradient; where they do not, none is captured."""
    gradient_decay: ClassVar[float | None] = None
    """Where given, updates see the gradients of all steps, those before the last one decayed by this at each step."""
    prunes_from_dense: ClassVar[bool] = False
    """Whether the method brings masks that keep more than their budget down to it."""
    grows: ClassVar[bool] = True
    """Whether weights can enter the masks, which then must begin as new ones do."""
    changes_masks: ClassVar[bool] = True
    """Whether there are updates at all."""
    unused: ClassVar[frozenset[str]] = frozenset()
    """The shared arguments that have no meaning for the method: accepted, so that methods can be exchanged."""

    __signature__: ClassVar[inspect.Signature]

    def __init_subclass__(cls, **options: Any) -> None:
        """Give the class the signature that its constructor spells out as ``**options`` alone."""
        super().__init_subclass__(**options)
        if "__init__" in vars(cls):
            cls.__signature__ = full_signature(cls.__init__)

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, *, total_steps: int | None, **options: Unpack[TrainerOptions]
    ) -> None:
        """Check everything, then attach; see the subclasses for the arguments."""
        given = read_options(type(self).__name__, options, self.unused)
        if total_steps is not None or self.changes_masks:
            check_count("total_steps", total_steps)
        self.update_every, self.end = 1, 0
        if total_steps is not None and self.changes_masks:
            self.update_every, self.end = given.schedule.interval(total_steps), given.schedule.end(total_steps)
        found = check_attachable(model, optimizer)
        if self.grows:
            check_growable(found.weights, found.optimizer)
        self._check_weights(model, found.weights)
        if not self.prunes_from_dense and (full := over_budget(model, found.weights)):
            raise TrainerError(
                f'the mask of {full[0]} keeps more weights than its budget, as sparsify(..., mask_init="dense") and '
                f"unfinished gradual pruning leave it: train with GMP, or sparsify anew for {type(self).__name__}"
            )
        self.model = model
        self.schedule = given.schedule
        self.grad_samples = given.schedule.grad_samples
        self.auto = given.auto
        self.step_count: StepCount = given.step_count
        self.last_update: int | None = None
        self._steps = 0
        self._overflows: Tensor | None = None
        self._due = self._near_update = False
        self._changed_at: int | None = None
        self._logged: set[str] = set()
        count_steps = self.grows and self.step_count == "weight"
        self._engine = MaskEngine(
            model, optimizer, self._after_step, self._settings(), count_steps=count_steps, found=found
        )
        self._prepare()

    @property
    def steps(self) -> int:
        """Completed optimizer steps, without those a gradient scaler skipped."""
        if self._overflows is not None:
            self._steps -= int(self._overflows)
            self._overflows = None
        return self._steps

    @property
    def engine(self) -> MaskEngine:
        """The hooks that keep the model sparse."""
        return self._engine

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

        Returns:
            Plain values, dicts and tensors. Tensors whose number changes as training goes on are in tuples, which
            torch.distributed.checkpoint restores whole, where it fills a dict only as far as it exists already. It
            refuses a folder without a key that is asked for: a key that is always there cannot be added any more.
        """
        # An update that waits for step() has its gradients inside the step that is done.
        captured = self._engine.window.copies(inside_step=include_gradients or self._due)
        state: dict[str, Any] = {
            "version": STATE_VERSION,
            "method": type(self).__name__,
            "steps": self.steps,
            "last_update": self.last_update,
            "update_due": self._due,
            "threads": torch.get_num_threads(),
            "weights": layout(self.model),
            "captured": tuple(
                (name, part, tensor) for name, parts in captured.items() for part, tensor in parts.items()
            ),
        }
        if self._engine.counts is not None:
            state["step_counts"] = self._engine.counts.saved(self._engine.whole)
        if extra := self._extra_state():
            state["extra"] = extra
        if include_gradients:
            state["gradients"] = tuple(
                (plain(name), grad)
                for name, grad in self._engine.window.unfinished(self.model.named_parameters()).items()
            )
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume, once model and optimizer have loaded theirs.

        A line is logged where the saved run computed with another number of threads, and the model is on the CPU.

        Raises:
            TrainerError: The state is of another version, method or model; nothing is changed then.
            StructureError: The state is of another sparsity or structure; nothing is changed then.
            InvariantError: The model's weights and masks are not those of such a run; nothing is changed then.
        """
        self._engine.check_attached()
        self.check_state_dict(state)
        verify(self.model)
        self._load_extra_state(state)
        self._steps, self._overflows = state["steps"], None
        self.last_update, self._due = state["last_update"], state["update_due"]
        self._changed_at = None
        if "gradients" in state:
            gradients = dict(state["gradients"])
            for name, parameter in self.model.named_parameters():
                grad = gradients.get(plain(name))
                parameter.grad = None if grad is None else shard_like(grad.to(parameter.device), parameter)
        self._engine.refresh()
        counts = state.get("step_counts")
        if self._engine.counts is not None:
            self._engine.counts.restore(counts or ())
            if counts is None and self.steps:
                _log.info("the saved run counted no steps of single weights: they begin with the count of their tensor")
        elif counts is not None:
            _log.info(
                "the saved run counted the steps of single weights, this trainer counts those of whole tensors: pass "
                'step_count="weight" to go on as it did'
            )
        self._prepare()
        captured: dict[str, dict[str, Tensor]] = {}
        for name, part, tensor in state["captured"]:
            captured.setdefault(name, {})[part] = tensor
        self._engine.window.restore(captured)
        self._engine.check_processes(steps=self.steps)
        note_threads(state, self.model)

    def check_state_dict(self, state: dict[str, Any]) -> None:
        """Check whether a state is one that :meth:`load_state_dict` can load, before the model has loaded its own.

        Raises:
            TrainerError: The state is of another version, method or model, or it is damaged.
            StructureError: The state is of another sparsity or structure.
        """
        check_state(state, type(self).__name__)
        check_layout(state["weights"], layout(self.model))
        check_tensors(state, self.model)

    def __repr__(self) -> str:
        shown = f"steps={self.steps}, last_update={self.last_update}, update_every={self.update_every}, end={self.end}"
        return f"{type(self).__name__}({shown})"

    def __deepcopy__(self, memo: dict[int, Any]) -> "Trainer":
        """A copy would follow the same optimizer's steps no more."""
        raise self._uncopyable("copied")

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Hooks cannot be pickled."""
        raise self._uncopyable("pickled")

    def _uncopyable(self, how: str) -> TrainerError:
        return TrainerError(
            f"a {type(self).__name__} cannot be {how}, since hooks tie it to its model and optimizer: copy those, "
            "attach a new one to them, and load this one's state_dict() into it"
        )

    @abstractmethod
    def _new_masks(self, step: int, gradients: dict[str, Tensor]) -> Iterable[tuple[SparseWeight, Tensor]]:
        """The masks after the update at ``step``, for weights whose dense gradients are given by name.

        Where a weight is spread over processes, each process is given its part of the gradient. Nothing is written yet:
        an error leaves all masks as they were. An implementation that communicates must finish that before it may
        raise, since the other processes would wait for it for ever.
        """

    def _check_weights(self, model: nn.Module, weights: Sequence[SparseWeight]) -> None:  # noqa: B027 - most take any
        """Require what the method needs of the model and its masked weights, before anything is attached."""

    def _settings(self) -> dict[str, Any]:
        """What must be the same on all processes that train the model."""
        plain = (bool, int, float, str, type(None))
        values = {name: value for name, value in vars(self).items() if name[0] != "_" and isinstance(value, plain)}
        schedule = {"drop_fraction": self.schedule.drop_fraction, "drop_schedule": self.schedule.shares()}
        return {"the method": type(self).__name__, **values, **schedule}

    def _extra_state(self) -> dict[str, Any]:
        """What the method itself must save."""
        return {}

    def _load_extra_state(self, state: dict[str, Any]) -> None:  # noqa: B027 - most methods have none
        """Load ``state["extra"]``, once :meth:`check_state_dict` found the state sound."""

    def _after_step(self, overflow: Tensor | None) -> None:
        before = self._steps
        self._steps += 1
        if overflow is not None:
            # A fused optimizer skips the step itself: counted on the device, and read only where it matters.
            skipped = (overflow != 0).to(torch.int64)
            self._overflows = skipped if self._overflows is None else self._overflows + skipped
        if (self._near_update or self._captures(self._steps)) and self.steps > before:
            self._due |= is_update_step(self.steps, every=self.update_every, end=self.end)
            # Pruning that was postponed must still meet the budgets; what regrows late would not train any more.
            self._due &= self.prunes_from_dense or self.steps < self.end
            if not self._due:
                self._engine.window.keep(self.gradient_decay or 1.0)
            elif self.auto:
                self._update()
        self._prepare()

    def _captures(self, steps: int) -> bool:
        """Whether the step after ``steps`` completed ones counts towards an update."""
        samples = self.update_every if self.gradient_decay else self.grad_samples
        return captures_gradient(steps, every=self.update_every, end=self.end, samples=samples)

    def _prepare(self) -> None:
        """Get ready for the gradients of the next step."""
        self._near_update = self._due or self._captures(self._steps)
        if not self._near_update:
            self._engine.window.drop()
        self._engine.watching = self._near_update
        self._engine.window.capturing = self._near_update and self.needs_gradient

    @torch.no_grad()
    def _update(self) -> None:
        """Change the masks, or leave the update due where the gradients do not allow it."""
        self._engine.refresh_if_changed()
        gradients = self._engine.window.join()
        flags = self._engine.processes.any_has([not _is_finite(grad) for grad in gradients.values()])
        infinite = [name for name, flag in zip(gradients, flags, strict=True) if flag]
        if infinite or (self.needs_gradient and not gradients):
            cause = "infinite" if infinite else "none"
            what = f"non-finite gradients, first of {infinite[0]}" if infinite else "no gradients"
            self._log_once(cause, "update at step %d postponed: %s", self.steps, what)
            self._engine.window.drop()
            return
        names = [handle.fqn for handle in self._engine.weights]
        if self.needs_gradient and (without := [name for name in names if name not in gradients]):
            self._log_once("partial", "masks without a gradient stay at step %d: %s", self.steps, ", ".join(without))
        # All are computed, on all processes, before the first is written: where one fails no mask changes anywhere.
        failure: Exception | None = None
        new: list[tuple[SparseWeight, Tensor]] = []
        try:
            new = list(self._new_masks(self.steps, gradients))
        except Exception as error:
            failure = error
        self._engine.processes.fail_together(failure, f"the mask update at step {self.steps}")
        self._engine.check_processes({handle.fqn: mask for handle, mask in new})
        for handle, mask in new:
            if not torch.equal(handle.mask, mask):
                self._engine.set_mask(handle, mask)
                self._changed_at = self.steps
        self.last_update, self._due = self.steps, False
        if self.gradient_decay:
            self._engine.window.keep(self.gradient_decay)
        else:
            self._engine.window.drop()

    def _log_once(self, cause: str, message: str, *details: object) -> None:
        if cause not in self._logged:
            self._logged.add(cause)
            _log.warning(message, *details)


def _is_finite(tensor: Tensor) -> bool:
    """Whether all entries are finite; NaN passes through both extremes, and no copy is made."""
    return not tensor.numel() or bool(torch.stack(tensor.aminmax()).isfinite().all())
