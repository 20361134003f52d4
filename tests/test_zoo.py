"""Every model of the zoo, from discovery to ONNX Runtime, against the committed coverage table."""

import importlib.util
import os
from pathlib import Path

import pytest
from zoo import ZOO, coverage
from zoo.table import TABLE

PACKAGES = ("torchvision", "timm", "transformers")
MISSING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
NEEDS = {"torchvision": PACKAGES[:1], "timm": PACKAGES[:2], "transformers": PACKAGES[2:]}
SLOW = frozenset(name for name in ZOO if not name.startswith("nasty"))


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in ZOO])
@pytest.mark.filterwarnings("ignore")  # of the libraries that the models come from
def test_the_whole_way(name: str, tmp_path: Path) -> None:
    from zoo import journey

    if missing := [package for package in NEEDS.get(ZOO[name].family, ()) if package in MISSING]:
        pytest.skip(f"needs {' and '.join(missing)}: make test installs what the zoo needs")
    assert journey.travel(ZOO[name], tmp_path) == coverage.read()[name]


def test_every_model_has_its_row() -> None:
    rows = coverage.read()
    assert list(rows) == list(ZOO)
    assert len(rows) == 72
    assert all(row.sparse > 0 for row in rows.values())
    print("\n" + coverage.text(list(rows.values())))


def test_the_documentation_shows_the_table(checkout: Path) -> None:
    page = (checkout / "docs" / "architectures.md").read_text(encoding="utf-8")
    found = TABLE.search(page)
    assert found is not None
    assert found[0].strip() == coverage.markdown(list(coverage.read().values()))


@pytest.mark.skipif("CI" not in os.environ, reason="only where CI is set must nothing be left out")
def test_ci_has_all_packages() -> None:
    assert not MISSING
