#!/usr/bin/env bash
# onnx: the reference evaluator has no transposed convolution with groups.
#
# Expected: onnx.reference evaluates a ConvTranspose with group=2, which the operator's specification has since version 1, as it
# does one without groups.
# Seen: it raises a ValueError from a reshape, of one group's outputs into the shape of both. With one group it
# agrees with ONNX Runtime, which computes both.
#
# Versions: onnx 1.23.2, onnxruntime 1.31.1, Python 3.11. Seen on 2026-11-29.
# Output seen:
#     1 group: ONNX Runtime (1, 3, 6), reference the same
#     2 groups: ONNX Runtime (1, 6, 6), reference ValueError: cannot reshape array of size 18 into shape (1,2,6)
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

rng = np.random.default_rng(0)
feeds = {"x": rng.random((1, 4, 3), np.float32), "w": rng.random((4, 3, 2), np.float32)}
seen = []
for groups in (1, 2):
    graph = helper.make_graph(
        [helper.make_node("ConvTranspose", ["x", "w"], ["y"], group=groups, strides=[2])],
        "transposed",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, array.shape) for name, array in feeds.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3 * groups, 6])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    right = session.run(None, feeds)[0]
    try:
        got = ReferenceEvaluator(model).run(None, feeds)[0]
        said = "the same" if got.shape == right.shape and np.allclose(got, right, atol=1e-6) else "another"
    except ValueError as error:
        said = f"ValueError: {error}"
    seen.append(said)
    print(f"{groups} group{'s' if groups > 1 else ''}: ONNX Runtime {right.shape}, reference {said}")
as_described = seen[0] == "the same" and seen[1].startswith("ValueError: cannot reshape")
print("as described" if as_described else "this has changed")
sys.exit(not as_described)
PYTHON
