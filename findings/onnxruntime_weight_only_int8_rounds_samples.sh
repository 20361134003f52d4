#!/usr/bin/env bash
# onnxruntime: the float32 product with a dequantised int8 weight rounds its other operand to eight bits, too.
#
# Expected: DequantizeLinear of a constant int8 weight, then MatMul with float32 samples, is a float32 product, as the
# operators' definitions and onnxruntime without optimizations have it; results differ by float32 rounding.
# Seen: from the extended level on, which is on by default, the two become one MatMulNBits whose accuracy level (4 if
# session.qdq_matmulnbits_accuracy_level says nothing else) lets it round the samples: results are off by 0.4 % of the
# largest. With the session entry set to 0 or 1 they are those of float32 again.
#
# Versions: onnxruntime 1.31.1, onnx 1.23.2, Python 3.11. Seen on 2026-11-30, on an AMD EPYC (Zen 3).
# Output seen:
#     no optimization: MatMul of DequantizeLinear, off by 4e-07 of the largest
#     by default: MatMulNBits, off by 4e-03 of the largest
#     by default, accuracy level 1: MatMulNBits, off by 4e-07 of the largest
# Exit status 0 while this is so, 1 once it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet onnx==1.23.2 onnxruntime==1.31.1 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" -W ignore - 2>/dev/null <<'PYTHON'
import sys

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

INPUTS, OUTPUTS = 256, 64
rng = np.random.default_rng(0)
steps = rng.integers(-127, 128, (INPUTS, OUTPUTS)).astype(np.int8)
scales = ((1 + rng.random(OUTPUTS)) / 127).astype(np.float32)
nodes = [
    helper.make_node("DequantizeLinear", ["steps", "scales", "zeros"], ["weight"], axis=1),
    helper.make_node("MatMul", ["x", "weight"], ["y"]),
]
arrays = {"steps": steps, "scales": scales, "zeros": np.zeros(OUTPUTS, np.int8)}
graph = helper.make_graph(
    nodes,
    "weight only",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", INPUTS])],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", OUTPUTS])],
    [numpy_helper.from_array(array, name) for name, array in arrays.items()],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
onnx.checker.check_model(model)
x = rng.standard_normal((8, INPUTS)).astype(np.float32)
exact = x.astype(np.float64) @ (steps * scales.astype(np.float64))


def run(title, level, accuracy=None):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = level
    options.optimized_model_filepath = "optimized.onnx"
    if accuracy is not None:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", accuracy)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    error = np.abs(session.run(None, {"x": x})[0] - exact).max() / np.abs(exact).max()
    kinds = [node.op_type for node in onnx.load("optimized.onnx").graph.node]
    print(f"{title}: {' of '.join(reversed(kinds))}, off by {error:.0e} of the largest")
    return kinds, error


levels = onnxruntime.GraphOptimizationLevel
plain = run("no optimization", levels.ORT_DISABLE_ALL)
usual = run("by default", levels.ORT_ENABLE_ALL)
exactly = run("by default, accuracy level 1", levels.ORT_ENABLE_ALL, "1")
as_described = usual[0] == ["MatMulNBits"] and plain[1] < 1e-5 and exactly[1] < 1e-5 and 1e-3 < usual[1] < 1e-1
print("as described" if as_described else "this has changed")
sys.exit(not as_described)
PYTHON
