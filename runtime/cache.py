"""The folder that keeps what is worth keeping between processes: the operator library and measured times.

Owns where it is, that nobody else may write to it or to a file in it, that a file survives a power cut once it is
there, and the lock. It must not know what is kept there.
"""

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

CACHE_VARIABLE = "SRIGL_FX_CACHE"


def cache_folders() -> Iterator[Path]:
    """The folders that may be the cache, the preferred one first; none of them need exist.

    Example:
        >>> os.environ[CACHE_VARIABLE] = "/tmp/mine"  # doctest: +SKIP
        >>> list(cache_folders())  # doctest: +SKIP
        [PosixPath('/tmp/mine')]
    """
    if chosen := os.environ.get(CACHE_VARIABLE):
        yield Path(chosen)
        return
    base = os.environ.get("XDG_CACHE_HOME")
    with contextlib.suppress(RuntimeError):  # no home directory
        yield Path(base, "srigl_fx") if base else Path.home() / ".cache" / "srigl_fx"
    yield Path(tempfile.gettempdir(), f"srigl_fx-{getattr(os, 'getuid', lambda: 'cache')()}")


def is_private(folder: Path) -> bool:
    """Whether none but this user (or root) may write to the folder: what lies in it is trusted.

    The folder may be a link, if the link is this user's (or root's) too.

    Raises:
        OSError: The folder cannot be looked at.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     is_private(Path(folder))
        True
    """
    if not hasattr(os, "getuid"):  # Windows: a user's folders are the user's own unless shared on purpose
        return True
    return folder.lstat().st_uid in (os.getuid(), 0) and _is_ours(folder.stat())


def is_own_file(path: Path) -> bool:
    """Whether this is a file, not a link to one, that none but this user (or root) may write to.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Path(folder, "file").touch(mode=0o600)
        ...     Path(folder, "link").symlink_to(Path(folder, "file"))
        ...     [is_own_file(Path(folder, name)) for name in ("file", "link", "absent")]
        [True, False, False]
    """
    try:
        status = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and (not hasattr(os, "getuid") or _is_ours(status))


def _is_ours(status: os.stat_result) -> bool:
    return status.st_uid in (os.getuid(), 0) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def make_private(folder: Path) -> None:
    """Create the folder if it is not there, and refuse one that others may write to.

    Raises:
        OSError: It cannot be made; a PermissionError if others may write to it.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     make_private(Path(folder, "cache"))
        ...     oct(Path(folder, "cache").stat().st_mode & 0o777)
        '0o700'
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not is_private(folder):
        raise PermissionError(f"{folder} belongs to, or may be changed by, another user")


@contextlib.contextmanager
def locked(folder: Path, name: str = "lock", *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock ``name`` of the folder: one process or thread at a time. Where files cannot be locked, several may.

    Args:
        folder: The folder, which exists.
        name: The lock's file in it.
        wait: Whether to wait for whoever holds the lock.

    Yields:
        Whether the lock is held.

    Raises:
        OSError: The folder cannot be written.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder, locked(Path(folder)):
        ...     os.listdir(folder)
        ['lock']
    """
    with open(folder / name, "w") as file:
        held = False
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        yield held
