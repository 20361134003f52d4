"""The rule that picks a layer's form, on made-up times; and how times are taken."""

import time

import pytest

from srigl_fx.passes.program import Times
from srigl_fx.passes.select import decide
from srigl_fx.runtime.autotune import measure

FAST: Times = {1: {"dense": 4.0, "condensed": 1.0}}
MIXED: Times = {1: {"dense": 4.0, "condensed": 1.0}, 64: {"dense": 4.0, "condensed": 8.0}}
ABLATED: Times = {1: {"dense": 4.0, "condensed": 5.0, "shrunk": 2.0}}
BOTH: Times = {1: {"dense": 6.0, "condensed": 2.0, "shrunk": 3.0}, 8: {"dense": 6.0, "condensed": 4.0, "shrunk": 3.0}}


@pytest.mark.parametrize(
    ("times", "min_speedup", "decision", "reason"),
    [
        (FAST, 1.0, "condensed", "4.00 times as fast as dense at batch 1"),
        (FAST, 4.0, "condensed", "4.00 times as fast as dense at batch 1"),
        (FAST, 4.1, "dense", "condensed is 4.00 times as fast as dense at batch 1"),
        (MIXED, 1.0, "dense", "condensed is 0.50 times as fast as dense at batch 64"),
        (MIXED, 0.5, "condensed", "0.50 times as fast as dense at batch 64"),
        (ABLATED, 1.0, "shrunk", "2.00 times as fast as dense at batch 1"),
        (
            ABLATED,
            3.0,
            "dense",
            "condensed is 0.80 times as fast as dense at batch 1; shrunk is 2.00 times as fast as dense at batch 1",
        ),
        (BOTH, 1.0, "shrunk", "2.00 times as fast as dense at batch 1"),
    ],
)
def test_decide(times: Times, min_speedup: float, decision: str, reason: str) -> None:
    assert decide(times, min_speedup) == (decision, reason)


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
