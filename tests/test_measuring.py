"""What layers cost: measured once, remembered, estimated where that is clear; and lowering that uses it."""

import json
from pathlib import Path

import pytest
import torch
from lowering_support import mask_by_hand, randomise
from torch import nn

from srigl_fx import measuring
from srigl_fx.lowered import LoweredModule, LoweringReport
from srigl_fx.lowering import lower
from srigl_fx.measuring import is_clear
from srigl_fx.passes.program import Times
from srigl_fx.runtime.cache import CACHE_VARIABLE
from srigl_fx.runtime.timings import FILE


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    return tmp_path / FILE


@pytest.fixture
def all_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "CLEAR", float("inf"))


def model() -> nn.Module:
    layers = (nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 64))
    return mask_by_hand(randomise(nn.Sequential(*layers)), 0.2, ablated={"3.weight": 20}).eval()


def lowered(batch: int = 2, min_speedup: float = 1.0, **options: object) -> LoweredModule:
    result = lower(model(), (torch.randn(batch, 3, 4, 4),), min_speedup=min_speedup, **options)  # type: ignore[arg-type]
    assert isinstance(result, LoweredModule)
    return result


def kept(cache: Path) -> list[dict[str, object]]:
    return [json.loads(line)["what"] for line in cache.read_text().splitlines()]


@pytest.mark.usefixtures("all_measured")
def test_the_second_time_nothing_is_measured(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = lowered().report
    before = cache.read_bytes()
    assert all(set(layer.seconds) == {2} for layer in first.layers)
    monkeypatch.setattr(measuring, "measure", lambda _: pytest.fail("measured again"))
    second = lowered().report
    assert second.layers == first.layers
    assert cache.read_bytes() == before


@pytest.mark.usefixtures("all_measured")
def test_what_times_depend_on_is_measured_apart(cache: Path) -> None:
    lowered()
    first = kept(cache)
    assert [what["operator"] for what in first] == [
        "constants of the cost model",
        "aten.conv2d.default",
        "aten.linear.default",
        "aten.linear.default",
    ]
    lowered(batch_sizes=[2, 3])
    lowered(value_dtype=torch.bfloat16)
    again = kept(cache)
    assert len(again) == len(first) + 6
    assert [what["input"] for what in again[4:7]] == [[3, 3, 4, 4], [3, 128], [3, 44]]  # without the ablated
    assert {what["values"] for what in again[7:]} == {"bfloat16"}


@pytest.mark.usefixtures("all_measured")
def test_leading_sizes_count_by_their_product(cache: Path) -> None:
    linear = mask_by_hand(randomise(nn.Sequential(nn.Linear(32, 32))), 0.2).eval()
    lower(linear, (torch.randn(2, 6, 32),))
    before = kept(cache)
    lower(linear, (torch.randn(3, 2, 2, 32),))
    assert kept(cache) == before


def test_no_speedup_no_measuring(cache: Path) -> None:
    report = lowered(min_speedup=0).report
    assert not cache.exists()
    for layer in report.layers:
        assert layer.seconds == {}
        assert set(layer.estimates) == {2}
        assert all(seconds > 0 for seconds in layer.estimates[2].values())
    assert type(report).from_dict(json.loads(json.dumps(report.as_dict()))) == report


def test_linear_forms_that_are_far_apart_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "measure", lambda _: pytest.fail("measured"))
    linear = mask_by_hand(randomise(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))), 0.2).eval()

    def report(estimate: dict[str, float], min_speedup: float = 1.0) -> LoweringReport:
        monkeypatch.setattr(measuring, "estimate", lambda work, machine: estimate)
        return lower(linear, (torch.randn(2, 32),), min_speedup=min_speedup).report

    faster = report({"dense": 8.0, "condensed": 2.0}).layers
    assert {layer.decision for layer in faster} == {"condensed"}
    assert {layer.reason for layer in faster} == {"estimated: 4.00 times as fast as dense at batch 2"}
    assert all(layer.seconds == {} for layer in faster)
    slower = report({"dense": 2.0, "condensed": 8.0}).layers
    assert {layer.decision for layer in slower} == {"dense"}
    assert all(layer.reason.startswith("estimated: condensed is 0.25 times") for layer in slower)
    with pytest.raises(pytest.fail.Exception, match="measured"):
        report({"dense": 8.0, "condensed": 2.0}, min_speedup=1.5)


@pytest.mark.usefixtures("all_measured")
def test_measured_times_are_used_where_an_estimate_would_do(monkeypatch: pytest.MonkeyPatch) -> None:
    lowered()
    monkeypatch.setattr(measuring, "CLEAR", 1.0)
    assert all(layer.seconds for layer in lowered().report.layers)


def test_convolutions_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "estimate", lambda work, machine: {"dense": 9.0, "condensed": 1.0, "shrunk": 9.0})
    measured = {layer.fqn: bool(layer.seconds) for layer in lowered().report.layers}
    assert measured == {"0.weight": True, "3.weight": False, "5.weight": False}


@pytest.mark.parametrize(
    ("estimated", "clear"),
    [
        ({1: {"dense": 3.0, "condensed": 1.0}}, True),
        ({1: {"dense": 2.9, "condensed": 1.0}}, False),
        ({1: {"dense": 1.0, "condensed": 3.0}}, True),
        ({1: {"dense": 3.0, "condensed": 1.0}, 2: {"dense": 2.0, "condensed": 1.0}}, False),
        ({1: {"dense": 3.0, "condensed": 1.0}, 2: {"dense": 1.0, "condensed": 3.0}}, True),
        ({1: {"dense": 9.0, "condensed": 2.0, "shrunk": 1.0}}, False),
        ({1: {"dense": 9.0, "condensed": 1.0, "shrunk": 2.0}}, True),
        ({1: {"dense": 1.0, "condensed": 9.0, "shrunk": 2.0}}, False),
    ],
)
def test_is_clear(estimated: Times, clear: bool) -> None:
    assert is_clear(estimated) == clear
