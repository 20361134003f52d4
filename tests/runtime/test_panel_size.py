"""How much memory the packed copies of a weight take."""

import pytest
import torch

import srigl_fx.runtime.ops  # noqa: F401 - registers the operators
from srigl_fx.runtime.cpu.kernels import plan
from srigl_fx.runtime.cpu.kernels.isa import AVX512, level_of
from srigl_fx.runtime.cpu.prepared_weights import panel_of
from srigl_fx.runtime.validation import check_weight

LIMITS = {0.9: 0.3, 0.95: 0.2, 0.99: 0.1}  # sparsity -> of the dense bytes


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sparsity", LIMITS)
@pytest.mark.parametrize(("n", "in_features"), [(768, 3072), (3072, 768), (1024, 1024), (512, 4608)])
def test_packed_copies_are_small(n: int, in_features: int, sparsity: float, dtype: torch.dtype) -> None:
    k = round((1 - sparsity) * in_features)
    indices = torch.rand(n, in_features).argsort(1)[:, :k].sort(1).values.to(torch.uint16)
    values, active, bias = torch.randn(n, k).to(dtype), torch.arange(n, dtype=torch.int32), torch.randn(n)
    prepared = check_weight("condensed_linear", values, indices, active, bias, in_features)
    assert prepared is not None
    for kernel in (plan.DOT, plan.TILE):
        window = plan.window_of(kernel, level_of(AVX512), in_features, n, k)
        packed = panel_of(prepared, kernel, window, values, indices, active, in_features, n, n)
        assert packed.nbytes <= LIMITS[sparsity] * 4 * n * in_features


@pytest.mark.parametrize("sparsity", LIMITS)
@pytest.mark.parametrize(("n", "in_features"), [(768, 3072), (3072, 768), (1024, 1024), (512, 4608)])
def test_packed_copies_of_eight_bits_are_smaller(n: int, in_features: int, sparsity: float) -> None:
    k = round((1 - sparsity) * in_features)
    indices = torch.rand(n, in_features).argsort(1)[:, :k].sort(1).values.to(torch.uint16)
    values = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    active, bias, scales = torch.arange(n, dtype=torch.int32), torch.randn(n), torch.rand(n)
    prepared = check_weight("condensed_linear", values, indices, active, bias, in_features, scales)
    assert prepared is not None
    for kernel in (plan.INT8_DOT, plan.INT8_TILE):
        window = plan.int8_window(True, kernel, in_features, k)
        packed = panel_of(prepared, kernel, window, values, indices, active, in_features, n, n, scales)
        assert packed.nbytes <= 0.5 * LIMITS[sparsity] * 4 * n * in_features
