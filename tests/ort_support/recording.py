"""A plugin of pytest that keeps what operators compute in the library, for ``replay.py`` on another machine.

``pytest -p ort_support.recording`` writes into the folder that SRIGL_FX_RECORDING names: for each operator of
``kernel_support.onnx_models`` that runs in the library ``NUMBER.onnx``, and for each call ``NUMBER-CALL.npz`` with what
went in, what came out, and the test, which has compared that with the oracle. With SRIGL_FX_RECORDING_EVERY=4 it runs
every fourth test.
"""

import collections
import itertools
import os
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import onnx
import pytest
from kernel_support.onnx_models import Operator
from torch import Tensor

_numbers: WeakKeyDictionary[Operator, int] = WeakKeyDictionary()  # thousands of sessions at once would take gigabytes
_models, _calls = itertools.count(), collections.Counter[int]()
_create, _call = Operator.__init__, Operator.__call__


def _folder() -> Path:
    return Path(os.environ["SRIGL_FX_RECORDING"])


def _init(self: Operator, model: onnx.ModelProto, *, library: bool, **settings: Any) -> None:
    _create(self, model, library=library, **settings)
    if library:
        number = _numbers[self] = next(_models)
        (_folder() / f"{number}.onnx").write_bytes(model.SerializeToString())


def _run(self: Operator, **inputs: Tensor | None) -> Tensor:
    y = _call(self, **inputs)
    number = _numbers.get(self)
    if number is not None:
        given = {name: np.ascontiguousarray(item.numpy()) for name, item in inputs.items() if item is not None}
        test: Any = os.environ.get("PYTEST_CURRENT_TEST", "")
        np.savez(_folder() / f"{number}-{_calls[number]}.npz", **{"->": y.numpy(), "test": test, **given})
        _calls[number] += 1
    return y


def pytest_configure() -> None:
    """Watch all operators from now on: the class that tests have by name is changed, not replaced."""
    _folder().mkdir(parents=True, exist_ok=True)
    Operator.__init__ = _init  # type: ignore[method-assign]
    Operator.__call__ = _run  # type: ignore[method-assign]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Take a sample of the tests, if one is asked for."""
    items[:] = items[:: int(os.environ.get("SRIGL_FX_RECORDING_EVERY", "1"))]
