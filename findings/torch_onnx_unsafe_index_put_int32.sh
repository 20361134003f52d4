#!/usr/bin/env bash
# torch.onnx.export: torch.istft is exported without a word, and the file is not valid.
#
# Expected: `torch.onnx.export(..., dynamo=True)` of a module that calls `torch.istft` writes a file that ONNX's checker and
# ONNX Runtime accept, or refuses.
# Seen: the export succeeds; the checker and ONNX Runtime refuse the file, because ScatterND has int32 indices, where
# ONNX knows int64 alone. `istft` adds its frames up with `unfold_backward`, whose decomposition calls
# `_unsafe_index_put` with indices in int32; these are written as they stand. With indices in int64 the same call is fine.
#
# Versions: torch 2.13.0, onnx 1.23.2, onnxscript 0.7.2, onnxruntime 1.31.1, Python 3.11. Seen on 2026-11-29.
# Output seen:
#     istft: exported; checker InferenceError, int32 named: True; ONNX Runtime InvalidGraph, int32 named: True
#     _unsafe_index_put, int32: exported; checker InferenceError, int32 named: True; ONNX Runtime InvalidGraph, int32 named: True
#     _unsafe_index_put, int64: exported; checker content; ONNX Runtime right
# Exit status 0 while this is so, 1 once it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.31.1 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" -W ignore - 2> errors <<'PYTHON' || { cat errors; exit 1; }
import sys

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn


class Inverse(nn.Module):
    def forward(self, real, imaginary):
        return torch.istft(torch.complex(real, imaginary), 16, 4, window=torch.hann_window(16))


class Put(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.register_buffer("index", torch.tensor([0, 2], dtype=dtype))

    def forward(self, x, values):
        return torch.ops.aten._unsafe_index_put(x, [self.index], values, True)


def tried(run):
    try:
        return run()
    except Exception as error:
        return f"{type(error).__name__}, int32 named: {'int32' in str(error)}"


def check(model):
    onnx.checker.check_model(model, full_check=True)
    return "content"


def compare(module, arguments):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession("module.onnx", options)
    feeds = {one.name: value.numpy() for one, value in zip(session.get_inputs(), arguments)}
    (got,) = session.run(None, feeds)
    return "right" if np.allclose(got, module(*arguments), atol=1e-5) else "wrong"


def story(module, *arguments):
    torch.onnx.export(module, arguments, "module.onnx", dynamo=True, verbose=False, external_data=False)
    checked = tried(lambda: check(onnx.load("module.onnx")))
    ran = tried(lambda: compare(module, arguments))
    return f"exported; checker {checked}; ONNX Runtime {ran}"


torch.manual_seed(0)
seen = {
    "istft": story(Inverse(), torch.randn(2, 9, 7), torch.randn(2, 9, 7)),
    "_unsafe_index_put, int32": story(Put(torch.int32), torch.zeros(4, 3), torch.ones(2, 3)),
    "_unsafe_index_put, int64": story(Put(torch.int64), torch.zeros(4, 3), torch.ones(2, 3)),
}
for what, result in seen.items():
    print(f"{what}: {result}")
refused = "exported; checker InferenceError, int32 named: True; ONNX Runtime InvalidGraph, int32 named: True"
as_described = [*seen.values()] == [refused, refused, "exported; checker content; ONNX Runtime right"]
print("as described" if as_described else "this has changed")
sys.exit(not as_described)
PYTHON
