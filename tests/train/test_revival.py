"""Batch normalisation magnifies the gradients of ablated neurons; by default that alone does not bring them back."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from train_support import batches, loss_of, mask_copies, same

from srigl_fx import sparsify
from srigl_fx.errors import TrainerError
from srigl_fx.masks import verify
from srigl_fx.train import SRigL
from srigl_fx.train.srigl import scale_dead_rows
from srigl_fx.train.updates import srigl_update

GRADIENT = torch.tensor([[1.0, -3.0], [2.0, 6.0], [60.0, -20.0], [4.0, 3.0], [0.0, 0.0]])
MASK = torch.tensor([[True, False], [False, True], [False, False], [False, False], [False, False]])


def test_only_rows_beyond_every_live_one_are_scaled() -> None:
    scaled = scale_dead_rows(GRADIENT, MASK)  # live means 2 and 4, dead ones 40, 3.5 and 0
    expected = GRADIENT.clone()
    expected[2] = torch.tensor([4.5, -1.5])
    assert torch.equal(scaled, expected)
    assert scale_dead_rows(GRADIENT[[0, 1, 3, 4]], MASK[[0, 1, 3, 4]]).equal(GRADIENT[[0, 1, 3, 4]])


@pytest.mark.parametrize("rows", [[0, 1], [2, 3, 4], [4]])
def test_layers_that_are_all_alive_or_all_dead_stay_as_they_are(rows: list[int]) -> None:
    assert scale_dead_rows(GRADIENT[rows], MASK[rows]).equal(GRADIENT[rows])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_does_not_spread(bad: float) -> None:
    gradient = GRADIENT.clone()
    gradient[0, 1] = gradient[2, 1] = bad
    scaled = scale_dead_rows(gradient, MASK)
    known = torch.ones_like(MASK)
    known[0, 1] = known[2, 1] = False
    assert scaled[known].isfinite().all()
    assert float(scaled[2, 0]) == 4.5  # the live rows' means are 0.5 and 4, the dead row's 30


def test_the_worked_example_still_revives_in_the_pure_rule() -> None:
    weight = torch.tensor([[0.2, 0.9, 0, 0.8], [0.6, 0, 0.7, 0.1], [0, 0, 0, 0]])
    grad = torch.tensor([[0.05, 0.06, 0.3, 0.07], [0.1, 0.2, 0.08, 0.09], [0.95, 0.9, 0.01, 0.02]])
    options: dict[str, Any] = {"budget": 6, "drop_fraction": 0.2, "ablation": 1, "ablation_mode": "absolute"}
    assert srigl_update(weight, grad, weight != 0, **options).any(dim=1).tolist() == [True, True, True]
    scaled = scale_dead_rows(grad, weight != 0)
    assert torch.allclose(scaled[2], grad[2] * (grad[:2].mean() / grad[2].mean()))


def _train(normalised: bool, **options: Any) -> tuple[int, dict[str, Tensor]]:
    """How many neurons come back in a short run, and the masks at its end."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs in (24, 64):
        layers += [nn.Linear(inputs, 64), *([nn.BatchNorm1d(64)] if normalised else []), nn.ReLU()]
    model = sparsify(nn.Sequential(*layers, nn.Linear(64, 4)), sparsity=0.85, mask_init="random", weight_init="kaiming")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    SRigL(model, optimizer, total_steps=100, update_every=5, ablation=0.9, **options)
    masks, revived = mask_copies(model), 0
    for x in batches(80, (32, 24)):
        optimizer.zero_grad()
        torch.autograd.backward(loss_of(model, x))
        optimizer.step()
        now = mask_copies(model)
        revived += sum(int((now[name].any(dim=1) & ~masks[name].any(dim=1)).sum()) for name in now)
        masks = now
    verify(model, optimizer)
    return revived, masks


@pytest.mark.slow
def test_neurons_come_back_for_a_reason() -> None:
    reference, _ = _train(True, revival="reference")
    scaled, masks = _train(True)
    permanent, _ = _train(True, permanent_ablation=True)
    assert reference >= 10
    assert scaled <= reference / 5
    assert permanent == 0
    assert not all(bool(mask.any(dim=1).all()) for mask in masks.values())


@pytest.mark.slow
def test_without_batch_normalisation_hardly_anything_changes() -> None:
    reference, _ = _train(False, revival="reference")
    scaled, _ = _train(False)
    assert reference > 0
    assert abs(scaled - reference) <= max(2, reference / 4)


def test_without_ablated_neurons_nothing_changes() -> None:
    def masks(**options: Any) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = sparsify(nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 4)), sparsity=0.75)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        SRigL(model, optimizer, total_steps=40, update_every=5, ablation=None, **options)
        for x in batches(20):
            optimizer.zero_grad()
            torch.autograd.backward(loss_of(model, x))
            optimizer.step()
        return mask_copies(model)

    assert same(masks(), masks(revival="reference"))


def test_another_word_is_refused() -> None:
    model = sparsify(nn.Sequential(nn.Linear(24, 32)), sparsity=0.75)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TrainerError, match='revival is \'never\'; choose "scaled" or "reference"'):
        SRigL(model, optimizer, total_steps=100, revival="never")  # type: ignore[arg-type]
