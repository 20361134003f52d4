"""Finding out which of an optimizer's state belongs to single weights, by training a small parameter with it.

Owns the experiment: a new optimizer of the same class and settings, a small parameter, gradients on some of its entries
alone. It must not know masks of real weights, or which optimizers need no experiment
(:mod:`srigl_fx.masks.optimizer_state`).

A state tensor is **elementwise** if what happens to one weight never shows in another's entry: an entry whose weight
and gradients are zero is then the same whatever the other weights do. Preconditioners, rotated moments and moments of a
rotated gradient are not elementwise, even where they have the weight's shape.
"""

import inspect
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

# Enough for what begins late (at a tenth or a twentieth step), and some milliseconds of work.
STEPS = 40
_LARGE = 130
_SCALES = (0.1, 3.0)
_T = TypeVar("_T")


class ProbeError(Exception):
    """The optimizer could not be tried out; the message says why."""


@dataclass(frozen=True)
class Found:
    """What an optimizer keeps for a parameter.

    Attributes:
        fresh: Elementwise state by name, and the value that it has for a new parameter, before its first step.
        seen: All state of the parameter's size.
        irregular: Elementwise state whose first value differs from entry to entry: a draw, say.
        own_masks: Bool state of the parameter's shape that is not True everywhere: the optimizer picks weights itself.
    """

    fresh: Mapping[str, float]
    seen: frozenset[str]
    irregular: tuple[str, ...]
    own_masks: tuple[str, ...]


def small_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """A small shape whose sizes compare with each other as those of ``shape`` do.

    Example:
        >>> small_shape((64, 32, 3, 3)), small_shape((512, 512)), small_shape((1, 9))
        ((7, 6, 5, 5), (5, 5), (1, 5))
    """
    sizes = sorted({size for size in shape if size > 1})
    return tuple(5 + sizes.index(size) if size > 1 else 1 for size in shape)


def large_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape itself, but for sizes of more than :data:`_LARGE`, which are cut down and still compare as they did.

    Some optimizers treat matrices of 64 or 128 rows and more as matrices, and smaller ones entry by entry.

    Example:
        >>> large_shape((64, 32, 3, 3)), large_shape((512, 512)), large_shape((4096, 1024))
        ((64, 32, 3, 3), (130, 130), (131, 130))
    """
    sizes = sorted(set(shape))
    return tuple(min(size, _LARGE + sizes.index(size)) for size in shape)


def agreed(one: Found, other: Found) -> Found:
    """What holds by two trials at different sizes.

    Example:
        >>> small = Found({"m": 0.0}, frozenset("m"), (), ())
        >>> agreed(small, Found({}, frozenset("m"), (), ())).fresh
        {}
    """
    return Found(
        {name: value for name, value in one.fresh.items() if other.fresh.get(name) == value},
        one.seen | other.seen,
        tuple(dict.fromkeys((*one.irregular, *other.irregular))),
        tuple(dict.fromkeys((*one.own_masks, *other.own_masks))),
    )


def probe(
    optimizer: Optimizer, group: Mapping[str, Any], shape: Sequence[int], device: str | torch.device = "cpu"
) -> Found:
    """Try ``optimizer`` out on a parameter of ``shape``, with the options of ``group``; it is not touched itself.

    Two runs differ in the weights and gradients of a random half of the entries; the others are zero in both. Random
    number generators are left as they are.

    Raises:
        ProbeError: No such optimizer can be made, or it does not step.

    Example:
        >>> adam = torch.optim.Adam([torch.zeros(3, 2)])
        >>> probe(adam, adam.param_groups[0], (6, 5)).fresh
        {'exp_avg': 0.0, 'exp_avg_sq': 0.0}
    """
    on = (torch.rand(tuple(shape), generator=torch.Generator().manual_seed(0), device="cpu") < 0.5).to(device)
    on.view(-1)[0], on.view(-1)[-1] = True, False

    def attempt(second_order: bool) -> tuple[_Run, _Run]:
        with _undisturbed(on.device):
            return _run(optimizer, group, on, 0, second_order), _run(optimizer, group, on, 1, second_order)

    try:
        first, second = _first_that_steps(attempt)
    except ProbeError as error:
        raise ProbeError(f"a new {type(optimizer).__name__} with its settings does not step: {error}") from None
    starts = {name: _start(name, first, second, on) for name in first.after if name in second.after}
    elementwise = {name: start for name, start in starts.items() if start is not None}
    return Found(
        {name: float(start[0]) + 0.0 for name, start in elementwise.items() if _is_one_value(start)},
        frozenset((*first.after, *second.after)),
        tuple(name for name, start in elementwise.items() if not _is_one_value(start)),
        tuple(sorted(first.masks | second.masks)),
    )


def needs(
    optimizer: Optimizer, group: Mapping[str, Any], shape: Sequence[int]
) -> tuple[Mapping[Any, Any], Mapping[Any, Any]]:
    """What a new parameter's state holds at once, and after its first step, under the options of ``group``.

    Raises:
        ProbeError: No such optimizer can be made, or it does not step.

    Example:
        >>> adam = torch.optim.Adam([torch.zeros(3, 2)])
        >>> begin, later = needs(adam, adam.param_groups[0], (6, 5))
        >>> list(begin), list(later)
        ([], ['step', 'exp_avg', 'exp_avg_sq'])
    """

    def attempt(second_order: bool) -> tuple[Mapping[Any, Any], Mapping[Any, Any]]:
        with _undisturbed(torch.device("cpu")):
            parameter = nn.Parameter(torch.ones(tuple(shape), dtype=torch.float32))
            stepper: Any = _stand_in(optimizer, group, parameter)
            begin = dict(stepper.state.get(parameter, {}))
            loss = None if not second_order else lambda: parameter.square().sum()
            _step(stepper, parameter, torch.ones_like(parameter), loss)
            return begin, dict(stepper.state.get(parameter, {}))

    return _first_that_steps(attempt)


def tensors_of(state: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in a parameter's state by name, those in dicts and lists within it too.

    Example:
        >>> [name for name, _ in tensors_of({"m": torch.ones(2), "buffers": {0.9: torch.ones(2)}, "step": 3})]
        ['m', 'buffers.0.9']
    """
    for key, value in state.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(value, Mapping):
            yield from tensors_of(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple) and any(isinstance(item, Tensor) for item in value):
            yield from tensors_of(dict(enumerate(value)), f"{prefix}{key}.")


def chain(optimizer: Optimizer) -> Iterator[Optimizer]:
    """The optimizer, and those that it wraps.

    Example:
        >>> len(list(chain(torch.optim.Adam([torch.zeros(2)]))))
        1
    """
    yield optimizer
    for value in vars(optimizer).values():
        if isinstance(value, Optimizer):
            yield from chain(value)


class _Sight(NamedTuple):
    """A state tensor after one step: on the support and off it."""

    on: Tensor
    off: Tensor


@dataclass
class _Run:
    """What was seen of the state: when it was first set, after each step, and bool tensors among it."""

    first: dict[str, Tensor] = field(default_factory=dict)
    after: dict[str, list[_Sight]] = field(default_factory=dict)
    masks: set[str] = field(default_factory=set)


class _Recorder(dict[Any, Any]):
    """The state of a parameter, which notes what each tensor is when it is set for the first time."""

    def __init__(self, present: Mapping[Any, Any], first: dict[str, Tensor]) -> None:
        super().__init__()
        self._first = first
        self.update(present)

    def __setitem__(self, key: Any, value: Any) -> None:
        for name, tensor in tensors_of({key: value}):
            if name not in self._first:
                self._first[name] = tensor.detach().clone()
        super().__setitem__(key, value)

    def setdefault(self, key: Any, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]

    def update(self, *given: Any, **named: Any) -> None:
        for key, value in dict(*given, **named).items():
            self[key] = value


def _run(optimizer: Optimizer, group: Mapping[str, Any], on: Tensor, seed: int, second_order: bool) -> _Run:
    """Train one parameter for :data:`STEPS` steps; where ``on`` is False, weight and gradient stay zero."""
    torch.manual_seed(0)
    random.seed(0)
    generator = torch.Generator().manual_seed(1 + seed)

    def values() -> Tensor:
        return torch.randn(on.shape, generator=generator, device="cpu", dtype=torch.float32).to(on.device) * on

    parameter, found = nn.Parameter(values()), _Run()
    stepper: Any = _stand_in(optimizer, group, parameter)
    for state in {id(one.state): one.state for one in chain(stepper)}.values():
        state[parameter] = _Recorder(state.get(parameter, {}), found.first)
    for _ in range(STEPS):
        slope = values() * _SCALES[seed]

        def loss(slope: Tensor = slope) -> Tensor:
            return (on * (_SCALES[seed] * parameter.square() + slope * parameter)).sum()

        _step(stepper, parameter, slope, loss if second_order else None)
        with torch.no_grad():
            parameter.copy_(torch.where(on, parameter, 0.0))
        for name, value in (pair for one in chain(stepper) for pair in tensors_of(one.state.get(parameter, {}))):
            if value.dtype == torch.bool:
                found.masks |= {name} if value.shape == on.shape and not bool(value.all()) else set()
            elif value.is_floating_point() and value.shape in (on.shape, (on.numel(),)):
                whole = value.detach().reshape(on.shape)
                found.after.setdefault(name, []).append(_Sight(whole[on], whole[~on]))
    return found


def _step(stepper: Any, parameter: nn.Parameter, gradient: Tensor, loss: Callable[[], Tensor] | None) -> None:
    """One step by ``gradient``; or where a loss is given by its gradients, which have gradients themselves."""

    def closure() -> Tensor:
        assert loss is not None
        with torch.enable_grad():
            parameter.grad = None
            value = loss()
            torch.autograd.backward(value, create_graph=True)
            return value.detach()

    if loss is None:
        parameter.grad = gradient
        stepper.step()
    else:
        closure()
        stepper.step(closure)
    parameter.grad = None


def _first_that_steps(attempt: Callable[[bool], _T]) -> _T:
    """What ``attempt`` gives with gradients alone, or else with second-order ones and a closure; the first reason."""
    reasons = []
    for second_order in (False, True):
        try:
            return attempt(second_order)
        except Exception as error:  # whatever somebody's optimizer raises
            reasons.append(f"{type(error).__name__}: {error}")
    raise ProbeError(reasons[0])


def _start(name: str, first: _Run, second: _Run, on: Tensor) -> Tensor | None:
    """The values off the support that a state tensor begins with, if it is elementwise."""
    starts = [run.first.get(name) for run in (first, second)]
    one, other = (None if start is None or start.numel() != on.numel() else start.reshape(on.shape) for start in starts)
    if one is None or other is None or len(first.after[name]) != len(second.after[name]):
        return None
    pairs = [_Sight(one[on], one[~on]), *first.after[name]], [_Sight(other[on], other[~on]), *second.after[name]]
    moved = False
    for mine, others in zip(*pairs, strict=True):
        if not torch.equal(mine.off, others.off):  # a NaN is not equal to itself
            return None
        moved |= not torch.equal(mine.on, others.on)
    regular = _is_one_value(one[~on])
    if not moved or (regular and not all(_is_one_value(sight.off) for sight in first.after[name])):
        return None
    return one[~on].float()


def _is_one_value(values: Tensor) -> bool:
    return bool((values == values[0]).all())


def _stand_in(optimizer: Optimizer, group: Mapping[str, Any], parameter: nn.Parameter) -> Optimizer:
    """A new optimizer of the same class and settings, for ``parameter`` alone; what it wraps is one, too."""
    kind: Any = type(optimizer)
    # Some count steps in the group: a new parameter has made none.
    options = {key: _copy(value) for key, value in group.items() if key not in ("params", "param_names", "step")}
    arguments: dict[str, Any] = {}
    wrapped: dict[str, Optimizer] = {}
    for position, argument in enumerate(inspect.signature(kind).parameters.values()):
        if argument.kind in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD):
            continue
        own = vars(optimizer).get(argument.name, vars(optimizer).get(f"_{argument.name}"))
        if isinstance(own, Optimizer):
            wrapped[argument.name] = own
        elif argument.name == "model":
            arguments["model"] = holder = nn.Module()
            holder.register_parameter("weight", parameter)
        elif position == 0:
            arguments[argument.name] = [{**options, "params": [parameter]}]
        elif argument.name in options:
            arguments[argument.name] = options[argument.name]
        elif isinstance(own, bool | int | float | str | tuple):
            arguments[argument.name] = own
    inner = {name: _stand_in(one, group, parameter) for name, one in wrapped.items()}
    try:
        made: Optimizer = kind(**arguments, **inner)
    except TypeError:
        if not wrapped:
            raise
        # One that makes what it wraps itself, of a class and options that are passed on.
        made = kind(**{**options, **arguments}, **{name: type(one) for name, one in wrapped.items()})
    return made


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Random numbers, warnings and the default device stay as they are; nothing is compiled for a small parameter."""
    numpy: Any = sys.modules.get("numpy")
    python_state, numpy_state = random.getstate(), numpy.random.get_state() if numpy else None
    devices = [] if device.type == "cpu" else [device]
    with (
        torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"),
        device,
        torch.compiler.set_stance("force_eager"),
        torch.enable_grad(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            random.setstate(python_state)
            if numpy:
                numpy.random.set_state(numpy_state)
