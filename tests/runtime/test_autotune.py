"""How times are taken."""

import time

import pytest

from srigl_fx.runtime.costs.autotune import measure, measure_undisturbed


def test_measure_tells_slow_from_fast() -> None:
    calls: list[str] = []

    def slow() -> None:
        calls.append("slow")
        time.sleep(0.002)

    def fast() -> None:
        calls.append("fast")

    times = measure({"slow": slow, "fast": fast}, rounds=3, seconds=0.01)
    assert times["slow"] >= 0.002
    assert times["fast"] < times["slow"] / 10
    assert calls.index("fast") < len(calls) - 1 - calls[::-1].index("slow"), "interleaved"


def test_nothing_to_measure() -> None:
    assert measure({}) == {}


@pytest.mark.slow
def test_undisturbed_times_leave_out_what_waits() -> None:
    """A call that waits, for another thread that waits for a processor, say, tells nothing of what it takes."""
    waits = iter([True, False, False] * 1000)

    def often_waits() -> None:
        if next(waits):
            time.sleep(0.01)
        sum(range(1000))

    calls = {"works": lambda: sum(range(1000)), "often waits": often_waits, "always waits": lambda: time.sleep(0.002)}
    times = measure_undisturbed(calls, alone=False, seconds=0.0, limit=1.5)
    assert times.keys() == {"works", "often waits"}
    assert times["often waits"] < 0.002


@pytest.mark.slow
def test_an_expensive_call_is_measured_a_few_times() -> None:
    calls: list[float] = []

    def expensive() -> None:
        calls.append(time.thread_time())
        while time.thread_time() < calls[-1] + 0.05:
            pass

    times = measure_undisturbed({"expensive": expensive}, alone=True, limit=0.0)
    assert len(calls) == 2 + 5  # to warm up, and the fewest rounds
    assert times["expensive"] == pytest.approx(0.05, rel=0.1), "by its own time, whatever else runs"
    assert measure_undisturbed({}, alone=True) == {}
