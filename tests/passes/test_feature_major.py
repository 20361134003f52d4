"""Which tensors between condensed layers are stored feature-major, and that values do not depend on it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lowering_support import mask_by_hand, randomise
from torch import Tensor, fx, nn

import srigl_fx as sx
from srigl_fx.lowering.lowered import LoweredModule
from srigl_fx.passes.base import run
from srigl_fx.passes.capture import capture
from srigl_fx.passes.condense import Condense
from srigl_fx.passes.condensed_nodes import LINEAR, set_arguments
from srigl_fx.passes.feature_major import FeatureMajor, settle_layouts
from srigl_fx.passes.fuse_epilogues import FuseEpilogues
from srigl_fx.passes.match import MatchWeights
from srigl_fx.passes.pipelines import LOWERING
from srigl_fx.passes.program import Program, arguments
from srigl_fx.passes.select import Select

Flags = list[tuple[bool, bool]]


class Chain(nn.Module):
    """Layers a to d, 12 -> 12 each, composed by ``forward``."""

    def __init__(self, compose: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(12, 12) for _ in range(4))
        self.compose = compose

    def forward(self, x: Tensor) -> Any:
        return self.compose(self, x)


def flags(module: fx.GraphModule) -> Flags:
    """(x is feature-major, y is feature-major) of each condensed linear layer, in order."""
    given = [arguments(node) for node in module.graph.find_nodes(op="call_function", target=LINEAR)]
    return [(one["x_feature_major"], one["y_feature_major"]) for one in given]


def lowered(compose: Callable[[Any, Tensor], Any], shape: tuple[int, ...] = (16, 12)) -> tuple[nn.Module, Any]:
    model = mask_by_hand(randomise(Chain(compose)), 0.4).eval()
    return model, sx.lower(model, (torch.randn(shape),), min_speedup=0, verify="each pass")


ROWS, LAST, BOTH, FIRST = (False, False), (True, False), (True, True), (False, True)

CASES: dict[str, tuple[Callable[[Any, Tensor], Any], Flags]] = {
    "neighbours": (lambda m, x: m.c(m.b(m.a(x))), [FIRST, BOTH, LAST]),
    "fused activations": (lambda m, x: m.c(F.gelu(m.b(F.relu(m.a(x))))), [FIRST, BOTH, LAST]),
    "other activations": (lambda m, x: m.b(torch.tanh(F.leaky_relu(m.a(x)) * 2 + 1)), [FIRST, LAST]),
    "any pointwise operator": (lambda m, x: m.b(torch.erf(m.a(x)).atan()), [FIRST, LAST]),
    "two readers": (lambda m, x: (lambda y: m.b(y) + m.c(y))(m.a(x)), [FIRST, LAST, LAST]),
    "gated": (lambda m, x: m.c(torch.sigmoid(m.a(x)) * m.b(x)), [FIRST, FIRST, LAST]),
    "gated by rows": (lambda m, x: m.c(m.a(x) * x), [ROWS, ROWS]),
    "gated by one in rows": (lambda m, x: (lambda y: (m.c(m.a(x) * y), y))(m.b(x)), [ROWS, ROWS, ROWS]),
    "broadcast": (lambda m, x: m.c(m.a(x) * m.b(x[:1])), [ROWS, ROWS, ROWS]),
    "an output": (lambda m, x: (lambda y: (m.b(y), y))(m.a(x)), [ROWS, ROWS]),
    "another operator": (lambda m, x: m.b(F.layer_norm(m.a(x), (12,))), [ROWS, ROWS]),
    "another reader": (lambda m, x: (lambda y: m.b(y) + y.sum())(m.a(x)), [ROWS, ROWS]),
    "a residual": (lambda m, x: (lambda y: m.b(y) + y)(m.a(x)), [ROWS, ROWS]),
    "a residual before a layer": (lambda m, x: (lambda y: m.c(m.b(y) + y))(m.a(x)), [FIRST, BOTH, LAST]),
    "a residual in rows before a layer": (lambda m, x: m.c(m.b(m.a(x)) + x), [FIRST, LAST, ROWS]),
    "inside a residual": (lambda m, x: x + m.b(m.a(x)), [FIRST, LAST]),
    "one branch": (lambda m, x: (lambda y: m.d(m.c(m.b(y))) + y)(m.a(x)), [ROWS, FIRST, BOTH, LAST]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_where_every_reader_agrees(name: str) -> None:
    compose, expected = CASES[name]
    model, module = lowered(compose)
    assert flags(module) == expected
    again = LoweredModule.from_bytes(module._bytes())
    assert flags(again) == expected
    for batch in (1, 3, 17):
        x = torch.randn(batch, 12)
        with torch.no_grad():
            torch.testing.assert_close(module(x), model(x), rtol=0, atol=1e-5)
            torch.testing.assert_close(again(x), module(x), rtol=0, atol=0)


def neighbours(m: Any, x: Tensor) -> Tensor:
    y: Tensor = m.b(F.relu(m.a(x)))
    return y


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "worth"),
    [
        *(((1, 12), False), ((15, 12), False), ((16, 12), True), ((2, 7, 12), False), ((2, 8, 12), True)),
        *(((1, 15, 12), False), ((1, 16, 12), True), ((12,), False)),
    ],
)
def test_from_sixteen_samples_on(shape: tuple[int, ...], worth: bool) -> None:
    _, module = lowered(neighbours, shape)
    assert flags(module) == ([FIRST, LAST] if worth else [ROWS, ROWS])


@pytest.mark.slow
def test_the_batch_sizes_to_serve_decide_before_the_example() -> None:
    model = mask_by_hand(randomise(Chain(neighbours)), 0.4).eval()
    x = torch.randn(2, 12)
    assert flags(sx.lower(model, (x,), min_speedup=0, batch_sizes=[64, 256])) == [FIRST, LAST]  # type: ignore[arg-type]
    assert flags(sx.lower(model, (x,), min_speedup=0, batch_sizes=[64, 1])) == [ROWS, ROWS]  # type: ignore[arg-type]


@pytest.mark.slow
def test_memory_is_feature_major_between_the_layers_only() -> None:
    _, module = lowered(neighbours, (4, 5, 12))
    seen: dict[str, Tensor] = {}

    class Keep(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n.target is LINEAR:
                seen[n.name] = value
            return value

    with torch.no_grad():
        Keep(module).run(torch.randn(4, 5, 12), enable_io_processing=False)
    between, last = seen.values()
    assert between.movedim(-1, 0).is_contiguous()
    assert last.is_contiguous()


def program_of(compose: Callable[[Any, Tensor], Any]) -> Program:
    model = mask_by_hand(randomise(Chain(compose)), 0.4).eval()
    program = capture(model, (torch.randn(16, 12),))
    return run((*LOWERING, MatchWeights(), Select(), Condense(), FuseEpilogues()), program).subject


def test_recorded_strides_are_those_of_the_values() -> None:
    program = program_of(lambda m, x: m.c(torch.sigmoid(m.a(x)) * m.b(x)))
    program = run((FeatureMajor(),), program).subject
    for node in program.module.graph.nodes:
        if node.target is torch.ops.aten.mul.Tensor or (node.target is LINEAR and arguments(node)["y_feature_major"]):
            assert str(node.meta["val"].stride()) == str((1, node.meta["val"].shape[0]))


def test_flags_that_the_readers_do_not_share_are_taken_back() -> None:
    program = program_of(lambda m, x: m.b(F.layer_norm(m.a(x), (12,))))
    linears = program.module.graph.find_nodes(op="call_function", target=LINEAR)
    for node in linears:
        set_arguments(node, x_feature_major=True, y_feature_major=True)
    assert settle_layouts(program.module.graph, linears)
    assert flags(program.module) == [ROWS, ROWS]
