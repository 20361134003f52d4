"""Merging and densifying what one file cannot hold: with a smaller limit, and weights inside the sources or beside."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from condensing_support import Array, pruned, random, write
from onnx import TensorProto, helper

from srigl_fx import onnx_tools
from srigl_fx.errors import ExportError, FormatError
from srigl_fx.onnx_condensing.pipeline import condense_onnx
from srigl_fx.onnx_export import weights
from srigl_fx.onnx_export.file import all_nodes
from srigl_fx.runtime import load

X = random(3, 64)


def sources(folder: Path, *, is_beside: bool) -> tuple[Path, Path]:
    """A condensed layer, and two dense ones of which the second is in a branch."""
    dense = write(
        folder / "dense.onnx",
        [helper.make_node("Gemm", ["x", "w", "b"], ["y"])],
        {"w": np.ascontiguousarray(pruned(96, 64).T), "b": random(96)},
        ["n", 64],
        ["n", 96],
    )
    condense_onnx(dense, folder / "a.onnx", min_speedup=0, verify=False, external_data=is_beside)
    branches = []
    for name in ("then", "else"):
        constant = onnx.numpy_helper.from_array(random(80, 48), f"{name}_v")
        made = helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, ["n", 48])
        node = helper.make_node("MatMul", ["h", f"{name}_v"], [f"{name}_y"])
        branches.append(helper.make_graph([node], name, [], [made], [constant]))
    chosen = helper.make_node("If", ["c"], ["y"], then_branch=branches[0], else_branch=branches[1])
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), chosen]
    arrays = {"w": random(96, 80), "c": np.array(True)}
    head = write(folder / "b.onnx", nodes, arrays, ["n", 96], ["n", 48])
    if is_beside:
        onnx.save(onnx.load(head), head, save_as_external_data=True, location="b.weights", size_threshold=2000)
    return folder / "a.onnx", head


def run(path: Path, x: Array) -> Array:
    session = load(path)
    found: Array = session.run(None, {session.get_inputs()[0].name: x})[0]
    return found


def assert_near(found: Array, wanted: Array) -> None:
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6 * np.abs(wanted).max())


@pytest.mark.long
@pytest.mark.parametrize("is_beside", [True, False])
@pytest.mark.parametrize("limit", [20_000, weights.LARGEST_FILE])
def test_files_that_hold_too_much_for_one(
    is_beside: bool, limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = sources(tmp_path, is_beside=is_beside)
    wanted = run(second, run(first, X))
    before = {one: one.read_bytes() for one in tmp_path.iterdir()}
    monkeypatch.setattr(weights, "LARGEST_FILE", limit)
    both, flat = tmp_path / "both.onnx", tmp_path / "flat.onnx"
    onnx_tools.merge(first, second, both, {"y": "x"}, prefixes=("a_", "b_"))
    assert_near(run(both, X), wanted)
    assert [node.op_type for node in all_nodes(onnx.load(both).graph) if node.domain] == ["CondensedLinear"]
    onnx_tools.densify(both, flat)
    assert_near(run(flat, X), wanted)
    assert not any(node.domain for node in all_nodes(onnx.load(flat).graph))
    found = {path.stem: len(list(tmp_path.glob(f"{path.name}.*.data"))) for path in (both, flat)}
    assert found == dict.fromkeys(("both", "flat"), 1 if limit == 20_000 else 0)
    assert {one: one.read_bytes() for one in before} == before
    assert len(list(tmp_path.iterdir())) == len(before) + 2 + sum(found.values())


def test_a_file_is_densified_in_its_own_place(tmp_path: Path) -> None:
    first, _ = sources(tmp_path, is_beside=True)
    wanted = run(first, X)
    onnx_tools.densify(first, first)
    assert_near(run(first, X), wanted)
    assert not list(tmp_path.glob("a.onnx.*"))


def test_weights_of_a_source_are_not_written_over(tmp_path: Path) -> None:
    first, second = sources(tmp_path, is_beside=True)
    before = (tmp_path / "b.weights").read_bytes()
    with pytest.raises(ExportError, match=r"b\.weights: the source keeps tensors in it"):
        onnx_tools.merge(first, second, tmp_path / "b.weights", {"y": "x"}, prefixes=("a_", "b_"))
    assert (tmp_path / "b.weights").read_bytes() == before


VERBS = {
    "merge": lambda folder: onnx_tools.merge(folder / "a.onnx", folder / "b.onnx", folder / "c.onnx", {"y": "x"}),
    "densify": lambda folder: onnx_tools.densify(folder / "b.onnx", folder / "c.onnx"),
}


@pytest.mark.parametrize("verb", VERBS)
def test_weights_that_are_missing_are_named(verb: str, tmp_path: Path) -> None:
    sources(tmp_path, is_beside=True)
    (tmp_path / "b.weights").unlink()
    with pytest.raises(FormatError, match=r"lies in b\.weights, which is missing or no file"):
        VERBS[verb](tmp_path)
    assert not (tmp_path / "c.onnx").exists()
