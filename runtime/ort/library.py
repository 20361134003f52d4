"""Where the operator library is: in the package, in the cache, or built now; this platform's, or another's.

Owns the look-up, the platforms and what ``doctor`` says about both. It must not know ONNX Runtime.

The dynamic loader checks nothing: a process that loads a truncated library dies. So a built library has its hash in a
file beside it, and is taken only where both fit.
"""

import contextlib
import hashlib
import importlib.metadata
import logging
import platform
import shutil
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from srigl_fx.errors import LibraryError
from srigl_fx.files import move_durably
from srigl_fx.runtime.cache import (
    CACHE_VARIABLE,
    cache_folders,
    is_own_file,
    is_private,
    locked,
    make_private,
)
from srigl_fx.runtime.cpu.kernels.isa import ARM, X86, host_isa
from srigl_fx.runtime.ort import link
from srigl_fx.runtime.ort.compile import compile_all

# By the system and the architecture, as Python has them.
PLATFORMS: Final = {"linux-x86_64": X86, "linux-aarch64": ARM}
_FALLBACK = "models still run through the fallback inside the file, as fast as dense ones"
_PACKAGE = Path(__file__).parent
_BUILD_FOLDER = "build-"
_lock = threading.Lock()
_logger = logging.getLogger(__name__)


def _unsupported() -> str | None:
    """Why no library can exist here, if so."""
    if _host() in PLATFORMS:
        return None
    return (
        "the operator library exists for Linux on x86-64 and on Arm (aarch64) only, this is "
        f"{platform.system()} {platform.machine()}; {_FALLBACK}"
    )


def _host() -> str:
    return f"{platform.system().lower()}-{platform.machine()}"


def _checked(wanted: str | None) -> str:
    """The platform whose library is wanted: this one, unless another is named."""
    if wanted is None:
        if reason := _unsupported():
            raise LibraryError(reason)
        return _host()
    if wanted not in PLATFORMS:
        raise LibraryError(f"there is no operator library for {wanted!r}; the platforms are {', '.join(PLATFORMS)}")
    return wanted


def _source_hash() -> str:
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in sources())).hexdigest()[:16]


def sources() -> list[Path]:
    """The files that the library is made from; another byte in one of them is another library."""
    runtime = _PACKAGE.parent
    tables = [runtime / name for name in ("activations.py", "quantisation.py", "value_types.py")]
    kernels = sorted((runtime / "cpu" / "kernels").rglob("*.py"))
    assert kernels, "the sources of the kernels are not where the operator library looks for them"
    return [*sorted(_PACKAGE.glob("*.py")), *kernels, *tables]


def _packaged_path(wanted: str) -> Path:
    """Where a platform's wheel keeps the library that was built from just these sources."""
    return _PACKAGE / f"libsrigl_fx-{wanted}-{_source_hash()}.so"


def _cached_name(wanted: str) -> str:
    versions = [importlib.metadata.version(name) for name in ("numba", "llvmlite")]
    key = hashlib.sha256(" ".join([_source_hash(), *versions]).encode()).hexdigest()[:16]
    return f"libsrigl_fx-{wanted}-{key}.so"


def build(
    path: Path, progress: Callable[[int, int], None] | None = None, *, platform: str | None = None
) -> link.Linker:
    """Compile and link the operator library (some minutes) and put it at ``path``, all at once or not at all.

    Its SHA-256 goes into a file beside it, whose name ends in ``.sha256``.

    Args:
        path: The file to write.
        progress: Called after each part with how many are compiled, and how many there are.
        platform: The one to build for, such as "linux-aarch64"; any can be built for on any other. This one by default.

    Returns:
        The linker that was used.

    Raises:
        LibraryError: There is none for the platform, or compiling or linking failed.
        OSError: The folder of ``path`` cannot be written.

    Example:
        >>> build(Path("libsrigl_fx.so"))  # doctest: +SKIP
        'cc'
    """
    architecture = PLATFORMS[_checked(platform)]
    with tempfile.TemporaryDirectory(prefix=_BUILD_FOLDER, dir=path.parent) as folder:
        finished, digest = Path(folder, path.name), Path(folder, _hash_path(path).name)
        linker = link.link(compile_all(Path(folder), progress, architecture), finished)
        digest.write_text(_hash(finished), encoding="ascii")
        finished.chmod(0o755)  # whatever the umask: one that others may write to is not taken
        digest.chmod(0o644)
        move_durably(digest, _hash_path(path))
        move_durably(finished, path)
    return linker


def _hash_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _fault(path: Path) -> str | None:
    """Why the built library at ``path`` must not be loaded, if so."""
    for file in (path, _hash_path(path)):
        if not is_own_file(file):
            return f"{path}: {file.name} is missing, is a link, or may be changed by another user"
    try:
        fits = _hash(path) == _hash_path(path).read_text(encoding="ascii", errors="replace")
    except OSError as error:
        return f"{path} cannot be read ({error})"
    return None if fits else f"{path} is damaged: its content is not what {_hash_path(path).name} says"


def _is_cached(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return is_private(path.parent) and _fault(path) is None
    return False


def _existing(wanted: str) -> Path | None:
    packaged = _packaged_path(wanted)
    if packaged.is_file():
        return packaged
    return next((path for folder in cache_folders() if _is_cached(path := folder / _cached_name(wanted))), None)


def _why_none(wanted: str) -> str:
    for folder in cache_folders():
        path = folder / _cached_name(wanted)
        with contextlib.suppress(OSError):
            if path.lstat() and (fault := _fault(path)):
                return fault
    return "not built yet"


def _remove_stale_builds(folder: Path) -> None:
    """Remove what builders that were killed left behind; the caller holds the folder's lock, so nobody builds now."""
    for stale in folder.glob(f"{_BUILD_FOLDER}*"):
        shutil.rmtree(stale, ignore_errors=True)


def _tidy(folder: Path) -> None:
    """Remove stale builds if there are any and nobody builds now."""
    with contextlib.suppress(OSError):
        if any(folder.glob(f"{_BUILD_FOLDER}*")):
            with locked(folder, wait=False) as held:
                if held:
                    _remove_stale_builds(folder)


def _build_in(folder: Path, wanted: str) -> Path:
    """The library in the cache folder, which is made; built where it is missing or damaged."""
    path = folder / _cached_name(wanted)
    make_private(folder)
    with locked(folder) as held:
        if held:
            _remove_stale_builds(folder)
        fault = _fault(path)
        if fault is not None:
            if path.is_symlink() or path.exists():
                _logger.warning("the operator library %s; it is built anew", fault)
            # A warning, since nobody sees less who has not asked for it: the program waits here, for minutes.
            _logger.warning(
                "compiling the operator library, which takes some minutes and is kept in %s; the wheel for Linux "
                "holds it",
                folder,
            )
            build(path, lambda done, parts: _logger.warning("compiled %d of %d parts", done, parts), platform=wanted)
    return path


def library_path(platform: str | None = None) -> Path:
    """The operator library, for ``register_custom_ops_library`` of any ONNX Runtime (1.17 or newer) on Linux.

    It needs neither Python nor this package. The first call builds it, in the folder that the environment variable
    ``SRIGL_FX_CACHE`` names, else in ``$XDG_CACHE_HOME/srigl_fx`` or ``~/.cache/srigl_fx``. One there that is damaged,
    or that somebody else could have put there, is built anew.

    Args:
        platform: The one whose library is wanted, "linux-x86_64" or "linux-aarch64"; this one by default.

    Raises:
        LibraryError: There is none for the platform, or it could not be built; the message says why.

    Example:
        >>> library_path().name  # doctest: +SKIP
        'libsrigl_fx-linux-x86_64-d4b92df0d8bca4e4.so'
        >>> library_path("plan9-sparc")
        Traceback (most recent call last):
        srigl_fx.errors.LibraryError: there is no operator library for 'plan9-sparc'; the platforms are linux-x86_64...
    """
    wanted = _checked(platform)
    with _lock:
        found = _existing(wanted)
        if found is not None:
            if found.parent != _PACKAGE:
                _tidy(found.parent)
            return found
        failures = []
        for folder in cache_folders():
            try:
                return _build_in(folder, wanted)
            except OSError as error:
                failures.append(error)
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
    path = _existing(_host())
    reason = "" if path else f"{_why_none(_host())}; the first session, or library_path(), builds it"
    try:
        isa = host_isa()
    except LibraryError as error:
        return LibraryStatus(supported=True, path=path, reason=str(error), isa=None, linker=linker)
    return LibraryStatus(supported=True, path=path, reason=reason, isa=isa, linker=linker)
