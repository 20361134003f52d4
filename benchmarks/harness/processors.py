"""Whether this machine gives two threads two whole processors, which a virtual machine does not at every moment.

Owns the probe: multiply-adds in registers, which slow each other down on nothing but a shared processor. It must not
know contenders.
"""

import os
import threading
import time

from harness.ceilings import register_loop

_SECONDS = 0.004  # of one sweep
_SWEEPS = 6  # of each thread in a probe: a processor that was idle comes back at its own pace
_CALIBRATIONS = 200
_SLOWDOWN = 1.08  # of two threads at once, against one at its best: 1.85 times its work or more


class Processors:
    """The probe, calibrated when it is made by the best time of one thread.

    Attributes:
        probes: How often it was asked.
        whole: How often both processors were whole.
    """

    def __init__(self) -> None:
        self._places = sorted(os.sched_getaffinity(0))[:2]
        self._loop, self._repeats = register_loop(), 1
        while self._sweep() < _SECONDS:
            self._repeats *= 2
        self._best = min(self._sweep() for _ in range(_CALIBRATIONS))
        self.probes = self.whole = 0

    def __call__(self) -> bool:
        """Whether two threads, a processor for each, now take no longer than one alone."""
        times: dict[int, float] = {}
        sweepers = [threading.Thread(target=self._probe, args=(place, times)) for place in self._places]
        for sweeper in sweepers:
            sweeper.start()
        for sweeper in sweepers:
            sweeper.join()
        whole = len(times) == 2 and max(times.values()) < _SLOWDOWN * self._best
        self.probes += 1
        self.whole += whole
        return whole

    def describe(self) -> str:
        """What the probes found."""
        return (
            f"What is measured counts if, just before and just after, two threads of multiply-adds in registers took "
            f"at most {_SLOWDOWN:.2f} times as long as one alone does at best, as on two whole processors; so it was "
            f"at {self.whole} of {self.probes} moments."
        )

    def _probe(self, place: int, times: dict[int, float]) -> None:
        os.sched_setaffinity(0, {place})  # of this thread
        for _ in range(_SWEEPS):
            times[place] = self._sweep()

    def _sweep(self) -> float:
        start = time.perf_counter()
        self._loop(self._repeats)
        return time.perf_counter() - start
