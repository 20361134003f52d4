"""Files that cannot be joined or made dense: errors that name them, and nothing written."""

from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from srigl_fx import onnx_tools
from srigl_fx.errors import ExportError, FormatError


def network(path: Path, sizes: list[Any], kind: int = TensorProto.FLOAT) -> Path:
    """Write a file that takes x and gives y, both of ``sizes``."""
    entries = [helper.make_tensor_value_info(name, kind, sizes) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "graph", entries[:1], entries[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)
    return path


@pytest.mark.parametrize(
    ("sizes", "kind", "said"),
    [
        (["batch", 16], TensorProto.FLOAT, r"float \(batch, 16\)"),
        (["batch", 4, 1], TensorProto.FLOAT, r"float \(batch, 4, 1\)"),
        (["batch", 4], TensorProto.INT64, r"int64 \(batch, 4\)"),
    ],
)
def test_an_output_becomes_an_input_of_its_type_and_sizes_only(
    sizes: list[Any], kind: int, said: str, tmp_path: Path
) -> None:
    first, second = network(tmp_path / "a.onnx", ["batch", 4]), network(tmp_path / "b.onnx", sizes, kind)
    with pytest.raises(ExportError, match=rf"output 'y' is float \(batch, 4\), but the input 'x' .* is {said}"):
        onnx_tools.merge(first, second, tmp_path / "both.onnx", {"y": "x"}, prefixes=("a_", "b_"))
    assert not (tmp_path / "both.onnx").exists()


@pytest.mark.parametrize("sizes", [["n", 4], [2, 4], ["batch", "width"]])
def test_sizes_that_may_be_equal_are_joined(sizes: list[Any], tmp_path: Path) -> None:
    first, second = network(tmp_path / "a.onnx", ["batch", 4]), network(tmp_path / "b.onnx", sizes)
    onnx_tools.merge(first, second, tmp_path / "both.onnx", {"y": "x"}, prefixes=("a_", "b_"))
    assert [entry.name for entry in onnx.load(tmp_path / "both.onnx").graph.input] == ["a_x"]


def test_an_empty_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.onnx").touch()
    whole = network(tmp_path / "a.onnx", [1, 4])
    for before, after in (("empty.onnx", whole.name), (whole.name, "empty.onnx")):
        with pytest.raises(FormatError, match=r"empty\.onnx is no ONNX file, .* holds no graph"):
            onnx_tools.merge(tmp_path / before, tmp_path / after, tmp_path / "out.onnx", {"y": "x"})
    with pytest.raises(FormatError, match=r"empty\.onnx is no ONNX file, .* holds no graph"):
        onnx_tools.densify(tmp_path / "empty.onnx", tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_what_onnx_runtime_refuses_is_said_of_the_file_that_was_given(tmp_path: Path) -> None:
    model = onnx.load(network(tmp_path / "a.onnx", [1, 4]))
    model.graph.node[0].op_type = "Nonsense"
    onnx.save(model, tmp_path / "a.onnx")
    with pytest.raises(FormatError, match=r"a\.onnx") as caught:
        onnx_tools.densify(tmp_path / "a.onnx", tmp_path / "out.onnx")
    assert ".densify-" not in str(caught.value)


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    first = network(tmp_path / "a.onnx", ["batch", 4])
    target = tmp_path / "none" / "b.onnx"
    words = r"there is no folder .*none.*; give the path of a file"
    with pytest.raises(ExportError, match=words):
        onnx_tools.densify(first, target)
    with pytest.raises(ExportError, match=words):
        onnx_tools.merge(first, first, target, {"y": "x"}, prefixes=("a_", "b_"))
    assert list(tmp_path.iterdir()) == [first]
