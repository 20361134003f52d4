"""What others do to weights and gradients past the engine's hooks, and what the log says of it.

Owns the notes of weights that were found off their masks, and the warnings, each cause once. It must not know hooks,
masks to come, or how what was found is put right.
"""

import logging
from collections.abc import Iterable

import torch
from torch import Tensor

from srigl_fx.train.managed import ManagedWeight

_log = logging.getLogger(__name__)

_LOOKS = 3  # how often gradients past the hooks are looked at outside of updates, as it makes the host wait

_WRITTEN = (
    "weights of %s were moved off the mask between two steps. An optimizer around the one that the trainer "
    "follows does that (Lookahead, TRAC, schedule-free): attach the trainer to the outermost, or call "
    "srigl_fx.masks.apply(model) after each of its steps. They are set to zero before each step now"
)
_WRITTEN_AROUND = (
    "weights of %s were moved off the mask between two steps. The %s around the %s takes no step hooks: if it is what "
    "moves them (schedule-free averages, say), no trainer can follow it, and an optimizer that does the same and is a "
    "torch.optim.Optimizer itself is needed. They are set to zero before each step now"
)
_MOVED = (
    "weights of %s are off the mask where %s asks for gradients inside its step, as it moves all weights there (noise, "
    "say): these gradients are not those of the sparse model. After the step the weights are zero off the mask again"
)
_UNSEEN = (
    "the gradient of %s came past the trainer's hooks: its content was swapped (torch.utils.swap_tensors), "
    "it was written by hand, or the backward pass was compiled as one graph. It is masked now, before the "
    "step; what looked at it before, such as clipping, saw entries off the mask"
)
_NO_STEPS = (
    "%d backward passes and no step of %s: masks are updated at its steps alone. Attach the trainer to the "
    "optimizer that steps"
)


class Strays:
    """What was noticed since the trainer was attached.

    Attributes:
        written: Whether weights were found to be moved off the mask between two steps.
    """

    def __init__(self, optimizer: object, given: object) -> None:
        """Notice nothing yet.

        Args:
            optimizer: Who the log says moves weights inside its steps: the one that is followed.
            given: What the trainer was attached to, the optimizer itself or something around it.
        """
        self.written = False
        self._optimizer, self._given = type(optimizer).__name__, type(given).__name__
        self._is_followed = given is optimizer
        self._looks = _LOOKS
        self._between: dict[str, Tensor] = {}
        self._inside: dict[str, Tensor] = {}
        self._logged: set[str] = set()

    @torch.no_grad()
    def note(self, managed: ManagedWeight, *, inside_step: bool = False) -> None:
        """Note whether a weight is off its mask, without waiting to know."""
        if managed.parameter is None or not managed.knows_mask():
            return
        stray = (managed.own(managed.handle.weight).ne(0) & ~managed.mask).any()
        notes, name = self._inside if inside_step else self._between, managed.handle.fqn
        notes[name] = notes.get(name, stray) | stray

    def tell(self, names: Iterable[str], *, wait: bool) -> None:
        """Say so where weights were noted off the mask: forward passes have seen them then.

        Args:
            names: Of the weights, in the order in which the first is named.
            wait: Whether the host may wait for a device; what lies in its own memory is read in any case.
        """
        notes = [*self._between.values(), *self._inside.values()]
        if not wait and any(flag.device.type != "cpu" for flag in notes):
            return
        if first := _first(self._between, names):
            self.written = True
            if self._is_followed:
                self._warn("written", _WRITTEN, first)
            else:
                self._warn("written", _WRITTEN_AROUND, first, self._given, self._optimizer)
        if first := _first(self._inside, names):
            self._warn("moved", _MOVED, first, self._optimizer)
        self._between, self._inside = {}, {}

    def take_unseen(self, managed: ManagedWeight, *, capture: bool) -> None:
        """Take a gradient that came past the hook into account; say so where others may have seen it unmasked."""
        if not capture and not self._looks:
            return
        self._looks = max(0, self._looks - 1)
        if managed.take_unseen(capture=capture):
            self._warn("unseen", _UNSEEN, managed.handle.fqn)

    def tell_of_steps(self, passes: int) -> None:
        """Say that backward passes were seen and no step."""
        self._warn("steps", _NO_STEPS, passes, self._optimizer)

    def _warn(self, cause: str, message: str, *details: object) -> None:
        if cause not in self._logged:
            self._logged.add(cause)
            _log.warning(message, *details)


def _first(notes: dict[str, Tensor], names: Iterable[str]) -> str:
    found = [name for name in names if name in notes]
    flags = torch.stack([notes[name].cpu() for name in found]).tolist() if found else []
    return next((name for name, flag in zip(found, flags, strict=True) if flag), "")
