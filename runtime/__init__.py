"""What executes: the condensed format, its kernels, torch ops and the ONNX Runtime library.

The names for serving are loaded on first use: importing this package imports neither numba nor onnxruntime.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if __name__ != "srigl_fx.runtime":
    raise ImportError(f"import this package as 'srigl_fx.runtime', not as {__name__!r}")

if TYPE_CHECKING:
    from srigl_fx.runtime.ort.library import library_path as library_path
    from srigl_fx.runtime.ort.session import load as load
    from srigl_fx.runtime.ort.session import register as register
    from srigl_fx.runtime.ort.stream import Stream as Stream

_NAMES = {
    "load": "srigl_fx.runtime.ort.session",
    "register": "srigl_fx.runtime.ort.session",
    "Stream": "srigl_fx.runtime.ort.stream",
    "library_path": "srigl_fx.runtime.ort.library",
}

__all__ = ["Stream", "library_path", "load", "register"]


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'srigl_fx.runtime' has no attribute {name!r}")
    value = getattr(import_module(_NAMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
