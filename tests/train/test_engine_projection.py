"""What the engine writes to on an ordinary step: each gradient once, anything else only where it may have moved."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import srigl_fx as sx

OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01),
    "adafactor": lambda model: torch.optim.Adafactor(model.parameters(), lr=0.01),
}


def _attached(make: Callable[[nn.Module], Optimizer]) -> tuple[nn.Linear, Optimizer]:
    torch.manual_seed(0)
    model = sx.sparsify(nn.Sequential(nn.Linear(16, 12)), sparsity=0.75)
    optimizer = make(model)
    sx.Static(model, optimizer)
    layer = model[0]
    assert isinstance(layer, nn.Linear)
    return layer, optimizer


def _backward(layer: nn.Linear) -> None:
    layer(torch.randn(8, 16)).square().sum().backward()


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_noise_on_gradients_never_reaches_pruned_weights(make: Callable[[nn.Module], Optimizer]) -> None:
    layer, optimizer = _attached(make)
    for _ in range(3):
        optimizer.zero_grad()
        _backward(layer)
        assert layer.weight.grad is not None
        layer.weight.grad += torch.randn(12, 16)
        optimizer.step()
        sx.verify(layer, optimizer)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_weights_written_by_hand_are_projected_at_the_next_step(make: Callable[[nn.Module], Optimizer]) -> None:
    layer, optimizer = _attached(make)
    _backward(layer)
    optimizer.step()
    with torch.no_grad():
        layer.weight += 1
    with pytest.raises(sx.SriglError, match="off the mask"):
        sx.verify(layer)
    optimizer.zero_grad()
    _backward(layer)
    optimizer.step()
    sx.verify(layer, optimizer)


def test_a_clipped_nan_leaves_pruned_weights_and_their_state_at_zero() -> None:
    layer, optimizer = _attached(OPTIMIZERS["adamw"])
    _backward(layer)
    optimizer.step()
    optimizer.zero_grad()
    _backward(layer)
    assert layer.weight.grad is not None
    layer.weight.grad[0] = torch.nan
    nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
    optimizer.step()
    off = ~layer.get_buffer("weight_mask")
    state = optimizer.state[layer.weight]
    for tensor in (layer.weight, state["exp_avg"], state["exp_avg_sq"]):
        assert tensor.isnan().any()
        assert torch.equal(tensor[off], torch.zeros_like(tensor[off]))


def test_an_ordinary_step_writes_each_gradient_once_and_no_weight() -> None:
    layer, optimizer = _attached(OPTIMIZERS["sgd"])
    dense = nn.Linear(16, 12)
    plain = torch.optim.SGD(dense.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    writes = {}
    for module, stepper in ((layer, optimizer), (dense, plain)):
        for _ in range(3):
            stepper.zero_grad()
            _backward(module)
            assert module.weight.grad is not None
            gradient = module.weight.grad._version
            before = module.weight._version
            stepper.step()
        writes[module] = (gradient, module.weight._version - before)
    assert writes[layer] == (writes[dense][0] + 1, writes[dense][1])
