"""What is uploaded: the wheel that holds the operator library waits for no compiler, and the small one needs no us."""

import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from ort_support.llvm_objects import object_for

import srigl_fx
from srigl_fx.cli.doctor import tiny_model
from srigl_fx.runtime.ort import abi, elf
from srigl_fx.runtime.ort import library as library_module

pytestmark = pytest.mark.long


LINUX = "manylinux_2_17_x86_64"
# The platforms of wheels, by their tags, and what their libraries are for.
TAGS = {LINUX: ("linux-x86_64", "x86_64"), "manylinux_2_17_aarch64": ("linux-aarch64", "aarch64")}


def library_for_arm(path: Path) -> Path:
    """A small library for that platform; ``make arm-test`` puts the whole one into the same wheels."""
    program = f"define i64 @{abi.ENTRY_POINT}(ptr %options, ptr %base) {{\n  ret i64 0\n}}"
    content = elf.link_shared([object_for("aarch64", program)], exports=(abi.ENTRY_POINT,), soname="libsrigl_fx.so")
    path.write_bytes(content)
    return path


@pytest.fixture(scope="module")
def wheels(checkout: Path, library: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The files by project, and what they are for."""
    out = tmp_path_factory.mktemp("wheels")
    arm = library_for_arm(tmp_path_factory.mktemp("library") / "arm.so")
    command = [sys.executable, checkout / ".ci" / "wheels.py", out]
    command += ["--library", f"linux-x86_64={library}", "--library", f"linux-aarch64={arm}"]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    found = {}
    for path in out.iterdir():
        kind = "sdist" if path.name.endswith(".tar.gz") else path.stem.partition("py3-none-")[2]
        found[f"{path.name.partition('-')[0]} {kind}"] = path
    return found


def test_which_files_there_are(wheels: dict[str, Path]) -> None:
    assert sorted(wheels) == sorted(
        [
            "srigl_fx any",
            "srigl_fx sdist",
            *(f"{name} {tag}" for name in ("srigl_fx", "srigl_fx_runtime") for tag in TAGS),
        ]
    )
    assert all(f"-{srigl_fx.__version__}" in path.name for path in wheels.values())
    names = {kind: set(zipfile.ZipFile(path).namelist()) for kind, path in wheels.items() if "sdist" not in kind}
    for tag, (platform, machine) in TAGS.items():
        (added,) = names[f"srigl_fx {tag}"] - names["srigl_fx any"]
        assert added == f"srigl_fx/runtime/ort/{library_module._packaged_path(platform).name}"
        small = {name for name in names[f"srigl_fx_runtime {tag}"] if ".dist-info" not in name}
        assert small == {f"srigl_fx_runtime/{name}" for name in ("__init__.py", "py.typed", "libsrigl_fx.so")}
        for kind, inside in (
            (f"srigl_fx {tag}", added),
            (f"srigl_fx_runtime {tag}", "srigl_fx_runtime/libsrigl_fx.so"),
        ):
            archive = zipfile.ZipFile(wheels[kind])
            (about,) = (name for name in names[kind] if name.endswith("/WHEEL"))
            text = archive.read(about).decode()
            assert "Root-Is-Purelib: false" in text
            assert f"Tag: py3-none-{tag}" in text
            found = elf.machine_of(archive.read(inside), kind=elf.ET_DYN)
            assert found is not None
            assert found.name == machine


def test_what_the_readme_names_is_in_the_sdist(checkout: Path, wheels: dict[str, Path]) -> None:
    with tarfile.open(wheels["srigl_fx sdist"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        (about,) = (name for name in archive.getnames() if name.count("/") == 1 and name.endswith("/PKG-INFO"))
        text = archive.extractfile(about).read().decode()  # type: ignore[union-attr]
    linked = re.findall(r"\]\((?!\w+:|#)([^)#]+)", (checkout / "README.md").read_text(encoding="utf-8"))
    assert len(linked) > 20
    assert set(linked) <= names
    assert not re.findall(r"\]\((?!\w+:|#)[^)]*", text)
    assert all(f"`{name}`" in text or name == "docs/demo/results.csv" for name in linked)


def test_a_library_of_another_platform_is_not_packed(checkout: Path, library: Path, tmp_path: Path) -> None:
    arm = library_for_arm(tmp_path / "arm.so")
    for platform, given, words in (
        ("linux-x86_64", arm, f"{arm} is no library for linux-x86_64"),
        ("linux-aarch64", library, f"{library} is no library for linux-aarch64"),
        ("plan9", arm, "is not PLATFORM=FILE with one of linux-x86_64, linux-aarch64"),
    ):
        command = [sys.executable, checkout / ".ci" / "wheels.py", tmp_path / "out", "--library", f"{platform}={given}"]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        assert done.returncode != 0
        assert words in done.stderr
        assert not list(tmp_path.glob("out/*"))


def test_a_library_of_a_platform_that_is_left_out_is_an_error(checkout: Path, tmp_path: Path) -> None:
    command = [sys.executable, checkout / ".ci" / "wheels.py", tmp_path, "--only", "linux-aarch64"]
    command += ["--library", f"linux-x86_64={tmp_path / 'any.so'}"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--library linux-x86_64 is given, but --only leaves this platform out" in done.stderr


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
