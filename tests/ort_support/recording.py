"""A plugin of pytest that keeps what operators compute in the library, for ``replay.py`` on another machine.

``pytest -p ort_support.recording`` writes into the folder that SRIGL_FX_RECORDING names: for each operator of
``kernel_support.onnx_models`` that runs in the library ``NUMBER.onnx``, and ``NUMBER.npz`` with what went in and came
out at each call. The tests have compared that with the oracle.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from kernel_support.onnx_models import Operator
from torch import Tensor

_calls: dict[int, dict[str, Any]] = {}  # by operator, which lives until all is written
_operators: list[Operator] = []
_create, _call = Operator.__init__, Operator.__call__


def _folder() -> Path:
    return Path(os.environ["SRIGL_FX_RECORDING"])


def _init(self: Operator, model: onnx.ModelProto, *, library: bool, **settings: Any) -> None:
    _create(self, model, library=library, **settings)
    if library:
        number = len(_operators)
        _operators.append(self)
        _calls[id(self)] = {"number": number, "test": os.environ.get("PYTEST_CURRENT_TEST", ""), "count": 0}
        (_folder() / f"{number}.onnx").write_bytes(model.SerializeToString())


def _run(self: Operator, **inputs: Tensor | None) -> Tensor:
    y = _call(self, **inputs)
    calls = _calls.get(id(self))
    if calls is not None:
        count = calls["count"]
        given = {name: np.ascontiguousarray(item.numpy()) for name, item in inputs.items() if item is not None}
        calls |= {f"{count}:{name}": item for name, item in ({**given, "->": y.numpy()}).items()}
        calls["count"] = count + 1
    return y


def pytest_configure() -> None:
    """Watch all operators from now on."""
    _folder().mkdir(parents=True, exist_ok=True)
    Operator.__init__ = _init  # type: ignore[method-assign]
    Operator.__call__ = _run  # type: ignore[method-assign]


def pytest_sessionfinish() -> None:
    """Write what went in and came out."""
    for calls in _calls.values():
        np.savez(_folder() / f"{calls['number']}.npz", **calls)
