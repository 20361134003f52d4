"""The measured constants of the cost model: what is believed, what is thrown away, what a busy machine can do."""

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lowering_support import mask_by_hand, randomise
from torch import nn

import srigl_fx as sx
from srigl_fx.runtime.cache import CACHE_VARIABLE
from srigl_fx.runtime.costs import autotune, calibration
from srigl_fx.runtime.costs.calibration import (
    AGREE,
    WHAT,
    believable,
    checked_constants,
    host_machine,
    machine_constants,
    predicted,
    probe,
)
from srigl_fx.runtime.costs.cost_model import Machine
from srigl_fx.runtime.costs.timings import FILE, Timings
from srigl_fx.runtime.cpu.threads import torch_threads

USUAL = predicted(Machine())
BURN = {
    "loops": "while True: pass",
    "threads": "import torch\nx = torch.randn(1500, 1500)\nwhile True: x @ x",
}


@pytest.fixture
def timings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Timings:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(calibration, "_seen", set())
    return Timings(tmp_path / FILE)


@contextmanager
def busy(kind: str) -> Iterator[None]:
    """Other processes have all processors: two of them, or one for each processor where there are more."""
    count = max(2, os.cpu_count() or 1) if kind == "loops" else 2
    others = [subprocess.Popen([sys.executable, "-c", BURN[kind]]) for _ in range(count)]
    try:
        time.sleep(3.0 if kind == "threads" else 0.5)
        assert all(other.poll() is None for other in others)
        yield
    finally:
        for other in others:
            other.kill()
            other.wait(timeout=60)


class SimulatedMachine:
    """A processor and its clocks, on which the probes take known times, and other processes take turns with them.

    It is what the operating system does to two threads on two processors: a process that computes is interrupted after
    a few milliseconds, for as long as the others compute; a call that threads share ends when the last one has had its
    turn, and the first one waits for it. What shares a core's arithmetic units makes all calls slower, too.
    """

    SLICE = 3e-3

    def __init__(self, true: dict[str, float], threads: int, seed: int) -> None:
        self.true, self.threads, self.draw = true, threads, random.Random(seed)
        self.now = self.held = 0.0
        self.left = self.SLICE
        self.other = 0.0  # from when on the processor of the other threads is theirs, for a slice
        self.busy = False
        self.contention = 1.6  # where others run

    def perf_counter(self) -> float:
        return self.now

    def thread_time(self) -> float:
        return self.held

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.left = self.SLICE * self.draw.random() if self.busy else self.SLICE

    def call(self, name: str) -> None:
        seconds = self.true[name] * self.draw.uniform(1.0, 1.1)
        self._compute(seconds * (self.contention if self.busy else 1.0))
        if self.busy and self.threads > 1:  # the other threads may have to wait for their turn
            if self.now > self.other + self.SLICE:
                self.other = self.now + self.draw.uniform(0.0, 2.0) * self.SLICE
            self.now = max(self.now, self.other)

    def _compute(self, seconds: float) -> None:
        while self.busy and seconds > self.left:
            self.now += self.left + self.draw.uniform(1.0, 3.0) * self.SLICE
            self.held += self.left
            seconds -= self.left
            self.left = self.SLICE
        self.now += seconds
        self.held += seconds
        self.left -= seconds


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], SimulatedMachine]:
    """Let the probes run on a simulated machine, of a speed and with disturbances that are drawn from a seed."""

    def start(seed: int) -> SimulatedMachine:
        draw, count = random.Random(seed), torch.get_num_threads()
        speed = draw.choice([0.3, 1.0, 4.0])
        expected = predicted(Machine().with_threads(count))
        true = {name: speed * draw.uniform(0.8, 1.2) * seconds for name, seconds in expected.items()}
        machine = SimulatedMachine(true, count, seed)
        monkeypatch.setattr(autotune, "time", machine)

        def measured(calls: Collection[str], **effort: Any) -> dict[str, float]:
            return autotune.measure_undisturbed({name: partial(machine.call, name) for name in calls}, **effort)

        monkeypatch.setattr(calibration, "measure_undisturbed", measured)
        return machine

    return start


def off(found: dict[str, float], true: dict[str, float]) -> float:
    """The factor by which the worst of the times is off."""
    return max((max(seconds / true[name], true[name] / seconds) for name, seconds in found.items()), default=1.0)


@pytest.mark.parametrize(
    ("change", "believed"),
    [
        ({}, True),
        ({"condensed few": 4.9e-3}, False),  # an outlier of two orders of magnitude
        ({"condensed many": 16e-3}, False),  # threads that wait for processors
        ({"dense many": 1e-9}, False),
        ({"condensed call": 1e-8}, False),
        ({"dense call": 4e-4}, False),  # a call that is dearer than a layer
        ({"dense few": 1e300}, False),
        ({"another": 1e-6}, False),
    ],
)
def test_believable(change: dict[str, float], believed: bool) -> None:
    assert believable({**USUAL, **change}, 1) == believed


@pytest.mark.parametrize("factor", [0.15, 1.0, 15.0])
@pytest.mark.parametrize("count", [1, 2, 64])
def test_machines_of_all_speeds_are_believed(factor: float, count: int) -> None:
    core = {name: factor * seconds for name, seconds in USUAL.items()}
    assert believable(core, count)  # where threads gain nothing
    assert believable(
        {name: min(core[name], factor * s) for name, s in predicted(Machine().with_threads(count)).items()}, count
    )


@pytest.mark.parametrize(
    "stored",
    [
        {**USUAL, "condensed few": 4.9e-3},
        {name: seconds for name, seconds in USUAL.items() if name != "dense few"},
        {"dense": 1e-6},
        dict.fromkeys(USUAL, 1e-300),
    ],
)
def test_what_no_machine_can_do_is_neither_used_nor_kept(
    timings: Timings, simulated: Callable[[int], SimulatedMachine], stored: dict[str, float]
) -> None:
    machine = simulated(0)
    timings.put(WHAT, stored)
    assert machine_constants(timings, may_measure=False) == host_machine()
    found = machine_constants(timings)
    again = timings.get(WHAT)
    assert again is not None
    assert off(again, machine.true) < 2
    assert machine_constants(Timings.open(), may_measure=False) == found


@pytest.mark.parametrize("damage", [b"NaN", b"-1.0", b"Infinity", b'"3"', b"null", b"[]", b"true", b"0.0"])
def test_an_odd_value_is_dropped_and_measured_anew(
    timings: Timings, simulated: Callable[[int], SimulatedMachine], tmp_path: Path, damage: bytes
) -> None:
    simulated(0)
    timings.put(WHAT, {**USUAL, "dense few": 0.5})
    path = tmp_path / FILE
    path.write_bytes(path.read_bytes().replace(b"0.5", damage))
    read = Timings(path)
    assert read.get(WHAT) is None
    assert path.read_bytes() == b""
    machine_constants(read)
    assert Timings(path).get(WHAT) is not None


def test_what_agrees_with_the_clock_stays_and_is_looked_at_once(
    timings: Timings, simulated: Callable[[int], SimulatedMachine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timings.put(WHAT, simulated(0).true)
    before = (tmp_path / FILE).read_bytes()
    found = checked_constants(timings, ["dot", "tile"])
    assert found == machine_constants(timings, may_measure=False)
    monkeypatch.setattr(calibration, "measure_undisturbed", lambda *_, **__: pytest.fail("measured again"))
    assert checked_constants(timings, ["dot"]) == found
    assert (tmp_path / FILE).read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [1, 2])
def test_a_busy_machine_is_measured_right_or_not_at_all(
    timings: Timings, simulated: Callable[[int], SimulatedMachine], count: int, seed: int
) -> None:
    with torch_threads(count):
        machine = simulated(seed)
        machine.busy = True
        assert off(probe(), machine.true) < 2
        checked_constants(timings, ["dot", "tile"])
        kept = timings.get(WHAT)
        assert kept is None or off(kept, machine.true) < 2
        machine.busy = False
        checked_constants(timings, ["dot", "tile"])
        kept = timings.get(WHAT)
        assert kept is not None
        assert off(kept, machine.true) < 2


@pytest.mark.slow
@pytest.mark.parametrize("factor", [1 / 150, 1 / 6, 6.0, 150.0])
@pytest.mark.parametrize("name", ["dense few", "condensed few", "condensed many"])
@pytest.mark.parametrize("count", [1, 2])
def test_a_stored_time_that_contradicts_the_clock_is_thrown_away(
    timings: Timings, simulated: Callable[[int], SimulatedMachine], count: int, name: str, factor: float
) -> None:
    with torch_threads(count):
        machine = simulated(int(factor * 600))
        timings.put(WHAT, {**machine.true, name: factor * machine.true[name]})
        machine.busy = True
        checked_constants(timings, ["dot", "tile"])
        machine.busy = False
        checked_constants(Timings.open(), ["dot", "tile"])
        renewed = Timings.open().get(WHAT)
        assert renewed is not None
        assert off(renewed, machine.true) < AGREE


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "count", "poison"),
    [
        ("loops", 1, {}),
        ("loops", 2, {"dense few": 0.08}),
        ("threads", 1, {"condensed few": 15.0}),
        ("threads", 2, {"condensed few": 150.0}),
    ],
)
def test_a_busy_moment_decides_nothing(timings: Timings, kind: str, count: int, poison: dict[str, float]) -> None:
    """On the real clock: what is stored then, and how far it is off, depends on the machine; the decisions do not."""
    model = mask_by_hand(randomise(nn.Sequential(nn.Linear(2048, 1024))), 0.1).eval()
    x = torch.randn(1, 2048)
    with torch_threads(count):
        if poison:
            true = {**predicted(Machine().with_threads(count)), **probe()}
            timings.put(WHAT, {name: poison.get(name, 1.0) * seconds for name, seconds in true.items()})
        with busy(kind):
            (layer,) = sx.lower(model, (x,)).report.layers
            assert layer.decision == "condensed", layer.reason  # a tenth of the weights of one sample
        (layer,) = sx.lower(model, (x,)).report.layers
        assert layer.decision == "condensed", layer.reason
        kept = Timings.open().get(WHAT)
        assert kept is None or believable(kept, count)
