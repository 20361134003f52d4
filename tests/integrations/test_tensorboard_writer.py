from pathlib import Path

import pytest
import torch
from torch import nn
from train_support import batches, mlp, train

import srigl_fx as sx
from srigl_fx.errors import TrainerError
from srigl_fx.masks.records import sparse_weights
from srigl_fx.train.metrics import MaskMetrics

pytest.importorskip("tensorboard", reason="the extra [tensorboard] is not installed")
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
from torch.utils.tensorboard import SummaryWriter

from srigl_fx.integrations.tensorboard import write_masks

NUMBERS = {"sparsity", "fan_in", "active_neurons", "active_share", "itop", "change_rate"}


def _read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"histograms": 0, "scalars": 0})
    events.Reload()
    return events


def test_a_plain_loop_writes_what_can_be_read_back(tmp_path: Path) -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    metrics = MaskMetrics(sx.SRigL(model, optimizer, total_steps=40, update_every=5, ablation=0.9))
    expected: dict[int, dict[str, float]] = {}
    with SummaryWriter(str(tmp_path)) as writer:

        def log() -> None:
            if metrics.poll():
                write_masks(writer, metrics)
                assert metrics.step is not None
                expected[metrics.step] = metrics.flat()

        train(model, optimizer, batches(17), log)
    assert list(expected) == [5, 10, 15]
    events = _read(tmp_path)
    layers = [handle.fqn for handle in sparse_weights(model)]
    assert set(events.Tags()["scalars"]) == {f"{number}/{name}" for number in NUMBERS for name in ["total", *layers]}
    for tag in events.Tags()["scalars"]:
        found = {event.step: event.value for event in events.Scalars(tag)}
        assert found == {step: pytest.approx(numbers[tag]) for step, numbers in expected.items()}
    for handle in sparse_weights(model):
        fan_out = events.Histograms(f"fan_out/{handle.fqn}")[-1].histogram_value
        assert (fan_out.num, fan_out.sum) == (handle.mask.shape[1], float(handle.mask.sum()))
        magnitude = events.Histograms(f"magnitude/{handle.fqn}")[-1].histogram_value
        assert magnitude.num == float(handle.mask.sum())
        # The weights have moved for two steps since they were written.
        assert magnitude.max == pytest.approx(handle.weight.abs().max().item(), abs=0.05)
    shares = events.Histograms("active_share_by_layer")[-1].histogram_value
    assert shares.num == len(layers)
    assert shares.sum == pytest.approx(sum(numbers["active_share"] for numbers in metrics.layers().values()))


def test_half_precision_and_an_empty_mask(tmp_path: Path) -> None:
    model = sx.sparsify(nn.Sequential(nn.Linear(16, 8)), sparsity=0.5).to(torch.bfloat16)
    trainer = sx.Static(model, torch.optim.SGD(model.parameters(), lr=0.1))
    model[0].get_buffer("weight_mask").zero_()
    with SummaryWriter(str(tmp_path)) as writer:
        with pytest.raises(TrainerError, match="step=0"):
            write_masks(writer, MaskMetrics(trainer))
        write_masks(writer, MaskMetrics(trainer), step=0)
        write_masks(writer, MaskMetrics(trainer), step=1, histograms=False)
    events = _read(tmp_path)
    assert [event.value for event in events.Scalars("sparsity/0.weight")] == [1.0, 1.0]
    assert [event.step for event in events.Histograms("fan_out/0.weight")] == [0]
    assert "magnitude/0.weight" not in events.Tags()["histograms"]
