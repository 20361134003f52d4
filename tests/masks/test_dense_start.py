"""Masks that start full, to be pruned gradually."""

import copy
import pickle

import pytest
import torch
from torch import nn

from srigl_fx import finalize, sparsify, summary
from srigl_fx.errors import StructureError
from srigl_fx.masks import verify
from srigl_fx.masks.invariants import over_budget
from srigl_fx.masks.records import Structure, set_dense_start, sparse_weights
from srigl_fx.masks.structures import initial_mask


@pytest.mark.parametrize("structure", ["constant_fan_in", "unstructured"])
def test_everything_is_kept(structure: Structure) -> None:
    draw = torch.Generator().manual_seed(0)
    mask = initial_mask(torch.zeros(3, 4), structure=structure, budget=3, init="dense", generator=draw)
    assert mask.tolist() == [[True] * 4] * 3
    with pytest.raises(StructureError, match="fan-in of 0"):
        initial_mask(torch.zeros(3, 4), structure="constant_fan_in", budget=2, init="dense", generator=draw)


def _model() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 6))
    return sparsify(model, sparsity=0.5, distribution="uniform", mask_init="dense")


def test_the_record_says_so_and_travels_with_copies() -> None:
    model = _model()
    x = torch.randn(2, 12)
    for copied in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(handle.record.dense_start for handle in sparse_weights(copied))
        assert [handle.record.budgets for handle in sparse_weights(copied)] == [(48,), (24,)]
        assert over_budget(copied) == ["0.weight", "2.weight"]
        verify(copied)
        assert torch.equal(copied(x), model(x))
    assert "0.weight" in str(summary(model))
    plain = finalize(model)
    assert over_budget(plain) == []


def test_a_graph_module_keeps_the_mark_through_copies() -> None:
    model = sparsify(torch.fx.symbolic_trace(nn.Sequential(nn.Linear(12, 8), nn.ReLU())), mask_init="dense")
    set_dense_start(model, False)
    assert not any(handle.record.dense_start for handle in sparse_weights(copy.deepcopy(model)))
    set_dense_start(model, True)
    assert all(handle.record.dense_start for handle in sparse_weights(copy.deepcopy(model)))


def test_weights_can_be_drawn_anew_for_the_full_fan_in() -> None:
    torch.manual_seed(0)
    model = sparsify(nn.Sequential(nn.Linear(400, 300)), sparsity=0.9, mask_init="dense", weight_init="kaiming")
    assert float(model.get_parameter("0.weight").detach().std()) == pytest.approx((2 / 400) ** 0.5, rel=0.02)
