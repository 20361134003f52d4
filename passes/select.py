"""Which form each layer takes, from its times.

Owns the rule and :class:`Select`. It must not measure: what gives the times is handed to it.
"""

from collections.abc import Callable, Mapping

from srigl_fx.passes.base import Note, Pass, PassResult
from srigl_fx.passes.program import Costs, Decision, MatchedLayer, Program, Times

NOISE = 1.05  # forms whose times differ by less than this factor count as equally fast


def decide(times: Times, min_speedup: float, sizes: Mapping[Decision, int] | None = None) -> tuple[Decision, str]:
    """The fastest form that is at least ``min_speedup`` times as fast as dense at every batch size measured.

    How fast a form is, is its smallest speedup over these batch sizes. Of forms that are equally fast within
    :data:`NOISE`, the one that stores fewest bytes is taken; against dense there is no such allowance.

    Args:
        times: Seconds a call, by batch size and form; each batch size has the same forms, "dense" among them.
        min_speedup: The smallest acceptable ratio.
        sizes: Bytes that each form stores, if that should count.

    Returns:
        The decision, and the reason in one sentence.

    Example:
        >>> decide({1: {"dense": 3e-4, "condensed": 1e-4}, 64: {"dense": 4e-4, "condensed": 8e-4}}, 1.0)
        ('dense', 'condensed is 0.50 times as fast as dense at batch 64')
        >>> decide({1: {"dense": 3e-4, "condensed": 1e-4}}, 1.0)
        ('condensed', '3.00 times as fast as dense at batch 1')
        >>> decide({1: {"dense": 3e-4, "condensed": 1.02e-4, "shrunk": 1e-4}}, 1.0, {"condensed": 6, "shrunk": 9})
        ('condensed', '2.94 times as fast as dense at batch 1')
    """

    def worst(form: Decision) -> tuple[float, int]:
        return min((measured["dense"] / measured[form], batch) for batch, measured in times.items())

    forms: list[Decision] = [form for form in next(iter(times.values())) if form != "dense"]
    speedups = {form: worst(form) for form in forms}
    fit = [form for form in forms if speedups[form][0] >= min_speedup]
    if fit:
        best = max(fit, key=lambda form: speedups[form][0])
        if sizes is not None:
            close = [form for form in fit if speedups[form][0] * NOISE >= speedups[best][0]]
            best = min(close, key=lambda form: sizes[form])
        return best, f"{speedups[best][0]:.2f} times as fast as dense at batch {speedups[best][1]}"
    return "dense", "; ".join(
        f"{form} is {speedups[form][0]:.2f} times as fast as dense at batch {speedups[form][1]}" for form in forms
    )


class Select(Pass[Program]):
    """Decide the form of every layer that has a choice.

    A form is taken if dense time / its time >= ``min_speedup`` at every batch size; of two such, the faster one.

    1. A layer without a use that can be condensed stays dense; the pass that looked for such uses has said why.
    2. With times for a layer, the measured speedups decide (:func:`decide`). "shrunk" has times only where rows are
       ablated.
    3. Without times, but with estimates and ``min_speedup`` above 0, the estimates decide in the same way, and the
       reason says so.
    4. A layer with neither times nor estimates is condensed, and so is every layer if ``min_speedup`` is 0.

    Args:
        costs: What gives the times of the program's layers, measured and estimated; by default there are none, and
            ``lower`` puts its own there.
        min_speedup: How much faster than dense a form must be; by default 0, and ``lower`` puts its own there.
    """

    only_improves = True

    def __init__(self, costs: Callable[[Program], Costs] | None = None, min_speedup: float | None = None) -> None:
        self.costs = costs
        self.min_speedup = min_speedup

    def run(self, subject: Program) -> PassResult[Program]:
        """Fill in decision, reason, times and estimates of each layer."""
        notes = []
        costs = Costs() if self.costs is None else self.costs(subject)
        for layer in subject.layers:
            if not layer.uses:  # rule 1
                continue
            layer.times = costs.measured.get(layer.weight.fqn, {})
            layer.estimates = costs.estimated.get(layer.weight.fqn, {})
            layer.decision, layer.reason = self._decide(layer)
            also = [layer.unrounded]
            if layer.others and layer.decision != "dense":
                also.append(f"also read by {', '.join(sorted(set(layer.others)))}: the dense weight stays too")
            layer.reason = "; ".join(filter(None, (layer.reason, *also)))
            if layer.reason:
                notes.append(Note(where=layer.weight.fqn, reason=layer.reason))
        return PassResult(subject=subject, changed=bool(subject.layers), notes=tuple(notes))

    def _decide(self, layer: MatchedLayer) -> tuple[Decision, str]:
        sizes, least = _sizes(layer), self.min_speedup or 0.0
        if layer.times:  # rule 2
            return decide(layer.times, least, sizes)
        if layer.estimates and least > 0:  # rule 3
            decision, reason = decide(layer.estimates, least, sizes)
            return decision, f"estimated: {reason}"
        return "condensed", ""  # rule 4


def _sizes(layer: MatchedLayer) -> dict[Decision, int]:
    """About the bytes that the forms store."""
    masks = [use.mask for use in layer.uses]
    return {
        "condensed": sum((2 + layer.value_dtype.itemsize) * int(mask.sum()) for mask in masks),
        "shrunk": sum(4 * int(mask.any(1).sum()) * mask.shape[1] for mask in masks),
    }
