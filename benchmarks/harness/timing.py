"""How times are taken: interleaved, so that all contenders see the same machine, and as medians.

Owns the loop. It must not know what is measured: a contender is anything that says how long a number of its calls took,
in this process or in another one.
"""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

Timer = Callable[[int], float]
Name = TypeVar("Name", bound=Hashable)
SLOW = 1.0  # seconds: a call this long is not repeated to warm up
CALM_TRIES = 100


def timer(call: Callable[[], object]) -> Timer:
    """The timer of a function of this process: calls in a row, to seconds."""

    def taken(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return time.perf_counter() - start

    return taken


def interleaved(
    timers: Mapping[Name, Timer],
    *,
    seconds: float = 0.3,
    rounds: int = 7,
    calm: Callable[[Name], bool] | None = None,
) -> dict[Name, float]:
    """The median seconds of one call of each contender.

    Each is called twice before, uncounted. Then all go in turns, ``rounds`` times, each for its share of ``seconds``,
    after one uncounted call that brings its data back into the caches. The order moves on by one each round. A
    contender whose calls are long takes part in fewer rounds, and at least in one.

    Args:
        timers: The contenders, by name.
        seconds: About how long each contender is measured.
        rounds: How often all are gone through.
        calm: Whether the machine is fit to measure a contender. A turn counts if it is so before and after it, and
            else is repeated, ``CALM_TRIES`` times at most; a contender without any turn is not in the result.
    """
    repeats: dict[Name, int] = {}
    turns: dict[Name, int] = {}
    for name, call in timers.items():
        once = call(1)
        if once < SLOW:
            once = min(call(1), call(1))
        once = max(once, 1e-7)
        repeats[name] = max(1, int(seconds / rounds / once))
        turns[name] = min(rounds, max(1, int(8 * seconds / once)))
    times: dict[Name, list[float]] = {name: [] for name in timers}
    order = list(timers)
    for turn in range(rounds):
        order = order[1:] + order[:1]
        for name in order:
            if turn < turns[name]:
                for _ in range(1 if calm is None else CALM_TRIES):
                    if calm is not None and not calm(name):
                        continue
                    if repeats[name] > 1:
                        timers[name](1)
                    taken = timers[name](repeats[name]) / repeats[name]
                    if calm is None or calm(name):
                        times[name].append(taken)
                        break
    return {name: statistics.median(values) for name, values in times.items() if values}


def fastest(calls: Mapping[str, Callable[[], object]]) -> tuple[str, Callable[[], object]]:
    """The fastest of several ways to write the same contender, by a few calls of each."""
    if len(calls) == 1:
        return next(iter(calls.items()))
    times = interleaved({name: timer(call) for name, call in calls.items()}, seconds=0.02, rounds=3)
    best = min(times, key=times.__getitem__)
    return best, calls[best]
