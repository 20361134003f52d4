"""Models whose layers of eight bits round with given scales: what the verbs take, and what comes of it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from lowering_support import Branches, mask_by_hand, randomise
from torch import Tensor, nn

import srigl_fx as sx
from srigl_fx.comparison import signal_to_noise
from srigl_fx.errors import FormatError, LoweringError
from srigl_fx.lowering.loading import load_lowered
from srigl_fx.lowering.lowered import LoweredModule
from srigl_fx.lowering.pipeline import lower
from srigl_fx.passes.condensed_nodes import condensed_nodes
from srigl_fx.passes.hand_over_bytes import HandOverBytes
from srigl_fx.passes.pipelines import CONDENSING, LOWERING
from srigl_fx.passes.program import arguments
from srigl_fx.runtime.ort import abi


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(65, 33), nn.ReLU(), nn.Linear(33, 40), nn.GELU(), nn.Linear(40, 7))


def convolutions() -> nn.Module:
    layers = (
        nn.Conv2d(3, 18, 3, padding=1, groups=3),
        nn.ReLU(),
        nn.ConvTranspose2d(18, 7, 3, stride=2, output_padding=1),
        nn.SiLU(),
        nn.Conv2d(7, 5, 1, bias=False),
    )
    return nn.Sequential(*layers)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (linear, (65,)),
    "convolutions": (convolutions, (3, 7, 6)),
}
every_model = pytest.mark.parametrize("name", MODELS)


def made(name: str = "linear") -> tuple[nn.Module, Callable[[int], Tensor]]:
    make, shape = MODELS[name]
    return mask_by_hand(randomise(make()), 0.3).eval(), lambda batch: torch.randn(batch, *shape)


def calibrated(model: nn.Module, x: Tensor, calibration: Any, **options: Any) -> LoweredModule:
    options = {"min_speedup": 0, "value_dtype": torch.int8, **options}
    lowered = lower(model, (x,), calibration=calibration, **options)
    assert isinstance(lowered, LoweredModule)
    return lowered


@pytest.mark.slow
@every_model
def test_every_layer_has_a_scale(name: str) -> None:
    model, inputs = made(name)
    lowered = calibrated(model, inputs(4), [inputs(16), inputs(3)], verify="each pass")
    assert all(arguments(node)["x_scale"] is not None for node in condensed_nodes(lowered.graph))
    assert [layer.calibrated for layer in lowered.report.layers] == [True] * 3
    assert str(lowered.report).count("int8, calibrated") == 3
    x = inputs(5)
    with torch.no_grad():
        assert signal_to_noise(model(x), lowered(x)) > 25
        rows = torch.cat([lowered(row[None]) for row in x])
        torch.testing.assert_close(lowered(x), rows, rtol=1e-5, atol=1e-5)


@pytest.mark.long
@every_model
def test_both_hosts_give_what_torch_gives(name: str, tmp_path: Path) -> None:
    model, inputs = made(name)
    path, x = tmp_path / "model.onnx", inputs(3)
    calibration = [inputs(16)]
    lowered = calibrated(model, x, calibration)
    report = sx.export_onnx(model, path, (x,), min_speedup=0, value_dtype=torch.int8, calibration=calibration)
    assert report.lowering is not None
    assert all(layer.calibrated for layer in report.lowering.layers)
    nodes = [node for node in onnx.load(path).graph.node if node.domain == abi.DOMAIN]
    given = [next(item.f for item in node.attribute if item.name == "x_scale") for node in nodes]
    assert given == [pytest.approx(arguments(node)["x_scale"], rel=1e-6) for node in condensed_nodes(lowered.graph)]
    for session in (sx.runtime.load(path), onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])):
        for batch in (1, 3, 17, 65):
            x = 2 * inputs(batch)  # some of it is clipped
            (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
            with torch.no_grad():
                assert signal_to_noise(lowered(x), torch.from_numpy(y)) > 30


@pytest.mark.long
def test_a_file_of_layers_with_given_scales_and_with_found_ones(tmp_path: Path) -> None:
    """Some nodes of one operator have a scale, and one function stands for all of them."""
    model, inputs = made()
    x, path = inputs(4), tmp_path / "model.onnx"
    floats_between = [step for step in (*LOWERING, *CONDENSING) if not isinstance(step, HandOverBytes)]
    lowered = calibrated(model, x, [inputs(16)], passes=floats_between)
    last = list(condensed_nodes(lowered.graph))[-1]
    last.kwargs = {**last.kwargs, "x_scale": None, "x_offset": 0}
    lowered.recompile()
    sx.export_onnx(lowered, path, (x,))
    y = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"input": x.numpy()})[0]
    with torch.no_grad():
        assert signal_to_noise(lowered(x), torch.from_numpy(y)) > 30


def test_a_file_keeps_the_scales(tmp_path: Path) -> None:
    model, inputs = made()
    lowered = calibrated(model, inputs(2), [inputs(16)])
    lowered.save(tmp_path / "model.srigl")
    again, x = load_lowered(tmp_path / "model.srigl"), inputs(5)
    with torch.no_grad():
        assert torch.equal(again(x), lowered(x))
    assert again.report.layers == lowered.report.layers


@pytest.mark.parametrize(("scale", "offset"), [(0.0, 0), (-1.0, 0), (1e39, 0), ("1", 0), (1.0, 7)])
def test_a_file_with_another_scale_is_refused(scale: Any, offset: Any, tmp_path: Path) -> None:
    model, inputs = made()
    lowered = calibrated(model, inputs(2), [inputs(16)], verify=False)
    node = next(condensed_nodes(lowered.graph))
    node.kwargs = {**node.kwargs, "x_scale": scale, "x_offset": offset}
    lowered.save(tmp_path / "model.srigl")
    with pytest.raises(FormatError, match=r"the condensed layer .* is malformed"):
        load_lowered(tmp_path / "model.srigl")


def test_an_iterable_is_read_once() -> None:
    model, inputs = made()
    given: list[Tensor] = []

    def batches() -> Iterator[Tensor]:
        for _ in range(3):
            given.append(inputs(4))
            yield given[-1]

    lowered = calibrated(model, inputs(2), batches())
    assert len(given) == 3
    scale = arguments(next(condensed_nodes(lowered.graph)))["x_scale"]
    assert scale == pytest.approx(max(float(x.abs().max()) for x in given) / 127, rel=1e-6)


class Two(nn.Module):
    """Two inputs whose batches are tied, and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(20, 24)

    def forward(self, x: Tensor, *, other: Tensor, factor: int = 2) -> Tensor:
        y: Tensor = self.fc(x * factor + other)
        return y


@pytest.mark.long
def test_keyword_arguments() -> None:
    model = mask_by_hand(randomise(Two()), 0.4).eval()

    def inputs(batch: int, other: int, factor: int = 2) -> Any:
        return (torch.ones(batch, 20),), {"other": torch.ones(other, 20), "factor": factor}

    options: dict[str, Any] = {"min_speedup": 0, "value_dtype": torch.int8}
    lowered = lower(model, inputs(3, 3), calibration=[inputs(5, 5)], **options)
    assert isinstance(lowered, LoweredModule)
    assert arguments(next(condensed_nodes(lowered.graph)))["x_scale"] == pytest.approx(3 / 255, rel=1e-6)
    for wrong in (inputs(5, 4), inputs(5, 5, 3), (torch.ones(5, 20), torch.ones(5, 20))):
        with pytest.raises(LoweringError, match=r"calibration input 1 is .*, and the graph takes what the example"):
            lower(model, inputs(3, 3), calibration=[inputs(5, 5), wrong], **options)


X = torch.ones(2, 65)


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([], "calibration is empty: give at least one input, or leave it out"),
        (iter(()), "calibration is empty"),
        (X, r"must be an iterable of inputs, not Tensor: pass \[\(x,\)\] for one tensor"),
        (5, "must be an iterable of inputs, not int"),
        ({"x": X}, "must be an iterable of inputs, not dict"),
        ([X, 5], "calibration input 1: example inputs must be a tuple of arguments"),
        ([torch.ones(2, 64)], r"calibration input 0 is \(float32 \(2, 64\)\), and the graph takes .* any batch size"),
        ([X.double()], r"calibration input 0 is \(float64 \(2, 65\)\)"),
        ([torch.ones(65)], r"calibration input 0 is \(float32 \(65,\)\)"),
        ([(X, X)], r"calibration input 0 is \(float32 \(2, 65\), float32 \(2, 65\)\)"),
        ([(5,)], r"calibration input 0 is \(int\)"),
        ([X, torch.ones(0, 65)], r"calibration input 1 is empty: \(float32 \(0, 65\)\)"),
        ([X, X / 0], "calibration input 1 holds a number that is not finite"),
        ([X * float("nan")], "calibration input 0 holds a number that is not finite"),
    ],
)
def test_inputs_that_are_refused(calibration: Any, message: str) -> None:
    model, inputs = made()
    with pytest.raises(LoweringError, match=message):
        calibrated(model, inputs(2), calibration)


def test_calibration_is_for_layers_of_eight_bits() -> None:
    model, inputs = made()
    with pytest.raises(LoweringError, match="none is to be stored in int8: pass value_dtype"):
        lower(model, (inputs(2),), min_speedup=0, calibration=[inputs(2)])


def test_a_model_that_is_not_one_graph_is_refused() -> None:
    model = mask_by_hand(randomise(Branches()), 0.3).eval()
    with pytest.raises(LoweringError, match="a model that is not one graph cannot be calibrated as one"):
        lower(model, (torch.ones(2, 32),), min_speedup=0, value_dtype=torch.int8, calibration=[torch.ones(2, 32)])


@pytest.mark.slow
def test_numbers_beyond_the_calibration_are_clipped() -> None:
    """As if they were the largest that was seen; samples beside them are not touched."""
    model = mask_by_hand(randomise(nn.Sequential(nn.Linear(65, 33))), 0.3).eval()
    x = torch.randn(4, 65)
    lowered, largest = calibrated(model, x, [x]), float(x.abs().max())
    wild = x.clone()
    wild[1] = torch.where(x[1] > 0, float("inf"), x[1])
    wild[2, 3] = float("nan")
    tame = x.clone()
    tame[1] = torch.where(x[1] > 0, largest, x[1])
    tame[2, 3] = 0
    with torch.no_grad():
        assert torch.equal(lowered(wild), lowered(tame))
