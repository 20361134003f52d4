"""Which layers may have eight bits: the ratio is the one that its definition gives, and each rule."""

import math

import numpy as np
import pytest
import torch
from lowering_support import Total, mask_by_hand, randomise
from torch import Tensor, nn

from srigl_fx.comparison import LEAST_LAYER_SNR
from srigl_fx.passes.base import run
from srigl_fx.passes.capture import capture_whole
from srigl_fx.passes.check_rounding import CheckRounding
from srigl_fx.passes.match import MatchWeights
from srigl_fx.passes.pipelines import LOWERING
from srigl_fx.passes.program import Program
from srigl_fx.runtime.quantisation import LARGEST_FILTER, quantise_samples, quantise_weights


def matched(model: nn.Module, x: Tensor, dtype: torch.dtype = torch.int8) -> Program:
    captured = capture_whole(model.eval(), (x,), {}).program
    assert captured is not None
    captured.value_dtype = dtype
    return run((*LOWERING, MatchWeights()), captured).subject


class Tied(nn.Module):
    """One layer on two inputs, of which the second has a large number."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(40, 24)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x) + self.fc(torch.cat([60 * x[:, :1], x[:, 1:]], dim=1))
        return y


def by_definition(layer: nn.Linear, x: Tensor) -> float:
    """The ratio of a linear layer, in NumPy."""
    weight, bias = layer.weight.detach().numpy(), layer.bias.detach().double().numpy()
    values, scales = quantise_weights(weight)
    steps, of_samples, offsets = quantise_samples(x.numpy())
    rounded = (steps.astype(np.float64) - offsets[:, None]) @ values.T.astype(np.float64)
    z = rounded * of_samples[:, None] * scales + bias
    y = x.double().numpy() @ weight.T.astype(np.float64) + bias
    return 10 * math.log10((y**2).sum() / ((y - z) ** 2).sum())


def test_the_ratio_is_that_of_its_definition() -> None:
    model = mask_by_hand(randomise(nn.Sequential(nn.Linear(65, 33), nn.ReLU(), nn.Linear(33, 40))), 0.4)
    x = torch.randn(7, 65)
    program = run((CheckRounding(),), matched(model, x)).subject
    with torch.no_grad():
        inner = torch.relu(model[0](x))  # type: ignore[index]
    expected = [by_definition(model[0], x), by_definition(model[2], inner)]  # type: ignore[index]
    assert [layer.snr for layer in program.layers] == pytest.approx(expected, abs=0.01)
    assert [layer.value_dtype for layer in program.layers] == [torch.int8, torch.int8]
    assert [layer.unrounded for layer in program.layers] == ["", ""]


def test_of_a_weight_that_is_used_twice_the_smaller_ratio_counts() -> None:
    model = mask_by_hand(randomise(Tied()), 0.5)
    x = torch.randn(7, 40)
    assert isinstance(model.fc, nn.Linear)
    other = torch.cat([60 * x[:, :1], x[:, 1:]], dim=1)
    expected = by_definition(model.fc, x), by_definition(model.fc, other)
    program = run((CheckRounding(-math.inf),), matched(model, x)).subject
    assert min(expected) < max(expected) - 1
    assert program.layers[0].snr == pytest.approx(min(expected), abs=0.01)


def test_below_the_least_a_layer_gets_float32_and_the_note_says_so() -> None:
    model = mask_by_hand(randomise(nn.Sequential(nn.Linear(65, 33), nn.ReLU(), nn.Linear(33, 40))), 0.4)
    program = matched(model, torch.randn(7, 65))
    ratios = [layer.snr for layer in run((CheckRounding(),), program).subject.layers]
    assert None not in ratios
    least = sum(ratios) / 2  # type: ignore[arg-type]
    result = run((CheckRounding(least),), program)
    for layer, ratio in zip(result.subject.layers, ratios, strict=True):
        assert ratio is not None
        assert layer.snr == ratio
        assert layer.value_dtype is (torch.int8 if ratio >= least else torch.float32)
        assert bool(layer.unrounded) == (ratio < least)
    (note,) = result.notes
    assert note.reason.endswith(f"dB, and at least {least:g} dB are asked for")
    assert [layer.value_dtype for layer in program.layers] == [torch.int8, torch.int8]  # what came in is as it was


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_are_left_alone(dtype: torch.dtype) -> None:
    model = mask_by_hand(randomise(nn.Sequential(nn.Linear(16, 8))), 0.4)
    result = run((CheckRounding(math.inf),), matched(model, torch.randn(2, 16), dtype))
    assert result.notes == ()
    assert result.subject.layers[0].snr is None
    assert result.subject.layers[0].value_dtype is dtype


def test_equal_outputs_are_no_noise() -> None:
    model = mask_by_hand(nn.Sequential(nn.Linear(16, 8, bias=False)), 0.4)
    program = run((CheckRounding(),), matched(model, torch.zeros(2, 16))).subject
    assert program.layers[0].snr == math.inf
    assert program.layers[0].value_dtype is torch.int8


def test_an_input_that_is_infinite_makes_noise_of_what_it_does_not_meet() -> None:
    model = mask_by_hand(randomise(nn.Sequential(nn.Linear(16, 8))), 0.4)
    x = torch.randn(2, 16)
    x[1, 0] = -math.inf
    program = run((CheckRounding(),), matched(model, x)).subject
    assert program.layers[0].value_dtype is torch.float32
    assert "-inf dB" in program.layers[0].unrounded


def test_buffers_that_the_model_writes_stay_as_they_are() -> None:
    model = mask_by_hand(randomise(Total()), 0.4)
    before = model.get_buffer("total").clone()
    program = run((CheckRounding(),), matched(model, torch.randn(3, 17))).subject
    assert program.layers[0].snr is not None
    assert program.layers[0].snr > LEAST_LAYER_SNR
    assert torch.equal(model.get_buffer("total"), before)
    assert torch.equal(program.module.get_buffer("total"), before)


@pytest.mark.parametrize(("inputs", "fits"), [(LARGEST_FILTER, True), (LARGEST_FILTER + 1, False)])
def test_rule_3_a_filter_of_more_inputs_than_kernels_count(inputs: int, fits: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(inputs, 2, 1))
    mask_by_hand(model, 0.001)
    x = torch.randn(1, inputs, 3)
    (layer,) = run((CheckRounding(),), matched(model, x)).subject.layers
    assert layer.value_dtype is (torch.int8 if fits else torch.float32)
    assert fits or "a filter of 65537 inputs is too large for values of int8 (largest: 65536)" in layer.unrounded
    assert not fits or layer.snr is not None
