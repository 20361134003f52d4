"""What condensed operators take in of what follows them, and what they leave."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import timm.models.vision_transformer
import torch
import torch.nn.functional as F
from lowering_support import mask_by_hand, operands, random_condensed, randomise
from torch import Tensor, fx, nn

import srigl_fx as sx
from srigl_fx.lowering.lowered import LoweredModule
from srigl_fx.passes.base import run
from srigl_fx.passes.condensed_nodes import LINEAR, condensed_nodes
from srigl_fx.passes.fuse_epilogues import FuseEpilogues
from srigl_fx.passes.program import Program, arguments
from srigl_fx.runtime import activations

aten = torch.ops.aten
Epilogue = tuple[bool, str]  # whether it adds a residual, and its activation
Build = Callable[[fx.Graph, Callable[[fx.Node], fx.Node], fx.Node], Any]


def hand_made(build: Build, batch: int = 3) -> Program:
    """A graph on x (batch, 8): ``build(graph, layer, x)`` gives its outputs; each layer is a condensed 8 -> 8."""
    root, graph = nn.Module(), fx.Graph()
    x = graph.placeholder("x")

    def layer(source: fx.Node) -> fx.Node:
        count = sum(1 for _ in condensed_nodes(graph))
        names = [f"layer{count}_{part}" for part in ("values", "indices", "active", "bias")]
        for name, tensor in zip(names, operands(random_condensed(8, 8, 3, 1, seed=count)), strict=True):
            root.register_buffer(name, tensor.clone())
        return graph.call_function(LINEAR, (source, *map(graph.get_attr, names), 8))

    graph.output(build(graph, layer, x))
    module = fx.GraphModule(root, graph)
    inputs = (torch.randn(batch, 8, generator=torch.Generator().manual_seed(batch)),)
    Values(module).run(*(value.clone() for value in inputs))
    return Program(module=module, model=module, args=inputs, kwargs={}, how="by hand")


class Values(fx.Interpreter):
    """Keeps each node's value, as a capture does."""

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            n.meta["val"] = value.clone()
        return value


def epilogues(module: fx.GraphModule) -> list[Epilogue]:
    """The epilogue of each condensed operator, in the graph's order."""
    given = [arguments(node) for node in condensed_nodes(module.graph)]
    return [(one["residual"] is not None, one["activation"]) for one in given]


def fused(before: Program) -> tuple[Program, list[Epilogue], list[str]]:
    """The program after the pass, which must not change what the graph computes, its epilogues and the notes."""
    expected = before.module(before.args[0].clone())
    result = run((FuseEpilogues(),), before)
    program = result.subject
    got = program.module(program.args[0].clone())
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    values = [node.meta["val"] for node in condensed_nodes(program.module.graph)]
    Values(program.module).run(program.args[0].clone())
    for node, value in zip(condensed_nodes(program.module.graph), values, strict=True):
        torch.testing.assert_close(node.meta["val"], value, rtol=0, atol=1e-6)
    assert not run((FuseEpilogues(),), program).changed
    return program, epilogues(program.module), [note.reason for note in result.notes]


def limiting(low: float, high: float) -> str:
    """The activation that limits its input so; "" if the table has none, so that nothing is fused."""
    return next((row.name for row in activations.ACTIVATIONS if row.limits == (low, high)), "")


ACTIVATIONS: list[tuple[Any, tuple[Any, ...], dict[str, Any], str]] = [
    *(
        (getattr(aten, row.aten).default, (), dict(row.settings), row.name)
        for row in activations.ACTIVATIONS
        if row.aten
    ),
    (aten.relu_.default, (), {}, "relu"),
    (aten.clamp_min.default, (0,), {}, "relu"),
    (aten.clamp.default, (0,), {}, "relu"),
    (aten.clamp.default, (), {"min": 0.0}, "relu"),
    (aten.hardtanh.default, (0.0, 6.0), {}, "relu6"),
    (aten.hardtanh_.default, (0, 6), {}, "relu6"),
    (aten.clamp.default, (0, 6), {}, "relu6"),
    (aten.clip.default, (0.0,), {"max": 6}, "relu6"),
    (aten.gelu.default, (), {}, "gelu"),
    (aten.silu_.default, (), {}, "silu"),
    # others stay, unless the table has a row for them
    (aten.hardtanh.default, (), {}, limiting(-1, 1)),
    (aten.clamp.default, (0, 5), {}, limiting(0, 5)),
    (aten.clamp.default, (None, 6), {}, limiting(-math.inf, 6)),
    (aten.clamp_min.default, (0.5,), {}, limiting(0.5, math.inf)),
    # and these whatever rows it has: nobody takes just these settings
    (aten.hardtanh.default, (-0.3, 0.7), {}, ""),
    (aten.softplus.default, (1.3,), {}, ""),
    (aten.leaky_relu.default, (0.123,), {}, ""),
]


@pytest.mark.parametrize(("operator", "args", "kwargs", "name"), ACTIVATIONS)
@pytest.mark.parametrize("batch", [1, 3, 17])
def test_activations(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str, batch: int) -> None:
    program = hand_made(lambda graph, layer, x: graph.call_function(operator, (layer(x), *args), kwargs), batch)
    program, found, _ = fused(program)
    assert found == [(False, name or "none")]
    assert any(node.target is operator for node in program.module.graph.nodes) == (not name)


@pytest.mark.parametrize("addition", [aten.add.Tensor, aten.add_.Tensor])
def test_an_addition_then_an_activation(addition: Any) -> None:
    def build(graph: fx.Graph, layer: Any, x: fx.Node) -> fx.Node:
        return graph.call_function(aten.gelu.default, (graph.call_function(addition, (layer(x), x)),))

    assert fused(hand_made(build))[1] == [(True, "gelu")]


def test_the_other_operand_may_come_later() -> None:
    def build(graph: fx.Graph, layer: Any, x: fx.Node) -> fx.Node:
        y = layer(x)
        return graph.call_function(aten.add.Tensor, (y, graph.call_function(aten.tanh.default, (x,))))

    assert fused(hand_made(build))[1] == [(True, "none")]


def test_an_activation_is_not_moved_behind_an_addition() -> None:
    def build(graph: fx.Graph, layer: Any, x: fx.Node) -> fx.Node:
        return graph.call_function(aten.add.Tensor, (x, graph.call_function(aten.relu.default, (layer(x),))))

    assert fused(hand_made(build))[1] == [(False, "relu")]


def test_of_two_operators_the_later_takes_the_earlier() -> None:
    def build(graph: fx.Graph, layer: Any, x: fx.Node) -> fx.Node:
        first, second = layer(x), layer(x)
        return graph.call_function(aten.relu.default, (graph.call_function(aten.add.Tensor, (second, first)),))

    program = hand_made(build)
    program, found, _ = fused(program)
    assert found == [(False, "none"), (True, "relu")]
    first, second = condensed_nodes(program.module.graph)
    assert arguments(second)["residual"] is first


def test_of_two_operators_the_one_read_once_takes_the_other() -> None:
    def build(graph: fx.Graph, layer: Any, x: fx.Node) -> Sequence[fx.Node]:
        first, second = layer(x), layer(x)
        return [graph.call_function(aten.add.Tensor, (first, second)), second]

    program = hand_made(build)
    program, found, _ = fused(program)
    assert found == [(False, "none"), (True, "none")]  # in the order that the addition imposes


def test_a_residual_is_taken_once() -> None:
    def build(graph: fx.Graph, layer: Any, x: fx.Node) -> fx.Node:
        once = graph.call_function(aten.add.Tensor, (layer(x), x))
        return graph.call_function(aten.add.Tensor, (once, x))

    assert fused(hand_made(build))[1] == [(True, "none")]


def other(graph: fx.Graph, layer: Any, x: fx.Node, what: str) -> Any:
    y = layer(x)
    match what:
        case "itself":
            return graph.call_function(aten.add.Tensor, (y, y))
        case "scaled":
            return graph.call_function(aten.add.Tensor, (y, x), {"alpha": 2})
        case "a number":
            return graph.call_function(aten.add.Tensor, (y, 1.5))
        case "broadcast":
            return graph.call_function(aten.add.Tensor, (y, graph.call_function(aten.sum.dim_IntList, (x, [0], True))))
        case "another dtype":
            double = graph.call_function(aten._to_copy.default, (x,), {"dtype": torch.float64})
            return graph.call_function(aten.add.Tensor, (y, double))
        case "written into between":
            return graph.call_function(aten.add.Tensor, (y, graph.call_function(aten.neg_.default, (x,))))
        case "written by the addition":
            return [graph.call_function(aten.add_.Tensor, (x, y)), x]
    raise AssertionError(what)


@pytest.mark.parametrize(
    "what",
    [
        *("itself", "scaled", "a number", "broadcast", "another dtype"),
        *("written into between", "written by the addition"),
    ],
)
def test_other_additions_stay(what: str) -> None:
    program = hand_made(lambda graph, layer, x: other(graph, layer, x, what), batch=3)
    program, found, _ = fused(program)
    assert found == [(False, "none")]


@pytest.mark.parametrize("also", ["an output", "another reader"])
@pytest.mark.parametrize("what", ["activation", "addition"])
def test_a_value_that_is_needed_elsewhere_is_left_with_a_note(also: str, what: str) -> None:
    def build(graph: fx.Graph, layer: Any, x: fx.Node) -> Any:
        y = layer(x)
        if what == "activation":
            z = graph.call_function(aten.relu.default, (y,))
        else:
            z = graph.call_function(aten.add.Tensor, (y, x))
        return [z, y if also == "an output" else graph.call_function(aten.exp.default, (y,))]

    _, found, notes = fused(hand_made(build))
    assert found == [(False, "none")]
    assert notes == [
        f"{'relu_default' if what == 'activation' else 'add_tensor'} not fused: what it reads is used elsewhere too"
    ]


class BasicBlock(nn.Module):
    """ResNet's, with a convolution in the shortcut."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(6, 8, 3, stride, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, 1, 1, bias=False)
        self.shortcut = nn.Sequential(nn.Conv2d(6, 8, 1, stride, bias=False), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))
        out += self.shortcut(x)
        return F.relu(out, inplace=True)


class TransformerMlp(nn.Module):
    """Pre-norm, residual."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.norm, self.activation = nn.LayerNorm(12), activation
        self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 12)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.down(self.activation(self.up(self.norm(x)))))  # type: ignore[no-any-return]


class InvertedResidual(nn.Module):
    """MobileNetV3's, without squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(6, 16, 1, bias=False), nn.BatchNorm2d(16), nn.Hardswish(inplace=True))
        self.depthwise = nn.Sequential(nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.BatchNorm2d(16), nn.ReLU6())
        self.project = nn.Sequential(nn.Conv2d(16, 6, 1, bias=False), nn.BatchNorm2d(6))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(self.depthwise(self.expand(x)))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """Convolutions over one and three axes and transposed ones."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(4, 6, 3, padding=1)
        self.up = nn.ConvTranspose1d(6, 4, 4, stride=2, padding=1)
        self.three, self.up3 = nn.Conv3d(1, 3, 2), nn.ConvTranspose3d(3, 2, 2, groups=1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.up(F.relu(self.one(x))))
        return F.gelu(self.up3(F.relu6(self.three(y[:, None, :, None, :].expand(-1, -1, -1, 2, -1)))))


def vit_block() -> nn.Module:
    return timm.models.vision_transformer.Block(dim=24, num_heads=3, qkv_bias=True)


MODELS: list[tuple[str, Callable[[], nn.Module], tuple[int, ...], list[Epilogue]]] = [
    ("basic block", lambda: BasicBlock(1), (6, 7, 7), [(False, "relu"), (False, "none"), (True, "relu")]),
    ("strided block", lambda: BasicBlock(2), (6, 7, 7), [(False, "relu"), (False, "none"), (True, "relu")]),
    ("mlp", lambda: TransformerMlp(nn.GELU()), (5, 12), [(False, "gelu"), (True, "none")]),
    ("mlp tanh", lambda: TransformerMlp(nn.GELU("tanh")), (12,), [(False, "gelu_tanh"), (True, "none")]),
    ("mobilenet", InvertedResidual, (6, 5, 5), [(False, "hardswish"), (False, "relu6"), (True, "none")]),
    ("decoder", Decoder, (4, 6), [(False, "relu"), (False, "silu"), (False, "relu6"), (False, "gelu")]),
    ("vit", vit_block, (4, 24), [(False, "none"), (True, "none"), (False, "gelu"), (True, "none")]),
]


@pytest.mark.slow
@pytest.mark.parametrize(("make", "shape", "expected"), [case[1:] for case in MODELS], ids=[case[0] for case in MODELS])
def test_real_modules(make: Callable[[], nn.Module], shape: tuple[int, ...], expected: list[Epilogue]) -> None:
    model = mask_by_hand(randomise(make()), 0.3).eval()
    lowered = sx.lower(model, (torch.randn(2, *shape),), min_speedup=0, verify="each pass")
    assert isinstance(lowered, fx.GraphModule)
    assert epilogues(lowered) == expected
    again = LoweredModule.from_bytes(lowered._bytes())
    assert epilogues(again) == expected
    with torch.no_grad():
        for batch in (1, 3, 17):
            x = torch.randn(batch, *shape)
            torch.testing.assert_close(lowered(x), model(x), rtol=0, atol=2e-5)
            assert torch.equal(again(x), lowered(x))


def test_notes_reach_the_report() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x)
            return torch.relu(y) * y  # type: ignore[no-any-return]

    model = mask_by_hand(randomise(Twice()), 0.3).eval()
    (note,) = sx.lower(model, (torch.randn(2, 8),), min_speedup=0).report.notes
    assert (note.where, note.by) == ("fc.weight", "FuseEpilogues")
    assert "relu not fused" in note.reason
