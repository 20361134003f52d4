"""Which form each layer takes, from measured times.

Owns the rule and :class:`Select`. It must not measure: the times are handed to it.
"""

from collections.abc import Mapping

from srigl_fx.passes.base import Note, Pass, PassResult
from srigl_fx.passes.program import Decision, Program, Times


def decide(times: Times, min_speedup: float) -> tuple[Decision, str]:
    """The fastest form that is at least ``min_speedup`` times as fast as dense at every batch size measured.

    Args:
        times: Seconds a call, by batch size and form; each batch size has the same forms, "dense" among them.
        min_speedup: The smallest acceptable ratio.

    Returns:
        The decision, and the reason in one sentence.

    Example:
        >>> decide({1: {"dense": 3e-4, "condensed": 1e-4}, 64: {"dense": 4e-4, "condensed": 8e-4}}, 1.0)
        ('dense', 'condensed is 0.50 times as fast as dense at batch 64')
        >>> decide({1: {"dense": 3e-4, "condensed": 1e-4}}, 1.0)
        ('condensed', '3.00 times as fast as dense at batch 1')
    """

    def worst(form: Decision) -> tuple[float, int]:
        return min((measured["dense"] / measured[form], batch) for batch, measured in times.items())

    forms: list[Decision] = [form for form in next(iter(times.values())) if form != "dense"]
    speedups = {form: worst(form) for form in forms}
    fit = [form for form in forms if speedups[form][0] >= min_speedup]
    if fit:
        best = max(fit, key=lambda form: speedups[form][0])
        return best, f"{speedups[best][0]:.2f} times as fast as dense at batch {speedups[best][1]}"
    return "dense", "; ".join(
        f"{form} is {speedups[form][0]:.2f} times as fast as dense at batch {speedups[form][1]}" for form in forms
    )


class Select(Pass[Program]):
    """Decide the form of every layer that has a choice.

    1. A layer without uses that can be condensed stays dense; its reason is known already.
    2. Without times for a layer, it is condensed.
    3. Else the measured speedups decide (:func:`decide`).

    Args:
        times: Measured times by weight name.
        min_speedup: How much faster than dense a form must be.
    """

    def __init__(self, times: Mapping[str, Times], min_speedup: float) -> None:
        self._times = times
        self._min_speedup = min_speedup

    def run(self, subject: Program) -> PassResult[Program]:
        """Fill in decision, reason and times of each layer."""
        notes = []
        for layer in subject.layers:
            if not layer.uses:
                continue
            times = self._times.get(layer.weight.fqn)
            layer.times = times or {}
            layer.decision, layer.reason = decide(times, self._min_speedup) if times else ("condensed", "")
            if layer.others and layer.decision != "dense":
                also = f"also read by {', '.join(sorted(set(layer.others)))}: the dense weight stays too"
                layer.reason = f"{layer.reason}; {also}" if layer.reason else also
            if layer.reason:
                notes.append(Note(where=layer.weight.fqn, reason=layer.reason))
        return PassResult(subject=subject, changed=bool(subject.layers), notes=tuple(notes))
