"""A plain loop in which what grew at one step is a parameter of its own: the oracle of steps counted by weight."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from srigl_fx.masks.records import sparse_weights
from train_support import loss_of

Make = Callable[[Any], Optimizer]


class CorrectedRMSprop(Optimizer):
    """RMSprop whose second moment is divided by what it has seen of a constant."""

    def __init__(self, params: Any, **options: Any) -> None:
        unused = {"weight_decay": 0.0, "momentum": 0.0, "centered": False, "maximize": False}
        super().__init__(params, {**unused, **options})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state.update(step=0, **{name: torch.zeros_like(parameter) for name in ("square", "mean", "buffer")})
                state["step"] += 1
                grad = -parameter.grad if group["maximize"] else parameter.grad
                grad = grad + group["weight_decay"] * parameter
                alpha = group["alpha"]
                state["square"].mul_(alpha).addcmul_(grad, grad, value=1 - alpha)
                state["mean"].lerp_(grad, 1 - alpha)
                variance = state["square"] / (1 - alpha ** state["step"])
                if group["centered"]:
                    variance = variance - state["mean"].square()
                state["buffer"].mul_(group["momentum"]).add_(grad / (variance.sqrt() + group["eps"]))
                parameter.sub_(group["lr"] * state["buffer"])
        return None


def rmsprop(**options: Any) -> tuple[Make, Make]:
    """The optimizer that trains, and the one that young weights are to be trained by."""
    options = {"lr": 0.003, "alpha": 0.99, "eps": 1e-8, **options}
    return lambda p: torch.optim.RMSprop(p, **options), lambda p: CorrectedRMSprop(p, **options)


def both(kind: Any, **options: Any) -> tuple[Make, Make]:
    def make(parameters: Any) -> Optimizer:
        made: Optimizer = kind(parameters, **options)
        return made

    return make, make


class Cohorts:
    """A plain loop: the weights that grew at one step are a parameter of their own, with an optimizer of its own."""

    def __init__(self, model: nn.Module, make: Make, make_young: Make) -> None:
        self.weights = {handle.fqn: handle for handle in sparse_weights(model)}
        self.make_young = make_young
        self.cohorts: list[tuple[str, Tensor, nn.Parameter, Optimizer]] = []
        self.masks = {name: torch.zeros_like(handle.mask) for name, handle in self.weights.items()}
        self.follow(make)

    def follow(self, make: Make | None = None) -> int:
        """Take up what grew since the last call; how much that is."""
        grown = 0
        for name, handle in self.weights.items():
            new = (handle.mask & ~self.masks[name]).flatten().nonzero().squeeze(1)
            gone = (~handle.mask).flatten()
            for index, (whose, positions, parameter, optimizer) in enumerate(self.cohorts):
                if whose == name:  # what went and comes back later is not the same weight
                    kept = torch.where(gone[positions.clamp(min=0)], -1, positions)
                    self.cohorts[index] = whose, kept, parameter, optimizer
            if len(new):
                parameter = nn.Parameter(handle.weight.detach().flatten()[new].clone())
                self.cohorts.append((name, new, parameter, (make or self.make_young)([parameter])))
            self.masks[name] = handle.mask.clone()
            grown += len(new)
        return grown

    def step(self, options: dict[str, Any]) -> None:
        """A step of all, with the gradients that the model has now."""
        for name, positions, parameter, optimizer in self.cohorts:
            grad = self.weights[name].weight.grad
            assert grad is not None
            parameter.grad = torch.where(positions >= 0, grad.flatten()[positions.clamp(min=0)], 0.0)
            optimizer.param_groups[0].update(options)
            optimizer.step()

    def check(self, rtol: float, atol: float) -> None:
        for name, positions, parameter, _ in self.cohorts:
            alive = positions >= 0
            have = self.weights[name].weight.detach().flatten()[positions[alive]]
            torch.testing.assert_close(have, parameter.detach()[alive], rtol=rtol, atol=atol)


def follow(
    model: nn.Module, optimizer: Optimizer, cohorts: Cohorts, data: Any, *, rtol: float = 1e-5, atol: float = 2e-6
) -> int:
    """Train with a changing learning rate, and compare all kept weights after each step; how many grew."""
    grown = 0
    for number, x in enumerate(data):
        optimizer.zero_grad()
        loss_of(model, x.to(next(model.parameters()).dtype)).backward()
        optimizer.param_groups[0]["lr"] *= 0.9 if number % 4 == 2 else 1.0
        cohorts.step({"lr": optimizer.param_groups[0]["lr"]})
        optimizer.step()
        grown += cohorts.follow()
        cohorts.check(rtol, atol)
    return grown
