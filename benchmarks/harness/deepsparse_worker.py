"""The process that runs DeepSparse and its own ONNX Runtime, in a virtual environment of their own.

Owns one engine and one session at a time, and times calls of them when it is asked to. It must not import anything of
this project: the peer needs other versions of NumPy and ONNX. One JSON object a line on its input and its output.
"""

import json
import os
import sys
import time
from typing import Any

# The engine writes to the standard output; the answers keep a descriptor of their own.
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
os.environ["NM_DISABLE_ANALYTICS"] = "1"

import deepsparse  # type: ignore[import-not-found]  # noqa: E402 - only after the output is safe
import numpy as np  # noqa: E402
import onnxruntime  # noqa: E402


def load(request: dict[str, Any]) -> dict[str, Any]:
    """Open the model in both; write the engine's first output beside the input."""
    with np.load(request["inputs"]) as file:
        inputs = {name: file[name] for name in file.files}
    batch, threads = request["batch"], request["threads"]
    engine = deepsparse.Engine(request["model"], batch_size=batch, num_cores=threads)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(request["model"], options, providers=["CPUExecutionProvider"])
    ordered = [inputs[name] for name in engine.input_names]
    calls["deepsparse"] = lambda: engine.run(ordered)
    calls["ort"] = lambda: session.run(None, inputs)
    np.save(request["output"], calls["deepsparse"]()[0])
    return {}


def taken(request: dict[str, Any]) -> dict[str, Any]:
    call = calls[request["contender"]]
    start = time.perf_counter()
    for _ in range(request["calls"]):
        call()
    return {"seconds": time.perf_counter() - start}


calls: dict[str, Any] = {}
commands: dict[str, Any] = {
    "load": load,
    "time": taken,
    "versions": lambda request: {
        "deepsparse": deepsparse.__version__,
        "onnxruntime": onnxruntime.__version__,
        "numpy": np.__version__,
    },
}

for line in sys.stdin:
    received = json.loads(line)
    try:
        answer = commands[received["command"]](received)
    except Exception as error:  # whatever the engine refuses is the answer
        answer = {"error": f"{type(error).__name__}: {error}"}
    answers.write(json.dumps(answer) + "\n")
    answers.flush()
