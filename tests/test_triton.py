"""Model folders for Triton: the configuration, read back by Triton's own schema, and what lies beside it.

The server itself is no package; what its ONNX Runtime backend does with the folder is done here: the library is
registered by the path in the configuration, and the file opened with it.
"""

import functools
import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from condensing_support import pruned, random
from google.protobuf import text_format
from onnx import TensorProto, helper, numpy_helper

import srigl_fx as sx
from srigl_fx import onnx_tools
from srigl_fx.errors import ExportError, FormatError
from srigl_fx.onnx_condensing.pipeline import condense_onnx
from srigl_fx.onnx_export.limits import limit_sizes
from srigl_fx.onnx_export.triton import requested
from srigl_fx.passes.sizes import Size


def model(
    path: Path, x: list[Any], y: list[Any], *, element: int = TensorProto.FLOAT, op: str = "Identity", **saved: Any
) -> Path:
    """A file from ``x`` to ``y`` of one node."""
    weight = numpy_helper.from_array(pruned(48, 48).T.copy(), "w")
    node = helper.make_node(op, ["x", "w"] if op == "MatMul" else ["x"], ["y"])
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", element, x)],
        [helper.make_tensor_value_info("y", element, y)],
        [weight] if op == "MatMul" else [],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path, **saved)
    return path


@functools.cache
def _schema() -> Any:
    """Triton's schema, out of its client; the rest of the client wants gRPC, and is not imported."""
    (client,) = importlib.util.find_spec("tritonclient").submodule_search_locations  # type: ignore[union-attr, misc]
    spec = importlib.util.spec_from_file_location("model_config_pb2", Path(client, "grpc", "model_config_pb2.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def configuration(folder: Path) -> Any:
    """What Triton reads."""
    return text_format.Parse((folder / "config.pbtxt").read_text(encoding="utf-8"), _schema().ModelConfig())


@pytest.mark.slow
def test_a_condensed_file(tmp_path: Path, library: Path) -> None:
    source = model(tmp_path / "dense.onnx", ["batch", 48], ["batch", 48], op="MatMul")
    condense_onnx(source, tmp_path / "sparse.onnx", min_speedup=0)
    (tmp_path / "models").mkdir()
    folder = onnx_tools.triton_model(
        tmp_path / "sparse.onnx", tmp_path / "models", served_from=str(tmp_path / "models"), threads=2
    )
    assert folder == tmp_path / "models" / "sparse"
    found = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert found == ["1/model.onnx", "config.pbtxt", "libsrigl_fx.so"]
    assert os.listdir(tmp_path / "models") == ["sparse"]

    text = (folder / "config.pbtxt").read_text()
    options = ort.SessionOptions()
    options.register_custom_ops_library(text.partition('op_library_filename: "')[2].partition('"')[0])
    session = ort.InferenceSession(folder / "1" / "model.onnx", options, providers=["CPUExecutionProvider"])
    stock = ort.InferenceSession(source, providers=["CPUExecutionProvider"])
    (got,), (expected,) = (one.run(None, {"x": random(5, 48)}) for one in (session, stock))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())

    read = configuration(folder)
    assert (read.name, read.backend, read.max_batch_size) == ("sparse", "onnxruntime", 64)
    assert read.HasField("dynamic_batching")
    assert [(one.name, one.data_type, list(one.dims)) for one in read.input] == [("x", 11, [48])]  # TYPE_FP32
    assert read.parameters["intra_op_thread_count"].string_value == "2"
    assert list(read.model_operations.op_library_filename) == [str(folder / "libsrigl_fx.so")]
    assert [one.kind for one in read.instance_group] == [2]  # KIND_CPU


@pytest.mark.parametrize(
    ("x", "y", "options", "batch", "dims"),
    [
        (["n", 3, "side"], ["n", 3, "side"], {}, 64, [3, -1]),
        (["n", 3], ["n", 3], {"max_batch_size": 8}, 8, [3]),
        (["n", 3], ["n", 3], {"max_batch_size": 0}, 0, [-1, 3]),
        (["n", 3], ["m", 3], {}, 0, [-1, 3]),
        ([2, 3], [2, 3], {}, 0, [2, 3]),
        ([None, 3], [None, 3], {}, 0, [-1, 3]),
        (["n"], ["n"], {}, 64, [1]),
    ],
)
def test_sizes(
    tmp_path: Path, x: list[Any], y: list[Any], options: dict[str, int], batch: int, dims: list[int]
) -> None:
    folder = onnx_tools.triton_model(model(tmp_path / "a.onnx", x, y), tmp_path, name="m", **options)  # type: ignore[arg-type]
    text = (folder / "config.pbtxt").read_text()
    assert f"max_batch_size: {batch}\n" in text
    assert text.count(f"  dims: [ {', '.join(map(str, dims))} ]\n") == 2
    assert ("reshape" in text) == (len(x) == (1 if batch else 0))
    assert "model_operations" not in text  # nothing in the file needs the library
    assert ("dynamic_batching" in text) == (batch > 0)
    read = configuration(folder)
    assert [list(one.dims) for one in (*read.input, *read.output)] == [dims, dims]


@pytest.mark.parametrize(
    ("limit", "asked", "batch"),
    [
        ((1, 16), None, 16),
        ((1, 16), 16, 16),
        ((1, 16), 0, 0),
        ((1, 16), 17, "max_batch_size=17 is none that the file takes: its batches are from 1 to 16"),
        ((1, 100), None, 64),
        ((1, None), 200, 200),
        ((2, None), None, 0),
        ((2, None), 8, 8),
        ((2, None), 1, "its batches are from 2 on"),
    ],
)
def test_batches_keep_to_the_limits_of_the_file(
    tmp_path: Path, limit: tuple[int, int | None], asked: int | None, batch: int | str
) -> None:
    path = model(tmp_path / "a.onnx", ["n", "m"], ["n", "m"])
    limited = onnx.load(path)
    limit_sizes(limited, [{1: Size.named("m"), 0: Size.named("n")}], {"n": limit, "m": (1, 3)})
    for node in limited.graph.node:
        node.name = f"a_{node.name}"  # as tools that join files do
    onnx.save(limited, path)
    if isinstance(batch, str):
        with pytest.raises(ExportError, match=batch):
            onnx_tools.triton_model(path, tmp_path, max_batch_size=asked)
    else:
        text = (onnx_tools.triton_model(path, tmp_path, max_batch_size=asked) / "config.pbtxt").read_text()
        assert f"max_batch_size: {batch}\n" in text


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_each_limit_of_an_input_is_checked(tmp_path: Path, order: tuple[int, ...]) -> None:
    path = model(tmp_path / "a.onnx", ["a", "b", "c"], ["a", "b", "c"])
    limited = onnx.load(path)
    limit_sizes(limited, [{axis: Size.named("abc"[axis]) for axis in order}], dict.fromkeys("abc", (2, 4)))
    onnx.checker.check_model(limited)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(limited.SerializeToString(), options, providers=["CPUExecutionProvider"])
    x = random(2, 4, 3)
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], x)
    for axis, name in enumerate("abc"):
        for size in (1, 5):
            shape = [3, 3, 3]
            shape[axis] = size
            with pytest.raises(Exception, match=f"the size {name} must be from 2 to 4"):
                session.run(None, {"x": random(*shape)})


def test_a_batch_that_is_none_is_refused_before_there_is_a_file(tmp_path: Path) -> None:
    for wrong in (-1, 1 << 31, True, "4"):
        with pytest.raises(ExportError, match="max_batch_size must be a whole number of at least 0"):
            requested({"repository": tmp_path, "max_batch_size": wrong}, Path("a.onnx"))


@pytest.mark.parametrize(
    ("element", "name"),
    [
        (TensorProto.INT64, "TYPE_INT64"),
        (TensorProto.FLOAT16, "TYPE_FP16"),
        (TensorProto.BOOL, "TYPE_BOOL"),
        (TensorProto.STRING, "TYPE_STRING"),
    ],
)
def test_types_of_elements(tmp_path: Path, element: int, name: str) -> None:
    folder = onnx_tools.triton_model(model(tmp_path / "a.onnx", ["n"], ["n"], element=element), tmp_path)
    assert (folder / "config.pbtxt").read_text().count(f"data_type: {name}\n") == 2


@pytest.mark.parametrize(
    ("x", "element", "words"),
    [
        ([], TensorProto.FLOAT, "the input 'x' has no axes, which Triton holds only where it batches requests"),
        ([0, 3], TensorProto.FLOAT, "the input 'x', which has an axis of size 0"),
        (["n", -5], TensorProto.FLOAT, "the input 'x', which has an axis of size -5"),
        (["n"], TensorProto.BFLOAT16, "Triton cannot hold the input 'x', which is BFLOAT16"),
        (["n"], 77, "Triton cannot hold the input 'x', which is unknown"),
    ],
)
def test_what_triton_cannot_hold(tmp_path: Path, x: list[Any], element: int, words: str) -> None:
    with pytest.raises(ExportError, match=words):
        onnx_tools.triton_model(model(tmp_path / "a.onnx", x, x, element=element), tmp_path)
    assert os.listdir(tmp_path) == ["a.onnx"]


def test_names_are_quoted(tmp_path: Path) -> None:
    path = model(tmp_path / "a.onnx", ["n", 2], ["n", 2])
    changed = onnx.load(path)
    changed.graph.input[0].name = changed.graph.node[0].input[0] = 'in"put\\é\n'
    onnx.save(changed, path)
    assert configuration(onnx_tools.triton_model(path, tmp_path)).input[0].name == 'in"put\\é\n'


def test_tensors_beside_the_file_come_along(tmp_path: Path) -> None:
    saved: dict[str, Any] = {"save_as_external_data": True, "location": "weights.bin", "size_threshold": 0}
    path = model(tmp_path / "a.onnx", ["n", 48], ["n", 48], op="MatMul", **saved)
    folder = onnx_tools.triton_model(path, tmp_path)
    session = ort.InferenceSession(folder / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": random(2, 48)})[0].shape == (2, 48)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(FormatError, match=r"keeps tensors in .*weights.bin, which is missing"):
        onnx_tools.triton_model(path, tmp_path, name="b")
    changed = onnx.load(path, load_external_data=False)
    changed.graph.initializer[0].external_data[0].value = "../weights.bin"
    onnx.save(changed, path)
    with pytest.raises(FormatError, match=r"'\.\./weights\.bin', which is no file of its own folder"):
        onnx_tools.triton_model(path, tmp_path, name="b")
    assert sorted(os.listdir(tmp_path)) == ["a", "a.onnx"]


def test_tensors_of_branches_come_along(tmp_path: Path) -> None:
    """The branches of an ``If`` keep theirs in a file of their own."""
    branches = []
    for name in ("then", "else"):
        value = numpy_helper.from_array(np.full((1, 3), len(name), np.float32), f"{name}_value")
        out = helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3])
        identity = helper.make_node("Identity", [f"{name}_value"], [name])
        branches.append(helper.make_graph([identity], name, [], [out], [value]))
    node = helper.make_node("If", ["x"], ["y"], then_branch=branches[0], else_branch=branches[1])
    inputs = [helper.make_tensor_value_info("x", TensorProto.BOOL, [1])]
    graph = helper.make_graph([node], "g", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3])])
    changed = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    data = b""
    for attribute in changed.graph.node[0].attribute:
        tensor = attribute.g.initializer[0]
        place = {"location": "branches.bin", "offset": str(len(data)), "length": str(len(tensor.raw_data))}
        data += tensor.raw_data
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, text in place.items():
            tensor.external_data.add(key=key, value=text)
    (tmp_path / "branches.bin").write_bytes(data)
    onnx.save(changed, tmp_path / "a.onnx")
    folder = onnx_tools.triton_model(tmp_path / "a.onnx", tmp_path)
    session = ort.InferenceSession(folder / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": np.array([True])})[0].tolist() == [[4, 4, 4]]

    os.rename(tmp_path / "branches.bin", tmp_path / "model.onnx")
    for attribute in changed.graph.node[0].attribute:
        attribute.g.initializer[0].external_data[0].value = "model.onnx"
    onnx.save(changed, tmp_path / "b.onnx")
    with pytest.raises(
        ExportError, match=r"in a file that is called model\.onnx, as Triton calls the model: rename it"
    ):
        onnx_tools.triton_model(tmp_path / "b.onnx", tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "a/b"}, "'a/b' cannot be the name of a model"),
        ({"name": ".."}, "cannot be the name"),
        ({"served_from": "models"}, 'absolute path such as "/models"'),
        ({"threads": 0}, "threads must be a whole number of at least 1"),
        ({"name": "a" * 129}, "cannot be the name of a model: up to 128 letters"),
        ({"max_batch_size": 1 << 31}, "max_batch_size must be a whole number of at least 0 and less than"),
        ({"max_batch_size": -1}, "max_batch_size must be a whole number of at least 0"),
        ({"max_batch_size": 4}, "needs one free leading size in all inputs and outputs, and they are: x n, y fixed"),
    ],
)
def test_wrong_arguments_leave_nothing(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    path = model(tmp_path / "a.onnx", ["n", 3], [None, 3])
    with pytest.raises(ExportError, match=words):
        onnx_tools.triton_model(path, tmp_path, **options)
    assert os.listdir(tmp_path) == ["a.onnx"]


def test_a_folder_that_is_there_stays(tmp_path: Path) -> None:
    path = model(tmp_path / "a.onnx", ["n", 3], ["n", 3])
    with pytest.raises(ExportError, match="there is no folder"):
        onnx_tools.triton_model(path, tmp_path / "nowhere")
    onnx_tools.triton_model(path, tmp_path)
    before = (tmp_path / "a" / "config.pbtxt").read_text()
    with pytest.raises(ExportError, match="exists already; remove it, or give the model another name"):
        onnx_tools.triton_model(path, tmp_path, max_batch_size=2)
    assert (tmp_path / "a" / "config.pbtxt").read_text() == before
    (tmp_path / "empty.onnx").write_bytes(b"")
    with pytest.raises(FormatError, match="holds no graph"):
        onnx_tools.triton_model(tmp_path / "empty.onnx", tmp_path)


def stored_beside(path: Path) -> Path:
    """A file whose one weight lies in ``weights.bin`` beside it."""
    saved: dict[str, Any] = {"save_as_external_data": True, "location": "weights.bin", "size_threshold": 0}
    return model(path, ["n", 48], ["n", 48], op="MatMul", **saved)


def test_links_are_followed_where_models_keep_their_files_only(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    real = stored_beside(tmp_path / "blobs" / "a.onnx")
    (tmp_path / "snapshot").mkdir()  # as downloads are kept: links to one folder
    for name in ("a.onnx", "weights.bin"):
        (tmp_path / "snapshot" / name).symlink_to(tmp_path / "blobs" / name)
    folder = onnx_tools.triton_model(tmp_path / "snapshot" / "a.onnx", tmp_path, name="m")
    kept = folder / "1" / "weights.bin"
    assert not kept.is_symlink()
    assert kept.read_bytes() == (tmp_path / "blobs" / "weights.bin").read_bytes()

    (tmp_path / "weights.bin").symlink_to(tmp_path / "blobs" / "weights.bin")
    os.rename(real, tmp_path / "b.onnx")
    with pytest.raises(FormatError, match=r"weights\.bin, a link to another folder, of which nothing is copied"):
        onnx_tools.triton_model(tmp_path / "b.onnx", tmp_path)
    assert not (tmp_path / "b").exists()


def test_an_operator_of_another_version_is_named(tmp_path: Path) -> None:
    made = onnx.load(model(tmp_path / "a.onnx", ["n", 3], ["n", 3]))
    made.opset_import.append(helper.make_opsetid("srigl_fx", 1))
    made.graph.node[0].op_type, made.graph.node[0].domain = "CondensedLinearSine", "srigl_fx"
    onnx.save(made, tmp_path / "a.onnx")
    with pytest.raises(ExportError, match=r"calls CondensedLinearSine, which is no operator of the library"):
        onnx_tools.triton_model(tmp_path / "a.onnx", tmp_path)
    body = helper.make_node("Identity", ["x"], ["y"])
    opsets = [helper.make_opsetid("", 18)]
    made.functions.append(helper.make_function("srigl_fx", "CondensedLinearSine", ["x"], ["y"], [body], opsets))
    onnx.save(made, tmp_path / "a.onnx")  # a tool has renamed a function: it runs as such, without the library
    assert (
        "model_operations" not in (onnx_tools.triton_model(tmp_path / "a.onnx", tmp_path) / "config.pbtxt").read_text()
    )


def sparse() -> torch.nn.Module:
    return sx.sparsify(torch.nn.Sequential(torch.nn.Linear(8, 6)), sparsity=0.5).eval()


@pytest.mark.long
def test_export_writes_the_folder_beside_the_file(tmp_path: Path, library: Path) -> None:
    (tmp_path / "models").mkdir()
    options = {"repository": tmp_path / "models", "served_from": "/srv", "max_batch_size": 8, "name": "net"}
    report = sx.export_onnx(sparse(), tmp_path / "a.onnx", (torch.ones(2, 8),), min_speedup=0, triton=options)
    assert report.triton == tmp_path / "models" / "net"
    assert f"for Triton: {report.triton}" in str(report)
    assert report.as_dict()["triton"] == str(report.triton)
    assert (report.triton / "1" / "model.onnx").read_bytes() == report.path.read_bytes()
    assert (report.triton / "libsrigl_fx.so").read_bytes() == library.read_bytes()
    read = configuration(report.triton)
    assert (read.name, read.max_batch_size) == ("net", 8)
    assert [(one.name, list(one.dims)) for one in (*read.input, *read.output)] == [("input", [8]), ("output", [6])]
    assert list(read.model_operations.op_library_filename) == ["/srv/net/libsrigl_fx.so"]
    plain = sx.export_onnx(
        sparse(), tmp_path / "b.onnx", (torch.ones(2, 8),), min_speedup=0, triton=tmp_path / "models"
    )
    assert plain.triton == tmp_path / "models" / "b"
    assert configuration(plain.triton).max_batch_size == 64


@pytest.mark.long
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"repository": ".", "size": 3}, "triton has no option 'size'; there are repository, name, served_from"),
        ({"threads": 3}, "triton needs the folder of all models"),
        ("nowhere", "there is no folder 'nowhere'"),
        (5, "triton must be a folder, or a dict"),
        ({"repository": ".", "name": "taken"}, "exists already; remove it"),
        ({"repository": ".", "threads": 0}, "threads must be a whole number"),
        ({"repository": ".", "max_batch_size": -1}, "max_batch_size must be a whole number"),
    ],
)
def test_what_triton_cannot_have_leaves_no_file(
    given: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    with pytest.raises(ExportError, match=words):
        sx.export_onnx(sparse(), "a.onnx", (torch.ones(2, 8),), min_speedup=0, verify=False, triton=given)
    assert os.listdir(tmp_path) == ["taken"]
