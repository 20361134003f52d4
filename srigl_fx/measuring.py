"""What each form of each layer costs at each batch size: measured, remembered, or estimated where the answer is clear.

Owns which of the three it is, and what a remembered time is filed under. It must not know what is concluded from the
costs, nor how times are taken and kept.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from srigl_fx.passes.condense import can_shrink, variants
from srigl_fx.passes.program import Decision, Layer, Program, Times, Use, arguments
from srigl_fx.runtime.autotune import measure
from srigl_fx.runtime.calibration import machine_constants
from srigl_fx.runtime.cost_model import Machine, Work, estimate
from srigl_fx.runtime.timings import Timings

CLEAR = 3.0  # an estimated ratio that is believed unmeasured; benchmarks/cost_model.py shows how far estimates are off


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds a call, by weight name, batch size and form.

    Attributes:
        measured: For each layer that was measured, now or earlier.
        estimated: For every layer with a choice, by the cost model.
    """

    measured: dict[str, Times]
    estimated: dict[str, Times]


def layer_costs(program: Program, batch_sizes: Sequence[int], min_speedup: float) -> Costs:
    """What the layers of a matched program cost in each form.

    A layer is measured unless ``min_speedup`` is 0, or at most 1 and the estimates of a linear layer leave no doubt:
    the condensed form is :data:`CLEAR` times as fast as dense at every batch size, or each form as much slower at one.

    Args:
        program: Its layers are known, and not rewritten yet.
        batch_sizes: Those to cost at; the program takes each of them.
        min_speedup: How much faster than dense a layer must be to be condensed; 0 measures nothing.
    """
    layers = [layer for layer in program.layers if layer.uses]
    timings = Timings.open()
    machine = machine_constants(timings, may_measure=bool(layers) and min_speedup > 0)
    calls: dict[str, dict[int, list[_Call]]] = {layer.weight.fqn: {} for layer in layers}
    for batch in batch_sizes:
        recorder = _Recorder(program)
        recorder.run(*pytree.tree_leaves(program.inputs(batch)), enable_io_processing=False)
        for layer in layers:
            forms = _forms(layer)
            calls[layer.weight.fqn][batch] = [
                _Call(use, recorder.inputs[use.node], recorder.outputs[use.node], forms, program.value_dtype)
                for use in layer.uses
            ]
    costs = Costs(measured={}, estimated={})
    for layer in layers:
        by_batch = calls[layer.weight.fqn]
        estimated = {batch: _sum(call.estimated(machine) for call in found) for batch, found in by_batch.items()}
        costs.estimated[layer.weight.fqn] = estimated
        everything = [call for found in by_batch.values() for call in found]
        known = all(call.remembered(timings) for call in everything)
        trusted = min_speedup <= 1 and all(call.is_modelled for call in everything) and is_clear(estimated)
        if min_speedup > 0 and (known or not trusted):
            costs.measured[layer.weight.fqn] = {
                batch: _sum(call.measured(timings) for call in found) for batch, found in by_batch.items()
            }
    return costs


def estimated_costs(program: Program, batch_sizes: Sequence[int], machine: Machine) -> Costs:
    """What the layers of a matched program cost in each form by the cost model alone; nothing is measured.

    Args:
        program: Its layers are known, and not rewritten yet.
        batch_sizes: Those to cost at. The program runs at its own: a layer is taken to be used in proportion.
        machine: The constants.
    """
    own, recorder = program.batch_size, _Recorder(program)
    recorder.run(*pytree.tree_leaves(program.inputs(own)), enable_io_processing=False)
    estimated: dict[str, Times] = {}
    for layer in program.layers:
        forms = _forms(layer) if layer.uses else []
        calls = [
            _Call(use, recorder.inputs[use.node], recorder.outputs[use.node], forms, program.value_dtype)
            for use in layer.uses
        ]
        if calls:
            estimated[layer.weight.fqn] = {
                batch: _sum(call.estimated(machine, batch / own) for call in calls) for batch in batch_sizes
            }
    return Costs(measured={}, estimated=estimated)


def is_clear(estimated: Times) -> bool:
    """Whether estimates leave no doubt about a layer's form.

    Example:
        >>> is_clear({1: {"dense": 9.0, "condensed": 1.0}}), is_clear({1: {"dense": 2.0, "condensed": 1.0}})
        (True, False)
        >>> is_clear({1: {"dense": 9.0, "condensed": 1.0}, 64: {"dense": 1.0, "condensed": 9.0}})
        True
    """
    forms = [{form: s for form, s in seconds.items() if form != "dense"} for seconds in estimated.values()]
    pairs = list(zip(estimated.values(), forms, strict=True))
    faster = all(
        seconds["dense"] >= CLEAR * seconds["condensed"] and seconds["condensed"] == min(others.values())
        for seconds, others in pairs
    )
    return faster or any(min(others.values()) >= CLEAR * seconds["dense"] for seconds, others in pairs)


def _forms(layer: Layer) -> list[Decision]:
    forms: list[Decision] = ["dense", "condensed"]
    return [*forms, "shrunk"] if all(can_shrink(use) for use in layer.uses) else forms


def _sum(costs: Any) -> dict[Decision, float]:
    """The times of several calls together, form by form."""
    total: dict[Decision, float] = {}
    for seconds in costs:
        for form, one in seconds.items():
            total[form] = total.get(form, 0.0) + one
    return total


class _Call:
    """One use of a layer on one input."""

    def __init__(
        self, use: Use, x: Tensor, y_shape: torch.Size, forms: list[Decision], value_dtype: torch.dtype
    ) -> None:
        self._use = use
        self._x = x
        self._y_shape = y_shape
        self._forms = forms
        self._value_dtype = value_dtype

    @functools.cached_property
    def _what(self) -> dict[str, Any]:
        """What its times are filed under: everything that they depend on but the values and where they are kept."""
        use, x, geometry = self._use, self._x, self._use.geometry
        # A linear layer does the same whatever the leading sizes are; layouts with gaps or of other orders may not.
        shape = [math.prod(x.shape[:-1]), x.shape[-1]] if geometry is None and x.is_contiguous() else list(x.shape)
        settings = {
            name: list(value) if isinstance(value, list | tuple) else value
            for name, value in arguments(use.node).items()
            if not isinstance(value, fx.Node) and value is not None
        }
        counts = use.mask.sum(1).tolist()
        return {
            "operator": str(use.node.target),
            **settings,
            "weight": list(use.mask.shape),
            "fan_in": sorted(set(counts) - {0}),
            "active": sum(count > 0 for count in counts),
            "kept": sum(counts),
            "kernel": [] if geometry is None else list(geometry.kernel),
            "bias": use.bias is not None,
            "values": str(self._value_dtype).removeprefix("torch."),
            "input": shape,
            **({} if x.is_contiguous() else {"strides": list(x.stride())}),
        }

    @property
    def is_modelled(self) -> bool:
        """Whether the cost model is to be believed: of a convolution it leaves too much out."""
        return self._use.geometry is None

    def estimated(self, machine: Machine, scale: float = 1.0) -> dict[Decision, float]:
        """The cost model's word for this call, or for one with ``scale`` times as many samples."""
        geometry, mask = self._use.geometry, self._use.mask
        rows, fan_in = mask.shape
        # Each weight meets each position of the output; of a transposed convolution, of the input.
        columns = math.prod(self._y_shape) // rows
        if geometry is not None and geometry.transposed:
            columns = self._x.numel() // self._x.shape[1]
        work = Work(
            rows=rows,
            fan_in=fan_in,
            active=int(mask.any(1).sum()),
            kept=int(mask.sum()),
            columns=max(1, round(columns * scale)),
            value_bytes=self._value_dtype.itemsize,
            convolution=geometry is not None,
        )
        seconds = estimate(work, machine)
        return {form: seconds[form] for form in self._forms}

    def remembered(self, timings: Timings) -> dict[str, float] | None:
        known = timings.get(self._what)
        return known if known is not None and set(self._forms) <= set(known) else None

    def measured(self, timings: Timings) -> dict[Decision, float]:
        seconds = self.remembered(timings)
        if seconds is None:
            modules = variants(self._use, self._forms, self._value_dtype)
            with torch.no_grad():
                taken = measure({form: functools.partial(module.forward, self._x) for form, module in modules})
            seconds = {str(form): one for form, one in taken.items()}
            timings.put(self._what, seconds)
        return {form: seconds[form] for form in self._forms}


class _Recorder(fx.Interpreter):
    """Runs a program's graph and keeps the inputs of the layers' nodes, and the shapes of their outputs."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.module)
        self._wanted = {use.node: use.x for layer in program.layers for use in layer.uses}
        self.inputs: dict[fx.Node, Tensor] = {}
        self.outputs: dict[fx.Node, torch.Size] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.target is torch.ops.aten.copy_.default:  # a buffer that the model updates: it is the model's own
            return self.env[n.args[1]]  # type: ignore[index]
        if n not in self._wanted:
            return super().run_node(n)
        self.inputs[n] = self.env[self._wanted[n]]
        y = super().run_node(n)
        self.outputs[n] = y.shape
        return y

    def run(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return super().run(*args, **kwargs)
