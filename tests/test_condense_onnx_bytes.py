"""``condense_onnx`` on operators that multiply bytes, as ONNX Runtime's quantisation writes them."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from condensing_support import Array, condensed_nodes, pruned, random, write
from onnx import TensorProto, helper

from srigl_fx.errors import ExportError
from srigl_fx.onnx_condensing.pipeline import condense_onnx
from srigl_fx.runtime import load

quantization = pytest.importorskip("onnxruntime.quantization")


def worst(source: Path, condensed: Path, *inputs: Array) -> float:
    """The largest difference, over the largest output, with the library and on a stock ONNX Runtime."""
    found = 0.0
    exact = ort.SessionOptions()
    if any(one.data_type == TensorProto.UINT8 for one in onnx.load(source).graph.initializer):
        # Without VNNI, sums of uint8 times int8 are not exact, else; for int8 times int8 this finds no operator.
        exact.add_session_config_entry("session.x64quantprecision", "1")
    for x in inputs:
        expected, *got = (
            session.run(None, {session.get_inputs()[0].name: x})[0]
            for session in (
                ort.InferenceSession(str(source), exact, providers=["CPUExecutionProvider"]),
                load(condensed),
                ort.InferenceSession(str(condensed), providers=["CPUExecutionProvider"]),
            )
        )
        found = max(found, *(float(np.abs(one - expected).max() / np.abs(expected).max()) for one in got))
    return found


def network(path: Path) -> Path:
    """Convolutions, one behind a pool and one over single pixels, a MatMul and a Gemm."""
    arrays = {"w1": pruned(16, 8, 3, 3), "w2": pruned(24, 16, 3, 3), "w3": pruned(32, 24, 1, 1, density=0.3)}
    arrays |= {"b1": random(16), "b2": random(24), "g": pruned(40, 32, density=0.3)}
    arrays |= {"m": np.ascontiguousarray(pruned(10, 40, density=0.3).T), "c": random(40)}
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], pads=[1, 1, 1, 1], name="c1"),
        helper.make_node("Relu", ["c1"], ["d1"], name="d1"),
        helper.make_node("MaxPool", ["d1"], ["p1"], kernel_shape=[2, 2], strides=[2, 2], name="p1"),
        helper.make_node("Conv", ["p1", "w2", "b2"], ["c2"], name="c2"),
        helper.make_node("Relu", ["c2"], ["d2"], name="d2"),
        helper.make_node("Conv", ["d2", "w3"], ["c3"], name="c3"),
        helper.make_node("GlobalAveragePool", ["c3"], ["q"], name="q"),
        helper.make_node("Flatten", ["q"], ["f"], name="f"),
        helper.make_node("Gemm", ["f", "g", "c"], ["h"], transB=1, alpha=0.5, name="h"),
        helper.make_node("Relu", ["h"], ["r"], name="r"),
        helper.make_node("MatMul", ["r", "m"], ["y"], name="y"),
    ]
    return write(path, nodes, arrays, ["n", 8, 8, 8], ["n", 10], opset=13)


@pytest.mark.long
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("activations", ["QUInt8", "QInt8"])
def test_files_of_static_quantisation_with_operators_of_bytes(
    tmp_path: Path, activations: str, per_channel: bool
) -> None:
    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.batches = iter([{"x": random(4, 8, 8, 8)}])

        def get_next(self) -> Any:
            return next(self.batches, None)

    quantization.quantize_static(
        str(network(tmp_path / "float.onnx")),
        str(tmp_path / "a.onnx"),
        Reader(),
        quant_format=quantization.QuantFormat.QOperator,
        activation_type=quantization.QuantType[activations],
        weight_type=quantization.QuantType.QInt8,
        per_channel=per_channel,
    )
    report = condense_onnx(tmp_path / "a.onnx", tmp_path / "b.onnx", min_speedup=0)
    assert [row.operator for row in report.rows] == ["QLinearConv"] * 3 + ["QGemm", "QLinearMatMul"]
    # The first one's input has a zero point of its own, and is padded.
    assert [row.eight_bits for row in report.rows] == [False, True, True, True, True]
    assert "in float32: its input has the zero point" in report.rows[0].reason
    assert report.rows[1].shape == (24, 16, 3, 3)
    assert len(condensed_nodes(report.path)) == 5
    assert report.allowed_error == 0.02
    assert worst(tmp_path / "a.onnx", report.path, random(1, 8, 8, 8), random(5, 8, 8, 8)) < 0.02


@pytest.mark.long
@pytest.mark.parametrize("weights", ["QInt8", "QUInt8"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_files_of_dynamic_quantisation(tmp_path: Path, weights: str, per_channel: bool) -> None:
    """The same sums of whole numbers; where zeros are padded, floats."""
    quantization.quantize_dynamic(
        str(network(tmp_path / "float.onnx")),
        str(tmp_path / "a.onnx"),
        op_types_to_quantize=["Conv", "MatMul", "Gemm"],
        weight_type=quantization.QuantType[weights],
        per_channel=per_channel,
    )
    report = condense_onnx(tmp_path / "a.onnx", tmp_path / "b.onnx", min_speedup=0)
    assert [row.operator for row in report.rows] == ["ConvInteger"] * 3 + ["Gemm", "MatMulInteger"]
    assert report.rows[0].reason == "in float32: the scale of its input is computed"  # and zeros are padded
    for row in (
        *report.rows[1:3],
        report.rows[4],
    ):  # uint8 around a zero point may be further from it than int8 reaches
        beyond = weights == "QUInt8" and "and -128 to 127 can be stored" in row.reason
        assert row.eight_bits is not beyond
    assert len(condensed_nodes(report.path)) == 5
    assert worst(tmp_path / "a.onnx", report.path, random(1, 8, 8, 8)) < 0.02


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
@pytest.mark.parametrize("several", [False, True])
def test_sums_of_bytes_are_the_same(tmp_path: Path, dtype: Any, several: bool) -> None:
    """A MatMulInteger alone: to the last bit, as all sums are below 2**24; with one zero point for each output, too."""
    rng = np.random.default_rng(0)
    zero = rng.integers(-9, 9, 96) if several else np.array(-3)
    zero = zero if dtype == np.int8 else zero + 128
    weight = np.where(pruned(96, 64) != 0, rng.integers(-90, 90, (96, 64)), 0).T + zero
    arrays: dict[str, Array] = {"w": weight.astype(dtype), "w_z": zero.astype(dtype)}
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["x_q", "x_s", "x_z"]),
        helper.make_node("MatMulInteger", ["x_q", "w", "x_z", "w_z"], ["sums"]),
        helper.make_node("Cast", ["sums"], ["y"], to=TensorProto.FLOAT),
    ]
    source = write(tmp_path / "a.onnx", nodes, arrays, ["n", 5, 64], ["n", 5, 96], opset=13)
    report = condense_onnx(source, tmp_path / "b.onnx", min_speedup=0)
    assert condensed_nodes(report.path) == ["CondensedLinearInt8"]
    assert worst(source, report.path, random(1, 5, 64), random(3, 5, 64) + 2) == 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"to": TensorProto.INT64}, "its sums are not read as float32 alone"),
        ({"x": "computed"}, "the scale or the zero point of its weight is computed"),
        ({"density": 0.9}, "10.9% of it is zero, and min_sparsity is 50%"),
    ],
)
def test_sums_that_stay_say_why(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    density = change.get("density", 0.1)
    weight = np.where(pruned(64, 64, density=density) != 0, 5, 0).T
    arrays: dict[str, Array] = {"w": weight.astype(np.int8)}
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["x_q", "x_s", "x_z"]),
        helper.make_node("MatMulInteger", ["x_q", "w", "x_z"], ["sums"]),
        helper.make_node("Cast", ["sums"], ["z"], to=change.get("to", TensorProto.FLOAT)),
        helper.make_node("Cast", ["z"], ["y"], to=TensorProto.FLOAT),
    ]
    if "x" in change:
        nodes[1].input.append("x_z")
        arrays["w"] = arrays["w"].astype(np.uint8)
    source = write(tmp_path / "a.onnx", nodes, arrays, ["n", 64], ["n", 64], opset=13)
    with pytest.raises(ExportError, match=f"w: {reason}"):
        condense_onnx(source, tmp_path / "b.onnx", min_speedup=0)


def test_operators_of_bytes_must_beat_dense_eight_bits(tmp_path: Path) -> None:
    weight = np.where(pruned(64, 64, density=0.4) != 0, 5, 0).T
    arrays: dict[str, Array] = {"w": weight.astype(np.int8), "s": np.array(0.1, np.float32), "z": np.array(3, np.uint8)}
    arrays["w_z"] = np.array(0, np.int8)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["x_q"]),
        helper.make_node("QLinearMatMul", ["x_q", "s", "z", "w", "s", "w_z", "s", "z"], ["y_q"]),
        helper.make_node("DequantizeLinear", ["y_q", "s", "z"], ["y"]),
    ]
    source = write(tmp_path / "a.onnx", nodes, arrays, ["n", 64], ["n", 64], opset=13)
    with pytest.raises(ExportError, match=r"w: estimated: condensed is 0\.\d+ times as fast as the QLinearMatMul"):
        condense_onnx(source, tmp_path / "b.onnx")
