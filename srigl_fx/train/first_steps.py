"""How an optimizer's count of steps enters the step of a weight, and what another count would have made of it.

Owns one formula for each optimizer that is known. It must not know which weights are young, masks or hooks.

The moments of a weight that has just grown are new, while the count of steps that corrects their bias is the tensor's:
Adam divides a second moment of one step by 1 - beta2**t instead of 1 - beta2, and takes up to (1 - beta1) / sqrt(1 -
beta2) = 3.16 times the step of a new weight. RMSprop corrects no bias at all, and takes 1 / sqrt(1 - alpha) = 10 times
its usual step. With a count of its own, a weight takes the steps of a parameter that was made when the weight grew.
RMSprop counts no steps: there t is counted for it, and the second moment is divided by 1 - alpha**t.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

Group = Mapping[str, Any]
Count = float | Tensor


@dataclass(frozen=True, kw_only=True)
class Step:
    """What an optimizer has just done to n weights, each of which has a count of its own.

    Attributes:
        group: The options of their parameter.
        count: Steps of the parameter.
        counts: Steps of each weight, itself included, (n,).
        state: The state of the weights by name, (n,) each.
        gradient: The gradients as the optimizer saw them, with what its weight decay adds, (n,).
        product: NAdam's product of momenta for the parameter.
        products: The same for each weight, (n,).
    """

    group: Group
    count: Count
    counts: Tensor
    state: Mapping[str, Tensor]
    gradient: Tensor
    product: Count = 1.0
    products: Count = 1.0


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How one optimizer uses its count of steps.

    Attributes:
        decay: By which factor a step lessens the difference between two counts: 0 where there is none, 1 where it
            stays for ever.
        excess: By how many learning rates the step that was taken went further down than one with the weights' own
            counts, (n,).
        buffer: The state that keeps what was taken off the weight, in learning rates, and takes it off again.
    """

    decay: Callable[[Group], float]
    excess: Callable[[Step], Tensor]
    buffer: Callable[[Group], str | None] = lambda group: None


def _share(decay: Any, count: Count) -> Any:
    """What a moving average of so many steps has seen of a constant."""
    return 1 - decay**count


def _slowest(group: Group) -> float:
    return max(float(beta) for beta in group["betas"])


def _adam(step: Step) -> Tensor:
    beta1, beta2 = step.group["betas"]
    first = step.state["exp_avg"]
    root = step.state["max_exp_avg_sq" if step.group.get("amsgrad") else "exp_avg_sq"].sqrt()

    def taken(count: Count) -> Tensor:
        moved: Tensor = first / _share(beta1, count) / (root / _share(beta2, count) ** 0.5 + step.group["eps"])
        return moved

    return _difference(step, taken)


def _adamax(step: Step) -> Tensor:
    beta1, _ = step.group["betas"]
    direction = step.state["exp_avg"] / step.state["exp_inf"]
    return _difference(step, lambda count: direction / _share(beta1, count))


def _radam(step: Step) -> Tensor:
    beta1, beta2 = step.group["betas"]
    root = step.state["exp_avg_sq"].sqrt() + step.group["eps"]
    longest = 2 / (1 - beta2) - 1

    def taken(count: Count) -> Tensor:
        seen = torch.as_tensor(_share(beta2, count), device=root.device)
        length = longest - 2 * count * beta2**count / seen
        ratio = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
        scale = torch.where(length > 5.0, ratio.clamp(min=0.0).sqrt() * seen.sqrt() / root, 1.0)
        moved: Tensor = step.state["exp_avg"] / _share(beta1, count) * scale
        return moved

    return _difference(step, taken)


def momentum_at(group: Group, count: Count) -> Any:
    """NAdam's momentum at a step; the products of these correct its first moment.

    Example:
        >>> round(momentum_at({"betas": (0.9, 0.999), "momentum_decay": 0.004}, 1), 3)
        0.45
    """
    return group["betas"][0] * (1 - 0.5 * 0.96 ** (count * group["momentum_decay"]))


def _nadam(step: Step) -> Tensor:
    first, second, gradient = step.state["exp_avg"], step.state["exp_avg_sq"], step.gradient
    _, beta2 = step.group["betas"]

    def taken(count: Count, product: Count) -> Tensor:
        now, following = momentum_at(step.group, count), momentum_at(step.group, count + 1)
        along = gradient * ((1 - now) / (1 - product)) + first * (following / (1 - product * following))
        moved: Tensor = along / ((second / _share(beta2, count)).sqrt() + step.group["eps"])
        return moved

    return taken(step.count, step.product) - taken(step.counts, step.products)


def _rmsprop(step: Step) -> Tensor:
    second = step.state["square_avg"]
    # Of one gradient the corrected variance would be 0: the mean, which begins at 0, is not corrected.
    centre = step.state["grad_avg"].square() if step.group.get("centered") else torch.zeros_like(second)

    def taken(seen: float | Tensor) -> Tensor:
        moved: Tensor = step.gradient / ((second / seen - centre).sqrt() + step.group["eps"])
        return moved

    return taken(1.0) - taken(_share(step.group["alpha"], step.counts))


def _adagrad(step: Step) -> Tensor:
    direction = step.gradient / (step.state["sum"].sqrt() + step.group["eps"])
    return _difference(step, lambda count: direction / (1 + (count - 1) * step.group["lr_decay"]))


def _difference(step: Step, taken: Callable[[Count], Tensor]) -> Tensor:
    return taken(step.count) - taken(step.counts)


def _nothing(step: Step) -> Tensor:
    return torch.zeros_like(step.gradient)


_ADAM = Rule(decay=_slowest, excess=_adam)
_NO_COUNT = Rule(decay=lambda group: 0.0, excess=_nothing)
_RULES: dict[type[Optimizer], Rule] = {
    torch.optim.Adam: _ADAM,
    torch.optim.AdamW: _ADAM,
    torch.optim.Adamax: Rule(decay=lambda group: float(group["betas"][0]), excess=_adamax),
    torch.optim.NAdam: Rule(decay=lambda group: max(_slowest(group), 0.96 ** group["momentum_decay"]), excess=_nadam),
    torch.optim.RAdam: Rule(decay=_slowest, excess=_radam),
    torch.optim.RMSprop: Rule(
        decay=lambda group: float(group["alpha"]),
        excess=_rmsprop,
        buffer=lambda group: "momentum_buffer" if group["momentum"] else None,
    ),
    torch.optim.Adagrad: Rule(decay=lambda group: 1.0 if group["lr_decay"] else 0.0, excess=_adagrad),
    torch.optim.SGD: _NO_COUNT,
    torch.optim.Adadelta: _NO_COUNT,
    torch.optim.Rprop: _NO_COUNT,
}


def rule_of(optimizer: Optimizer) -> Rule | None:
    """How an optimizer of this very class uses its count of steps; None where that is not known.

    Example:
        >>> rule_of(torch.optim.Adam([torch.zeros(2)])) is None, rule_of(torch.optim.ASGD([torch.zeros(2)])) is None
        (False, True)
    """
    return _RULES.get(type(optimizer))


def known_names() -> str:
    """The optimizers that are known, for messages.

    Example:
        >>> known_names().split(", ")[0]
        'Adam'
    """
    return ", ".join(kind.__name__ for kind in _RULES)


def is_over(age: Tensor, decay: float, dtype: torch.dtype) -> Tensor:
    """For weights of some ages, whether their own count and their parameter's make the same step in ``dtype``.

    Example:
        >>> is_over(torch.tensor([100.0, 20_000.0]), 0.999, torch.float32).tolist()
        [False, True]
    """
    if decay >= 1.0:
        return torch.zeros_like(age, dtype=torch.bool)
    # Logarithms, as the difference that is left may be too small for a number.
    return age * math.log(max(decay, 1e-300)) < math.log(torch.finfo(dtype).eps / 4)
