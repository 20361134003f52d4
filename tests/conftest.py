"""What every test relies on: one thread for each worker, and caches of the test run's own."""

import ast
import functools
import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType

import pytest
import torch
import torch_shortcuts
import zoo.cpu_torchvision  # noqa: F401 - for an environment that .ci/install_zoo.py did not prepare

_CACHE = "SRIGL_FX_TEST_CACHE"
_OBJECTS = "SRIGL_FX_TEST_OBJECTS"  # a folder that lasts, for what is compiled from the same sources each time


def pytest_configure(config: pytest.Config) -> None:
    """Point the library's caches at a fresh folder, which the workers of a parallel run share."""
    if _CACHE not in os.environ:
        os.environ[_CACHE] = tempfile.mkdtemp(prefix="srigl_fx_tests_")
        config.add_cleanup(lambda: shutil.rmtree(os.environ.pop(_CACHE), ignore_errors=True))
    if _OBJECTS not in os.environ:
        cache = getattr(config, "cache", None)
        os.environ[_OBJECTS] = str(cache.mkdir("objects") if cache else Path(os.environ[_CACHE], "objects"))
    os.environ["HF_HUB_OFFLINE"] = "1"  # models come from configurations, never from a hub
    for name in ("SRIGL_FX_CACHE", "MPLCONFIGDIR"):
        os.environ[name] = os.path.join(os.environ[_CACHE], name.lower())
    torch.set_num_threads(1)


def pytest_report_header() -> str | None:
    """Say why the first test waits."""
    from ort_support import objects

    from srigl_fx.runtime.ort.library import library_status

    if objects.are_compiled() or not library_status().supported:
        return None
    return "the operator library is compiled before the first test, once for its sources: some minutes"


def pytest_itemcollected(item: pytest.Item) -> None:
    """What is long is slow as well."""
    if item.get_closest_marker("long"):
        item.add_marker("slow")


def pytest_collection_finish() -> None:
    """Let the garbage collector leave alone what the tests import: half a million objects, at each full collection."""
    gc.collect()
    gc.freeze()


def pytest_make_parametrize_id(val: object) -> str | None:
    """Name an anonymous function among a test's parameters by what it computes, not "<lambda>"."""
    if not isinstance(val, FunctionType) or val.__name__ != "<lambda>":
        return None
    text = _computed(val.__code__)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _computed(code: CodeType) -> str:
    """The expression of an anonymous function, as it stands in its file."""
    places = {place for place in code.co_positions() if None not in place}
    found = [one for one in _lambdas(code.co_filename) if one.lineno == code.co_firstlineno]
    exact = [one for one in found if (one.lineno, one.end_lineno, one.col_offset, one.end_col_offset) in places]
    return ast.unparse((exact or found)[0])


@functools.cache
def _lambdas(file: str) -> list[ast.expr]:
    """The expressions of all anonymous functions in a file."""
    tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    return [node.body for node in ast.walk(tree) if isinstance(node, ast.Lambda)]


@pytest.fixture(autouse=True)
def _independent() -> None:
    """The same random numbers, one thread, and a compiler without a past, for a test whatever ran before it.

    Dynamo counts the compilations of a code object over all models: after eight of ``nn.Sequential.forward`` the next
    model runs uncompiled without a word, or fails under ``fullgraph=True``.
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if (dynamo := sys.modules.get("torch._dynamo")) is not None:
        dynamo.reset()


@pytest.fixture(params=["int8 dot, where weights are few", "int8 dot, where they are many", "int8 tile"])
def int8_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Every linear layer of eight bits in a test runs in that kernel, whatever the plan has for it."""
    from srigl_fx.runtime.cpu import execute
    from srigl_fx.runtime.cpu.kernels import plan
    from srigl_fx.runtime.cpu.kernels.isa import looks_up_bytes

    kernel = plan.INT8_TILE if request.param == "int8 tile" else plan.INT8_DOT
    k = 5000 if "many" in request.param else 1
    window = plan.int8_window(looks_up_bytes(), kernel, 10_000, k)  # that of a tile is all inputs
    whole = kernel == plan.INT8_TILE
    monkeypatch.setattr(execute, "_int8_plan", lambda in_features, *_: (kernel, in_features if whole else window))
    return kernel


@pytest.fixture(scope="session")
def checkout() -> Path:
    """The root of the source tree; tests that read it are skipped where only the wheel is installed."""
    root = Path(__file__).resolve().parent.parent
    if not (root / "srigl_fx").is_dir():
        pytest.skip("only the wheel is here, not the source tree")
    return root


@pytest.fixture(scope="session", autouse=True)
def _objects() -> None:
    """The operator library, from objects that were compiled before: torch's operators take their code from it."""
    from ort_support import objects

    from srigl_fx.runtime.ort.library import library_path, library_status

    objects.use()
    if library_status().supported:
        library_path()


@pytest.fixture(scope="session", autouse=True)
def _shortcuts() -> Iterator[None]:
    """Torch does once what it does again at each export."""
    with torch_shortcuts.taken():
        yield


@pytest.fixture(scope="session")
def library() -> Path:
    """The built operator library; tests that need it are skipped on platforms that have none."""
    from srigl_fx.runtime.ort.library import library_path, library_status

    status = library_status()
    if not status.supported:
        pytest.skip(status.reason)
    return library_path()
