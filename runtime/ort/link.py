"""From object files to the operator library, with the linker that this machine has.

Owns the choice of linker (the C compiler's, a bare ``ld``, else our own, which alone links for other architectures) and
what the library may need of its host: a few functions of the C library, nothing else. It must not know how the objects
came about.
"""

import logging
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from srigl_fx.errors import LibraryError
from srigl_fx.runtime.cpu.kernels.isa import host_architecture
from srigl_fx.runtime.ort import abi, elf

logger = logging.getLogger(__name__)

Linker = Literal["cc", "ld", "python"]
LIBC_FUNCTIONS = frozenset({"malloc", "calloc", "free", "memcpy", "memset", "getenv", "getauxval"})
SONAME = "libsrigl_fx.so"
_FLAGS = ("-z", "noexecstack", "-z", "nodelete")  # what is made once in a process outlasts its sessions
_TIMEOUT = 60.0  # seconds


def available_linkers(architecture: str | None = None) -> tuple[Linker, ...]:
    """The linkers that could be used here, the preferred one first; our own always can.

    Args:
        architecture: The one to link for.

    Example:
        >>> available_linkers()[-1], available_linkers("sparc")
        ('python', ('python',))
    """
    if architecture not in (None, host_architecture()):
        return ("python",)
    return tuple(name for name in get_args(Linker) if name == "python" or shutil.which(name))


def _run(linker: Linker, objects: Sequence[Path], output: Path) -> None:
    if linker == "python":
        contents = [path.read_bytes() for path in objects]
        output.write_bytes(elf.link_shared(contents, exports=(abi.ENTRY_POINT, abi.TASKS_TABLE), soname=SONAME))
        return
    soname = ("-soname", SONAME)
    if linker == "cc":
        command = ["cc", "-shared", "-nostdlib", f"-Wl,{','.join((*_FLAGS, *soname))}"]
    else:
        command = ["ld", "-shared", *_FLAGS, *soname]
    command += ["-o", str(output), *map(str, objects)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    if done.returncode != 0:
        raise LibraryError(f"{linker} failed: {done.stderr.strip()[-500:]}")


def link(objects: Sequence[Path], output: Path, *, linker: Linker | None = None) -> Linker:
    """Link object files into the operator library; it exports ``RegisterCustomOps`` and the table of tasks.

    Args:
        objects: Position-independent ELF objects, all of one architecture.
        output: Where to write the library.
        linker: The one to use; by default the first of :func:`available_linkers` that succeeds.

    Returns:
        The linker that was used.

    Raises:
        LibraryError: The objects need more of their host than :data:`LIBC_FUNCTIONS`, or cannot be linked.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     broken = Path(folder, "broken.o")
        ...     _ = broken.write_bytes(b"")
        ...     link([broken], Path(folder, "library.so"))
        Traceback (most recent call last):
        srigl_fx.errors.LibraryError: not an x86-64 or Arm ELF object file; delete the cached library and build again
    """
    contents = [path.read_bytes() for path in objects]
    foreign = elf.undefined_symbols(contents) - LIBC_FUNCTIONS
    if foreign:
        raise LibraryError(
            f"the compiled operators need {', '.join(sorted(foreign))}, which a host need not have; this version of "
            "Numba or llvmlite is not one that is supported, install one of those that the package was tested with"
        )
    failure: Exception | None = None
    machine = elf.machine_of(contents[0], kind=elf.ET_REL) if contents else None
    for candidate in available_linkers(machine.name if machine else None) if linker is None else (linker,):
        try:
            _run(candidate, objects, output)
        except (LibraryError, OSError, subprocess.TimeoutExpired) as error:
            logger.debug("linking with %s failed", candidate, exc_info=True)
            failure = failure or error
        else:
            return candidate
    raise LibraryError(f"the operator library could not be linked: {failure}") from failure
