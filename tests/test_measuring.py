"""What layers cost: measured once, remembered, estimated where that is clear; and lowering that uses it."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lowering_support import mask_by_hand, randomise
from torch import nn

from srigl_fx.lowering import layer_costs as measuring
from srigl_fx.lowering.layer_costs import contradicts, is_believable, is_clear
from srigl_fx.lowering.lowered import LoweredModule, LoweringReport
from srigl_fx.lowering.pipeline import lower
from srigl_fx.passes.program import Decision, Times
from srigl_fx.runtime.cache import CACHE_VARIABLE
from srigl_fx.runtime.costs import autotune, calibration
from srigl_fx.runtime.costs.calibration import host_machine
from srigl_fx.runtime.costs.cost_model import ONNXRUNTIME, Machine, Work, estimate
from srigl_fx.runtime.costs.timings import FILE


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of times of the test's own. Times are taken however busy the machine is: test_autotune.py has that.

    The machine's constants are those that are expected of it: test_calibration.py measures them.
    """
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(measuring, "measure_undisturbed", lambda forms, *, alone: autotune.measure(forms))
    expected = calibration.predicted(host_machine())
    monkeypatch.setattr(calibration, "_measured", lambda names, **_: {name: expected[name] for name in names})
    return tmp_path / FILE


@pytest.fixture
def all_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "CLEAR", float("inf"))
    monkeypatch.setattr(measuring, "_FAR", float("inf"))


def model() -> nn.Module:
    layers = (nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 64))
    return mask_by_hand(randomise(nn.Sequential(*layers)), 0.2, ablated={"3.weight": 20}).eval()


def lowered(batch: int = 2, min_speedup: float = 1.0, **options: object) -> LoweredModule:
    result = lower(model(), (torch.randn(batch, 3, 4, 4),), min_speedup=min_speedup, **options)  # type: ignore[arg-type]
    assert isinstance(result, LoweredModule)
    return result


def kept(cache: Path) -> list[dict[str, object]]:
    return [json.loads(line)["what"] for line in cache.read_text().splitlines()]


@pytest.mark.long
@pytest.mark.usefixtures("all_measured")
def test_the_second_time_nothing_is_measured(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = lowered().report
    before = cache.read_bytes()
    assert all(set(layer.seconds) == {2} for layer in first.layers)
    monkeypatch.setattr(measuring, "measure", lambda _: pytest.fail("measured again"))
    second = lowered().report
    assert second.layers == first.layers
    assert cache.read_bytes() == before


@pytest.mark.long
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


@pytest.mark.long
@pytest.mark.usefixtures("all_measured")
def test_layers_are_timed_in_the_dtype_that_they_have(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[set[torch.dtype]] = []
    measure = measuring.measure

    def measured(forms: Mapping[Decision, Callable[[], object]]) -> dict[Decision, float] | None:
        tensors, _ = forms["condensed"].args  # type: ignore[attr-defined]
        timed.append({held.dtype for held in tensors} & {torch.int8, torch.bfloat16})
        return measure(forms)

    monkeypatch.setattr(measuring, "measure", measured)
    report = lowered(value_dtype={"0": torch.int8, "3": torch.bfloat16}).report
    assert [layer.value_dtype for layer in report.layers] == ["int8", "bfloat16", "float32"]
    assert [what["values"] for what in kept(cache)[1:]] == ["int8", "bfloat16", "float32"]
    assert timed == [{torch.int8}, {torch.bfloat16}, set()]
    assert all(set(layer.seconds[2]) >= {"dense", "condensed"} for layer in report.layers)
    again = lowered(value_dtype=torch.int8).report
    assert [what["values"] for what in kept(cache)[4:]] == ["int8", "int8"]
    assert again.layers[0].seconds == report.layers[0].seconds
    assert again.layers[1].seconds != report.layers[1].seconds


@pytest.mark.long
def test_estimates_are_those_of_the_dtype() -> None:
    work = Work(rows=64, fan_in=64, active=64, kept=64 * 13, columns=2)
    bytewise = replace(work, value_bytes=1, eight_bits=True)
    for dtype, expected in ((torch.float32, work), (torch.int8, bytewise)):
        linear = mask_by_hand(randomise(nn.Sequential(nn.Linear(64, 64))), 0.2).eval()
        for speedup, machine in ((0.0, None), ("auto", ONNXRUNTIME)):
            x = torch.randn(2, 64)
            report = lower(linear, (x,), min_speedup=speedup, batch_sizes=[2], value_dtype=dtype).report  # type: ignore[arg-type]
            host = machine or host_machine()
            assert report.layers[0].estimates[2] == pytest.approx(estimate(expected, host))


@pytest.mark.slow
@pytest.mark.usefixtures("all_measured")
def test_leading_sizes_count_by_their_product(cache: Path) -> None:
    linear = mask_by_hand(randomise(nn.Sequential(nn.Linear(32, 32))), 0.2).eval()
    lower(linear, (torch.randn(2, 6, 32),))
    before = kept(cache)
    lower(linear, (torch.randn(3, 2, 2, 32),))
    assert kept(cache) == before


@pytest.mark.slow
def test_no_speedup_no_measuring(cache: Path) -> None:
    report = lowered(min_speedup=0).report
    assert not cache.exists()
    for layer in report.layers:
        assert layer.seconds == {}
        assert set(layer.estimates) == {2}
        assert all(seconds > 0 for seconds in layer.estimates[2].values())
    assert type(report).from_dict(json.loads(json.dumps(report.as_dict()))) == report


@pytest.mark.long
def test_linear_forms_that_are_far_apart_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "measure", lambda _: pytest.fail("measured"))
    monkeypatch.setattr(measuring, "checked_constants", lambda timings, kernels: Machine())  # busy or not
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


@pytest.mark.long
@pytest.mark.usefixtures("all_measured")
def test_measured_times_are_used_where_an_estimate_would_do(monkeypatch: pytest.MonkeyPatch) -> None:
    lowered()
    monkeypatch.setattr(measuring, "CLEAR", 1.0)
    assert all(layer.seconds for layer in lowered().report.layers)


@pytest.mark.long
def test_convolutions_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "estimate", lambda work, machine: {"dense": 9.0, "condensed": 1.0, "shrunk": 9.0})
    measured = {layer.fqn: bool(layer.seconds) for layer in lowered().report.layers}
    assert measured == {"0.weight": True, "3.weight": False, "5.weight": False}


def poisoned(cache: Path, factor: float) -> list[dict[str, float]]:
    """Make all condensed layers that were measured seem so many times as slow; their times before."""
    lines = [json.loads(line) for line in cache.read_text().splitlines()]
    before = []
    for line in lines:
        if line["what"]["operator"].startswith("aten."):
            before.append(dict(line["seconds"]))
            line["seconds"]["condensed"] *= factor
    cache.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return before


@pytest.mark.long
@pytest.mark.parametrize("factor", [1e4, 1e-4, 1e300, 1e-200])
def test_a_remembered_time_that_contradicts_the_estimates_is_measured_again(
    cache: Path, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    times: dict[Decision, float] = {"dense": 5e-5, "condensed": 4e-5, "shrunk": 4.5e-5}
    measured: list[object] = []

    def measure(forms: Mapping[Decision, object]) -> dict[Decision, float]:
        measured.append(forms)
        return {form: times[form] for form in forms}

    monkeypatch.setattr(measuring, "estimate", lambda work, machine: times)
    monkeypatch.setattr(measuring, "measure", measure)
    lowered(min_speedup=1.001)
    before = poisoned(cache, factor)
    assert len(before) == len(measured) == 3
    layers = lowered(min_speedup=1.001).report.layers
    assert len(measured) == 6
    again = {json.dumps(line["what"]): line["seconds"] for line in map(json.loads, cache.read_text().splitlines())}
    after = [seconds for what, seconds in again.items() if '"aten.' in what and '"again"' not in what]
    assert after == before
    assert [layer.seconds[2] for layer in layers] == before


@pytest.mark.long
def test_two_measurements_that_agree_are_believed_whatever_is_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that the cost model misjudges is measured twice, in two moments, and then no more."""
    monkeypatch.setattr(measuring, "estimate", lambda work, machine: {"dense": 1.0, "condensed": 1.0, "shrunk": 1.0})
    times: dict[Decision, float] = {"dense": 5e-5, "condensed": 1e-5, "shrunk": 3e-5}
    measured: list[object] = []

    def measure(forms: Mapping[Decision, object]) -> dict[Decision, float]:
        measured.append(forms)
        return {form: times[form] for form in forms}

    monkeypatch.setattr(measuring, "measure", measure)
    for count in (3, 6, 6):
        assert {layer.decision for layer in lowered().report.layers} == {"condensed"}
        assert len(measured) == count


@pytest.mark.long
def test_a_layer_that_cannot_be_measured_is_estimated_and_nothing_is_kept(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(measuring, "measure", lambda _: None)
    report = lowered(min_speedup=1.001).report
    assert all(layer.reason.startswith("estimated: ") and not layer.seconds for layer in report.layers)
    assert {what["operator"] for what in kept(cache)} == {"constants of the cost model"}
    (record,) = caplog.records
    assert "0.weight, 3.weight, 5.weight could not be measured" in record.getMessage()


@pytest.mark.slow
def test_estimates_that_are_not_believable_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Constants by which a layer loses 33 times against dense, where the default ones let it gain 4 times."""
    default = measuring._default()

    def estimate(work: object, machine: object) -> dict[str, float]:
        return {"dense": 8.0, "condensed": 2.0} if machine == default else {"dense": 1.0, "condensed": 33.0}

    linear = mask_by_hand(randomise(nn.Sequential(nn.Linear(32, 32))), 0.2).eval()
    monkeypatch.setattr(measuring, "estimate", estimate)
    (layer,) = lower(linear, (torch.randn(2, 32),)).report.layers
    assert layer.seconds
    assert not layer.reason.startswith("estimated")


@pytest.mark.parametrize(
    ("estimated", "believable"),
    [
        ({"dense": 4.0, "condensed": 1.0}, True),
        ({"dense": 40.0, "condensed": 10.0}, True),
        ({"dense": 15.9, "condensed": 1.0}, True),
        ({"dense": 16.1, "condensed": 1.0}, False),
        ({"dense": 1.01, "condensed": 1.0}, True),
        ({"dense": 0.99, "condensed": 1.0}, False),
        ({"dense": 0.03, "condensed": 1.0}, False),
    ],
)
def test_is_believable(estimated: dict[Decision, float], believable: bool) -> None:
    usual: Times = {1: {"dense": 8.0, "condensed": 2.0}}
    assert is_believable({1: estimated}, usual) == believable


@pytest.mark.parametrize(
    ("seconds", "contradict"),
    [
        ({"dense": 8e-5, "condensed": 2e-5}, False),
        ({"dense": 8e-5, "condensed": 5.9e-5}, False),
        ({"dense": 8e-5, "condensed": 6.1e-5}, True),
        ({"dense": 8e-5, "condensed": 0.6e-5}, True),
        ({"dense": 8e-4, "condensed": 2e-4}, False),
        ({"dense": 8e-3, "condensed": 2e-3}, True),  # both a hundred times as long
        ({"dense": 8e-9, "condensed": 2e-9}, True),
    ],
)
def test_contradicts(seconds: dict[str, float], contradict: bool) -> None:
    assert contradicts(seconds, {"dense": 8e-5, "condensed": 2e-5}) == contradict


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
