"""Spectral normalisation of masked weights: a weight of which nothing is left."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as old_spectral_norm

import srigl_fx as sx
from srigl_fx.errors import SparsifyError
from srigl_fx.masks.records import MASK_SUFFIX


@pytest.fixture(params=["new", "old"])
def model(request: pytest.FixtureRequest) -> nn.Sequential:
    torch.manual_seed(0)
    normalise = parametrizations.spectral_norm if request.param == "new" else old_spectral_norm
    return sx.sparsify(nn.Sequential(normalise(nn.Linear(12, 8)), nn.ReLU(), nn.Linear(8, 4)), sparsity=0.5)


def _stored(model: nn.Module) -> tuple[nn.Parameter, torch.Tensor]:
    """The masked weight of the first layer, and its mask."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    name = next(name for name in tensors if name.startswith("0.") and name + MASK_SUFFIX in tensors)
    weight = tensors[name]
    assert isinstance(weight, nn.Parameter)
    return weight, tensors[name + MASK_SUFFIX]


@torch.no_grad()
def _kill(model: nn.Sequential) -> nn.Parameter:
    weight, mask = _stored(model)
    weight.zero_()
    mask.zero_()
    return weight


@pytest.mark.parametrize("training", [True, False])
def test_a_weight_of_zeros_has_finite_values_and_gradients(model: nn.Sequential, training: bool) -> None:
    weight = _kill(model)
    x = torch.randn(5, 12)
    y = model.train(training)(x)
    layer: Any = model[0]
    torch.testing.assert_close(layer(x), layer.bias.expand(5, 8))
    y.square().sum().backward()
    assert weight.grad is not None
    assert weight.grad.isfinite().all()
    assert weight.grad.any()


def test_it_can_be_revived(model: nn.Sequential) -> None:
    weight = _kill(model)
    x = torch.randn(5, 12)
    model.train()
    for _ in range(3):
        model(x)  # the power iteration goes on, and must keep its vectors
    _, mask = _stored(model)
    with torch.no_grad():
        mask[2, :3] = True
        weight[2, :3] = torch.tensor([3.0, 0.0, 4.0])
    for _ in range(30):
        model(x)
    expected = torch.zeros(8, 12)
    expected[2, :3] = torch.tensor([0.6, 0.0, 0.8])
    torch.testing.assert_close(model.eval()[0](x) - model[0].bias, x @ expected.t())


def test_copies_behave_alike_and_names_stay(model: nn.Sequential) -> None:
    names = set(model.state_dict())
    model.eval()
    with torch.no_grad():
        model(torch.randn(2, 12))
    _kill(model)
    x = torch.randn(5, 12)
    others = [copy.deepcopy(model)]
    if not hasattr(model[0], "parametrizations"):  # torch refuses to pickle those
        others.append(pickle.loads(pickle.dumps(model)))
    for other in others:
        torch.testing.assert_close(other(x), model(x))
        assert set(other.state_dict()) == names


def test_finalize_restores_torchs_own(model: nn.Sequential) -> None:
    x = torch.randn(5, 12)
    expected = model.eval()(x)
    torch.testing.assert_close(sx.finalize(model)(x), expected)
    assert all("Guarded" not in type(hook).__name__ for hook in model[0]._forward_pre_hooks.values())


def test_finalize_refuses_what_would_be_no_number(model: nn.Sequential) -> None:
    _kill(model)
    with pytest.raises(SparsifyError, match="finalize would change the outputs"):
        sx.finalize(model)


@pytest.mark.slow
def test_lower_takes_a_weight_of_zeros(model: nn.Sequential) -> None:
    _kill(model)
    x = torch.randn(5, 12)
    torch.testing.assert_close(sx.lower(model.eval(), (x,))(x), model(x))
