"""The operator library of srigl-fx for ONNX Runtime, without srigl-fx.

Owns where the library lies and how it is registered. It needs ONNX Runtime alone; how files are made, and what the
operators compute, is said in the documentation of srigl-fx.
"""

import os
import platform
import re
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime

__version__ = "0.2.0"
__all__ = ["library_path", "load", "register"]

_LIBRARY = Path(__file__).parent / "libsrigl_fx.so"
_OLDEST = (1, 17)
_MACHINES = ("x86_64", "aarch64")  # for each of which there is a wheel
# ONNX Runtime takes the operators once for each SessionOptions.
_registered: "weakref.WeakSet[Any]" = weakref.WeakSet()
_lock = threading.Lock()


def library_path() -> Path:
    """The operator library, a file that needs neither Python nor this package.

    Raises:
        RuntimeError: This is neither Linux x86-64 nor Linux on Arm, for which alone it exists.

    Example:
        >>> library_path().name
        'libsrigl_fx.so'
    """
    system, machine = platform.system(), platform.machine()
    if system != "Linux" or machine not in _MACHINES:
        raise RuntimeError(
            f"the operator library exists for Linux on x86-64 and on Arm (aarch64) only, this is {system} {machine}; "
            "files run without it, through the fallback inside them, as fast as dense ones: open them with "
            "onnxruntime.InferenceSession"
        )
    return _LIBRARY


def register(session_options: "onnxruntime.SessionOptions") -> None:
    """Let sessions made with these options run the operators of domain ``srigl_fx``; a second call changes nothing.

    It may be called from several threads at once.

    Args:
        session_options: Options of ONNX Runtime, before a session is made with them; they are changed in place.

    Raises:
        RuntimeError: ONNX Runtime is older than 1.17, or this is neither Linux x86-64 nor Linux on Arm.

    Example:
        >>> options = onnxruntime.SessionOptions()
        >>> register(options)
        >>> register(options)
    """
    if tuple(int(number) for number in re.findall(r"\d+", onnxruntime.__version__)[:2]) < _OLDEST:
        raise RuntimeError(
            f"ONNX Runtime {onnxruntime.__version__} is too old for the operators, which need 1.17 or newer; "
            "pip install --upgrade onnxruntime"
        )
    with _lock:
        if session_options not in _registered:
            session_options.register_custom_ops_library(str(library_path()))
            _registered.add(session_options)


def load(
    path: str | os.PathLike[str],
    *,
    session_options: "onnxruntime.SessionOptions | None" = None,
    providers: Sequence[Any] | None = None,
) -> "onnxruntime.InferenceSession":
    """Open a file in ONNX Runtime, with the operators registered.

    Args:
        path: The ONNX file.
        session_options: As for ``onnxruntime.InferenceSession``; the operators are registered on them, once.
        providers: As for ``onnxruntime.InferenceSession``; the CPU by default.

    Returns:
        A session; it may be run from several threads at once.

    Raises:
        RuntimeError: As for :func:`register`.
        Exception: What ONNX Runtime raises where the file is missing or damaged.

    Example:
        >>> load("model.onnx")  # doctest: +SKIP
        <onnxruntime.capi.onnxruntime_inference_collection.InferenceSession object at ...>
    """
    options = session_options if session_options is not None else onnxruntime.SessionOptions()
    register(options)
    return onnxruntime.InferenceSession(os.fspath(path), options, providers=providers or ["CPUExecutionProvider"])
