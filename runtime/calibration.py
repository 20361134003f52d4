"""The constants of the cost model on this machine, from a few short measurements.

Owns the probes and what is concluded from their times. It must not know what the constants are used for.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import srigl_fx.runtime.ops  # noqa: F401 - registers the operator that is probed
from srigl_fx.runtime.autotune import measure
from srigl_fx.runtime.cost_model import Machine, Work, condensed, dense
from srigl_fx.runtime.timings import Timings

_WHAT = {"operator": "constants of the cost model"}


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
        bias, operator = torch.randn(self.outputs, generator=draw), torch.ops.srigl_fx.condensed_linear.default
        return lambda: torch.nn.functional.linear(x, weight, bias), lambda: operator(x, *operands, bias, self.inputs)


# One for each constant that dominates it: the call, weights from memory, and arithmetic.
_CALL = _Probe(inputs=32, outputs=16, columns=1, fan_in=4)
_FEW = _Probe(inputs=2048, outputs=1024, columns=1, fan_in=205)
_MANY = _Probe(inputs=768, outputs=512, columns=64, fan_in=77)


def machine_constants(timings: Timings, *, may_measure: bool = True) -> Machine:
    """The constants for this machine and number of threads: those measured earlier, or measured now in about 0.2 s.

    Args:
        timings: Where the measured times are kept.
        may_measure: If not, and nothing was measured earlier, the default constants for this number of threads.

    Example:
        >>> machine_constants(Timings(None), may_measure=False) == Machine().with_threads(torch.get_num_threads())
        True
    """
    seconds = timings.get(_WHAT)
    if seconds is None and may_measure:
        seconds = probe()
        timings.put(_WHAT, seconds)
    default = Machine().with_threads(torch.get_num_threads())
    return default if seconds is None else fit(seconds, default)


def probe() -> dict[str, float]:
    """Measured seconds of the probes: dense and condensed, each at a call's cost, at one sample and at many.

    Example:
        >>> sorted(probe())
        ['condensed call', 'condensed few', 'condensed many', 'dense call', 'dense few', 'dense many']
    """
    calls: dict[str, Callable[[], Tensor]] = {}
    for name, layer in (("call", _CALL), ("few", _FEW), ("many", _MANY)):
        calls[f"dense {name}"], calls[f"condensed {name}"] = layer.calls()
    with torch.inference_mode():
        return measure(calls, rounds=9, seconds=0.15, typical=min)


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
    layers = {"call": _CALL, "few": _FEW, "many": _MANY}
    found = {f"dense {name}": dense(layer.work, machine) for name, layer in layers.items()}
    return found | {f"condensed {name}": condensed(layer.work, machine) for name, layer in layers.items()}
