"""Build what is uploaded: the sdist, the wheel for any platform, and two for each Linux that has an operator library.

    python .ci/wheels.py dist

One of the two is srigl-fx as it is, so that nobody who installs it waits for a compiler; the other is srigl-fx-runtime,
the library with nothing but ``register`` and ``load``. The libraries, for x86-64 and for Arm, are built on either; they
need that of C alone. ``--library PLATFORM=FILE`` takes one that was built from these sources. An index shows README.md
without the files beside it: ``--address`` says where they are on the web, and without it their names stand there.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path

from index_readme import for_an_index

ROOT = Path(__file__).resolve().parents[1]
RUNTIME = ROOT / "packages" / "srigl-fx-runtime"
# By the platform of a library; of each the oldest that any wheel of ONNX Runtime 1.17 runs on.
TAGS = {"linux-x86_64": "manylinux_2_17_x86_64", "linux-aarch64": "manylinux_2_17_aarch64"}
# Prints where a platform's library is in a wheel; builds it there where a file is given.
NAME = "import sys; from srigl_fx.runtime.ort import library; print(library._packaged_path(sys.argv[1]).name)"
BUILD = """
import pathlib, sys
from srigl_fx.runtime.ort.library import build
build(pathlib.Path(sys.argv[2]), platform=sys.argv[1])
"""
# Fails unless a file is a library for a platform.
CHECK = """
import pathlib, sys
from srigl_fx.runtime.ort import elf, library
found = elf.machine_of(pathlib.Path(sys.argv[2]).read_bytes(), kind=elf.ET_DYN)
if found is None or found.name != library.PLATFORMS[sys.argv[1]]:
    sys.exit(f"{sys.argv[2]} is no library for {sys.argv[1]}")
"""


def run(*command: object, cwd: Path | None = None) -> str:
    """What a command prints; its own words if it fails."""
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def with_library(pure: Path, library: Path, inside: str, tag: str, out: Path, work: Path) -> Path:
    """A wheel for one platform: ``pure``, and the library at ``inside``."""
    run(sys.executable, "-m", "wheel", "unpack", pure, "--dest", work)
    (tree,) = (path for path in work.iterdir() if path.is_dir())
    shutil.copyfile(library, tree / inside)
    (about,) = tree.glob("*.dist-info/WHEEL")
    text = about.read_text(encoding="utf-8").replace("Root-Is-Purelib: true", "Root-Is-Purelib: false")
    about.write_text(text.replace("Tag: py3-none-any", f"Tag: py3-none-{tag}"), encoding="utf-8")
    printed = run(sys.executable, "-m", "wheel", "pack", tree, "--dest-dir", out)
    return out / next(word for word in printed.replace("...", " ").split() if word.endswith(".whl")).rpartition("/")[2]


def library_for(platform: str, given: Path | None, tree: Path, work: Path) -> Path:
    """A platform's library from the sources of the wheel in ``tree``: the given one, or a new one."""
    library = given.resolve() if given else work / f"{platform}.so"
    if given is None:
        print(f"compiling the operator library for {platform}: some minutes", flush=True)
        run(sys.executable, "-c", BUILD, platform, library, cwd=tree)
    return library


def build(out: Path, given: dict[str, Path], platforms: Sequence[str], address: str | None = None) -> list[Path]:
    """Build all into ``out``.

    Args:
        out: The folder.
        given: Libraries that are there already, by platform.
        platforms: Those to build wheels for.
        address: The repository's, for the links of README.md.

    Returns:
        The files.
    """
    for platform, library in given.items():
        run(sys.executable, "-c", CHECK, platform, library.resolve(), cwd=ROOT)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        # The sdist first, the wheel from the sdist: what is missing from the one is missing from the other.
        # From a copy: setuptools writes beside what it packs.
        left_out = shutil.ignore_patterns(".*", "build", "dist", "site", "*.egg-info", "__pycache__", "results")
        shutil.copytree(ROOT, work / "checkout", symlinks=True, ignore=left_out)
        readme = work / "checkout" / "README.md"
        version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
        readme.write_text(for_an_index(readme.read_text(encoding="utf-8"), address, version), encoding="utf-8")
        run(sys.executable, "-m", "build", "--no-isolation", "--outdir", work / "pure", work / "checkout")
        (pure,) = (work / "pure").glob("*.whl")
        run(sys.executable, "-m", "wheel", "unpack", pure, "--dest", work / "probe")
        (tree,) = (work / "probe").iterdir()
        libraries = {platform: library_for(platform, given.get(platform), tree, work) for platform in platforms}
        files = [Path(shutil.copy(path, out)) for path in sorted((work / "pure").iterdir())]
        shutil.copytree(RUNTIME, work / "source", ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
        shutil.copy(ROOT / "LICENSE", work / "source")
        run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", work / "small", work / "source")
        (small,) = (work / "small").glob("*.whl")
        for platform, library in libraries.items():
            name = run(sys.executable, "-c", NAME, platform, cwd=tree).strip()  # by the sources in the wheel
            for wheel, inside in ((pure, f"srigl_fx/runtime/ort/{name}"), (small, "srigl_fx_runtime/libsrigl_fx.so")):
                place = work / f"{platform} {wheel.name}"
                place.mkdir()
                files.append(with_library(wheel, library, inside, TAGS[platform], out, place))
    return files


def platform_and_file(text: str) -> tuple[str, Path]:
    """What ``--library`` says."""
    platform, given, file = text.partition("=")
    if not given or platform not in TAGS:
        raise argparse.ArgumentTypeError(f"{text!r} is not PLATFORM=FILE with one of {', '.join(TAGS)}")
    return platform, Path(file)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="the folder to write to")
    parser.add_argument(
        "--library",
        type=platform_and_file,
        action="append",
        default=[],
        metavar="PLATFORM=FILE",
        help="a platform's operator library of these sources, in place of building it",
    )
    parser.add_argument("--only", choices=TAGS, nargs="+", default=list(TAGS), help="the platforms; all by default")
    parser.add_argument("--address", help="the repository's, such as https://host/owner/name")
    options = parser.parse_args()
    if unused := sorted(dict(options.library).keys() - set(options.only)):
        parser.error(f"--library {unused[0]} is given, but --only leaves this platform out")
    for path in build(options.out, dict(options.library), options.only, options.address):
        print(f"{path} {path.stat().st_size >> 10} KiB")


if __name__ == "__main__":
    main()
