import copy
import math

import pytest
import torch
from torch import nn

import srigl_fx as sx
from srigl_fx.errors import StructureError
from srigl_fx.masks.initialisation import WeightInit, initialise


def _mask(rows: int, fan_in: int, kept: int) -> torch.Tensor:
    mask = torch.zeros(rows, fan_in, dtype=torch.bool)
    mask[:, :kept] = True
    return mask


@pytest.mark.parametrize(
    ("scheme", "deviation"),
    [("kaiming", math.sqrt(2 / 100)), ("torch", math.sqrt(1 / 300)), ("grad_flow_ref", 2 / 100)],
)
def test_scaled_by_the_sparse_fan_in(scheme: WeightInit, deviation: float) -> None:
    mask = _mask(400, 500, 100)
    values = initialise(torch.ones(400, 500), mask, scheme, torch.Generator().manual_seed(0))
    assert not values[~mask].any()
    assert values[mask].std().item() == pytest.approx(deviation, rel=0.02)
    assert values[mask].mean().item() == pytest.approx(0, abs=4 * deviation / math.sqrt(40_000))
    if scheme == "torch":
        assert 0.099 < values.abs().max().item() <= 0.1


def test_each_row_by_its_own_fan_in() -> None:
    mask = torch.zeros(3, 4000, dtype=torch.bool)
    mask[0, :1000] = True
    mask[1] = True
    values = initialise(torch.ones(3, 4000), mask, "kaiming", torch.Generator().manual_seed(0))
    assert values[0, :1000].std().item() == pytest.approx(math.sqrt(2 / 1000), rel=0.1)
    assert values[1].std().item() == pytest.approx(math.sqrt(2 / 4000), rel=0.1)
    assert not values[2].any()


def test_keep() -> None:
    weight = torch.randn(5, 6, dtype=torch.float64)
    weight[0, 5] = float("nan")
    mask = _mask(5, 6, 3)
    kept = initialise(weight, mask, "keep", torch.Generator())
    assert torch.equal(kept[:, :3], weight[:, :3])
    assert not kept[:, 3:].any()
    assert kept.dtype == torch.float64


@pytest.mark.parametrize("scheme", ["kaiming", "torch", "grad_flow_ref"])
def test_same_seed_same_values_in_the_weights_dtype(scheme: WeightInit) -> None:
    mask = _mask(8, 16, 4)
    first, again = (
        initialise(torch.ones(8, 16, dtype=torch.bfloat16), mask, scheme, torch.Generator().manual_seed(7))
        for _ in range(2)
    )
    assert first.dtype == torch.bfloat16
    assert torch.equal(first, again)


@pytest.mark.parametrize(
    ("layer", "fan_in"),
    [(nn.Conv2d(32, 256, 3, groups=2), 144), (nn.ConvTranspose2d(128, 64, 3), 1152), (nn.Conv1d(64, 256, 5), 320)],
)
@pytest.mark.parametrize(("scheme", "variance"), [("kaiming", 2.0), ("torch", 1 / 3), ("grad_flow_ref", None)])
def test_the_fan_in_is_that_of_the_layers_kind(
    layer: nn.Module, fan_in: int, scheme: WeightInit, variance: float | None
) -> None:
    model = nn.Sequential(copy.deepcopy(layer))
    bias = model.get_parameter("0.bias").detach().clone()
    sx.sparsify(model, sparsity=0.75, distribution="uniform", weight_init=scheme)
    weight, mask = model.get_parameter("0.weight").detach(), model.get_buffer("0.weight_mask")
    kept = fan_in // 4
    deviation = 2 / kept if variance is None else math.sqrt(variance / kept)
    assert weight[mask].std().item() == pytest.approx(deviation, rel=0.05)
    assert not weight[~mask].any()
    assert torch.equal(model.get_parameter("0.bias"), bias)


def test_wrong_arguments() -> None:
    with pytest.raises(StructureError, match="same shape"):
        initialise(torch.ones(2, 3), _mask(3, 2, 1), "keep", torch.Generator())
    with pytest.raises(StructureError, match="choose"):
        initialise(torch.ones(2, 3), _mask(2, 3, 1), "ones", torch.Generator())  # type: ignore[arg-type]
