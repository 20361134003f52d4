"""``condense_onnx`` on files of eight bits: samples and weights between QuantizeLinear and DequantizeLinear."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from condensing_support import Array, assert_same, condensed_nodes, pruned, random, write
from onnx import TensorProto, helper, numpy_helper

from srigl_fx import onnx_tools
from srigl_fx.errors import ExportError
from srigl_fx.onnx_condensing.pipeline import condense_onnx
from srigl_fx.onnx_condensing.trial import relative_error
from srigl_fx.runtime import load
from srigl_fx.runtime.ort.abi import DOMAIN


def rounded(array: Array, scale: Array, zero: int = 0, dtype: Any = np.int8) -> Array:
    """Floats as bytes, by one scale or one for each row."""
    limits = np.iinfo(dtype)
    wide = np.reshape(scale, (-1, *[1] * (array.ndim - 1))) if np.size(scale) > 1 else scale
    return (np.rint(array / wide) + zero).clip(limits.min, limits.max).astype(dtype)


def around(
    source: str, name: str, scale: float, zero: int, dtype: Any, arrays: dict[str, Array]
) -> list[onnx.NodeProto]:
    """The two nodes that round a value of a graph: it is called name + "_dq" behind them."""
    arrays |= {f"{name}_s": np.array(scale, np.float32), f"{name}_z": np.array(zero, dtype)}
    names = [f"{name}_s", f"{name}_z"]
    return [
        helper.make_node("QuantizeLinear", [source, *names], [f"{name}_q"], name=f"{name}_q"),
        helper.make_node("DequantizeLinear", [f"{name}_q", *names], [f"{name}_dq"], name=f"{name}_dq"),
    ]


def dequantised_weight(weight: Array, arrays: dict[str, Array], *, per_channel: bool, dtype: Any) -> onnx.NodeProto:
    """As ONNX Runtime's static quantisation leaves a weight (n, ...): symmetric, called w_dq behind its node."""
    flat = np.abs(weight.reshape(len(weight), -1))
    scale = np.asarray(flat.max(axis=1) if per_channel else flat.max(), np.float32) / np.float32(127)
    zero = 128 if dtype == np.uint8 else 0
    arrays |= {"w": rounded(weight, scale, zero, dtype), "w_s": scale, "w_z": np.full(scale.shape, zero, dtype)}
    return helper.make_node("DequantizeLinear", ["w", "w_s", "w_z"], ["w_dq"], axis=0)


_SAMPLES = [(np.uint8, 128), (np.uint8, 0), (np.uint8, 113), (np.int8, 0), (np.int8, -128), (np.int8, -7)]


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize(("dtype", "zero"), _SAMPLES)
def test_a_gemm_between_bytes_is_one_of_eight_bits(tmp_path: Path, dtype: Any, zero: int, per_channel: bool) -> None:
    """With the file's own numbers: nothing but the order of float sums differs."""
    arrays: dict[str, Array] = {"b": random(96)}
    weight = dequantised_weight(pruned(96, 64), arrays, per_channel=per_channel, dtype=np.int8)
    nodes = [
        *around("x", "x", 0.02, zero, dtype, arrays),
        weight,
        helper.make_node("Gemm", ["x_dq", "w_dq", "b"], ["h"], transB=1, alpha=0.5),
        helper.make_node("Relu", ["h"], ["y"]),
    ]
    source = write(tmp_path / "a.onnx", nodes, arrays, ["n", 64], ["n", 96], opset=13)
    report = condense_onnx(source, tmp_path / "b.onnx", min_speedup=0)
    model = onnx.load(report.path)
    assert [node.op_type for node in model.graph.node] == ["QuantizeLinear", "CondensedLinearInt8Relu"]
    (values,) = (numpy_helper.to_array(one) for one in model.graph.initializer if one.name == "w_values")
    assert values.dtype == np.int8
    assert np.array_equal(np.sort(values[values != 0]), np.sort(arrays["w"][arrays["w"] != 0]))
    assert (report.rows[0].eight_bits, report.rows[0].reason) == (True, "")
    assert report.library_error is not None
    assert report.library_error < 1e-6
    assert report.fallback_error is not None
    assert report.fallback_error < 1e-6
    assert "condensed, int8" in str(report)
    assert_same(source, report.path, random(1, 64), 9 * random(7, 64))


@pytest.mark.parametrize("opset", [11, 13, 14, 19])
@pytest.mark.parametrize(("dtype", "zero", "eight_bits"), [(np.uint8, 128, True), (np.uint8, 7, False)])
def test_a_convolution_as_sparseml_writes_it(
    tmp_path: Path, opset: int, dtype: Any, zero: int, eight_bits: bool
) -> None:
    """Its float weight is rounded in the graph. A zero point that padding has not is left to float32."""
    arrays: dict[str, Array] = {"v": pruned(24, 16, 3, 3), "b": random(24)}
    nodes = [
        *around("x", "x", 0.02, zero, dtype, arrays),
        *around("v", "w", 0.03, 0, np.int8, arrays),
        helper.make_node("Conv", ["x_dq", "w_dq", "b"], ["y"], pads=[1, 1, 1, 1]),
    ]
    source = write(tmp_path / "a.onnx", nodes, arrays, ["n", 16, 7, 5], ["n", 24, 7, 5], opset=opset)
    report = condense_onnx(source, tmp_path / "b.onnx", min_speedup=0)
    assert condensed_nodes(report.path) == ["CondensedConvInt8" if eight_bits else "CondensedConv"]
    assert report.rows[0].eight_bits is eight_bits
    reason = "" if eight_bits else "in float32: its input has the zero point 7, and is padded"
    assert report.rows[0].reason == reason
    assert "v" not in {one.name for one in onnx.load(report.path).graph.initializer}
    assert_same(source, report.path, random(1, 16, 7, 5), 9 * random(3, 16, 7, 5))


def test_a_convolution_without_padding_takes_any_zero_point(tmp_path: Path) -> None:
    arrays: dict[str, Array] = {}
    weight = dequantised_weight(pruned(24, 8, 3, 3), arrays, per_channel=True, dtype=np.uint8)
    nodes = [*around("x", "x", 0.02, 113, np.uint8, arrays), weight]
    nodes.append(helper.make_node("Conv", ["x_dq", "w_dq"], ["y"], group=2, strides=[2, 1]))
    source = write(tmp_path / "a.onnx", nodes, arrays, ["n", 16, 7, 5], [None] * 4, opset=13)
    report = condense_onnx(source, tmp_path / "b.onnx", min_speedup=0)
    assert condensed_nodes(report.path) == ["CondensedConvInt8"]
    assert_same(source, report.path, random(2, 16, 7, 5))


def block(path: Path, dtype: Any = np.int8) -> Path:
    """Two layers that read the same bytes, an addition of what is rounded, and a layer behind that."""
    arrays: dict[str, Array] = {"b": (100 * random(48)).astype(np.int32), "b_s": np.array(0.001, np.float32)}
    nodes = around("x", "x", 0.02, 0, dtype, arrays)
    for i in range(3):
        part: dict[str, Array] = {}
        nodes.append(dequantised_weight(pruned(48, 48, seed=i), part, per_channel=True, dtype=np.int8))
        nodes[-1].input[:], nodes[-1].output[:] = [f"w{i}", f"w{i}_s", f"w{i}_z"], [f"w{i}_dq"]
        arrays |= {name.replace("w", f"w{i}"): array for name, array in part.items()}
    nodes += [
        helper.make_node("DequantizeLinear", ["b", "b_s"], ["b_dq"]),
        helper.make_node("Gemm", ["x_dq", "w0_dq", "b_dq"], ["p"], transB=1),
        helper.make_node("Gemm", ["x_dq", "w1_dq"], ["q"], transB=1),
        *around("p", "p", 0.05, 3, np.int8, arrays),
        *around("q", "q", 0.05, 0, np.int8, arrays),
        helper.make_node("Add", ["p_dq", "q_dq"], ["r"]),
        helper.make_node("Relu", ["r"], ["s"]),
        *around("s", "s", 0.05, -128, np.int8, arrays),
        helper.make_node("Gemm", ["s_dq", "w2_dq"], ["y"], transB=1),
    ]
    return write(path, nodes, arrays, ["n", 48], ["n", 48], opset=13)


def test_layers_that_read_the_same_bytes_share_them(tmp_path: Path) -> None:
    source = block(tmp_path / "a.onnx")
    report = condense_onnx(source, tmp_path / "b.onnx", min_speedup=0)
    graph = onnx.load(report.path).graph
    layers = [node for node in graph.node if node.domain == DOMAIN]
    assert [node.op_type for node in layers] == ["CondensedLinearInt8"] * 3
    assert layers[0].input[0] == layers[1].input[0] == "x_q_uint8"
    assert sum(node.op_type == "QuantizeLinear" for node in graph.node) == 4
    assert report.allowed_error == 0.02  # what is behind a condensed layer is rounded
    assert "allowed 2e-02" in str(report)


def test_what_is_rounded_again_is_rounded_as_before_nearly_everywhere(tmp_path: Path) -> None:
    """The tolerance allows for a step that falls to the other side, and outputs show that these are few."""
    source = block(tmp_path / "a.onnx")
    report = condense_onnx(source, tmp_path / "b.onnx", min_speedup=0)
    x = 2 * random(200, 48)
    sessions = ort.InferenceSession(str(source), providers=["CPUExecutionProvider"]), load(report.path)
    expected, got = (session.run(None, {"x": x})[0] for session in sessions)
    apart = np.abs(got - expected) / np.abs(expected).max()
    assert apart.max() < 0.02
    assert (apart > 1e-5).mean() < 0.02


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"x_s": np.full(64, 0.02, np.float32), "x_z": np.zeros(64, np.uint8)}, "its input has several scales"),
        ({"x_s": np.float32(1e-38)}, "the scale of its input is no scale of eight bits"),
        ({"w_s": -np.ones(96, np.float32)}, "the scales of its weight are not all finite and positive"),
        ({"w_z": np.full(96, -3, np.int8)}, "its weight holds 130 steps, and -128 to 127 can be stored"),
    ],
)
def test_what_eight_bits_cannot_carry_is_condensed_in_float32(
    tmp_path: Path, change: dict[str, Array], reason: str
) -> None:
    arrays: dict[str, Array] = {}
    weight = dequantised_weight(pruned(96, 64), arrays, per_channel=True, dtype=np.int8)
    nodes = [*around("x", "x", 0.02, 0, np.uint8, arrays), weight]
    nodes.append(helper.make_node("Gemm", ["x_dq", "w_dq"], ["y"], transB=1))
    arrays |= change
    if "w_z" in change:  # zeros stay zeros
        arrays["w"] = np.where(arrays["w"] == 0, -3, arrays["w"]).astype(np.int8)
    source = write(tmp_path / "a.onnx", nodes, arrays, ["n", 64], ["n", 96], opset=13)
    report = condense_onnx(source, tmp_path / "b.onnx", min_speedup=0)
    assert condensed_nodes(report.path) == ["CondensedLinear"]
    assert report.rows[0].reason == f"in float32: {reason}"


def test_a_weight_of_minus_128_is_multiplied_with(tmp_path: Path) -> None:
    """Our own rounding makes none, but that of PyTorch does; tools that read the file know it, too."""
    arrays: dict[str, Array] = {}
    weight = dequantised_weight(pruned(96, 64), arrays, per_channel=True, dtype=np.int8)
    arrays["w"] = np.where(np.abs(arrays["w"].astype(int)) == 127, -128, arrays["w"]).astype(np.int8)
    nodes = [*around("x", "x", 0.02, 128, np.uint8, arrays), weight]
    nodes.append(helper.make_node("Gemm", ["x_dq", "w_dq"], ["y"], transB=1))
    source = write(tmp_path / "a.onnx", nodes, arrays, ["n", 64], ["n", 96], opset=13)
    report = condense_onnx(source, tmp_path / "b.onnx", min_speedup=0)
    assert condensed_nodes(report.path) == ["CondensedLinearInt8"]
    assert_same(source, report.path, 9 * random(20, 64))
    onnx_tools.densify(report.path, tmp_path / "c.onnx")
    assert_same(source, tmp_path / "c.onnx", 9 * random(20, 64))


def test_rows_of_like_length_are_nodes_of_eight_bits(tmp_path: Path) -> None:
    """The bias, with what the zero point adds to all rows, is in the first of them."""
    arrays: dict[str, Array] = {"b": random(256)}
    kept = np.arange(2048) < np.where(np.arange(256) % 8 == 0, 1000, 20)[:, None]
    floats = np.where(kept, pruned(256, 2048, density=1.0), 0).astype(np.float32)
    weight = dequantised_weight(floats, arrays, per_channel=True, dtype=np.int8)
    nodes = [*around("x", "x", 0.02, 100, np.uint8, arrays), weight]
    nodes.append(helper.make_node("Gemm", ["x_dq", "w_dq", "b"], ["y"], transB=1))
    source = write(tmp_path / "a.onnx", nodes, arrays, ["n", 2048], ["n", 256], opset=13)
    report = condense_onnx(source, tmp_path / "b.onnx", min_speedup=0)
    assert report.rows[0].form == "condensed, int8, 2 groups of rows"
    assert condensed_nodes(report.path) == ["CondensedLinearInt8", "CondensedLinearInt8Add"]
    assert_same(source, report.path, random(5, 2048))


def test_scales_within_an_output_are_left_to_float32(tmp_path: Path) -> None:
    """Of a MatMul's weight (F, n), those along F."""
    arrays: dict[str, Array] = {}
    steps = rounded(pruned(96, 64), np.array(0.03, np.float32))
    arrays |= {"w": np.ascontiguousarray(steps.T), "w_s": np.abs(random(64)) + 0.01, "w_z": np.zeros(64, np.int8)}
    nodes = around("x", "x", 0.02, 0, np.uint8, arrays)
    nodes.append(helper.make_node("DequantizeLinear", ["w", "w_s", "w_z"], ["w_dq"], axis=0))
    nodes.append(helper.make_node("MatMul", ["x_dq", "w_dq"], ["y"]))
    source = write(tmp_path / "a.onnx", nodes, arrays, ["n", 5, 64], ["n", 5, 96], opset=13)
    report = condense_onnx(source, tmp_path / "b.onnx", min_speedup=0)
    assert report.rows[0].reason == "in float32: the scales of its weight differ within an output"
    arrays |= {"w_s": np.abs(random(96)) + 0.01, "w_z": np.zeros(96, np.int8)}
    nodes[-2].attribute[0].i = 1
    source = write(tmp_path / "a.onnx", nodes, arrays, ["n", 5, 64], ["n", 5, 96], opset=13)
    report = condense_onnx(source, tmp_path / "b.onnx", min_speedup=0)
    assert condensed_nodes(report.path) == ["CondensedLinearInt8"]
    assert_same(source, report.path, random(2, 5, 64))


def test_int8_that_no_node_of_the_file_rounds_is_rounded_once_more(tmp_path: Path) -> None:
    """To the same numbers, 128 more; two layers share that."""
    arrays: dict[str, Array] = {"x_s": np.array(0.02, np.float32), "x_z": np.array(-7, np.int8)}
    weight = dequantised_weight(pruned(96, 64), arrays, per_channel=False, dtype=np.int8)
    nodes = [helper.make_node("Cast", ["x"], ["x_q"], to=TensorProto.INT8)]
    nodes += [helper.make_node("DequantizeLinear", ["x_q", "x_s", "x_z"], ["x_dq"]), weight]
    nodes.append(helper.make_node("Gemm", ["x_dq", "w_dq"], ["p"], transB=1))
    nodes.append(helper.make_node("Gemm", ["x_dq", "w_dq"], ["q"], transB=1, alpha=0.5))
    nodes.append(helper.make_node("Sub", ["p", "q"], ["y"]))
    source = write(tmp_path / "a.onnx", nodes, arrays, ["n", 64], ["n", 96], opset=13)
    report = condense_onnx(source, tmp_path / "b.onnx", min_speedup=0)
    assert condensed_nodes(report.path) == ["CondensedLinearInt8"] * 2
    assert [row.reason for row in report.rows] == ["", ""]
    assert sum(node.op_type == "QuantizeLinear" for node in onnx.load(report.path).graph.node) == 1
    assert_same(source, report.path, (100 * random(3, 64)).clip(-128, 127))


def test_a_layer_of_eight_bits_must_beat_dense_eight_bits(tmp_path: Path) -> None:
    arrays: dict[str, Array] = {}
    weight = dequantised_weight(pruned(96, 64, density=0.4), arrays, per_channel=False, dtype=np.int8)
    nodes = [*around("x", "x", 0.02, 0, np.uint8, arrays), weight]
    nodes.append(helper.make_node("Gemm", ["x_dq", "w_dq"], ["y"], transB=1))
    source = write(tmp_path / "a.onnx", nodes, arrays, ["n", 64], ["n", 96], opset=13)
    with pytest.raises(ExportError, match=r"w: estimated: condensed is 0\.\d+ times as fast as dense int8 at batch 1"):
        condense_onnx(source, tmp_path / "b.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("activations", ["QUInt8", "QInt8"])
def test_files_of_the_static_quantisation_of_onnxruntime(tmp_path: Path, activations: str, per_channel: bool) -> None:
    """Convolutions, one behind a pool, and a classifier, calibrated and quantised by the tool itself."""
    quantization = pytest.importorskip("onnxruntime.quantization")
    arrays = {"w1": pruned(16, 8, 3, 3), "w2": pruned(24, 16, 3, 3), "w3": pruned(10, 24, density=0.3)}
    arrays |= {"b1": random(16), "b2": random(24), "b3": random(10)}
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c"], pads=[1, 1, 1, 1], name="c"),
        helper.make_node("Relu", ["c"], ["d"], name="d"),
        helper.make_node("MaxPool", ["d"], ["p"], kernel_shape=[2, 2], strides=[2, 2], name="p"),
        helper.make_node("Conv", ["p", "w2", "b2"], ["e"], name="e"),
        helper.make_node("Relu", ["e"], ["f"], name="f"),
        helper.make_node("GlobalAveragePool", ["f"], ["g"], name="g"),
        helper.make_node("Flatten", ["g"], ["h"], name="h"),
        helper.make_node("Gemm", ["h", "w3", "b3"], ["y"], transB=1, name="y"),
    ]
    write(tmp_path / "float.onnx", nodes, arrays, ["n", 8, 8, 8], ["n", 10], opset=13)

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.batches = iter([{"x": random(4, 8, 8, 8)}])

        def get_next(self) -> Any:
            return next(self.batches, None)

    quantization.quantize_static(
        str(tmp_path / "float.onnx"),
        str(tmp_path / "a.onnx"),
        Reader(),
        quant_format=quantization.QuantFormat.QDQ,
        activation_type=quantization.QuantType[activations],
        weight_type=quantization.QuantType.QInt8,
        per_channel=per_channel,
    )
    report = condense_onnx(tmp_path / "a.onnx", tmp_path / "b.onnx", min_speedup=0)
    assert report.condensed_layers == 3
    # The first one's input has a zero point of its own, and is padded; all others read what is behind a Relu.
    assert [row.eight_bits for row in report.rows] == [False, True, True]
    assert "its input has the zero point" in report.rows[0].reason
    assert report.library_error is not None
    assert report.library_error < 0.01


def test_a_layer_that_is_refused_anyway_says_why(tmp_path: Path) -> None:
    """Same padding of free sizes has no numbers, and bytes with an odd zero point ask for them."""
    arrays: dict[str, Array] = {}
    weight = dequantised_weight(pruned(16, 8, 3, 3), arrays, per_channel=True, dtype=np.int8)
    nodes = [
        *around("x", "x", 0.02, 113, np.uint8, arrays),
        weight,
        helper.make_node("Conv", ["x_dq", "w_dq"], ["y"], auto_pad="SAME_UPPER", strides=[2, 2]),
    ]
    path = write(tmp_path / "model.onnx", nodes, arrays, x=["n", 8, "h", "w"], y=["n", 16, "p", "q"])
    with pytest.raises(ExportError, match="padding"):
        condense_onnx(path, tmp_path / "out.onnx", min_speedup=0)


def test_numbers_that_are_none_are_no_small_difference() -> None:
    plain, nan = np.array([1.0, -2.0]), np.array([1.0, np.nan])
    infinite = np.array([np.inf, 1.0])
    assert relative_error(plain, plain) == relative_error(nan, nan) == relative_error(infinite, infinite) == 0.0
    assert (
        relative_error(plain, nan)
        == relative_error(nan, plain)
        == relative_error(infinite, -infinite)
        == relative_error(plain, infinite)
        == np.inf
    )
    assert relative_error(infinite, np.array([np.inf, 1.5])) == 0.5
