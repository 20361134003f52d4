"""What the engine writes to on an ordinary step: each gradient once, anything else only where it may have moved."""

import copy
import pickle
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


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_masks_that_are_loaded_into_a_live_run_are_followed(make: Callable[[nn.Module], Optimizer]) -> None:
    layer, optimizer = _attached(make)
    other = next(sx.sparsify(nn.Sequential(nn.Linear(16, 12)), sparsity=0.75, mask_init="random", seed=5).children())
    _backward(layer)
    optimizer.step()
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer.get_buffer("weight_mask"), other.get_buffer("weight_mask"))
    for _ in range(2):
        optimizer.zero_grad()
        _backward(layer)
        optimizer.step()
        sx.verify(layer, optimizer)


def _grown(into_optimizer: bool) -> tuple[nn.Sequential, Optimizer]:
    torch.manual_seed(0)
    model = sx.sparsify(nn.Sequential(nn.Linear(16, 12)), sparsity=0.75)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sx.RigL(model, optimizer, total_steps=20, update_every=3, stop_at=1.0)
    added = sx.sparsify(nn.Linear(12, 8), sparsity=0.5)
    model.append(added)
    if into_optimizer:
        optimizer.add_param_group({"params": added.parameters()})
    return model, optimizer


def _steps(model: nn.Module, optimizer: Optimizer, count: int) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.randn(8, 16)).square().sum().backward()
        optimizer.step()


def test_a_masked_layer_added_later_is_managed_once_the_optimizer_has_it() -> None:
    model, optimizer = _grown(into_optimizer=True)
    before = model[1].get_buffer("weight_mask").clone()
    for _ in range(4):
        _steps(model, optimizer, 1)
        sx.verify(model, optimizer)
    assert not torch.equal(before, model[1].get_buffer("weight_mask"))


def test_a_masked_layer_that_no_optimizer_has_is_an_error_at_the_next_update() -> None:
    model, optimizer = _grown(into_optimizer=False)
    with pytest.raises(sx.SriglError, match=r"the optimizer does not hold 1\.weight"):
        _steps(model, optimizer, 3)


def test_a_state_saved_after_detaching_has_what_was_captured() -> None:
    torch.manual_seed(0)
    model = sx.sparsify(nn.Sequential(nn.Linear(16, 12)), sparsity=0.75)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trainer = sx.SNFS(model, optimizer, total_steps=100, update_every=10)
    _steps(model, optimizer, 4)
    ((name, part, before),) = trainer.state_dict()["captured"]
    trainer.detach()
    ((name_after, part_after, after),) = trainer.state_dict()["captured"]
    assert (name, part) == (name_after, part_after)
    assert torch.equal(before, after)
    with pytest.raises(sx.SriglError, match="was detached: attach a new one"):
        trainer.load_state_dict(trainer.state_dict())


def test_a_trainer_cannot_be_copied() -> None:
    model = sx.sparsify(nn.Sequential(nn.Linear(16, 12)), sparsity=0.75)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trainer = sx.Static(model, optimizer)
    with pytest.raises(sx.SriglError, match=r"a Static cannot be copied.*attach\s+a new one"):
        copy.deepcopy((model, optimizer, trainer))
    with pytest.raises(sx.SriglError, match="a Static cannot be pickled"):
        pickle.dumps(trainer)


@pytest.mark.parametrize(("dtype", "eps"), [(torch.float32, 0.0), (torch.float16, 1e-8)])
def test_zero_divided_by_zero_stays_off_pruned_weights(dtype: torch.dtype, eps: float) -> None:
    torch.manual_seed(0)
    model = sx.sparsify(nn.Sequential(nn.Linear(16, 12)).to(dtype), sparsity=0.75)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, eps=eps)
    sx.Static(model, optimizer)
    layer = model[0]
    assert isinstance(layer, nn.Linear)
    for _ in range(2):
        optimizer.zero_grad()
        (layer(torch.randn(8, 16, dtype=dtype)).float().square().sum() * 10).backward()
        optimizer.step()
    off = layer.weight[~layer.get_buffer("weight_mask")]
    assert torch.equal(off, torch.zeros_like(off))
