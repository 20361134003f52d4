"""The objects of the operator library, compiled once for all tests, in whichever process they build it.

Compiling takes nearly all of a build's time. Everything else of a build is done anew each time.
"""

import os
import shutil
from pathlib import Path

from srigl_fx.runtime.cache import locked, make_private
from srigl_fx.runtime.ort import library
from srigl_fx.runtime.ort.compile import OBJECTS, compile_all


def copy_objects(folder: Path) -> list[Path]:
    """What ``compile_all`` gives, copied from the folder in which the first caller of this test run compiled it."""
    kept = Path(os.environ["SRIGL_FX_TEST_CACHE"], f"objects-{library._cached_name()}")
    make_private(kept)
    with locked(kept):
        if not (kept / "complete").exists():
            compile_all(kept)
            (kept / "complete").touch()
    return [Path(shutil.copy(kept / f"{name}.o", folder)) for name in OBJECTS]


def use() -> None:
    """Have this process build the library from them."""
    vars(library)["compile_all"] = copy_objects
