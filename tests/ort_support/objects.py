"""The objects of the operator library, compiled once for all test runs of the same sources, in whichever process.

Compiling takes nearly all of a build's time. Everything else of a build is done anew each time.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from srigl_fx.runtime.cache import locked, make_private
from srigl_fx.runtime.cpu.kernels.isa import ARCHITECTURE
from srigl_fx.runtime.ort import library
from srigl_fx.runtime.ort.compile import OBJECTS_OF, compile_all


def _kept(architecture: str) -> Path:
    return Path(os.environ["SRIGL_FX_TEST_OBJECTS"], library._cached_name(f"linux-{architecture}"))


def copy_objects(
    folder: Path, progress: Callable[[int, int], None] | None = None, architecture: str = ARCHITECTURE
) -> list[Path]:
    """What ``compile_all`` gives, copied from the folder in which the first caller compiled it.

    The folder's name has the hash of the sources and the versions of the compilers.
    """
    kept = _kept(architecture)
    make_private(kept)
    with locked(kept):
        if not (kept / "complete").exists():
            compile_all(kept, progress, architecture)
            (kept / "complete").touch()
    return [Path(shutil.copy(kept / f"{name}.o", folder)) for name in OBJECTS_OF[architecture]]


def are_compiled() -> bool:
    """Whether nothing is left to be compiled."""
    return "SRIGL_FX_TEST_OBJECTS" in os.environ and (_kept(ARCHITECTURE) / "complete").exists()


def use() -> None:
    """Have this process build the library from them."""
    vars(library)["compile_all"] = copy_objects
