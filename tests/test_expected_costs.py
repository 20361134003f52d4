"""``min_speedup="auto"``: the cost model's word, the same on every machine, and what the report says of it."""

from pathlib import Path

import pytest
import torch
from lowering_support import mask_by_hand, randomise
from torch import nn

import srigl_fx as sx
from srigl_fx.errors import LoweringError
from srigl_fx.lowering import layer_costs as measuring
from srigl_fx.lowering import pipeline as lowering
from srigl_fx.passes.program import Costs, Times
from srigl_fx.runtime.costs.cost_model import ONNXRUNTIME, Work, estimate


def _network() -> nn.Module:
    """A narrow layer, most of whose time is that of a call, and a wide one that gains."""
    return mask_by_hand(randomise(nn.Sequential(nn.Linear(4, 512), nn.ReLU(), nn.Linear(512, 512))), 0.1).eval()


def test_auto_condenses_what_is_expected_to_gain_and_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("nothing is to be measured, nor looked up")

    for name in ("measure", "machine_constants", "Timings"):
        monkeypatch.setattr(measuring, name, refuse)
    report = sx.lower(_network(), (torch.randn(3, 4),), min_speedup="auto").report
    narrow, wide = report.layers
    assert wide.decision == "condensed"
    assert narrow.decision == "dense"
    assert "estimated" in wide.reason
    assert "estimated" in narrow.reason
    assert set(wide.estimates) == {1, 16}
    for batch, forms in wide.estimates.items():
        work = Work(rows=512, fan_in=512, active=512, kept=512 * 51, columns=batch)
        assert forms == pytest.approx({form: estimate(work, ONNXRUNTIME)[form] for form in ("dense", "condensed")})
    assert not wide.seconds
    speedups = report.expected_speedups
    dense = {batch: sum(layer.estimates[batch]["dense"] for layer in (wide, narrow)) for batch in (1, 16)}
    taken = {batch: wide.estimates[batch]["condensed"] + narrow.estimates[batch]["dense"] for batch in (1, 16)}
    assert speedups == pytest.approx({batch: dense[batch] / taken[batch] for batch in (1, 16)})
    assert min(speedups.values()) > 1
    assert f"expected {speedups[1]:.1f} times as fast as dense at batch 1" in str(report)


def test_a_layer_that_loses_at_either_batch_stays_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    given: Times = {1: {"dense": 4.0, "condensed": 1.0}, 16: {"dense": 1.0, "condensed": 2.0}}
    monkeypatch.setattr(lowering, "estimated_costs", lambda *_: Costs(measured={}, estimated={"0.weight": given}))
    network = mask_by_hand(randomise(nn.Sequential(nn.Linear(64, 32))), 0.1).eval()
    (layer,) = sx.lower(network, (torch.randn(2, 64),), min_speedup="auto").report.layers
    assert (layer.decision, layer.reason) == (
        "dense",
        "estimated: condensed is 0.50 times as fast as dense at batch 16",
    )


@pytest.mark.slow
def test_auto_looks_at_the_batch_sizes_given_and_at_the_only_one_of_a_static_model() -> None:
    report = sx.lower(_network(), (torch.randn(3, 4),), min_speedup="auto", batch_sizes=[4]).report
    assert set(report.layers[1].estimates) == {4}

    class Static(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = _network()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.network(x.reshape(3, 4))  # type: ignore[no-any-return]

    report = sx.lower(Static().eval(), (torch.randn(3, 4),), min_speedup="auto").report
    assert not report.dynamic_batch
    assert set(report.layers[1].estimates) == {3}


def test_other_words_are_refused() -> None:
    with pytest.raises(LoweringError, match='must be "auto" or a number'):
        sx.lower(_network(), (torch.randn(3, 4),), min_speedup="always")  # type: ignore[arg-type]


@pytest.mark.long
def test_export_leaves_dense_what_is_expected_to_lose(tmp_path: Path) -> None:
    report = sx.export_onnx(_network(), tmp_path / "model.onnx", (torch.randn(2, 4),))
    assert [node.name for node in report.layers] == ["2.weight"]
    assert report.lowering is not None
    assert [layer.decision for layer in report.lowering.layers] == ["dense", "condensed"]
    assert "0.weight stays dense, estimated: condensed is" in str(report)
    assert "masked layers together expected" in str(report)
    assert report.as_dict()["lowering"]["layers"][0]["decision"] == "dense"
    everything = sx.export_onnx(_network(), tmp_path / "all.onnx", (torch.randn(2, 4),), min_speedup=0)
    assert [node.name for node in everything.layers] == ["0.weight", "2.weight"]
