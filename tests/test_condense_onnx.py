"""ONNX files that are sparse already: ``condense_onnx``, on files as exporters and quantisers write them."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from condensing_support import Array, assert_same, condensed_nodes, pruned, random, write
from onnx import TensorProto, helper, numpy_helper

from srigl_fx.errors import ExportError, FormatError
from srigl_fx.onnx_condensing.pipeline import condense_onnx


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("transposed", [0, 1])
def test_gemm(tmp_path: Path, transposed: int, even: bool) -> None:
    weight = pruned(96, 64, even=even)
    arrays = {"w": weight if transposed else np.ascontiguousarray(weight.T), "b": random(96)}
    nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=transposed, alpha=0.5, beta=2.0)]
    source = write(tmp_path / "a.onnx", nodes, arrays, ["n", 64], ["n", 96])
    report = condense_onnx(source, tmp_path / "b.onnx", min_speedup=0)
    assert condensed_nodes(report.path) == ["CondensedLinear"]
    assert_same(source, report.path, random(1, 64), random(7, 64))
    assert report.library_error is not None
    assert "1 of 1 layers condensed" in str(report)
    assert {one.name for one in onnx.load(report.path).graph.initializer} == {
        "w_values",
        "w_indices",
        "w_active",
        "w_bias",
    }


def test_two_of_four(tmp_path: Path) -> None:
    """N:M masks keep half, which is no gain; they are condensed where that is asked for."""
    fours = random(32, 16, 4)
    weight = np.where(np.abs(fours).argsort(axis=2).argsort(axis=2) >= 2, fours, 0).reshape(32, 64)
    nodes = [helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)]
    source = write(tmp_path / "a.onnx", nodes, {"w": weight}, ["n", 64], ["n", 32])
    report = condense_onnx(source, tmp_path / "b.onnx", min_speedup=0)
    assert report.rows[0].sparsity == 0.5
    assert {one.name: list(one.dims) for one in onnx.load(report.path).graph.initializer}["w_values"] == [32, 32]
    assert_same(source, report.path, random(3, 64))


@pytest.mark.parametrize("rank", [2, 3, 4])
def test_matmul_takes_bias_residual_and_activation(tmp_path: Path, rank: int) -> None:
    leading: tuple[int | str, ...] = ("n", 5, "m")[: rank - 1]
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p"]),
        helper.make_node("Add", ["b", "p"], ["q"]),
        helper.make_node("Add", ["q", "x"], ["r"]),
        helper.make_node("Relu", ["r"], ["y"]),
    ]
    arrays = {"w": np.ascontiguousarray(pruned(48, 48).T), "b": random(48)}
    source = write(tmp_path / "a.onnx", nodes, arrays, [*leading, 48], [*leading, 48])
    report = condense_onnx(source, tmp_path / "b.onnx", min_speedup=0)
    assert condensed_nodes(report.path) == ["CondensedLinearAddRelu"]
    assert len(onnx.load(report.path).graph.node) == 1
    assert_same(source, report.path, random(*[2, 5, 3][: rank - 1], 48))


@pytest.mark.parametrize("opset", [11, 13, 14, 17, 18, 20])
def test_a_residual_block_of_any_opset(tmp_path: Path, opset: int) -> None:
    """Convolution, batch normalisation that is folded, and an addition, as ResNets have them."""
    arrays = {
        "w1": pruned(24, 24, 3, 3),
        "w2": pruned(24, 24, 1, 1),
        "b2": random(24),
        **{name: random(24) for name in ("scale", "shift", "mean")},
        "var": np.abs(random(24)) + 0.5,
    }
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["c", "scale", "shift", "mean", "var"], ["d"], epsilon=1e-5),
        helper.make_node("Relu", ["d"], ["e"]),
        helper.make_node("Conv", ["e", "w2", "b2"], ["f"]),
        helper.make_node("Add", ["f", "x"], ["g"]),
        helper.make_node("Relu", ["g"], ["y"]),
    ]
    source = write(tmp_path / "a.onnx", nodes, arrays, ["n", 24, 9, 9], ["n", 24, 9, 9], opset=opset)
    report = condense_onnx(source, tmp_path / "b.onnx", min_speedup=0)
    assert condensed_nodes(report.path) == ["CondensedConvRelu", "CondensedConvAddRelu"]
    assert_same(source, report.path, random(1, 24, 9, 9), random(3, 24, 9, 9))
    onnx.checker.check_model(onnx.load(report.path))


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ((32, 16, 5), {"strides": [2], "pads": [2, 2]}),
        ((32, 8, 3, 3), {"group": 2, "dilations": [2, 1]}),
        ((32, 6, 3, 1, 2), {"pads": [1, 0, 1, 1, 0, 1]}),
        ((32, 16, 3, 3), {"pads": [0, 1, 1, 2], "strides": [2, 2]}),
        ((32, 16, 3, 4), {"auto_pad": "SAME_UPPER"}),
        ((32, 16, 4, 2), {"auto_pad": "SAME_LOWER", "strides": [2, 1]}),
        ((32, 16, 3, 3), {"auto_pad": "VALID", "strides": [2, 1]}),
    ],
)
def test_convolutions_over_one_to_three_axes(tmp_path: Path, shape: tuple[int, ...], settings: dict[str, Any]) -> None:
    channels = shape[1] * settings.get("group", 1)
    sizes = [11, 7, 6][: len(shape) - 2]
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"], **settings)]
    source = write(tmp_path / "a.onnx", nodes, {"w": pruned(*shape)}, [2, channels, *sizes], [None] * len(shape))
    report = condense_onnx(source, tmp_path / "b.onnx", min_speedup=0)
    assert condensed_nodes(report.path) == ["CondensedConv"]
    assert_same(source, report.path, random(2, channels, *sizes))


@pytest.mark.parametrize(("strides", "condensed"), [([1, 1], True), ([2, 1], False)])
def test_padding_by_a_size_that_is_free_must_be_the_same_for_all(
    tmp_path: Path, strides: list[int], condensed: bool
) -> None:
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"], auto_pad="SAME_UPPER", strides=strides)]
    shape: list[int | str | None] = ["n", 16, "h", "w_"]
    source = write(tmp_path / "a.onnx", nodes, {"w": pruned(32, 16, 2, 3)}, shape, [None] * 4)
    if condensed:
        report = condense_onnx(source, tmp_path / "b.onnx", min_speedup=0)
        assert_same(source, report.path, random(2, 16, 5, 7), random(1, 16, 6, 4))
    else:
        with pytest.raises(ExportError, match=r"w: its padding depends on the size of its input \(auto_pad\), which"):
            condense_onnx(source, tmp_path / "b.onnx", min_speedup=0)


def test_weights_that_are_listed_among_the_inputs_are_constants(tmp_path: Path) -> None:
    """As in every file before version 4 of the format; the dense weight is not left in the file."""
    arrays = {"w": np.ascontiguousarray(pruned(96, 64).T)}
    listed = [helper.make_tensor_value_info("w", TensorProto.FLOAT, [64, 96])]
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    source = write(tmp_path / "a.onnx", nodes, arrays, ["n", 64], ["n", 96], opset=9, inputs=listed)
    report = condense_onnx(source, tmp_path / "b.onnx", min_speedup=0)
    model = onnx.load(report.path)
    assert [one.name for one in model.graph.input] == ["x"]
    assert "w" not in {one.name for one in model.graph.initializer}
    assert_same(source, report.path, random(3, 64))


def test_a_file_that_is_condensed_already_is_told(tmp_path: Path) -> None:
    arrays = {"w": np.ascontiguousarray(pruned(96, 64).T), "v": random(96, 8)}
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("MatMul", ["h", "v"], ["y"])]
    source = write(tmp_path / "a.onnx", nodes, arrays, ["n", 64], ["n", 8])
    condense_onnx(source, tmp_path / "b.onnx", min_speedup=0)
    with pytest.raises(ExportError, match=r"nothing more in .*: 1 of its nodes are condensed already; v: 0\.0% of it"):
        condense_onnx(tmp_path / "b.onnx", tmp_path / "c.onnx", min_speedup=0)


def test_half_precision_is_told_what_to_do(tmp_path: Path) -> None:
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["n", size]) for name, size in (("x", 64), ("y", 96))
    )
    weight = numpy_helper.from_array(np.ascontiguousarray(pruned(96, 64).T).astype(np.float16), "w")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), tmp_path / "a.onnx")
    with pytest.raises(ExportError, match="its input is float16, not float32: export the model in float32"):
        condense_onnx(tmp_path / "a.onnx", tmp_path / "b.onnx")


def test_weights_are_seen_through_transpositions_casts_and_dequantisation(tmp_path: Path) -> None:
    """As a quantiser leaves them: int8 with a scale a row; and a half-precision one that is cast."""
    steps = np.clip(np.round(40 * pruned(64, 48)), -127, 127).astype(np.int8)
    arrays: dict[str, Array] = {
        "w8": steps,
        "s": np.abs(random(64)) / 40 + 0.01,
        "zero": np.zeros(64, np.int8),
        "w16": pruned(32, 64, seed=3).astype(np.float16),
    }
    nodes = [
        helper.make_node("DequantizeLinear", ["w8", "s", "zero"], ["w"], axis=0),
        helper.make_node("Transpose", ["w"], ["wt"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "wt"], ["h"]),
        helper.make_node("Tanh", ["h"], ["t"]),
        helper.make_node("Cast", ["w16"], ["v"], to=TensorProto.FLOAT),
        helper.make_node("Gemm", ["t", "v"], ["y"], transB=1),
    ]
    source = write(tmp_path / "a.onnx", nodes, arrays, ["n", 48], ["n", 32], opset=13)
    report = condense_onnx(source, tmp_path / "b.onnx", min_speedup=0)
    assert condensed_nodes(report.path) == ["CondensedLinearTanh", "CondensedLinear"]
    assert [row.name for row in report.rows] == ["w8", "w16"]
    assert_same(source, report.path, random(5, 48))


def test_nodes_that_share_a_weight_share_what_is_condensed(tmp_path: Path) -> None:
    arrays = {"w": np.ascontiguousarray(pruned(48, 48).T), "b": random(48)}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p"]),
        helper.make_node("Relu", ["p"], ["q"]),
        helper.make_node("MatMul", ["q", "w"], ["r"]),
        helper.make_node("Gemm", ["r", "w", "b"], ["y"], transB=1),  # the same numbers, the other way round
    ]
    source = write(tmp_path / "a.onnx", nodes, arrays, ["n", 48], ["n", 48])
    report = condense_onnx(source, tmp_path / "b.onnx", min_speedup=0)
    model = onnx.load(report.path)
    assert [node.op_type for node in model.graph.node] == ["CondensedLinearRelu", "CondensedLinear", "CondensedLinear"]
    first, second, third = (list(node.input[1:]) for node in model.graph.node)
    assert first == second != third
    assert len(model.graph.initializer) == 8
    assert_same(source, report.path, random(3, 48))


def test_a_value_that_others_read_stays(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p"]),
        helper.make_node("Relu", ["p"], ["q"]),
        helper.make_node("Add", ["p", "q"], ["y"]),
    ]
    source = write(tmp_path / "a.onnx", nodes, {"w": pruned(40, 40)}, ["n", 40], ["n", 40])
    report = condense_onnx(source, tmp_path / "b.onnx", min_speedup=0)
    assert [node.op_type for node in onnx.load(report.path).graph.node] == ["CondensedLinear", "Relu", "Add"]
    assert_same(source, report.path, random(4, 40))


def test_tensors_beside_the_file(tmp_path: Path) -> None:
    source = write(
        tmp_path / "a.onnx",
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        {"w": np.ascontiguousarray(pruned(128, 96).T)},
        ["n", 96],
        ["n", 128],
    )
    model = onnx.load(source)
    onnx.save(model, source, save_as_external_data=True, location="a.data", size_threshold=0)
    assert (tmp_path / "a.data").exists()
    report = condense_onnx(source, tmp_path / "b.onnx", min_speedup=0)
    assert report.bytes < 0.5 * (tmp_path / "a.data").stat().st_size
    assert_same(source, report.path, random(4, 96))


def test_what_stays_dense_says_why(tmp_path: Path) -> None:
    uneven = (np.arange(64) < 40 + np.arange(64)[:, None] % 15).astype(np.float32)
    arrays = {
        "few": pruned(64, 64, density=0.8),
        "uneven": uneven,
        "gone": np.zeros((64, 64), np.float32),
        "good": pruned(64, 64),
    }
    nodes = [
        helper.make_node("Gemm", [before, name], [after], transB=1)
        for before, name, after in zip(["x", "a", "b", "c"], arrays, ["a", "b", "c", "y"], strict=True)
    ]
    source = write(tmp_path / "a.onnx", nodes, arrays, ["n", 64], ["n", 64])
    report = condense_onnx(source, tmp_path / "b.onnx", min_sparsity=0.25, min_speedup=0)
    assert {row.name: row.reason.split(":")[0] for row in report.rows} == {
        "few": "20.3% of it is zero, and min_sparsity is 25%",
        "uneven": "its rows keep 40 to 54 of 64 weights",
        "gone": "all of it is zero",
        "good": "",
    }
    assert condense_onnx(source, tmp_path / "c.onnx", min_sparsity=0.1, min_speedup=0).condensed_layers == 2
    with pytest.raises(ExportError, match=r"good: estimated: condensed is 1\.\d+ times as fast as dense at batch 1"):
        condense_onnx(source, tmp_path / "d.onnx", min_speedup=50)
    assert not (tmp_path / "d.onnx").exists()


def with_long_rows(n: int, fan_in: int, *, long: int, short: int = 4) -> Array:
    """Every eighth row keeps many weights, the others few."""
    rng = np.random.default_rng(0)
    counts = np.where(np.arange(n) % 8 == 0, long, short)
    kept = rng.random((n, fan_in)).argsort(axis=1) < counts[:, None]
    return np.where(kept, rng.standard_normal((n, fan_in)), 0).astype(np.float32)


def test_rows_of_like_length_become_nodes_of_their_own(tmp_path: Path) -> None:
    """Where padding would take more than the dense weight: the first node has the residual, the last the activation."""
    arrays = {"w": np.ascontiguousarray(with_long_rows(96, 96, long=90).T), "b": random(96)}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p"]),
        helper.make_node("Add", ["p", "b"], ["q"]),
        helper.make_node("Add", ["q", "x"], ["r"]),
        helper.make_node("Relu", ["r"], ["y"]),
    ]
    source = write(tmp_path / "a.onnx", nodes, arrays, ["n", 5, 96], ["n", 5, 96])
    report = condense_onnx(source, tmp_path / "b.onnx", min_speedup=0)
    assert condensed_nodes(report.path) == ["CondensedLinearAdd", "CondensedLinearAddRelu"]
    assert (report.rows[0].parts, report.rows[0].form) == (2, "condensed, 2 groups of rows")
    assert report.condensed_layers == 1
    stored = {one.name: list(one.dims) for one in onnx.load(report.path).graph.initializer}
    assert (stored["w_rows0_values"], stored["w_rows1_values"]) == ([84, 4], [12, 90])
    assert_same(source, report.path, random(2, 5, 96), random(1, 5, 96))


def test_filters_of_like_length_become_nodes_of_their_own(tmp_path: Path) -> None:
    """Two convolutions of one weight: they share what is stored. Some filters keep nothing."""
    weight = with_long_rows(32, 72, long=70, short=3).reshape(32, 8, 3, 3)
    weight[3:6] = 0
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["p"], pads=[1] * 4, group=2),
        helper.make_node("Relu", ["p"], ["q"]),
        helper.make_node("MaxPool", ["q"], ["r"], kernel_shape=[1, 2], strides=[1, 2]),
        helper.make_node("Conv", ["s", "w", "b"], ["y"], strides=[2, 1], group=2),
    ]
    nodes.insert(3, helper.make_node("Slice", ["r", "start", "end", "axis"], ["s"]))
    arrays: dict[str, Array] = {"w": weight, "b": random(32)}
    arrays |= {"start": np.array([0]), "end": np.array([16]), "axis": np.array([1])}
    source = write(tmp_path / "a.onnx", nodes, arrays, ["n", 16, 7, 8], [None] * 4)
    report = condense_onnx(source, tmp_path / "b.onnx", min_speedup=0)
    assert condensed_nodes(report.path) == [
        "CondensedConv",
        "CondensedConvAddRelu",
        "CondensedConv",
        "CondensedConvAdd",
    ]
    values = [one.name for one in onnx.load(report.path).graph.initializer if one.name.endswith("_values")]
    assert values == ["w_rows0_values", "w_rows1_values"]
    assert_same(source, report.path, random(2, 16, 7, 8))


@pytest.mark.parametrize(("long", "parts"), [(30, 1), (400, 2)])
def test_groups_are_made_where_the_cost_model_has_them_faster(tmp_path: Path, long: int, parts: int) -> None:
    """Padding would be small enough in both cases."""
    weight = with_long_rows(512, 2048, long=long, short=20)
    source = write(
        tmp_path / "a.onnx",
        [helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)],
        {"w": weight},
        ["n", 2048],
        ["n", 512],
    )
    report = condense_onnx(source, tmp_path / "b.onnx", verify=False)
    assert report.rows[0].parts == parts


def test_what_is_no_sparse_file_is_refused_and_leaves_the_target_alone(tmp_path: Path) -> None:
    target = tmp_path / "b.onnx"
    target.write_bytes(b"before")
    with pytest.raises(FormatError, match=r"cannot read .*none\.onnx: No such file"):
        condense_onnx(tmp_path / "none.onnx", target)
    (tmp_path / "text.onnx").write_bytes(b"\x08\x96\x01 not a model at all")
    with pytest.raises(FormatError, match=r"text\.onnx is no ONNX file"):
        condense_onnx(tmp_path / "text.onnx", target)
    source = write(
        tmp_path / "a.onnx", [helper.make_node("Gemm", ["x", "w"], ["y"])], {"w": random(8, 8)}, ["n", 8], ["n", 8]
    )
    with pytest.raises(ExportError, match=r"nothing in .*a\.onnx can be condensed: w: 0\.0% of it is zero"):
        condense_onnx(source, target)
    with pytest.raises(ExportError, match="min_sparsity must lie between 0 and 1"):
        condense_onnx(source, target, min_sparsity=1.0)
    with pytest.raises(ExportError, match='min_speedup must be "auto" or a number'):
        condense_onnx(source, target, min_speedup=-1)
    assert target.read_bytes() == b"before"


def test_inputs_to_compare_with_can_be_given(tmp_path: Path) -> None:
    """Tokens must be within the vocabulary; ones are, and so are those that the caller knows."""
    arrays = {"table": random(11, 32), "w": np.ascontiguousarray(pruned(64, 32).T)}
    nodes = [helper.make_node("Gather", ["table", "ids"], ["e"]), helper.make_node("MatMul", ["e", "w"], ["f"])]
    nodes.append(helper.make_node("Mul", ["f", "x"], ["y"]))
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["n", "length"])
    source = write(tmp_path / "a.onnx", nodes, arrays, [1], ["n", "length", 64], inputs=[ids])
    assert condense_onnx(source, tmp_path / "b.onnx", min_speedup=0).condensed_layers == 1
    given = {"ids": np.array([[3, 10, 0]]), "x": np.ones(1, np.float32)}
    assert condense_onnx(source, tmp_path / "b.onnx", min_speedup=0, example_inputs=given).library_error is not None
    with pytest.raises(ExportError, match="there is no example of the input 'ids'"):
        condense_onnx(source, tmp_path / "b.onnx", min_speedup=0, example_inputs={"x": given["x"]})
    with pytest.raises(ExportError, match="ONNX Runtime cannot run the source on"):
        condense_onnx(source, tmp_path / "b.onnx", min_speedup=0, example_inputs=given | {"ids": np.array([[99]])})


def test_sizes_of_random_inputs_can_be_given(tmp_path: Path) -> None:
    """A file may say that a size is free and take one only."""
    arrays = {"w": np.ascontiguousarray(pruned(64, 32).T), "shape": np.array([-1, 5, 32])}
    nodes = [helper.make_node("Reshape", ["x", "shape"], ["e"]), helper.make_node("MatMul", ["e", "w"], ["f"])]
    nodes.append(helper.make_node("Add", ["f", "more"], ["y"]))
    more = helper.make_tensor_value_info("more", TensorProto.FLOAT, ["n", "length", 64])
    source = write(tmp_path / "a.onnx", nodes, arrays, ["n", "length", 32], ["n", 5, 64], inputs=[more])
    with pytest.raises(ExportError, match=r"where the file needs other sizes .* \(--size NAME=NUMBER\)"):
        condense_onnx(source, tmp_path / "b.onnx", min_speedup=0)
    report = condense_onnx(source, tmp_path / "b.onnx", min_speedup=0, sizes={"length": 5, "n": 3})
    assert report.library_error is not None
    for sizes, message in (
        ({"tokens": 5}, "the source has no free size 'tokens'; those that it has: length, n"),
        ({"length": 0}, "sizes are numbers of at least 1 by their names, got {'length': 0}"),
    ):
        with pytest.raises(ExportError, match=message):
            condense_onnx(source, tmp_path / "b.onnx", min_speedup=0, sizes=sizes)
    with pytest.raises(ExportError, match="sizes are those of random inputs"):
        condense_onnx(source, tmp_path / "b.onnx", sizes={"n": 3}, verify=False)


@pytest.mark.parametrize("density", [0.1, 0.9])
def test_two_convolutions_that_are_added_to_each_other(tmp_path: Path, density: float) -> None:
    """As in a ResNet where the width changes; the first of them may be dense."""
    arrays = {"a": pruned(24, 16, 1, 1, density=density), "b": pruned(24, 16, 3, 3)}
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["p"], name="first"),
        helper.make_node("Conv", ["x", "b"], ["q"], name="second", pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["p", "q"], ["s"], name="sum"),
        helper.make_node("Relu", ["s"], ["y"], name="limited"),
    ]
    source = write(tmp_path / "a.onnx", nodes, arrays, ["n", 16, 5, 5], ["n", 24, 5, 5])
    report = condense_onnx(source, tmp_path / "b.onnx", min_speedup=0)
    assert sorted(node.op_type for node in onnx.load(report.path).graph.node) == (
        ["CondensedConv", "CondensedConvAddRelu"] if density == 0.1 else ["CondensedConvAddRelu", "Conv"]
    )
    assert_same(source, report.path, random(2, 16, 5, 5))


def test_a_graph_that_is_none_is_refused(tmp_path: Path) -> None:
    nodes = [helper.make_node("Transpose", ["w"], ["v"], perm=[1, 0]), helper.make_node("MatMul", ["x", "v"], ["y"])]
    source = write(tmp_path / "a.onnx", nodes, {"w": pruned(40, 40)}, ["n", 40], ["n", 40])
    model = onnx.load(source)
    model.graph.node[0].attribute[0].ints[:] = [0, 7]
    onnx.save(model, source)
    with pytest.raises(FormatError, match=r"the graph of .*a\.onnx cannot be followed"):
        condense_onnx(source, tmp_path / "b.onnx")


@pytest.mark.parametrize("opset", [11, 14])
def test_what_skl2onnx_puts_before_a_network(tmp_path: Path, opset: int) -> None:
    """ONNX infers no shape behind operators of ai.onnx.ml; those that keep the shape of their input have that."""
    nodes = [
        helper.make_node("Scaler", ["x"], ["s"], domain="ai.onnx.ml", offset=[0.5], scale=[2.0]),
        helper.make_node("Cast", ["s"], ["c"], to=TensorProto.FLOAT),
        helper.make_node("Normalizer", ["c"], ["d"], domain="ai.onnx.ml", norm="L2"),
        helper.make_node("MatMul", ["d", "w"], ["y"]),
    ]
    source = write(tmp_path / "a.onnx", nodes, {"w": pruned(64, 48)}, [None, 64], [None, 48], opset=opset)
    report = condense_onnx(source, tmp_path / "b.onnx", min_speedup=0)
    assert condensed_nodes(report.path) == ["CondensedLinear"]
    assert_same(source, report.path, random(1, 64), random(3, 64))


def test_a_model_that_returns_maps_is_refused(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"]),
        helper.make_node("ZipMap", ["y"], ["z"], domain="ai.onnx.ml", classlabels_int64s=[0, 1]),
    ]
    source = write(tmp_path / "a.onnx", nodes, {"w": pruned(64, 2)}, [None, 64], [None, 2])
    model = onnx.load(source)
    number = helper.make_tensor_type_proto(TensorProto.FLOAT, [])
    kind = helper.make_sequence_type_proto(helper.make_map_type_proto(TensorProto.INT64, number))
    model.graph.output.append(helper.make_value_info("z", kind))
    onnx.save(model, source)
    with pytest.raises(ExportError, match=r"'z' of .*a\.onnx is a map, .*'zipmap': False"):
        condense_onnx(source, tmp_path / "b.onnx")
    assert not (tmp_path / "b.onnx").exists()


def test_a_deep_graph_is_read_once(tmp_path: Path) -> None:
    """Each node has two inputs that are computed, so that following all of them would take 2**60 steps."""
    nodes = [helper.make_node("Add", [f"h{i}", f"h{i}"], [f"h{i + 1}"]) for i in range(60)]
    ends = helper.make_node("Identity", ["x"], ["h0"]), helper.make_node("MatMul", ["h60", "w"], ["y"])
    source = write(tmp_path / "a.onnx", [ends[0], *nodes, ends[1]], {"w": pruned(40, 40)}, ["n", 40], ["n", 40])
    assert condense_onnx(source, tmp_path / "b.onnx", min_speedup=0).condensed_layers == 1


def test_constants_that_grow_without_end_are_none(tmp_path: Path) -> None:
    """Each is joined of two of the one before: the last would have 2**60 times as many numbers."""
    nodes = [helper.make_node("Concat", ["w", "none"], ["h0"], axis=1)]
    nodes += [helper.make_node("Slice", ["w", "zero", "zero", "axis"], ["none"])]
    nodes.reverse()
    for i in range(60):  # of the same size, and read twice each
        nodes += [
            helper.make_node("Slice", [f"h{i}", "zero", "zero", "axis"], [f"n{i}"]),
            helper.make_node("Concat", [f"h{i}", f"n{i}"], [f"h{i + 1}"], axis=1),
        ]
    twice = [helper.make_node("Concat", ["h60", "h60"], ["d0"], axis=1)]
    twice += [helper.make_node("Concat", [f"d{i}", f"d{i}"], [f"d{i + 1}"], axis=1) for i in range(59)]
    cut = helper.make_node("Slice", ["d59", "zero", "forty", "axis"], ["v"])
    ends = helper.make_node("MatMul", ["x", "h60"], ["p"]), helper.make_node("MatMul", ["p", "v"], ["y"])
    numbers = {"zero": np.array([0]), "forty": np.array([40]), "axis": np.array([1])}
    arrays = {"w": pruned(40, 40), **numbers}
    source = write(tmp_path / "a.onnx", [*nodes, *twice, cut, *ends], arrays, ["n", 40], ["n", 40])
    report = condense_onnx(source, tmp_path / "b.onnx", min_speedup=0, verify=False)
    assert [(row.name, row.condensed) for row in report.rows] == [("w", True)]
