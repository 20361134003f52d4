"""The dense gradients of one update: captured over a window of steps, averaged over processes, saved and restored.

Owns when a window is open and what is kept in it; each weight keeps its own gradient
(:mod:`srigl_fx.train.managed`). It must not know schedules, hooks or masks.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from srigl_fx.masks.records import SparseWeight
from srigl_fx.masks.shards import part
from srigl_fx.train.distributed import Processes, reshard
from srigl_fx.train.managed import ManagedWeight


class GradientWindow:
    """What has been captured of the gradients of the masked weights of ``model``."""

    def __init__(self, model: nn.Module, processes: Processes, managed: Mapping[str, ManagedWeight]) -> None:
        """Begin with nothing; ``managed`` are the weights by name, which the engine keeps up to date."""
        self._model = model
        self._processes = processes
        self._managed = managed
        self._capturing = self._open = False

    @property
    def capturing(self) -> bool:
        """Whether the gradients to come are kept before they are masked."""
        return self._capturing

    @capturing.setter
    def capturing(self, value: bool) -> None:
        if value != self._capturing:
            self._capturing = value
            for managed in self._managed.values():
                managed.look_early(value)

    def gradient(self, handle: SparseWeight) -> Tensor | None:
        """This process's dense gradient of its part of a weight, summed over the window; None if none was captured."""
        managed = self._managed[handle.fqn]
        if managed.total is None or managed.dense is None:
            return managed.dense if managed.total is None else managed.total
        return managed.total + managed.dense

    @torch.no_grad()
    def join(self) -> dict[str, Tensor]:
        """The captured dense gradients by weight, averaged over the processes; of its part of each in this one."""
        reshard(self._model)
        training = [managed for managed in self._managed.values() if managed.parameter is not None]
        for managed in training:
            managed.close_step(rescale=not self._processes.averages)
        captured = self._processes.any_has([managed.total is not None for managed in training])
        for managed in (managed for managed, anywhere in zip(training, captured, strict=True) if anywhere):
            assert managed.parameter is not None
            own = torch.zeros_like(managed.own(managed.parameter)) if managed.total is None else managed.total
            managed.total = self._processes.mean(own)
        return {managed.handle.fqn: managed.total for managed in training if managed.total is not None}

    def unfinished(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
        """Copies of the gradients of an unfinished step, as all processes together have them."""
        reshard(self._model)
        named = dict(parameters)
        return self._processes.shared({name: parameter.grad for name, parameter in named.items()}, named)

    def keep(self, decay: float = 1.0) -> None:
        """Close a step inside a longer capture window: its gradients join the earlier ones, times ``decay``."""
        self._open = True
        for managed in self._managed.values():
            managed.close_step(rescale=not self._processes.averages)
            if managed.total is not None and decay != 1.0:
                managed.total.mul_(decay)

    def drop(self) -> None:
        """Forget all captured gradients."""
        self._open = False
        for managed in self._managed.values():
            managed.dense = managed.total = None

    def copies(self, *, inside_step: bool) -> dict[str, dict[str, Tensor]]:
        """Copies of the captured gradients, by weight; those of an unfinished step only where asked for.

        They are whole and averaged over the processes, so that any number of processes can resume.
        """
        reshard(self._model)
        names = (("total",) if self._open else ()) + (("dense",) if inside_step and self._capturing else ())
        found: dict[str, dict[str, Tensor]] = {managed.handle.key: {} for managed in self._managed.values()}
        for name in names:  # where there are none, as most of the time, nothing is communicated
            captured = {fqn: getattr(managed, name) for fqn, managed in self._managed.items()}
            likes = {fqn: managed.handle.weight for fqn, managed in self._managed.items()}
            for fqn, gradient in self._processes.shared(captured, likes).items():
                found[self._managed[fqn].handle.key][name] = gradient
        return found

    @torch.no_grad()
    def restore(self, captured: dict[str, dict[str, Tensor]]) -> None:
        """The inverse of :meth:`copies`, once ``.grad`` is what it was."""
        self._open = any("total" in saved for saved in captured.values())
        for managed in self._managed.values():
            weight, saved = managed.handle.weight, captured.get(managed.handle.key, {})
            managed.total, managed.dense = (
                part(saved[name], weight).to(weight.device).clone() if name in saved else None
                for name in ("total", "dense")
            )
            if managed.dense is not None and weight.grad is not None:
                managed.leave(managed.own(weight.grad))
