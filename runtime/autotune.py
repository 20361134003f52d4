"""Measuring alternatives of one computation on this machine.

Owns how times are taken: interleaved, so that all alternatives see the same machine, and as medians by default. It must
not know what is measured.
"""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

Name = TypeVar("Name", bound=Hashable)


def measure(
    alternatives: Mapping[Name, Callable[[], object]],
    *,
    rounds: int = 7,
    seconds: float = 0.1,
    typical: Callable[[list[float]], float] = statistics.median,
) -> dict[Name, float]:
    """The seconds of one call of each alternative: the median over the rounds.

    Each is called once to warm up, which is not counted. Then ``rounds`` times in turn, each time for about its share
    of ``seconds``, at least once.

    Args:
        alternatives: What to call, by name.
        rounds: How often all alternatives are gone through.
        seconds: About how long the whole measurement may take.
        typical: What to take of the rounds' times; ``min`` for what the machine can do when nothing else runs.

    Example:
        >>> times = measure({"short": lambda: sum(range(10)), "long": lambda: sum(range(10000))}, seconds=0.01)
        >>> times["short"] < times["long"]
        True
    """
    share = seconds / rounds / max(1, len(alternatives))
    repeats = {}
    for name, call in alternatives.items():
        call()
        start = time.perf_counter()
        call()
        repeats[name] = max(1, int(share / max(time.perf_counter() - start, 1e-7)))
    taken: dict[Name, list[float]] = {name: [] for name in alternatives}
    for _ in range(rounds):
        for name, call in alternatives.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            taken[name].append((time.perf_counter() - start) / repeats[name])
    return {name: typical(times) for name, times in taken.items()}
