"""Neighbouring layers of eight bits hand bytes to each other, where nothing else reads them: no number changes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from kernel_support import bits
from lowering_support import mask_by_hand, randomise
from torch import Tensor, nn

import srigl_fx as sx
from srigl_fx.comparison import signal_to_noise
from srigl_fx.lowering.loading import load_lowered
from srigl_fx.lowering.lowered import LoweredModule
from srigl_fx.lowering.pipeline import lower
from srigl_fx.onnx_export.file import inspect_file
from srigl_fx.onnx_tools import densify
from srigl_fx.passes.condensed_nodes import ROUND, condensed_nodes
from srigl_fx.passes.hand_over_bytes import HandOverBytes
from srigl_fx.passes.pipelines import CONDENSING, LOWERING
from srigl_fx.passes.program import arguments
from srigl_fx.runtime.ort import abi


class Bottleneck(nn.Module):
    """Three convolutions and what goes past them; the first layer's output is read twice, once in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1)
        self.one, self.two, self.three = nn.Conv2d(24, 17, 1), nn.Conv2d(17, 18, 3, 2, 1), nn.Conv2d(18, 24, 1)
        self.past = nn.Conv2d(24, 24, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        y = self.three(torch.relu(self.two(torch.relu(self.one(x)))))
        z: Tensor = torch.relu(y + self.past(x))
        return z


class Pooled(nn.Module):
    """Pooling, a permutation, a reshape and a part between layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.next = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 20, 3)
        self.mixed, self.head = nn.Linear(20, 33), nn.Linear(33, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(torch.relu(self.stem(x)), 3, 2, 1)
        x = torch.relu(self.next(x)).flatten(2).transpose(1, 2)
        y: Tensor = self.head(nn.functional.gelu(self.mixed(x))[:, -1])
        return y


class Projections(nn.Module):
    """Three layers that read one, which round_samples stands between."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(20, 48)
        self.q, self.k, self.v = (nn.Linear(48, 48) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y: Tensor = self.q(x) * self.k(x) + self.v(x)
        return y


class Kept(nn.Module):
    """Outputs that are read in float32 too: a residual, an output of the model, a normalisation; and two scales."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(20, 20) for _ in range(4))
        self.wide, self.left, self.right = nn.Linear(20, 40), nn.Linear(20, 20), nn.Linear(20, 20)
        self.norm = nn.LayerNorm(20)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.a(x)
        x = self.b(x) + x
        y = self.d(self.norm(self.c(x)))
        z = self.wide(y)
        return self.left(z[:, :20]) + self.right(z[:, 20:]), y


class PooledSum(nn.Module):
    """Pooling of a sum: what is added may be no number."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.next = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 20, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.next(nn.functional.max_pool2d(self.stem(x) + x, 2))
        return y


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 33), nn.ReLU(), nn.Linear(33, 70), nn.GELU(), nn.Linear(70, 9))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, int]]] = {
    "perceptron": (perceptron, (20,), {"0": 1, "2": 1}),
    "sequences": (perceptron, (5, 20), {"0": 1, "2": 1}),
    "bottleneck": (Bottleneck, (3, 9, 8), {"stem": 2, "one": 1, "two": 1}),
    "pooled": (Pooled, (3, 13, 12), {"stem": 1, "next": 1, "mixed": 1}),
    "projections": (Projections, (20,), {"stem": 3}),
    "kept": (Kept, (20,), {"b": 1}),
    "pooled sum": (PooledSum, (16, 8, 8), {}),
}
every_model = pytest.mark.parametrize("name", MODELS)
WITHOUT = tuple(step for step in (*LOWERING, *CONDENSING) if not isinstance(step, HandOverBytes))


def made(name: str) -> tuple[nn.Module, Callable[[int], Tensor]]:
    make, shape, _ = MODELS[name]
    return mask_by_hand(randomise(make()), 0.4).eval(), lambda batch: torch.randn(batch, *shape)


def lowered_with(model: nn.Module, x: Tensor, **options: Any) -> LoweredModule:
    lowered = lower(model, (x,), **{"min_speedup": 0, "value_dtype": torch.int8, **options})
    assert isinstance(lowered, LoweredModule)
    return lowered


def hand_overs(lowered: LoweredModule) -> list[torch.fx.Node]:
    return [node for node in condensed_nodes(lowered.graph) if arguments(node)["y_scale"] is not None]


def results(lowered: LoweredModule, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        y = lowered(x)
    return list(y) if isinstance(y, tuple) else [y]


@pytest.mark.long
@every_model
def test_rules_1_to_3_the_same_bits(name: str) -> None:
    model, inputs = made(name)
    x, expected = inputs(17), MODELS[name][2]
    lowered = lowered_with(model, x, calibration=[x], verify="each pass")
    layers = [note for note in lowered.report.notes if note.by == "HandOverBytes"]
    assert {note.where.partition(".")[0]: note.reason for note in layers} == {
        layer: f"hands bytes to {count} layer{'s' if count > 1 else ''}" for layer, count in expected.items()
    }
    assert len(hand_overs(lowered)) == len(expected)
    if name == "projections":
        assert not lowered.graph.find_nodes(op="call_function", target=ROUND)
    for node in hand_overs(lowered):
        assert node.meta["val"].dtype is torch.uint8
    each = lowered_with(model, x, calibration=[x], passes=WITHOUT)
    assert hand_overs(each) == []
    for batch in (1, 3, 17, 70):
        x = 2 * inputs(batch)
        for one, other in zip(results(lowered, x), results(each, x), strict=True):
            assert bits(one) == bits(other)


def test_scales_that_are_found_at_each_call() -> None:
    model, inputs = made("perceptron")
    assert hand_overs(lowered_with(model, inputs(3))) == []


def test_a_layer_that_finds_its_own_scales_hands_over_bytes_all_the_same() -> None:
    model, inputs = made("perceptron")
    x = inputs(3)
    x[0, 0] = float("nan")
    lowered = lowered_with(model, inputs(3), calibration=[inputs(16)], verify=False)
    first = next(condensed_nodes(lowered.graph))
    first.kwargs = {**first.kwargs, "x_scale": None, "x_offset": 0}
    lowered.recompile()
    assert first in hand_overs(lowered)
    (y,) = results(lowered, x)
    assert y.isfinite().all()  # a NaN is rounded to zero


@pytest.mark.long
@pytest.mark.parametrize("name", ["bottleneck", "pooled", "projections"])
def test_onnx(name: str, tmp_path: Path) -> None:
    """Bytes lie in the same places, in each host. What is densified rounds less: it is near, and no more."""
    model, inputs = made(name)
    x, path = inputs(4), tmp_path / "model.onnx"
    lowered = lowered_with(model, x, calibration=[x])
    sx.export_onnx(lowered, path, (x,))
    nodes = [node for node in onnx.load(path).graph.node if node.domain == abi.DOMAIN]
    as_bytes = [{item.name: item.i for item in node.attribute}["x_bytes"] for node in nodes]
    assert sum(abi.BYTES in node.op_type for node in nodes) == len(hand_overs(lowered))
    assert sum(as_bytes) == sum(
        arguments(node)["x"].meta["val"].dtype is torch.uint8 for node in condensed_nodes(lowered.graph)
    )
    stock = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    dense = tmp_path / "dense.onnx"
    densify(path, dense)
    plain = onnxruntime.InferenceSession(dense, providers=["CPUExecutionProvider"])
    for session, least in ((sx.runtime.load(path), 60), (stock, 40), (plain, 15)):
        for batch in (1, 3, 17):
            x = inputs(batch)
            (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
            assert signal_to_noise(results(lowered, x)[0], torch.from_numpy(y)) > least
    assert str(inspect_file(path)).count("Bytes") == len(hand_overs(lowered))
    assert not inspect_file(path).renamed


@pytest.mark.long
@pytest.mark.parametrize("name", ["bottleneck", "pooled"])
def test_files_compilation_and_export(name: str, tmp_path: Path) -> None:
    model, inputs = made(name)
    x = inputs(4)
    lowered = lowered_with(model, x, calibration=[x])
    lowered.save(tmp_path / "model.srigl")
    again = load_lowered(tmp_path / "model.srigl")
    assert len(hand_overs(again)) == 3
    batch = torch.export.Dim.DYNAMIC
    program = torch.export.export(lowered, (x,), dynamic_shapes=({0: batch},), strict=False)
    compiled = torch.compile(lowered, backend="aot_eager", dynamic=True)
    for count in (2, 5):
        x = inputs(count)
        (y,) = results(lowered, x)
        with torch.no_grad():
            assert bits(again(x)) == bits(y)
            assert bits(program.module()(x)) == bits(y)
            assert bits(compiled(x)) == bits(y)
