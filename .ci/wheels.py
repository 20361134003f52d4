"""Build what is uploaded: the sdist, the wheel for any platform, and two for Linux x86-64 with the operator library.

    python .ci/wheels.py dist

One of the two is srigl-fx as it is, so that nobody who installs it waits for a compiler; the other is srigl-fx-runtime,
the library with nothing but ``register`` and ``load``. The library needs no other one, not even that of C: any Linux
takes it. ``--library FILE`` takes one that was built from these sources.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RUNTIME = ROOT / "packages" / "srigl-fx-runtime"
PLATFORM = "manylinux_2_17_x86_64"  # the oldest that any wheel of ONNX Runtime 1.17 runs on


def run(*command: object, cwd: Path | None = None) -> str:
    """What a command prints; its own words if it fails."""
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def with_library(pure: Path, library: Path, inside: str, out: Path, work: Path) -> Path:
    """A wheel for Linux x86-64: ``pure``, and the library at ``inside``."""
    run(sys.executable, "-m", "wheel", "unpack", pure, "--dest", work)
    (tree,) = (path for path in work.iterdir() if path.is_dir())
    shutil.copyfile(library, tree / inside)
    (about,) = tree.glob("*.dist-info/WHEEL")
    text = about.read_text(encoding="utf-8").replace("Root-Is-Purelib: true", "Root-Is-Purelib: false")
    about.write_text(text.replace("Tag: py3-none-any", f"Tag: py3-none-{PLATFORM}"), encoding="utf-8")
    printed = run(sys.executable, "-m", "wheel", "pack", tree, "--dest-dir", out)
    return out / next(word for word in printed.replace("...", " ").split() if word.endswith(".whl")).rpartition("/")[2]


def build(out: Path, library: Path | None) -> list[Path]:
    """Build all into ``out``.

    Returns:
        The files.
    """
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        # The sdist first, the wheel from the sdist: what is missing from the one is missing from the other.
        # From a copy: setuptools writes beside what it packs.
        left_out = shutil.ignore_patterns(".*", "build", "dist", "site", "*.egg-info", "__pycache__", "results")
        shutil.copytree(ROOT, work / "checkout", symlinks=True, ignore=left_out)
        run(sys.executable, "-m", "build", "--no-isolation", "--outdir", work / "pure", work / "checkout")
        (pure,) = (work / "pure").glob("*.whl")
        run(sys.executable, "-m", "wheel", "unpack", pure, "--dest", work / "probe")
        (tree,) = (work / "probe").iterdir()
        code = "from srigl_fx.runtime.ort import library; print(library._packaged_path().name)"
        name = run(sys.executable, "-c", code, cwd=tree).strip()  # by the sources in the wheel
        if library is None:
            print("compiling the operator library: some minutes", flush=True)
            library = work / name
            code = (
                "import pathlib, sys; from srigl_fx.runtime.ort.library import build; build(pathlib.Path(sys.argv[1]))"
            )
            run(sys.executable, "-c", code, library, cwd=tree)
        files = [Path(shutil.copy(path, out)) for path in sorted((work / "pure").iterdir())]
        for part in ("full", "runtime"):
            (work / part).mkdir()
        files.append(with_library(pure, library, f"srigl_fx/runtime/ort/{name}", out, work / "full"))

        shutil.copytree(RUNTIME, work / "source", ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
        shutil.copy(ROOT / "LICENSE", work / "source")
        run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", work / "small", work / "source")
        (small,) = (work / "small").glob("*.whl")
        files.append(with_library(small, library, "srigl_fx_runtime/libsrigl_fx.so", out, work / "runtime"))
    return files


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="the folder to write to")
    parser.add_argument("--library", type=Path, help="an operator library of these sources, in place of building one")
    options = parser.parse_args()
    for path in build(options.out, options.library):
        print(f"{path} {path.stat().st_size >> 10} KiB")


if __name__ == "__main__":
    main()
