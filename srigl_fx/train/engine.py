"""The mask engine: hooks that keep a model sparse while any optimizer trains it.

Owns the hooks on parameters and optimizer, the stash of dense gradients, and what happens to weight and optimizer
state when a mask changes. It must not know schedules or update rules: a trainer asks for gradients and sets masks.

The stored weight is exactly zero off its mask. Gradients are masked in place as soon as they are accumulated, so that
clipping and the optimizer only ever see masked ones. Weights and state are written only where something can have moved
them off the mask: an optimizer that is not known to work element by element, or anybody else who wrote to a tensor
since we last saw it, which its version tells. None of this waits for the device.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from srigl_fx.errors import TrainerError
from srigl_fx.masks.projection import Projection, keep_only
from srigl_fx.masks.records import SparseWeight, sparse_weights
from srigl_fx.masks.shards import Slices, as_shard, held, is_sharded, local, part
from srigl_fx.train.distributed import check_wrapping, gather, processes_of, reshard
from srigl_fx.train.state import layout

# Given masked gradients, these keep zero weights and zero state at zero; of others nothing is assumed.
_ELEMENTWISE = frozenset(
    {
        torch.optim.SGD,
        torch.optim.Adam,
        torch.optim.AdamW,
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.RMSprop,
        torch.optim.Adagrad,
        torch.optim.Adadelta,
    }
)

# Owner module of a masked weight -> the engine attached to it. A copy of the module is another key: it has no trainer.
_ATTACHED: "weakref.WeakKeyDictionary[nn.Module, weakref.ref[MaskEngine]]" = weakref.WeakKeyDictionary()


@dataclass
class _Managed:
    """One masked weight under management.

    Attributes:
        handle: Where weight and mask are found.
        parameter: The Parameter object that carries the hook; None while the weight is frozen.
        hook: The hook's handle.
        early_hook: The handle of the hook that looks at ``.grad`` before accumulation; while gradients are captured.
        slices: Which part of the weight this process holds; None where it holds all.
        dense: Dense gradient of the micro-batches of this step, where it is captured.
        total: Dense gradients of earlier steps of the capture window.
        anew: Whether the micro-batch at hand is the first of its step; a bool tensor where only the device knows.
        grad: This process's part of ``.grad`` as it was left after the last micro-batch.
        version: Its version then.
        weight_version: The weight's version as the last step left it.
        states: The optimizer's state tensors that are known to be zero off the mask.
        projection: The mask in the form in which it is applied fastest.
    """

    handle: SparseWeight
    parameter: nn.Parameter | None = None
    hook: RemovableHandle | None = None
    early_hook: RemovableHandle | None = None
    slices: Slices | None = None
    dense: Tensor | None = None
    total: Tensor | None = None
    anew: bool | Tensor = True
    grad: "weakref.ref[Tensor] | None" = None
    version: int = -1
    weight_version: int = -1
    states: tuple[Tensor, ...] = ()
    projection: Projection = field(default_factory=Projection)

    @property
    def mask(self) -> Tensor:
        """The mask, as far as this process holds the weight."""
        return self.handle.mask if self.slices is None else self.handle.mask[self.slices]

    def own(self, tensor: Tensor) -> Tensor:
        """What this process holds of a tensor that is spread as the weight is."""
        return tensor if self.slices is None else local(tensor)

    def project(self, tensor: Tensor) -> None:
        """Set what this process holds of the weight, or of a tensor spread like it, to zero off the mask."""
        mask = self.handle.mask
        if self.slices is None:
            self.projection(tensor, mask)
        else:
            keep_only(local(tensor), mask[self.slices])

    @torch.no_grad()
    def before_gradient(self, _: Tensor) -> None:
        """Decide whether the gradient that arrives joins those before it: that is, whether they are still there."""
        assert self.parameter is not None
        grad = self.parameter.grad
        if grad is None:
            self.anew = True
        elif self.left_as(grad):
            self.anew = False
        else:  # zeroed in place, or rewritten by data parallelism with what all processes have; no host waits to know
            self.anew = ~grad.any()

    def leave(self, grad: Tensor) -> None:
        """Remember ``grad`` as it is now."""
        self.grad, self.version = weakref.ref(grad), grad._version

    def left_as(self, grad: Tensor, *, writes: int = 0) -> bool:
        """Whether ``grad`` is the tensor we last masked, written to so many times since."""
        return self.grad is not None and self.grad() is grad and grad._version == self.version + writes


class MaskEngine:
    """Keeps the masked weights of ``model`` sparse while ``optimizer`` trains them.

    Attributes:
        processes: Those that train the model together.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        on_step: Callable[[Tensor | None], None],
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """Attach hooks to the model's masked parameters and to the optimizer; processes start from equal masks.

        Args:
            model: A sparsified model.
            optimizer: Holds all of its masked parameters that require gradients.
            on_step: Called after every optimizer step, once the weights are masked; its argument is the gradient
                scaler's overflow flag, where the optimizer was given one.
            settings: What else must be the same on all processes that train the model.

        Raises:
            TrainerError: Nothing is masked, a trainer is attached already, the optimizer does not fit, or another
                process trains something else; nothing is attached then.
        """
        check_attachable(model, optimizer)
        self.processes = processes_of(model)
        self.processes.check_agreed(
            {**{f"the weight {name}": value for name, value in layout(model).items()}, **(settings or {})},
            "build, sparsify and train alike on all of them",
        )
        self._capturing = self._window_open = False
        self._model = model
        self._optimizer = optimizer
        self._on_step = on_step
        self._managed: dict[str, _Managed] = {}
        self._hooks: list[RemovableHandle] = []
        handles = sparse_weights(model)
        self.processes.copy_first([handle.mask for handle in handles])
        self.processes.copy_first([handle.weight for handle in handles if not is_sharded(handle.weight)])
        self.refresh()
        self._hooks += [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    @property
    def capturing(self) -> bool:
        """Whether the gradients to come are kept before they are masked."""
        return self._capturing

    @capturing.setter
    def capturing(self, value: bool) -> None:
        if value != self._capturing:
            self._capturing = value
            for managed in self._managed.values():
                self._hook_early(managed)

    @property
    def weights(self) -> list[SparseWeight]:
        """The masked weights that train, in registration order."""
        return [managed.handle for managed in self._managed.values() if managed.parameter is not None]

    @torch.no_grad()
    def refresh(self) -> None:
        """Look the weights up anew: hook Parameters that were replaced or unfrozen, and project everything."""
        reshard(self._model)
        known = self._managed
        self._managed = {}
        for handle in sparse_weights(self._model):
            managed = known.pop(handle.fqn, None) or _Managed(handle)
            managed.handle, managed.slices = handle, held(handle.weight)
            self._managed[handle.fqn] = managed
            _ATTACHED[handle.owner] = weakref.ref(self)
            self._rehook(managed)
            managed.project(handle.weight)
            if handle.weight.grad is not None:
                managed.project(handle.weight.grad)
            self._mask_states(managed, managed.project, force=True)
        for managed in known.values():
            _unhook(managed)

    def gradient(self, handle: SparseWeight) -> Tensor | None:
        """This process's dense gradient of its part of a weight, summed over the window; None if none was captured."""
        managed = self._managed[handle.fqn]
        if managed.total is None or managed.dense is None:
            return managed.dense if managed.total is None else managed.total
        return managed.total + managed.dense

    @torch.no_grad()
    def join_gradients(self) -> dict[str, Tensor]:
        """The captured dense gradients by weight, averaged over the processes; of its part of each in this one."""
        reshard(self._model)
        training = [managed for managed in self._managed.values() if managed.parameter is not None]
        for managed in training:
            self._join(managed)
        captured = self.processes.any_has([managed.total is not None for managed in training])
        for managed in (managed for managed, anywhere in zip(training, captured, strict=True) if anywhere):
            assert managed.parameter is not None
            own = torch.zeros_like(managed.own(managed.parameter)) if managed.total is None else managed.total
            managed.total = self.processes.mean(own)
        return {managed.handle.fqn: managed.total for managed in training if managed.total is not None}

    def whole(self, handle: SparseWeight, own: Tensor) -> Tensor:
        """All of a tensor of a weight's shape, of which ``own`` is this process's part."""
        managed = self._managed[handle.fqn]
        return own if managed.slices is None else gather(own, handle.weight)

    def whole_weight(self, handle: SparseWeight) -> Tensor:
        """All of a weight's values, also where this process holds only a part."""
        return self.whole(handle, self._managed[handle.fqn].own(handle.weight).detach())

    def gradients(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
        """Copies of the gradients of an unfinished step, as all processes together have them."""
        reshard(self._model)
        named = dict(parameters)
        return self.processes.shared({name: parameter.grad for name, parameter in named.items()}, named)

    def check_processes(self, **agreed: int) -> None:
        """Require equal masks on all processes, and equal values of what is given."""
        handles = sparse_weights(self._model)
        if agreed:
            self.processes.check_agreed(agreed, "load the same state on all of them")
        self.processes.check_same_masks([handle.fqn for handle in handles], [handle.mask for handle in handles])

    def keep_gradients(self, decay: float = 1.0) -> None:
        """Close a step inside a longer capture window: its gradients join the earlier ones, times ``decay``."""
        self._window_open = True
        for managed in self._managed.values():
            self._join(managed)
            if managed.total is not None and decay != 1.0:
                managed.total.mul_(decay)

    @torch.no_grad()
    def _join(self, managed: _Managed) -> None:
        """Add the gradient of the step that ends to those of earlier steps, at the scale that the optimizer saw.

        A gradient scaler multiplies it by another factor from step to step. Under data parallelism ``.grad`` is the
        mean of all processes, which does not tell by how much this one's gradient was scaled: there it stays scaled.
        """
        dense, grad = managed.dense, managed.handle.weight.grad
        managed.dense = None
        if dense is None:
            return
        if grad is not None and not self.processes.averages:
            seen = managed.own(grad).flatten()  # zero off the mask
            ratio = torch.dot(seen, seen) / torch.dot(seen, dense.flatten())
            dense.mul_(torch.where(ratio.isfinite() & ((ratio - 1).abs() > 1e-5), ratio, 1.0))
        managed.total = dense if managed.total is None else managed.total.add_(dense)

    def drop_gradients(self) -> None:
        """Forget all captured gradients."""
        self._window_open = False
        for managed in self._managed.values():
            managed.dense = managed.total = managed.grad = None

    @torch.no_grad()
    def set_mask(self, handle: SparseWeight, new: Tensor) -> None:
        """Write a new mask, in place; entries that leave or enter it become zero in weight and optimizer state."""
        managed = self._managed[handle.fqn]
        staying = new & handle.mask
        handle.mask.copy_(new)
        if managed.slices is not None:
            staying = staying[managed.slices]
        keep_only(managed.own(handle.weight), staying)
        if handle.weight.grad is not None:
            managed.project(handle.weight.grad)
        self._mask_states(managed, lambda state: keep_only(managed.own(state), staying), force=True)

    def adopt(self, hook: RemovableHandle) -> None:
        """Remove a trainer's own hook, too, when the engine is detached."""
        self._hooks.append(hook)

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
        """Copies of the captured gradients, by weight; those of an unfinished step only where asked for.

        They are whole and averaged over the processes, so that any number of processes can resume.
        """
        reshard(self._model)
        names = (("total",) if self._window_open else ()) + (("dense",) if inside_step and self._capturing else ())
        found: dict[str, dict[str, Tensor]] = {managed.handle.key: {} for managed in self._managed.values()}
        for name in names:  # where there are none, as most of the time, nothing is communicated
            captured = {fqn: getattr(managed, name) for fqn, managed in self._managed.items()}
            likes = {fqn: managed.handle.weight for fqn, managed in self._managed.items()}
            for fqn, gradient in self.processes.shared(captured, likes).items():
                found[self._managed[fqn].handle.key][name] = gradient
        return found

    @torch.no_grad()
    def restore_captured(self, captured: dict[str, dict[str, Tensor]]) -> None:
        """The inverse of :meth:`captured`, once ``.grad`` is what it was."""
        self._window_open = any("total" in saved for saved in captured.values())
        for managed in self._managed.values():
            weight, saved = managed.handle.weight, captured.get(managed.handle.key, {})
            managed.total, managed.dense = (
                part(saved[name], weight).to(weight.device).clone() if name in saved else None
                for name in ("total", "dense")
            )
            if managed.dense is not None and weight.grad is not None:
                managed.leave(managed.own(weight.grad))

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
        self._hook_early(managed)

    def _hook_early(self, managed: _Managed) -> None:
        """Look at ``.grad`` before each accumulation where gradients are captured; never for nothing."""
        if managed.early_hook is not None:
            managed.early_hook.remove()
            managed.early_hook = None
        weight = managed.parameter
        # fully_shard accumulates on its own, where no such hook is called.
        if self._capturing and managed.slices is None and weight is not None and weight.requires_grad:
            managed.early_hook = weight.register_hook(managed.before_gradient)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _on_gradient(self, managed: _Managed, parameter: Tensor) -> None:
        grad = parameter.grad
        if grad is None:
            return
        grad = managed.own(grad)
        if self._capturing:
            # After the first micro-batch .grad is masked(g1 + ...) + g: whole on the mask, only the newest term off it.
            anew = managed.anew if managed.slices is None else not managed.left_as(grad, writes=1)
            if anew is True or managed.dense is None:
                managed.dense = grad.clone()
                if managed.slices is not None:
                    # fully_shard cuts the gradients of a group from one tensor, whose version they share: a view made
                    # by .data has its own, and tells whether it was accumulated to.
                    parameter.grad = as_shard(grad.data, parameter)
                    grad = managed.own(parameter.grad)
            else:
                torch.where(managed.mask | anew, grad, managed.dense + grad, out=managed.dense)
        assert parameter.grad is not None
        managed.project(parameter.grad)
        managed.leave(grad)

    @torch.no_grad()
    def _before_step(self, *_: Any) -> None:
        """Project what somebody wrote to since we last saw it: gradients (clipping, unscaling, noise) and weights."""
        for managed in self._managed.values():
            weight = managed.handle.weight
            if weight is not managed.parameter and weight.requires_grad:
                reshard(self._model)
                _check_held(self._model, self._optimizer)
                self.refresh()
                return
            if managed.parameter is None:
                continue
            own = managed.own(weight)
            if own._version != managed.weight_version:
                managed.project(weight)
            grad = weight.grad
            if grad is not None and not managed.left_as(managed.own(grad)):
                managed.project(grad)

    @torch.no_grad()
    def _after_step(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        anywhere = type(self._optimizer) not in _ELEMENTWISE
        closure = any(callable(given) for given in (*args[1:], *kwargs.values()))
        for managed in self._managed.values():
            if managed.parameter is not None:
                # A closure makes gradients, and may write to them, after the look at them before the step.
                grad = managed.parameter.grad if closure else None
                unseen = grad is not None and not managed.left_as(managed.own(grad))
                if self._mask_states(managed, managed.project, force=anywhere or unseen):
                    managed.project(managed.parameter)
                managed.weight_version = managed.own(managed.parameter)._version
        self._on_step(getattr(self._optimizer, "found_inf", None))

    def _mask_states(self, managed: _Managed, project: Callable[[Tensor], None], *, force: bool) -> bool:
        """Project the optimizer state, and say whether anything was written.

        Always if ``force``, else only where there are state tensors new to us.
        """
        states, shape = self._optimizer.state.get(managed.handle.weight, {}), managed.handle.mask.shape
        tensors = tuple(value for value in states.values() if isinstance(value, Tensor) and value.shape == shape)
        same = len(tensors) == len(managed.states) and all(a is b for a, b in zip(tensors, managed.states, strict=True))
        if force or not same:
            for tensor in tensors:
                project(tensor)
            managed.states = tensors
        return force or not same


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


def _unhook(managed: _Managed) -> None:
    for hook in (managed.hook, managed.early_hook):
        if hook is not None:
            hook.remove()
    managed.hook = managed.early_hook = None
    managed.parameter = managed.dense = managed.total = managed.grad = None


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
    check_wrapping(model)
    _check_held(model, optimizer)


def _check_held(model: nn.Module, optimizer: Optimizer) -> None:
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [
        handle.fqn for handle in sparse_weights(model) if handle.weight.requires_grad and id(handle.weight) not in held
    ]
    if missing:
        raise TrainerError(
            f"the optimizer does not hold {_some(missing)}: create it from model.parameters() of this very model, "
            "after anything that replaces parameters (load_state_dict(..., assign=True), fully_shard, a copy). A "
            "trainer follows one optimizer: leave the weights that another one trains dense with rules={name: None}, "
            "and freeze those that none trains with requires_grad_(False)"
        )


def _some(names: Iterable[str], most: int = 5) -> str:
    """The first few of ``names``, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more
