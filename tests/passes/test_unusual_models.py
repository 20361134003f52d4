"""Models that write into their inputs, or whose parameters have unusual types, roles or names."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import srigl_fx as sx
from srigl_fx.masks.records import all_records
from srigl_fx.passes.capture import capture_whole
from srigl_fx.passes.model_runs import run_model


class _Spectrum(nn.Module):
    def __init__(self, scaled: bool) -> None:
        super().__init__()
        self.a = nn.Linear(16, 16)
        self.w = nn.Parameter(torch.randn(9, 9, dtype=torch.cfloat))
        self.scaled = scaled

    def forward(self, x: Tensor) -> Tensor:
        w = self.w / self.w.abs().mean() if self.scaled else self.w
        y: Tensor = torch.fft.irfft(torch.fft.rfft(self.a(x)) @ w, n=16)
        return y


class _Stored(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.a = nn.Linear(16, 16)
        self.w = nn.Parameter(torch.randint(-3, 4, (16, 16)).to(dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(x) @ self.w.to(torch.float32)
        return y


def _reasons(model: nn.Module) -> dict[str, str]:
    return {name: record.reason for name, _, record in all_records(model)}


@pytest.mark.slow
@pytest.mark.parametrize("examples", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
def test_complex_weights_stay_dense(scaled: bool, examples: bool) -> None:
    x = torch.randn(4, 16)
    model = sx.sparsify(_Spectrum(scaled), strict=True, example_inputs=(x,) if examples else None)
    assert _reasons(model)["w"] == "complex weights are not supported"
    assert not _reasons(model)["a.weight"]
    torch.testing.assert_close(sx.lower(model.eval(), (x,))(x), model(x))


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn])
def test_weights_of_other_types_stay_dense(dtype: torch.dtype) -> None:
    model = sx.sparsify(_Stored(dtype), strict=True, example_inputs=(torch.randn(4, 16),))
    assert _reasons(model)["w"].endswith("are not supported")


class _Generated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gen = nn.Linear(10, 192)
        self.z = nn.Parameter(torch.randn(1, 10))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.gen(self.z).view(12, 16))


def test_what_a_weight_is_generated_from_is_data() -> None:
    reasons = _reasons(sx.sparsify(nn.Sequential(_Generated(), nn.Linear(12, 4)), sparsity=0.5))
    assert reasons["0.z"] == "not a contraction weight: it is data, which the weight '0.gen.weight' multiplies"


class _InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(16, 16)
        self.o = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(0.5)
        x += 1
        y: Tensor = self.o(functional.relu_(self.a(x)))
        return y


@pytest.mark.slow
def test_inputs_that_the_model_writes_into_stay_as_they_are() -> None:
    x = torch.randn(4, 16)
    before = x.clone()
    model = sx.sparsify(_InPlace(), sparsity=0.5, example_inputs=(x,)).eval()
    run_model(model, (x,), {})
    with torch.no_grad():
        for name in ("weight", "weight_mask", "bias"):
            getattr(model.a, name)[3] = 0
    lowered = sx.lower(model, (x,), min_speedup=0)
    assert torch.equal(x, before)
    ours, own = x.clone(), x.clone()
    torch.testing.assert_close(lowered(ours), model(own))
    torch.testing.assert_close(ours, own)


@pytest.mark.parametrize("name", ["code", "graph", "meta"])
def test_a_name_that_graphs_have_is_reported_once(name: str) -> None:
    class Named(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = super().forward(x) + getattr(self, name)
            return y

    model = Named(16, 16)
    model.register_parameter(name, nn.Parameter(torch.randn(16)))
    (failure,) = capture_whole(model.eval(), (torch.randn(4, 16),), {}).failures
    assert repr(name) in failure.error
    assert "rename it" in failure.error
