"""Run the lines of other libraries in docs/migrating.md with those libraries, in the versions that the page names.

    python .ci/migration_test.py            # all sections
    python .ci/migration_test.py SparseLab  # those whose heading has the word

A section says what it needs in a comment, ``<!-- needs: ARGUMENTS OF PIP -->``. That is installed into a folder that
comes first on the path, and the blocks ``py`` of the section run there, after the page's first block. With
``needs, alone`` they run in an environment with nothing else, without that block, and find the files that the section's
blocks ``python``, which are this library's and which the tests run too, have left.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "migrating.md"
NEEDS = re.compile(r"^<!-- needs(?P<alone>, alone)?: (?P<arguments>.+) -->$", re.MULTILINE)


def blocks(text: str, language: str) -> list[str]:
    """The code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def call(*command: object, cwd: Path, path: list[Path] | None = None) -> None:
    """Run a command, and end this one if it fails."""
    environment = dict(os.environ) | {"NM_DISABLE_ANALYTICS": "1", "NM_BYPASS_TORCH_VERSION": "1"}
    environment.pop("PYTHONPATH", None)
    if path:
        environment["PYTHONPATH"] = os.pathsep.join(map(str, path))
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{command[0]} failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")


def run_section(heading: str, text: str, setup: str) -> None:
    """Install what a section needs, and run its blocks."""
    needs = NEEDS.search(text)
    if needs is None:
        return
    print(f"{heading}: {needs['arguments']}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arguments = needs["arguments"].split()
        pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        if needs["alone"]:
            venv.create(folder / "alone", with_pip=True)
            python, path, first = folder / "alone" / "bin" / "python", None, ""
            (folder / "ours.py").write_text("\n".join([setup, *blocks(text, "python")]), encoding="utf-8")
            call(sys.executable, "-W", "ignore", "ours.py", cwd=folder, path=[ROOT])
            call(python, *pip, *arguments, cwd=folder)
        else:
            python, path, first = Path(sys.executable), [folder / "packages", ROOT], setup
            call(python, *pip, "--target", folder / "packages", *arguments, cwd=folder)
        (folder / "theirs.py").write_text("\n".join([first, *blocks(text, "py")]), encoding="utf-8")
        call(python, "-W", "ignore", "theirs.py", cwd=folder, path=path)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("words", nargs="*", help="of headings; all sections by default")
    words = parser.parse_args().words
    introduction, *sections = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    (setup,) = blocks(introduction, "python")
    for section in sections:
        heading = section.partition("\n")[0]
        if not words or any(word.lower() in heading.lower() for word in words):
            run_section(heading, section, setup)


if __name__ == "__main__":
    main()
