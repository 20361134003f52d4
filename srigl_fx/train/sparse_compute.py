"""Training steps that compute with the kept weights alone: forward, gradients and the optimizer's step.

Owns :class:`SparseCompute`: which masked weights take part, the forward of their layers, and what the optimizer sees
while it steps. It must not know schedules or how masks are chosen: it looks at the masks, and follows when they change.

Everything that can be seen stays as it is. Parameters, ``.grad`` and ``state_dict()`` are dense, zero off the masks.
:class:`SparseCompute` also holds a compact copy of the kept values and of their optimizer state. It reads parameters
and gradients anew wherever they matter, and does not trust the versions of tensors: fused optimizers, gradient scalers
and writes through ``.data`` change values without changing a version.
"""

import types
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from srigl_fx.errors import TrainerError
from srigl_fx.masks.optimizer_state import OptimizerState
from srigl_fx.masks.records import SparseWeight
from srigl_fx.masks.shards import is_sharded
from srigl_fx.nn.sparse_module import SparseModule, dense_class
from srigl_fx.train.base import Trainer
from srigl_fx.train.kept import KeptWeight
from srigl_fx.train.optimizer_state import ELEMENTWISE
from srigl_fx.train.untraced import untraced

_DENSEST = 0.3  # the share of kept weights above which nothing is gained


class _SparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, kept: KeptWeight, dense_gradient: bool
    ) -> Tensor:
        from srigl_fx.runtime.cpu.training_products import pack

        assert kept.pattern is not None
        ctx.kept, ctx.pattern, ctx.dense_gradient = kept, kept.pattern, dense_gradient
        ctx.save_for_backward(x, kept.values)  # of which it tells the version, as it is a view of what is stepped
        return kept.pattern.multiply(kept.values, pack(x), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from srigl_fx.runtime.cpu.training_products import pack

        x, values = ctx.saved_tensors
        kept: KeptWeight = ctx.kept
        packed = pack(grad)
        of_x = ctx.pattern.multiply_transposed(values, packed) if ctx.needs_input_grad[0] else None
        of_bias = grad.sum(0) if ctx.needs_input_grad[2] else None
        of_weight = None
        if ctx.needs_input_grad[1] and ctx.dense_gradient:
            of_weight = kept.handle.record.site.from_matrix(grad.t() @ x)
        elif ctx.needs_input_grad[1]:
            if kept.pattern is None or ctx.pattern is not kept.pattern:
                raise TrainerError(
                    f"the mask of {kept.handle.fqn} changed between forward and backward: compute the forward again"
                )
            of_weight = kept.dense_gradient(kept.pattern.value_gradient(pack(x), packed))
        return of_x, of_weight, of_bias, None, None


class SparseCompute:
    """Computes the training steps of a trainer's model from the kept weights; made by :func:`compute_sparse`.

    Attributes:
        layers: The masked weights whose layers compute forward and gradients from what they keep.
        dense: For every other masked weight, why its layer computes densely.
        steps_kept: Whether the optimizer steps the kept values alone.
    """

    def __init__(self, trainer: Trainer) -> None:
        """Attach; see :func:`compute_sparse`."""
        self._trainer, self._engine = trainer, trainer.engine
        self._engine.check_attached()
        if trainer in _ATTACHED:
            raise TrainerError("the trainer's steps are computed sparsely already: call detach() on that handle first")
        if self._engine.processes.group is not None:
            raise TrainerError("sparse steps are for one process: several exchange dense gradients in any case")
        self._optimizer = self._engine.optimizer
        self.steps_kept = type(self._optimizer) in ELEMENTWISE
        self.layers: list[str] = []
        self.dense: dict[str, str] = {}
        self._kept: list[KeptWeight] = []
        for handle in self._engine.weights:
            reason = _reason(handle)
            if not reason:
                self.layers.append(handle.fqn)
            else:
                self.dense[handle.fqn] = reason
            if not reason or (self.steps_kept and not _unfit(handle)):
                fresh = OptimizerState.of(self._optimizer).fresh(handle.weight) if self.steps_kept else {}
                self._kept.append(KeptWeight(handle, linear=not reason, fresh=fresh))
        if not self._kept:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self.dense.items())
            raise TrainerError(f"no masked weight that trains can be computed sparsely: {reasons}")
        for kept in self._kept:
            kept.refresh()
            self._engine.trust(kept.handle, kept.is_kept, kept.condensed)
            if kept.linear:
                _LAYERS[kept.handle.owner] = self, kept
                kept.handle.owner.forward = types.MethodType(forward, kept.handle.owner)
        _ATTACHED.add(trainer)
        self._swapped: list[tuple[list[Any], int, KeptWeight]] = []
        self._hooks: list[RemovableHandle] = []
        if self.steps_kept:
            after = self._optimizer.register_step_post_hook(untraced(self._after_step))
            # The engine's own hook looks at the weights after the step: they must be written back by then.
            hooks: Any = self._optimizer._optimizer_step_post_hooks
            hooks.move_to_end(after.id, last=False)
            self._hooks = [
                after,
                self._optimizer.register_step_pre_hook(untraced(self._before_step)),
                self._optimizer.register_state_dict_pre_hook(lambda _: self.write_state()),
                self._optimizer.register_load_state_dict_post_hook(lambda _: self._forget_state()),
            ]

    @property
    def capturing(self) -> bool:
        """Whether the step at hand needs dense gradients, for the masks."""
        return self._engine.window.capturing

    def write_state(self) -> None:
        """Give the optimizer's state back its dense form, as ``optimizer.state_dict()`` does."""
        self._recover()
        for kept in self._kept:
            if kept.state:
                kept.refresh()  # the masks may have changed since the last step
                self._optimizer.state[kept.handle.weight] = kept.give_state()

    def detach(self) -> None:
        """Compute densely again; a second call does nothing."""
        self.write_state()
        for hook in self._hooks:
            hook.remove()
        for kept in self._kept:
            self._engine.trust(kept.handle, None)
            if kept.linear:
                _LAYERS.pop(kept.handle.owner, None)
                vars(kept.handle.owner).pop("forward", None)
        self._hooks, self._kept = [], []
        _ATTACHED.discard(self._trainer)

    def __enter__(self) -> "SparseCompute":
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def _forget_state(self) -> None:
        for kept in self._kept:
            kept.state = {}

    def _recover(self) -> None:
        """After a step that failed halfway the parameters are what counts."""
        self._restore()

    def _restore(self) -> None:
        """Put the parameters back in their places."""
        for parameters, place, kept in self._swapped:
            parameters[place] = kept.handle.weight
            kept.state = dict(self._optimizer.state.pop(kept.stepped, {}))
            kept.stepped.grad = None
        self._swapped = []

    @torch.no_grad()
    def _before_step(self, _: Optimizer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Let the optimizer see the kept values, with their gradients and state, instead of the parameters."""
        if any(callable(given) for given in (*args[1:], *kwargs.values())):
            self.write_state()  # a closure makes gradients while the optimizer steps
            return
        self._recover()
        found = {id(kept.handle.weight): kept for kept in self._kept}
        for group in self._optimizer.param_groups:
            parameters = group["params"]
            for place, parameter in enumerate(parameters):
                kept = found.get(id(parameter))
                if kept is None or parameter.grad is None or group.get("differentiable"):
                    continue
                kept.refresh()
                if state := self._optimizer.state.pop(parameter, None):
                    kept.take_state(state)
                kept.stepped.grad = kept.kept_gradient(parameter.grad)
                if kept.state:
                    self._optimizer.state[kept.stepped] = kept.state
                parameters[place] = kept.stepped
                self._swapped.append((parameters, place, kept))

    def _after_step(self, *_: Any) -> None:
        stepped = [kept for _, _, kept in self._swapped]
        self._restore()
        for kept in stepped:
            kept.write_back()


_ATTACHED: "weakref.WeakSet[Trainer]" = weakref.WeakSet()
# The owners of the weights that are computed sparsely. A copy of a module is another key: it computes densely.
_LAYERS: "weakref.WeakKeyDictionary[nn.Module, tuple[SparseCompute, KeptWeight]]" = weakref.WeakKeyDictionary()


def forward(module: Any, x: Tensor) -> Tensor:
    """What takes the place of a linear layer's forward."""
    found = _LAYERS.get(module)
    plain = x.device.type == "cpu" and x.dtype is torch.float32 and not torch.is_autocast_enabled("cpu")
    if found is not None and plain and x.dim() and not torch.compiler.is_compiling():
        compute, kept = found
        kept.refresh()
        rows, columns = kept.handle.record.site.matrix_shape
        flat = x.reshape(-1, columns) if x.shape[-1] == columns else None
        if flat is not None and kept.pattern is not None and kept.pattern.pays(flat.shape[0]):
            y: Tensor = _SparseLinear.apply(flat, kept.handle.weight, module.bias, kept, compute.capturing)  # type: ignore[no-untyped-call]
            return y.reshape(*x.shape[:-1], rows)
    dense: Tensor = type(module).forward(module, x)
    return dense


def compute_sparse(trainer: Trainer) -> SparseCompute:
    """Compute the training steps of ``trainer``'s model with the kept weights alone, on the CPU.

    Masked linear layers compute their outputs and the gradients of their inputs from the kept weights, and gradients
    for these alone; the optimizer steps them alone. Only at steps whose gradients decide what grows is the weights'
    gradient dense. Weights, masks and optimizer state become what masked dense training makes of them, up to rounding.

    Layers of other kinds, in other precisions or under autocast compute densely, and so do batches at which that is
    faster. Optimizers that are not element by element step densely. While this is on, ``optimizer.state`` lacks the
    state of the masked weights, but ``optimizer.state_dict()`` has it.

    Args:
        trainer: A trainer that is attached to a model and its optimizer.

    Returns:
        A handle whose ``detach()`` ends it; also a context manager.

    Raises:
        TrainerError: The trainer was detached, its model trains in several processes, or it has no weight that can be
            computed so; nothing is changed then.

    Source: SRigL (Lasby et al., ICLR 2024) trains with masked dense products; sparse ones are left to future work.

    Example:
        >>> from srigl_fx import Static, sparsify
        >>> model = sparsify(nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256)), sparsity=0.95)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> with compute_sparse(Static(model, optimizer)) as sparse:
        ...     for _ in range(3):
        ...         optimizer.zero_grad()
        ...         model(torch.randn(64, 256)).square().mean().backward()
        ...         optimizer.step()
        >>> sparse.layers
        ['0.weight', '2.weight']
    """
    return SparseCompute(trainer)


def _unfit(handle: SparseWeight) -> str:
    """Why nothing at all can be gained from what a weight keeps, or ""."""
    weight = handle.weight
    if is_sharded(weight):
        return "spread over processes"
    if weight.device.type != "cpu":
        return f"on {weight.device}, not on the CPU"
    if not weight.is_contiguous():
        return "not contiguous in memory"
    kept = sum(handle.record.budgets) / weight.numel()
    return f"keeps {kept:.0%} of its weights" if kept > _DENSEST else ""


def _reason(handle: SparseWeight) -> str:
    """Why a weight's layer computes densely, or ""."""
    owner = handle.owner
    if unfit := _unfit(handle):
        return unfit
    if handle.weight.dtype is not torch.float32:
        return f"{handle.weight.dtype}, not float32"
    cls = dense_class(type(owner)) if isinstance(owner, SparseModule) else type(owner)
    transformers_linear = (cls.__module__, cls.__name__) == ("transformers.pytorch_utils", "Conv1D")
    if cls is NonDynamicallyQuantizableLinear:
        return "an attention computes with it itself"
    is_linear = handle.record.site.kind in ("linear", "linear_in_out") and handle.record.site.attr == "weight"
    if not is_linear or "forward" in vars(owner) or not (cls.forward is nn.Linear.forward or transformers_linear):
        return f"{handle.record.site.kind} in a {cls.__name__}, not a plain linear layer"
    return ""
