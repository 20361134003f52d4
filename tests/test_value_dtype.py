"""Condensed values of 16 bits: half the bytes, sums in float32, and errors that rounding explains."""

import copy
import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lowering_support import Branches, mask_by_hand, randomise
from torch import Tensor, nn

import srigl_fx as sx
from srigl_fx.comparison import TOLERANCE, relative_error, tolerance
from srigl_fx.errors import LoweringError
from srigl_fx.lowering.loading import load_lowered
from srigl_fx.lowering.lowered import LoweringReport
from srigl_fx.lowering.pipeline import lower

HALVES = (torch.bfloat16, torch.float16)
CONDENSED = (torch.ops.srigl_fx.condensed_linear.default, torch.ops.srigl_fx.condensed_conv.default)


def network() -> nn.Module:
    layers = (
        nn.Conv2d(3, 16, 3),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.ConvTranspose2d(16, 8, 2, stride=2),
        nn.GELU(),
        nn.Flatten(2),
        nn.Linear(144, 20),
    )
    return mask_by_hand(randomise(nn.Sequential(*layers)), 0.3, ablated={"0.weight": 3}).eval()


def values_of(lowered: nn.Module) -> dict[str, Tensor]:
    return {name: buffer for name, buffer in lowered.named_buffers() if name.endswith("_values")}


@pytest.mark.slow
@pytest.mark.parametrize("verify", [True, "each pass"])
@pytest.mark.parametrize("dtype", HALVES)
def test_values_are_stored_in_the_dtype_and_all_else_in_float32(dtype: torch.dtype, verify: Any) -> None:
    model = network()
    x = torch.randn(2, 3, 8, 8)
    lowered = lower(model, (x,), min_speedup=0, value_dtype=dtype, verify=verify)
    report = lowered.report
    assert {layer.decision for layer in report.layers} == {"condensed"}
    assert {values.dtype for values in values_of(lowered).values()} == {dtype}
    others = {b.dtype for name, b in lowered.named_buffers() if name.endswith(("_active", "_bias"))}
    assert others <= {torch.int32, torch.float32}
    assert report.value_dtype == str(dtype).removeprefix("torch.")
    assert report.value_dtype in str(report)
    assert report.max_error is not None
    assert 1e-5 < report.max_error <= report.tolerance == torch.finfo(dtype).eps * math.sqrt(3)
    with torch.no_grad():
        y = lowered(torch.randn(5, 3, 8, 8))
    assert y.dtype is torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALVES)
def test_bytes_are_those_of_the_buffers(dtype: torch.dtype) -> None:
    model = network()
    x = torch.randn(2, 3, 8, 8)
    full = lower(model, (x,), min_speedup=0).report
    lowered = lower(model, (x,), min_speedup=0, value_dtype=dtype)
    buffers = dict(lowered.named_buffers())
    for layer, before in zip(lowered.report.layers, full.layers, strict=True):
        values = next(t for name, t in buffers.items() if name.startswith(layer.fqn) and name.endswith("_values"))
        assert before.bytes_after - layer.bytes_after == 2 * values.numel()


@pytest.mark.parametrize("dtype", HALVES)
def test_sums_are_formed_in_float32(dtype: torch.dtype) -> None:
    """Thousands of small numbers beside a large one: sums of 16 bits would lose them."""
    model = mask_by_hand(nn.Sequential(nn.Linear(4097, 4)), 1.0).eval()
    with torch.no_grad():
        model[0].weight.fill_(2**-7)  # type: ignore[index]
        model[0].weight[:, 0] = 64  # type: ignore[index]
    x = torch.ones(2, 4097)
    lowered = lower(model, (x,), min_speedup=0, value_dtype=dtype)
    with torch.no_grad():
        torch.testing.assert_close(lowered(x), model(x), rtol=1e-6, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALVES)
def test_the_result_is_the_model_with_rounded_weights(dtype: torch.dtype) -> None:
    model = mask_by_hand(randomise(nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 5))), 0.3).eval()
    x = torch.randn(4, 40)
    lowered = lower(model, (x,), min_speedup=0, value_dtype=dtype)
    with torch.no_grad():
        exact = model(x)
        for layer in (model[0], model[2]):  # type: ignore[index]
            layer.weight.copy_(layer.weight.to(dtype))
        assert relative_error(model(x), lowered(x)) < 1e-6
        assert relative_error(exact, lowered(x)) > 1e-5


@pytest.mark.long
@pytest.mark.parametrize("dtype", HALVES)
def test_copied_saved_and_compiled(dtype: torch.dtype, tmp_path: Path) -> None:
    x = torch.randn(2, 3, 8, 8)
    lowered = lower(network(), (x,), min_speedup=0, value_dtype=dtype)
    lowered.save(tmp_path / "model.srigl")
    compiled = torch.compile(lowered, fullgraph=True, backend="aot_eager")
    again = (load_lowered(tmp_path / "model.srigl"), pickle.loads(pickle.dumps(lowered)), copy.deepcopy(lowered))
    with torch.no_grad():
        expected = lowered(x)
        for one in again:
            assert one.report == lowered.report
            assert {values.dtype for values in values_of(one).values()} == {dtype}
            assert torch.equal(one(x), expected)
        torch.testing.assert_close(compiled(x), expected)
    report = lowered.report
    assert LoweringReport.from_dict(json.loads(json.dumps(report.as_dict()))) == report


@pytest.mark.long
@pytest.mark.parametrize("dtype", HALVES)
def test_exported(dtype: torch.dtype, tmp_path: Path) -> None:
    model, inputs = network(), (torch.randn(2, 3, 8, 8),)
    full = sx.export_onnx(model, tmp_path / "full.onnx", inputs, verify=False, min_speedup=0)
    report = sx.export_onnx(model, tmp_path / "half.onnx", inputs, value_dtype=dtype, min_speedup=0)
    values = sum(tensor.numel() for tensor in values_of(lower(model, inputs, min_speedup=0)).values())
    assert full.sparse_bytes - report.sparse_bytes == 2 * values
    assert report.fallback_error is not None
    assert report.fallback_error <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALVES)
def test_regions(dtype: torch.dtype) -> None:
    model = mask_by_hand(randomise(Branches()), 0.3).eval()
    lowered: Any = lower(model, (torch.ones(2, 32),), min_speedup=0, value_dtype=dtype)
    assert len(lowered.regions) == 2
    assert lowered.report.value_dtype == str(dtype).removeprefix("torch.")
    assert lowered.report.max_error is not None
    assert 1e-5 < lowered.report.max_error <= lowered.report.tolerance
    assert {values.dtype for one in lowered.regions.values() for values in values_of(one).values()} == {dtype}


@pytest.mark.slow
def test_what_is_measured_is_what_is_chosen() -> None:
    model = mask_by_hand(randomise(nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 4))), 0.02).eval()
    lowered = lower(model, (torch.randn(1, 256),), min_speedup=1e-6, value_dtype=torch.bfloat16)
    assert {layer.decision for layer in lowered.report.layers} == {"condensed"}
    assert {values.dtype for values in values_of(lowered).values()} == {torch.bfloat16}
    dense = lower(model, (torch.randn(1, 256),), min_speedup=float("inf"), value_dtype=torch.bfloat16)
    assert dense.report.tolerance == TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("min_speedup", [0, 1.0])
def test_a_weight_too_large_for_float16_is_refused(min_speedup: float) -> None:
    model = mask_by_hand(randomise(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))), 0.5).eval()
    with torch.no_grad():
        position = model[2].weight_mask.nonzero()[0]  # type: ignore[index]
        model[2].weight[tuple(position)] = -1e5  # type: ignore[index]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(LoweringError, match=r"2\.weight \(4, 16\) holds -1e\+05.*float16.*65504.*bfloat16"):
        lower(model, (torch.randn(2, 16),), min_speedup=min_speedup, value_dtype=torch.float16)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    lower(model, (torch.randn(2, 16),), min_speedup=0, value_dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float64, torch.uint8, "bfloat16", None, []])
def test_other_dtypes_are_refused(dtype: Any) -> None:
    with pytest.raises(
        LoweringError, match=r"value_dtype must be torch\.float32, torch\.bfloat16, torch\.float16 or torch\.int8"
    ):
        lower(network(), (torch.randn(2, 3, 8, 8),), value_dtype=dtype)


def test_errors_beyond_rounding_are_found() -> None:
    calls: list[int] = []  # not the model's own, so that it is no state that could be kept

    class Drifts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(64, 32)

        def forward(self, x: Tensor) -> Tensor:
            calls.append(1)
            y: Tensor = self.fc(x) * (1 + 0.02 * len(calls))
            return y

    model = mask_by_hand(randomise(Drifts()), 0.3).eval()
    with pytest.raises(LoweringError, match=r"graph as captured is off by .*no pass has run yet"):
        lower(model, (torch.randn(2, 64),), min_speedup=0, value_dtype=torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("depth", [1, 4, 12])
def test_the_tolerance_grows_as_the_errors_do(depth: int, dtype: torch.dtype) -> None:
    layers = [module for _ in range(depth) for module in (nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU())]
    model = mask_by_hand(randomise(nn.Sequential(*layers)), 0.25).eval()
    report = lower(model, (torch.randn(8, 64),), min_speedup=0, value_dtype=dtype).report
    assert report.max_error is not None
    allowed = tolerance(dtype, depth)
    assert allowed / 30 < report.max_error < allowed
