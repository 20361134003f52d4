"""``srigl-fx bench FILE``: the four forms of a file, what they are made of, and what is said of them."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from cli_support import assert_readable_error, assert_wrong_usage, document, run
from torch import nn

import srigl_fx as sx
from srigl_fx.cli.bench_file import FileCell, FileTimes, _difference
from srigl_fx.cli.feeds import batch_of, feeds_for
from srigl_fx.cli.forms import DENSE, FORMS, SPARSE, SPARSE_INT8, Form, make_forms
from srigl_fx.cli.timing import medians
from srigl_fx.errors import FormatError


def saved(path: Path, weight: "np.ndarray[tuple[int, int], np.dtype[np.float32]]") -> Path:
    """A file of one MatMul."""
    inputs, outputs = weight.shape
    graph = f"g (float[n,{inputs}] x, float[{inputs},{outputs}] w) => (float[n,{outputs}] y) {{ y = MatMul (x, w) }}"
    model = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["": 18]> {graph}')
    del model.graph.input[1]
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    onnx.save(model, path)
    return path


def weight_with_zeros() -> "np.ndarray[tuple[int, int], np.dtype[np.float32]]":
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((512, 512)).astype(np.float32)
    return np.where(rng.random((512, 512)) < 0.95, np.float32(0), weight)


@pytest.fixture(scope="module")
def condensed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of one network: sparse in float32, and sparse in eight bits."""
    folder = tmp_path_factory.mktemp("bench")
    torch.manual_seed(0)
    model = sx.sparsify(nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512)), sparsity=0.95).eval()
    for name, dtype in (("float32", torch.float32), ("int8", torch.int8)):
        sx.export_onnx(
            model, folder / f"{name}.onnx", (torch.ones(2, 512),), min_speedup=0, verify=False, value_dtype=dtype
        )
    return {name: folder / f"{name}.onnx" for name in ("float32", "int8")}


@pytest.mark.long
def test_a_condensed_file_in_four_forms(condensed: dict[str, Path], tmp_path: Path) -> None:
    found = document("bench", condensed["float32"], "--batch", 1, "--batch", 3, "--seconds", 0.1)
    assert [form["name"] for form in found["forms"]] == list(FORMS)
    assert [form["condensed_layers"] for form in found["forms"]] == [0, 0, 2, 2]
    assert found["forms"][2]["made_by"] == "the file"
    assert found["forms"][2]["difference"] < 1e-5
    assert 1e-4 < found["forms"][1]["difference"] < 0.1
    assert 1e-4 < found["forms"][3]["difference"] < 0.1
    sizes = [form["bytes"] for form in found["forms"]]
    assert sizes[0] > 4 * 2 * 512 * 512
    assert sizes[0] > sizes[1] > sizes[2] > sizes[3]
    assert [cell["batch"] for cell in found["cells"]] == [1, 3]
    for cell in found["cells"]:
        dense, dense_int8, sparse, sparse_int8 = (cell["seconds"][name] for name in FORMS)
        assert cell["gains"]["dense / sparse"] == pytest.approx(dense / sparse)
        assert cell["gains"]["dense_int8 / sparse_int8"] == pytest.approx(dense_int8 / sparse_int8)
        best = min(dense, dense_int8) / min(sparse, sparse_int8)
        assert cell["gains"]["best dense / best sparse"] == pytest.approx(best)


@pytest.mark.long
def test_what_each_form_is_made_of(condensed: dict[str, Path], tmp_path: Path) -> None:
    given = make_forms(condensed["int8"], tmp_path)
    assert [form.made_by for form in given] == [
        "the file, by densify",
        "dense, by quantize_dynamic",
        "dense, by condense",
        "the file",
    ]
    assert [form.condensed_layers for form in given] == [0, 0, 2, 2]
    zeros = make_forms(saved(tmp_path / "zeros.onnx", weight_with_zeros()), tmp_path)
    assert [(form.name, form.condensed_layers) for form in zeros] == list(zip(FORMS, (0, 0, 1, 1), strict=True))
    assert zeros[0].path == tmp_path / "zeros.onnx"


@pytest.mark.slow
def test_a_file_of_eight_bits_has_no_other_forms(tmp_path: Path) -> None:
    """As static quantisation writes it: samples and weights are rounded, which no dense form would be."""
    weight = np.clip(np.round(weight_with_zeros() * 30), -127, 127).astype(np.int8)
    path = saved(tmp_path / "qdq.onnx", weight.astype(np.float32))
    model = onnx.load(path)
    (product,) = model.graph.node
    numbers = {"scale": np.float32(0.02), "zero": np.uint8(128), "w": weight, "w_scale": np.float32(1 / 30)}
    del model.graph.initializer[:]
    model.graph.initializer.extend(onnx.numpy_helper.from_array(np.array(one), name) for name, one in numbers.items())
    rounded = [
        onnx.helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        onnx.helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
        onnx.helper.make_node("DequantizeLinear", ["w", "w_scale"], ["v"]),
    ]
    product.input[:] = ["d", "v"]
    nodes = [*rounded, product]
    model.graph.ClearField("node")
    model.graph.node.extend(nodes)
    onnx.save(model, path)
    found = document("bench", path, "--batch", 2, "--seconds", 0.1)
    assert [(form["name"], form["condensed_layers"]) for form in found["forms"]] == [
        ("dense_int8", 0),
        ("sparse_int8", 1),
    ]
    assert found["forms"][1]["difference"] < 1e-4
    (cell,) = found["cells"]
    assert cell["gains"]["best dense / best sparse"] == cell["gains"]["dense_int8 / sparse_int8"]


@pytest.mark.slow
def test_shapes_that_a_file_tells_of_its_constants_do_not_stop_the_rounding(tmp_path: Path) -> None:
    """As PyTorch's exporter does. ONNX Runtime's tools transpose the weight of a Gemm, and not what is told of it."""
    graph = "g (float[n,96] x, float[32,96] w) => (float[n,32] y) { y = Gemm <transB=1> (x, w) }"
    model = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["": 18]> {graph}')
    model.graph.value_info.append(model.graph.input.pop())
    weight = np.random.default_rng(0).standard_normal((32, 96)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    onnx.save(model, tmp_path / "a.onnx")
    forms = {form.name: form for form in make_forms(tmp_path / "a.onnx", tmp_path)}
    assert forms["dense_int8"].reason == ""
    assert forms["dense_int8"].path is not None


@pytest.mark.long
def test_a_file_without_zeros_has_dense_forms_alone(tmp_path: Path) -> None:
    path = saved(tmp_path / "full.onnx", np.ones((64, 64), np.float32))
    result = run("bench", path, "--batch", 2, "--seconds", 0.1)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[4].split()[:5] == ["sparse", "-", "-", "-", "none:"]
    assert "can be condensed" in lines[4]
    assert "loses" not in result.stdout.lower()
    found = document("bench", path, "--batch", 2, "--seconds", 0.1)
    assert list(found["cells"][0]["seconds"]) == ["dense", "dense_int8"]
    assert set(found["cells"][0]["gains"].values()) == {None}


def test_a_size_that_is_a_sum_is_that_of_its_parts() -> None:
    inputs = [
        SimpleNamespace(name="ids", type="tensor(int64)", shape=["batch", "tokens"]),
        SimpleNamespace(name="mask", type="tensor(int64)", shape=["batch", "past + tokens"]),
        SimpleNamespace(name="keys", type="tensor(float)", shape=["batch", 2, "past", None]),
    ]
    feeds, used = feeds_for(inputs, 3, {"tokens": 1})
    assert [array.shape for array in feeds.values()] == [(3, 1), (3, 65), (3, 2, 64, 64)]
    assert used == {"tokens": 1, "past + tokens": 65, "past": 64}
    feeds, _ = feeds_for(inputs, 3, {"past + tokens": 9})
    assert feeds["mask"].shape == (3, 9)


def test_losing_cells_are_said() -> None:
    seconds = {"dense": 1e-3, "dense_int8": 4e-4, "sparse": 5e-4, "sparse_int8": 5e-4}
    cells = (FileCell(batch=1, seconds={**seconds, "sparse_int8": 2e-4}), FileCell(batch=64, seconds=seconds))
    forms = tuple(Form(name=name, path=Path(name), bytes=1) for name in FORMS)
    text = str(
        FileTimes(file=Path("a"), forms=forms, differences={}, cells=cells, threads=1, sizes={"length": 8}, host="h")
    )
    rows = [line.split() for line in text.splitlines() if line.strip().startswith(("1 ", "64 "))]
    assert rows == [
        ["1", "1", "0.4", "0.5", "0.2", "2.00", "2.00", "2.00"],
        ["64", "1", "0.4", "0.5", "0.5", "2.00", "0.80", "0.80", "loses"],
    ]
    assert "Loses in 2 of 6 cells: dense_int8 / sparse_int8 at batch 64; best dense / best sparse at batch 64." in text
    assert "length 8" in text


def test_a_cell_without_a_form_says_nothing_of_it() -> None:
    cell = FileCell(batch=1, seconds={DENSE: 2.0, SPARSE: 1.0})
    assert cell.gain(DENSE, SPARSE) == 2
    assert cell.gain(DENSE, SPARSE_INT8) is None
    assert cell.best == 2


def entry(name: str, kind: str, *shape: int | str | None) -> object:
    return type("Entry", (), {"name": name, "shape": list(shape), "type": f"tensor({kind})"})


def test_inputs_have_the_sizes_asked_for() -> None:
    inputs = [
        entry("ids", "int64", "batch", "length"),
        entry("scale", "float", 1, None),
        entry("x", "float", "batch", 3),
    ]
    feeds, used = feeds_for(inputs, 5, {"length": 7})
    assert {name: (array.shape, array.dtype.name) for name, array in feeds.items()} == {
        "ids": ((5, 7), "int64"),
        "scale": ((1, 64), "float32"),
        "x": ((5, 3), "float32"),
    }
    assert used == {"length": 7}
    assert feeds["ids"].min() == feeds["ids"].max() == 1
    assert feeds["x"].std() > 0.1
    assert batch_of(inputs) is None
    assert batch_of([entry("x", "float", 4, 3)]) == 4
    assert batch_of([entry("x", "float")]) == 1
    with pytest.raises(FormatError, match="no free size 'tokens'; those that it has: batch, length"):
        feeds_for(inputs, 5, {"tokens": 7})
    with pytest.raises(FormatError, match="the size 'batch' is the batch size: give it as that, with --batch"):
        feeds_for(inputs, 5, {"batch": 7})
    with pytest.raises(FormatError, match=r"'s' is a tensor\(string\)"):
        feeds_for([entry("s", "string", 1)], 1, {})


def test_differences_of_what_is_not_finite() -> None:
    nan, inf = np.nan, np.inf
    for wanted, given, gap in (
        ([2.0, 1.0], [2.0, 0.5], 0.25),
        ([2.0, 1.0], [2.0, nan], inf),
        ([2.0, inf], [1.0, inf], 0.5),
        ([nan, nan], [nan, nan], 0.0),
        ([nan, inf], [1.0, -inf], inf),
        (4.0, 3.0, 0.25),
    ):
        assert _difference([np.array(wanted, np.float32)], [np.array(given, np.float32)]) == gap


def test_medians_go_in_turns() -> None:
    called: list[str] = []
    found = medians({name: partial(called.append, name) for name in "ab"}, seconds=0.0, least=2)
    assert set(found) == {"a", "b"}
    assert "".join(called) == "aabb" + 2 * (6 * "a" + 6 * "b")


def test_what_cannot_be_measured_is_one_line(tmp_path: Path) -> None:
    text = tmp_path / "text.onnx"
    text.write_text("no model")
    assert_readable_error(run("bench", text), "text.onnx")
    assert_readable_error(run("bench", tmp_path / "none.onnx"), "cannot read", "none.onnx")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("a.onnx", "--shape", "64x32"), "of single layers"),
        (("a.onnx", "--size", "length"), "NAME=NUMBER"),
        (("a.onnx", "--size", "length=0"), "NAME=NUMBER"),
        (("a.onnx", "--batch", "0"), "--batch"),
        (("--size", "length=3"), "none is given"),
    ],
)
def test_wrong_usage(options: tuple[str, ...], words: str) -> None:
    assert_wrong_usage(run("bench", *options), words)
