"""The constants of the cost model on this machine, from a few short measurements.

Owns the probes, which of their times are believed, and what is concluded from them. It must not know what the constants
are used for.
"""

import logging
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from srigl_fx.runtime.costs.autotune import measure_undisturbed
from srigl_fx.runtime.costs.cost_model import Kernel, Machine, Work, condensed, dense
from srigl_fx.runtime.costs.timings import Timings
from srigl_fx.runtime.cpu.direct import DirectCall
from srigl_fx.runtime.cpu.kernels.isa import TARGETS, host_target, level_of
from srigl_fx.runtime.ops import LINEAR

WHAT = {"operator": "constants of the cost model"}  # what the times of the probes are filed under


@dataclass(frozen=True, kw_only=True)
class _Probe:
    """A linear layer: features, samples, and the weights that each row keeps."""

    inputs: int
    outputs: int
    columns: int
    fan_in: int

    @property
    def work(self) -> Work:
        return Work(
            rows=self.outputs,
            fan_in=self.inputs,
            active=self.outputs,
            kept=self.outputs * self.fan_in,
            columns=self.columns,
        )

    def calls(self) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
        """The dense and the condensed layer, on random operands."""
        draw = torch.Generator().manual_seed(0)
        x = torch.randn(self.columns, self.inputs, generator=draw)
        weight = torch.randn(self.outputs, self.inputs, generator=draw)
        picked = torch.rand(self.outputs, self.inputs, generator=draw).argsort(1)[:, : self.fan_in].sort(1).values
        operands = weight.gather(1, picked), picked.to(torch.uint16), torch.arange(self.outputs, dtype=torch.int32)
        bias, call = torch.randn(self.outputs, generator=draw), DirectCall(LINEAR, {"in_features": self.inputs})
        return lambda: torch.nn.functional.linear(x, weight, bias), lambda: call(x, *operands, bias, None, None)


# One for each constant that dominates it: the call, weights from memory, and arithmetic.
_CALL = _Probe(inputs=32, outputs=16, columns=1, fan_in=4)
_FEW = _Probe(inputs=2048, outputs=1024, columns=1, fan_in=205)
_MANY = _Probe(inputs=768, outputs=512, columns=64, fan_in=77)
_LAYERS = {"call": _CALL, "few": _FEW, "many": _MANY}
_KERNEL_PROBE: dict[Kernel, str] = {"dot": "condensed few", "tile": "condensed many"}

AGREE = 3.0  # times of one call that differ by less: caches and clock rates do as much
_FASTER, _SLOWER = 10.0, 20.0  # than the core of the default constants
_NOISE = 1.5
_seen: set[tuple[str, float, int]] = set()  # names, seconds and threads that this process has seen to be so
_logger = logging.getLogger(__name__)


def host_machine() -> Machine:
    """The default constants for the instruction set of this process and its number of threads; nothing is measured.

    Example:
        >>> host_machine().dense_rate >= Machine().dense_rate
        True
    """
    machine = Machine(level=level_of(host_target()), target=TARGETS.index(host_target()))
    return machine.with_threads(torch.get_num_threads())


def machine_constants(timings: Timings, *, may_measure: bool = True) -> Machine:
    """The constants for this machine and number of threads: those measured earlier, or measured now.

    Measuring takes about 0.5 s, 3 s on a busy machine, and the kernels are compiled first. What the machine is too busy
    to show, or what no machine can do, is not kept.

    Args:
        timings: Where the measured times are kept.
        may_measure: If not, and nothing was measured earlier, the default constants for this number of threads.

    Example:
        >>> machine_constants(Timings(None), may_measure=False) == host_machine()
        True
    """
    seconds = _stored(timings)
    if seconds is None and may_measure:
        seconds = _calibrate(timings)
    return _constants(seconds)


def checked_constants(timings: Timings, kernels: Collection[Kernel]) -> Machine | None:
    """The constants for something to rest on them: what is stored is held against the clock first, once a process.

    A stored time that is off by more than a factor of :data:`AGREE` is thrown away with the others, and all are
    measured anew: it is from a busy moment, or from a machine that was another one.

    Args:
        timings: Where the measured times are kept.
        kernels: Those whose times matter; a process that has not used a kernel takes seconds to compile it.

    Returns:
        None where the machine is too busy to be measured, or gives times that are not believable.

    Example:
        >>> fresh = Timings(None)
        >>> checked_constants(fresh, ["dot"]) in (None, machine_constants(fresh, may_measure=False))
        True
    """
    seconds = _stored(timings)
    if seconds is not None:
        names = {"dense call", "dense few", "dense many", *(_KERNEL_PROBE[kernel] for kernel in kernels)}
        unseen = [name for name in sorted(names) if (name, seconds[name], torch.get_num_threads()) not in _seen]
        if not unseen:
            return _constants(seconds)
        glance = _measured(unseen, rounds=10, seconds=0.02, limit=0.3)
        if _agree(glance, seconds):  # what the machine is too busy to show is not held against the others
            _seen.update((name, seconds[name], torch.get_num_threads()) for name in glance)
            return _constants(seconds)
    seconds = _calibrate(timings, seconds)
    return None if seconds is None else _constants(seconds)


def believable(seconds: Mapping[str, float], threads: int) -> bool:
    """Whether a machine can have taken these times for the probes.

    1. None is ten times as fast, with each thread, as the core that the default constants are of, nor are all its
       threads together twenty times as slow as that core.
    2. A call that computes next to nothing takes no longer than one that computes a layer, give or take noise.

    Args:
        seconds: As :func:`probe` returns them; with other names, they are not believable.
        threads: How many threads took them.

    Example:
        >>> seconds = predicted(Machine())
        >>> believable(seconds, 1), believable({**seconds, "condensed few": 4.9e-3}, 1)
        (True, False)
    """
    least, most = predicted(Machine().with_threads(threads)), predicted(Machine())
    if set(seconds) != set(most):
        return False
    possible = all(least[name] / _FASTER <= one <= most[name] * _SLOWER for name, one in seconds.items())
    return possible and all(
        seconds[f"{form} call"] <= _NOISE * seconds[f"{form} {layer}"]
        for form in ("dense", "condensed")
        for layer in ("few", "many")
    )


def probe() -> dict[str, float]:
    """Measured seconds of the probes: dense and condensed, each at a call's cost, at one sample and at many.

    Many short rounds with pauses between, of which the fastest count; a probe that other processes disturbed in nearly
    all of them is left out.

    Example:
        >>> set(probe()) <= {f"{form} {layer}" for form in ("dense", "condensed") for layer in _LAYERS}
        True
    """
    return _measured(predicted(Machine()), rounds=25, pause=0.01, limit=2.0)


def _stored(timings: Timings) -> dict[str, float] | None:
    """The stored times of the probes, if a machine can have taken them."""
    seconds = timings.get(WHAT)
    return seconds if seconds is not None and believable(seconds, torch.get_num_threads()) else None


def _calibrate(timings: Timings, stored: dict[str, float] | None = None) -> dict[str, float] | None:
    """Measure the probes and keep their times, or those stored if they agree; None, and none, if not believable."""
    seconds, threads = probe(), torch.get_num_threads()
    believed = believable(seconds, threads)
    if believed and stored is not None and _agree(seconds, stored):
        seconds = stored
    else:
        if timings.get(WHAT) is not None:
            _logger.info("stored constants of the cost model contradict what was measured now, and are thrown away")
            timings.drop(WHAT)
        if not believed:
            return None
        timings.put(WHAT, seconds)
    _seen.update((name, one, threads) for name, one in seconds.items())
    return seconds


def _agree(seconds: Mapping[str, float], stored: Mapping[str, float]) -> bool:
    return all(1 / AGREE <= one / stored[name] <= AGREE for name, one in seconds.items())


def _constants(seconds: Mapping[str, float] | None) -> Machine:
    return host_machine() if seconds is None else fit(seconds, host_machine())


def _measured(names: Collection[str], **effort: Any) -> dict[str, float]:
    """The undisturbed times of the probes of these names."""
    layers = {layer: _LAYERS[layer].calls() for layer in {name.split()[1] for name in names}}
    with torch.inference_mode():
        return measure_undisturbed(
            {name: layers[name.split()[1]][name.startswith("condensed")] for name in names},
            alone=torch.get_num_threads() == 1,
            **effort,
        )


def fit(seconds: Mapping[str, float], start: Machine) -> Machine:
    """The constants with which the cost model gives these times of the probes.

    Args:
        seconds: What :func:`probe` returns.
        start: Constants to begin with: those that no probe tells apart keep their ratio.

    Example:
        >>> seconds = predicted(Machine(dense_rate=50e9, bandwidth=9e9, tile_rate=20e9))
        >>> again = predicted(fit(seconds, Machine()))
        >>> all(abs(again[name] / seconds[name] - 1) < 0.1 for name in seconds)
        True
    """
    machine = replace(start, dense_call=seconds["dense call"], condensed_call=seconds["condensed call"])
    machine = _solved(machine, dense, _FEW.work, seconds["dense few"], ("bandwidth", "cached_bandwidth"))
    machine = _solved(machine, dense, _MANY.work, seconds["dense many"], ("dense_rate",))
    machine = _solved(machine, condensed, _FEW.work, seconds["condensed few"], ("dot_rate",))
    return _solved(machine, condensed, _MANY.work, seconds["condensed many"], ("tile_rate", "move_rate"))


def _solved(
    machine: Machine, cost: Callable[[Work, Machine], float], work: Work, seconds: float, rates: tuple[str, ...]
) -> Machine:
    """The machine with these rates all changed by the factor that makes ``work`` cost ``seconds``."""
    free: dict[str, Any] = dict.fromkeys(rates, math.inf)
    rest = cost(work, replace(machine, **free))
    # Noise may make the rest seem dearer than the whole.
    factor = (cost(work, machine) - rest) / max(seconds - rest, 0.2 * seconds)
    changed: dict[str, Any] = {rate: factor * getattr(machine, rate) for rate in rates}
    return replace(machine, **changed)


def predicted(machine: Machine) -> dict[str, float]:
    """The times of the probes as the cost model has them.

    Example:
        >>> predicted(Machine())["dense many"] > predicted(Machine())["dense call"]
        True
    """
    found = {f"dense {name}": dense(layer.work, machine) for name, layer in _LAYERS.items()}
    return found | {f"condensed {name}": condensed(layer.work, machine) for name, layer in _LAYERS.items()}
