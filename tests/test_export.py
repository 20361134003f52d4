"""``export_onnx``: what is in the file, how it is checked, and what a failure leaves behind."""

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import srigl_fx as sx
from srigl_fx.comparison import TOLERANCE, relative_error
from srigl_fx.errors import CaptureError, ExportError, LibraryError
from srigl_fx.onnx_export import pipeline as export
from srigl_fx.onnx_export.report import ExportReport
from srigl_fx.runtime.ort import session as session_module
from srigl_fx.runtime.ort.fallback import fallback_functions


class Net(nn.Module):
    """A convolution and two linear layers; biases far from zero."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1, stride=2, groups=2)
        self.fc1 = nn.Linear(128, 96)
        self.fc2 = nn.Linear(96, 5)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> dict[str, Tensor]:
        hidden = self.conv(x).relu().flatten(1)
        if scale is not None:
            hidden = hidden * scale
        hidden = self.fc1(hidden).relu()
        return {"hidden": hidden, "logits": self.fc2(hidden)}


def sparse(model: nn.Module | None = None, sparsity: float = 0.9) -> nn.Module:
    model = sx.sparsify(model or Net(), sparsity=sparsity, distribution="uniform")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.uniform_(1, 2)
    return model.eval()


X = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(1))


def served(session: Any, *tensors: Tensor) -> list[Any]:
    names = [item.name for item in session.get_inputs()]
    outputs: list[Any] = session.run(None, dict(zip(names, (tensor.numpy() for tensor in tensors), strict=True)))
    return outputs


def stock(path: Path) -> Any:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path, ExportReport]:
    torch.manual_seed(0)
    model, path = sparse(), tmp_path_factory.mktemp("export") / "model.onnx"
    return model, path, sx.export_onnx(model, path, (X,), min_speedup=0)


Exported = tuple[nn.Module, Path, ExportReport]


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_the_file_gives_what_the_model_gives(exported: Exported, batch: int) -> None:
    model, path, _ = exported
    x = torch.randn(batch, 8, 8, 8)
    with torch.no_grad():
        expected = model(x)
    for session in (sx.runtime.load(path), stock(path)):
        hidden, logits = served(session, x)
        np.testing.assert_allclose(hidden, expected["hidden"].numpy(), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(logits, expected["logits"].numpy(), rtol=1e-5, atol=1e-5)


def test_the_report(exported: Exported) -> None:
    model, path, report = exported
    assert report.path == path
    assert report.bytes == path.stat().st_size
    assert report.dynamic_batch
    assert report.fallback
    assert report.fallback_error is not None
    assert report.fallback_error < 1e-5
    masks = dict(sx.masks.named_masks(model))
    assert [layer.name for layer in report.layers] == list(masks)
    for layer, mask in zip(report.layers, masks.values(), strict=True):
        assert layer.weight_shape == tuple(mask.shape)
        assert layer.active_neurons * layer.fan_in == int(mask.sum())
    assert report.dense_bytes == sum(4 * (mask.numel() + mask.shape[0]) for mask in masks.values())
    assert 0 < report.sparse_bytes < report.dense_bytes
    assert str(path) in str(report)


def test_the_file_holds_the_frozen_operators(exported: Exported) -> None:
    _, path, _ = exported
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert {item.domain: item.version for item in model.opset_import} == {"": 18, "srigl_fx": 1}
    assert model.ir_version <= 9
    nodes = [node for node in model.graph.node if node.domain == "srigl_fx"]
    assert [node.op_type for node in nodes] == ["CondensedConvRelu", "CondensedLinearRelu", "CondensedLinear"]
    assert {function.name for function in model.functions} == {node.op_type for node in nodes}
    attributes = [{item.name: onnx.helper.get_attribute_value(item) for item in node.attribute} for node in nodes]
    assert attributes == [
        {
            "in_features": 36,
            "weight_shape": [8, 4, 3, 3],
            "flat_size": 288,
            "strides": [2, 2],
            "pads": [1, 1, 1, 1],
            "dilations": [1, 1],
            "group": 2,
        },
        {"in_features": 128, "weight_shape": [96, 128], "flat_size": 96 * 128, "x_perm": [0, 1], "y_perm": [0, 1]},
        {"in_features": 96, "weight_shape": [5, 96], "flat_size": 480, "x_perm": [0, 1], "y_perm": [0, 1]},
    ]
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    T = onnx.TensorProto
    for node in nodes:
        assert [types[name] for name in node.input[1:]] == [T.FLOAT, T.UINT16, T.INT32, T.FLOAT]


def test_constants_of_the_fallback_state_their_type_and_nodes_have_names(exported: Exported) -> None:
    model = onnx.load(exported[1])
    for function in model.functions:
        assert all(node.name for node in function.node)
        for node in function.node:
            literal = [item for item in node.attribute if not item.ref_attr_name]
            if node.op_type in {"Constant", "ConstantOfShape"} and literal:
                assert [item.name for item in literal] == ["value"]  # graph tools take the others for double


def test_no_shapes_are_recorded_for_initialisers(exported: Exported) -> None:
    graph = onnx.load(exported[1]).graph
    assert not {value.name for value in graph.value_info} & {tensor.name for tensor in graph.initializer}


def test_the_file_tells_nothing_of_the_machine(exported: Exported) -> None:
    data = exported[1].read_bytes()
    for secret in (str(Path(export.__file__).parent), "Traceback", "test_export"):
        assert secret.encode() not in data


@pytest.mark.slow
def test_at_90_percent_the_layers_take_at_most_17_percent(tmp_path: Path) -> None:
    model = sparse(nn.Sequential(nn.Linear(768, 512), nn.ReLU(), nn.Linear(512, 768)))
    report = sx.export_onnx(model, tmp_path / "model.onnx", (torch.ones(1, 768),), verify=False, min_speedup=0)
    assert 0 < report.sparse_bytes <= 0.17 * report.dense_bytes
    assert report.bytes < report.sparse_bytes + 4 * (512 + 768) + 8192


@pytest.mark.long
def test_a_lowered_model_and_its_file_may_be_static(tmp_path: Path) -> None:
    lowered = sx.lower(sparse(), (X,), min_speedup=0)
    report = sx.export_onnx(lowered, tmp_path / "model.onnx", (X,), dynamic_batch=False, min_speedup=0)
    assert not report.dynamic_batch
    assert stock(tmp_path / "model.onnx").get_inputs()[0].shape == [2, 8, 8, 8]
    with torch.no_grad():
        expected = lowered(X)["logits"].numpy()
    np.testing.assert_allclose(served(sx.runtime.load(report.path), X)[1], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.long
def test_keyword_inputs(tmp_path: Path) -> None:
    model, scale = sparse(), torch.rand(2, 128) + 1
    report = sx.export_onnx(model, tmp_path / "model.onnx", ((X,), {"scale": scale}), min_speedup=0)
    with torch.no_grad():
        expected = model(X, scale=scale)["logits"].numpy()
    np.testing.assert_allclose(served(stock(report.path), X, scale)[1], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.long
def test_ablated_neurons_and_a_whole_ablated_layer(tmp_path: Path) -> None:
    model = sparse()
    masks = dict(sx.masks.named_masks(model))
    with torch.no_grad():
        masks["fc1.weight"][::2] = False
        masks["fc2.weight"][:] = False
    sx.masks.apply(model)
    report = sx.export_onnx(model, tmp_path / "model.onnx", (X,), min_speedup=0)
    sizes = {tensor.name: tensor.dims[0] for tensor in onnx.load(report.path).graph.initializer}
    nodes = [node for node in onnx.load(report.path).graph.node if node.domain == "srigl_fx"]
    assert [sizes[node.input[3]] for node in nodes] == [8, 48, 0]
    with torch.no_grad():
        expected = model(X)["hidden"].numpy()
    np.testing.assert_allclose(served(sx.runtime.load(report.path), X)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.long
def test_without_the_fallback(tmp_path: Path) -> None:
    report = sx.export_onnx(sparse(), tmp_path / "model.onnx", (X,), fallback=False, min_speedup=0)
    assert report.fallback_error is None
    assert "does not run" in str(report)
    assert not onnx.load(report.path).functions


@pytest.mark.long
def test_without_the_library_the_stock_check_still_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(options: Any) -> None:
        raise LibraryError("no compiler here")

    monkeypatch.setattr(session_module, "register", refuse)
    report = sx.export_onnx(sparse(), tmp_path / "model.onnx", (X,), min_speedup=0)
    assert report.library_error is None
    assert report.fallback_error is not None
    assert "not checked with the operator library: no compiler here" in str(report)


@pytest.mark.slow
def test_without_verification_nothing_is_claimed(tmp_path: Path) -> None:
    report = sx.export_onnx(sparse(), tmp_path / "model.onnx", (X,), verify=False, min_speedup=0)
    assert report.library_error is None
    assert report.fallback_error is None
    assert "not checked with the library, not checked without" in str(report)


class Bessel(nn.Module):
    """Uses a function that ONNX does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.special.bessel_j0(self.fc(x))
        return y


@pytest.mark.parametrize(
    ("model", "inputs", "error", "message"),
    [
        (Bessel(), (torch.ones(2, 32),), ExportError, "bessel_j0"),
        (Net().train(), (X,), CaptureError, "training mode"),
        (Net(), (X[:, :1],), CaptureError, "does not run on the example inputs"),
    ],
)
def test_a_failure_leaves_an_existing_file_as_it_was(
    tmp_path: Path, model: nn.Module, inputs: Any, error: type[Exception], message: str
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"the former file")
    training = model.training and isinstance(model, Net) and "training" in message
    model = sparse(model)
    with pytest.raises(error, match=message):
        sx.export_onnx(model.train(training), path, inputs, min_speedup=0)
    assert path.read_bytes() == b"the former file"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.long
def test_a_file_that_disagrees_with_the_model_does_not_appear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    functions = fallback_functions(["CondensedLinear"])
    linear = functions[0].node[-1]
    assert linear.op_type == "Add"
    linear.op_type = "Sub"  # subtracts the bias
    monkeypatch.setattr(export, "functions_for", lambda model: functions)
    model = sparse(nn.Sequential(nn.Linear(32, 16)))
    with pytest.raises(ExportError, match=r"off by .* of its largest value"):
        sx.export_onnx(model, tmp_path / "model.onnx", (torch.ones(2, 32),), min_speedup=0)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"there is no folder .*absent"):
        sx.export_onnx(sparse(), tmp_path / "absent" / "model.onnx", (X,), min_speedup=0)
    with pytest.raises(ExportError, match="it is a folder"):
        sx.export_onnx(sparse(), tmp_path, (X,), min_speedup=0)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ExportError, match="it is a device, a pipe or a socket"):
        sx.export_onnx(sparse(), tmp_path / "pipe", (X,), min_speedup=0)
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.long
def test_nothing_is_printed_or_logged(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        sx.export_onnx(sparse(), tmp_path / "model.onnx", (X,), min_speedup=0)
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_relative_error() -> None:
    one = torch.tensor([1.0, -4.0, float("nan"), float("inf")])
    assert relative_error(one, one) == 0
    assert relative_error(one[:2], one[:2] + 1) == 0.25
    assert relative_error(one[:2], one[:1]) == float("inf")
    assert relative_error(torch.zeros(2), torch.full((2,), 1e-30)) == float("inf")
    for other in (torch.tensor([1.0, -4.0, 0.0, float("inf")]), torch.tensor([1.0, -4.0, float("nan"), 1.0])):
        assert not relative_error(one, other) <= TOLERANCE


class Shared(nn.Module):
    """Uses one weight twice."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.fc(x).relu())
        return y


@pytest.mark.slow
def test_a_weight_that_is_used_twice_is_stored_and_counted_once(tmp_path: Path) -> None:
    report = sx.export_onnx(sparse(Shared()), tmp_path / "model.onnx", (torch.ones(2, 64),), min_speedup=0)
    assert len([node for node in onnx.load(report.path).graph.node if node.domain == "srigl_fx"]) == 2
    assert report.condensed_layers == 1
    assert report.dense_bytes == 4 * 65 * 64
    assert report.bytes < report.sparse_bytes + 6000


class Keys(nn.Module):
    """Two inputs, a dict of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 64)

    def forward(self, first: Tensor, second: Tensor) -> dict[str, Tensor]:
        return {"logits": self.fc(first), "sum": first + second}


@pytest.mark.long
def test_inputs_outputs_and_the_batch_have_names(tmp_path: Path, exported: Exported) -> None:
    inputs = (torch.randn(2, 64), torch.randn(2, 64))
    report = sx.export_onnx(sparse(Keys()), tmp_path / "model.onnx", inputs, min_speedup=0)
    session = stock(report.path)
    assert [(item.name, item.shape) for item in session.get_inputs()] == [
        ("first", ["batch", 64]),
        ("second", ["batch", 64]),
    ]
    assert [(item.name, item.shape) for item in session.get_outputs()] == [
        ("logits", ["batch", 64]),
        ("sum", ["batch", 64]),
    ]
    single = sx.export_onnx(
        sparse(nn.Sequential(nn.Linear(64, 64))), tmp_path / "single.onnx", (inputs[0],), min_speedup=0
    )
    assert [item.name for item in stock(single.path).get_outputs()] == ["output"]
    assert [item.name for item in stock(exported[1]).get_outputs()] == ["hidden", "logits"]
