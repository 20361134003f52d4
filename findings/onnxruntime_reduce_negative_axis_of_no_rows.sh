#!/usr/bin/env bash
# ONNX Runtime: a reduction over a negative axis of a tensor without elements does not reduce.
#
# Expected: ReduceSum of a (0, 4) tensor over the axis -1 is of the shape (0, 1), and (0,) with keepdims=0, as over the
# axis 1: the operator takes negative axes from its version 11 on, and onnx's reference gives these shapes.
# Seen: over the axis 1 it is so. Over -1 the output is (0, 4), keepdims or not, without an error; a warning says that
# the shape is not the expected one. ReduceMax, ReduceMin, ReduceMean and ReduceL2 do the same. So a batch of no samples comes out of
# a file with a wrong shape, or fails at the next operator.
#
# Versions: onnxruntime 1.31.1, onnx 1.23.2, Python 3.11. Seen on 2026-11-29.
# Output seen:
#     axis 1, keepdims 1: ONNX Runtime (0, 1), reference (0, 1)
#     axis -1, keepdims 1: ONNX Runtime (0, 4), reference (0, 1)
#     axis 1, keepdims 0: ONNX Runtime (0,), reference (0,)
#     axis -1, keepdims 0: ONNX Runtime (0, 4), reference (0,)
# Exit status 0 while this is so, 1 once it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet onnx==1.23.2 onnxruntime==1.31.1 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - 2> errors <<'PYTHON' || { cat errors; exit 1; }
import sys

import numpy as np
import onnxruntime
from onnx import TensorProto, checker, helper
from onnx.reference import ReferenceEvaluator

x = np.zeros((0, 4), np.float32)
seen = []
for keepdims in (1, 0):
    for axis in (1, -1):
        graph = helper.make_graph(
            [helper.make_node("ReduceSum", ["x", "axes"], ["y"], keepdims=keepdims)],
            "reduce",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 1] if keepdims else ["N"])],
            [helper.make_tensor("axes", TensorProto.INT64, [1], [axis])],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        checker.check_model(model, full_check=True)
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        shapes = session.run(None, {"x": x})[0].shape, ReferenceEvaluator(model).run(None, {"x": x})[0].shape
        seen.append(shapes)
        print(f"axis {axis}, keepdims {keepdims}: ONNX Runtime {shapes[0]}, reference {shapes[1]}")
as_described = seen == [((0, 1), (0, 1)), ((0, 4), (0, 1)), ((0,), (0,)), ((0, 4), (0,))]
print("as described" if as_described else "this has changed")
sys.exit(not as_described)
PYTHON
