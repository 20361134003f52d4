"""Models with dead channels, and programs without them: what the tests of removal start from."""

from typing import Any

import torch
from lowering_support import mask_by_hand, randomise
from torch import nn
from torch.utils import _pytree as pytree

from srigl_fx.masks.records import sparse_weights
from srigl_fx.passes.base import PassResult, run
from srigl_fx.passes.capture import capture
from srigl_fx.passes.model_runs import run_model
from srigl_fx.passes.pipelines import LOWERING
from srigl_fx.passes.program import Program


def masked(model: nn.Module, dead: dict[str, list[int]], *, columns: dict[str, list[int]] | None = None) -> nn.Module:
    """A randomised model with full masks but for dead rows (of the matrix view) and columns (of dimension 1)."""
    mask_by_hand(randomise(model), 1.0, structure="unstructured")
    for handle in sparse_weights(model):
        site = handle.record.site
        matrix = site.to_matrix(handle.mask).clone()
        matrix[dead.get(handle.fqn, [])] = False
        mask = site.from_matrix(matrix).clone()
        mask[:, (columns or {}).get(handle.fqn, [])] = False
        with torch.no_grad():
            handle.mask.copy_(mask)
            handle.weight.mul_(mask)
    return model.eval()


def removed(model: nn.Module, inputs: Any) -> PassResult[Program]:
    """The program of a model after removal."""
    return run(LOWERING, capture(model.eval(), inputs))


def relative_error(model: nn.Module, program: Program, batch: int | None = None) -> float:
    """The largest difference of an output over the largest output."""
    args, kwargs = program.inputs(batch)
    expected = pytree.tree_leaves(run_model(model, args, kwargs))
    got = pytree.tree_leaves(run_model(program.module, args, kwargs))
    worst = 0.0
    for one, other in zip(expected, got, strict=True):
        if isinstance(one, torch.Tensor) and one.numel():
            assert one.shape == other.shape
            scale = max(float(one.double().abs().max()), 1e-30)
            worst = max(worst, float((one.double() - other.double()).abs().max()) / scale)
    return worst


def shapes(program: Program, operator: str) -> list[tuple[int, ...]]:
    """The shapes of the weights of all nodes of an operator, in order."""
    found = []
    for node in program.module.graph.nodes:
        if operator in str(node.target) and node.op == "call_function":
            weight = node.args[2 if operator == "addmm" else 1]
            found.append(tuple(weight.meta["val"].shape))
    return found
