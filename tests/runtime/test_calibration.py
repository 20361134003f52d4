"""The measured constants of the cost model: what is believed, what is thrown away, what a busy machine can do."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from lowering_support import mask_by_hand, randomise
from torch import nn

import srigl_fx as sx
from srigl_fx.runtime import calibration
from srigl_fx.runtime.cache import CACHE_VARIABLE
from srigl_fx.runtime.calibration import WHAT, believable, checked_constants, machine_constants, predicted, probe
from srigl_fx.runtime.cost_model import Machine
from srigl_fx.runtime.timings import FILE, Timings

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


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
def test_what_no_machine_can_do_is_neither_used_nor_kept(timings: Timings, stored: dict[str, float]) -> None:
    timings.put(WHAT, stored)
    assert machine_constants(timings, may_measure=False) == Machine()
    found = machine_constants(timings)
    again = timings.get(WHAT)
    assert again is not None
    assert believable(again, 1)
    assert machine_constants(Timings.open(), may_measure=False) == found


@pytest.mark.parametrize("damage", [b"NaN", b"-1.0", b"Infinity", b'"3"', b"null", b"[]", b"true", b"0.0"])
def test_an_odd_value_is_dropped_and_measured_anew(timings: Timings, tmp_path: Path, damage: bytes) -> None:
    timings.put(WHAT, {**USUAL, "dense few": 0.5})
    path = tmp_path / FILE
    path.write_bytes(path.read_bytes().replace(b"0.5", damage))
    read = Timings(path)
    assert read.get(WHAT) is None
    assert path.read_bytes() == b""
    machine_constants(read)
    assert Timings(path).get(WHAT) is not None


@pytest.mark.parametrize("factor", [1 / 8, 8.0])
@pytest.mark.parametrize("name", ["dense few", "condensed few", "condensed many"])
def test_a_stored_time_that_contradicts_the_clock_is_thrown_away(timings: Timings, name: str, factor: float) -> None:
    true = probe()
    poisoned = {**true, name: factor * true[name]}
    if not believable(poisoned, 1):  # then it is not used in any case
        poisoned[name] = true[name] * (4.0 if factor > 1 else 0.25)
    timings.put(WHAT, poisoned)
    checked_constants(timings, ["dot", "tile"])
    renewed = Timings.open().get(WHAT)
    assert renewed is not None
    assert renewed[name] == pytest.approx(true[name], rel=2.0)
    assert abs(renewed[name] / poisoned[name] - 1) > 0.5


def test_what_agrees_with_the_clock_stays_and_is_looked_at_once(
    timings: Timings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = probe()
    timings.put(WHAT, true)
    before = (tmp_path / FILE).read_bytes()
    found = checked_constants(timings, ["dot", "tile"])
    assert found == machine_constants(timings, may_measure=False)
    monkeypatch.setattr(calibration, "measure_undisturbed", lambda *_, **__: pytest.fail("measured again"))
    assert checked_constants(timings, ["dot"]) == found
    assert (tmp_path / FILE).read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "count", "poison"),
    [
        ("loops", 1, {}),
        ("loops", 1, {"condensed few": 5.0}),
        ("loops", 2, {"dense few": 0.12}),
        ("threads", 1, {"dense few": 0.12}),
        ("threads", 2, {}),
        ("threads", 2, {"condensed few": 150.0}),
    ],
)
def test_a_busy_moment_decides_nothing(timings: Timings, kind: str, count: int, poison: dict[str, float]) -> None:
    model = mask_by_hand(randomise(nn.Sequential(nn.Linear(2048, 1024))), 0.1).eval()
    x = torch.randn(1, 2048)
    with threads(count):
        quiet = probe()
        if poison:
            true = {**predicted(Machine().with_threads(count)), **quiet}
            timings.put(WHAT, {name: poison.get(name, 1.0) * seconds for name, seconds in true.items()})
        with busy(kind):
            (layer,) = sx.lower(model, (x,)).report.layers
            assert layer.decision == "condensed", layer.reason  # a tenth of the weights of one sample
        (layer,) = sx.lower(model, (x,)).report.layers
        assert layer.decision == "condensed", layer.reason
        checked_constants(Timings.open(), ["dot", "tile"])
        stored = Timings.open().get(WHAT) or {}
        off = {name: seconds / quiet[name] for name, seconds in stored.items() if name in quiet}
        assert all(1 / 5 < one < 5 for one in off.values()), off
