"""How long calls take that are compared with each other.

Owns the order in which they are called. It must not know what they compute.
"""

import statistics
import time
from collections.abc import Callable, Mapping

QUICK = 0.05  # seconds: calls that take less are repeated in each turn, after one that is not counted
REPEATS = 5


def medians(calls: Mapping[str, Callable[[], object]], *, seconds: float, least: int = 4) -> dict[str, float]:
    """Median seconds of a call of each, in turns of a few calls, so that a busy moment hits all alike.

    Args:
        calls: What is compared, by name.
        seconds: About how long all are measured.
        least: Turns of each at least.

    Example:
        >>> sorted(medians({"a": lambda: 1, "b": lambda: 2}, seconds=0.001))
        ['a', 'b']
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    quick = {name: min(_taken(call), _taken(call)) < QUICK for name, call in calls.items()}
    end, turns = time.perf_counter() + seconds, 0
    while turns < least or time.perf_counter() < end:
        for name, call in calls.items():
            if quick[name]:
                call()  # brings its data back into the caches
            times[name] += [_taken(call) for _ in range(REPEATS if quick[name] else 1)]
        turns += 1
    return {name: statistics.median(measured) for name, measured in times.items()}


def _taken(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
