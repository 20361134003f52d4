"""The package that holds the operator library alone, from its sources: what its wheel holds is in test_wheels."""

import importlib.util
import threading
import time
from pathlib import Path
from typing import Any

import pytest

SOURCE = Path("packages", "srigl-fx-runtime", "srigl_fx_runtime", "__init__.py")


class Options:
    """Session options that take their time, and count: ONNX Runtime refuses operators that come twice."""

    def __init__(self) -> None:
        self.registered: list[str] = []

    def register_custom_ops_library(self, path: str) -> None:
        time.sleep(0.02)
        self.registered.append(path)


def test_threads_register_options_once(monkeypatch: pytest.MonkeyPatch, checkout: Path) -> None:
    spec = importlib.util.spec_from_file_location("srigl_fx_runtime", checkout / SOURCE)
    assert spec is not None
    assert spec.loader is not None
    small: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(small)
    monkeypatch.setattr(small, "library_path", lambda: Path("libsrigl_fx.so"))
    options = Options()
    threads = [threading.Thread(target=small.register, args=(options,)) for _ in range(8)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert options.registered == ["libsrigl_fx.so"]
