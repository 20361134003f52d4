"""Where the operator library is: in the package, in the cache, or built now.

Owns the look-up, the platform check and what ``doctor`` says about both. It must not know ONNX Runtime.
"""

import hashlib
import importlib.metadata
import os
import platform
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

from srigl_fx.errors import LibraryError
from srigl_fx.runtime.cache import CACHE_VARIABLE, cache_folders, is_private, locked, make_private
from srigl_fx.runtime.kernels.isa import host_isa
from srigl_fx.runtime.ort import link
from srigl_fx.runtime.ort.compile import compile_all

_FALLBACK = "models still run through the fallback inside the file, as fast as dense ones"
_PACKAGE = Path(__file__).parent
_lock = threading.Lock()


def _unsupported() -> str | None:
    """Why no library can exist here, if so."""
    system, machine = platform.system(), platform.machine()
    if (system, machine) != ("Linux", "x86_64"):
        return f"the operator library exists for Linux x86-64 only, this is {system} {machine}; {_FALLBACK}"
    return None


def _source_hash() -> str:
    sources = sorted([*_PACKAGE.glob("*.py"), *_PACKAGE.parent.glob("kernels/*.py")])
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in sources)).hexdigest()[:16]


def _packaged_path() -> Path:
    """Where a wheel keeps the library that was built from just these sources."""
    return _PACKAGE / f"libsrigl_fx-{_source_hash()}.so"


def _cached_name() -> str:
    versions = [importlib.metadata.version(name) for name in ("numba", "llvmlite")]
    key = hashlib.sha256(" ".join([_source_hash(), *versions]).encode()).hexdigest()[:16]
    return f"libsrigl_fx-{key}.so"


def build(path: Path) -> link.Linker:
    """Compile and link the operator library (about 40 s on one core) and put it at ``path``, all at once or not at all.

    Returns:
        The linker that was used.

    Raises:
        LibraryError: The platform is not Linux x86-64, or compiling or linking failed.
        OSError: The folder of ``path`` cannot be written.

    Example:
        >>> build(Path("libsrigl_fx.so"))  # doctest: +SKIP
        'cc'
    """
    if reason := _unsupported():
        raise LibraryError(reason)
    with tempfile.TemporaryDirectory(prefix="build-", dir=path.parent) as folder:
        finished = Path(folder, path.name)
        linker = link.link(compile_all(Path(folder)), finished)
        os.replace(finished, path)
    return linker


def _existing() -> Path | None:
    packaged = _packaged_path()
    if packaged.is_file():
        return packaged
    cached = (folder / _cached_name() for folder in cache_folders())
    return next((path for path in cached if path.is_file() and is_private(path.parent)), None)


def library_path() -> Path:
    """The operator library, for ``register_custom_ops_library`` of any ONNX Runtime (1.17 or newer) on Linux x86-64.

    It needs neither Python nor this package. The first call builds it, in the folder that the environment variable
    ``SRIGL_FX_CACHE`` names, else in ``$XDG_CACHE_HOME/srigl_fx`` or ``~/.cache/srigl_fx``.

    Raises:
        LibraryError: There is none for this platform, or it could not be built; the message says why.

    Example:
        >>> library_path().name  # doctest: +SKIP
        'libsrigl_fx-d4b92df0d8bca4e4.so'
    """
    if reason := _unsupported():
        raise LibraryError(reason)
    with _lock:
        found = _existing()
        if found is not None:
            return found
        failures = []
        for folder in cache_folders():
            path = folder / _cached_name()
            try:
                make_private(folder)
                with locked(folder):
                    if not path.is_file():
                        build(path)
            except OSError as error:
                failures.append(error)
            else:
                return path
    raise LibraryError(
        f"the operator library cannot be stored: {'; '.join(map(str, failures))}. Set {CACHE_VARIABLE} to a folder of "
        f"your own that can be written to; {_FALLBACK}"
    ) from failures[-1]


@dataclass(frozen=True, kw_only=True)
class LibraryStatus:
    """What is known about the operator library here, without building it.

    Attributes:
        supported: Whether it exists for this platform.
        path: Where it is, None if it is not there (yet).
        reason: Why it is not there, or what is wrong; empty if all is well.
        isa: The instruction set that this CPU will use, None where unsupported.
        linker: What would link it.
    """

    supported: bool
    path: Path | None
    reason: str
    isa: str | None
    linker: str | None


def library_status() -> LibraryStatus:
    """Describe the operator library on this machine; builds nothing and raises nothing.

    Example:
        >>> status = library_status()
        >>> status.supported or bool(status.reason)
        True
    """
    if reason := _unsupported():
        return LibraryStatus(supported=False, path=None, reason=reason, isa=None, linker=None)
    linker = link.available_linkers()[0]
    path = _existing()
    reason = "" if path else "not built yet; the first session, or library_path(), builds it"
    try:
        isa = host_isa()
    except LibraryError as error:
        return LibraryStatus(supported=True, path=path, reason=str(error), isa=None, linker=linker)
    return LibraryStatus(supported=True, path=path, reason=reason, isa=isa, linker=linker)
