"""A count of optimizer steps for each weight, which begins when the weight grows.

Owns which weights are young, and what happens to them behind a step of the optimizer. It must not know how an optimizer
uses its count (:mod:`srigl_fx.train.first_steps`), when masks change or how they are kept.

After each step of the optimizer the young weights alone are moved on, by the step with their own count less the one
that was taken. Once the two are the same a weight is not young any more. The count of a parameter's steps tells the
age, so that steps that were skipped (by a gradient scaler, or for want of a gradient) do not count, and no host waits.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from srigl_fx.errors import TrainerError
from srigl_fx.masks.optimizer_state import OptimizerState
from srigl_fx.masks.records import SparseWeight
from srigl_fx.masks.shards import part
from srigl_fx.train.first_steps import Rule, Step, is_over, known_names, momentum_at, rule_of
from srigl_fx.train.managed import ManagedWeight
from srigl_fx.train.young import Young

StepCount = Literal["tensor", "weight"]
# What trainers do unless told otherwise: docs/methods.md, "First steps of grown weights", says why.
DEFAULT_STEP_COUNT: StepCount = "tensor"

Saved = tuple[str, Tensor, Tensor, Tensor]


def check_step_count(value: object) -> None:
    """Require a choice that there is.

    Raises:
        TrainerError: It is none.

    Example:
        >>> check_step_count("weight")
    """
    if value not in get_args(StepCount):
        choices = " or ".join(f'"{choice}"' for choice in get_args(StepCount))
        raise TrainerError(f"step_count is {value!r}; choose {choices}")


@dataclass(frozen=True)
class _Before:
    """A parameter with young weights, as a step found it: the steps it had made, and these weights."""

    count: float | Tensor
    values: Tensor


class StepCounts:
    """Gives the young weights of one optimizer's parameters steps of their own age."""

    def __init__(self, optimizers: Sequence[Optimizer], weights: Callable[[], Mapping[str, ManagedWeight]]) -> None:
        """Take note; nothing is attached.

        Args:
            optimizers: The one that is followed and those inside it, of which those that are known count steps.
            weights: Gives the weights under management by name.
        """
        self._optimizers = [each for each in optimizers if rule_of(each) is not None]
        self._outermost, self._weights = optimizers[0], weights
        self._before: dict[str, _Before] = {}

    def check(self, handles: Iterable[SparseWeight]) -> None:
        """Require that it is known how the steps of some weights are counted, and that they can be made up for.

        Raises:
            TrainerError: It is not, or they cannot; the message names the optimizer.
        """
        for handle in handles:
            if not handle.weight.requires_grad:
                continue
            holder = self._holder(handle.weight)
            if holder is None or handle.weight.is_complex():
                raise TrainerError(
                    f'step_count="weight" knows how {known_names()} count steps: what {type(self._outermost).__name__} '
                    f'makes of those of {handle.fqn} is not known. Train with one of these, or with step_count="tensor"'
                )
            if OptimizerState.of(holder[0]).group(handle.weight).get("differentiable"):
                raise TrainerError(
                    f'step_count="weight" moves weights behind the step: that is no part of the graph which '
                    f"{type(holder[0]).__name__}(differentiable=True) is to make of its steps of {handle.fqn}. "
                    "Make the optimizer without differentiable=True"
                )

    @torch.no_grad()
    def begin(self, managed: ManagedWeight, grown: Tensor) -> None:
        """Count anew for weights that have just grown, and forget those that are gone or not young any more.

        Args:
            managed: The weight, with its mask as it is now.
            grown: Which are new, as far as this process holds the weight.
        """
        weight, holder = managed.handle.weight, self._holder(managed.handle.weight)
        if holder is None:
            managed.young = None
            return
        optimizer, rule = holder
        decay, now = rule.decay(OptimizerState.of(optimizer).group(weight)), float(_count(_state(optimizer, managed)))
        if not decay or not now:  # before the first step they are as old as their parameter
            managed.young = None
            return
        young = Young.born_at(now, grown)
        if (former := managed.young) is not None:
            young = former.where(~is_over(now - former.born, decay, weight.dtype)).within(managed.mask).joined(young)
        managed.young = young

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer, *_: Any) -> None:
        """Note what the step will change."""
        self._before = {}
        for name, managed in self._weights().items():
            holder = None if managed.young is None else self._holder(managed.handle.weight)
            if managed.young is not None and holder is not None and holder[0] is optimizer:
                count = _count(_state(optimizer, managed))
                values = managed.own(managed.handle.weight)[managed.young.index]
                self._before[name] = _Before(count.clone() if isinstance(count, Tensor) else count, values)

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer, *_: Any) -> None:
        """Give the young weights the steps of their own age."""
        noted, self._before = self._before, {}
        rule, weights = rule_of(optimizer), self._weights()
        for name, before in noted.items():
            if rule is not None and weights[name].handle.weight.grad is not None:
                _correct(optimizer, rule, weights[name], before)

    def saved(self, whole: Callable[[SparseWeight, Tensor], Tensor]) -> tuple[Saved, ...]:
        """The young weights for a checkpoint: name, positions, steps at their growth, products of momenta.

        Args:
            whole: Makes all of a tensor of which this process has a part.
        """
        rows = []
        for managed in self._weights().values():
            own = managed.own(managed.handle.weight)
            young = managed.young or Young.born_at(0.0, torch.zeros_like(own, dtype=torch.bool))
            all_young = Young.of_dense(*(whole(managed.handle, dense) for dense in young.dense()))
            if len(all_young.positions):
                rows.append((managed.handle.key, all_young.positions, all_young.born, all_young.products))
        return tuple(rows)

    @torch.no_grad()
    def restore(self, rows: Iterable[Saved]) -> None:
        """The inverse of :meth:`saved`; weights without a row have no young ones, as in a checkpoint from before."""
        saved = {name: (positions, born, products) for name, positions, born, products in rows}
        for managed in self._weights().values():
            managed.young = None
            if (row := saved.get(managed.handle.key)) is not None:
                mask = managed.handle.mask
                positions, born, products = (tensor.to(mask.device) for tensor in row)
                dense = Young(mask.shape, positions, born, products).dense()
                managed.young = Young.of_dense(*(part(one, managed.handle.weight) for one in dense)).within(
                    managed.mask
                )

    def _holder(self, weight: nn.Parameter) -> tuple[Optimizer, Rule] | None:
        """The optimizer that steps a weight and is known, and how it counts."""
        for optimizer in self._optimizers:
            rule = rule_of(optimizer)
            if rule is not None and OptimizerState.of(optimizer).holds(weight):
                return optimizer, rule
        return None


def _correct(optimizer: Optimizer, rule: Rule, managed: ManagedWeight, before: _Before) -> None:
    weight, young, state = managed.handle.weight, managed.young, _state(optimizer, managed)
    if young is None or weight.grad is None or not state:
        return
    group, count = OptimizerState.of(optimizer).group(weight), _count(state)
    counts = count - young.born
    # Not where a fused optimizer skipped the step, nor where the optimizer began anew or took up earlier state.
    stepped = (counts > 0) & (count - before.count > 0)
    counts = counts.clamp(min=1.0)
    if "mu_product" in state:
        young.products = torch.where(stepped, young.products * momentum_at(group, counts), young.products)
    excess = rule.excess(
        Step(
            group=group,
            count=count,
            counts=counts,
            state=_entries(managed, young, state),
            gradient=_seen_gradient(group, managed.own(weight.grad)[young.index], before.values),
            product=state.get("mu_product", 1.0),
            products=young.products,
        )
    )
    excess = torch.where(stepped, excess, 0.0)
    _add(managed.own(weight), young.index, group["lr"] * excess)
    if (buffer := rule.buffer(group)) is not None:
        _add(*_place(managed, young, state, buffer), -excess)


def _count(state: Mapping[str, Any]) -> float | Tensor:
    count: float | Tensor = state.get("step", 0.0)
    return count.double() if isinstance(count, Tensor) and count.device.type != "mps" else count


def _state(optimizer: Optimizer, managed: ManagedWeight) -> Mapping[str, Any]:
    """The optimizer's state of a weight, wherever it is kept."""
    condensed = managed.find_condensed() if managed.find_condensed is not None else None
    dense: Mapping[str, Any] = optimizer.state.get(managed.handle.weight, {})
    return dense if condensed is None else condensed.state


def _place(
    managed: ManagedWeight, young: Young, state: Mapping[str, Any], name: str
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A state tensor, and where the young weights are in it."""
    condensed = managed.find_condensed() if managed.find_condensed is not None else None
    if condensed is None:
        return managed.own(state[name]), young.index
    return state[name], (young.index_in(condensed.positions),)


def _entries(managed: ManagedWeight, young: Young, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state of the young weights, as far as it is theirs."""
    found = {}
    for name, value in state.items():
        if isinstance(value, Tensor) and value.dim():
            source, index = _place(managed, young, state, name)
            found[name] = source[index].to(young.born.dtype)
    return found


def _seen_gradient(group: Mapping[str, Any], gradient: Tensor, weights: Tensor) -> Tensor:
    """Gradients as the optimizer used them, from weights as they were."""
    seen = gradient.double() if gradient.device.type != "mps" else gradient
    if group.get("maximize"):
        seen = -seen
    if group.get("weight_decay") and not group.get("decoupled_weight_decay"):
        seen = seen + group["weight_decay"] * weights
    return seen


def _add(tensor: Tensor, index: tuple[Tensor, ...], change: Tensor) -> None:
    tensor[index] = (tensor[index] + change).to(tensor.dtype)
