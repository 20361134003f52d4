"""The pipelines, as explicit tuples.

Owns the order in which the graph passes run. It must not know how a model is captured or measured.
"""

from collections.abc import Sequence

from srigl_fx.passes.arrange_samples import ArrangeSamples
from srigl_fx.passes.base import Pass
from srigl_fx.passes.calibrate import Calibrate
from srigl_fx.passes.check_rounding import CheckRounding
from srigl_fx.passes.condense import Condense
from srigl_fx.passes.feature_major import FeatureMajor
from srigl_fx.passes.fold_batch_norm import FoldBatchNorm
from srigl_fx.passes.fold_constants import FoldConstants
from srigl_fx.passes.fold_selections import FoldSelections
from srigl_fx.passes.fuse_epilogues import FuseEpilogues
from srigl_fx.passes.hand_over_bytes import HandOverBytes
from srigl_fx.passes.match import MatchWeights
from srigl_fx.passes.normalize import Normalize
from srigl_fx.passes.program import Program
from srigl_fx.passes.remove_dead import RemoveDead
from srigl_fx.passes.round_once import RoundOnce
from srigl_fx.passes.select import Select
from srigl_fx.passes.to_linear import ToLinear

LOWERING: tuple[Pass[Program], ...] = (
    Normalize(),
    FoldConstants(),
    ToLinear(),
    FoldSelections(),
    FoldBatchNorm(),
    RemoveDead(),
)
"""What ``lower`` does to a captured graph before it looks for layers."""

CONDENSING: tuple[Pass[Program], ...] = (
    MatchWeights(),
    Calibrate(),
    CheckRounding(),
    Select(),
    Condense(),
    FuseEpilogues(),
    FeatureMajor(),
    ArrangeSamples(),
    RoundOnce(),
    HandOverBytes(),
)
"""And from there on. A pass of your own goes anywhere in ``(*LOWERING, *CONDENSING)``."""


def whole(passes: Sequence[Pass[Program]]) -> tuple[Pass[Program], ...]:
    """``passes``, with :data:`CONDENSING` behind them where they do not condense.

    Example:
        >>> [step.name for step in whole((Normalize(),))][:5]
        ['Normalize', 'MatchWeights', 'Calibrate', 'CheckRounding', 'Select']
    """
    condenses = any(isinstance(step, Condense) for step in passes)
    return tuple(passes) if condenses else (*passes, *CONDENSING)
