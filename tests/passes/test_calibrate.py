"""The scales that calibration gives: those of what each layer is handed, and each rule."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from lowering_support import Total, mask_by_hand, randomise
from torch import Tensor, nn

from srigl_fx.passes.base import run
from srigl_fx.passes.calibrate import Calibrate
from srigl_fx.passes.capture import capture_whole
from srigl_fx.passes.check_rounding import CheckRounding
from srigl_fx.passes.match import MatchWeights
from srigl_fx.passes.pipelines import LOWERING
from srigl_fx.passes.program import Program
from srigl_fx.runtime.quantisation import SMALLEST


def matched(model: nn.Module, x: Tensor, dtypes: dict[str, torch.dtype] | None = None) -> Program:
    captured = capture_whole(model.eval(), (x,), {}).program
    assert captured is not None
    captured.value_dtype = torch.int8
    captured.value_dtypes = dtypes or {}
    return run((*LOWERING, MatchWeights()), captured).subject


def calibrated(model: nn.Module, *batches: Tensor, **options: Any) -> Program:
    program = matched(model, torch.randn(3, *batches[0].shape[1:]), **options)
    return run((Calibrate([((x,), {}) for x in batches]),), program).subject


def pair() -> nn.Module:
    return mask_by_hand(randomise(nn.Sequential(nn.Linear(20, 33), nn.ReLU(), nn.Linear(33, 40))), 0.4)


def scales(program: Program) -> list[list[tuple[float | None, int]]]:
    return [[(use.x_scale, use.x_offset) for use in layer.uses] for layer in program.layers]


def test_rule_1_the_largest_magnitude_of_all_runs_is_the_largest_step() -> None:
    model, batches = pair(), [torch.randn(5, 20), 3 * torch.randn(2, 20), torch.randn(1, 20)]
    with torch.no_grad():
        inner = [torch.relu(model[0](x)) for x in batches]  # type: ignore[index]
    largest, between = (np.float32(max(float(x.abs().max()) for x in seen)) for seen in (batches, inner))
    ((first,), (second,)) = scales(calibrated(model, *batches))
    assert first == (float(largest / np.float32(127)), 128)
    assert second[0] == pytest.approx(float(between / np.float32(255)), rel=1e-6)
    assert second[1] == 0


@pytest.mark.long
def test_rule_1_one_negative_number_is_enough() -> None:
    x = torch.rand(4, 20)
    assert scales(calibrated(pair(), x))[0][0][1] == 0
    later = x.clone()
    later[3, 7] = -1e-3
    assert scales(calibrated(pair(), x, later))[0][0][1] == scales(calibrated(pair(), later, x))[0][0][1] == 128


class Tied(nn.Module):
    """One layer on two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(20, 24)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x) + self.fc(8 * x.abs())
        return y


def test_rule_1_each_use_of_a_layer_has_a_scale_of_its_own() -> None:
    x = torch.randn(4, 20)
    (((first, _), (second, offset)),) = scales(calibrated(mask_by_hand(randomise(Tied()), 0.4), x))
    assert first is not None
    assert second == pytest.approx(8 * first * 127 / 255, rel=1e-6)
    assert offset == 0


class Apart(nn.Module):
    """Two layers, of which the second gets something else."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.first, self.second, self.factor = nn.Linear(20, 24), nn.Linear(20, 24), factor

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.first(x) + self.second(x * self.factor)
        return y


@pytest.mark.parametrize(
    ("factor", "said"), [(math.inf, "that is not finite"), (0.0, "leave the layer's input zero"), (1e-38, "input zero")]
)
def test_rule_2_what_has_no_scale_finds_it_at_each_call(factor: float, said: str) -> None:
    model = mask_by_hand(randomise(Apart(factor)), 0.4)
    result = run((Calibrate([((torch.randn(3, 20),), {})]),), matched(model, torch.randn(3, 20)))
    first, second = result.subject.layers
    assert (first.calibrated, second.calibrated) == (True, False)
    (note,) = result.notes
    assert note.where == "second.weight"
    assert note.reason.startswith("scales are found at each call: ")
    assert said in note.reason


def test_rule_2_just_above_what_counts_there_is_a_scale() -> None:
    ((scale, offset),) = scales(calibrated(mask_by_hand(nn.Sequential(nn.Linear(4, 3)), 0.5), torch.full((2, 4), 1.5)))[
        0
    ]
    assert (scale, offset) == (float(np.float32(1.5) / np.float32(255)), 0)
    assert scale is not None
    assert scale > SMALLEST


def test_only_layers_of_int8_are_looked_at() -> None:
    program = calibrated(pair(), torch.randn(2, 20), dtypes={"0.weight": torch.float32})
    assert [layer.calibrated for layer in program.layers] == [False, True]


def test_without_inputs_nothing_is_done() -> None:
    result = run((Calibrate(),), matched(pair(), torch.randn(2, 20)))
    assert result.notes == ()
    assert not any(layer.calibrated for layer in result.subject.layers)


def test_buffers_that_the_model_writes_stay_as_they_are() -> None:
    model = mask_by_hand(randomise(Total()), 0.4)
    before = model.get_buffer("total").clone()
    program = calibrated(model, torch.randn(3, 17), torch.randn(2, 17))
    assert program.layers[0].calibrated
    assert torch.equal(model.get_buffer("total"), before)
    assert torch.equal(program.module.get_buffer("total"), before)


def test_a_layer_that_clipping_harms_finds_its_scales_and_the_note_says_so() -> None:
    """Of two layers, the one whose calibration inputs are far too small; it keeps its eight bits."""
    model, x = pair(), torch.randn(7, 20)
    result = run((Calibrate([((0.01 * x,), {})]), CheckRounding()), matched(model, x))
    first = result.subject.layers[0]
    assert (first.calibrated, first.value_dtype, first.unrounded) == (False, torch.int8, "")
    assert first.snr is not None
    assert first.snr > 30
    note = next(note for note in result.notes if note.where == "0.weight")
    assert note.reason.startswith("scales are found at each call: with given ones its signal-to-noise ratio is ")
    assert note.reason.endswith(" dB, and at least 25 dB are asked for")
    plain = run((CheckRounding(),), matched(model, x)).subject
    assert first.snr == plain.layers[0].snr


def test_a_layer_that_is_stored_in_float32_is_told_of_both() -> None:
    model, x = pair(), torch.randn(7, 20)
    result = run((Calibrate([((x,), {})]), CheckRounding(math.inf)), matched(model, x))
    for layer in result.subject.layers:
        assert (layer.calibrated, layer.value_dtype) == (False, torch.float32)
        reasons = [note.reason for note in result.notes if note.where == layer.weight.fqn]
        assert [reason.partition(":")[0] for reason in reasons] == [
            "scales are found at each call",
            "stored in float32",
        ]


@pytest.mark.long
def test_the_ratio_of_a_calibrated_layer_is_that_with_its_scales() -> None:
    model, x = pair(), torch.randn(7, 20)
    given = run((Calibrate([((x,), {})]), CheckRounding()), matched(model, x)).subject
    found = run((CheckRounding(),), matched(model, x)).subject
    assert all(layer.calibrated for layer in given.layers)
    for one, other in zip(given.layers, found.layers, strict=True):
        assert one.snr is not None
        assert other.snr is not None
        assert one.snr < other.snr  # one step for all samples is coarser than that of most
