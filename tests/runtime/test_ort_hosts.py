"""The finished library in processes of its own: each instruction set, each linker, each ONNX Runtime."""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest
from ort_support import serve
from ort_support.cases import CASES, tolerance, write_cases
from ort_support.objects import copy_objects

from srigl_fx.errors import LibraryError
from srigl_fx.runtime.cpu.kernels.isa import ISA_VARIABLE, TARGETS, host_isa, host_target
from srigl_fx.runtime.ort.link import available_linkers, link

# Versions of ONNX Runtime, with the NumPy that each was built for.
VERSIONS = {"1.17.3": "numpy<2", "1.23.2": "numpy"}  # the suite's own environment has the newest
TOO_OLD = "1.16.3"


def _serve(library: Path, folder: Path, *, python: str = sys.executable, **environment: str) -> dict[str, Any]:
    command = [python, str(serve.__file__), str(library), str(folder)]
    plain = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, env={**plain, **environment}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _assert_right(result: dict[str, Any]) -> None:
    assert "failure" not in result, result
    for name, (node, _) in CASES.items():
        for by in ("library", "stock"):
            assert result["errors"][f"{name} {by}"] <= 5 * tolerance(node), (name, by)
    assert "'indices', row 0: 10 is outside" in result["refused"]["bad_index"]
    assert result["stays"], "the domain of operators would be made anew, and lost, with each session"


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cases")
    write_cases(folder)
    return folder


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS)
def test_each_instruction_set(library: Path, cases: Path, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    result = _serve(library, cases, SRIGL_FX_ISA=target)
    monkeypatch.setenv(ISA_VARIABLE, target)
    try:
        host_target()
    except LibraryError:
        assert "names an instruction set that this CPU lacks" in result["failure"]
    else:
        _assert_right(result)


@pytest.mark.long
def test_an_unknown_instruction_set_is_refused(library: Path, cases: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "SRIGL_FX_ISA must be one of" in _serve(library, cases, SRIGL_FX_ISA="sse9")["failure"]
    monkeypatch.setenv("SRIGL_FX_ISA", "sse9")
    with pytest.raises(LibraryError, match="'sse9', but this CPU can use: x86-64"):
        host_isa()


def test_the_library_needs_no_python_and_exports_one_name(library: Path) -> None:
    data = library.read_bytes()
    assert b"RegisterCustomOps\0" in data
    for foreign in (b"libpython", b"Py_", b"libonnxruntime", b"numba_"):
        assert foreign not in data


@pytest.fixture(scope="module")
def objects(library: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return copy_objects(tmp_path_factory.mktemp("objects"))


@pytest.mark.long
@pytest.mark.parametrize("linker", ["cc", "ld", "python"])
def test_each_linker(objects: list[Path], cases: Path, tmp_path: Path, linker: Any) -> None:
    if linker not in available_linkers():
        pytest.skip(f"{linker} is not installed")
    output = tmp_path / "library.so"
    assert link(objects, output, linker=linker) == linker
    _assert_right(_serve(output, cases))


@pytest.mark.slow
def test_a_foreign_symbol_is_refused(objects: list[Path], tmp_path: Path) -> None:
    with pytest.raises(LibraryError, match=r"need .*srigl_conv_rows_task_x86_64, "):
        link([path for path in objects if path.stem == "shim"], tmp_path / "library.so")


def _environment(version: str, numpy: str, folder: Path) -> str:
    """The interpreter of a fresh environment with that ONNX Runtime; skips where pip cannot get it."""
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    command = [python, "-m", "pip", "install", "--quiet", f"onnxruntime=={version}", numpy]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        pytest.skip(f"pip cannot install onnxruntime {version} here: {done.stderr.strip()[-200:]}")
    return python


@pytest.mark.long
@pytest.mark.skipif("SRIGL_FX_ORT_MATRIX" not in os.environ, reason="set SRIGL_FX_ORT_MATRIX to install each version")
@pytest.mark.parametrize("version", [TOO_OLD, *VERSIONS])
def test_each_onnxruntime(library: Path, cases: Path, tmp_path: Path, version: str) -> None:
    result = _serve(library, cases, python=_environment(version, VERSIONS.get(version, "numpy<2"), tmp_path))
    assert result["onnxruntime"] == version
    if version == TOO_OLD:
        assert "need ONNX Runtime 1.17 or newer" in result["failure"]
    else:
        _assert_right(result)
