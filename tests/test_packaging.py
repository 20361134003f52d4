"""What is shipped: the package list, the typed marker, the wheel's content, the pins."""

import importlib.metadata
import os
import re
import runpy
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

import srigl_fx

WHEEL = os.environ.get("SRIGL_FX_TEST_WHEEL")


def _project(checkout: Path) -> dict[str, Any]:
    return tomllib.loads((checkout / "pyproject.toml").read_text(encoding="utf-8"))


def _packages_in_tree(checkout: Path) -> set[str]:
    found = set()
    for folder, prefix in (("srigl_fx", ""), ("passes", "srigl_fx."), ("runtime", "srigl_fx.")):
        for init in (checkout / folder).rglob("__init__.py"):  # rglob does not follow the two symlinks in srigl_fx/
            parts = init.parent.relative_to(checkout).parts
            if parts[:2] not in {("srigl_fx", "passes"), ("srigl_fx", "runtime")}:
                found.add(prefix + ".".join(parts))
    return found


def test_every_package_of_the_tree_is_listed(checkout: Path) -> None:
    listed = _project(checkout)["tool"]["setuptools"]["packages"]
    assert len(listed) == len(set(listed))
    assert set(listed) == _packages_in_tree(checkout)


def test_links_let_editors_follow_the_mapped_folders(checkout: Path) -> None:
    for name in ("passes", "runtime"):
        link = checkout / "srigl_fx" / name
        assert link.is_symlink()
        assert os.readlink(link) == f"../{name}"


def _requirement_names(requirements: list[str]) -> set[str]:
    return {re.split(r"[<>=!~\[; ]", requirement, maxsplit=1)[0].lower() for requirement in requirements}


def test_the_core_needs_eight_packages_and_all_extras_are_pinned(checkout: Path) -> None:
    project = _project(checkout)["project"]
    core = _requirement_names(project["dependencies"])
    assert core == {"torch", "numpy", "numba", "networkx", "onnx", "onnxscript", "onnxruntime", "safetensors"}

    extras = project["optional-dependencies"]
    integrations = {"transformers", "tensorboard", "lightning", "onnx-tools", "optimizers", "pruning", "cuda"}
    integrations |= {"recipes"}
    assert set(extras) == {"cli", "demo", "serve", "test", "zoo", "docs", "release", *integrations}
    pins = [
        line for line in (checkout / "constraints.txt").read_text(encoding="utf-8").splitlines() if line[:1] not in "#"
    ]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.]+", pin) for pin in pins)
    pinned = {pin.split("==")[0].lower() for pin in pins}
    wanted = core.union(*map(_requirement_names, extras.values())) - {"srigl-fx"}
    assert wanted <= pinned


def test_one_version_everywhere(checkout: Path) -> None:
    small = tomllib.loads((checkout / "packages" / "srigl-fx-runtime" / "pyproject.toml").read_text(encoding="utf-8"))
    code = (checkout / "packages" / "srigl-fx-runtime" / "srigl_fx_runtime" / "__init__.py").read_text(encoding="utf-8")
    citation = (checkout / "CITATION.cff").read_text(encoding="utf-8")
    assert _project(checkout)["project"]["version"] == srigl_fx.__version__ == small["project"]["version"]
    assert f'\n__version__ = "{srigl_fx.__version__}"\n' in code
    assert f"\nversion: {srigl_fx.__version__}\n" in citation
    assert f"\n## [{srigl_fx.__version__}]" in (checkout / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.long
def test_the_import_takes_little_beyond_that_of_torch(checkout: Path) -> None:
    done = subprocess.run(
        [sys.executable, checkout / "benchmarks" / "import_time.py", "--processes", "2"],
        capture_output=True,
        text=True,
        check=True,
    )
    (best,) = re.findall(r"beyond torch: (\d+\.\d) ms of processor time", done.stdout)
    assert float(best) < 50


def test_an_index_shows_no_link_to_a_file(checkout: Path) -> None:
    for_an_index = runpy.run_path(str(checkout / ".ci" / "index_readme.py"))["for_an_index"]
    text = "# a\n\nb [c\nd](docs/e.md#f), [LICENSE](LICENSE), [g](https://h) ![i](j.png) `[k](l)`\n\n<picture>\n"
    text += '<img src="m.svg"></picture>\n\n[n](#o)\n\n```python\np = q[r](s)\n```\n'
    without = for_an_index(text)
    assert "b c\nd (`docs/e.md`), LICENSE, [g](https://h) i `[k](l)`\n\nThe files that are named here" in without
    assert without.endswith("this release.\n\n[n](#o)\n\n```python\np = q[r](s)\n```\n")
    at = for_an_index(text, "https://host/owner/name/", "1.2")
    assert "[c\nd](https://host/owner/name/blob/v1.2/docs/e.md#f)" in at
    assert "![i](https://host/owner/name/raw/v1.2/j.png) `[k](l)`" in at
    assert '<img src="https://host/owner/name/raw/v1.2/m.svg">' in at
    readme = (checkout / "README.md").read_text(encoding="utf-8")
    for shown in (for_an_index(readme), for_an_index(readme, "https://host/owner/name", "1.2")):
        targets = re.findall(r"\]\(([^)]*)\)|(?:src|srcset)=\"([^\"]*)", shown)
        assert all((one or other).startswith(("https://", "#")) for one, other in targets)


def test_a_module_outside_its_package_says_what_to_import(checkout: Path) -> None:
    for name in ("passes", "runtime"):
        done = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=checkout, capture_output=True, text=True)
        assert done.returncode == 1
        assert f"import this package as 'srigl_fx.{name}'" in done.stderr


def test_typed_marker_and_command_are_installed() -> None:
    assert (Path(srigl_fx.__file__).parent / "py.typed").is_file()
    (command,) = importlib.metadata.entry_points(group="console_scripts", name="srigl-fx")
    assert command.load().__module__ == "srigl_fx.cli"


@pytest.mark.skipif(WHEEL is None, reason="SRIGL_FX_TEST_WHEEL names no wheel")
class TestWheel:
    """Only where the tests run against a built wheel (``make wheel-test``)."""

    def test_tests_import_the_installed_package(self) -> None:
        assert "site-packages" in Path(srigl_fx.__file__).parts
        assert not any((Path(entry or ".") / "srigl_fx" / "sparsify.py").is_file() for entry in ("", os.getcwd()))

    def test_content(self) -> None:
        assert WHEEL is not None
        here = Path(__file__).resolve().parent.parent
        packages = _project(here)["tool"]["setuptools"]["packages"]
        names = set(zipfile.ZipFile(WHEEL).namelist())
        assert {f"{package.replace('.', '/')}/__init__.py" for package in packages} <= names
        assert "srigl_fx/py.typed" in names
        assert any(name.endswith("licenses/LICENSE") for name in names)
        tops = {name.split("/")[0] for name in names}
        assert {top for top in tops if not top.endswith(".dist-info")} == {"srigl_fx"}
