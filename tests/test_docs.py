"""The code in README and documentation runs, page by page, in the order a reader meets it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def _source(page: Path) -> str:
    """The page's Python, on the lines where it stands, so that a traceback points into the page."""
    text = page.read_text(encoding="utf-8")
    lines = [""] * len(text.splitlines())
    for block in BLOCK.finditer(text):
        first = text.count("\n", 0, block.start(1))
        code = block.group(1).splitlines()
        lines[first : first + len(code)] = code
    return "\n".join(lines)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # by torch.compile
@pytest.mark.parametrize(
    "page", [page for page in PAGES if BLOCK.search(page.read_text("utf-8"))], ids=lambda p: p.stem
)
def test_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(_source(page), str(page), "exec"), {"__name__": f"docs_{page.stem}"})


def test_links_inside_the_repository_lead_somewhere(checkout: Path) -> None:
    broken = [
        f"{page.name}: {target}"
        for page in [*PAGES, checkout / "CONTRIBUTING.md"]
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
        if "://" not in target and not (page.parent / target).exists()
    ]
    assert not broken


@pytest.mark.long
def test_the_quickstart_runs_as_a_script(checkout: Path) -> None:
    script = checkout / "examples" / "quickstart.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert "PyTorch and ONNX Runtime differ by at most" in done.stdout
    assert done.stderr == ""


def test_the_results_in_the_readme_are_those_that_were_measured(checkout: Path) -> None:
    measured = (checkout / "docs" / "demo" / "results.txt").read_text(encoding="utf-8")
    assert f"```text\n{measured}```" in (checkout / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_site_builds_without_warnings(checkout: Path, tmp_path: Path) -> None:
    pytest.importorskip("material", reason="the extra [docs] is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
