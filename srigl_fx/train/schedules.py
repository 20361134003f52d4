"""When a mask is updated, and how much of it is replaced.

Owns the schedules, as pure functions of the number of completed optimizer steps, and :class:`Schedule`, which says
which of them a training method follows. It must not know models, optimizers or masks.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from srigl_fx.errors import TrainerError
from srigl_fx.train.checks import check_count, check_share

Decay = Callable[[float], float]
"""From the share of the time that has passed, in [0, 1), to the share of the first drop fraction that is left."""
DropSchedule = Literal["cosine", "constant", "linear", "inverse_power"] | Decay


def end_step(total_steps: int, stop_at: float) -> int:
    """The step at which updates end: ``stop_at`` of all steps, rounded down.

    Example:
        >>> end_step(1000, 0.75), end_step(100, 0.29)
        (750, 29)
    """
    return math.floor(stop_at * total_steps + 1e-6)


def default_interval(total_steps: int, *, end: int, samples: int = 1) -> int:
    """The steps between updates where nobody says: a share of all steps, so that every run has updates.

    RigL's recipe has 320 intervals: 100 steps of 32,000 at a batch size of 4096. A short run has fewer, since what has
    grown needs some steps before it is ranked: at least 10, but no more than an eighth of the run.

    Args:
        total_steps: Optimizer steps of the whole training.
        end: Updates happen at steps below this one.
        samples: Steps whose gradients are summed for an update; they lie between two updates.

    Example:
        >>> [default_interval(steps, end=end_step(steps, 0.75)) for steps in (32_000, 2000, 60, 8)]
        [100, 10, 7, 1]
    """
    wanted = max(total_steps // 320, min(10, total_steps // 8), samples, 1)
    return min(wanted, max(1, end - 1))


def cosine(progress: float) -> float:
    """Half a cosine: slow at first, slow at the end.

    Source: RigL (Evci et al., 2020), section 3.

    Example:
        >>> [round(cosine(progress), 3) for progress in (0.0, 0.25, 0.5, 0.75)]
        [1.0, 0.854, 0.5, 0.146]
    """
    return (1 + math.cos(math.pi * progress)) / 2


def constant(progress: float) -> float:
    """The first drop fraction throughout.

    Source: Sparse Evolutionary Training (Mocanu et al., 2018).

    Example:
        >>> constant(0.75)
        1.0
    """
    return 1.0


def linear(progress: float) -> float:
    """A straight line down to 0.

    Source: RigL (Evci et al., 2020), in its comparison of schedules.

    Example:
        >>> linear(0.75)
        0.25
    """
    return 1.0 - progress


def inverse_power(progress: float, power: float = 3.0) -> float:
    """Fast at first: the share of the time that is left, to a power. 1 is :func:`linear`.

    For another power than 3 give ``functools.partial(inverse_power, power=2)``.

    Source: RigL (Evci et al., 2020), in its comparison of schedules, with power 3; after Zhu & Gupta (2017).

    Example:
        >>> inverse_power(0.5), inverse_power(0.5, power=2)
        (0.125, 0.25)
    """
    return float((1.0 - progress) ** power)


_DECAYS: dict[str, Decay] = {
    "cosine": cosine,
    "constant": constant,
    "linear": linear,
    "inverse_power": inverse_power,
}


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When masks change, and how much of them.

    It knows no number of steps: one schedule serves runs of any length.

    Attributes:
        update_every: Optimizer steps between updates; None for a share of all steps (:func:`default_interval`).
        drop_fraction: Share of a layer's weights that the first updates replace.
        stop_at: Share of the steps after which the masks stay as they are.
        grad_samples: Optimizer steps whose dense gradients count towards an update: the last ones before it.
        drop_schedule: How the drop fraction falls until ``stop_at``: :func:`cosine`, :func:`constant`, :func:`linear`
            or :func:`inverse_power`, by name or as a function, or a function of your own. It takes the share of that
            time which has passed, in [0, 1), and returns the share of ``drop_fraction`` that is left, in [0, 1].

    Raises:
        TrainerError: A value is out of range, or the drop schedule is none.

    Example:
        >>> schedule = Schedule(update_every=100, drop_fraction=0.4, drop_schedule="linear")
        >>> schedule.interval(1000), schedule.end(1000)
        (100, 750)
        >>> round(schedule.drop_fraction_at(300, end=750), 3)
        0.24
    """

    update_every: int | None = None
    drop_fraction: float = 0.3
    stop_at: float = 0.75
    grad_samples: int = 1
    drop_schedule: DropSchedule = cosine

    def __post_init__(self) -> None:
        """Check the values; a drop schedule that was given by name becomes the function."""
        check_share("stop_at", self.stop_at)
        check_count("grad_samples", self.grad_samples)
        if self.update_every is not None:
            check_count("update_every", self.update_every)
        check_share("drop_fraction", self.drop_fraction)
        decay = _DECAYS.get(self.drop_schedule) if isinstance(self.drop_schedule, str) else self.drop_schedule
        if not callable(decay):
            raise TrainerError(
                f"drop_schedule is {self.drop_schedule!r}; choose one of {', '.join(map(repr, _DECAYS))}, or give a "
                "function from the share of the time that has passed to the share of drop_fraction that is left"
            )
        object.__setattr__(self, "drop_schedule", decay)
        self.shares()

    @property
    def decay(self) -> Decay:
        """The drop schedule, as a function."""
        assert not isinstance(self.drop_schedule, str)
        return self.drop_schedule

    def end(self, total_steps: int) -> int:
        """Updates happen at steps below this one."""
        return end_step(total_steps, self.stop_at)

    def interval(self, total_steps: int) -> int:
        """The optimizer steps between two updates of a run, the default where none are given.

        Raises:
            TrainerError: ``total_steps`` is no count, no update would ever happen, or there are fewer steps between
                two updates than gradients to be summed.

        Example:
            >>> Schedule().interval(1000), Schedule(update_every=40).interval(1000)
            (10, 40)
        """
        check_count("total_steps", total_steps)
        end, every = self.end(total_steps), self.update_every
        if every is None:
            every = default_interval(total_steps, end=end, samples=self.grad_samples)
        if not last_update_step(every=every, end=end):
            remedy = "" if self.update_every is None else "lower update_every or leave it out, "
            raise TrainerError(
                f"the masks would never change: the first update would be at step {every}, but updates end before step "
                f"{end}, which is {self.stop_at} of {total_steps} steps; {remedy}check that total_steps counts "
                "optimizer steps, or train with Static"
            )
        if self.grad_samples > every:
            raise TrainerError(f"grad_samples is {self.grad_samples}, but only {every} steps lie between two updates")
        return every

    def drop_fraction_at(self, step: int, *, end: int) -> float:
        """The share of a layer's weights replaced at ``step``, where updates happen below ``end``.

        Raises:
            TrainerError: A drop schedule of your own returned something that is no share.
        """
        if step >= end:
            return 0.0
        if self.decay is cosine:
            # The same function, but for the last bit of some values: a resumed run must drop as many weights as before.
            return cosine_drop_fraction(step, initial=self.drop_fraction, end=end)
        return self.drop_fraction * self._share(step / end)

    def shares(self) -> tuple[float, ...]:
        """What is left of the drop fraction at the four quarters of the time: what tells two drop schedules apart."""
        return tuple(self._share(quarter / 4) for quarter in range(4))

    def _share(self, progress: float) -> float:
        share = self.decay(progress)
        check_share(f"drop_schedule({progress:g})", share)
        return share


def cosine_drop_fraction(step: int, *, initial: float, end: int) -> float:
    """The share of a layer's weights replaced at ``step``: half a cosine from ``initial`` down to 0 at ``end``.

    Source: RigL (Evci et al., 2020), section 3.

    Example:
        >>> [round(cosine_drop_fraction(step, initial=0.3, end=1000), 5) for step in (0, 250, 500, 1000)]
        [0.3, 0.25607, 0.15, 0.0]
    """
    if step >= end:
        return 0.0
    return initial / 2 * (1 + math.cos(math.pi * step / end))


def cubic_sparsity(step: int, *, final: float, end: int, initial: float = 0.0) -> float:
    """The sparsity of gradual pruning at ``step``: fast at first, from ``initial`` to ``final`` at ``end``.

    Source: To Prune, or Not to Prune (Zhu & Gupta, 2017), equation 1.

    Example:
        >>> [round(cubic_sparsity(step, final=0.8, end=100), 4) for step in (0, 25, 50, 100, 200)]
        [0.0, 0.4625, 0.7, 0.8, 0.8]
    """
    if step >= end:
        return final
    return final + (initial - final) * (1 - step / end) ** 3


def last_update_step(*, every: int, end: int) -> int:
    """The last step at which masks change, 0 if there is none.

    Example:
        >>> last_update_step(every=100, end=400), last_update_step(every=100, end=100)
        (300, 0)
    """
    return max(0, (end - 1) // every * every)


def is_update_step(step: int, *, every: int, end: int) -> bool:
    """Whether masks change once ``step`` optimizer steps are done: at multiples of ``every`` below ``end``.

    Source: RigL (Evci et al., 2020), algorithm 1.

    Example:
        >>> [step for step in range(0, 500) if is_update_step(step, every=100, end=400)]
        [100, 200, 300]
    """
    return step % every == 0 and 0 < step < end


def captures_gradient(step: int, *, every: int, end: int, samples: int = 1) -> bool:
    """Whether the step after ``step`` completed ones is among the ``samples`` last before an update.

    Example:
        >>> [step for step in range(12) if captures_gradient(step, every=5, end=100, samples=3)]
        [2, 3, 4, 7, 8, 9]
    """
    following = (step // every + 1) * every
    return following < end and following - step <= samples
