"""Which layers can be rounded to eight bits without harm.

Owns :class:`CheckRounding` and its rule. It must not know how a layer is rounded, nor any kernel: it runs the operator
that the layer would become.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from srigl_fx.comparison import LEAST_LAYER_SNR, signal_to_noise
from srigl_fx.errors import FormatError
from srigl_fx.passes.base import Note, Pass, PassResult
from srigl_fx.passes.condense import variants
from srigl_fx.passes.layer_runs import run_uses
from srigl_fx.passes.program import MatchedLayer, Program, Use


class CheckRounding(Pass[Program]):
    """Leave in float32 what eight bits would change too much.

    Each layer that is to be stored in int8 is computed in both ways for what the graph hands it on the example inputs,
    all in float32 before it. With y what it gives in float32, and z in int8, bias included, its signal-to-noise ratio
    is ``10 log10(sum of y**2 / sum of (y - z)**2)`` in dB, of all samples together.

    0. A layer whose inputs have given scales is computed with these and with scales found at each call. Where the
       ratio with given ones is below ``least``, the layer loses them, and a note says so.
    1. A layer whose ratio is at least ``least`` keeps its ``value_dtype``, and the report has the ratio. Of a weight
       that is used several times, the smallest counts.
    2. Any other gets ``torch.float32``, and its reason says so: what is decided for it later is decided in float32.
    3. So does a layer that has no form in int8: one with a weight that is not finite, with a fan-in whose sums are
       no int32, or with filters of more inputs than the kernels count.

    Args:
        least: The smallest ratio, in dB; ``-math.inf`` rounds every layer that has the form.
    """

    def __init__(self, least: float = LEAST_LAYER_SNR) -> None:
        self.least = least

    def run(self, subject: Program) -> PassResult[Program]:
        """Fill in the ratio of each layer of int8, and take it back where that is too small."""
        layers = {use.node: layer for layer in subject.layers if layer.value_dtype is torch.int8 for use in layer.uses}
        if not layers:
            return PassResult(subject=subject, changed=False)

        ratios: dict[tuple[str, bool], float] = {}  # the smallest of each layer, with given scales and without

        def seen(use: Use, x: Tensor, y: Tensor) -> None:
            layer = layers.get(use.node)
            if layer is None or layer.unrounded:
                return
            try:
                for form in {use, _finding_scales(use)}:
                    ((_, rounded),) = variants(form, ["condensed"], torch.int8)
                    key = layer.weight.fqn, form.x_scale is not None
                    ratios[key] = min(ratios.get(key, math.inf), signal_to_noise(y, rounded(x)))
            except FormatError as error:
                layer.unrounded = f"stored in float32: {error}"  # rule 3

        run_uses(subject, seen)
        notes = []
        for layer in {layer.weight.fqn: layer for layer in layers.values()}.values():
            given = ratios.get((layer.weight.fqn, True))
            if given is not None and not given >= self.least:
                layer.uses = [_finding_scales(use) for use in layer.uses]
                reason = (
                    f"scales are found at each call: with given ones its signal-to-noise ratio is {given:.1f} dB, and "
                    f"at least {self.least:g} dB are asked for"
                )
                notes.append(Note(where=layer.weight.fqn, reason=reason))
            if not layer.unrounded:
                layer.snr = ratios.get((layer.weight.fqn, layer.calibrated))
            self._settle(layer)
        notes += [Note(where=layer.weight.fqn, reason=layer.unrounded) for layer in subject.layers if layer.unrounded]
        return PassResult(subject=subject, changed=False, notes=tuple(notes))

    def _settle(self, layer: MatchedLayer) -> None:
        if not layer.unrounded and layer.snr is not None and not layer.snr >= self.least:
            layer.unrounded = (
                f"stored in float32: with int8 its signal-to-noise ratio is {layer.snr:.1f} dB, and at least "
                f"{self.least:g} dB are asked for"
            )
        if layer.unrounded:
            layer.value_dtype = torch.float32


def _finding_scales(use: Use) -> Use:
    return use if use.x_scale is None else replace(use, x_scale=None, x_offset=0)
