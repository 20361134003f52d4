"""The loss of a distillation: how far a student is from its teacher on one batch.

Owns what is compared and how. It must not know who trains.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from srigl_fx.errors import DistillationError
from srigl_fx.passes.wrappers import unwrapped

Autocast = torch.dtype | Literal["auto"] | None


def unexplained(found: Tensor, wanted: Tensor) -> Tensor:
    """The share of the variance of ``wanted`` that ``found`` misses: 0 where they are equal, 1 for the mean.

    Args:
        found: (N, ...), floating; the sums are those of float32.
        wanted: Of the same shape. Means are those over the N, or over all where there is but one; where ``wanted`` does
            not vary, its variance counts as 1.

    Returns:
        One number, float32.

    Example:
        >>> wanted = torch.tensor([[1.0], [3.0]])
        >>> unexplained(wanted, wanted).item(), unexplained(torch.full((2, 1), 2.0), wanted).item()
        (0.0, 1.0)
    """
    found, wanted = found.float(), wanted.float()
    mean = wanted.mean(dim=0) if wanted.dim() and len(wanted) > 1 else wanted.mean()
    spread = (wanted - mean).square().sum()
    return (found - wanted).square().sum() / torch.where(spread > 0, spread, 1.0)


class _Seen(NamedTuple):
    """What is compared of one model."""

    outputs: list[Tensor]
    states: list[Tensor]


class DistillationLoss:
    """How far a student is from its teacher on a batch, to be used as the loss in any training loop.

    Args:
        teacher: What is to be imitated. It is run in evaluation mode, without gradients, and is never changed.
        outputs: Picks what is compared from what a model returns: a function that gives a tensor, or several in a
            tuple, list or dict. By default all floating-point tensors are compared.
        states: Names of modules, the same in both models, whose outputs are compared, too: the first floating-point
            tensor that each returns.
        positions: Which positions count, where some are padding: a function of what the models are called with that
            gives a bool tensor of leading sizes, such as (samples, tokens). It holds for tensors with these leading
            sizes and at least one more.
        loss: How far an output (N, ...) of the student, the first argument, is from the teacher's, as one number; by
            default :func:`unexplained`, which states are always compared by.
        autocast: Compute both models in this type, by ``torch.autocast``; "auto" is bfloat16 where the student's
            processor multiplies it, which elsewhere takes several times as long as float32. By default what the
            caller's own ``torch.autocast`` says stays.

    The loss is the mean over the outputs plus that over the states.

    Raises:
        DistillationError: An argument is not what it should be, or the teacher has no module of a name in ``states``;
            when called: the student has none, or outputs differ in number or shape, or there are none.

    Example:
        >>> teacher = nn.Linear(3, 2)
        >>> loss = DistillationLoss(teacher)
        >>> loss(teacher, torch.ones(4, 3)).item()
        0.0
    """

    def __init__(
        self,
        teacher: nn.Module,
        *,
        outputs: Callable[[Any], Any] | None = None,
        states: Sequence[str] = (),
        positions: Callable[..., Tensor] | None = None,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        autocast: Autocast = None,
    ) -> None:
        """Remember the arguments, checked."""
        for name, value in (("outputs", outputs), ("positions", positions), ("loss", loss)):
            if value is not None and not callable(value):
                raise DistillationError(f"{name} must be a function, got {value!r:.80}")
        if not isinstance(teacher, nn.Module):
            raise DistillationError(f"the teacher must be a module, not {type(teacher).__name__}")
        if isinstance(states, str) or not all(isinstance(name, str) for name in states):
            raise DistillationError(f"states must be a list of names of modules, got {states!r:.80}")
        if autocast not in (None, "auto") and not (isinstance(autocast, torch.dtype) and autocast.is_floating_point):
            raise DistillationError(f'autocast must be a type such as torch.bfloat16, "auto" or None, got {autocast!r}')
        self.teacher = teacher
        self.outputs = outputs
        self.states = tuple(dict.fromkeys(states))
        self.positions = positions
        self.loss = unexplained if loss is None else loss
        self.autocast = autocast
        _modules(teacher, self.states, "teacher")

    def __call__(self, student: nn.Module, /, *args: Any, **kwargs: Any) -> Tensor:
        """The loss of one batch, given as the models take it: a tensor of one number, with the student's gradients."""
        device = next((parameter.device for parameter in student.parameters()), torch.device("cpu"))
        dtype = _fast_type(device) if self.autocast == "auto" else self.autocast
        # One that is not enabled would end the caller's.
        with nullcontext() if dtype is None else torch.autocast(device.type, dtype):
            with torch.no_grad(), _evaluating(self.teacher):
                wanted = self._seen(self.teacher, "teacher", args, kwargs)
            found = self._seen(student, "student", args, kwargs)
        self._check_alike(found, wanted)
        real = None if self.positions is None else self._checked_positions(args, kwargs)
        outputs, states = (
            [
                _number(measure(*(_chosen(tensor, real) for tensor in pair)))
                for pair in zip(*(getattr(seen, kind) for seen in (found, wanted)), strict=True)
            ]
            for kind, measure in (("outputs", self.loss), ("states", unexplained))
        )
        mean = torch.stack(outputs).mean()
        return torch.stack(states).mean() + mean if states else mean

    def _seen(self, model: nn.Module, who: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Seen:
        states = dict[str, Tensor]()

        def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
            def hook(module: nn.Module, given: Any, output: Any) -> None:
                tensors = _floating(output)
                if not tensors:
                    raise DistillationError(f"{name} of the {who} returns no floating-point tensor: leave it out")
                states[name] = tensors[0]

            return hook

        modules = _modules(model, self.states, who)
        hooks = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
        try:
            given = model(*args, **kwargs)
        finally:
            for handle in hooks:
                handle.remove()
        if silent := [name for name in modules if name not in states]:
            raise DistillationError(f"{silent[0]} of the {who} did not run: take it out of states")
        outputs = _floating(given if self.outputs is None else self.outputs(given))
        if not outputs:
            raise DistillationError(f"the {who} returns no floating-point tensor to compare: pick some with outputs=")
        return _Seen(outputs, [states[name] for name in modules])

    def _check_alike(self, found: _Seen, wanted: _Seen) -> None:
        if len(found.outputs) != len(wanted.outputs):
            raise DistillationError(
                f"the student returns {len(found.outputs)} floating-point tensors, the teacher {len(wanted.outputs)}: "
                "pick those that belong together with outputs="
            )
        names = (*(f"output {number}" for number in range(len(wanted.outputs))), *self.states)
        for name, one, other in zip(
            names, (*found.outputs, *found.states), (*wanted.outputs, *wanted.states), strict=True
        ):
            if one.shape != other.shape:
                raise DistillationError(
                    f"{name} is {tuple(one.shape)} of the student, {tuple(other.shape)} of the teacher: pick what is "
                    "compared with outputs= and states="
                )

    def _checked_positions(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        assert self.positions is not None
        real = self.positions(*args, **kwargs)
        if not isinstance(real, Tensor) or real.dtype is not torch.bool:
            kind = real.dtype if isinstance(real, Tensor) else type(real).__name__
            raise DistillationError(f"positions must give a tensor of bool, not {kind}")
        if not bool(real.any()):
            raise DistillationError("positions chooses none of a batch: leave such batches out")
        return real


def _number(loss: object) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        kind = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise DistillationError(f"loss must give a tensor of one number, not {kind}")
    return loss.reshape(())


def _chosen(tensor: Tensor, real: Tensor | None) -> Tensor:
    """A tensor without the positions that do not count, if it has them."""
    if real is None or tensor.dim() <= real.dim() or tensor.shape[: real.dim()] != real.shape:
        return tensor
    return tensor[real]


def _floating(value: Any) -> list[Tensor]:
    """The floating-point tensors of an output, in their order."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _modules(model: nn.Module, names: Iterable[str], who: str) -> dict[str, nn.Module]:
    inside = dict(unwrapped(model).named_modules())
    if missing := [name for name in names if name not in inside]:
        raise DistillationError(f"the {who} has no module {missing[0]!r}, which states= names")
    return {name: inside[name] for name in names}


def _fast_type(device: torch.device) -> torch.dtype | None:
    """Bfloat16, if the device multiplies it by instructions of its own."""
    if device.type == "cpu":
        can = torch.cpu.get_capabilities()
        return torch.bfloat16 if can.get("avx512_bf16") or can.get("amx_bf16") else None
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return None


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
