"""Which optimizer's steps are followed, and which of nested steps counts.

Owns the hooks on an optimizer and on those inside it. It must not know what happens at a step.

What people call an optimizer is often one around another. Some pass every call on (accelerate, Lightning) and have no
hooks of their own; some move the weights once more behind the inner step (Lookahead); some are stepped by other names
than ``step`` (the two steps of SAM), of which only the inner step is seen. So all of them are hooked, and of the steps
that run inside one another the outermost counts. That also holds for one optimizer whose ``step`` calls that of its
base class: torch calls the hooks in both if both classes have made instances.
"""

import sys
from collections.abc import Callable, Iterable, Mapping
from types import FrameType
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from srigl_fx.errors import TrainerError
from srigl_fx.train.untraced import untraced

StepHook = Callable[[Optimizer, tuple[Any, ...], dict[str, Any]], None]


def unwrap(optimizer: object) -> Optimizer:
    """The outermost optimizer at or inside ``optimizer`` that takes step hooks.

    Raises:
        TrainerError: There is none, or no single one.

    Example:
        >>> import torch
        >>> class Passing:
        ...     def __init__(self, optimizer):
        ...         self.optimizer = optimizer
        >>> unwrap(Passing(torch.optim.SGD([torch.zeros(2)], lr=0.1))).__class__.__name__
        'SGD'
    """
    found, seen = optimizer, {id(optimizer)}
    while not _takes_hooks(found):
        inner = [value for value in _attributes(found) if id(value) not in seen]
        if len(inner) != 1:
            raise TrainerError(_refusal(optimizer, inner))
        found = inner[0]
        seen.add(id(found))
    assert isinstance(found, Optimizer)
    return found


class StepHooks:
    """Calls what it is given before and after every step of an optimizer or of one inside it, the outermost only.

    Attributes:
        optimizers: Those that are followed: the given one, then those inside it that hold parameters of it.
    """

    def __init__(self, optimizer: Optimizer, before: StepHook, after: StepHook) -> None:
        self.optimizers = family(optimizer)
        self._before, self._after = before, after
        self._open: list[dict[str, Any]] = []  # the keyword arguments of the steps that run, which tell them apart
        self._frame: FrameType | None = None
        self._hooks: list[RemovableHandle] = []

    @property
    def running(self) -> bool:
        """Whether a step runs, so that the gradients that arrive are those of its closure."""
        return bool(self._open)

    def register(self) -> None:
        """Begin to follow the steps."""
        self._hooks = [
            hook
            for each in self.optimizers
            for hook in (
                each.register_step_pre_hook(untraced(self._enter)),
                each.register_step_post_hook(untraced(self._leave)),
            )
        ]

    def before_each(self, hook: StepHook) -> list[RemovableHandle]:
        """Have ``hook`` called before the steps of all of them, nested ones too; remove it by what is returned."""
        return [each.register_step_pre_hook(untraced(hook)) for each in self.optimizers]

    def after_each(self, hook: StepHook) -> list[RemovableHandle]:
        """Have ``hook`` called behind the steps of all of them, nested ones too; remove it by what is returned."""
        return [each.register_step_post_hook(untraced(hook)) for each in self.optimizers]

    def remove(self) -> None:
        """Follow no step any more; a second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._frame = None

    def _enter(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._frame is not None and not _is_running(self._frame):
            self._open.clear()  # that step ended in an error
        self._open.append(kwargs)
        if len(self._open) == 1:
            self._frame = _calling_frame()
            self._before(optimizer, args, kwargs)

    def _leave(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Steps inside this one that ended in an error are over, too. Where another hook exchanged the arguments, the
        # innermost has ended.
        own = [index for index, other in enumerate(self._open) if other is kwargs]
        del self._open[own[-1] if own else -1 :]
        if not self._open:
            self._frame = None
            self._after(optimizer, args, kwargs)


def _calling_frame() -> FrameType | None:
    """The frame of the step that has called one of our hooks; the compiler's own frames lie between."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__", "").startswith("torch._dynamo"):
        frame = frame.f_back
    return frame


def _is_running(frame: FrameType) -> bool:
    running: FrameType | None = sys._getframe(1)
    while running is not None and running is not frame:
        running = running.f_back
    return running is frame


def _takes_hooks(optimizer: object) -> bool:
    if not isinstance(optimizer, Optimizer):
        return False
    try:
        optimizer.register_step_pre_hook(lambda *_: None).remove()
    except AttributeError:  # a wrapper that does not call Optimizer.__init__
        return False
    return True


def _attributes(optimizer: object) -> list[object]:
    """The optimizers among the attributes of ``optimizer`` itself; what those wrap in turn is not looked at."""
    found = {id(value): value for value in getattr(optimizer, "__dict__", {}).values()}
    return [value for value in found.values() if isinstance(value, Optimizer)]


def family(optimizer: Optimizer) -> tuple[Optimizer, ...]:
    """The optimizer and those inside it that hold some of its parameters, each once.

    Example:
        >>> import torch
        >>> len(family(torch.optim.SGD([torch.zeros(2)], lr=0.1)))
        1
    """
    found: list[Optimizer] = [optimizer]
    held = _parameters(optimizer)
    for outer in found:  # grows as it is walked
        for inner in _attributes(outer):
            known = any(inner is other for other in found)
            if not known and isinstance(inner, Optimizer) and _takes_hooks(inner) and held & _parameters(inner):
                found.append(inner)
    return tuple(found)


def _parameters(optimizer: Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def _refusal(optimizer: object, inner: list[object]) -> str:
    kind = type(optimizer).__name__
    if inner:
        return (
            f"{kind} holds {len(inner)} optimizers and takes no step hooks, so that a trainer cannot follow its steps: "
            "pass the one that holds the masked weights"
        )
    if isinstance(optimizer, Optimizer):
        return (
            f"{kind} takes no step hooks, so that a trainer cannot follow its steps: call super().__init__(params, "
            "defaults) in its __init__, or pass the optimizer inside it"
        )
    inside = optimizer.values() if isinstance(optimizer, Mapping) else optimizer
    several = inside if isinstance(inside, Iterable) else getattr(optimizer, "optimizers", ())
    if isinstance(several, Iterable) and any(isinstance(each, Optimizer) for each in several):
        return (
            f"a trainer follows one torch.optim.Optimizer, and the {kind} holds several: pass the one that holds the "
            "masked weights, and leave the weights that another one trains dense with rules={name: None}"
        )
    return f"the optimizer must be a torch.optim.Optimizer, or hold one, not {kind}"
