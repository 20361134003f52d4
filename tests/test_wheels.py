"""What is uploaded: the wheel that holds the operator library waits for no compiler, and the small one needs no us."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import srigl_fx
from srigl_fx.cli.doctor import tiny_model

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def wheels(checkout: Path, library: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The files by project, and what they are for."""
    out = tmp_path_factory.mktemp("wheels")
    command = [sys.executable, checkout / ".ci" / "wheels.py", out, "--library", library]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    found = {}
    for path in out.iterdir():
        kind = "sdist" if path.name.endswith(".tar.gz") else path.stem.partition("py3-none-")[2]
        found[f"{path.name.partition('-')[0]} {kind}"] = path
    return found


LINUX = "manylinux_2_17_x86_64"


def test_which_files_there_are(wheels: dict[str, Path]) -> None:
    assert sorted(wheels) == ["srigl_fx any", f"srigl_fx {LINUX}", "srigl_fx sdist", f"srigl_fx_runtime {LINUX}"]
    assert all(f"-{srigl_fx.__version__}" in path.name for path in wheels.values())
    names = {kind: set(zipfile.ZipFile(path).namelist()) for kind, path in wheels.items() if "sdist" not in kind}
    (added,) = names[f"srigl_fx {LINUX}"] - names["srigl_fx any"]
    assert added.startswith("srigl_fx/runtime/ort/libsrigl_fx-")
    small = {name for name in names[f"srigl_fx_runtime {LINUX}"] if ".dist-info" not in name}
    assert small == {f"srigl_fx_runtime/{name}" for name in ("__init__.py", "py.typed", "libsrigl_fx.so")}
    for kind in (f"srigl_fx {LINUX}", f"srigl_fx_runtime {LINUX}"):
        archive = zipfile.ZipFile(wheels[kind])
        (about,) = (name for name in names[kind] if name.endswith("/WHEEL"))
        text = archive.read(about).decode()
        assert "Root-Is-Purelib: false" in text
        assert f"Tag: py3-none-{LINUX}" in text


def served(wheel: Path, folder: Path, blocked: list[str], code: str) -> dict[str, Any]:
    """What ``code`` prints as JSON in a process that has the wheel unpacked, and not the packages that are named."""
    zipfile.ZipFile(wheel).extractall(folder / "unpacked")
    model, weight = tiny_model()  # which only the library can run
    onnx.save(model, folder / "tiny.onnx")
    x = np.random.default_rng(0).standard_normal((3, weight.in_features)).astype(np.float32)
    np.savez(folder / "case.npz", x=x, y=x @ weight.to_dense()[0].T + weight.bias)
    code = f"import json, sys; sys.modules.update(dict.fromkeys({blocked!r})); import numpy as np\n{code}"
    environment = {**os.environ, "PYTHONPATH": str(folder / "unpacked"), "SRIGL_FX_CACHE": str(folder / "cache")}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    result: dict[str, Any] = json.loads(done.stdout)
    return result


RUN = """
case = np.load("case.npz")
error = float(abs(session.run(None, {"x": case["x"]})[0] - case["y"]).max())
"""


def test_the_wheel_for_linux_needs_no_compiler(wheels: dict[str, Path], tmp_path: Path) -> None:
    code = f"""
import srigl_fx as sx
session = sx.runtime.load("tiny.onnx")
{RUN}
print(json.dumps({{"error": error, "library": str(sx.runtime.library_path()), "package": sx.__file__}}))
"""
    result = served(wheels[f"srigl_fx {LINUX}"], tmp_path, ["numba"], code)
    assert Path(result["package"]).is_relative_to(tmp_path)
    assert Path(result["library"]).is_relative_to(tmp_path / "unpacked")
    assert result["error"] <= 1e-5
    assert not (tmp_path / "cache").exists()


def test_the_small_wheel_needs_onnx_runtime_alone(wheels: dict[str, Path], tmp_path: Path) -> None:
    code = f"""
import onnxruntime, srigl_fx_runtime as small
options = onnxruntime.SessionOptions()
small.register(options)
session = small.load("tiny.onnx", session_options=options)
{RUN}
with_own = error
session = small.load("tiny.onnx")
{RUN}
small.platform.machine = lambda: "sparc"
try:
    small.register(onnxruntime.SessionOptions())
except RuntimeError as refused:
    words = str(refused)
small.platform.machine = lambda: "x86_64"
onnxruntime.__version__ = "1.16.3"
try:
    small.register(onnxruntime.SessionOptions())
except RuntimeError as refused:
    old = str(refused)
print(json.dumps({{"errors": [with_own, error], "library": str(small.library_path()), "words": words, "old": old}}))
"""
    blocked = ["torch", "numba", "llvmlite", "srigl_fx", "onnx", "onnxscript"]
    result = served(wheels[f"srigl_fx_runtime {LINUX}"], tmp_path, blocked, code)
    assert Path(result["library"]).is_relative_to(tmp_path / "unpacked")
    assert max(result["errors"]) <= 1e-5
    assert "this is Linux sparc; files run without it, through the fallback" in result["words"]
    assert "ONNX Runtime 1.16.3 is too old for the operators, which need 1.17 or newer" in result["old"]
