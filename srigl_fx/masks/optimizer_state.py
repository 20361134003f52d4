"""What an optimizer keeps for each single weight, and what that is for a new one.

Owns the table of optimizers that are known, what is remembered of those that were tried out, and the view of a
parameter's state tensors that masks apply to. It must not know hooks, schedules or how an optimizer is tried out
(:mod:`srigl_fx.masks.optimizer_probe`).

Masks apply to state that is **elementwise**: one entry a weight, which no other weight changes while its own weight
and gradient are zero. Off the mask it holds what a new parameter's state begins with, which is not always zero, so
that a weight that grows begins like one. Shape alone does not tell: a preconditioner of a square layer, or moments of
a rotated gradient, have the weight's shape, and are left alone.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from srigl_fx.masks.optimizer_probe import Found, ProbeError, agreed, chain, large_shape, probe, small_shape, tensors_of

Fresh = Mapping[str, float]


class StateTensor(NamedTuple):
    """An elementwise state tensor of a parameter.

    Attributes:
        name: Its key in the optimizer's state.
        tensor: The tensor, in the parameter's shape.
        source: The tensor as the optimizer holds it; flat, maybe.
        fresh: What a new parameter's holds everywhere.
        steady: Whether that value stays the same as training goes on.
    """

    name: str
    tensor: Tensor
    source: Tensor
    fresh: float
    steady: bool


def _zeros(*names: str) -> Callable[[Mapping[str, Any]], Fresh]:
    fresh = dict.fromkeys(names, 0.0)
    return lambda group: fresh


# What is known without trying: the elementwise state by class, given the options of a parameter's group.
_KNOWN: dict[type[Optimizer], Callable[[Mapping[str, Any]], Fresh]] = {
    torch.optim.SGD: _zeros("momentum_buffer"),
    torch.optim.Adam: _zeros("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    torch.optim.AdamW: _zeros("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    torch.optim.NAdam: _zeros("exp_avg", "exp_avg_sq"),
    torch.optim.RAdam: _zeros("exp_avg", "exp_avg_sq"),
    torch.optim.Adamax: _zeros("exp_avg", "exp_inf"),
    torch.optim.RMSprop: _zeros("square_avg", "momentum_buffer", "grad_avg"),
    torch.optim.Adagrad: lambda group: {"sum": float(group["initial_accumulator_value"])},
    torch.optim.Adadelta: _zeros("square_avg", "acc_delta"),
    torch.optim.Adafactor: _zeros(),
    torch.optim.ASGD: _zeros("ax"),
    torch.optim.Rprop: lambda group: {"prev": 0.0, "step_size": float(group["lr"])},
    torch.optim.Muon: _zeros("momentum_buffer"),
}
# Begins with the learning rate, which a schedule may change.
_UNSTEADY = {(torch.optim.Rprop, "step_size")}


def declare(kind: type[Optimizer], **fresh: float) -> None:
    """Say which state of an optimizer's class belongs to single weights, and what it begins with.

    Only needed where an optimizer cannot be tried out, as a trainer's error then says.

    Args:
        kind: The class.
        fresh: The value of each such state tensor before a parameter's first step. State that is not named is left
            alone.

    Example:
        >>> class Quadratic(torch.optim.SGD):
        ...     pass
        >>> declare(Quadratic, momentum_buffer=0.0)
    """
    _KNOWN[kind] = lambda group: fresh


class OptimizerState:
    """The state of one optimizer, as masks see it; what was found out about it is remembered.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2, 3))
        >>> optimizer = torch.optim.Adagrad([weight], initial_accumulator_value=0.5)
        >>> [(state.name, state.fresh) for state in OptimizerState.of(optimizer).elementwise(weight)]
        [('sum', 0.5)]
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._found: dict[tuple[int, tuple[int, ...], tuple[int, ...]], Found | ProbeError] = {}
        self._places: dict[int, tuple[int, int]] = {}  # no weak references: swap_tensors refuses parameters with one

    @classmethod
    def of(cls, optimizer: Optimizer) -> "OptimizerState":
        """The one view of ``optimizer``."""
        if (state := _VIEWS.get(optimizer)) is None:
            _VIEWS[optimizer] = state = cls(optimizer)
        return state

    def elementwise(self, parameter: Tensor) -> list[StateTensor]:
        """The parameter's state tensors that belong to single weights; none where that could not be found out."""
        optimizer, shape = self._living(), parameter.shape
        states = {id(state): state for state in (one.state.get(parameter, {}) for one in chain(optimizer))}
        of_size = [
            (name, source)
            for state in states.values()
            for name, source in tensors_of(state)
            if source.is_floating_point() and (source.shape == shape or source.shape == (shape.numel(),))
        ]
        if not of_size:
            return []
        kind, fresh = type(optimizer), self.fresh(parameter, tuple(name for name, _ in of_size))
        return [
            StateTensor(
                name,
                source if source.shape == shape else source.view(shape),
                source,
                fresh[name],
                (kind, name) not in _UNSTEADY,
            )
            for name, source in of_size
            if name in fresh
        ]

    def fresh(self, parameter: Tensor, names: Iterable[str] = ()) -> Fresh:
        """What the elementwise state of a new parameter holds, by name; ``names`` are those that it has."""
        index, group = self._group(parameter)
        if (known := _KNOWN.get(type(self._living()))) is not None:
            return known(group)
        found = self._look(parameter, index, group, names)
        if isinstance(found, Found):
            return found.fresh
        return {} if (inner := self._inner()) is None else inner.fresh(parameter, names)

    def obstacle(self, parameter: Tensor) -> str | None:
        """Why the state of a weight that grows in ``parameter`` could not be that of a new one; None if it can."""
        optimizer = self._living()
        name, (index, group) = type(optimizer).__name__, self._group(parameter)
        if type(optimizer) in _KNOWN or parameter.numel() < 2:
            return None
        found = self._look(parameter, index, group)
        if isinstance(found, ProbeError):
            if (inner := self._inner()) is not None:
                return inner.obstacle(parameter)
            return f"what {name} keeps for each weight could not be found out: {found}"
        if found.own_masks:
            return f"{name} keeps a mask of its own ({', '.join(found.own_masks)})"
        if found.irregular:
            return f"the state {', '.join(found.irregular)} of {name} begins with another value for each weight"
        return None

    def group(self, parameter: Tensor) -> Mapping[str, Any]:
        """The options of the parameter's group; those of the first one where none holds it."""
        return self._group(parameter)[1]

    def holds(self, parameter: Tensor) -> bool:
        """Whether the optimizer steps the parameter."""
        self._group(parameter)
        return self._is_at(parameter, self._places.get(id(parameter)))

    def _inner(self) -> "OptimizerState | None":
        """The view of what the optimizer wraps: what it adds itself is left alone if it cannot be tried out."""
        inner = list(chain(self._living()))[1:]
        return OptimizerState.of(inner[0]) if inner else None

    def _living(self) -> Optimizer:
        optimizer = self._optimizer()
        assert optimizer is not None, "views are kept by their optimizers"
        return optimizer

    def _group(self, parameter: Tensor) -> tuple[int, Mapping[str, Any]]:
        """The group that holds the parameter; the first one where none does (a frozen weight whose state is left)."""
        groups = self._living().param_groups
        if not self._is_at(parameter, self._places.get(id(parameter))):
            self._places = {
                id(one): (index, position)
                for index, group in enumerate(groups)
                for position, one in enumerate(group["params"])
            }
        index, _ = self._places.get(id(parameter), (0, 0))
        return index, groups[index]

    def _is_at(self, parameter: Tensor, place: tuple[int, int] | None) -> bool:
        groups = self._living().param_groups
        if place is None or place[0] >= len(groups) or place[1] >= len(groups[place[0]]["params"]):
            return False
        return groups[place[0]]["params"][place[1]] is parameter

    def _look(
        self, parameter: Tensor, index: int, group: Mapping[str, Any], names: Iterable[str] = ()
    ) -> Found | ProbeError:
        """Try the optimizer out, once a group and kind of shape, and again where it keeps something new.

        At two sizes: what is found at a small one alone may be so because it is small.
        """
        key = index, *(shapes := (small_shape(parameter.shape), large_shape(parameter.shape)))
        found = self._found.get(key)
        if isinstance(found, ProbeError):
            return found
        names = frozenset(names)
        if found is None or not names <= found.seen:
            before = names if found is None else names | found.seen
            small, large = (self._try(group, shape, parameter.device) for shape in shapes)
            if isinstance(small, Found) and isinstance(large, Found):
                found = agreed(small, large)
            else:
                found = large if isinstance(small, Found) else small
            self._found[key] = found
            if isinstance(found, Found):  # what is not seen now either will not be seen by trying again
                found = self._found[key] = Found(found.fresh, found.seen | before, found.irregular, found.own_masks)
        return found

    def _try(self, group: Mapping[str, Any], shape: tuple[int, ...], device: torch.device) -> Found | ProbeError:
        devices = [torch.device("cpu"), *([device] if device.type not in ("cpu", "meta") else [])]
        first: ProbeError | None = None
        for place in devices:
            try:
                return probe(self._living(), group, shape, place)
            except ProbeError as error:
                first = first or error
        assert first is not None
        return first


_VIEWS: "weakref.WeakKeyDictionary[Optimizer, OptimizerState]" = weakref.WeakKeyDictionary()
