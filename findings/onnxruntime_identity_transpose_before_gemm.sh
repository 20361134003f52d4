#!/usr/bin/env bash
# ONNX Runtime before 1.30: a Transpose that changes nothing, in front of a MatMul and an Add.
#
# Expected: Transpose with perm [0, 1] of a matrix is that matrix, so that y = x W + b.
# Seen: with the default optimisations, ONNX Runtime 1.29 makes one Gemm of the three that transposes x, whatever perm
# says. It fails in its first run if x is not square ("GEMM: Dimension mismatch"), and returns another result without a
# word if it is. Seen in 1.17.3, 1.19.2 to 1.29.0; 1.30.0 is right, and so are all with the optimisations turned off.
#
# Versions: onnxruntime 1.29.0 and 1.30.0, onnx 1.23.2, Python 3.11. Seen on 2026-11-29.
# Output seen:
#     onnxruntime 1.29.0, x (4, 7): InvalidArgument; x (7, 7): wrong; x (7, 7), not optimised: right
#     onnxruntime 1.30.0, x (4, 7): right; x (7, 7): right; x (7, 7), not optimised: right
# Exit status 0 while this is so, 1 once it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet onnx==1.23.2 onnxruntime==1.29.0 numpy==2.4.6
cd "$work"
cat > run.py <<'PYTHON'
import sys

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

weight = np.random.default_rng(0).standard_normal((7, 5)).astype(np.float32)
bias = np.ones(5, np.float32)
nodes = [
    helper.make_node("Transpose", ["x"], ["same"], perm=[0, 1]),
    helper.make_node("MatMul", ["same", "w"], ["product"]),
    helper.make_node("Add", ["product", "b"], ["y"]),
]
x_info = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 7])
y_info = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 5])
constants = [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(bias, "b")]
graph = helper.make_graph(nodes, "graph", [x_info], [y_info], constants)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9).SerializeToString()


def result(rows, optimised):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    x = np.random.default_rng(1).standard_normal((rows, 7)).astype(np.float32)
    try:
        (y,) = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    except Exception as error:
        return type(error).__name__
    return "right" if np.allclose(y, x @ weight + bias, atol=1e-4) else "wrong"


seen = (
    f"x (4, 7): {result(4, True)}; x (7, 7): {result(7, True)}; x (7, 7), not optimised: {result(7, False)}"
)
print(f"onnxruntime {onnxruntime.__version__}, {seen}")
sys.exit(seen != sys.argv[1])
PYTHON
"$work/venv/bin/python" run.py "x (4, 7): InvalidArgument; x (7, 7): wrong; x (7, 7), not optimised: right"
"$work/venv/bin/pip" install --quiet onnxruntime==1.30.0
"$work/venv/bin/python" run.py "x (4, 7): right; x (7, 7): right; x (7, 7), not optimised: right"
