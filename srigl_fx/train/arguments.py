"""The arguments that all training methods share.

Owns their names, types, defaults and meanings, so that no method repeats them in its constructor. It must not know
models, optimizers or what a method makes of an argument.
"""

import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields, replace
from typing import Any, TypedDict, Unpack, cast

from srigl_fx.errors import TrainerError
from srigl_fx.train.schedules import DropSchedule, Schedule
from srigl_fx.train.step_counts import DEFAULT_STEP_COUNT, StepCount, check_step_count


class TrainerOptions(TypedDict, total=False):
    """The keyword arguments that all methods take; each may be left out.

    Attributes:
        update_every: Optimizer steps between updates; by default a share of ``total_steps``
            (:func:`~srigl_fx.train.schedules.default_interval`).
        drop_fraction: Share of the weights replaced at first, 0.3 by default; it falls as ``drop_schedule`` says.
        stop_at: Share of the steps after which the masks stay as they are, 0.75 by default.
        grad_samples: Optimizer steps whose dense gradients count towards an update: the last ones before it; 1 by
            default.
        drop_schedule: "cosine", "constant", "linear", "inverse_power" or a function: see
            :class:`~srigl_fx.train.schedules.Schedule`.
        schedule: All five of these in one object, in their place.
        auto: Update within ``optimizer.step()``, which is the default; otherwise call ``trainer.step()`` after it.
        step_count: Whose optimizer steps a weight that has grown counts: those of its "tensor", as optimizers do, or
            its own ("weight"). docs/methods.md, "First steps of grown weights".
    """

    update_every: int | None
    drop_fraction: float
    stop_at: float
    grad_samples: int
    drop_schedule: DropSchedule
    schedule: Schedule | None
    auto: bool
    step_count: StepCount


_OF_SCHEDULE: dict[str, Any] = {field.name: field.default for field in fields(Schedule)}
DEFAULTS: dict[str, Any] = {**_OF_SCHEDULE, "schedule": None, "auto": True, "step_count": DEFAULT_STEP_COUNT}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The shared arguments of one trainer, with the defaults in place of those that were left out."""

    schedule: Schedule
    auto: bool
    step_count: StepCount


def read_options(method: str, options: TrainerOptions, unused: Collection[str] = ()) -> Arguments:
    """Check the shared arguments and put the defaults in place of those that are missing, or that are not used.

    Args:
        method: The method's name, for errors.
        options: What was given.
        unused: The arguments that the method only accepts; what they say is not looked at.

    Raises:
        TypeError: There is no such argument.
        TrainerError: A value is out of range, or a schedule is given along with what it replaces.

    Example:
        >>> read_options("RigL", {"update_every": 50}).schedule.update_every
        50
        >>> read_options("RigL", {"update_evry": 50})
        Traceback (most recent call last):
        TypeError: RigL.__init__() got an unexpected keyword argument 'update_evry'
    """
    if unknown := [name for name in options if name not in DEFAULTS]:
        raise TypeError(f"{method}.__init__() got an unexpected keyword argument {unknown[0]!r}")
    given = {name: value for name, value in options.items() if name not in unused}
    schedule = given.get("schedule")
    loose = {name: value for name, value in given.items() if name in _OF_SCHEDULE}
    if schedule is None:
        schedule = Schedule(**cast("dict[str, Any]", loose))
    elif not isinstance(schedule, Schedule):
        raise TrainerError(f"schedule is {schedule!r}, but must be a srigl_fx.train.Schedule")
    elif loose:
        raise TrainerError(
            f"schedule and {', '.join(loose)} are given, but the schedule says all of that: pass "
            f"schedule=dataclasses.replace(schedule, {next(iter(loose))}=...)"
        )
    else:
        schedule = replace(schedule, **{name: _OF_SCHEDULE[name] for name in unused if name in _OF_SCHEDULE})
    step_count = cast("StepCount", given.get("step_count", DEFAULTS["step_count"]))
    check_step_count(step_count)
    return Arguments(schedule=schedule, auto=cast("bool", given.get("auto", DEFAULTS["auto"])), step_count=step_count)


def full_signature(constructor: Callable[..., None]) -> inspect.Signature:
    """The signature of a class with this constructor, with the shared arguments in place of ``**options``.

    Example:
        >>> def __init__(self, model, *, seed=0, **options: Unpack[TrainerOptions]) -> None: ...
        >>> list(full_signature(__init__).parameters)[:4]
        ['model', 'seed', 'update_every', 'drop_fraction']
    """
    own = list(inspect.signature(constructor).parameters.values())[1:]
    if not own or own[-1].kind is not own[-1].VAR_KEYWORD or own[-1].annotation != Unpack[TrainerOptions]:
        return inspect.Signature(own)
    named = {parameter.name for parameter in own}
    shared = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=DEFAULTS[name], annotation=annotation)
        for name, annotation in TrainerOptions.__annotations__.items()
        if name not in named
    ]
    return inspect.Signature([*own[:-1], *shared])
