"""How times are taken."""

import time

from srigl_fx.runtime.autotune import measure


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
