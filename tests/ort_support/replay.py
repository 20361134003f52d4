"""Runs what ``recording.py`` kept, as a host without this package does: ``python replay.py LIBRARY FOLDER [TEXT]``.

With a text it runs the models that have it in them. It needs NumPy and ONNX Runtime only. Whole numbers must be the
same, floats within some rounding of sums in another order, and what is not finite must be so in the same places. Prints
one JSON line, with the largest difference of floats, as a share of the largest output.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

TOLERANCE = 1e-5  # of the largest output, which has up to 300 terms


def compare(y: Any, expected: Any) -> tuple[str | None, float]:
    """What is wrong with a result, if anything, and how far floats are off."""
    if (y.shape, y.dtype) != (expected.shape, expected.dtype):
        return f"{y.dtype} {y.shape} in place of {expected.dtype} {expected.shape}", 0.0
    if y.dtype.kind != "f":
        return None if np.array_equal(y, expected) else f"{(y != expected).sum()} of {y.size} numbers differ", 0.0
    finite = np.isfinite(expected)
    if not np.array_equal(np.where(finite, 0, expected), np.where(np.isfinite(y), 0, y), equal_nan=True):
        return "other places are not finite", 0.0
    size = np.abs(expected[finite]).max(initial=1)
    error = np.abs(y[finite].astype(np.float64) - expected[finite]).max(initial=0)
    wrong = None if error <= TOLERANCE * size else f"an error of {error:.1e} at a size of {size:.1e}"
    return wrong, float(error / size)


def main(library: str, folder: Path, text: str = "") -> dict[str, Any]:
    faults: list[str] = []
    models, calls, largest = 0, 0, 0.0
    for path in sorted(folder.glob("*.onnx")):
        if text.encode() not in path.read_bytes():
            continue
        options = onnxruntime.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 4, 1
        options.register_custom_ops_library(library)
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        models += 1
        for kept in sorted(folder.glob(f"{path.stem}-*.npz")):
            with np.load(kept) as arrays:
                given = dict(arrays)
            expected, test = given.pop("->"), given.pop("test")
            calls += 1
            wrong, error = compare(session.run(None, given)[0], expected)
            largest = max(largest, error)
            if wrong:
                faults.append(f"{test}, {kept.stem}: {wrong}")
    return {"models": models, "calls": calls, "largest": largest, "faults": faults}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])))
