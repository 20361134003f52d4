"""The scales that inputs of layers are rounded with, from what the layers are handed.

Owns :class:`Calibrate` and its rules. It must not know how a layer is rounded, nor whether that is good enough.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from srigl_fx.passes.base import Note, Pass, PassResult
from srigl_fx.passes.example_inputs import Inputs
from srigl_fx.passes.layer_runs import run_uses
from srigl_fx.passes.program import Program, Use
from srigl_fx.runtime.quantisation import SMALLEST, given_scale


class Calibrate(Pass[Program]):
    """Give layers of int8 one scale for all samples of their input, from runs on calibration inputs.

    1. The input of each use of a layer that is to be stored in int8 gets the scale with which the largest magnitude
       that was seen in it is the largest that rounding knows, and the offset of numbers with a sign if anything
       negative was seen: what :func:`srigl_fx.runtime.quantisation.given_scale` says of all runs together.
    2. A layer that was handed a number that is not finite, or nothing of 2**-100 or more, or that no run has reached,
       finds its scales at each call, and a note says so: all of its uses do.

    Args:
        batches: The inputs, of the form that the model takes; where there are none, the pass does nothing.
    """

    def __init__(self, batches: Sequence[Inputs] = ()) -> None:
        self.batches = tuple(batches)

    def run(self, subject: Program) -> PassResult[Program]:
        """Fill in the scale of each use."""
        layers = [layer for layer in subject.layers if layer.value_dtype is torch.int8 and layer.uses]
        found: dict[fx.Node, _Seen] = {use.node: _Seen() for layer in layers for use in layer.uses}

        def seen(use: Use, x: Tensor, y: Tensor) -> None:
            if use.node in found and x.numel():
                found[use.node].look_at(x)

        for inputs in self.batches:
            run_uses(subject, seen, inputs=inputs)
        notes = []
        for layer in layers if self.batches else ():
            problems = [problem for use in layer.uses if (problem := found[use.node].problem)]
            if problems:
                reason = f"scales are found at each call: {problems[0]}"
                notes.append(Note(where=layer.weight.fqn, reason=reason))
                continue
            given = [given_scale(found[use.node].largest, found[use.node].negative) for use in layer.uses]
            layer.uses = [
                replace(use, x_scale=scale, x_offset=offset)
                for use, (scale, offset) in zip(layer.uses, given, strict=True)
            ]
        return PassResult(subject=subject, changed=False, notes=tuple(notes))


@dataclass
class _Seen:
    """What was seen of one input."""

    largest: float = 0.0
    negative: bool = False
    finite: bool = True

    def look_at(self, x: Tensor) -> None:
        least, most = (float(number) for number in x.aminmax())
        self.finite &= bool(x.isfinite().all())
        self.largest = max(self.largest, -least, most)
        self.negative |= least < 0

    @property
    def problem(self) -> str:
        """Why there is no scale; "" where there is one."""
        if not self.finite:
            return "a calibration input makes a number of the layer's input that is not finite"
        return "" if self.largest >= SMALLEST else "the calibration inputs leave the layer's input zero"
