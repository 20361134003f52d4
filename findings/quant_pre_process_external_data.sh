#!/usr/bin/env bash
# torch.onnx.export -> onnxruntime's quant_pre_process: weights in a file beside the model are lost on the way.
#
# Expected: `quant_pre_process`, which ONNX Runtime asks to call before quantising, reads what
# `torch.onnx.export(..., dynamo=True)` writes by default: a model, and its weights in a file beside it.
# Seen: `ValidationError: Data of TensorProto ... should be stored in /tmp/pre.quant.../layer.onnx.data, but it is not
# regular file`. The optimised model is written to a temporary folder; it refers to the weights by their relative path,
# and they are not there. The same model with the weights inside passes, and so does this one without the optimisation.
#
# Versions: onnxruntime 1.31.1, torch 2.13.0, onnx 1.23.2, onnxscript 0.7.2, Python 3.11. Seen on 2026-11-30.
# Output seen:
#     weights beside the model: ValidationError: Data of TensorProto ( tensor name: weight) should be stored in ...
#     weights inside: prepared
#     weights beside the model, not optimised: prepared
# Exit status 0 while this is so, 1 once it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.31.1 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import torch
from onnxruntime.quantization.shape_inference import quant_pre_process


def prepare(beside, **settings):
    layer = torch.nn.Linear(64, 64)
    torch.onnx.export(layer, (torch.randn(2, 64),), "layer.onnx", dynamo=True, verbose=False, external_data=beside)
    try:
        quant_pre_process("layer.onnx", "prepared.onnx", skip_symbolic_shape=True, **settings)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "prepared"


seen = [prepare(True), prepare(False), prepare(True, skip_optimization=True)]
for what, result in zip(("weights beside the model", "weights inside", "weights beside the model, not optimised"), seen):
    print(f"{what}: {result}")
as_described = seen[0].startswith("ValidationError") and seen[1:] == ["prepared", "prepared"]
print("as described" if as_described else "this has changed")
sys.exit(not as_described)
PYTHON
