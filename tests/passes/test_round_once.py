"""What several layers of eight bits read is rounded once, and nothing else is."""

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
from srigl_fx.passes.condensed_nodes import LINEAR, ROUND, condensed_nodes
from srigl_fx.passes.hand_over_bytes import HandOverBytes
from srigl_fx.passes.pipelines import CONDENSING, LOWERING
from srigl_fx.passes.program import arguments
from srigl_fx.passes.round_once import RoundOnce
from srigl_fx.runtime.ort import abi


class Projections(nn.Module):
    """Three layers behind a normalisation, of which one has a residual: the tensor that all of them read."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(48)
        self.q, self.k, self.v = (nn.Linear(48, 48) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        y: Tensor = self.q(x) * self.k(x) + (self.v(x) + x)
        return y


class Branches(nn.Module):
    """Two convolutions of one image, behind one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.other = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 17, 3, padding=1), nn.Conv2d(16, 17, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        y: Tensor = self.one(x) + self.other(x)
        return y


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "projections": (Projections, (48,)),
    "sequences": (Projections, (5, 48)),
    "convolutions": (Branches, (3, 9, 8)),
}
every_model = pytest.mark.parametrize("name", MODELS)


def made(name: str) -> tuple[nn.Module, Callable[[int], Tensor]]:
    make, shape = MODELS[name]
    return mask_by_hand(randomise(make()), 0.4).eval(), lambda batch: torch.randn(batch, *shape)


def lowered_with(model: nn.Module, x: Tensor, **options: Any) -> LoweredModule:
    lowered = lower(model, (x,), **{"min_speedup": 0, "value_dtype": torch.int8, **options})
    assert isinstance(lowered, LoweredModule)
    return lowered


def roundings(lowered: LoweredModule) -> list[torch.fx.Node]:
    return list(lowered.graph.find_nodes(op="call_function", target=ROUND))


@pytest.mark.long
@every_model
def test_rule_1_one_rounding_for_all_readers_and_the_same_bits(name: str) -> None:
    model, inputs = made(name)
    x = inputs(17)
    alone = tuple(step for step in (*LOWERING, *CONDENSING) if not isinstance(step, HandOverBytes))
    without = tuple(step for step in alone if not isinstance(step, RoundOnce))
    lowered = lowered_with(model, x, calibration=[x], passes=alone, verify="each pass")
    (rounded,) = roundings(lowered)
    readers = [node for node in condensed_nodes(lowered.graph) if arguments(node)["x"] is rounded]
    assert len(readers) == (2 if name == "convolutions" else 3)
    assert set(rounded.users) == set(readers)
    said = f"RoundOnce: {rounded.all_input_nodes[0].name}: rounded once for {len(readers)} layers"
    assert said in str(lowered.report)
    each = lowered_with(model, x, calibration=[x], passes=without)
    assert roundings(each) == []
    with torch.no_grad():
        for batch in (1, 3, 17, 70):
            x = 2 * inputs(batch)
            assert bits(lowered(x)) == bits(each(x))


def test_rule_2_one_reader_rounds_for_itself() -> None:
    model = mask_by_hand(randomise(nn.Sequential(nn.Linear(20, 33), nn.ReLU(), nn.Linear(33, 40))), 0.4).eval()
    x = torch.randn(3, 20)
    assert roundings(lowered_with(model, x, calibration=[x])) == []


def test_rule_2_scales_that_are_found_at_each_call() -> None:
    model, inputs = made("projections")
    assert roundings(lowered_with(model, inputs(3))) == []
    dtypes: dict[Any, torch.dtype] = {"q": torch.int8, "k": torch.float32, "v": torch.bfloat16}
    assert roundings(lowered_with(model, inputs(3), value_dtype=dtypes, calibration=[inputs(3)])) == []


@pytest.mark.slow
def test_readers_of_a_feature_major_tensor() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.one, self.other = nn.Linear(48, 40), nn.Linear(40, 56), nn.Linear(40, 56)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.first(x))
            y: Tensor = self.one(x) + self.other(x)
            return y

    model = mask_by_hand(randomise(Wide()), 0.4).eval()
    x, dtypes = torch.randn(40, 48), {"": torch.int8, "first": torch.float32}
    lowered = lowered_with(model, x, value_dtype=dtypes, calibration=[x])
    (rounded,) = roundings(lowered)
    linears = list(lowered.graph.find_nodes(op="call_function", target=LINEAR))
    assert [arguments(node)["x_feature_major"] for node in linears] == [False, True, True]
    assert rounded.meta["val"].movedim(-1, 0).is_contiguous()
    with torch.no_grad():
        for batch in (1, 17, 40, 130):
            x = torch.randn(batch, 48)
            assert signal_to_noise(model(x), lowered(x)) > 25
            rows = torch.cat([lowered(row[None]) for row in x])
            torch.testing.assert_close(lowered(x), rows, rtol=1e-4, atol=1e-4)


@pytest.mark.long
def test_files_and_onnx(tmp_path: Path) -> None:
    """A file of ONNX rounds once, too: its numbers are the same."""
    model, inputs = made("sequences")
    x, path = inputs(4), tmp_path / "model.onnx"
    lowered = lowered_with(model, x, calibration=[x])
    lowered.save(tmp_path / "model.srigl")
    again = load_lowered(tmp_path / "model.srigl")
    assert len(roundings(again)) == 1
    sx.export_onnx(lowered, path, (x,))
    nodes = [node for node in onnx.load(path).graph.node if node.domain == abi.DOMAIN]
    assert sorted(node.op_type for node in nodes) == [*["CondensedLinearInt8"] * 2, "CondensedLinearInt8Add", abi.ROUND]
    (rounding,) = [node for node in nodes if node.op_type == abi.ROUND]
    assert all(node.input[0] == rounding.output[0] for node in nodes if node is not rounding)
    with torch.no_grad():
        y = lowered(x)
        assert torch.equal(again(x), y)
        for session in (sx.runtime.load(path), onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])):
            (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
            torch.testing.assert_close(torch.from_numpy(got), y, rtol=1e-5, atol=1e-5)
