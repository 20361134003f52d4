"""The pipelines, as explicit tuples.

Owns the order in which the graph passes run before layers are matched and condensed. It must not know how a model is
captured or measured.
"""

from srigl_fx.passes.base import Pass
from srigl_fx.passes.fold_batch_norm import FoldBatchNorm
from srigl_fx.passes.fold_constants import FoldConstants
from srigl_fx.passes.normalize import Normalize
from srigl_fx.passes.program import Program
from srigl_fx.passes.remove_dead import RemoveDead
from srigl_fx.passes.to_linear import ToLinear

LOWERING: tuple[Pass[Program], ...] = (Normalize(), FoldConstants(), ToLinear(), FoldBatchNorm(), RemoveDead())
"""What ``lower`` does to a captured graph before it looks for layers: a pass of your own goes anywhere among these."""
