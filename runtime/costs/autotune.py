"""Measuring alternatives of one computation on this machine.

Owns how times are taken: interleaved, so that all alternatives see the same machine; as medians, or as the least of
what was not disturbed by other processes. It must not know what is measured.
"""

import statistics
import sys
import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

Name = TypeVar("Name", bound=Hashable)

_FEWEST = 5  # rounds, however long they take
_ENOUGH = 3  # rounds of each alternative that nothing disturbed
_HELD = 0.75  # of a round's time, at least, for which a thread had a processor if nothing disturbed it
_THREAD_CLOCK = sys.platform != "win32"  # there, it counts in steps of 16 ms


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


def measure_undisturbed(
    alternatives: Mapping[Name, Callable[[], object]],
    *,
    alone: bool,
    rounds: int = 30,
    seconds: float = 0.06,
    pause: float = 0.002,
    limit: float = 1.0,
) -> dict[Name, float]:
    """The least seconds of one call of each alternative, of rounds in which other processes left this one alone.

    Where threads share a call, a busy machine makes it seem hundreds of times as long, and no number of rounds helps.
    So only rounds count in which this thread had a processor for nearly all the time: one that waits, for a processor
    or for threads of its own that wait for one, tells what else runs, not what the call takes. Of calls that this
    thread computes alone, every round counts, by the time for which it had a processor.

    Args:
        alternatives: What to call, by name; calls that sleep are always taken for disturbed.
        alone: Whether no other threads take part in the calls.
        rounds: How often all alternatives are gone through, at least.
        seconds: About how long all calls may take together on a quiet machine.
        pause: Seconds between rounds, such that one disturbance does not meet them all.
        limit: Seconds after which no round begins but the first five.

    Returns:
        The seconds by name. An alternative without three undisturbed rounds is left out.

    Example:
        >>> calls = {"sum": lambda: sum(range(100)), "sleep": lambda: time.sleep(0.01)}
        >>> sorted(measure_undisturbed(calls, alone=False, limit=0.5))
        ['sum']
    """
    share = seconds / rounds / max(1, len(alternatives))
    fastest: dict[Name, float] = {}
    for name, call in alternatives.items():
        call()
        fastest[name] = _timed(call, 1)[0]
    taken: dict[Name, list[float]] = {name: [] for name in alternatives}
    begun, done = time.perf_counter(), 0
    while done < _FEWEST or (
        time.perf_counter() - begun < limit and (done < rounds or any(len(times) < _ENOUGH for times in taken.values()))
    ):
        if done:
            time.sleep(pause)
        for name, call in alternatives.items():
            # The first call may have been a disturbed one: how many make a round is found as rounds go by.
            one, held = _timed(call, max(1, int(share / max(fastest[name], 1e-7))))
            fastest[name] = min(fastest[name], one)
            if not _THREAD_CLOCK:
                taken[name].append(one)
            elif alone or held >= _HELD:
                taken[name].append(one * held if alone else one)
        done += 1
    return {name: min(times) for name, times in taken.items() if len(times) >= _ENOUGH}


def _timed(call: Callable[[], object], repeats: int) -> tuple[float, float]:
    """The seconds of one call, and the share of them for which this thread had a processor."""
    start, held = time.perf_counter(), time.thread_time()
    for _ in range(repeats):
        call()
    held = time.thread_time() - held
    passed = time.perf_counter() - start
    return passed / repeats, held / max(passed, 1e-9)
