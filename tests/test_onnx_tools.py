"""Tools around ONNX: which keep an exported file sparse, which lose that, and what we do about it.

Each row of the table in docs/onnx-tools.md is made here, by the real tool. Tools that the test environment has not
(``pip install 'srigl-fx[onnx-tools]'``) are left out.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.compose
import onnx.inliner
import onnx.parser
import onnx.version_converter
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from lowering_support import mask_by_hand, randomise
from torch import Tensor, nn

import srigl_fx as sx
from srigl_fx import onnx_tools
from srigl_fx.errors import ExportError, FormatError
from srigl_fx.onnx_export.file import inspect_file
from srigl_fx.runtime.ort.contents import condensed_calls

pytestmark = pytest.mark.slow


class Network(nn.Module):
    """Each kind of condensed layer with an epilogue, and a dense linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up = nn.Conv2d(3, 8, 3, padding=1), nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.fc1, self.fc2, self.head = nn.Linear(128, 64), nn.Linear(64, 64), nn.Linear(64, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.up(F.hardswish(self.conv(x)))).flatten(1)
        x = F.gelu(self.fc1(x))
        return self.head(x + F.silu(self.fc2(x)))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    network = Network()
    randomise(network)
    for layer in (network.conv, network.up, network.fc1, network.fc2):
        mask_by_hand(layer, 0.25)
    return network.eval()


X = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def exported(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tools") / "model.onnx"
    sx.export_onnx(model, path, (X,), min_speedup=0)
    return path


def outputs(path: Path, *, library: bool) -> Any:
    """What a session gives for :data:`X`; it takes the first input and gives the first output."""
    session = sx.runtime.load(path) if library else ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: X.numpy()})[0]


def expected(model: nn.Module) -> Any:
    with torch.no_grad():
        return model(X).numpy()


# What each tool does with the file: tool(file to read, file to write).
def onnxslim(source: Path, target: Path) -> None:
    onnx.save(pytest.importorskip("onnxslim").slim(str(source)), target)


def graphsurgeon(source: Path, target: Path) -> None:
    surgeon = pytest.importorskip("onnx_graphsurgeon")
    graph = surgeon.import_onnx(onnx.load(source))
    onnx.save(surgeon.export_onnx(graph.fold_constants().cleanup().toposort()), target)


def onnxsim(source: Path, target: Path) -> None:
    onnx.save(pytest.importorskip("onnxsim").simplify(str(source))[0], target)


def onnxscript_optimize(source: Path, target: Path, **options: Any) -> None:
    import onnxscript.optimizer

    onnx.save(onnxscript.optimizer.optimize(onnx.load(source), **options), target)


def pre_process(source: Path, target: Path, **options: Any) -> None:
    from onnxruntime.quantization.shape_inference import quant_pre_process

    quant_pre_process(str(source), str(target), **options)


def quantize_dynamic(source: Path, target: Path) -> None:
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(str(source), str(target))


def transformers_optimizer(source: Path, target: Path, **options: Any) -> None:
    optimizer = pytest.importorskip("onnxruntime.transformers.optimizer")
    optimizer.optimize_model(str(source), model_type="bert", num_heads=2, hidden_size=64, **options).save_model_to_file(
        str(target)
    )


def to_float16(source: Path, target: Path) -> None:
    float16 = pytest.importorskip("onnxconverter_common.float16")
    model = onnx.load(source)
    ours = [node.op_type for node in model.graph.node if node.domain == "srigl_fx"]
    blocked = [*float16.DEFAULT_OP_BLOCK_LIST, *ours]
    onnx.save(float16.convert_float_to_float16(model, keep_io_types=True, op_block_list=blocked), target)


def add_prefix(source: Path, target: Path, **options: Any) -> None:
    onnx.save(onnx.compose.add_prefix(onnx.load(source), "p_", **options), target)


def inline(source: Path, target: Path) -> None:
    onnx.save(onnx.inliner.inline_local_functions(onnx.load(source)), target)


def convert_version(source: Path, target: Path) -> None:
    onnx.save(onnx.version_converter.convert_version(onnx.load(source), 21), target)


def infer_shapes(source: Path, target: Path) -> None:
    onnx.save(onnx.shape_inference.infer_shapes(onnx.load(source), strict_mode=True, data_prop=True), target)


def external_data(source: Path, target: Path) -> None:
    onnx.save(
        onnx.load(source), target, save_as_external_data=True, location=f"{target.stem}.data", size_threshold=1024
    )


def extract(source: Path, target: Path) -> None:
    model = onnx.load(source)
    onnx.utils.extract_model(source, target, [model.graph.input[0].name], [model.graph.output[0].name])


def optimized(source: Path, target: Path, *, library: bool, ort_format: bool = False) -> None:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(target)
    if ort_format:
        options.add_session_config_entry("session.save_model_format", "ORT")
    if library:
        sx.runtime.register(options)
    ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def with_options(tool: Callable[..., None], **options: Any) -> Callable[[Path, Path], None]:
    return lambda source, target: tool(source, target, **options)


# Name in the table -> the tool, whether condensed layers stay condensed, whether a stock ONNX Runtime can run the file.
TOOLS: dict[str, tuple[Callable[[Path, Path], None], bool, bool]] = {
    "onnxslim": (onnxslim, True, True),
    "ONNX GraphSurgeon, `fold_constants`": (graphsurgeon, True, True),
    "onnxsim": (onnxsim, True, True),
    "onnxscript `optimize`": (onnxscript_optimize, False, True),
    "onnxscript `optimize(inline=False)`": (with_options(onnxscript_optimize, inline=False), True, True),
    "`quant_pre_process(skip_optimization=True, skip_symbolic_shape=True)`": (
        with_options(pre_process, skip_optimization=True, skip_symbolic_shape=True),
        True,
        True,
    ),
    "`quantize_dynamic`": (quantize_dynamic, True, True),
    "`onnxruntime.transformers.optimizer`": (transformers_optimizer, False, True),
    "`onnxruntime.transformers.optimizer`, `opt_level=0`": (
        with_options(transformers_optimizer, opt_level=0),
        True,
        True,
    ),
    "float16 converter, our operators in `op_block_list`": (to_float16, True, True),
    "`onnx.compose.add_prefix`": (add_prefix, False, True),
    "`onnx.compose.add_prefix(rename_functions=False)`": (with_options(add_prefix, rename_functions=False), True, True),
    "`onnx.inliner`": (inline, False, True),
    "`onnx.version_converter`": (convert_version, True, False),
    "`onnx.shape_inference`": (infer_shapes, True, True),
    "`onnx.save(..., save_as_external_data=True)`": (external_data, True, True),
    "`onnx.utils.extract_model`": (extract, True, True),
    "ONNX Runtime's `optimized_model_filepath`, without the library": (
        with_options(optimized, library=False),
        False,
        True,
    ),
    "ONNX Runtime's `optimized_model_filepath`, with the library": (with_options(optimized, library=True), True, False),
    "ORT format (`.ort`), without the library": (
        with_options(optimized, library=False, ort_format=True),
        False,
        True,
    ),
    "ORT format (`.ort`), with the library": (with_options(optimized, library=True, ort_format=True), True, False),
    "`srigl-fx densify`": (onnx_tools.densify, False, True),
}


@pytest.mark.filterwarnings("ignore")  # the tools' own
@pytest.mark.parametrize("name", TOOLS)
def test_each_tool_does_what_the_table_says(
    name: str, model: nn.Module, exported: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tool, stays, stock = TOOLS[name]
    target = tmp_path / ("model.ort" if ".ort" in name else "model.onnx")
    tool(exported, target)
    tolerance = 2e-2 if "float16" in name or name == "`quantize_dynamic`" else 1e-5
    scale = np.abs(expected(model)).max()
    with caplog.at_level(logging.WARNING):
        found = outputs(target, library=True)
    assert np.abs(found - expected(model)).max() <= tolerance * scale
    assert bool(condensed_calls(target).sparse) == stays
    # A file that was made dense on purpose is not complained about, any other is.
    assert any("runs densely" in message for message in caplog.messages) == (not stays and "densify" not in name)
    if stock:
        assert np.abs(outputs(target, library=False) - expected(model)).max() <= tolerance * scale
    else:
        with pytest.raises(Exception, match="not a registered function/op"):
            outputs(target, library=False)
    if target.suffix == ".onnx":
        report = inspect_file(target)
        assert len(report.nodes) == (4 if stays else 0)
        assert report.fallback == stock or not stays
        assert ("A tool has" in str(report) or "a tool has" in str(report) or "computed densely" in str(report)) == (
            not stays and "densify" not in name
        )


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # the tools' own
@pytest.mark.parametrize("name", TOOLS)
def test_each_tool_does_the_same_with_values_of_eight_bits(name: str, model: nn.Module, tmp_path: Path) -> None:
    tool, stays, stock = TOOLS[name]
    source, target = tmp_path / "source.onnx", tmp_path / ("model.ort" if ".ort" in name else "model.onnx")
    sx.export_onnx(model, source, (X,), min_speedup=0, value_dtype=torch.int8, verify=False)
    tool(source, target)
    assert bool(condensed_calls(target).sparse) == stays
    wanted = outputs(source, library=False)
    # A number between two steps may be rounded to either, and a densified file rounds none.
    for library in (True, False) if stock else (True,):
        assert np.linalg.norm(outputs(target, library=library) - wanted) <= 0.03 * np.linalg.norm(wanted)
    if target.suffix == ".onnx":
        operators = {node.operator for node in inspect_file(target).nodes}
        assert operators == ({node.operator for node in inspect_file(source).nodes} if stays else set())


def test_the_page_has_the_rows_of_this_test(checkout: Path) -> None:
    page = (checkout / "docs" / "onnx-tools.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")]
    shown = {row[0]: (row[1] == "yes", row[2] == "yes") for row in rows if row[1] in {"yes", "no"}}
    assert shown == {name: (stays, stock) for name, (_, stays, stock) in TOOLS.items()}


@pytest.mark.long
def test_pre_processing_makes_a_file_dense_and_loading_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    network = mask_by_hand(randomise(nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 8))), 0.2)
    sx.export_onnx(network.eval(), tmp_path / "model.onnx", (torch.randn(2, 64),), min_speedup=0)
    pre_process(tmp_path / "model.onnx", tmp_path / "pre.onnx")
    for _ in range(2):  # the second time silently
        sx.runtime.load(tmp_path / "pre.onnx")
    assert len([message for message in caplog.messages if "no condensed layer is left" in message]) == 1
    assert "made it dense" in str(inspect_file(tmp_path / "pre.onnx"))


def test_a_prefix_renames_operators_and_inspection_names_them(exported: Path, tmp_path: Path) -> None:
    add_prefix(exported, tmp_path / "prefixed.onnx")
    report = inspect_file(tmp_path / "prefixed.onnx")
    assert "p_CondensedConvHardswish" in report.renamed
    assert "A tool has renamed condensed operators" in str(report)


def test_external_data_counts_as_part_of_the_file(exported: Path, tmp_path: Path) -> None:
    external_data(exported, tmp_path / "external.onnx")
    report, whole = inspect_file(tmp_path / "external.onnx"), inspect_file(exported)
    assert report.external_bytes == (tmp_path / "external.data").stat().st_size
    assert report.file_bytes == pytest.approx(whole.file_bytes, rel=0.05)
    assert report.nodes == whole.nodes


@pytest.mark.long
@pytest.mark.parametrize("prefixes", [("", ""), ("a_", "b_")])
@pytest.mark.parametrize("fallback", [True, False])
def test_merged_files_stay_sparse(
    prefixes: tuple[str, str], fallback: bool, model: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    second = mask_by_hand(randomise(nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 4))), 0.3).eval()
    first_file, second_file, both = (tmp_path / f"{name}.onnx" for name in ("first", "second", "both"))
    sx.export_onnx(model, first_file, (X,), fallback=fallback, min_speedup=0)
    sx.export_onnx(second, second_file, (torch.randn(2, 6),), fallback=fallback, min_speedup=0)
    (given,) = [entry.name for entry in onnx.load(second_file).graph.input]
    if not any(prefixes):  # "output" stands in both files
        with pytest.raises(ExportError, match="cannot be joined"):
            onnx_tools.merge(first_file, second_file, both, {"output": given})
        assert not both.exists()
        return
    onnx_tools.merge(first_file, second_file, both, {"output": given}, prefixes=prefixes)
    with torch.no_grad():
        wanted = second(model(X)).numpy()
    for library in (True, False) if fallback else (True,):
        np.testing.assert_allclose(outputs(both, library=library), wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())
    assert len(inspect_file(both).nodes) == 6
    assert inspect_file(both).fallback == fallback
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.long
@pytest.mark.parametrize("fallback", [True, False])
def test_a_densified_file_has_standard_operators_alone(fallback: bool, model: nn.Module, tmp_path: Path) -> None:
    sx.export_onnx(model, tmp_path / "sparse.onnx", (X,), fallback=fallback, min_speedup=0)
    onnx_tools.densify(tmp_path / "sparse.onnx", tmp_path / "dense.onnx")
    dense = onnx.load(tmp_path / "dense.onnx")
    onnx.checker.check_model(dense, full_check=True)
    assert {node.domain for node in dense.graph.node} <= {"", "ai.onnx"}
    assert not dense.functions
    assert "ScatterElements" not in {node.op_type for node in dense.graph.node}
    wanted = expected(model)
    np.testing.assert_allclose(
        outputs(tmp_path / "dense.onnx", library=False), wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max()
    )


@pytest.mark.filterwarnings("ignore")
def test_openvino_reads_a_densified_file(model: nn.Module, exported: Path, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    onnx_tools.densify(exported, tmp_path / "dense.onnx")
    compiled = openvino.Core().compile_model(
        openvino.convert_model(tmp_path / "dense.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    wanted = expected(model)
    np.testing.assert_allclose(compiled(X.numpy())[0], wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("verb", [onnx_tools.densify, lambda file, to: onnx_tools.merge(file, file, to, {"y": "x"})])
def test_files_that_are_none_are_refused(verb: Callable[[Path, Path], None], tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"\xffnot a model")
    with pytest.raises(FormatError, match=r"bad\.onnx"):
        verb(tmp_path / "bad.onnx", tmp_path / "out.onnx")
    with pytest.raises(FormatError, match="cannot read"):
        verb(tmp_path / "missing.onnx", tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()
