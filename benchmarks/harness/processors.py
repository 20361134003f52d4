"""Whether this machine gives each thread a whole processor, which a virtual machine does not at every moment.

Owns the probe: multiply-adds in registers, which slow each other down on nothing but a shared processor. It must not
know contenders.
"""

import os
import threading
import time

from harness.ceilings import register_loop

_SECONDS = 0.002  # of one sweep
_SWEEPS = 5  # of each thread in a probe: a processor that was idle comes back at its own pace
_CALIBRATIONS = 400
_SLOWDOWN = 1.08  # of the slowest thread, against one at its best: two do at least 1.85 times its work


class Processors:
    """The probe, calibrated when it is made by the best time of one thread.

    Attributes:
        probes: How often it was asked.
        whole: How often all processors asked for were whole.
    """

    def __init__(self) -> None:
        self._places = sorted(os.sched_getaffinity(0))
        self._loop, self._repeats = register_loop(), 1
        while self._sweep() < _SECONDS:
            self._repeats *= 2
        self._best = min(self._sweep() for _ in range(_CALIBRATIONS))
        self.probes = self.whole = 0

    def __call__(self, threads: int) -> bool:
        """Whether so many threads, a processor for each, now take no longer than one at its best."""
        times: dict[int, float] = {}
        sweepers = [threading.Thread(target=self._probe, args=(place, times)) for place in self._places[:threads]]
        for sweeper in sweepers:
            sweeper.start()
        for sweeper in sweepers:
            sweeper.join()
        whole = len(times) == threads and max(times.values()) < _SLOWDOWN * self._best
        self.probes += 1
        self.whole += whole
        return whole

    def describe(self) -> str:
        """What the probes found."""
        return (
            "What is measured counts if, just before and just after, as many threads of multiply-adds in registers "
            f"took at most {_SLOWDOWN:.2f} times as long as one does at best, as on whole processors; so it was at "
            f"{self.whole} of {self.probes} moments."
        )

    def _probe(self, place: int, times: dict[int, float]) -> None:
        os.sched_setaffinity(0, {place})  # of this thread
        for _ in range(_SWEEPS):
            times[place] = self._sweep()

    def _sweep(self) -> float:
        start = time.perf_counter()
        self._loop(self._repeats)
        return time.perf_counter() - start
