#!/usr/bin/env bash
# torch.onnx.export -> onnxruntime's quantize_dynamic: a linear layer that is not square cannot be quantised.
#
# Expected: `quantize_dynamic` quantises what `torch.onnx.export(..., dynamo=True)` writes for `nn.Linear(64, 32)`.
# Seen: `InferenceError: Inferred shape and existing shape differ in dimension 0: (64) vs (32)`. The exporter records a
# shape for every initialiser (`value_info`). The quantiser turns Gemm(transB=1) into MatMul and transposes the weight
# under its old name, leaves the recorded shape, and its own shape inference then refuses the file. A square layer
# passes, and so does the same file once the entries for initialisers are taken out of `value_info`.
#
# Versions: onnxruntime 1.31.1, torch 2.13.0, onnx 1.23.2, onnxscript 0.7.2, Python 3.11. Seen on 2026-11-28.
# Output seen:
#     64 -> 32: InferenceError ... Inferred shape and existing shape differ in dimension 0: (64) vs (32)
#     64 -> 64: quantised
#     64 -> 32, no shapes recorded for initialisers: quantised
# Exit status 0 while this is so, 1 once it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.31.1 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import onnx
import torch
from onnxruntime.quantization import quantize_dynamic


def quantise(outputs, forget=False):
    layer = torch.nn.Linear(64, outputs)
    torch.onnx.export(layer, (torch.randn(2, 64),), "layer.onnx", dynamo=True, verbose=False, external_data=False)
    if forget:
        model = onnx.load("layer.onnx")
        constants = {tensor.name for tensor in model.graph.initializer}
        kept = [value for value in model.graph.value_info if value.name not in constants]
        del model.graph.value_info[:]
        model.graph.value_info.extend(kept)
        onnx.save(model, "layer.onnx")
    try:
        quantize_dynamic("layer.onnx", "quantised.onnx")
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "quantised"


seen = [quantise(32), quantise(64), quantise(32, forget=True)]
for what, result in zip(("64 -> 32", "64 -> 64", "64 -> 32, no shapes recorded for initialisers"), seen):
    print(f"{what}: {result}")
as_described = "existing shape differ" in seen[0] and seen[1:] == ["quantised", "quantised"]
print("as described" if as_described else "this has changed")
sys.exit(not as_described)
PYTHON
