"""State is masked where it belongs to single weights, and only there; a weight that grows begins as a new one does."""

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from train_support import batches, loss_of, mask_copies, mlp, train

from srigl_fx import sparsify
from srigl_fx.errors import InvariantError, TrainerError
from srigl_fx.masks import optimizer_state, verify
from srigl_fx.masks.optimizer_probe import probe
from srigl_fx.masks.optimizer_state import OptimizerState, declare
from srigl_fx.masks.records import sparse_weights
from srigl_fx.train import GMP, RigL, Static, compute_sparse


class Simple(Optimizer):
    """What every optimizer below shares: a learning rate, and a loop over the parameters."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(group["lr"] * self.move(self.state[parameter], parameter))
        return None

    def move(self, state: Any, parameter: Tensor) -> Tensor:
        raise NotImplementedError


def rotation(width: int) -> Tensor:
    basis: Tensor = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(3)))[0]
    return basis


class Rotated(Simple):
    """Adam in another basis, as SOAP: both moments have the weight's shape, and neither its coordinates."""

    def move(self, state: Any, parameter: Tensor) -> Tensor:
        if parameter.ndim != 2:
            return parameter.grad  # type: ignore[return-value]
        assert parameter.grad is not None
        basis = rotation(parameter.shape[1])
        grad = parameter.grad @ basis
        state.setdefault("exp_avg", torch.zeros_like(grad)).lerp_(grad, 0.1)
        state.setdefault("exp_avg_sq", torch.zeros_like(grad)).lerp_(grad.square(), 0.01)
        move: Tensor = (state["exp_avg"] / (state["exp_avg_sq"].sqrt() + 1e-8)) @ basis.T
        return move


class RotatedIfLarge(Rotated):
    """Plain momentum for small matrices, under the name that the rotated one has for large ones."""

    def move(self, state: Any, parameter: Tensor) -> Tensor:
        assert parameter.grad is not None
        if len(parameter) >= 64:
            return super().move(state, parameter)
        momentum: Tensor = state.setdefault("exp_avg", torch.zeros_like(parameter)).lerp_(parameter.grad, 0.1)
        return momentum


class Preconditioned(Simple):
    """As Shampoo: of a square layer the statistics have the weight's shape; momentum is elementwise."""

    def move(self, state: Any, parameter: Tensor) -> Tensor:
        if parameter.ndim != 2:
            return parameter.grad  # type: ignore[return-value]
        assert parameter.grad is not None
        if not state:
            state["left"] = 0.1 * torch.eye(len(parameter))
            state["momentum"] = torch.zeros_like(parameter)
        state["left"].add_(parameter.grad @ parameter.grad.T)
        state["momentum"].mul_(0.9).add_(parameter.grad)
        move: Tensor = torch.linalg.solve(state["left"], state["momentum"])
        return move


class Ratio(Simple):
    """Divides by what it begins with, which is not zero; one buffer is flat, one in a dict."""

    def move(self, state: Any, parameter: Tensor) -> Tensor:
        assert parameter.grad is not None
        if not state:
            state.update(scale=torch.full_like(parameter, 0.25), flat=torch.ones(parameter.numel()))
            state["by"] = {0.9: torch.zeros_like(parameter)}
        state["scale"].lerp_(parameter.grad.square(), 0.01)
        state["flat"].lerp_(parameter.grad.flatten().abs(), 0.01)
        state["by"][0.9].mul_(0.9).add_(parameter.grad)
        move: Tensor = state["by"][0.9] * state["scale"].clone() / state["scale"] / state["flat"].view_as(parameter)
        return move


class Selective(Simple):
    """Keeps a mask of its own, and moments of what is in it."""

    def move(self, state: Any, parameter: Tensor) -> Tensor:
        assert parameter.grad is not None
        if not state:
            state["mask"] = torch.rand_like(parameter) < 0.5
        moved: Tensor = parameter.grad * state["mask"]
        return moved


class Drawn(Simple):
    """Begins with a draw."""

    def move(self, state: Any, parameter: Tensor) -> Tensor:
        assert parameter.grad is not None
        if not state:
            state["speed"] = torch.randn_like(parameter)
        speed: Tensor = state["speed"].lerp_(parameter.grad, 0.1)
        return speed


class Unprobeable(Simple):
    """Cannot be made from what it keeps."""

    def __init__(self, params: Any, secret: object) -> None:
        super().__init__(params)
        self.known = secret

    def move(self, state: Any, parameter: Tensor) -> Tensor:
        assert parameter.grad is not None
        buffer: Tensor = state.setdefault("buffer", torch.zeros_like(parameter)).lerp_(parameter.grad, 0.1)
        return buffer


class Wrapper(Optimizer):
    """As Lookahead: averages the weights, and leaves the steps to another optimizer."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        super().__init__(optimizer.param_groups, {})
        self.param_groups = optimizer.param_groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self.optimizer.step()
        for group in self.param_groups:
            for parameter in group["params"]:
                slow = self.state[parameter].setdefault("slow", parameter.clone())
                parameter.copy_(slow.lerp_(parameter, 0.5))


MAKE: dict[str, Callable[[Any], Optimizer]] = {
    "rotated": Rotated,
    "preconditioned": Preconditioned,
    "ratio": Ratio,
    "wrapper": lambda params: Wrapper(torch.optim.Adam(params, lr=0.01)),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=0.01, initial_accumulator_value=0.1),
    "Rprop": lambda params: torch.optim.Rprop(params, lr=0.01),
    "Adam": lambda params: torch.optim.Adam(params, lr=0.01),
}
ELEMENTWISE: dict[str, dict[str, float]] = {
    "rotated": {},
    "preconditioned": {"momentum": 0.0},
    "ratio": {"scale": 0.25, "flat": 1.0, "by.0.9": 0.0},
    "wrapper": {"slow": 0.0, "exp_avg": 0.0, "exp_avg_sq": 0.0},
    "Adagrad": {"sum": 0.1},
    "Rprop": {"prev": 0.0, "step_size": 0.01},
    "Adam": {"exp_avg": 0.0, "exp_avg_sq": 0.0},
}


def _square() -> nn.Module:
    torch.manual_seed(0)
    return sparsify(nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24)), sparsity=0.75, rules={"2": None})


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("method", [Static, RigL])
def test_training_is_masking_gradients_and_weights_by_hand_where_grown_weights_begin_anew(
    name: str, method: Any
) -> None:
    model = _square()
    by_hand = copy.deepcopy(model)
    optimizer, plain = MAKE[name](list(model.parameters())), MAKE[name](list(by_hand.parameters()))
    method(model, optimizer, total_steps=100, update_every=5, drop_fraction=0.5)
    masks: list[Tensor] = []
    train(model, optimizer, batches(22), lambda: masks.append(mask_copies(model)["0.weight"]))
    weight, mask = by_hand.get_parameter("0.weight"), mask_copies(by_hand)["0.weight"]
    for x, after in zip(batches(22), masks, strict=True):
        plain.zero_grad()
        torch.autograd.backward(loss_of(by_hand, x))
        assert weight.grad is not None
        weight.grad.mul_(mask)
        plain.step()
        with torch.no_grad():
            weight.mul_(mask & after)
            for at in (plain, getattr(plain, "optimizer", plain)):
                for key, fresh in ELEMENTWISE[name].items():
                    value: Any = at.state[weight]
                    for part in key.split(".", 1):
                        value = value.get(float(part) if part == "0.9" else part, {})
                    if isinstance(value, Tensor):
                        value.view_as(after)[~(mask & after)] = fresh
        mask = after
    assert method is Static or not torch.equal(masks[0], masks[-1])
    for mine, other in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)
    verify(model, optimizer)


@pytest.mark.parametrize("name", MAKE)
def test_what_is_found_is_what_belongs_to_single_weights(name: str) -> None:
    weight = nn.Parameter(torch.randn(24, 24))
    found = probe(optimizer := MAKE[name]([weight]), optimizer.param_groups[0], (5, 5))
    assert found.fresh == pytest.approx(ELEMENTWISE[name])
    assert (found.own_masks, found.irregular) == ((), ())


@pytest.mark.parametrize("size", [24, 64, 300])
def test_what_a_small_matrix_keeps_is_not_believed_of_a_large_one(size: int) -> None:
    weight = nn.Parameter(torch.randn(size, size))
    optimizer = RotatedIfLarge([weight])
    weight.grad = torch.randn(size, size)
    optimizer.step()
    found = [state.name for state in OptimizerState.of(optimizer).elementwise(weight)]
    assert found == (["exp_avg"] if size < 64 else [])


KNOWN: list[Any] = [
    kind
    for kind in vars(torch.optim).values()
    if isinstance(kind, type)
    and issubclass(kind, Optimizer)
    and kind not in (Optimizer, torch.optim.LBFGS, torch.optim.SparseAdam)
]
OPTIONS: dict[Any, dict[str, Any]] = {
    torch.optim.SGD: {"momentum": 0.9},
    torch.optim.Adam: {"amsgrad": True},
    torch.optim.AdamW: {"amsgrad": True},
    torch.optim.RMSprop: {"momentum": 0.9, "centered": True},
    torch.optim.Adagrad: {"initial_accumulator_value": 0.1},
}


@pytest.mark.parametrize("kind", KNOWN, ids=lambda kind: kind.__name__)
def test_every_optimizer_of_torch_is_known_as_it_is_found(kind: Any) -> None:
    optimizer = kind([nn.Parameter(torch.randn(12, 8))], lr=0.01, **OPTIONS.get(kind, {}))
    group = optimizer.param_groups[0]
    assert probe(optimizer, group, (6, 5)).fresh == pytest.approx(optimizer_state._KNOWN[kind](group))


@pytest.mark.slow
def test_looking_draws_no_random_numbers() -> None:
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    model = mlp()
    optimizer = Ratio(model.parameters())
    before = torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=False)["state"]["key"].copy()
    RigL(model, optimizer, total_steps=10)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert (before[2] == np.random.get_state(legacy=False)["state"]["key"]).all()
    assert not optimizer.state


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Selective, r"0\.weight that grows .* Selective keeps a mask of its own \(mask\)"),
        (Drawn, r"the state speed of Drawn begins with another value for each weight"),
        (lambda params: Unprobeable(params, object()), r"what Unprobeable keeps .* missing .* 'secret'"),
    ],
)
def test_an_optimizer_under_which_no_weight_can_begin_anew_is_refused_by_name(make: Any, message: str) -> None:
    model = mlp()
    optimizer = make(model.parameters())
    with pytest.raises(TrainerError, match=message):
        RigL(model, optimizer, total_steps=10)
    for method in (Static, GMP):  # nothing grows
        trainer: Any = method(model, optimizer, total_steps=20, update_every=5)
        train(model, optimizer, batches(3))
        trainer.detach()


def test_an_optimizer_that_cannot_be_tried_out_can_be_declared() -> None:
    class Declared(Unprobeable):
        pass

    declare(Declared, buffer=0.0)
    model = mlp()
    optimizer = Declared(model.parameters(), object())
    RigL(model, optimizer, total_steps=100, update_every=4)
    train(model, optimizer, batches(9), lambda: verify(model, optimizer))


def test_verify_sees_state_that_is_not_that_of_a_new_weight() -> None:
    model = _square()
    optimizer = Ratio(model.parameters())
    Static(model, optimizer)
    train(model, optimizer, batches(2), lambda: verify(model, optimizer))
    handle = sparse_weights(model)[0]
    optimizer.state[handle.weight]["scale"][~handle.mask] = 0.0
    with pytest.raises(InvariantError, match=r"'scale' is not 0\.25, as a new weight's, off the mask"):
        verify(model, optimizer)


def test_sparse_steps_begin_grown_weights_anew() -> None:
    model = _square()
    twin = copy.deepcopy(model)
    for one in (model, twin):
        optimizer = MAKE["Adagrad"](one.parameters())
        trainer = RigL(one, optimizer, total_steps=100, update_every=5, drop_fraction=0.5)
        if one is model:
            compute_sparse(trainer)
        train(one, optimizer, batches(12))
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Using backward")
def test_a_second_backward_passes_through_the_mask() -> None:
    model = _square()
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # which keeps the trainer
    Static(model, optimizer)
    x = torch.randn(8, 24)
    products = []
    for one in (model, twin):
        weight, mask = one.get_parameter("0.weight"), mask_copies(one)["0.weight"]
        torch.autograd.backward(one(x).tanh().square().sum(), create_graph=True)
        assert weight.grad is not None
        masked = weight.grad if one is model else weight.grad * mask
        products.append(torch.autograd.grad(masked.square().sum(), weight)[0])
        weight.grad = None
    torch.testing.assert_close(*products)
    assert products[0].any()


class Curved(Simple):
    """As AdaHessian: takes a second derivative inside its step."""

    @torch.enable_grad()
    def step(self, closure: Any = None) -> Any:
        weights = [parameter for group in self.param_groups for parameter in group["params"]]
        slopes = [parameter.grad for parameter in weights]
        curves = torch.autograd.grad(slopes, weights, grad_outputs=[torch.ones_like(each) for each in weights])
        for parameter, slope, curve in zip(weights, slopes, curves, strict=True):
            assert slope is not None
            mean = self.state[parameter].setdefault("exp_avg", torch.zeros_like(parameter))
            with torch.no_grad():
                parameter.sub_(0.01 * mean.lerp_(slope, 0.1) / (1.0 + curve.square()))


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("method", [Static, RigL])
def test_a_second_derivative_inside_the_step(method: Any) -> None:
    model = nn.Sequential(
        nn.Linear(24, 24), nn.Tanh(), *_square().children()
    )  # whose weight the backward passes through
    optimizer = Curved(model.parameters())
    trainer = method(model, optimizer, total_steps=100, update_every=3, drop_fraction=0.5)
    before = model.get_parameter("2.weight").detach().clone()
    for x in batches(8):
        optimizer.zero_grad()
        torch.autograd.backward(model(x).tanh().square().sum(), create_graph=True)
        optimizer.step()
        optimizer.zero_grad()
        verify(model, optimizer)
    assert trainer.last_update == (6 if method is RigL else None)
    assert not torch.equal(before, model.get_parameter("2.weight"))


def test_views_end_with_their_optimizers() -> None:
    optimizer = Ratio([nn.Parameter(torch.ones(3, 2))])
    assert OptimizerState.of(optimizer) is OptimizerState.of(optimizer)
    before = len(optimizer_state._VIEWS)
    del optimizer
    assert len(optimizer_state._VIEWS) < before
