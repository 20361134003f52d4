"""The examples in the docstrings run and give what they say."""

import doctest
import importlib
import pkgutil
from importlib.util import find_spec
from pathlib import Path

import pytest

import srigl_fx


def _modules() -> list[str]:
    """Those that have an example."""
    names = ["srigl_fx", *(info.name for info in pkgutil.walk_packages(srigl_fx.__path__, "srigl_fx."))]
    return [name for name in names if ">>> " in _source(name)]


def _source(name: str) -> str:
    spec = find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", _modules())
def test_docstring_examples(name: str) -> None:
    module = importlib.import_module(name)
    results = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert results.failed == 0
    assert results.attempted > 0
