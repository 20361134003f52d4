"""From a trained model to a sparse one without training: ``prune``.

Owns the verb, discover -> assign budgets -> draw masks -> fit masks -> insert masks, and its report. It must not know
how a layer is fitted.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from srigl_fx.compatibility import noted
from srigl_fx.errors import SparsifyError
from srigl_fx.masks.records import Structure
from srigl_fx.passes.assign_budgets import Distribution
from srigl_fx.passes.base import run
from srigl_fx.passes.discover import Discover
from srigl_fx.passes.draft import Draft
from srigl_fx.passes.draft import WeightFit as WeightFit
from srigl_fx.passes.draw_masks import DrawMasks
from srigl_fx.passes.example_inputs import several_inputs
from srigl_fx.passes.fit_masks import FitMasks
from srigl_fx.passes.insert_masks import InsertMasks
from srigl_fx.reports.text_tables import format_table
from srigl_fx.sparsification import budgets_asked, request
from srigl_fx.specs import LayerSpec, RuleKey

MEMORY = 1 << 30  # bytes
EXCHANGES = 4

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class PruningReport:
    """How near each pruned layer is to the dense one; ``str()`` is a table.

    Attributes:
        layers: One for each sparse weight, in registration order.
        warn_above: The error from which on a layer is a warning.
    """

    layers: tuple[WeightFit, ...]
    warn_above: float

    @property
    def warnings(self) -> tuple[str, ...]:
        """The layers of which too little is left, and those that were not fitted, in words."""
        lost = [
            f"{layer.name} loses {layer.error:.1%} of its output, more than {self.warn_above:.0%}: give it a lower "
            "sparsity, or the rule None"
            for layer in self.layers
            if layer.error is not None and layer.error > self.warn_above
        ]
        return (*lost, *(f"{layer.name} is not fitted: {layer.reason}" for layer in self.layers if layer.reason))

    def __str__(self) -> str:
        rows = [
            (layer.name, layer.samples or "", *map(_percent, _errors(layer)), layer.reason or self._mark(layer))
            for layer in self.layers
        ]
        headers = ("weight", "samples", "by magnitude", "by input", "fitted", "")
        table = format_table(headers, rows, right=(1, 2, 3, 4))
        return f"Share of each layer's output that is lost\n\n{table}"

    def _mark(self, layer: WeightFit) -> str:
        return f"above {self.warn_above:.0%}" if layer.error is not None and layer.error > self.warn_above else ""


def _errors(layer: WeightFit) -> tuple[float | None, ...]:
    return layer.magnitude_error, layer.mask_error, layer.error


def _percent(error: float | None) -> str:
    return "" if error is None else f"{error:.1%}"


@noted
def prune(
    model: nn.Module,
    calibration: Iterable[Any],
    *,
    sparsity: float = 0.8,
    distribution: Distribution = "uniform",
    rules: Mapping[RuleKey, "float | LayerSpec | None"] | None = None,
    filter_fn: Callable[[str, nn.Module], bool] | None = None,
    structure: Structure = "constant_fan_in",
    group_size: int = 1,
    block_width: int = 1,
    example_inputs: Any = None,
    strict: bool = False,
    positions: Callable[..., Tensor] | None = None,
    sequential: bool = False,
    exchanges: int = EXCHANGES,
    memory: int = MEMORY,
    warn_above: float = 0.5,
    progress: Callable[[int, int], object] | None = None,
) -> PruningReport:
    """Make a trained ``model`` sparse, in place and without training, so that each layer gives nearly what it gave.

    Each layer keeps the weights that are largest times the spread of their inputs (Wanda), takes the values of least
    squares for the inputs that it keeps, and exchanges kept inputs for others as long as that brings it nearer. Inputs
    are seen in runs of the model, of which only sums are kept. Afterwards the model is like one that
    :func:`srigl_fx.sparsify` made: a trainer goes on with it, and :func:`srigl_fx.lower` and
    :func:`srigl_fx.export_onnx` take it.

    Args:
        model: Any module with trained weights, without masks. It is run in evaluation mode.
        calibration: An iterable of inputs of the model, held in memory: tensors, tuples or lists of arguments, or
            (args, kwargs), with a few times as many tokens or places in all as a layer has inputs. On the
            model's device.
        sparsity: As for :func:`srigl_fx.sparsify`, like the next seven.
        distribution: Here ``"uniform"`` is the default: pretrained layers are about as wide as each other.
        rules: Of single layers.
        filter_fn: Which modules to look at.
        structure: Of the masks.
        group_size: Neighbouring neurons that share their inputs.
        block_width: Neighbouring inputs that are kept together.
        example_inputs: They show how weights are used where the model's code does not.
        strict: Make it an error where a weight cannot be sparse.
        positions: Which positions of an input count, where some are padding: a function of what the model is called
            with, that gives a bool tensor of the leading sizes of layers' inputs, such as (samples, tokens). A product
            with as many rows leaves the others out.
        sequential: Fit each layer on what the layers before it give once they are sparse, in runs of its own: as many
            as there are layers with different inputs, of which each ends at its layer.
        exchanges: Rounds in which kept inputs are exchanged for better ones; 0 keeps the first mask.
        memory: Bytes that sums of inputs may take at a time, eight for each pair of inputs of a layer; layers that
            do not fit are left to a further run. One layer always fits. Without effect if ``sequential``.
        warn_above: The report warns of layers that lose a larger share of their output.
        progress: Called with how much is done, and of how much: a few times a layer.

    Returns:
        What was lost in each layer. Layers of kinds whose inputs cannot be seen (gates of recurrent layers, stacks of
        experts, transposed convolutions, weights that are transformed before use) keep their largest weights as they
        are; the report names them.

    Raises:
        SparsifyError: ``torch.inference_mode()`` is on, there is no calibration input, the model does not run on one,
            one makes NaN or infinite numbers, a layer that is to be sparse never runs, or an argument is out of range;
            or as for :func:`srigl_fx.sparsify`.
        RuleError: A rule is malformed, or matches no weight.

    In each case the model is as it was.

    Source: Wanda (Sun et al., ICLR 2024) for the first mask; SparseGPT (Frantar & Alistarh, ICML 2023) and Optimal
    Brain Surgeon (Hassibi & Stork, 1993) for fits to inputs.

    Example:
        >>> import torch
        >>> import srigl_fx as sx
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        >>> report = sx.prune(model, [torch.randn(200, 64)], sparsity=0.75)
        >>> model[0]
        SparseLinear(in_features=64, out_features=32, bias=True, fan_in=16/64, active=32/32)
        >>> [layer.error < layer.magnitude_error for layer in report.layers], report.warnings
        ([True, True], ())
    """
    from srigl_fx.train import distributed

    if torch.is_inference_mode_enabled():
        raise SparsifyError("prune cannot run under torch.inference_mode(); call it outside, or under torch.no_grad()")
    assign = budgets_asked(
        "prune",
        model,
        sparsity=sparsity,
        distribution=distribution,
        rules=rules,
        filter_fn=filter_fn,
        structure=structure,
        group_size=group_size,
        block_width=block_width,
        strict=strict,
    )
    _check(positions, exchanges, memory, warn_above, progress)
    fit = FitMasks(
        batches=several_inputs(calibration, "calibration", SparsifyError),
        sequential=bool(sequential),
        exchanges=exchanges,
        positions=positions,
        memory=memory,
        progress=progress,
    )
    draw = DrawMasks(mask_init="magnitude", weight_init="keep", seed=0)
    draft = run((Discover(example_inputs), assign, draw, fit), Draft(model)).subject
    draft.asked = request(assign, mask_init="magnitude", weight_init="keep", seed=0)
    run((InsertMasks(),), draft)
    distributed.ignore_masks(model)
    report = PruningReport(tuple(draft.fits.values()), warn_above)
    if report.warnings:
        _LOG.warning("prune: %s", "; ".join(report.warnings))
    return report


def _check(positions: object, exchanges: object, memory: object, warn_above: object, progress: object) -> None:
    for name, value in (("positions", positions), ("progress", progress)):
        if value is not None and not callable(value):
            raise SparsifyError(f"{name} must be a function, got {value!r:.80}")
    for name, value in (("exchanges", exchanges), ("memory", memory)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise SparsifyError(f"{name} must be a whole number of at least 0, got {value!r:.80}")
    if isinstance(warn_above, bool) or not isinstance(warn_above, int | float) or not warn_above >= 0:
        raise SparsifyError(f"warn_above must be a share of at least 0, such as 0.5, got {warn_above!r:.80}")
