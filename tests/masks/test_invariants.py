import math
import re

import pytest
import torch
from torch import nn

from srigl_fx import masks, sparsify
from srigl_fx.errors import InvariantError
from srigl_fx.masks import verify


def _model() -> nn.Sequential:
    return sparsify(nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 6)), sparsity=0.5, distribution="uniform")


def test_a_fresh_model_passes() -> None:
    model = _model()
    verify(model, torch.optim.Adam(model.parameters()))
    verify(nn.Linear(3, 2))


@pytest.mark.parametrize("value", [1e-30, float("nan"), float("inf")])
def test_values_off_the_mask(value: float) -> None:
    model = _model()
    weight, mask = model.get_parameter("2.weight"), model.get_buffer("2.weight_mask")
    weight.data[tuple((~mask).nonzero()[0])] = value
    message = "2.weight: 1 weights off the mask are not zero"
    if not math.isfinite(value):
        message = "2.weight: 0 kept weights and 1 off the mask are NaN or infinite"
    with pytest.raises(InvariantError, match=re.escape(message)):
        verify(model)


def test_unequal_fan_in_and_budget() -> None:
    model = _model()
    weight, mask = model.get_parameter("0.weight"), model.get_buffer("0.weight_mask")
    kept = mask[0].nonzero()[0]
    mask[0, kept] = False
    weight.data[0, kept] = 0
    with pytest.raises(InvariantError, match=r"0\.weight: 8 active neurons must have a fan-in of 6 .* \[5, 6\]"):
        verify(model)
    mask.fill_(True)
    with pytest.raises(InvariantError, match=r"0\.weight: the mask keeps 96 weights, more than the budget of 48"):
        verify(model)
    mask.fill_(False)
    weight.data.zero_()
    with pytest.raises(InvariantError, match="cannot hold the budget"):
        verify(model)


def test_blocks_of_a_packed_projection_are_named() -> None:
    model = sparsify(nn.MultiheadAttention(16, 2), sparsity=0.5)
    mask = model.get_buffer("in_proj_weight_mask")
    mask[16:32] = True
    with pytest.raises(InvariantError, match=r"in_proj_weight \(rows 16-31, k\): the mask keeps 256"):
        verify(model)


@pytest.mark.parametrize(
    ("replacement", "message"),
    [
        (torch.ones(6, 8), "bool"),
        (torch.ones(8, 6, dtype=torch.bool), "shape"),
        (torch.ones(6, 8, dtype=torch.bool, device="meta"), "is on meta"),
    ],
)
def test_malformed_masks(replacement: torch.Tensor, message: str) -> None:
    model = _model()
    model[2].register_buffer("weight_mask", replacement)
    with pytest.raises(InvariantError, match=rf"2\.weight_mask .*{message}"):
        verify(model)


def test_a_missing_mask() -> None:
    model = _model()
    del model[2].weight_mask
    with pytest.raises(InvariantError, match=r"2\.weight.*removed"):
        verify(model)


def test_optimizer_state_off_the_mask() -> None:
    model = _model()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 12)).square().sum().backward()
    optimizer.step()  # no trainer: dense gradients reach the moments and the weights
    masks.apply(model)
    verify(model)
    with pytest.raises(InvariantError, match=r"0\.weight: the optimizer state 'exp_avg'"):
        verify(model, optimizer)


def test_values_that_are_not_finite_are_called_so() -> None:
    model = sparsify(nn.Sequential(nn.Linear(32, 16)), sparsity=0.5)
    model.get_parameter("0.weight").data.fill_(float("nan"))
    with pytest.raises(InvariantError, match=r"0\.weight: 256 kept weights and 256 off the mask are NaN or infinite"):
        verify(model)


def test_an_optimizer_that_has_lost_a_weight() -> None:
    model = sparsify(nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 8)), sparsity=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    verify(model, optimizer)
    optimizer.param_groups[0]["params"].pop(0)
    with pytest.raises(InvariantError, match=r"0\.weight: the optimizer does not hold this weight"):
        verify(model, optimizer)
    model.get_parameter("0.weight").requires_grad_(False)
    verify(model, optimizer)
    former = model.get_parameter("1.weight").detach().clone()
    model.get_submodule("1").register_parameter("weight", nn.Parameter(former))
    with pytest.raises(InvariantError, match=r"1\.weight: the optimizer does not hold this weight"):
        verify(model, optimizer)
