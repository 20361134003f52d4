"""Sparse training, lowering and ONNX export for PyTorch.

Owns the public names, and loads each on first use: importing this package does not import numba, onnx or onnxruntime.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from srigl_fx.compatibility import check_torch

if TYPE_CHECKING:
    from srigl_fx import masks as masks
    from srigl_fx import onnx_tools as onnx_tools
    from srigl_fx import passes as passes
    from srigl_fx import runtime as runtime
    from srigl_fx import train as train
    from srigl_fx.adoption import adopt as adopt
    from srigl_fx.distillation import distil as distil
    from srigl_fx.distillation_loss import DistillationLoss as DistillationLoss
    from srigl_fx.errors import SriglError as SriglError
    from srigl_fx.lowering.loading import load_lowered as load_lowered
    from srigl_fx.lowering.pipeline import lower as lower
    from srigl_fx.masks.invariants import verify as verify
    from srigl_fx.onnx_condensing.pipeline import condense_onnx as condense_onnx
    from srigl_fx.onnx_export.pipeline import export_onnx as export_onnx
    from srigl_fx.pruning import prune as prune
    from srigl_fx.recipes import Recipe as Recipe
    from srigl_fx.recipes import recipe as recipe
    from srigl_fx.sparsification import finalize as finalize
    from srigl_fx.sparsification import sparsify as sparsify
    from srigl_fx.specs import LayerSpec as LayerSpec
    from srigl_fx.summaries import summary as summary
    from srigl_fx.train.gmp import GMP as GMP
    from srigl_fx.train.permutations import LearnedPermutations as LearnedPermutations
    from srigl_fx.train.rigl import RigL as RigL
    from srigl_fx.train.set import SET as SET
    from srigl_fx.train.snfs import SNFS as SNFS
    from srigl_fx.train.srigl import SRigL as SRigL
    from srigl_fx.train.static import Static as Static

__version__ = "0.2.0"

check_torch()

_NAMES = {
    "sparsify": "srigl_fx.sparsification",
    "finalize": "srigl_fx.sparsification",
    "adopt": "srigl_fx.adoption",
    "prune": "srigl_fx.pruning",
    "distil": "srigl_fx.distillation",
    "DistillationLoss": "srigl_fx.distillation_loss",
    "SRigL": "srigl_fx.train.srigl",
    "RigL": "srigl_fx.train.rigl",
    "SET": "srigl_fx.train.set",
    "SNFS": "srigl_fx.train.snfs",
    "Static": "srigl_fx.train.static",
    "GMP": "srigl_fx.train.gmp",
    "LearnedPermutations": "srigl_fx.train.permutations",
    "summary": "srigl_fx.summaries",
    "verify": "srigl_fx.masks.invariants",
    "lower": "srigl_fx.lowering.pipeline",
    "load_lowered": "srigl_fx.lowering.loading",
    "export_onnx": "srigl_fx.onnx_export.pipeline",
    "condense_onnx": "srigl_fx.onnx_condensing.pipeline",
    "LayerSpec": "srigl_fx.specs",
    "Recipe": "srigl_fx.recipes",
    "recipe": "srigl_fx.recipes",
    "SriglError": "srigl_fx.errors",
}
_MODULES = ("masks", "train", "passes", "runtime", "onnx_tools", "errors")

__all__ = [  # noqa: RUF022 - in the order a user meets them
    "sparsify",
    "adopt",
    "prune",
    "distil",
    "DistillationLoss",
    "SRigL",
    "RigL",
    "SET",
    "SNFS",
    "Static",
    "GMP",
    "LearnedPermutations",
    "summary",
    "verify",
    "finalize",
    "lower",
    "load_lowered",
    "export_onnx",
    "condense_onnx",
    "LayerSpec",
    "Recipe",
    "recipe",
    "SriglError",
    "masks",
    "passes",
    "runtime",
]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        value = getattr(import_module(_NAMES[name]), name)
    elif name in _MODULES:
        value = import_module(f"srigl_fx.{name}")
    else:
        raise AttributeError(f"module 'srigl_fx' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
