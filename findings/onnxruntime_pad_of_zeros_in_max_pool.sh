#!/usr/bin/env bash
# ONNX Runtime: zeros that a Pad writes before a MaxPool become the MaxPool's own padding, and no longer count.
#
# Expected: `Pad` by 0 and then `MaxPool` without padding gives at least 0 in each window that reaches over a border.
# Seen: with the basic graph optimisations, which are on by default, both become one MaxPool with `pads`. Its padding is
# below all numbers, so that windows of negative numbers give a negative number. Padding by 1 or by minus infinity, and
# `AveragePool`, are computed as they are written. torch.onnx writes this pair for `F.max_pool2d(F.pad(x, ...), ...)`.
#
# Versions: onnx 1.23.2, onnxruntime 1.31.1, numpy 2.4.6, Python 3.11. Seen on 2026-12-01.
# Output seen:
#     without optimisations: corner 0.0; with the basic ones: corner -1.0; nodes left: ['MaxPool']
#     padded by 1: corner 1.0 and 1.0
# Exit status 0 while this is so, 1 once it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet onnx==1.23.2 onnxruntime==1.31.1 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - <<'PYTHON'
import sys

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

LEVELS = onnxruntime.GraphOptimizationLevel


def corner(value, level):
    nodes = [
        helper.make_node("Pad", ["x", "pads", "value"], ["padded"]),
        helper.make_node("MaxPool", ["padded"], ["y"], kernel_shape=[2, 2], strides=[1, 1]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1, 3, 3])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 1, 4, 4])
    constants = [
        numpy_helper.from_array(np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64), "pads"),
        numpy_helper.from_array(np.array(value, np.float32), "value"),
    ]
    opset = [helper.make_opsetid("", 18)]
    model = helper.make_model(helper.make_graph(nodes, "graph", [x], [y], constants), opset_imports=opset, ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level, options.optimized_model_filepath = level, "optimised.onnx"
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"x": np.full((1, 1, 3, 3), -1, np.float32)})
    return float(got[0, 0, 0, 0])


plain, basic = corner(0.0, LEVELS.ORT_DISABLE_ALL), corner(0.0, LEVELS.ORT_ENABLE_BASIC)
left = [node.op_type for node in onnx.load("optimised.onnx").graph.node]
ones = corner(1.0, LEVELS.ORT_DISABLE_ALL), corner(1.0, LEVELS.ORT_ENABLE_BASIC)
seen = [
    f"without optimisations: corner {plain}; with the basic ones: corner {basic}; nodes left: {left}",
    f"padded by 1: corner {ones[0]} and {ones[1]}",
]
print(*seen, sep="\n")
as_described = seen == [
    "without optimisations: corner 0.0; with the basic ones: corner -1.0; nodes left: ['MaxPool']",
    "padded by 1: corner 1.0 and 1.0",
]
print("as described" if as_described else "this has changed")
sys.exit(not as_described)
PYTHON
