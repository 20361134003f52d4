"""The objects of the operator library, compiled once for all test runs of the same sources, in whichever process.

Compiling takes nearly all of a build's time. Everything else of a build is done anew each time.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from srigl_fx.runtime.cache import locked, make_private
from srigl_fx.runtime.ort import library
from srigl_fx.runtime.ort.compile import OBJECTS, compile_all


def copy_objects(folder: Path, progress: Callable[[int, int], None] | None = None) -> list[Path]:
    """What ``compile_all`` gives, copied from the folder in which the first caller compiled it.

    The folder's name has the hash of the sources and the versions of the compilers.
    """
    kept = Path(os.environ["SRIGL_FX_TEST_OBJECTS"], library._cached_name())
    make_private(kept)
    with locked(kept):
        if not (kept / "complete").exists():
            compile_all(kept, progress)
            (kept / "complete").touch()
    return [Path(shutil.copy(kept / f"{name}.o", folder)) for name in OBJECTS]


def are_compiled() -> bool:
    """Whether nothing is left to be compiled."""
    folder = os.environ.get("SRIGL_FX_TEST_OBJECTS")
    return folder is not None and Path(folder, library._cached_name(), "complete").exists()


def use() -> None:
    """Have this process build the library from them."""
    vars(library)["compile_all"] = copy_objects
