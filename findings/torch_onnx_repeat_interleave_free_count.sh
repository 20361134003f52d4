#!/usr/bin/env bash
# torch.onnx.export: repeat_interleave with a free number of repetitions is exported without a word, and does not run.
#
# Expected: `torch.onnx.export(..., dynamo=True)` of `x.repeat_interleave(n, 0)`, where `n` is a size of an input that
# `dynamic_shapes` says is free, writes a file that gives each row of `x` n times, or refuses.
# Seen: the export succeeds, the checker accepts the file, and ONNX Runtime fails at an Expand ("invalid expand shape")
# unless `x` has one row or `n` is one; with a constant number it is right. SAM's mask decoder repeats the embeddings of
# its images so, once for each prompt.
#
# Versions: torch 2.13.0, onnx 1.23.2, onnxscript 0.7.2, onnxruntime 1.31.1, Python 3.11. Seen on 2026-12-01.
# Output seen:
#     free count: 2 rows, 3 times: InvalidArgument; 2 rows, once: right; 1 row, 4 times: right
#     constant count: 2 rows, 3 times: right; 5 rows, 3 times: right
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
from torch.export import Dim


class Free(nn.Module):
    def forward(self, x, times):
        return x.repeat_interleave(times.shape[0], 0) + 0 * times.sum()


class Constant(nn.Module):
    def forward(self, x):
        return x.repeat_interleave(3, 0)


def session_of(module, arguments, shapes):
    torch.onnx.export(module, arguments, "module.onnx", dynamo=True, dynamic_shapes=shapes, verbose=False)
    onnx.checker.check_model(onnx.load("module.onnx"), full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession("module.onnx", options)


def outcome(session, rows, times):
    x = np.arange(4 * rows, dtype=np.float32).reshape(rows, 4)
    feeds = dict(zip([one.name for one in session.get_inputs()], (x, np.zeros(times, np.float32))))
    try:
        (got,) = session.run(None, feeds)
    except Exception as error:
        return type(error).__name__
    return "right" if np.array_equal(got, np.repeat(x, times, 0)) else "wrong"


x, times = torch.zeros(2, 4), torch.zeros(3)
free = session_of(Free(), (x, times), {"x": {0: Dim("rows")}, "times": {0: Dim("times")}})
constant = session_of(Constant(), (x,), {"x": {0: Dim("rows")}})
seen = [
    f"free count: 2 rows, 3 times: {outcome(free, 2, 3)}; 2 rows, once: {outcome(free, 2, 1)}; "
    f"1 row, 4 times: {outcome(free, 1, 4)}",
    f"constant count: 2 rows, 3 times: {outcome(constant, 2, 3)}; 5 rows, 3 times: {outcome(constant, 5, 3)}",
]
print(*seen, sep="\n")
as_described = seen == [
    "free count: 2 rows, 3 times: InvalidArgument; 2 rows, once: right; 1 row, 4 times: right",
    "constant count: 2 rows, 3 times: right; 5 rows, 3 times: right",
]
print("as described" if as_described else "this has changed")
sys.exit(not as_described)
PYTHON
