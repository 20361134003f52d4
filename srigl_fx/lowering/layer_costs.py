"""What each form of each layer costs at each batch size: measured, remembered, or estimated where the answer is clear.

Owns which of the three it is, and what a remembered time is filed under. It must not know what is concluded from the
costs, nor how times are taken and kept.
"""

import functools
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from srigl_fx.lowering.direct import direct_function
from srigl_fx.passes.condense import can_shrink, variants
from srigl_fx.passes.layer_runs import run_uses
from srigl_fx.passes.program import Costs, Decision, MatchedLayer, Program, Times, Use, arguments
from srigl_fx.runtime.costs.autotune import measure_undisturbed
from srigl_fx.runtime.costs.calibration import checked_constants, host_machine, machine_constants
from srigl_fx.runtime.costs.cost_model import Kernel, Machine, Work, estimate, kernel_for
from srigl_fx.runtime.costs.timings import Timings
from srigl_fx.runtime.format import count_index_rows

CLEAR = 3.0  # an estimated ratio that is believed unmeasured; benchmarks/cost_model.py shows how far estimates are off
_USUAL = 4.0  # how far a ratio may be from that of the default constants and be believed
_FAR = 20.0  # how far a time may be from its estimate without being measured again
_AGAIN = 1.5  # how far apart two measurements of one call may be that confirm each other
_logger = logging.getLogger(__name__)


def layer_costs(program: Program, batch_sizes: Sequence[int], min_speedup: float) -> Costs:
    """What the layers of a matched program cost in each form.

    A layer is measured unless ``min_speedup`` is 0, or at most 1 and the estimates of a linear layer leave no doubt:
    the condensed form is :data:`CLEAR` times as fast as dense at every batch size, or each form as much slower at one.
    They are in doubt where they are not believable (:func:`is_believable`), and where the machine is too busy for the
    constants to be measured. Before a layer rests on estimates alone, and where a measurement contradicts them, the
    stored constants are checked.

    A remembered time that contradicts the estimates is measured again, until two measurements agree. Where the machine
    is too busy to measure a layer, nothing is kept, and estimates from the default constants decide: no others can be
    checked then.

    Args:
        program: Its layers are known, and not rewritten yet.
        batch_sizes: Those to cost at; the program takes each of them.
        min_speedup: How much faster than dense a layer must be to be condensed; 0 measures nothing.
    """
    layers = [layer for layer in program.layers if layer.uses]
    timings = Timings.open()
    machine = machine_constants(timings, may_measure=bool(layers) and min_speedup > 0)
    calls: dict[str, _Calls] = {layer.weight.fqn: {} for layer in layers}
    for batch in batch_sizes:
        for name, found in _calls(program, batch).items():
            calls[name][batch] = found
    if min_speedup == 0:
        return Costs(measured={}, estimated=_estimated(calls, machine))

    def checked(names: Iterable[str]) -> Machine | None:
        return checked_constants(timings, {call.kernel for name in names for call in _all(calls[name])})

    def rests_on_estimates(name: str) -> bool:
        return min_speedup <= 1 and _leave_no_doubt(calls[name], timings, machine)

    def is_contradicted(name: str) -> bool:
        known = [(call.remembered(timings), call) for call in _all(calls[name]) if call.is_modelled]
        return any(seconds and contradicts(seconds, call.estimated(machine)) for seconds, call in known)

    resting = [name for name in calls if rests_on_estimates(name)]
    doubtful = resting + [name for name in calls if is_contradicted(name)]
    sure = checked(doubtful) if doubtful else machine
    machine = sure or _default()
    resting = [name for name in resting if sure and rests_on_estimates(name)]
    measured, too_busy = {}, []
    for name in [name for name in calls if name not in resting]:
        taken = {batch: [call.measured(timings, machine) for call in found] for batch, found in calls[name].items()}
        if all(all(seconds) for seconds in taken.values()):
            measured[name] = {batch: _sum(seconds) for batch, seconds in taken.items()}
        else:
            too_busy.append(name)
    if not doubtful and (contradicted := [name for name in measured if is_contradicted(name)]):
        machine = checked(contradicted) or _default()
    if too_busy:
        _logger.warning(
            "the processors were busy with other work: %s could not be measured, and estimates decide; lower again "
            "when the machine is quiet",
            ", ".join(too_busy),
        )
    unchecked = _estimated({name: calls[name] for name in too_busy}, _default())
    return Costs(measured=measured, estimated=_estimated(calls, machine) | unchecked)


def _leave_no_doubt(calls: "_Calls", timings: Timings, machine: Machine) -> bool:
    """Whether the estimates of a layer decide, because it is a linear one, of unknown times, and they are clear."""
    if not all(call.is_modelled for call in _all(calls)) or all(call.remembered(timings) for call in _all(calls)):
        return False
    estimated, usual = (_estimated({"": calls}, one)[""] for one in (machine, _default()))
    return is_clear(estimated) and is_believable(estimated, usual)


def _estimated(calls: "Mapping[str, _Calls]", machine: Machine) -> dict[str, Times]:
    return {
        name: {batch: _sum(call.estimated(machine) for call in uses) for batch, uses in found.items()}
        for name, found in calls.items()
    }


def _all(calls: "_Calls") -> "list[_Call]":
    return [call for uses in calls.values() for call in uses]


def _default() -> Machine:
    return Machine().with_threads(torch.get_num_threads())


def measure(alternatives: Mapping[Decision, Callable[[], object]]) -> dict[Decision, float] | None:
    """The seconds of each form; None where the machine is too busy to tell them.

    Example:
        >>> sorted(measure({"dense": lambda: sum(range(1000)), "condensed": lambda: sum(range(10))}) or {})
        ['condensed', 'dense']
    """
    taken = measure_undisturbed(alternatives, alone=torch.get_num_threads() == 1)
    return taken if len(taken) == len(alternatives) else None


def estimated_costs(program: Program, batch_sizes: Sequence[int], machine: Machine) -> Costs:
    """What the layers of a matched program cost in each form by the cost model alone; nothing is measured.

    Args:
        program: Its layers are known, and not rewritten yet.
        batch_sizes: Those to cost at. The program runs at its own: a layer is taken to be used in proportion.
        machine: The constants.
    """
    own = program.batch_size
    estimated: dict[str, Times] = {
        name: {batch: _sum(call.estimated(machine, batch / own) for call in calls) for batch in batch_sizes}
        for name, calls in _calls(program, own).items()
    }
    return Costs(measured={}, estimated=estimated)


def _calls(program: Program, batch: int) -> "dict[str, list[_Call]]":
    """The uses of each layer at a batch size, by the weight's name."""
    met: dict[fx.Node, tuple[Tensor, torch.Size]] = {}

    def seen(use: Use, x: Tensor, y: Tensor) -> None:
        met[use.node] = x, y.shape

    run_uses(program, seen, batch)
    return {
        layer.weight.fqn: [_Call(use, *met[use.node], _forms(layer), layer.value_dtype) for use in layer.uses]
        for layer in program.layers
        if layer.uses
    }


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


def is_believable(estimated: Times, usual: Times) -> bool:
    """Whether every ratio of a form's time to the dense one's is about that of the default constants.

    Constants of another machine change both times more than their ratio: where the ratio is another one, a constant may
    be wrong, and a layer is better measured.

    Args:
        estimated: With the constants of this machine.
        usual: With the default constants.

    Example:
        >>> usual = {1: {"dense": 9.0, "condensed": 1.0}}
        >>> is_believable({1: {"dense": 30.0, "condensed": 1.0}}, usual)
        True
        >>> is_believable({1: {"dense": 9.0, "condensed": 300.0}}, usual)
        False
    """
    return all(
        1 / _USUAL <= (seconds["dense"] / one) / (usual[batch]["dense"] / usual[batch][form]) <= _USUAL
        for batch, seconds in estimated.items()
        for form, one in seconds.items()
    )


def contradicts(seconds: Mapping[str, float], estimated: Mapping[Decision, float]) -> bool:
    """Whether times of a call and its estimates cannot both be right.

    Their ratios to the dense time differ by more than :data:`CLEAR`, or the times by more than any machine's would.

    Example:
        >>> contradicts({"dense": 3.0, "condensed": 1.0}, {"dense": 4.0, "condensed": 1.0})
        False
        >>> contradicts({"dense": 3.0, "condensed": 100.0}, {"dense": 4.0, "condensed": 1.0})
        True
    """
    off = {form: seconds[form] / expected for form, expected in estimated.items()}
    return any(not (1 / CLEAR <= one / off["dense"] <= CLEAR and 1 / _FAR <= one <= _FAR) for one in off.values())


def _forms(layer: MatchedLayer) -> list[Decision]:
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
            **({} if self._index_rows is None else {"index_rows": self._index_rows}),
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

    @property
    def kernel(self) -> Kernel:
        """The kernel of the condensed form, on this machine."""
        return kernel_for(self._work(), host_machine())

    @property
    def _columns(self) -> int:
        """How often each weight is used: at each position of the output, of a transposed convolution of the input."""
        if self._use.geometry is not None and self._use.geometry.transposed:
            return self._x.numel() // self._x.shape[1]
        return math.prod(self._y_shape) // self._use.mask.shape[0]

    @functools.cached_property
    def _index_rows(self) -> int | None:
        """How many rows of indices the active rows read, if some share them."""
        mask = self._use.mask
        found = count_index_rows(mask.numpy())
        return found if found < int(mask.any(1).sum()) else None

    def _work(self, scale: float = 1.0) -> Work:
        """What this call computes, or one with ``scale`` times as many samples."""
        geometry, mask = self._use.geometry, self._use.mask
        rows, fan_in = mask.shape
        return Work(
            rows=rows,
            fan_in=fan_in,
            active=int(mask.any(1).sum()),
            kept=int(mask.sum()),
            columns=max(1, round(self._columns * scale)),
            value_bytes=self._value_dtype.itemsize,
            convolution=geometry is not None,
            eight_bits=self._value_dtype is torch.int8,
            index_rows=self._index_rows or 0,
        )

    def estimated(self, machine: Machine, scale: float = 1.0) -> dict[Decision, float]:
        """The cost model's word for this call, or for one with ``scale`` times as many samples."""
        seconds = estimate(self._work(scale), machine)
        return {form: seconds[form] for form in self._forms}

    def remembered(self, timings: Timings) -> dict[str, float] | None:
        """The times that were measured earlier."""
        return self._kept(timings, self._what)

    def measured(self, timings: Timings, machine: Machine) -> dict[Decision, float] | None:
        """The times measured earlier, or now where there are none that can be believed; None if that cannot be."""
        earlier = self.remembered(timings)
        if earlier is not None and self._is_believed(earlier, timings, machine):
            return {form: earlier[form] for form in self._forms}
        modules = variants(self._use, self._forms, self._value_dtype)
        with torch.no_grad():
            # As a lowered module calls them where no gradients are recorded.
            taken = measure({form: functools.partial(direct_function(module), self._x) for form, module in modules})
        if taken is None:
            return None
        seconds = {str(form): one for form, one in taken.items()}
        timings.put(self._what, seconds)
        if earlier is not None and _agree(seconds, earlier):
            timings.put(self._what_again, seconds)
        return taken

    def _is_believed(self, seconds: Mapping[str, float], timings: Timings, machine: Machine) -> bool:
        """Whether the times agree with their estimates or, if not, with times measured at another moment."""
        if not contradicts(seconds, self.estimated(machine)):
            return True
        again = self._kept(timings, self._what_again)
        return again is not None and _agree(seconds, again)

    @property
    def _what_again(self) -> dict[str, Any]:
        return {**self._what, "again": True}

    def _kept(self, timings: Timings, what: Mapping[str, Any]) -> dict[str, float] | None:
        known = timings.get(what)
        return known if known is not None and set(self._forms) <= set(known) else None


_Calls = dict[int, list[_Call]]  # by batch size: a weight may be used several times


def _agree(seconds: Mapping[str, float], others: Mapping[str, float]) -> bool:
    return all(1 / _AGAIN <= one / others[form] <= _AGAIN for form, one in seconds.items() if form in others)
