#!/usr/bin/env bash
# ONNX Runtime: session.x64quantprecision makes files with samples of int8 fail to load.
#
# The option asks for exact sums where a processor with AVX2, but without VNNI, adds products of uint8 and int8 within
# 16 bits. It does so by storing weights of int8 as uint8.
#
# Expected: a QLinearConv whose samples and weights are int8, which ONNX Runtime computes without the option, is
# computed with it, too: its weights stay int8, as no operator takes int8 by uint8.
# Seen: the weights become uint8, and the session fails with "Failed to find kernel for QLinearConv".
#
# Versions: onnxruntime 1.31.1, onnx 1.23.2, Python 3.11. Seen on 2026-11-30, on a processor with AVX2 alone.
# Output seen:
#     without: opened; with: NotImplemented
# Exit status 0 while this is so, 1 once it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet onnx==1.23.2 onnxruntime==1.31.1 numpy==2.4.6
cd "$work"
cat > run.py <<'PYTHON'
import sys

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

weight = np.random.default_rng(0).integers(-127, 127, (8, 4, 3, 3)).astype(np.int8)
arrays = {"w": weight, "s": np.array(0.1, np.float32), "z": np.array(0, np.int8), "w_z": np.array(0, np.int8)}
node = helper.make_node("QLinearConv", ["x", "s", "z", "w", "s", "w_z", "s", "z"], ["y"])
x_info = helper.make_tensor_value_info("x", TensorProto.INT8, [1, 4, 9, 9])
y_info = helper.make_tensor_value_info("y", TensorProto.INT8, [1, 8, 7, 7])
constants = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
graph = helper.make_graph([node], "graph", [x_info], [y_info], constants)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9).SerializeToString()


def result(exact):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.x64quantprecision", exact)
    try:
        onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        return type(error).__name__
    return "opened"


seen = f"without: {result('0')}; with: {result('1')}"
print(seen)
sys.exit(seen != sys.argv[1])
PYTHON
"$work/venv/bin/python" run.py "without: opened; with: NotImplemented"
