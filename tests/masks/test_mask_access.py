import torch
from torch import nn

from srigl_fx import masks, sparsify


def test_named_masks_and_apply() -> None:
    model = sparsify(nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 6)), sparsity=0.5)
    found = dict(masks.named_masks(model))
    assert list(found) == ["0.weight", "2.weight"]
    assert found["0.weight"] is model[0].weight_mask
    parameter = model[0].weight
    assert isinstance(parameter, nn.Parameter)
    with torch.no_grad():
        parameter.fill_(2.0)
        parameter[~found["0.weight"]] = float("nan")
    masks.apply(model)
    assert torch.equal(parameter, 2.0 * found["0.weight"])


def test_named_masks_are_live_and_named_as_the_wrapper_names_them() -> None:
    model = sparsify(nn.Sequential(nn.Linear(12, 8)), sparsity=0.5)
    assert [name for name, _ in masks.named_masks(nn.ModuleDict({"inner": model}))] == ["inner.0.weight"]


def test_strip_gives_the_dense_models_state() -> None:
    model = sparsify(nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8)), sparsity=0.5)
    state = model.state_dict()
    stripped = masks.strip(state)
    dense = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8))
    assert stripped.keys() == dense.state_dict().keys()
    dense.load_state_dict(stripped)
    assert "0.weight_mask" in state
    x = torch.randn(3, 12)
    assert torch.equal(dense.eval()(x), model.eval()(x))


def test_strip_keeps_what_only_looks_like_a_mask() -> None:
    state = {
        "weight": torch.ones(2, 2),
        "weight_mask": torch.ones(2, 2),
        "bias": torch.ones(2),
        "bias_mask": torch.ones(3, dtype=torch.bool),
        "attn_mask": torch.ones(2, dtype=torch.bool),
    }
    assert masks.strip(state).keys() == state.keys()
