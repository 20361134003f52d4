"""The examples in the docstrings run and give what they say."""

import doctest
import importlib
import pkgutil

import pytest

import srigl_fx


def _modules() -> list[str]:
    return [
        "srigl_fx",
        *(info.name for info in pkgutil.walk_packages(srigl_fx.__path__, "srigl_fx.")),
    ]


@pytest.mark.parametrize("name", _modules())
def test_docstring_examples(name: str) -> None:
    module = importlib.import_module(name)
    results = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert results.failed == 0
