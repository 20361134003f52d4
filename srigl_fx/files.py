"""Files that appear whole or not at all.

Owns how a finished file takes the place of another, also after a power cut. It must not know what is in files.
"""

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path in the same folder for what is to take the place of ``path`` when the block ends.

    If the block raises, ``path`` is what it was, and nothing is left beside it.

    Raises:
        OSError: It cannot be written or moved, or :func:`check_replaceable` refuses it.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with replacing(f"{folder}/file") as part:
        ...         _ = part.write_text("whole")
        ...     os.listdir(folder)
        ['file']
    """
    target = Path(path)
    check_replaceable(target)
    part = target.with_name(f".{target.name}.{secrets.token_hex(8)}.part")
    try:
        yield part
        move_durably(part, target)
    finally:
        part.unlink(missing_ok=True)


def check_replaceable(target: Path) -> None:
    """Require that a file can take this name: its folder exists, and nothing but a regular file is lost by it.

    Raises:
        OSError: It cannot; ``strerror`` says why.

    Example:
        >>> check_replaceable(Path("no folder", "file"))
        Traceback (most recent call last):
        FileNotFoundError: [Errno 2] there is no folder 'no folder': 'no folder/file'
    """
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(target))
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, f"there is no folder {str(target.parent)!r}", str(target))
    if target.exists() and not target.is_file():
        raise OSError(errno.EINVAL, "it is a device, a pipe or a socket, which no file may replace", str(target))


def place_of(path: Path) -> Path:
    """What is replaced where this path is written: a link itself, not what it leads to.

    Example:
        >>> place_of(Path("folder", "..", "file")) == place_of(Path("file"))
        True
    """
    return path.parent.resolve() / path.name


def move_durably(source: Path, target: Path) -> None:
    """Give a finished file its name, on the same file system: after a power cut it is there whole, or not at all.

    Raises:
        OSError: It cannot be written or moved.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "part").write_text("whole")
        ...     move_durably(Path(folder, "part"), Path(folder, "file"))
        ...     Path(folder, "file").read_text()
        'whole'
    """
    _flush(source, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    os.replace(source, target)
    with contextlib.suppress(OSError):  # not every system opens folders
        _flush(target.parent, os.O_RDONLY)


def _flush(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
