"""Layers of eight bits in ONNX files: with the operator library, in a stock ONNX Runtime, and what is found wrong."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from lowering_support import Total, mask_by_hand, randomise
from onnx import numpy_helper
from torch import Tensor, nn
from zoo.entry import images

import srigl_fx as sx
from srigl_fx.comparison import signal_to_noise
from srigl_fx.errors import ExportError, FormatError
from srigl_fx.onnx_export.file import inspect_file
from srigl_fx.onnx_export.model import build_model
from srigl_fx.runtime.ort import abi
from srigl_fx.runtime.ort.stream import Stream

LEAST = 30.0  # dB: what differs in the last bit may be rounded to the next step


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(24, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(24, 65), nn.GELU(), nn.Linear(65, 24))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        y: Tensor = self.mlp(x) + x
        return y


def convolutions() -> nn.Module:
    layers = (
        nn.Conv2d(3, 18, 3, padding=1, groups=3),
        nn.ReLU(),
        nn.ConvTranspose2d(18, 7, 3, stride=2, output_padding=1),
        nn.SiLU(),
        nn.Conv2d(7, 5, 1, bias=False),
    )
    return nn.Sequential(*layers)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Any]]] = {
    "linear": (
        lambda: nn.Sequential(nn.Linear(65, 33), nn.ReLU(), nn.Linear(33, 40), nn.Tanh(), nn.Linear(40, 1)),
        lambda batch: ((torch.randn(batch, 65),), {}),
    ),
    "convolutions": (convolutions, images(7)),
    "attention": (Attention, lambda batch: ((torch.randn(batch, 5, 24),), {})),
}


def made(name: str) -> tuple[nn.Module, Callable[[int], Tensor]]:
    make, inputs = MODELS[name]
    return mask_by_hand(randomise(make()), 0.3).eval(), lambda batch: inputs(batch)[0][0]


def condensed(path: Path) -> list[onnx.NodeProto]:
    return [node for node in onnx.load(path).graph.node if node.domain == abi.DOMAIN]


@pytest.mark.long
@pytest.mark.parametrize("name", MODELS)
def test_both_hosts_give_what_torch_gives(name: str, tmp_path: Path) -> None:
    model, inputs = made(name)
    path = tmp_path / "model.onnx"
    lowered = sx.lower(model, (inputs(3),), min_speedup=0, value_dtype=torch.int8)
    report = sx.export_onnx(model, path, (inputs(3),), min_speedup=0, value_dtype=torch.int8)
    assert report.lowering is not None
    assert {layer.value_dtype for layer in report.lowering.layers} == {"int8"}
    assert report.min_snr is not None
    assert report.min_snr >= LEAST
    assert f"smallest signal-to-noise ratio {report.min_snr:.1f} dB" in str(report)
    assert None not in (report.library_error, report.fallback_error)
    assert all(node.op_type.startswith(("CondensedLinearInt8", "CondensedConv")) for node in condensed(path))
    assert all("Int8" in node.op_type for node in condensed(path))
    sessions = sx.runtime.load(path), onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for session in sessions:
        for batch in (1, 3, 17, 65):
            x = inputs(batch)
            (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
            with torch.no_grad():
                assert signal_to_noise(lowered(x), torch.from_numpy(y)) > LEAST
                assert signal_to_noise(model(x), torch.from_numpy(y)) > 25


@pytest.mark.long
@pytest.mark.parametrize("name", MODELS)
def test_what_is_in_the_file(name: str, tmp_path: Path) -> None:
    model, inputs = made(name)
    path = tmp_path / "model.onnx"
    lowered = sx.lower(model, (inputs(3),), min_speedup=0, value_dtype=torch.int8)
    sx.export_onnx(lowered, path, (inputs(3),), verify=False)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
    buffers = dict(lowered.named_buffers())
    for node in condensed(path):
        _, values, indices, active, _, scales, *_ = node.input
        assert constants[values].dtype == np.int8
        assert constants[indices].dtype == np.uint16
        assert constants[scales].dtype == np.float32
        for constant in (values, indices, active, scales):
            np.testing.assert_array_equal(constants[constant], buffers[constant].numpy())
    report = inspect_file(path)
    assert [node.operator for node in report.nodes] == [node.op_type for node in condensed(path)]
    held = [name for node in condensed(path) for name in node.input[1:6]]
    assert report.sparse_bytes == sum(constants[name].nbytes for name in held)
    assert report.fallback


@pytest.mark.long
def test_state_is_carried(tmp_path: Path) -> None:
    model = mask_by_hand(randomise(Total()), 0.4).eval()
    x, path = torch.randn(3, 17), tmp_path / "model.onnx"
    lowered = sx.lower(model, (x,), min_speedup=0, value_dtype=torch.int8)
    report = sx.export_onnx(lowered, path, (x,))
    assert report.state == ("total",)
    assert report.min_snr is not None
    stream = Stream(sx.runtime.load(path))
    for _ in range(3):
        (y,) = stream.run(None, {"x": x.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(y, lowered(x).numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.long
def test_a_file_of_both_kinds_of_layers(tmp_path: Path) -> None:
    model, inputs = made("attention")
    asked: dict[Any, torch.dtype] = {"attention": torch.int8, "mlp.0": torch.bfloat16}
    report = sx.export_onnx(model, tmp_path / "model.onnx", (inputs(3),), min_speedup=0, value_dtype=asked)
    assert report.lowering is not None
    assert report.lowering.value_dtype == "mixed"
    eight = ["Int8" in node.op_type for node in condensed(tmp_path / "model.onnx")]
    assert (sum(eight), len(eight)) == (2, 4)
    assert report.min_snr is not None


@pytest.mark.long
def test_layers_that_stay_in_float32_are_exported_so(tmp_path: Path) -> None:
    class Outlier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.head = nn.Linear(64, 32), nn.Linear(32, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(torch.relu(self.fc(torch.cat([1e3 * x[:, :1], x[:, 1:]], dim=1))))
            return y

    model = randomise(Outlier())
    with torch.no_grad():
        model.get_parameter("fc.weight")[:, 0] *= 1e-4
    mask_by_hand(model, 0.9).eval()
    path = tmp_path / "model.onnx"
    report = sx.export_onnx(model, path, (torch.randn(6, 64),), min_speedup=0, value_dtype=torch.int8)
    assert [node.op_type for node in condensed(path)] == ["CondensedLinearRelu", "CondensedLinearInt8"]
    assert report.lowering is not None
    assert "signal-to-noise" in report.lowering.layers[0].reason


@pytest.mark.long
def test_a_file_that_computes_something_else_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    def wrong(*args: Any) -> onnx.ModelProto:
        proto = build_model(*args)
        scales = next(tensor for tensor in proto.graph.initializer if tensor.name == "2.weight_scales")
        changed = numpy_helper.to_array(scales).copy()
        changed[0] *= 2
        scales.CopyFrom(numpy_helper.from_array(changed, scales.name))
        return proto

    monkeypatch.setattr("srigl_fx.onnx_export.pipeline.build_model", wrong)
    model, inputs = made("linear")
    with pytest.raises(ExportError, match=r"library\) output 0 has a signal-to-noise ratio of .* dB .*at least 30 dB"):
        sx.export_onnx(model, tmp_path / "model.onnx", (inputs(3),), min_speedup=0, value_dtype=torch.int8)
    assert not list(tmp_path.iterdir())


@pytest.mark.long
@pytest.mark.parametrize("change", ["no scales", "scales of another size"])
def test_a_damaged_file_is_refused(change: str, tmp_path: Path) -> None:
    model, inputs = made("linear")
    path = tmp_path / "model.onnx"
    lowered = sx.lower(model, (inputs(3),), min_speedup=0, value_dtype=torch.int8)
    sx.export_onnx(lowered, path, (inputs(3),), verify=False)
    proto = onnx.load(path)
    if change == "no scales":
        next(node for node in proto.graph.node if node.domain == abi.DOMAIN).input.pop()
        said = "has 5 inputs instead of 6"
    else:
        scales = next(tensor for tensor in proto.graph.initializer if tensor.name == "2.weight_scales")
        scales.CopyFrom(numpy_helper.from_array(np.ones(3, np.float32), scales.name))
        said = r"scales \(3,\), which do not fit the dense shape"
    onnx.save(proto, path)
    with pytest.raises(FormatError, match=said):
        inspect_file(path)
