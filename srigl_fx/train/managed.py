"""One masked weight under management: the hooks on it, and the dense gradient that is kept of it.

Owns what is known of a single parameter between two steps. It must not know the optimizer's steps, the schedule or
the other weights.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from srigl_fx.masks.projection import Projection, keep_only
from srigl_fx.masks.records import SparseWeight
from srigl_fx.masks.shards import Slices, as_shard, local
from srigl_fx.nn.effective import want_dense_gradient
from srigl_fx.train.untraced import untraced
from srigl_fx.train.young import FindCondensed, Young

# Marks that go where the content of a tensor goes: torch.utils.swap_tensors exchanges attributes along with it, while
# hooks stay behind. No weak reference would do, as tensors that have one cannot be swapped.
_HOOKED, _LEFT = "_srigl_fx_hooked", "_srigl_fx_left"
_tokens = itertools.count()


@dataclass
class ManagedWeight:
    """A masked weight, its hooks and its captured gradients.

    Attributes:
        handle: Where weight and mask are found.
        parameter: The Parameter object that carries the hook; None while the weight is frozen.
        slices: Which part of the weight this process holds; None where it holds all.
        dense: Dense gradient of the micro-batches of this step, where it is captured.
        total: Dense gradients of earlier steps of the capture window.
        anew: Whether the micro-batch at hand is the first of its step; a bool tensor where only the device knows.
        arrived: Whether a gradient has come through the hook since the last step.
        rounds: How often gradients have begun anew since the last step.
        weight_version: The weight's version as the last step left it.
        known_mask: The mask that weight, gradient and state are known to be zero off.
        mask_version: Its version then.
        states: The optimizer's state tensors that are known to be zero off the mask.
        projection: The mask in the form in which it is applied fastest.
        is_kept: Says of a gradient that arrives whether it is known to be zero off the mask.
        young: The weights that have grown not long ago, where their steps are counted.
        find_condensed: Gives the optimizer's state where it is kept of the kept weights alone.
    """

    handle: SparseWeight
    parameter: nn.Parameter | None = None
    slices: Slices | None = None
    dense: Tensor | None = None
    total: Tensor | None = None
    anew: bool | Tensor = True
    arrived: bool = False
    rounds: int = 0
    weight_version: int = -1
    known_mask: Tensor | None = None
    mask_version: int = -1
    states: tuple[Tensor, ...] = ()
    projection: Projection = field(default_factory=Projection)
    is_kept: Callable[[Tensor], bool] | None = None
    young: Young | None = None
    find_condensed: FindCondensed | None = None
    _token: int = field(default_factory=lambda: next(_tokens))
    _hook: RemovableHandle | None = None
    _early_hook: RemovableHandle | None = None

    @property
    def mask(self) -> Tensor:
        """The mask, as far as this process holds the weight."""
        return self.handle.mask if self.slices is None else self.handle.mask[self.slices]

    def own(self, tensor: Tensor) -> Tensor:
        """What this process holds of a tensor that is spread as the weight is."""
        return tensor if self.slices is None else local(tensor)

    def project_gradient(self) -> None:
        """Set what this process holds of ``.grad`` to zero off the mask, if there is one."""
        if (grad := self.handle.weight.grad) is not None:
            self.project(grad)
            self.leave(self.own(grad))

    def take_unseen(self, *, capture: bool) -> bool:
        """Keep a gradient that did not come through the hook, and say whether it is not zero off the mask.

        One that was written by hand, say, or by a backward pass that was compiled. This waits for the device.
        """
        grad = self.handle.weight.grad
        if grad is None or not bool((grad := self.own(grad)).any()):
            return False
        if capture and self.dense is None:
            self.dense = grad.clone()
        return bool((grad.ne(0) & ~self.mask).any())

    def project(self, tensor: Tensor) -> None:
        """Set what this process holds of the weight, or of a tensor spread like it, to zero off the mask."""
        mask = self.handle.mask
        if self.slices is None:
            self.projection(tensor, mask)
        else:
            keep_only(local(tensor), mask[self.slices])

    def knows_mask(self) -> bool:
        """Whether the mask is the one that was last projected to: nobody loaded or wrote another."""
        mask = self.handle.mask
        return mask is self.known_mask and mask._version == self.mask_version

    def know_mask(self) -> None:
        """Remember the mask as it is now."""
        self.known_mask = self.handle.mask
        self.mask_version = self.known_mask._version

    def leave(self, grad: Tensor) -> None:
        """Remember this process's part of ``.grad`` as it is now."""
        setattr(grad, _LEFT, (self._token, grad._version))

    def left_as(self, grad: Tensor, *, writes: int = 0) -> bool:
        """Whether ``grad`` is the tensor we last masked, written to so many times since."""
        return getattr(grad, _LEFT, None) == (self._token, grad._version - writes)

    @property
    def swapped(self) -> bool:
        """Whether the parameter has been given other content since it was hooked, for which no hook is called."""
        return self.parameter is not None and getattr(self.parameter, _HOOKED, None) != self._token

    def hook(self, on_gradient: Callable[[Tensor], None]) -> None:
        """Have ``on_gradient`` called with the parameter, as the owner holds it now, after each accumulation."""
        if self.handle.weight is not self.parameter:
            self.dense = self.total = None
        early = self._early_hook is not None
        self.unhook()
        self.parameter = self.handle.weight
        _revive_hooks(self.parameter)
        # A number of its own each time: a tensor that was swapped away and comes back has been hooked before.
        self._token = next(_tokens)
        setattr(self.parameter, _HOOKED, self._token)
        self._hook = self.parameter.register_post_accumulate_grad_hook(untraced(on_gradient))  # type: ignore[no-untyped-call]
        if early:
            self.look_early(True)

    def unhook(self) -> None:
        """Remove the hooks; gradients that were captured stay."""
        self.look_early(False)
        if self._hook is not None:
            self._hook.remove()
        if self.parameter is not None and not self.swapped:
            delattr(self.parameter, _HOOKED)
        self._hook = self.parameter = None

    def look_early(self, wanted: bool) -> None:
        """Look at ``.grad`` before each accumulation, or no longer: only captured gradients need it."""
        want_dense_gradient(self.handle.owner, wanted)
        if self._early_hook is not None:
            self._early_hook.remove()
            self._early_hook = None
        # fully_shard accumulates on its own, where no such hook is called.
        if wanted and self.slices is None and self.parameter is not None and self.parameter.requires_grad:
            self._early_hook = self.parameter.register_hook(untraced(self._before_gradient))  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _before_gradient(self, _: Tensor) -> None:
        """Decide whether the gradient that arrives joins those before it: that is, whether they are still there."""
        assert self.parameter is not None
        grad = self.parameter.grad
        if grad is None:
            self.anew = True
        elif self.left_as(grad):
            self.anew = False
        else:  # zeroed in place, or rewritten by data parallelism with what all processes have; no host waits to know
            self.anew = ~grad.any()

    @torch.no_grad()
    def take_gradient(self, parameter: Tensor, *, capture: bool) -> None:
        """Mask the gradient that was just accumulated; first keep it as it is where it is to be captured."""
        if parameter.grad is None or parameter is not self.parameter:
            return
        grad = self.own(parameter.grad)
        self.rounds += not self.left_as(grad, writes=1)
        self.arrived = True
        if capture:
            # After the first micro-batch .grad is masked(g1 + ...) + g: whole on the mask, only the newest term off it.
            anew = self.anew if self.slices is None else not self.left_as(grad, writes=1)
            if anew is True or self.dense is None:
                self.dense = grad.clone()
                if self.slices is not None:
                    # fully_shard cuts the gradients of a group from one tensor, whose version they share: a view made
                    # by .data has its own, and tells whether it was accumulated to.
                    parameter.grad = as_shard(grad.data, parameter)
                    grad = self.own(parameter.grad)
            else:
                torch.where(self.mask | anew, grad, self.dense + grad, out=self.dense)
        if grad.requires_grad:
            # Of backward(create_graph=True): a second backward needs the tensor as it is, and passes through the mask.
            with torch.enable_grad():
                parameter.grad = torch.where(self.handle.mask, parameter.grad, 0.0)
            grad = self.own(parameter.grad)
        elif self.is_kept is None or not self.is_kept(grad):
            self.project(parameter.grad)
        self.leave(grad)

    @torch.no_grad()
    def close_step(self, *, rescale: bool) -> None:
        """Add the gradient of the step that ends to those of earlier steps, at the scale that the optimizer saw.

        Args:
            rescale: A gradient scaler multiplies it by another factor from step to step: undo that. It cannot be told
                under data parallelism, where ``.grad`` is the mean of all processes.
        """
        dense, grad = self.dense, self.handle.weight.grad
        self.dense = None
        if dense is None:
            return
        if grad is not None and rescale:
            seen = self.own(grad).flatten()  # zero off the mask
            ratio = torch.dot(seen, seen) / torch.dot(seen, dense.flatten())
            dense.mul_(torch.where(ratio.isfinite() & ((ratio - 1).abs() > 1e-5), ratio, 1.0))
        self.total = dense if self.total is None else self.total.add_(dense)


def _revive_hooks(parameter: nn.Parameter) -> None:
    """Have hooks called for a parameter whose content may have been swapped.

    torch keeps the hooks in dicts beside the parameter, and tells the content of a dict when its first hook is
    registered: registering one more is not enough after a swap. The other tensor keeps calling the dict, too.
    """
    if (early := parameter._backward_hooks) is not None:
        parameter._backward_hooks = early
    if (late := parameter._post_accumulate_grad_hooks) is not None:
        parameter._post_accumulate_grad_hooks = late
