#!/usr/bin/env bash
# ONNX Runtime and onnx's reference: ConvTranspose whose output padding is below the dilation but not below the stride.
#
# Expected: the operator's text asks that each output padding be less than the stride or the dilation of its axis, as
# PyTorch does; so stride 1, dilation 3 and output padding 2 are valid, and 9 inputs give 14 outputs.
# Seen: `onnx.checker` takes the model, ONNX Runtime makes a session and then fails in its first run ("output_padding (2)
# may be too large for stride (1)"), and onnx's reference evaluator raises a ValueError. With the stride above the output
# padding all three agree, whatever the dilation.
#
# Versions: onnxruntime 1.31.1, onnx 1.23.2, torch 2.13.0, Python 3.11. Seen on 2026-11-29.
# Output seen:
#     stride 1, dilation 3, output padding 2: torch (1, 1, 14), ONNX Runtime InvalidArgument, onnx's reference ValueError
#     stride 3, dilation 1, output padding 2: torch (1, 1, 28), ONNX Runtime (1, 1, 28), onnx's reference (1, 1, 28)
#     stride 2, dilation 3, output padding 1: torch (1, 1, 21), ONNX Runtime (1, 1, 21), onnx's reference (1, 1, 21)
# Exit status 0 while this is so, 1 once it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 onnx==1.23.2 onnxruntime==1.31.1 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator


def transposed(stride, dilation, output_padding):
    node = helper.make_node(
        "ConvTranspose", ["x", "w"], ["y"], strides=[stride], dilations=[dilation], output_padding=[output_padding]
    )
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, 9])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "channels", "length"])
    weight = numpy_helper.from_array(np.ones((1, 1, 2), np.float32), "w")
    graph = helper.make_graph([node], "graph", [x], [y], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    return model


def shape(run):
    try:
        return str(tuple(run().shape))
    except Exception as error:
        return type(error).__name__


options = onnxruntime.SessionOptions()
options.log_severity_level = 4
feeds = {"x": np.ones((1, 1, 9), np.float32)}
seen = []
for stride, dilation, padding in ((1, 3, 2), (3, 1, 2), (2, 3, 1)):
    model = transposed(stride, dilation, padding)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    torch_gives = shape(
        lambda: torch.nn.functional.conv_transpose1d(
            torch.ones(1, 1, 9), torch.ones(1, 1, 2), stride=stride, dilation=dilation, output_padding=padding
        )
    )
    runtime_gives = shape(lambda: session.run(None, feeds)[0])
    reference_gives = shape(lambda: ReferenceEvaluator(model).run(None, feeds)[0])
    print(
        f"stride {stride}, dilation {dilation}, output padding {padding}: torch {torch_gives}, "
        f"ONNX Runtime {runtime_gives}, onnx's reference {reference_gives}"
    )
    seen.append((torch_gives, runtime_gives, reference_gives))
as_described = seen[0] == ("(1, 1, 14)", "InvalidArgument", "ValueError") and all(len(set(one)) == 1 for one in seen[1:])
print("as described" if as_described else "this has changed")
sys.exit(not as_described)
PYTHON
