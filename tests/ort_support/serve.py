"""Runs models as a host without this package does: ``python serve.py LIBRARY FOLDER`` (NumPy and ONNX Runtime only).

For each ``NAME.onnx`` with ``NAME.npz`` (inputs, and the ``expected`` output) it compares the operators with the
expected output, and the fallback of a stock session too; ``bad_NAME.onnx`` must be refused. Prints one JSON line, which
also says whether the library stays when no session needs it.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime


def session(path: Path, library: str | None) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if library is not None:
        options.register_custom_ops_library(library)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def main(library: str, folder: Path) -> dict[str, Any]:
    errors: dict[str, float] = {}
    refused: dict[str, str] = {}
    for path in sorted(folder.glob("*.onnx")):
        if path.stem.startswith("bad_"):
            try:
                session(path, library)
            except Exception as error:
                refused[path.stem] = str(error)
            continue
        arrays = dict(np.load(path.with_suffix(".npz")))
        expected = arrays.pop("expected")
        for name, chosen in (("library", library), ("stock", None)):
            (y,) = session(path, chosen).run(None, arrays)
            same_shape = y.shape == expected.shape
            errors[f"{path.stem} {name}"] = float(np.abs(y - expected).max(initial=0)) if same_shape else float("inf")
    stays = str(Path(library).resolve()) in Path("/proc/self/maps").read_text(encoding="utf-8")
    return {"onnxruntime": onnxruntime.__version__, "errors": errors, "refused": refused, "stays": stays}


if __name__ == "__main__":
    try:
        print(json.dumps(main(sys.argv[1], Path(sys.argv[2]))))
    except Exception as failure:
        print(json.dumps({"onnxruntime": onnxruntime.__version__, "failure": str(failure)}))
