"""When a mask is updated, and how much of it is replaced.

Owns the schedules, as pure functions of the number of completed optimizer steps. It must not know models, optimizers
or masks.
"""

import math


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
