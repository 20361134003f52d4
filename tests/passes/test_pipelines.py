"""The pipeline of ``lower``, and passes of a user's own among it."""

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from lowering_support import mask_by_hand, randomise
from torch import Tensor, fx, nn

import srigl_fx as sx
from srigl_fx.errors import LoweringError, PassError
from srigl_fx.passes import Pass, PassResult
from srigl_fx.passes.pipelines import LOWERING
from srigl_fx.passes.program import Program

aten = torch.ops.aten


def network() -> nn.Module:
    return mask_by_hand(randomise(nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))), 0.4, ablated=3).eval()


class SpoilRelu(Pass[Program]):
    """Replaces a ReLU by something else: a mistake that verification must find."""

    def run(self, subject: Program) -> PassResult[Program]:
        for node in subject.module.graph.find_nodes(op="call_function", target=aten.relu.default):
            node.target = aten.neg.default
        subject.module.recompile()
        return PassResult(subject=subject, changed=True)


class Spy(Pass[Program]):
    """Changes nothing, and remembers what it saw."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def run(self, subject: Program) -> PassResult[Program]:
        self.seen += [str(node.target) for node in subject.module.graph.nodes if node.op == "call_function"]
        return PassResult(subject=subject, changed=False)


@pytest.mark.slow
@pytest.mark.parametrize("position", range(len(LOWERING) + 1))
def test_a_pass_may_stand_anywhere(position: int) -> None:
    spy, x = Spy(), torch.randn(3, 8)
    model = network()
    lowered = sx.lower(model, (x,), min_speedup=0, passes=(*LOWERING[:position], spy, *LOWERING[position:]))
    assert "aten.relu.default" in spy.seen
    assert {layer.decision for layer in lowered.report.layers} == {"condensed"}
    with torch.no_grad():
        torch.testing.assert_close(lowered(x), model(x), rtol=1e-5, atol=1e-5)


def test_each_pass_is_verified_on_demand() -> None:
    with pytest.raises(PassError, match="SpoilRelu"):
        sx.lower(network(), (torch.randn(3, 8),), min_speedup=0, verify="each pass", passes=(*LOWERING, SpoilRelu()))


@pytest.mark.parametrize(
    "options", [{"passes": (*LOWERING, Spy)}, {"passes": Spy()}, {"passes": ("RemoveDead",)}, {"verify": "each"}]
)
def test_what_is_no_pass_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(LoweringError, match=next(iter(options))):
        sx.lower(network(), (torch.randn(3, 8),), min_speedup=0, **options)


def test_the_pipelines_are_tuples() -> None:
    assert isinstance(LOWERING, tuple)
    assert len({step.name for step in LOWERING}) == len(LOWERING)


@pytest.mark.slow
def test_the_example_folds_the_scale(checkout: Path) -> None:
    example = runpy.run_path(str(checkout / "examples" / "custom_pass.py"))
    torch.manual_seed(1)
    model = sx.sparsify(randomise(example["Scaled"]()), sparsity=0.9).eval()
    x: Tensor = torch.randn(4, 256)
    lowered = sx.lower(model, (x,), min_speedup=0, verify="each pass", passes=(*LOWERING, example["FoldScale"]()))
    assert isinstance(lowered, fx.GraphModule)
    called = [node.target for node in lowered.graph.nodes if node.op == "call_function"]
    ours = torch.ops.srigl_fx.condensed_linear.default
    assert called == [ours, aten.linear.default]  # too few outputs in the head to be sparse
    with torch.no_grad():
        torch.testing.assert_close(lowered(x), model(x), rtol=1e-5, atol=1e-6)
