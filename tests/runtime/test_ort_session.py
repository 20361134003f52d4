"""Loading a model: with the library, without it, with options of the user's own, and with a bad file."""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from ort_support.cases import sample
from ort_support.models import linear

import srigl_fx
from srigl_fx.errors import FormatError, LibraryError
from srigl_fx.runtime.ort import session as session_module

NODE = linear()
EIGHT_BITS = NODE.of_eight_bits()
X = sample("session", (3, 10))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(NODE.model().SerializeToString())
    return path


@pytest.fixture
def missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Path:
        raise LibraryError("there is no compiler on the moon; take one along")

    monkeypatch.setattr(session_module, "library_path", fail)
    monkeypatch.setattr(session_module, "_warned", set())


def _assert_right(session: Any) -> None:
    (y,) = session.run(None, {"x": X})
    np.testing.assert_allclose(y, NODE.expected(X), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("kind", [str, Path])
def test_load(library: Path, model: Path, kind: type) -> None:
    _assert_right(srigl_fx.runtime.load(kind(model)))


@pytest.mark.parametrize("fallback", [True, False])
def test_load_with_values_of_eight_bits(library: Path, tmp_path: Path, fallback: bool) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(EIGHT_BITS.model(fallback=fallback).SerializeToString())
    (y,) = srigl_fx.runtime.load(path).run(None, {"x": X})
    np.testing.assert_allclose(y, EIGHT_BITS.expected(X), rtol=1e-6, atol=1e-5)


def test_values_of_eight_bits_without_the_library(missing_library: None, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(EIGHT_BITS.model().SerializeToString())
    (y,) = srigl_fx.runtime.load(path).run(None, {"x": X})
    np.testing.assert_allclose(y, EIGHT_BITS.expected(X), rtol=1e-6, atol=1e-5)


def test_scales_that_the_operator_refuses_are_named(library: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(EIGHT_BITS.with_weights(scales=-EIGHT_BITS.weights["scales"]).model().SerializeToString())
    with pytest.raises(FormatError, match=r"bad\.onnx.*CondensedLinearInt8 node 'layer'.*'scales' .* negative"):
        srigl_fx.runtime.load(path)


def test_without_the_fallback_the_library_is_what_runs(library: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(NODE.model(fallback=False).SerializeToString())
    _assert_right(srigl_fx.runtime.load(path, providers=["CPUExecutionProvider"]))


def test_options_may_be_used_again_and_registered_before(library: Path, model: Path) -> None:
    options = onnxruntime.SessionOptions()
    srigl_fx.runtime.register(options)
    srigl_fx.runtime.register(options)
    for _ in range(2):
        _assert_right(srigl_fx.runtime.load(model, session_options=options))
    _assert_right(onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"]))


def test_two_options_side_by_side(library: Path, model: Path) -> None:
    first, second = onnxruntime.SessionOptions(), onnxruntime.SessionOptions()
    second.intra_op_num_threads = 2
    sessions = [srigl_fx.runtime.load(model, session_options=options) for options in (first, second)]
    for session in sessions:
        _assert_right(session)


def _at_once(count: int, work: Callable[[], object]) -> None:
    """Do work in so many threads that start together."""
    barrier = threading.Barrier(count)

    def run() -> None:
        barrier.wait()
        work()

    threads = [threading.Thread(target=run) for _ in range(count)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()


class _SlowOptions:
    """Session options that take their time, and count: ONNX Runtime refuses operators that come twice."""

    def __init__(self) -> None:
        self.registered: list[str] = []

    def register_custom_ops_library(self, path: str) -> None:
        time.sleep(0.02)
        self.registered.append(path)


def test_threads_register_options_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "library_path", lambda: Path("libsrigl_fx.so"))
    options: Any = _SlowOptions()
    _at_once(8, lambda: srigl_fx.runtime.register(options))
    assert options.registered == ["libsrigl_fx.so"]


def test_threads_share_options(library: Path, model: Path) -> None:
    options = onnxruntime.SessionOptions()
    sessions: list[Any] = []
    _at_once(3, lambda: sessions.append(srigl_fx.runtime.load(model, session_options=options)))
    assert len(sessions) == 3
    for session in sessions:
        _assert_right(session)


def test_threads_warn_once(missing_library: None, model: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Slow(set[str]):
        """A set that lets other threads run while it looks for something."""

        def __contains__(self, item: object) -> bool:
            found = super().__contains__(item)
            time.sleep(0.01)
            return found

    session_module._warned = Slow()
    with caplog.at_level(logging.WARNING, logger="srigl_fx"):
        _at_once(3, lambda: srigl_fx.runtime.load(model))
    assert len(caplog.records) == 1


def test_without_the_library_the_fallback_runs_with_one_warning(
    missing_library: None, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="srigl_fx"):
        for _ in range(3):
            _assert_right(srigl_fx.runtime.load(model))
    assert [record.getMessage() for record in caplog.records] == [
        "running without the operator library, as fast as dense: there is no compiler on the moon; take one along"
    ]


def test_register_without_the_library_is_an_error(missing_library: None) -> None:
    with pytest.raises(LibraryError, match="no compiler"):
        srigl_fx.runtime.register(onnxruntime.SessionOptions())


@pytest.mark.parametrize("version", ["1.16.3", "1.9.0", "0.5.0"])
def test_an_old_onnxruntime_is_named(model: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", version)
    with pytest.raises(LibraryError, match=rf"ONNX Runtime {version} is too old .* 1\.17 or newer"):
        srigl_fx.runtime.load(model)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"there is no file .*absent\.onnx"):
        srigl_fx.runtime.load(tmp_path / "absent.onnx")


def test_a_model_in_memory_is_no_path() -> None:
    with pytest.raises(FormatError, match="load takes the path of a file, not bytes; for a model in memory"):
        srigl_fx.runtime.load(NODE.model().SerializeToString())


@pytest.mark.parametrize("content", [b"", b"not a model", bytes(1000), NODE.model().SerializeToString()[:-50]])
def test_a_file_that_is_no_model_is_named(library: Path, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=r"broken\.onnx") as caught:
        srigl_fx.runtime.load(path)
    assert caught.value.__cause__ is not None


def test_a_model_that_an_operator_refuses_is_named(library: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(NODE.with_attributes(in_features=9).model().SerializeToString())
    with pytest.raises(FormatError, match=r"bad\.onnx.*CondensedLinear node 'layer'.*in_features"):
        srigl_fx.runtime.load(path)


def test_a_library_that_is_none_is_named_and_the_fallback_serves(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "libbroken.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(session_module, "library_path", lambda: broken)
    with pytest.raises(LibraryError, match=r"libbroken\.so.*delete it"):
        srigl_fx.runtime.register(onnxruntime.SessionOptions())
    with caplog.at_level(logging.WARNING, logger="srigl_fx"):
        _assert_right(srigl_fx.runtime.load(model))
    assert "libbroken.so" in caplog.text


def test_an_instruction_set_that_is_unknown_is_refused(
    library: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SRIGL_FX_ISA", "sse9")
    with pytest.raises(LibraryError, match="SRIGL_FX_ISA must be one of"):
        srigl_fx.runtime.register(onnxruntime.SessionOptions())


def test_a_wrong_instruction_set_does_not_run_densely(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SRIGL_FX_ISA", "sse9")
    with pytest.raises(LibraryError, match="SRIGL_FX_ISA is 'sse9'"):
        srigl_fx.runtime.load(model)
