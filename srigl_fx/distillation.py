"""A student that is trained to give what its teacher gives: ``distil``.

Owns the verb, and that a failure leaves the student as it was. It must not know what is compared, nor how masks are
kept.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from srigl_fx.compatibility import noted
from srigl_fx.distillation_loss import Autocast, DistillationLoss
from srigl_fx.errors import CaptureError, DistillationError
from srigl_fx.masks.records import sparse_weights
from srigl_fx.passes.example_inputs import Inputs, one_input
from srigl_fx.passes.wrappers import unwrapped
from srigl_fx.train.base import Trainer
from srigl_fx.train.static import Static

LEARNING_RATE = 5e-4
WARM_UP = 0.1  # of the steps
CLIP = 1.0  # the norm of all gradients


@dataclass(frozen=True)
class DistillationReport:
    """How a distillation went; ``str()`` is a line.

    Attributes:
        losses: The loss of each step, before its change of the weights.
    """

    losses: tuple[float, ...]

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return len(self.losses)

    def __str__(self) -> str:
        part = max(1, self.steps // 10)
        first, last = (math.fsum(found) / part for found in (self.losses[:part], self.losses[-part:]))
        return f"{self.steps} steps: loss {first:.4g} -> {last:.4g}, means of {part}"


@noted
def distil(
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Any],
    *,
    outputs: Callable[[Any], Any] | None = None,
    states: Sequence[str] = (),
    positions: Callable[..., Tensor] | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    steps: int | None = None,
    trainer: Callable[..., Trainer] | None = None,
    learning_rate: float = LEARNING_RATE,
    warm_up: float = WARM_UP,
    autocast: Autocast = None,
    progress: Callable[[int, int], object] | None = None,
) -> DistillationReport:
    """Train a ``student``, in place, to give what its ``teacher`` gives, so that what pruning lost comes back.

    Each step takes one batch, without labels. The optimizer is AdamW on all parameters that require gradients, with
    gradients clipped to a norm of 1 and a rate that rises to ``learning_rate`` and falls to nothing along a cosine, as
    the first of its betas falls from 0.95 to 0.85 and rises again (``OneCycleLR``).
    The student stays in the mode that it is in: in evaluation mode, with which the defaults were tried, dropout is off
    and batch normalisation keeps its statistics. Its masks stay, or change as a trainer says.

    Args:
        student: Any model; one with masks stays sparse.
        teacher: Another model with the same outputs, such as a copy from before pruning. It is never changed.
        batches: Inputs of both models, on their device: tensors, tuples or lists of arguments, or (args, kwargs).
        outputs: As for :class:`DistillationLoss`, like the next three.
        states: Names of modules whose outputs are compared, too.
        positions: Which positions count, where some are padding.
        loss: How far an output is from the teacher's.
        steps: How many; the batches begin anew where they are fewer. By default one for each batch, whose number must
            then be known.
        trainer: Makes the trainer, called with the student, its optimizer and ``total_steps``: such as ``sx.SRigL``,
            which exchanges weights on the way. By default :class:`srigl_fx.Static`, where there are masks. It is
            detached in the end.
        learning_rate: The largest.
        warm_up: The share of the steps in which the rate rises; these are two at least.
        autocast: As for :class:`DistillationLoss`.
        progress: Called after each step with how many are done, and of how many.

    Returns:
        The loss of each step.

    Raises:
        DistillationError: The teacher is the student or shares parameters that are trained, ``torch.inference_mode()``
            is on, there are no batches, the outputs do not match, a loss is not finite, or an argument is out of range.
        TrainerError: A trainer is attached already, or cannot be attached.

    In each case, and where anything else fails or interrupts it, the student has the weights, masks and buffers that it
    had. Its gradients are dropped.

    Source: Hinton, Vinyals & Dean, 2015, for a teacher's outputs as targets; TinyBERT (Jiao et al., EMNLP Findings
    2020) for states of layers.

    Example:
        >>> import copy, srigl_fx as sx
        >>> seed = torch.manual_seed(0)
        >>> teacher = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
        >>> student, batches = copy.deepcopy(teacher), [torch.randn(64, 64) for _ in range(8)]
        >>> found = sx.prune(student, batches, sparsity=0.75)
        >>> report = sx.distil(student, teacher, batches, steps=40)
        >>> report.steps, report.losses[-1] < report.losses[0]
        (40, True)
    """
    if torch.is_inference_mode_enabled():
        raise DistillationError("distil cannot run under torch.inference_mode(); call it outside")
    options: dict[str, Any] = {"outputs": outputs, "states": states, "positions": positions, "loss": loss}
    measure = DistillationLoss(teacher, **options, autocast=autocast)
    trained = _trained(student, teacher)
    steps = _steps(batches, steps)
    _check(trainer, learning_rate, warm_up, progress)
    losses = list[float]()
    with _undone_on_failure(student), torch.enable_grad():
        optimizer = torch.optim.AdamW(trained, lr=learning_rate, fused=True)
        attached = _attached(student, optimizer, trainer, steps)
        try:
            schedule = _schedule(optimizer, learning_rate, warm_up, steps)
            for args, kwargs in _inputs(batches, steps):
                found = measure(student, *args, **kwargs)
                losses.append(found.item())
                if not math.isfinite(losses[-1]):
                    raise _not_finite(losses, learning_rate)
                optimizer.zero_grad()
                found.backward()
                nn.utils.clip_grad_norm_(trained, CLIP)  # others may have gradients from before
                optimizer.step()
                if schedule is not None and len(losses) < steps:
                    schedule.step()
                if progress is not None:
                    progress(len(losses), steps)
        finally:
            if attached is not None:
                attached.detach()
            optimizer.zero_grad()
    return DistillationReport(tuple(losses))


def _attached(
    student: nn.Module, optimizer: torch.optim.Optimizer, trainer: Callable[..., Trainer] | None, steps: int
) -> Trainer | None:
    """What keeps the student's masks; nothing where it has none, unless a trainer is asked for."""
    if trainer is None and not sparse_weights(student):
        return None
    return (trainer or Static)(student, optimizer, total_steps=steps)


def _schedule(
    optimizer: torch.optim.Optimizer, learning_rate: float, warm_up: float, steps: int
) -> torch.optim.lr_scheduler.OneCycleLR | None:
    """One cycle over all steps; nothing for a single step, which it cannot be divided by."""
    if steps == 1:
        return None
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps, pct_start=min(1.0, max(warm_up, 2 / steps))
    )


def _inputs(batches: Iterable[Any], steps: int) -> Iterator[Inputs]:
    """So many inputs, the batches anew where they are fewer."""
    given = 0
    while given < steps:
        before = given
        for item in batches:
            try:
                found = one_input(item)
            except CaptureError as odd:
                raise DistillationError(f"batch {given - before}: {odd}") from odd
            yield found
            given += 1
            if given == steps:
                return
        if given == before:
            much = f"end after {given} of {steps} steps: give a list, or a loader" if given else "are empty: give some"
            raise DistillationError(f"the batches {much}")


def _steps(batches: Iterable[Any], steps: int | None) -> int:
    if isinstance(batches, Tensor | str | dict) or not isinstance(batches, Iterable):
        raise DistillationError(
            f"batches must be an iterable of inputs, not {type(batches).__name__}: pass [(x,)] for one tensor"
        )
    if isinstance(batches, Sized) and len(batches) == 0:
        raise DistillationError("the batches are empty: give some")
    if steps is None:
        if not isinstance(batches, Sized):
            raise DistillationError(f"{type(batches).__name__} does not say how many batches it has: give steps=")
        return len(batches)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise DistillationError(f"steps must be a whole number of at least 1, got {steps!r:.80}")
    return steps


def _trained(student: nn.Module, teacher: nn.Module) -> list[nn.Parameter]:
    """The student's parameters that require gradients."""
    if not isinstance(student, nn.Module):
        raise DistillationError(f"the student must be a module, not {type(student).__name__}")
    if student is teacher or unwrapped(student) is unwrapped(teacher):
        raise DistillationError("the teacher is the student: keep a copy.deepcopy of the model from before pruning")
    trained = {name: parameter for name, parameter in student.named_parameters() if parameter.requires_grad}
    if not trained:
        raise DistillationError("no parameter of the student requires gradients: there is nothing to train")
    taught = {id(parameter) for parameter in teacher.parameters()}
    if shared := [name for name, parameter in trained.items() if id(parameter) in taught]:
        raise DistillationError(
            f"the teacher shares {shared[0]} with the student, which would change both: give it a copy.deepcopy, or "
            "freeze that with requires_grad_(False)"
        )
    return list(trained.values())


def _check(trainer: object, learning_rate: object, warm_up: object, progress: object) -> None:
    for name, value in (("trainer", trainer), ("progress", progress)):
        if value is not None and not callable(value):
            raise DistillationError(f"{name} must be a function, got {value!r:.80}")
    if (
        isinstance(learning_rate, bool)
        or not isinstance(learning_rate, int | float)
        or not 0 < learning_rate < math.inf
    ):
        raise DistillationError(f"learning_rate must be a finite number above 0, got {learning_rate!r:.80}")
    if isinstance(warm_up, bool) or not isinstance(warm_up, int | float) or not 0 <= warm_up <= 1:
        raise DistillationError(f"warm_up must be a share of the steps in [0, 1], got {warm_up!r:.80}")


def _not_finite(losses: Sequence[float], learning_rate: float) -> DistillationError:
    hint = (
        f"take a learning_rate below {learning_rate:g}" if len(losses) > 1 else "look at the inputs and at both models"
    )
    return DistillationError(f"the loss of step {len(losses)} is {losses[-1]}: {hint}")


@contextmanager
def _undone_on_failure(model: nn.Module) -> Iterator[None]:
    """Give the model its parameters and buffers, masks among them, back where something is raised."""
    kept = [
        (module, name, tensor, tensor.detach().clone())
        for module in model.modules()
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    ]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for module, name, tensor, values in kept:
                tensor.copy_(values)
                if getattr(module, name) is not tensor:
                    setattr(module, name, tensor)
        raise
