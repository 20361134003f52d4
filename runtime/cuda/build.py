"""From kernels to machine code: PTX by Numba, cubins by NVIDIA's linker; made once and kept.

Owns which targets there are, and the files that keep their code. It must not know what kernels compute, nor how they
are launched. Building takes numba-cuda and cuda-core (``pip install "srigl-fx[cuda]"``), but no GPU and no driver; what
is built, is used without them. Run as a module, it builds all that is missing:
``python -m srigl_fx.runtime.cuda.build``.
"""

import argparse
import contextlib
import functools
import hashlib
import importlib.metadata
import logging
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from srigl_fx.errors import CudaError
from srigl_fx.runtime import activations
from srigl_fx.runtime.cache import cache_folders, is_own_file, locked, make_private
from srigl_fx.runtime.cuda import kernels, table

PTX: Final = "ptx"
TARGETS: Final = ("sm_80", "sm_90")  # have cubins; other GPUs from sm_80 on take PTX, which the driver translates
_CAPABILITY: Final = (8, 0)  # of the PTX
_COMPILERS: Final = ("numba-cuda", "cuda-core")
_TIMEOUT = 1800  # seconds; a kernel takes some of one idle core, and another process may be building all of them
_LOGGER = logging.getLogger(__name__)


@functools.cache
def symbols() -> dict[str, tuple[table.CudaKernel, str]]:
    """What can be built: names of machine code, with the kernel and the dtype of its values."""
    return {kernel.symbol(dtype): (kernel, dtype) for kernel in table.KERNELS for dtype in table.VALUES}


@functools.cache
def digest() -> str:
    """What names the folder of the code: it changes with the sources of the kernels."""
    files = sorted(Path(kernels.__file__).parent.glob("*.py"))
    content = hashlib.sha256()
    for file in (*files, Path(table.__file__), Path(activations.__file__), Path(__file__)):
        content.update(file.name.encode() + b"\0" + file.read_bytes())
    return content.hexdigest()[:16]


@functools.cache
def compilers() -> str:
    """The versions of what builds, which the folder of the code is named by, too; empty where one is not installed."""
    try:
        return "-".join(importlib.metadata.version(name) for name in _COMPILERS)
    except importlib.metadata.PackageNotFoundError:
        return ""


def folder_name(base: Path) -> str:
    """How the folder of the code is called; without a compiler, one that is there, whichever has built it."""
    name = f"cuda-{digest()}"
    if compilers():
        return f"{name}-{compilers()}"
    return max((found.name for found in base.glob(f"{name}-*")), default=name)


def folder() -> Path:
    """Where code is kept; it is there, and no one else may write to it.

    Raises:
        CudaError: No folder can be had.
    """
    problems = []
    for base in cache_folders():
        try:
            make_private(base)
            made = base / folder_name(base)
            make_private(made)
        except OSError as error:
            problems.append(str(error))
        else:
            return made
    raise CudaError(
        f"the machine code of CUDA kernels has no folder: {'; '.join(problems)}; set SRIGL_FX_CACHE to one of yours"
    )


def compile_ptx(symbol: str) -> str:
    """The PTX of a kernel by this name.

    Raises:
        CudaError: The compiler is not installed.
    """
    kernel, dtype = symbols()[symbol]
    try:
        types: Any = import_module("numba.cuda.types")
        cuda = import_module("srigl_fx.runtime.cuda.kernels.compiler").cuda
        made = import_module(f"srigl_fx.runtime.cuda.kernels.{kernel.family}")
    except ImportError as error:
        raise _missing(symbol, error) from error
    held = {"bfloat16": "uint16", "float16": "uint16"}  # of 16-bit floats, the bits

    def kind(name: str) -> Any:
        plain = name.rstrip("*")
        found = getattr(types, held.get(plain, plain))
        return types.CPointer(found) if name.endswith("*") else found

    function = getattr(made, f"{kernel.family}_kernel")(dtype, *kernel.settings)
    signature = types.void(*map(kind, kernel.signature(dtype)))
    bounds = kernel.threads, kernel.blocks
    settings = {"cc": _CAPABILITY, "device": False, "abi": "numba", "output": PTX, "launch_bounds": bounds}
    text, _ = cuda.compile(function, signature, **settings)
    (name,) = re.findall(r"\.visible \.entry (\w+)", text)
    # Numba aligns dynamic shared memory to its elements; the kernels load four at once.
    return str(text).replace(name, symbol).replace(".extern .shared .align 4 ", ".extern .shared .align 16 ")


def make_cubin(ptx: str, target: str) -> bytes:
    """The cubin of PTX for this target.

    Raises:
        CudaError: The linker is not installed.
    """
    try:
        core: Any = import_module("cuda.core")
        program = core.Program(ptx, PTX, core.ProgramOptions(arch=target))
        return bytes(program.compile("cubin").code)
    except ImportError as error:
        raise _missing(target, error) from error


def _missing(what: str, error: Exception) -> CudaError:
    return CudaError(
        f"{what}: the CUDA kernels are not built yet, and what builds them is missing ({error}); "
        'pip install "srigl-fx[cuda]", or copy the folder cuda-* from the cache of a machine where they are built'
    )


def _write(path: Path, code: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(code)
    os.replace(file.name, path)


def build(names: Iterable[str], targets: Iterable[str] = TARGETS) -> list[Path]:
    """Build what is missing of these kernels, and return the files, PTX first.

    Raises:
        CudaError: Compiler or linker is not installed, or no folder can be had.
    """
    made, files = folder(), []
    with locked(made):
        for symbol in names:
            source = made / f"{symbol}.{PTX}"
            if not is_own_file(source):
                _LOGGER.info("compiling %s", symbol)
                _write(source, compile_ptx(symbol).encode())
            files.append(source)
            for target in targets:
                cubin = made / f"{symbol}.{target}"
                if not is_own_file(cubin):
                    _write(cubin, make_cubin(source.read_text(encoding="ascii"), target))
                files.append(cubin)
    return files


def _environment() -> dict[str, str]:
    """The environment of a process that builds: modules from where this one has them, Numba as it is by default."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("NUMBA_")}
    return kept | {"PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)}


def code_of(symbol: str, target: str) -> bytes:
    """The code of a kernel for a target, a cubin or PTX; built by another process if it is not there.

    Raises:
        CudaError: It cannot be built.
    """
    path = folder() / f"{symbol}.{target if target in TARGETS else PTX}"
    if not is_own_file(path):
        wanted = [target] if target in TARGETS else []
        command = [sys.executable, "-m", "srigl_fx.runtime.cuda.build", symbol, "--targets", *wanted]
        settings: Any = {"capture_output": True, "text": True, "timeout": _TIMEOUT, "check": False}
        try:
            done = subprocess.run(command, env=_environment(), **settings)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise CudaError(f"{symbol} could not be built: {error}") from error
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"the compiler ended with status {done.returncode}"]
            raise CudaError(f"{symbol} could not be built: {lines[-1]}")
    with contextlib.suppress(OSError):
        return path.read_bytes()
    raise CudaError(f"{path} cannot be read; remove the folder, and call again")


def main(arguments: list[str] | None = None) -> None:
    """The command: builds the kernels that are named, or all."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("symbols", nargs="*", choices=[*symbols(), []], help="kernels; all of them by default")
    parser.add_argument("--targets", nargs="*", default=TARGETS, choices=TARGETS, help="what to make cubins for")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    build(given.symbols or symbols(), given.targets)


if __name__ == "__main__":
    main()
