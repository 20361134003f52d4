"""Tries malformed models, each of which must end in an exception: ``python malformed.py LIBRARY FOLDER``.

Run in a process of its own, so that a crash is a failed test. Prints one JSON line for each model *before* and after
it is tried: a crash leaves the name of its model as the last line.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime


def outcome(path: Path, library: str) -> dict[str, Any]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.register_custom_ops_library(library)
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        return {"stage": "load", "message": str(error)}
    try:
        session.run(None, dict(np.load(path.with_suffix(".npz"))))
    except Exception as error:
        return {"stage": "run", "message": str(error)}
    return {"stage": "ok", "message": ""}


if __name__ == "__main__":
    for model in sorted(Path(sys.argv[2]).glob("*.onnx")):
        print(json.dumps({"model": model.stem}), flush=True)
        print(json.dumps({"model": model.stem, **outcome(model, sys.argv[1])}), flush=True)
