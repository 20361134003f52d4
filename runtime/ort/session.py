"""ONNX Runtime sessions with the operators registered.

Owns how a session finds the library, and the errors that a model file causes. It must not know how the library is made
or what is in the file.
"""

import logging
import os
import re
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srigl_fx.errors import FormatError, LibraryError
from srigl_fx.runtime.cpu.kernels.isa import host_isa
from srigl_fx.runtime.ort import abi
from srigl_fx.runtime.ort.contents import MARK, condensed_calls
from srigl_fx.runtime.ort.library import library_path

if TYPE_CHECKING:
    import onnxruntime

logger = logging.getLogger(__name__)

# ONNX Runtime takes the domain once for each SessionOptions.
_registered: "weakref.WeakSet[Any]" = weakref.WeakSet()
_warned: set[str] = set()
_lock = threading.Lock()  # of both, and of options while they are registered


def _import_onnxruntime() -> Any:
    import onnxruntime

    version = tuple(int(number) for number in re.findall(r"\d+", onnxruntime.__version__)[:2])
    if version < abi.MINIMUM_ONNXRUNTIME:
        needed = ".".join(map(str, abi.MINIMUM_ONNXRUNTIME))
        raise LibraryError(
            f"ONNX Runtime {onnxruntime.__version__} is too old for the operators, which need {needed} or newer; "
            "pip install --upgrade onnxruntime"
        )
    return onnxruntime


def _register(session_options: "onnxruntime.SessionOptions", library: Path) -> None:
    with _lock:
        if session_options in _registered:
            return
        try:
            session_options.register_custom_ops_library(str(library))
        except Exception as error:  # ONNX Runtime's exceptions have no base class of their own
            raise LibraryError(
                f"ONNX Runtime refuses the operator library {library}: {error}. If the file is damaged, delete it: it "
                "is built anew when it is next needed"
            ) from error
        _registered.add(session_options)


def _is_first(cause: str) -> bool:
    """Whether nobody was warned of this before."""
    with _lock:
        if cause in _warned:
            return False
        _warned.add(cause)
        return True


def register(session_options: "onnxruntime.SessionOptions") -> None:
    """Let sessions made with these options run the operators of domain ``srigl_fx``; a second call changes nothing.

    It may be called from several threads at once.

    Args:
        session_options: Options of ONNX Runtime, before a session is made with them; they are changed in place.

    Raises:
        LibraryError: The library is missing here and cannot be built, or ONNX Runtime is older than 1.17.

    Example:
        >>> import onnxruntime
        >>> options = onnxruntime.SessionOptions()
        >>> register(options)  # doctest: +SKIP
        >>> session = onnxruntime.InferenceSession("model.onnx", options)  # doctest: +SKIP
    """
    _import_onnxruntime()
    _register(session_options, library_path())


def load(
    path: str | os.PathLike[str],
    *,
    session_options: "onnxruntime.SessionOptions | None" = None,
    providers: Sequence[Any] | None = None,
) -> "onnxruntime.InferenceSession":
    """Open an exported model in ONNX Runtime, with the operators registered.

    Where the operator library is missing and cannot be built, or ONNX Runtime refuses it, a warning says why, and the
    session uses the fallback inside the file. A warning is given, too, if the file was exported with condensed layers
    and a tool has made it dense since.

    Args:
        path: The ONNX file.
        session_options: As for ``onnxruntime.InferenceSession``; the operators are registered on them, once.
        providers: As for ``onnxruntime.InferenceSession``.

    Returns:
        A session; it may be run from several threads at once.

    Raises:
        FormatError: It is no path, the file is missing, is no ONNX model, or ONNX Runtime or an operator refuses what
            is in it.
        LibraryError: ONNX Runtime is older than 1.17, or SRIGL_FX_ISA names an instruction set that is unknown, or that
            this CPU lacks.

    Example:
        >>> load("missing.onnx")
        Traceback (most recent call last):
        srigl_fx.errors.FormatError: there is no file missing.onnx
        >>> session = load("model.onnx")  # doctest: +SKIP
        >>> session.run(None, {session.get_inputs()[0].name: x})  # doctest: +SKIP
    """
    onnxruntime = _import_onnxruntime()
    if not isinstance(path, str | os.PathLike):
        raise FormatError(
            f"load takes the path of a file, not {type(path).__name__}; for a model in memory, register the operators "
            "on session options of your own: srigl_fx.runtime.register(options)"
        )
    file = Path(path)
    if not file.is_file():
        raise FormatError(f"there is no file {file}")
    host_isa()  # what SRIGL_FX_ISA asks for in vain is an error, and no reason to run densely
    options = onnxruntime.SessionOptions() if session_options is None else session_options
    try:
        _register(options, library_path())
    except LibraryError as error:
        if _is_first(str(error)):
            logger.warning("running without the operator library, as fast as dense: %s", error)
    try:
        session = onnxruntime.InferenceSession(
            str(file), options, providers=None if providers is None else list(providers)
        )
    except (TypeError, ValueError):  # the caller's options or providers, not the file
        raise
    except Exception as error:  # ONNX Runtime's exceptions have no base class of their own
        raise FormatError(f"ONNX Runtime cannot load {file}: {error}") from error
    _warn_if_dense(session, file)
    return session


def _warn_if_dense(session: "onnxruntime.InferenceSession", file: Path) -> None:
    """Warn once if a file that was exported sparse has become dense on its way here."""
    key, value = MARK
    if session.get_modelmeta().custom_metadata_map.get(key) != value:
        return
    try:
        lost = condensed_calls(file).lost()
    except (OSError, ValueError):  # gone, or in a form that this library cannot read: nothing is known
        return
    if lost and _is_first(str(file)):
        logger.warning(
            "%s was exported with condensed layers, but %s, so it runs densely: some tool between export and here did "
            "that; the page 'Tools around ONNX' of the documentation says which do, and which option keeps them",
            file,
            lost,
        )
