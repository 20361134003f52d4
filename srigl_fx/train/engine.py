"""The mask engine: hooks that keep a model sparse while any optimizer trains it.

Owns the hooks on parameters and optimizer, the stash of dense gradients, and what happens to weight and optimizer
state when a mask changes. It must not know schedules or update rules: a trainer asks for gradients and sets masks.

The stored weight is exactly zero off its mask. Gradients are masked in place as soon as they are accumulated, so that
clipping and the optimizer only ever see masked ones; after each optimizer step the weights are masked again. None of
this waits for the device.
"""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from srigl_fx.errors import TrainerError
from srigl_fx.masks.records import SparseWeight, sparse_weights

# Given masked gradients, these keep zero state at zero; of others nothing is assumed.
_ELEMENTWISE = frozenset(
    {
        torch.optim.SGD,
        torch.optim.Adam,
        torch.optim.AdamW,
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.Adamax,
        torch.optim.RMSprop,
        torch.optim.Adagrad,
        torch.optim.Adadelta,
    }
)

# The integer type of each element size in bytes.
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# Owner module of a masked weight -> the engine attached to it. A copy of the module is another key: it has no trainer.
_ATTACHED: "weakref.WeakKeyDictionary[nn.Module, weakref.ref[MaskEngine]]" = weakref.WeakKeyDictionary()


@dataclass
class _Managed:
    """One masked weight under management.

    Attributes:
        handle: Where weight and mask are found.
        parameter: The Parameter object that carries the hook; None while the weight is frozen.
        hook: The hook's handle.
        dense: Dense gradient of the micro-batches of this step, where it is captured.
        total: Dense gradients of earlier steps of the capture window.
        grad: The ``.grad`` tensor as it was left after the last micro-batch.
        version: Its version then.
        states: The optimizer's state tensors that are known to be zero off the mask.
    """

    handle: SparseWeight
    parameter: nn.Parameter | None = None
    hook: RemovableHandle | None = None
    dense: Tensor | None = None
    total: Tensor | None = None
    grad: "weakref.ref[Tensor] | None" = None
    version: int = -1
    states: tuple[Tensor, ...] = ()


class MaskEngine:
    """Keeps the masked weights of ``model`` sparse while ``optimizer`` trains them.

    Attributes:
        capturing: Whether the gradients to come are kept before they are masked.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, on_step: Callable[[Tensor | None], None]) -> None:
        """Attach hooks to the model's masked parameters and to the optimizer.

        Args:
            model: A sparsified model.
            optimizer: Holds all of its masked parameters that require gradients.
            on_step: Called after every optimizer step, once the weights are masked; its argument is the gradient
                scaler's overflow flag, where the optimizer was given one.

        Raises:
            TrainerError: Nothing is masked, a trainer is attached already, or the optimizer does not fit; nothing is
                attached then.
        """
        check_attachable(model, optimizer)
        self.capturing = False
        self._model = model
        self._optimizer = optimizer
        self._on_step = on_step
        self._managed: dict[str, _Managed] = {}
        self._hooks: list[RemovableHandle] = []
        self.refresh()
        self._hooks += [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    @property
    def weights(self) -> list[SparseWeight]:
        """The masked weights that train, in registration order."""
        return [managed.handle for managed in self._managed.values() if managed.parameter is not None]

    @torch.no_grad()
    def refresh(self) -> None:
        """Look the weights up anew: hook Parameters that were replaced or unfrozen, and project everything."""
        known = self._managed
        self._managed = {}
        for handle in sparse_weights(self._model):
            managed = known.pop(handle.fqn, None) or _Managed(handle)
            managed.handle = handle
            self._managed[handle.fqn] = managed
            _ATTACHED[handle.owner] = weakref.ref(self)
            self._rehook(managed)
            _keep_only(handle.weight, handle.mask)
            if handle.weight.grad is not None:
                _keep_only(handle.weight.grad, handle.mask)
            self._mask_states(managed, handle.mask, force=True)
        for managed in known.values():
            _unhook(managed)

    def gradient(self, handle: SparseWeight) -> Tensor | None:
        """The dense gradient captured for a weight, of its shape and summed over the window; None if there was none."""
        managed = self._managed[handle.fqn]
        if managed.total is None or managed.dense is None:
            return managed.dense if managed.total is None else managed.total
        return managed.total + managed.dense

    def keep_gradients(self) -> None:
        """Close a step inside a longer capture window: its gradients are added to those of the earlier steps."""
        for managed in self._managed.values():
            managed.total = self.gradient(managed.handle)
            managed.dense = None

    def drop_gradients(self) -> None:
        """Forget all captured gradients."""
        for managed in self._managed.values():
            managed.dense = managed.total = managed.grad = None

    @torch.no_grad()
    def set_mask(self, handle: SparseWeight, new: Tensor) -> None:
        """Write a new mask, in place; entries that leave or enter it become zero in weight and optimizer state."""
        staying = new & handle.mask
        handle.mask.copy_(new)
        _keep_only(handle.weight, staying)
        if handle.weight.grad is not None:
            _keep_only(handle.weight.grad, new)
        self._mask_states(self._managed[handle.fqn], staying, force=True)

    def detach(self) -> None:
        """Remove every hook; the model stays as it is. A second call does nothing."""
        for managed in self._managed.values():
            _unhook(managed)
            if (attached := _ATTACHED.get(managed.handle.owner)) is not None and attached() is self:
                del _ATTACHED[managed.handle.owner]
        for hook in self._hooks:
            hook.remove()
        self._managed, self._hooks = {}, []

    def captured(self, *, inside_step: bool) -> dict[str, dict[str, Tensor]]:
        """Copies of the captured gradients, by weight; those of an unfinished step only where asked for."""
        return {
            managed.handle.record.site.fqn: {
                name: tensor.clone()
                for name, tensor in (("total", managed.total), ("dense", managed.dense if inside_step else None))
                if tensor is not None
            }
            for managed in self._managed.values()
        }

    @torch.no_grad()
    def restore_captured(self, captured: dict[str, dict[str, Tensor]]) -> None:
        """The inverse of :meth:`captured`, once ``.grad`` is what it was."""
        for managed in self._managed.values():
            weight, saved = managed.handle.weight, captured.get(managed.handle.record.site.fqn, {})
            managed.total, managed.dense = (
                saved[name].to(weight.device).clone() if name in saved else None for name in ("total", "dense")
            )
            if managed.dense is not None and weight.grad is not None:
                managed.grad, managed.version = weakref.ref(weight.grad), weight.grad._version

    def _rehook(self, managed: _Managed) -> None:
        weight = managed.handle.weight
        if weight is managed.parameter or not weight.requires_grad:
            return
        _unhook(managed)
        # A strong reference would tie the engine's life to the parameter's instead of the optimizer's.
        engine, name = weakref.ref(self), managed.handle.fqn

        def on_gradient(parameter: Tensor) -> None:
            if (alive := engine()) is not None:
                alive._on_gradient(alive._managed[name], parameter)

        managed.parameter = weight
        managed.hook = weight.register_post_accumulate_grad_hook(on_gradient)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _on_gradient(self, managed: _Managed, parameter: Tensor) -> None:
        grad = parameter.grad
        if grad is None:
            return
        mask = managed.handle.mask
        if self.capturing:
            # After the first micro-batch .grad is masked(g1 + ...) + g: whole on the mask, only the newest term off it.
            # One in-place addition since we last saw it is accumulation; anything else (a new tensor, one zeroed in
            # between) starts anew.
            before = managed.grad() if managed.grad is not None else None
            if managed.dense is not None and before is grad and grad._version == managed.version + 1:
                torch.where(mask, grad, managed.dense + grad, out=managed.dense)
            else:
                managed.dense = grad.clone()
        _keep_only(grad, mask)
        if self.capturing:
            managed.grad, managed.version = weakref.ref(grad), grad._version

    @torch.no_grad()
    def _before_step(self, *_: Any) -> None:
        for managed in self._managed.values():
            weight = managed.handle.weight
            if weight is not managed.parameter and weight.requires_grad:
                _check_held(self._model, self._optimizer)
                self.refresh()
                return

    @torch.no_grad()
    def _after_step(self, *_: Any) -> None:
        for managed in self._managed.values():
            if managed.parameter is not None:
                _keep_only(managed.parameter, managed.handle.mask)
                self._mask_states(managed, managed.handle.mask, force=type(self._optimizer) not in _ELEMENTWISE)
        self._on_step(getattr(self._optimizer, "found_inf", None))

    def _mask_states(self, managed: _Managed, keep: Tensor, *, force: bool) -> None:
        """Zero the optimizer state where ``keep`` is False: always if ``force``, else only state tensors new to us."""
        states = self._optimizer.state.get(managed.handle.weight, {})
        tensors = tuple(value for value in states.values() if isinstance(value, Tensor) and value.shape == keep.shape)
        same = len(tensors) == len(managed.states) and all(a is b for a, b in zip(tensors, managed.states, strict=True))
        if force or not same:
            for tensor in tensors:
                _keep_only(tensor, keep)
            managed.states = tensors


def detach_from(model: nn.Module) -> None:
    """Remove the hooks of every trainer attached to ``model`` or a part of it.

    Example:
        >>> detach_from(nn.Linear(3, 2))
    """
    for engine in _engines(model):
        engine.detach()


def _engines(model: nn.Module) -> list[MaskEngine]:
    references = (_ATTACHED.get(handle.owner) for handle in sparse_weights(model))
    found = {id(engine): engine for reference in references if reference and (engine := reference()) is not None}
    return list(found.values())


def _keep_only(tensor: Tensor, keep: Tensor) -> None:
    """Set ``tensor`` to zero, in place, where ``keep`` is False.

    By an integer product of the bits: a NaN becomes zero too, and it takes less than half the time of masked_fill_.
    """
    bits = _BITS[tensor.element_size()]
    tensor.view(bits).mul_(keep.to(bits))


def _unhook(managed: _Managed) -> None:
    if managed.hook is not None:
        managed.hook.remove()
    managed.parameter = managed.hook = managed.dense = managed.total = managed.grad = None


def check_attachable(model: nn.Module, optimizer: object) -> None:
    """Check that a trainer may attach to ``model`` and ``optimizer``, and touch neither.

    Raises:
        TrainerError: Nothing is masked, a trainer is attached already, or the optimizer is not one whose steps masks
            can follow, or does not hold the masked parameters.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> check_attachable(layer, torch.optim.SGD(layer.parameters(), lr=0.1))
        Traceback (most recent call last):
        srigl_fx.errors.TrainerError: Linear has no mask-managed weight: call srigl_fx.sparsify(model) first
    """
    if not isinstance(model, nn.Module) or not sparse_weights(model):
        raise TrainerError(f"{type(model).__name__} has no mask-managed weight: call srigl_fx.sparsify(model) first")
    if not isinstance(optimizer, Optimizer):
        raise TrainerError(f"the optimizer must be a torch.optim.Optimizer, not {type(optimizer).__name__}")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TrainerError(
            "LBFGS evaluates a closure many times in one step and keeps a history that masks cannot follow: "
            "use SGD, Adam, AdamW or another optimizer that takes one gradient a step"
        )
    if _engines(model):
        raise TrainerError(
            "a trainer is attached to this model already: call .detach() on it, or srigl_fx.train.detach_from(model), "
            "before attaching another one"
        )
    _check_held(model, optimizer)


def _check_held(model: nn.Module, optimizer: Optimizer) -> None:
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [
        handle.fqn for handle in sparse_weights(model) if handle.weight.requires_grad and id(handle.weight) not in held
    ]
    if missing:
        raise TrainerError(
            f"the optimizer does not hold {_some(missing)}: create it from model.parameters() of this very model, "
            "after anything that replaces parameters (load_state_dict(..., assign=True), a copy), or freeze the "
            "weights with requires_grad_(False)"
        )


def _some(names: Iterable[str], most: int = 5) -> str:
    """The first few of ``names``, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more
