"""The machine code of the CUDA kernels: no spills, few registers, and the vector loads that the design names.

Needs the compiler (numba-cuda, cuda-core) and cuobjdump with nvdisasm (of the toolkit, or the wheels
nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm), but no GPU. Code is kept from run to run.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from srigl_fx.runtime.cuda import build
from srigl_fx.runtime.cuda.table import KERNELS, VALUES, CudaKernel

pytestmark = pytest.mark.long
MISSING = [name for name in ("numba_cuda", "cuda.core") if not importlib.util.find_spec(name.split(".")[0])]
_KINDS = {4: "", 8: ".64", 16: ".128"}  # of loads, by their bytes, in SASS


@cache
def _cuobjdump() -> str | None:
    wheels = sorted(Path(path) / "nvidia" for path in sys.path if (Path(path) / "nvidia").is_dir())
    found = [str(tool) for folder in wheels for tool in folder.glob("*/bin/cuobjdump")]
    return found[0] if found else shutil.which("cuobjdump")


@cache
def _made() -> Path:
    """The folder with the code of all kernels, built by another process: in this one Numba may simulate."""
    environment = {**os.environ, "SRIGL_FX_CACHE": str(Path(os.environ["SRIGL_FX_TEST_OBJECTS"], "cuda"))}
    command = [sys.executable, "-m", "srigl_fx.runtime.cuda.build"]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    base = Path(environment["SRIGL_FX_CACHE"])
    return base / build.folder_name(base)


@pytest.fixture(scope="module")
def code() -> Path:
    if MISSING:
        pytest.skip(f"the compiler of CUDA kernels is not installed: {', '.join(MISSING)}")
    if _cuobjdump() is None:
        pytest.skip("cuobjdump is not installed: nothing reads the machine code")
    return _made()


def _read(cubin: Path, option: str, folder: Path) -> str:
    copy = folder / "kernel.cubin"  # cuobjdump goes by the name
    shutil.copy(cubin, copy)
    done = subprocess.run([str(_cuobjdump()), option, str(copy)], capture_output=True, text=True, check=True)
    return done.stdout


kernels = pytest.mark.parametrize("kernel", KERNELS, ids=[kernel.name for kernel in KERNELS])


@pytest.mark.parametrize("target", build.TARGETS)
@kernels
def test_registers(code: Path, kernel: CudaKernel, target: str, tmp_path: Path) -> None:
    """None more than the table says, which the occupancy of the model counts on, and nothing in local memory."""
    for dtype in VALUES:
        text = _read(code / f"{kernel.symbol(dtype)}.{target}", "-res-usage", tmp_path)
        used = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
        assert 0 < used["REG"] <= kernel.registers
        assert used["STACK"] == used["LOCAL"] == 0


@pytest.mark.parametrize("target", build.TARGETS)
@kernels
def test_instructions(code: Path, kernel: CudaKernel, target: str, tmp_path: Path) -> None:
    for dtype in VALUES:
        text = _read(code / f"{kernel.symbol(dtype)}.{target}", "-sass", tmp_path)
        operations = re.findall(r"^\s+/\*\w+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", text, re.MULTILINE)
        assert len(operations) > 100, "the disassembly was read as something else"
        assert not [one for one in operations if one.startswith(("LDL", "STL"))], "registers are spilled"
        weights = [one for one in operations if one.startswith("LDG.E") and one.endswith(".CONSTANT")]
        if kernel.family == "rows":
            assert weights
            continue
        value_load = _KINDS[16 if dtype == "float32" else 8]
        assert f"LDG.E{value_load}.CONSTANT" in weights, "four values are not one load"
        assert "LDG.E.64.CONSTANT" in weights, "four offsets are not one load"
        samples = kernel.settings[0]
        assert f"LDS{_KINDS[4 * samples]}" in operations, "the samples of a lane are not one load"
        if kernel.family == "tile":
            lanes = [one for one in operations if one.startswith("LDS") and one != "LDS"] if samples > 1 else []
            assert set(lanes) <= {f"LDS{_KINDS[4 * samples]}"}
            # As many multiply-adds for each load of samples as a lane has samples: 4 weights of each output, unrolled.
            loads = operations.count(f"LDS{_KINDS[4 * samples]}")
            assert operations.count("FFMA") >= loads * samples >= 4 * kernel.settings[1] * samples
        else:
            assert "SHFL.BFLY" in operations
            assert "STS.128" in operations


def test_shared_memory_is_aligned_for_loads_of_four(code: Path) -> None:
    for kernel in KERNELS:
        text = (code / f"{kernel.symbol('float32')}.{build.PTX}").read_text(encoding="ascii")
        aligned = re.findall(r"\.extern \.shared \.align (\d+)", text)
        assert aligned == ([] if kernel.family == "rows" else ["16"])
