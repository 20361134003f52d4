"""Weights beside the graph: written by ``export_onnx`` and ``condense_onnx``, and read where nobody vouches."""

import json
import os
import re
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from condensing_support import assert_same, condensed_nodes, pruned, random, write
from onnx import TensorProto, helper
from torch import nn

import srigl_fx as sx
from srigl_fx.errors import ExportError, FormatError
from srigl_fx.onnx_condensing.pipeline import condense_onnx
from srigl_fx.onnx_export import reading, weights
from srigl_fx.onnx_export.file import inspect_file
from srigl_fx.runtime import load


def two_layers(path: Path) -> Path:
    """One is sparse, one is not."""
    arrays = {"w": np.ascontiguousarray(pruned(96, 64).T), "v": random(96, 80), "b": random(96)}
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["h"]),
        helper.make_node("MatMul", ["h", "v"], ["y"]),
    ]
    return write(path, nodes, arrays, ["n", 64], ["n", 80])


def beside(path: Path, location: str = "a.data") -> Path:
    onnx.save(onnx.load(path), path, save_as_external_data=True, location=location, size_threshold=0)
    return path


def own_weights(path: Path) -> list[Path]:
    """The files of weights that are called like a file and by what they hold."""
    return [one for one in path.parent.iterdir() if re.fullmatch(rf"{path.name}\.[0-9a-f]{{16}}\.data", one.name)]


def places(path: Path) -> dict[str, dict[str, str]]:
    return {
        one.name: {entry.key: entry.value for entry in one.external_data}
        for one in onnx.load(path, load_external_data=False).graph.initializer
        if one.data_location == TensorProto.EXTERNAL
    }


@pytest.mark.parametrize("source_beside", [False, True])
def test_weights_go_beside_the_condensed_file(tmp_path: Path, source_beside: bool) -> None:
    """What is not condensed too, but nothing that is small; and one file holds the same."""
    source = two_layers(tmp_path / "a.onnx")
    source = beside(source) if source_beside else source
    report = condense_onnx(source, tmp_path / "b.onnx", min_speedup=0, external_data=True)
    found = places(report.path)
    assert set(found) == {"v", "w_values", "w_indices"}
    assert {one["location"] for one in found.values()} == {one.name for one in own_weights(report.path)}
    assert len(own_weights(report.path)) == 1
    assert all(int(one["offset"]) % 64 == 0 for one in found.values())
    assert report.bytes == inspect_file(report.path).file_bytes > (tmp_path / "b.onnx").stat().st_size
    assert sorted(one.name for one in tmp_path.iterdir() if one.suffix != ".data") == ["a.onnx", "b.onnx"]
    assert_same(source, report.path, random(3, 64))
    whole = condense_onnx(source, tmp_path / "c.onnx", min_speedup=0)
    assert not places(whole.path)
    assert not own_weights(whole.path)
    left, right = (onnx.load(one).graph.initializer for one in (report.path, whole.path))
    assert [one.name for one in left] == [one.name for one in right]
    for one, other in zip(left, right, strict=True):
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(one), onnx.numpy_helper.to_array(other))


def test_a_file_is_condensed_in_its_own_place(tmp_path: Path) -> None:
    source = beside(two_layers(tmp_path / "a.onnx"), "a.onnx.data")
    before = load(source).run(None, {"x": random(3, 64)})[0]
    condense_onnx(source, source, min_speedup=0, external_data=True)
    assert condensed_nodes(source) == ["CondensedLinear"]
    np.testing.assert_allclose(load(source).run(None, {"x": random(3, 64)})[0], before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("asked", "is_beside"), [("auto", True), (False, None)])
def test_what_one_file_cannot_hold_goes_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: Any, is_beside: bool | None
) -> None:
    monkeypatch.setattr(weights, "LARGEST_FILE", 20_000)
    source = two_layers(tmp_path / "a.onnx")
    if is_beside is None:
        with pytest.raises(ExportError, match=r"more than one file holds \(2 GiB\): leave external_data at"):
            condense_onnx(source, tmp_path / "b.onnx", min_speedup=0, external_data=asked)
        assert os.listdir(tmp_path) == ["a.onnx"]
    else:
        condense_onnx(source, tmp_path / "b.onnx", min_speedup=0, external_data=asked)
        assert bool(places(tmp_path / "b.onnx")) is is_beside


def test_nothing_is_left_where_the_result_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = two_layers(tmp_path / "a.onnx")
    condense_onnx(source, tmp_path / "b.onnx", min_speedup=0, external_data=True)
    before = {one: one.read_bytes() for one in tmp_path.iterdir()}
    monkeypatch.setattr("srigl_fx.onnx_condensing.trial.relative_error", lambda *pair: 1.0)
    with pytest.raises(ExportError, match="is off by"):
        condense_onnx(source, tmp_path / "b.onnx", min_speedup=0, external_data=True)
    assert {one: one.read_bytes() for one in tmp_path.iterdir()} == before
    with pytest.raises(ExportError, match='external_data must be True, False or "auto", not 3'):
        condense_onnx(source, tmp_path / "b.onnx", external_data=3)  # type: ignore[arg-type]


@pytest.mark.long
def test_weights_go_beside_an_exported_file(tmp_path: Path) -> None:
    """With the same numbers as in one file; a host without the library reads them, too."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 40))
    model = sx.sparsify(model, sparsity=0.8).eval()
    x = torch.randn(3, 48)
    report = sx.export_onnx(model, tmp_path / "a.onnx", (x,), min_speedup=0, external_data=True)
    found = places(tmp_path / "a.onnx")
    assert {one["location"] for one in found.values()} == {one.name for one in own_weights(report.path)}
    assert any(name.endswith("_values") for name in found)
    assert report.library_error is not None
    assert report.fallback_error is not None
    assert report.bytes > (tmp_path / "a.onnx").stat().st_size
    sx.export_onnx(model, tmp_path / "b.onnx", (x,), min_speedup=0)
    assert not places(tmp_path / "b.onnx")
    first, second = (load(tmp_path / name).run(None, {"input": x.numpy()})[0] for name in ("a.onnx", "b.onnx"))
    np.testing.assert_array_equal(first, second)


def test_tensors_are_written_one_by_one(tmp_path: Path) -> None:
    """Each becomes bytes once, after the one before is in the file."""
    order: list[str] = []

    class Watched(ir.Tensor[Any]):
        def tobytes(self) -> bytes:
            order.append(f"{self.name} behind {sum(one.stat().st_size for one in tmp_path.rglob('*.data'))}")
            return super().tobytes()

    arrays = {name: np.full((2**18, 2), i, np.float32) for i, name in enumerate("ab")}
    values = [ir.val(name, const_value=Watched(array, name=name)) for name, array in arrays.items()]
    model = ir.Model(ir.Graph([], [], nodes=[], initializers=values, opset_imports={"": 18}), ir_version=9)
    held = weights.take_out(model)
    with weights.writing(tmp_path / "m.onnx", ir.to_proto(model), held, True):
        pass
    assert order[0] == "a behind 0"
    assert [one["offset"] for one in places(tmp_path / "m.onnx").values()] == ["0", str(2**21)]
    for one in onnx.load(tmp_path / "m.onnx").graph.initializer:
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(one), arrays[one.name])


@pytest.mark.parametrize("is_beside", [True, False])
def test_nothing_is_kept_while_what_is_written_is_checked(tmp_path: Path, is_beside: bool) -> None:
    class Watched(ir.Tensor[Any]):
        """One that can be watched."""

    value = ir.val("a", const_value=Watched(np.ones((32, 32), np.float32), name="a"))
    model = ir.Model(ir.Graph([], [], nodes=[], initializers=[value], opset_imports={"": 18}), ir_version=9)
    held = weights.take_out(model)
    watched = weakref.ref(held["0"])
    proto = ir.to_proto(model)
    with weights.writing(tmp_path / "m.onnx", proto, held, is_beside):
        del held, proto
        assert watched() is None


def test_weights_of_the_source_are_not_written_over(tmp_path: Path) -> None:
    source = beside(two_layers(tmp_path / "a.onnx"), "a.onnx.data")
    before = {one: one.read_bytes() for one in tmp_path.iterdir()}
    with pytest.raises(ExportError, match=r"\.data: the source keeps tensors in it, and would lose them"):
        condense_onnx(source, tmp_path / "a.onnx.data", min_speedup=0, verify=False)
    assert {one: one.read_bytes() for one in tmp_path.iterdir()} == before


def test_weights_of_the_source_stay_where_the_file_before_named_them_too(tmp_path: Path) -> None:
    source = beside(two_layers(tmp_path / "a.onnx"), "b.onnx.data")
    target = Path(shutil.copy(source, tmp_path / "b.onnx"))
    before = (tmp_path / "b.onnx.data").read_bytes()
    for asked in (True, False):
        condense_onnx(source, target, min_speedup=0, verify=False, external_data=asked)
        assert (tmp_path / "b.onnx.data").read_bytes() == before


def constant(path: Path, number: int, *, is_beside: bool = True) -> None:
    """Write a file that says which number its weights hold."""
    value = ir.val("w", const_value=ir.tensor(np.full((32, 32), number, np.float32), name="w"))
    y = ir.node("Identity", [value], name="n")
    graph = ir.Graph([], y.outputs, nodes=[y], initializers=[value], opset_imports={"": 18})
    model = ir.Model(graph, ir_version=9, producer_name=str(number))
    held = weights.take_out(model)
    with weights.writing(path, ir.to_proto(model), held, is_beside):
        pass


def number_of(path: Path) -> int:
    """The number that a file says and its weights hold."""
    model = onnx.load(path)
    held = onnx.numpy_helper.to_array(model.graph.initializer[0])
    assert (held == int(model.producer_name)).all()
    return int(model.producer_name)


def test_weights_go_with_the_graph_that_named_them(tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    others = [tmp_path / name for name in ("b.onnx.data", "a.onnx.0123456789abcdef.data", "a.onnx.data", "a.data")]
    for one in others:  # which the graph does not name
        one.write_bytes(b"")
    constant(path, 1)
    (first,) = [one for one in own_weights(path) if one not in others]
    constant(path, 1)
    assert first.exists()
    constant(path, 2)
    assert number_of(path) == 2
    (second,) = [one for one in own_weights(path) if one not in others]
    assert second != first
    constant(path, 3, is_beside=False)
    assert number_of(path) == 3
    assert sorted(tmp_path.iterdir()) == sorted([path, *others])


@pytest.mark.parametrize("copy", ["b.onnx", "a.onnx.bak"])
def test_weights_stay_where_a_copy_of_their_graph_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copy: str
) -> None:
    monkeypatch.setattr(weights, "_BLOCK", 7)  # names lie across the blocks that are read
    path = tmp_path / "a.onnx"
    constant(path, 1)
    shutil.copy(path, tmp_path / copy)
    (tmp_path / "c.onnx").mkdir()
    (tmp_path / "d.onnx").symlink_to("nowhere")
    constant(path, 2)
    assert (number_of(path), number_of(tmp_path / copy)) == (2, 1)
    assert len(own_weights(path)) == 2
    (tmp_path / copy).unlink()
    constant(path, 3)
    assert number_of(path) == 3
    assert len(own_weights(path)) == 2  # the first ones, which this graph does not name, and its own


def test_weights_of_other_exporters_go_with_their_graph(tmp_path: Path) -> None:
    """Those that torch.onnx calls like the graph, and none that several graphs may share."""
    for location, stays in (("a.onnx.data", False), ("shared.bin", True)):
        constant(tmp_path / "a.onnx", 1, is_beside=False)
        beside(tmp_path / "a.onnx", location)
        constant(tmp_path / "a.onnx", 2)
        assert number_of(tmp_path / "a.onnx") == 2
        assert (tmp_path / location).exists() is stays


KILLED = """
import json, os, sys
from pathlib import Path
import test_weights_beside as tests
from srigl_fx.onnx_export import weights

folder, found = Path(sys.argv[1]), []
for steps in range(4):  # done before the process dies: the weights' name, the graph's, what goes
    path = folder / f"{steps}.onnx"
    tests.constant(path, 1)
    child = os.fork()
    if child == 0:
        left = [steps]
        def counted(step):
            def run(*arguments, **options):
                if left[0] == 0:
                    os._exit(9)
                left[0] -= 1
                return step(*arguments, **options)
            return run
        weights.move_durably, Path.unlink = counted(weights.move_durably), counted(Path.unlink)
        tests.constant(path, 2)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    found.append([os.waitstatus_to_exitcode(status), tests.number_of(path), len(tests.own_weights(path))])
print(json.dumps(found))
"""


@pytest.mark.long
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes that die are forks")
def test_whoever_is_killed_leaves_a_graph_with_its_own_weights(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    # Exit code, the number that graph and weights agree on, and files of weights.
    assert json.loads(done.stdout) == [[9, 1, 1], [9, 1, 2], [9, 2, 2], [0, 2, 1]]


@pytest.mark.parametrize("way", ["links", "hard links", "linked folder"])
def test_weights_are_found_through_links(tmp_path: Path, way: str) -> None:
    """As downloads are kept: a folder of links to files of another one."""
    kept, seen = tmp_path / "blobs", tmp_path / "snapshot"
    kept.mkdir()
    beside(two_layers(kept / "a.onnx"))
    if way == "linked folder":
        seen.symlink_to(kept)
    else:
        seen.mkdir()
        for name in ("a.onnx", "a.data"):
            link = os.symlink if way == "links" else os.link
            link(kept / name, seen / name)
    condense_onnx(seen / "a.onnx", tmp_path / "b.onnx", min_speedup=0)
    whole = shutil.copytree(kept, tmp_path / "whole")  # hard links are copied as files
    assert_same(whole / "a.onnx", tmp_path / "b.onnx", random(3, 64))


def test_tensors_of_sparse_attributes_are_checked(tmp_path: Path) -> None:
    values = helper.make_tensor("v", TensorProto.FLOAT, [1], [1.0])
    indices = helper.make_tensor("i", TensorProto.INT64, [1], [0])
    sparse = helper.make_sparse_tensor(values, indices, [4])
    source = two_layers(tmp_path / "a.onnx")
    model = onnx.load(source)
    model.graph.node.append(helper.make_node("Constant", [], ["s"], sparse_value=sparse))
    tensor = model.graph.node[-1].attribute[0].sparse_tensor.values
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret")
    source.write_bytes(model.SerializeToString())
    with pytest.raises(FormatError, match=r"lies in '\.\./secret', which is no file of its folder"):
        reading.open_model(source)


def outside(path: Path, entries: dict[str, str]) -> None:
    entries["location"] = "../secret"


def absolute(path: Path, entries: dict[str, str]) -> None:
    entries["location"] = str(path.parent / "a.data")


def linked(path: Path, entries: dict[str, str]) -> None:
    secret = path.parent.parent / "secret"
    secret.write_bytes(bytes(100_000))
    (path.parent / "link").symlink_to(secret)
    entries["location"] = "link"


def piped(path: Path, entries: dict[str, str]) -> None:
    os.mkfifo(path.parent / "pipe")
    entries["location"] = "pipe"


def cut_short(path: Path, entries: dict[str, str]) -> None:
    data = path.parent / "a.data"
    data.write_bytes(data.read_bytes()[:1000])


def other(**changes: str) -> Callable[[Path, dict[str, str]], None]:
    return lambda path, entries: entries.update(changes)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (outside, "lies in '../secret', which is no file of its folder"),
        (absolute, "which is no file of its folder"),
        (linked, "lies in 'link', which is no file of its folder"),
        (other(location=""), "lies in '', which is no file of its folder"),
        (other(location="\0"), "which is no file of its folder"),
        (other(location="a.data\0"), "which is no file of its folder"),
        (other(location="../model/../secret"), "which is no file of its folder"),
        (piped, "lies in pipe, which is missing or no file"),
        (other(location="none"), "lies in none, which is missing or no file"),
        (other(location="."), "which is missing or no file"),
        (cut_short, "the file is damaged, or not all of it"),
        (other(offset="-4"), "the file is damaged, or not all of it"),
        (other(length="12"), "the file is damaged, or not all of it"),
        (other(offset="9999999999999999999"), "the file is damaged, or not all of it"),
        (other(offset="0x10"), "which is no place"),
    ],
)
def test_weights_elsewhere_are_refused(
    tmp_path: Path, change: Callable[[Path, dict[str, str]], None], reason: str
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    source = beside(two_layers(folder / "a.onnx"))
    model = onnx.load(source, load_external_data=False)
    tensor = model.graph.initializer[0]
    entries = {entry.key: entry.value for entry in tensor.external_data}
    change(source, entries)
    del tensor.external_data[:]
    for key, text in entries.items():
        tensor.external_data.add(key=key, value=text)
    source.write_bytes(model.SerializeToString())
    with pytest.raises(FormatError, match=reason):
        condense_onnx(source, tmp_path / "b.onnx", min_speedup=0)
    assert not (tmp_path / "b.onnx").exists()


def test_a_type_that_is_none_is_refused(tmp_path: Path) -> None:
    source = beside(two_layers(tmp_path / "a.onnx"))
    model = onnx.load(source, load_external_data=False)
    model.graph.initializer[0].data_type = 99
    source.write_bytes(model.SerializeToString())
    with pytest.raises(FormatError, match="with the type 99, which is no place"):
        condense_onnx(source, tmp_path / "b.onnx")
