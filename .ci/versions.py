"""Run the tests on the oldest and on the newest releases that pyproject.toml allows, and write down what came out.

Each environment is made once, under ``.versions/``. ``oldest`` has every package at its lower bound in pyproject.toml,
but for the tools of the tests, which are those of constraints.txt; ``newest`` has whatever pip takes. The tests run
part by part, one folder or file of ``tests/`` after the other; each part's result goes into docs/versions.md as soon as
there is one, in place of that part's last result. It needs disk and time: where pip offers PyTorch for CUDA only, an
environment is 6 GB.

``make versions`` runs all of it; ``python .ci/versions.py oldest --parts nn train -- -m "not slow"`` some of it.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
import tomllib
import venv
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

from install_torch import CPU_INDEX, cpu_index_answers

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "versions.md"
ENVIRONMENTS = ("oldest", "newest")
TOOLS = frozenset({"build", "hypothesis", "mypy", "pytest", "pytest-xdist", "ruff"})
LEFT_OUT = frozenset({"docs", "onnx-tools", "recipes"})  # extras: pages, tools at pinned releases, data sets
SHOWN = (
    *("python", "torch", "torchvision", "numpy", "numba", "llvmlite", "networkx", "onnx", "onnx-ir", "onnxscript"),
    *("onnxruntime", "safetensors", "transformers", "accelerate", "timm", "lightning", "tensorboard", "scikit-learn"),
    *("scipy", "matplotlib", "tqdm", "typer", "rich"),
)


def requirements() -> dict[str, str]:
    """The packages of the core and of the extras that the tests use, by name, with their lower bounds.

    Raises:
        SystemExit: A package has no single lower bound, or two extras give it different ones.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {name: entries for name, entries in project["optional-dependencies"].items() if name not in LEFT_OUT}
    bounds: dict[str, str] = {}
    for entry in [*project["dependencies"], *(entry for entries in extras.values() for entry in entries)]:
        if entry.startswith("srigl-fx["):
            continue
        found = re.fullmatch(r"([\w.-]+)>=([\w.]+)", entry)
        if found is None or bounds.setdefault(found[1], found[2]) != found[2]:
            raise SystemExit(f"pyproject.toml: {entry!r} must be name>=release, with the same release everywhere")
    return bounds


def pins(name: str) -> list[str]:
    """What pip is asked for, besides the library itself."""
    if name == "newest":
        return sorted(requirements())
    fixed = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if "==" in line
    )
    return sorted(f"{key}=={fixed[key] if key in TOOLS else bound}" for key, bound in requirements().items())


def interpreter(name: str, folder: Path) -> Path:
    """The interpreter of the environment, which is made, or brought to what pyproject.toml says now."""
    python = folder / name / "bin" / "python"
    if not python.exists():
        venv.create(folder / name, with_pip=True)
    command = [str(python), "-m", "pip", "install", "--quiet", "--upgrade", *pins(name)]
    if cpu_index_answers():
        command += ["--extra-index-url", CPU_INDEX]
    print(f"{name}: pip installs what is missing", flush=True)
    subprocess.run(command, check=True)
    subprocess.run([*command[:5], "setuptools"], check=True)
    no_more = ["--no-deps", "--no-build-isolation", "--editable", str(ROOT)]
    subprocess.run([*command[:5], *no_more], check=True)
    return python


def all_parts() -> list[str]:
    """Folders and files of tests, those without a folder last."""
    tests = ROOT / "tests"
    folders = sorted(path.name for path in tests.iterdir() if path.is_dir() and any(path.rglob("test_*.py")))
    return [*folders, *sorted(path.name for path in tests.glob("test_*.py"))]


def run_part(python: Path, part: str, report: Path, options: list[str]) -> dict[str, Any]:
    """The outcome of one part."""
    command = [str(python), "-m", "pytest", "-q", "--tb=short", f"--junitxml={report}", *options, f"tests/{part}"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}
    report.unlink(missing_ok=True)
    started = time.time()
    status = subprocess.run(command, cwd=ROOT, env=environment).returncode
    outcome: dict[str, Any] = {"passed": 0, "skipped": 0, "failed": [], "options": " ".join(options)}
    outcome |= {"date": time.strftime("%Y-%m-%d", time.gmtime(started)), "seconds": round(time.time() - started)}
    if not report.exists():
        outcome["failed"] = [f"pytest ended with status {status}"]
        return outcome
    for case in ET.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        if kinds & {"failure", "error"}:
            outcome["failed"].append(case.get("name", ""))
        else:
            outcome["skipped" if "skipped" in kinds else "passed"] += 1
    return outcome


def commit() -> str:
    """The commit that is checked out, with a mark where files differ from it."""
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=8", "--exclude=*"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip() or "unknown"


def versions(python: Path) -> dict[str, str]:
    """The releases of the packages that the page shows."""
    code = (
        "import json, platform, sys\nfrom importlib.metadata import version\n"
        "print(json.dumps({name: platform.python_version() if name == 'python' else version(name) "
        "for name in sys.argv[1:]}))"
    )
    done = subprocess.run([str(python), "-c", code, *SHOWN], capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def write_page(folder: Path) -> None:
    """Put the tables of all results into the page, between its marks."""
    results = {
        name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        for name in ENVIRONMENTS
        if (folder / f"{name}.json").exists()
    }
    lines = ["", f"| package | {' | '.join(results)} |", f"|---|{'---|' * len(results)}"]
    for package in SHOWN:
        found = [result["versions"].get(package, "") for result in results.values()]
        lines.append(f"| {package} | {' | '.join(found)} |")
    lines += ["", f"| tests | {' | '.join(results)} |", f"|---|{'---|' * len(results)}"]
    for part in all_parts():
        cells = [_cell(result["parts"].get(part)) for result in results.values()]
        lines.append(f"| `{part}` | {' | '.join(cells)} |")
    failed = [
        f"- {name}, `{part}`: {', '.join(f'`{test}`' for test in outcome['failed'])}"
        for name, result in results.items()
        for part, outcome in result["parts"].items()
        if outcome["failed"]
    ]
    lines += ["", *(["Failed:", "", *failed] if failed else ["None of those that were run failed."]), ""]
    before, _, rest = PAGE.read_text(encoding="utf-8").partition("<!-- results -->")
    after = rest.partition("<!-- end -->")[2]
    PAGE.write_text(f"{before}<!-- results -->\n{chr(10).join(lines)}<!-- end -->{after}", encoding="utf-8")


def _cell(outcome: dict[str, Any] | None) -> str:
    if outcome is None:
        return "not run"
    counts = f"{outcome['passed']} passed"
    counts += f", **{len(outcome['failed'])} failed**" if outcome["failed"] else ""
    counts += f", {outcome['skipped']} skipped" if outcome["skipped"] else ""
    fast = ", without slow ones" if "not slow" in outcome["options"] else ""
    return f"{counts}{fast} ({outcome['commit']}, {outcome['date']})"


def main() -> int:
    """Do what the command line asks; return 1 where a test failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environments", nargs="*", help=f"of {', '.join(ENVIRONMENTS)}; both, if none is named")
    parser.add_argument("--parts", nargs="+", default=None, help="folders or files of tests/; all by default")
    parser.add_argument("--folder", type=Path, default=ROOT / ".versions", help="where the environments are")
    parser.add_argument("--installed", action="store_true", help="take the environments as they are")
    own = sys.argv[1:]
    options = own[own.index("--") + 1 :] if "--" in own else []
    arguments = parser.parse_args(own[: own.index("--")] if "--" in own else own)
    if unknown := set(arguments.environments) - set(ENVIRONMENTS):
        parser.error(f"there is no environment {min(unknown)!r}")
    at = commit()
    folder = arguments.folder.resolve()
    folder.mkdir(exist_ok=True)
    failed = False
    for name in arguments.environments or ENVIRONMENTS:
        python = folder / name / "bin" / "python" if arguments.installed else interpreter(name, folder)
        kept = folder / f"{name}.json"
        result = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {"parts": {}}
        result["versions"] = versions(python)
        for part in arguments.parts or all_parts():
            print(f"{name}: {part}", flush=True)
            outcome = run_part(python, part, folder / f"{name}.xml", options)
            result["parts"][part] = {"commit": at, **outcome}
            failed |= bool(outcome["failed"])
            kept.write_text(json.dumps(result, indent=1), encoding="utf-8")
            write_page(folder)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
