"""The kernels' activation functions against torch's, compiled for each instruction set of the library."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from srigl_fx.runtime.activations import NAMES
from srigl_fx.runtime.cpu.kernels.isa import BASELINE, ISAS, NEON, llvm_names
from srigl_fx.runtime.dense import FUNCTIONS

Array = NDArray[np.float32]
# Compiles for the instruction set in the environment and applies every activation to the same floats.
PROGRAM = """
import sys, numba, numpy as np
from srigl_fx.runtime.activations import NUMBERS
from srigl_fx.runtime.cpu.kernels.activations import activate_row
types = numba.types
signature = types.void(types.CPointer(types.float32), types.int64, types.int64)
row = numba.cfunc(signature, fastmath={"reassoc", "contract", "nsz"}, error_model="numpy")(activate_row.py_func)
x, results = np.load(sys.argv[1]), {}
for name, number in NUMBERS.items():
    y = results[name] = x.copy()
    row.ctypes(y.ctypes.data_as(row.ctypes.argtypes[0]), y.size, number)
np.savez(sys.argv[2], assembly=row._library.get_asm_str(), **results)
"""
SPECIAL = np.array(
    [np.nan, np.inf, -np.inf, 0, 1e-40, -1e-40, 1e20, -1e20, 3e38, -3e38, 88, -88, 300, -300], np.float32
)


def grid() -> Array:
    dense = np.linspace(-20, 20, 200_001)
    random = np.random.default_rng(0).standard_normal(100_000)
    whole = np.concatenate([dense, random, 3 * random, np.repeat(SPECIAL, 16), SPECIAL])
    return whole.astype(np.float32)


@pytest.fixture(scope="module", params=ISAS)
def computed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each activation makes of ``grid()``, by a process that compiles for one instruction set."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    np.save(folder / "x.npy", grid())
    environment = {**os.environ, "NUMBA_CPU_NAME": llvm_names(request.param)[0], "NUMBA_CPU_FEATURES": ""}
    command = [sys.executable, "-c", PROGRAM, str(folder / "x.npy"), str(folder / "y.npz")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == -signal.SIGILL:
        pytest.skip(f"this processor does not run {request.param}")
    assert done.returncode == 0, done.stderr
    return {"isa": request.param, **np.load(folder / "y.npz")}


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_matches_torch(computed: dict[str, Any], name: str) -> None:
    x, y = grid(), computed[name]
    assert y.dtype == np.float32
    # In float64, as gelu of infinity, and of 3e38, is not what it should be in float32.
    expected = FUNCTIONS[name](torch.from_numpy(x).double()).numpy()
    ordinary = np.abs(x) <= 20
    error = np.abs(y[ordinary] - expected[ordinary])
    assert (error <= 2e-7 + 2e-7 * np.abs(expected[ordinary])).all(), error.max()
    with np.errstate(over="ignore"):
        limit = expected.astype(np.float32)
    np.testing.assert_allclose(y[~ordinary], limit[~ordinary], rtol=2e-7, atol=1e-30)


@pytest.mark.slow
def test_loops_are_vectorised_without_calls(computed: dict[str, Any]) -> None:
    assembly = str(computed["assembly"])
    vector = {BASELINE: "%xmm", NEON: ".4s"}.get(computed["isa"], "%ymm")
    divisions = [line for line in assembly.splitlines() if "divps" in line or "fdiv" in line]
    assert any(vector in line or "%zmm" in line for line in divisions)
    assert not any(name in assembly for name in ("expf", "exp2f", "erff", "tanhf", "floorf", "roundf"))


def test_the_approximations_alone() -> None:
    from math import erfc, exp

    from srigl_fx.runtime.cpu.kernels import activations

    r = np.linspace(-0.5, 0.5, 1001)
    powers = 1 + sum(float(getattr(activations, f"_E{i}")) * r**i for i in range(1, 7))
    assert np.abs(powers / 2**r - 1).max() < 2e-8
    x = np.linspace(0, 13, 1001)
    t = 1 / (1 + float(activations._T) * x)
    ratio = sum(float(getattr(activations, f"_Q{i}")) * t**i for i in range(1, 9))
    exact = np.array([0.5 * erfc(at / 2**0.5) * exp(at * at / 2) for at in x])
    assert np.abs(ratio / exact - 1).max() < 4e-7
    assert (np.abs(ratio - exact) * x * np.exp(-x * x / 2)).max() < 1e-8
