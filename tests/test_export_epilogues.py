"""The operators with epilogues, layouts and 16-bit values in files, as a stock ONNX Runtime runs them."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from export_support import CASES, EPILOGUES, MODULES, NETWORK_OPERATORS, captured, inputs_for, network
from lowering_support import mask_by_hand, randomise
from torch import Tensor, fx, nn

import srigl_fx as sx
from srigl_fx.errors import FormatError, LibraryError
from srigl_fx.lowering.lowered import LoweredModule
from srigl_fx.onnx_export.file import inspect_file
from srigl_fx.onnx_export.model import build_model, functions_for
from srigl_fx.passes.condensed_nodes import LINEAR, set_arguments
from srigl_fx.passes.sizes import Sizes
from srigl_fx.runtime.ort import abi
from srigl_fx.runtime.ort import session as session_module
from srigl_fx.runtime.ort.fallback import attributes_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture(autouse=True)
def without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here is run by the operator library."""

    def refuse(options: Any) -> None:
        raise LibraryError("left out")

    monkeypatch.setattr(session_module, "register", refuse)


def stock(model: bytes | str, save_to: Path | None = None) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if save_to is not None:
        options.optimized_model_filepath = str(save_to)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run_served(session: Any, *tensors: Tensor) -> list[Any]:
    names = [item.name for item in session.get_inputs()]
    outputs: list[Any] = session.run(None, dict(zip(names, (tensor.numpy() for tensor in tensors), strict=True)))
    return outputs


def kinds(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


QUICK = {("feature-major sequences", torch.float32), ("linear", torch.bfloat16), ("conv2d", torch.float16)}
QUICK |= {("transposed 2d", torch.float32), ("conv1d", torch.int8)}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [pytest.param(*case, marks=() if case in QUICK else pytest.mark.long, id=f"{case[0]}-{case[1]}") for case in CASES],
)
def test_every_operator_and_its_function(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    make, shape = MODULES[name]
    module = make(dtype)
    inputs = inputs_for(module, shape, 3)
    model = build_model(captured(module, inputs), inputs, {}, Sizes.of_batch((True,) * len(inputs)))
    model.functions.extend(functions_for(model))
    onnx.checker.check_model(model, full_check=True)
    used = [node.op_type for node in model.graph.node if node.domain == abi.DOMAIN]
    base = "CondensedLinear" if shape else "CondensedConvTranspose" if "transposed" in name else "CondensedConv"
    base += abi.EIGHT_BITS if dtype is torch.int8 else ""
    assert set(used) == {abi.operator_name(base, *epilogue) for epilogue in EPILOGUES}
    assert sorted(function.name for function in model.functions) == sorted(set(used))
    for node in model.graph.node:
        # These batches are smaller than what is arranged, and files say so only where something is.
        expected = set(attributes_of(base)) - {"arranged"}
        assert node.domain != abi.DOMAIN or {item.name for item in node.attribute} == expected
    session = stock(model.SerializeToString(), tmp_path / "optimized.onnx")
    for batch in (1, 3, 17):
        given = inputs_for(module, shape, batch)
        expected = module(*given)
        for one, other in zip(run_served(session, *given), expected, strict=True):
            np.testing.assert_allclose(one, other.numpy(), rtol=1e-5, atol=2e-5)
    folded = kinds(tmp_path / "optimized.onnx")
    assert not {"ScatterElements", "ConstantOfShape", "Cast", "Slice"} & set(folded)
    if "feature-major" not in name:
        assert "Transpose" not in folded


def nodes_of(path: Path) -> list[tuple[str, dict[str, Any]]]:
    return [
        (node.op_type, {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute})
        for node in onnx.load(path).graph.node
        if node.domain == abi.DOMAIN
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype", ["float32", *(pytest.param(name, marks=pytest.mark.long) for name in ("bfloat16", "float16"))]
)
def test_a_model_lowered_saved_and_exported(tmp_path: Path, dtype: str) -> None:
    model, x = network(), torch.randn(2, 3, 4, 4)
    lowered = sx.lower(model, (x,), min_speedup=0, value_dtype=DTYPES[dtype])
    assert isinstance(lowered, fx.GraphModule)
    lowered.save(tmp_path / "model.srigl")
    again = sx.load_lowered(tmp_path / "model.srigl")
    for name, module in {"lowered": lowered, "loaded": again}.items():
        path = tmp_path / f"{name}.onnx"
        report = sx.export_onnx(module, path, (x,), min_speedup=0)
        assert [kind for kind, _ in nodes_of(path)] == NETWORK_OPERATORS
        assert {function.name for function in onnx.load(path).functions} == set(NETWORK_OPERATORS)
        assert report.dynamic_batch
        assert report.fallback
        session = stock(str(path))
        for batch in (1, 2, 5):
            given = torch.randn(batch, 3, 4, 4)
            with torch.no_grad():
                expected = lowered(given)
                assert torch.equal(again(given), expected)
            np.testing.assert_allclose(run_served(session, given)[0], expected.numpy(), rtol=1e-4, atol=1e-4)
    contents = inspect_file(path)
    assert [node.operator for node in contents.nodes] == NETWORK_OPERATORS
    for node in contents.nodes:
        weights, neurons = node.fan_in * node.active_neurons, node.active_neurons + node.weight_shape[0]
        assert node.bytes == weights * (6 if dtype == "float32" else 4) + 4 * neurons
    assert "CondensedConvTransposeRelu6" in str(contents)


@pytest.mark.long
def test_layers_in_sequence_need_no_transposition(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 4, 4)  # 2 * 64 samples reach the linear layers
    path = sx.export_onnx(network(), tmp_path / "model.onnx", (x,), min_speedup=0).path
    perms = [(kind, given["x_perm"], given["y_perm"]) for kind, given in nodes_of(path) if "x_perm" in given]
    rows, to_rows, from_rows = [0, 1, 2], [1, 2, 0], [2, 0, 1]
    assert perms == [
        ("CondensedLinearSilu", rows, from_rows),
        ("CondensedLinear", rows, from_rows),
        ("CondensedLinearAdd", to_rows, rows),
        ("CondensedLinearGelu", rows, from_rows),
        ("CondensedLinearAdd", to_rows, rows),
    ]
    stock(str(path), tmp_path / "optimized.onnx")
    assert kinds(tmp_path / "optimized.onnx").count("Transpose") <= 1  # the model's own


ELEMENTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "hardtanh": F.hardtanh,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "clamp": lambda x: x.clamp(-1, 1),
    "clamp_min": lambda x: x.clamp_min(-0.5),
    "clip": lambda x: x.clip(-1, 2),
    "numbers": lambda x: (2 * (x + 1.5) - 0.25) / 3,
    "neg": lambda x: -x,
    "square": torch.square,
    "abs": torch.abs,
    "exp": lambda x: torch.exp(x.clamp(-1, 1)),
    "itself": lambda x: x * x + x - x / 2,
}


class Between(nn.Module):
    """Every elementwise operator between two layers."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = list(names)
        self.before = nn.ModuleList(nn.Linear(8, 12) for _ in names)
        self.after = nn.ModuleList(nn.Linear(12, 4) for _ in names)

    def forward(self, x: Tensor) -> list[Tensor]:
        # the scale keeps an activation from being fused
        return [
            after(ELEMENTWISE[name](before(x) * 0.5))
            for name, before, after in zip(self.names, self.before, self.after, strict=True)
        ]


@pytest.mark.long
def test_what_may_stand_between_layers_may_be_stored_permuted(tmp_path: Path) -> None:
    model = mask_by_hand(randomise(Between(list(ELEMENTWISE))), 0.5).eval()
    x = torch.randn(16, 3, 8)
    path = sx.export_onnx(
        model, tmp_path / "model.onnx", (x,), min_speedup=0
    ).path  # compares the file's outputs with the model's
    given = [attributes for _, attributes in nodes_of(path)]
    assert sum(one["y_perm"] == [2, 0, 1] for one in given) == len(ELEMENTWISE)
    assert sum(one["x_perm"] == [1, 2, 0] for one in given) == len(ELEMENTWISE)
    onnx.checker.check_model(onnx.load(path), full_check=True)


class Pair(nn.Module):
    """Two layers in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)))  # type: ignore[no-any-return]


@pytest.mark.slow
def test_an_edited_graph_is_exported_right(tmp_path: Path) -> None:
    """A reader that knows rows only, put between two layers after lowering."""
    model, x = mask_by_hand(randomise(Pair()), 0.5).eval(), torch.randn(16, 8)
    lowered = sx.lower(model, (x,), min_speedup=0)
    assert isinstance(lowered, LoweredModule)
    first = lowered.graph.find_nodes(op="call_function", target=LINEAR)[0]
    with lowered.graph.inserting_after(first):
        ranked = lowered.graph.call_function(torch.ops.aten.cumsum.default, (first, 1))
    first.replace_all_uses_with(ranked, delete_user_cb=lambda user: user is not ranked)
    lowered.recompile()
    path = sx.export_onnx(lowered, tmp_path / "model.onnx", (x,), min_speedup=0).path
    assert [given["x_perm"] for _, given in nodes_of(path)] == [[0, 1], [0, 1]]


@pytest.mark.slow
def test_the_bias_before_an_instance_norm_stays_where_an_activation_is_between(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.InstanceNorm2d(6))
    mask_by_hand(randomise(model), 0.5)
    report = sx.export_onnx(model.eval(), tmp_path / "model.onnx", (torch.randn(2, 3, 6, 6),), min_speedup=0)
    assert report.fallback_error is not None
    assert report.fallback_error < 1e-5


@pytest.mark.slow
def test_a_file_with_an_unknown_activation_is_refused(tmp_path: Path) -> None:
    model, x = mask_by_hand(randomise(Pair()), 0.5).eval(), torch.randn(2, 8)
    lowered = sx.lower(model, (x,), min_speedup=0)
    assert isinstance(lowered, LoweredModule)
    first = lowered.graph.find_nodes(op="call_function", target=LINEAR)[0]
    set_arguments(first, activation="softplus")
    with pytest.raises(FormatError, match="softplus"):
        LoweredModule.from_bytes(lowered._bytes())


@pytest.mark.slow
def test_out_of_range_indices_of_16_bit_layers_are_refused(tmp_path: Path) -> None:
    model, x = mask_by_hand(randomise(Pair()), 0.5).eval(), torch.randn(2, 8)
    lowered = sx.lower(model, (x,), min_speedup=0, value_dtype=torch.bfloat16)
    assert isinstance(lowered, LoweredModule)
    data = lowered._bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    tensors = safetensors.torch.load(data)
    assert tensors["a.weight_values"].dtype is torch.bfloat16
    tensors["a.weight_indices"][0, -1] = 8
    with pytest.raises(FormatError, match="8 is not in"):
        LoweredModule.from_bytes(safetensors.torch.save(tensors, metadata=header))
