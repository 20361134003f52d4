"""Every optimizer keeps weights and state at zero off the mask, and trains the rest as it would train them alone."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from train_support import batches, loss_of, mask_copies, mlp, same, train

from srigl_fx import sparsify
from srigl_fx.errors import TrainerError
from srigl_fx.masks import verify
from srigl_fx.masks.records import sparse_weights
from srigl_fx.train import RigL, SRigL, Static

Make = Callable[[list[nn.Parameter]], Optimizer]


def _make(kind: type[Optimizer], **options: Any) -> Make:
    return lambda parameters: kind(parameters, **options)


OPTIMIZERS: dict[str, Make] = {
    "SGD": _make(torch.optim.SGD, lr=0.05, weight_decay=0.01),
    "SGD momentum": _make(torch.optim.SGD, lr=0.05, momentum=0.9, dampening=0.1, weight_decay=0.01),
    "SGD Nesterov": _make(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "SGD maximize": _make(torch.optim.SGD, lr=1e-3, momentum=0.9, maximize=True, weight_decay=0.01),
    "SGD foreach": _make(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.01, foreach=True),
    "SGD fused": _make(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.01, fused=True),
    "Adam": _make(torch.optim.Adam, lr=0.01, weight_decay=0.01, foreach=False),
    "Adam amsgrad": _make(torch.optim.Adam, lr=0.01, amsgrad=True, weight_decay=0.01),
    "Adam maximize": _make(torch.optim.Adam, lr=1e-3, maximize=True, weight_decay=0.01),
    "Adam foreach": _make(torch.optim.Adam, lr=0.01, amsgrad=True, foreach=True, maximize=True),
    "Adam fused": _make(torch.optim.Adam, lr=0.01, amsgrad=True, weight_decay=0.01, fused=True),
    "AdamW": _make(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
    "AdamW foreach": _make(torch.optim.AdamW, lr=0.01, weight_decay=0.1, foreach=True),
    "AdamW fused": _make(torch.optim.AdamW, lr=0.01, weight_decay=0.1, fused=True),
    "AdamW tensor rate": _make(torch.optim.AdamW, lr=torch.tensor(0.01), weight_decay=0.1),
    "RMSprop": _make(torch.optim.RMSprop, lr=0.005, weight_decay=0.01),
    "RMSprop momentum": _make(torch.optim.RMSprop, lr=0.005, momentum=0.9, weight_decay=0.01),
    "RMSprop centered": _make(torch.optim.RMSprop, lr=0.005, momentum=0.9, centered=True, foreach=True),
    "Adagrad": _make(torch.optim.Adagrad, lr=0.02, weight_decay=0.01),
    "Adagrad accumulated": _make(torch.optim.Adagrad, lr=0.02, initial_accumulator_value=0.1, lr_decay=0.01),
    "Adagrad fused": _make(torch.optim.Adagrad, lr=0.02, weight_decay=0.01, fused=True),
    "Adadelta": _make(torch.optim.Adadelta, lr=0.5, weight_decay=0.01),
    "Adamax": _make(torch.optim.Adamax, lr=0.01, weight_decay=0.01, foreach=False),
    "Adamax foreach": _make(torch.optim.Adamax, lr=0.01, weight_decay=0.01, foreach=True),
    "NAdam": _make(torch.optim.NAdam, lr=0.01, weight_decay=0.01),
    "NAdam decoupled": _make(torch.optim.NAdam, lr=0.01, weight_decay=0.1, decoupled_weight_decay=True),
    "RAdam": _make(torch.optim.RAdam, lr=0.01, weight_decay=0.01, maximize=True),
    "RAdam decoupled": _make(torch.optim.RAdam, lr=0.01, weight_decay=0.1, decoupled_weight_decay=True),
    "ASGD": _make(torch.optim.ASGD, lr=0.05, weight_decay=0.01),
    "Rprop": _make(torch.optim.Rprop, lr=0.01),
    "Adafactor": _make(torch.optim.Adafactor, lr=0.01, weight_decay=0.1),
}


# What a new weight's state begins with, where that is not zero.
FRESH = {"Adagrad accumulated": {"sum": 0.1}, "Rprop": {"step_size": 0.01}}


def _states(optimizer: Optimizer, weight: Tensor) -> dict[str, Tensor]:
    """The state tensors of the weight's shape."""
    return {
        key: value
        for key, value in optimizer.state[weight].items()
        if isinstance(value, Tensor) and value.shape == weight.shape
    }


def _weight(model: nn.Module, index: int) -> nn.Parameter:
    return sparse_weights(model)[index].weight


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_and_state_are_new_off_the_mask_and_where_it_grew(name: str) -> None:
    model = mlp()
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    trainer = SRigL(model, optimizer, total_steps=40, update_every=4, ablation=0.5, drop_fraction=0.5)
    before, first = mask_copies(model), mask_copies(model)
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    grown = 0

    def check() -> None:
        nonlocal before, grown
        verify(model, optimizer)
        for handle in sparse_weights(model):
            new = handle.mask & ~before[handle.fqn]
            grown += int(new.sum())
            for key, tensor in {"weight": handle.weight, **_states(optimizer, handle.weight)}.items():
                fresh = torch.tensor(FRESH.get(name, {}).get(key, 0.0))
                assert (tensor[~handle.mask] == fresh).all()
                assert (tensor[new] == fresh).all()
                assert tensor.isfinite().all()
        before = mask_copies(model)

    train(model, optimizer, batches(14), check)
    assert trainer.last_update == 12
    assert grown > 50
    assert not same(first, before)
    assert all(not torch.equal(weights[name], parameter) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_static_mask_equals_masking_everything_by_hand(name: str) -> None:
    model = mlp()
    by_hand = copy.deepcopy(model)
    optimizer, plain = (OPTIMIZERS[name](list(module.parameters())) for module in (model, by_hand))
    Static(model, optimizer)
    train(model, optimizer, batches(6))
    for x in batches(6):
        plain.zero_grad()
        torch.autograd.backward(loss_of(by_hand, x))
        handles = sparse_weights(by_hand)
        with torch.no_grad():
            for handle in handles:
                assert handle.weight.grad is not None
                handle.weight.grad.mul_(handle.mask)
            plain.step()
            for handle in handles:
                handle.weight.mul_(handle.mask)
    for mine, other in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)


def _split(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    return matrices, [parameter for parameter in model.parameters() if parameter.ndim != 2]


def test_muon_for_the_matrices_and_another_optimizer_for_the_rest() -> None:
    model = mlp()
    matrices, others = _split(model)
    muon = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1)
    adamw = torch.optim.AdamW(others, lr=0.01)
    trainer = SRigL(model, muon, total_steps=40, update_every=4, drop_fraction=0.5)
    before, biases = mask_copies(model), [parameter.detach().clone() for parameter in others]
    losses = []
    for x in batches(13):
        muon.zero_grad()
        adamw.zero_grad()
        loss = loss_of(model, x)
        losses.append(loss.item())
        torch.autograd.backward(loss)
        adamw.step()
        muon.step()  # type: ignore[no-untyped-call]
        verify(model, muon)
    assert (trainer.steps, trainer.last_update) == (13, 12)
    assert not same(before, mask_copies(model))
    assert all(not torch.equal(old, new) for old, new in zip(biases, others, strict=True))
    assert sum(losses[-3:]) < sum(losses[:3])


def test_masked_weights_in_two_optimizers_are_an_error_that_says_what_to_do() -> None:
    model = mlp()
    first = torch.optim.SGD(model[0].parameters(), lr=0.1)
    torch.optim.AdamW([*model[2].parameters(), *model[4].parameters()])
    with pytest.raises(TrainerError, match=r"does not hold 2\.weight, 4\.weight.*one optimizer.*rules=\{name: None\}"):
        SRigL(model, first, total_steps=10)
    model = sparsify(nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 4)), sparsity=0.75, rules={"2": None})
    Static(model, torch.optim.SGD(model[0].parameters(), lr=0.1))


def test_groups_with_their_own_settings() -> None:
    model = mlp()
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": [*model[2:].parameters()], "lr": 0.05}]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    Static(model, optimizer)
    before = _weight(model, 0).detach().clone(), _weight(model, 1).detach().clone()
    train(model, optimizer, batches(3), lambda: verify(model, optimizer))
    assert torch.equal(_weight(model, 0), before[0])
    assert not torch.equal(_weight(model, 1), before[1])


def test_a_group_added_once_its_weights_train() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(model[2:].parameters(), lr=0.01)
    trainer = RigL(model, optimizer, total_steps=100, update_every=3, drop_fraction=0.5)
    first = mask_copies(model)
    train(model, optimizer, batches(4), lambda: verify(model, optimizer))
    assert torch.equal(mask_copies(model)["0.weight"], first["0.weight"])
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": model[0].parameters(), "lr": 0.02})
    weight = _weight(model, 0).detach().clone()
    train(model, optimizer, batches(5), lambda: verify(model, optimizer))
    assert trainer.last_update == 9
    assert not torch.equal(_weight(model, 0), weight)
    assert not torch.equal(mask_copies(model)["0.weight"], first["0.weight"])
    assert _states(optimizer, _weight(model, 0)).keys() == {"exp_avg", "exp_avg_sq"}


def test_weights_that_begin_to_train_without_an_optimizer_are_an_error() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(model[2:].parameters(), lr=0.01)
    trainer = Static(model, optimizer)
    model[0].requires_grad_(True)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(TrainerError, match=r"does not hold 0\.weight"):
        train(model, optimizer, batches(1))
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert trainer.steps == 0


def test_weights_that_are_frozen_later_stay_as_they_are() -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    trainer = SRigL(model, optimizer, total_steps=100, update_every=3, drop_fraction=0.5)
    train(model, optimizer, batches(2))
    model[0].requires_grad_(False)
    optimizer.zero_grad()
    frozen, masks = _weight(model, 0).detach().clone(), mask_copies(model)
    train(model, optimizer, batches(4), lambda: verify(model, optimizer))
    assert trainer.last_update == 6
    assert torch.equal(_weight(model, 0), frozen)
    assert torch.equal(mask_copies(model)["0.weight"], masks["0.weight"])
    assert not torch.equal(mask_copies(model)["2.weight"], masks["2.weight"])


@pytest.mark.parametrize("name", ["SGD momentum", "AdamW", "AdamW fused", "Adafactor"])
def test_a_closure(name: str) -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer, ordinary = (OPTIMIZERS[name](list(module.parameters())) for module in (model, twin))
    SRigL(model, optimizer, total_steps=100, update_every=3, drop_fraction=0.5)
    SRigL(twin, ordinary, total_steps=100, update_every=3, drop_fraction=0.5)
    for x in batches(7):

        def closure(x: Tensor = x) -> float:
            optimizer.zero_grad()
            loss = loss_of(model, x)
            torch.autograd.backward(loss)
            return loss.item()

        assert optimizer.step(closure) > 0
        verify(model, optimizer)
    train(twin, ordinary, batches(7))
    assert same(mask_copies(model), mask_copies(twin))
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("name", ["SGD momentum", "AdamW", "AdamW fused"])
def test_a_closure_that_writes_to_gradients(name: str) -> None:
    model = mlp()
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    Static(model, optimizer)
    for x in batches(3):

        def closure(x: Tensor = x) -> float:
            optimizer.zero_grad()
            loss = loss_of(model, x)
            torch.autograd.backward(loss)
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.grad += torch.randn(parameter.shape)
            return loss.item()

        optimizer.step(closure)
        verify(model, optimizer)


def test_an_optimizer_of_ones_own() -> None:
    """One that keeps a slow copy of the weights, whose start moves them off the mask between its steps."""

    class Lookahead(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            loss = super().step(closure)
            with torch.no_grad():
                for group in self.param_groups:
                    for parameter in group["params"]:
                        slow = self.state[parameter].setdefault("slow", torch.full_like(parameter, 0.3))
                        slow.lerp_(parameter, 0.5)
                        parameter.copy_(slow)
            return loss

    model = mlp()
    optimizer = Lookahead(model.parameters(), lr=0.05, momentum=0.9)
    SRigL(model, optimizer, total_steps=100, update_every=3)
    train(model, optimizer, batches(7), lambda: verify(model, optimizer))


class Shaken(Optimizer):
    """Moves all weights by noise inside its step before it asks for gradients, the less the more its state says."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.01})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        with torch.no_grad():
            for parameter in parameters:
                scale = self.state[parameter].setdefault("scale", torch.ones_like(parameter))
                parameter.add_(0.01 * torch.randn(parameter.shape) / scale)
        if closure is not None:
            with torch.enable_grad():
                closure()
        with torch.no_grad():
            for parameter in parameters:
                scale = self.state[parameter]["scale"]
                scale.lerp_((parameter.grad.abs() + 0.1).square(), 0.1)
                parameter.sub_(self.defaults["lr"] * parameter.grad / scale)


@pytest.mark.slow
def test_noise_inside_a_step(caplog: pytest.LogCaptureFixture) -> None:
    """Equal to masks by hand where state off them begins anew after each step: the noise there depends on it."""
    model = mlp()
    by_hand = copy.deepcopy(model)
    optimizer, plain = Shaken(model.parameters()), Shaken(by_hand.parameters())
    RigL(model, optimizer, total_steps=100, update_every=3, drop_fraction=0.5)
    live = {handle.fqn: handle for handle in sparse_weights(model)}
    for step, x in enumerate(batches(10)):
        before = {name: handle.mask.clone() for name, handle in live.items()}
        for module, each in ((model, optimizer), (by_hand, plain)):

            def closure(module: nn.Module = module) -> None:
                module.zero_grad()
                torch.autograd.backward(loss_of(module, x))  # noqa: B023 - called at once
                if module is by_hand:
                    for handle in sparse_weights(module):
                        assert handle.weight.grad is not None
                        handle.weight.grad.mul_(before[handle.fqn])  # noqa: B023

            torch.manual_seed(step)
            each.step(closure)
        with torch.no_grad():
            for handle in sparse_weights(by_hand):
                staying = before[handle.fqn] & live[handle.fqn].mask
                handle.weight.mul_(staying)
                plain.state[handle.weight]["scale"][~staying] = 1.0
        verify(model, optimizer)
        for mine, theirs in zip(model.parameters(), by_hand.parameters(), strict=True):
            assert torch.equal(mine, theirs)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert said[0].startswith("weights of 0.weight are off the mask where Shaken asks for gradients inside its step")
