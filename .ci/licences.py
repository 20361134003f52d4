"""Write the licences of the packages that the core needs, directly or not, as they are installed here.

    python .ci/licences.py dist

pip-licenses reads them; which packages they are, the installed metadata say. Extras are left out.
"""

import argparse
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]


def normal(name: str) -> str:
    """A package's name as PEP 503 has it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def needed(requirements: Iterable[str]) -> set[str]:
    """The installed packages that these requirements bring, and those that they bring in turn.

    Raises:
        SystemExit: If one is not installed.
    """
    found: set[str] = set()
    waiting = [Requirement(text) for text in requirements]
    while waiting:
        one = waiting.pop()
        if normal(one.name) in found or (one.marker and not one.marker.evaluate({"extra": ""})):
            continue
        found.add(normal(one.name))
        try:
            waiting += [Requirement(text) for text in metadata.requires(one.name) or ()]
        except metadata.PackageNotFoundError as error:
            raise SystemExit(f"{one.name} is not installed: pip install .") from error
    return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="the folder to write to")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    packages = sorted(needed(project["dependencies"]))
    command = [sys.executable, "-m", "piplicenses", "--from=mixed", "--with-urls", "--packages", *packages]
    for kind, name in (("markdown", "licences.md"), ("json", "licences.json")):
        path = out / name
        subprocess.run([*command, f"--format={kind}", f"--output-file={path.resolve()}"], check=True)
    print(f"{len(packages)} packages")


if __name__ == "__main__":
    main()
