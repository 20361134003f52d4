"""Files with values of eight bits: what is in them, how large they are, and what tools make of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.compose
import onnxruntime
import pytest
import torch
from export_support import NETWORK_OPERATORS, network
from lowering_support import mask_by_hand, randomise
from onnx import numpy_helper
from torch import Tensor, nn
from typer.testing import CliRunner

import srigl_fx as sx
from srigl_fx import onnx_tools
from srigl_fx.cli.app import app
from srigl_fx.errors import FormatError
from srigl_fx.onnx_export.file import inspect_file
from srigl_fx.runtime import reference
from srigl_fx.runtime.ort import abi
from srigl_fx.runtime.ort.contents import condensed_calls

pytestmark = pytest.mark.slow

X = torch.randn(6, 24, generator=torch.Generator().manual_seed(0))


def of_eight_bits(operator: str) -> str:
    """The operator with values of eight bits instead of floats."""
    base, residual, activation = abi.operator_names()[operator]
    return abi.operator_name(base + abi.EIGHT_BITS, residual, activation)


def layer(inputs: int = 24, outputs: int = 40, seed: int = 0) -> nn.Module:
    """One sparse layer, such that a file of it is to give exactly what the reference of its operator does."""
    return mask_by_hand(randomise(nn.Sequential(nn.Linear(inputs, outputs), nn.ReLU()), seed), 0.25).eval()


def export(model: nn.Module, path: Path, x: Tensor = X, **options: Any) -> Path:
    sx.export_onnx(model, path, (x,), value_dtype=torch.int8, verify=False, min_speedup=0, **options)
    return path


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    return export(layer(), tmp_path / "model.onnx")


def constants(path: Path) -> dict[str, Any]:
    """What the node in a file of :func:`layer` reads, by the names of its operator's inputs."""
    model = onnx.load(path)
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    (node,) = [node for node in model.graph.node if node.domain == abi.DOMAIN]
    inputs = abi.inputs_of(*abi.operator_names()[node.op_type][:2])
    return {part: arrays[name] for part, name in zip(inputs, node.input, strict=True) if part != "x"}


def expected(path: Path, x: Tensor = X) -> Any:
    """What the layer in a file of :func:`layer` computes, by the reference."""
    return reference.condensed_linear(x.numpy(), **constants(path), activation="relu")


def outputs(path: Path, x: Tensor = X, *, library: bool) -> Any:
    session = sx.runtime.load(path) if library else onnxruntime.InferenceSession(path)
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


def assert_close(found: Any, wanted: Any, tolerance: float = 1e-5) -> None:
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max()


def test_a_file_gives_what_the_reference_does(library: Path, exported: Path) -> None:
    held = constants(exported)
    assert held["values"].dtype == np.int8
    assert held["scales"].dtype == np.float32
    onnx.checker.check_model(onnx.load(exported), full_check=True)
    for batch in (1, 6, 40):
        x = torch.randn(batch, 24)
        for by_library in (True, False):
            assert_close(outputs(exported, x, library=by_library), expected(exported, x))


@pytest.mark.long
def test_a_network_of_every_kind_of_layer(library: Path, tmp_path: Path) -> None:
    x = torch.randn(2, 3, 4, 4)
    lowered = sx.lower(network(), (x,), min_speedup=0, value_dtype=torch.int8, verify=False)
    report = sx.export_onnx(lowered, tmp_path / "model.onnx", (x,), min_speedup=0, verify=False)
    contents = inspect_file(report.path)
    assert [node.operator for node in contents.nodes] == [of_eight_bits(name) for name in NETWORK_OPERATORS]
    assert contents.fallback
    for node in contents.nodes:
        weights, neurons = node.fan_in * node.active_neurons, 2 * node.active_neurons + node.weight_shape[0]
        assert node.bytes == 3 * weights + 4 * neurons
    assert condensed_calls(report.path).sparse == len(NETWORK_OPERATORS)
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 4, 4)
        with torch.no_grad():
            wanted = lowered(x).numpy()
        for by_library in (True, False):
            found = outputs(report.path, x, library=by_library)
            # A number between two steps may be rounded to either, after another order of sums in the layer before.
            assert np.linalg.norm(found - wanted) <= 1e-2 * np.linalg.norm(wanted)


def test_at_90_percent_the_layers_take_at_most_8_and_a_half_percent(tmp_path: Path) -> None:
    model = sx.sparsify(
        nn.Sequential(nn.Linear(768, 512), nn.ReLU(), nn.Linear(512, 768)), sparsity=0.9, distribution="uniform"
    )
    options: dict[str, Any] = {"value_dtype": torch.int8, "verify": False, "min_speedup": 0}
    report = sx.export_onnx(model.eval(), tmp_path / "model.onnx", (torch.ones(1, 768),), **options)
    assert 0 < report.sparse_bytes <= 0.085 * report.dense_bytes
    assert report.bytes < report.sparse_bytes + 4 * (512 + 768) + 12288


def test_inspection_counts_the_scales(exported: Path) -> None:
    (node,) = inspect_file(exported).nodes
    assert node.operator == "CondensedLinearInt8Relu"
    assert node.bytes == sum(array.nbytes for array in constants(exported).values())
    assert "CondensedLinearInt8Relu" in CliRunner().invoke(app, ["inspect", str(exported)]).output


def changed(path: Path, name: str, array: Any) -> Path:
    """The file with another constant."""
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.name == name:
            tensor.CopyFrom(numpy_helper.from_array(array, name))
    onnx.save(model, path)
    return path


def without_scales(path: Path) -> Path:
    """The file whose node lacks its last input, the scales."""
    model = onnx.load(path)
    del model.graph.node[0].input[-1]
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: changed(path, "0.weight_scales", np.ones(3, np.float32)), r"scales \(3,\), which do not fit"),
        (lambda path: changed(path, "0.weight_scales", np.ones((40, 1), np.float32)), r"scales \(40, 1\), which do"),
        (without_scales, "has 5 inputs instead of 6"),
    ],
)
def test_inspection_refuses_scales_that_do_not_fit(damage: Callable[[Path], Path], said: str, exported: Path) -> None:
    with pytest.raises(FormatError, match=rf"model\.onnx: the CondensedLinearInt8Relu node .*{said}"):
        inspect_file(damage(exported))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: changed(path, "0.weight_scales", np.full(40, -1, np.float32)), "'scales' .* negative"),
        (lambda path: changed(path, "0.weight_scales", np.ones(3, np.float32)), "'scales' has 3 entries"),
        (lambda path: changed(path, "0.weight_values", np.ones((40, 6), np.float32)), "'values' must be int8"),
        (without_scales, "has input size 5"),
    ],
)
def test_loading_refuses_what_the_operator_does(
    library: Path, damage: Callable[[Path], Path], said: str, exported: Path
) -> None:
    damage(exported)
    with pytest.raises(FormatError, match=rf"model\.onnx.*CondensedLinearInt8Relu.*{said}"):
        outputs(exported, library=True)


def dense_twin(path: Path) -> Any:
    """The layer of a file without rounding of its samples."""
    held = constants(path)
    held["values"] = held["values"] * held.pop("scales")[:, None]
    return reference.condensed_linear(X.numpy(), **held, activation="relu")


@pytest.mark.parametrize("fallback", [True, False])
def test_a_densified_file_has_the_weights_that_the_values_stand_for(tmp_path: Path, fallback: bool) -> None:
    source = export(layer(), tmp_path / "model.onnx", fallback=fallback)
    onnx_tools.densify(source, tmp_path / "dense.onnx")
    dense = onnx.load(tmp_path / "dense.onnx")
    onnx.checker.check_model(dense, full_check=True)
    assert {node.op_type for node in dense.graph.node} <= {"MatMul", "Add", "Gemm", "Relu"}
    assert_close(outputs(tmp_path / "dense.onnx", library=False), dense_twin(source))
    assert not inspect_file(tmp_path / "dense.onnx").nodes


@pytest.mark.long
def test_a_densified_network(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 4, 4)
    model = network()
    source = export(model, tmp_path / "model.onnx", x)
    onnx_tools.densify(source, tmp_path / "dense.onnx")
    dense = onnx.load(tmp_path / "dense.onnx")
    assert not {"Round", "ReduceMax", "ScatterElements"} & {node.op_type for node in dense.graph.node}
    with torch.no_grad():
        wanted = model(x).numpy()
    assert np.linalg.norm(outputs(tmp_path / "dense.onnx", x, library=False) - wanted) <= 0.03 * np.linalg.norm(wanted)


@pytest.mark.long
@pytest.mark.parametrize("fallback", [True, False])
@pytest.mark.parametrize("second", ["float32", "int8"])
def test_merged_files_stay_what_they_were(library: Path, tmp_path: Path, second: str, fallback: bool) -> None:
    first = export(layer(), tmp_path / "first.onnx", fallback=fallback)
    head, hidden = layer(40, 8, seed=1), torch.randn(6, 40)
    sx.export_onnx(
        *(head, tmp_path / "second.onnx", (hidden,)),
        **{"value_dtype": getattr(torch, second), "verify": False, "min_speedup": 0, "fallback": fallback},
    )
    (given,) = [entry.name for entry in onnx.load(tmp_path / "second.onnx").graph.input]
    both = tmp_path / "both.onnx"
    onnx_tools.merge(first, tmp_path / "second.onnx", both, {"output": given}, prefixes=("a_", "b_"))
    report = inspect_file(both)
    assert [node.operator for node in report.nodes] == [
        "CondensedLinearInt8Relu",
        "CondensedLinearRelu" if second == "float32" else "CondensedLinearInt8Relu",
    ]
    assert report.fallback == fallback
    for by_library in (True, False) if fallback else (True,):
        between = torch.from_numpy(outputs(first, library=by_library or not fallback))
        wanted = outputs(tmp_path / "second.onnx", between, library=by_library)
        assert_close(outputs(both, library=by_library), wanted)


def test_a_file_is_compared_with_the_model_by_its_noise(library: Path, tmp_path: Path) -> None:
    report = sx.export_onnx(layer(), tmp_path / "model.onnx", (X,), value_dtype=torch.int8, min_speedup=0)
    assert report.min_snr is not None
    assert report.min_snr > 30
    assert report.library_error is not None
    assert report.fallback_error is not None


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("verb", ["densify", "merge"])
def test_layers_that_a_tool_has_renamed_are_computed_by_their_functions(
    tmp_path: Path, verb: str, dtype: torch.dtype
) -> None:
    source, prefixed, target = (tmp_path / f"{name}.onnx" for name in ("source", "prefixed", "target"))
    sx.export_onnx(layer(), source, (X,), value_dtype=dtype, verify=False, min_speedup=0)
    onnx.save(onnx.compose.add_prefix(onnx.load(source), "p_"), prefixed)
    wanted = outputs(source, library=False)
    if verb == "densify":
        onnx_tools.densify(prefixed, target)
        assert not inspect_file(target).renamed
    else:
        head = export(layer(40, 8, seed=1), tmp_path / "head.onnx", torch.from_numpy(wanted))
        (given,) = [entry.name for entry in onnx.load(head).graph.input]
        onnx_tools.merge(prefixed, head, target, {"p_output": given}, prefixes=("", "b_"))
        assert inspect_file(target).fallback
        wanted = outputs(head, torch.from_numpy(wanted), library=False)
    assert_close(outputs(target, library=False), wanted)


def test_the_recipe_is_in_the_file(tmp_path: Path) -> None:
    model = sx.sparsify(nn.Sequential(nn.Linear(24, 40), nn.ReLU()), sparsity=0.75).eval()
    assert onnx_tools.recipe(export(model, tmp_path / "model.onnx")) == sx.recipe(model)
