"""Run the operator library for Linux on Arm in the real ONNX Runtime for it, under qemu-user: ``make arm-test``.

    python .ci/arm_test.py .arm [--every 10]

What it needs is qemu-aarch64 (Debian's package qemu-user), apt-get and dpkg; no root, and no file system of another
machine: packages of Debian and of PyPI are unpacked into the folder, 100 MB of downloads. Then three processors are
emulated, without products of bytes, with those of bytes of one kind, and with all; each runs every case of the tests of
hosts, what the oracle's tests of the operators have computed on this machine, and the wheel srigl-fx-runtime. What they
compute is recorded once for the same sources. The figures go into docs/reliability.md.

``--library FILE`` takes a library that was built for Arm from these sources; ``--every 10`` records every tenth test of
the oracle's, where hours are too much: the page then says so.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"
PAGE = ROOT / "docs" / "reliability.md"
MARKS = "<!-- Arm -->", "<!-- /Arm -->"
PLATFORM = "linux-aarch64"
CPUS = {"cortex-a72": "aarch64", "neoverse-n1": "aarch64+dotprod", "max": "aarch64+dotprod+i8mm"}  # and their targets
DEBIAN = ("python3", "libstdc++6", "libgomp1")
# Of ONNX Runtime the newest that an emulated process can import: later ones, 1.31 among them, read about the caches in
# /sys, which is that of this machine, and end at what they find.
ONNXRUNTIME = "onnxruntime==1.23.2"
# The tests whose operators are recorded: every operator, value type, layout, epilogue and size of the oracle's.
RECORDED = ("tests/runtime/test_oracle_onnx.py", "tests/runtime/test_ort_bytes.py")
SMALL = """
import json, sys, numpy as np, srigl_fx_runtime as small
case = np.load(sys.argv[2])
session = small.load(sys.argv[1])
error = float(abs(session.run(None, {"x": case["x"]})[0] - case["expected"]).max())
print(json.dumps({"library": str(small.library_path()), "error": error}))
"""
FULL = """
import doctest, json, sys
sys.modules["numba"] = None  # kernels come from the library, or not at all
from srigl_fx.runtime.cpu import entries
from srigl_fx.runtime.cpu.kernels import isa
from srigl_fx.runtime.ort.library import library_status
tried = doctest.testmod(entries)
result = {"target": isa.host_target(), "found": library_status().path is not None}
print(json.dumps({**result, "ran": tried.attempted > 5, "failed": tried.failed}))
"""


def run(*command: object, cwd: Path | None = None, **environment: str) -> str:
    """What a command prints; its own words if it fails."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.stdout


def unpack_debian(folder: Path) -> Path:
    """The root of a Python for Arm with the libraries that wheels need; apt's own state stays as it is."""
    root = folder / "root"
    if root.exists():
        return root
    apt, debs = folder / "apt", folder / "debs"
    for path in (apt / "lists" / "partial", apt / "cache", debs / "partial"):
        path.mkdir(parents=True, exist_ok=True)
    settings = {
        "Dir::State": apt,
        "Dir::State::lists": apt / "lists",
        "Dir::State::status": "/dev/null",
        "Dir::Cache": apt / "cache",
        "Dir::Cache::archives": debs,
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
    }
    (apt / "conf").write_text("".join(f'{name} "{value}";\n' for name, value in settings.items()), encoding="utf-8")
    run("apt-get", "update", APT_CONFIG=str(apt / "conf"))
    install = ("apt-get", "install", "--yes", "--download-only", "--no-install-recommends", *DEBIAN)
    run(*install, APT_CONFIG=str(apt / "conf"))
    unpacked = folder / "unpacking"
    for package in sorted(debs.glob("*.deb")):
        run("dpkg", "-x", package, unpacked)
    return unpacked.rename(root)


def unpack_wheels(folder: Path, python: str) -> Path:
    """ONNX Runtime for Arm, and what kernels import, of this environment's versions."""
    site = folder / "site"
    wanted = [*(f"{name}=={version(name)}" for name in ("numpy", "ml_dtypes")), ONNXRUNTIME]
    stamp = site / "versions"
    if stamp.exists() and stamp.read_text(encoding="utf-8").split() == wanted:
        return site
    shutil.rmtree(site, ignore_errors=True)
    platforms = [word for release in (28, 27, 17) for word in ("--platform", f"manylinux_2_{release}_aarch64")]
    chosen = ("--no-deps", "--only-binary=:all:", "--python-version", python.removeprefix("python"), *platforms)
    shutil.rmtree(folder / "wheels", ignore_errors=True)
    run(sys.executable, "-m", "pip", "download", "--quiet", *chosen, "--dest", folder / "wheels", *wanted)
    for wheel in (folder / "wheels").glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(site)
    stamp.write_text("\n".join(wanted), encoding="utf-8")
    return site


class Emulator:
    """Python for Arm, on an emulated processor."""

    def __init__(self, root: Path, packages: list[Path], cpu: str) -> None:
        (python,) = (path for path in (root / "usr/bin").glob("python3.*") if path.name[8:].isdigit())
        self.name, self.folder = python.name, root
        self.command = ["qemu-aarch64", "-cpu", cpu, "-L", root, python]
        self.packages = os.pathsep.join(map(str, packages))

    def __call__(self, *arguments: object, **environment: str) -> Any:
        """What a program prints as its last line, as JSON."""
        settings = {"PYTHONPATH": self.packages, "OMP_NUM_THREADS": "2", **environment}
        printed = run(*self.command, *arguments, cwd=self.folder, **settings)  # where no package of ours lies
        return json.loads(printed.strip().splitlines()[-1])


def sources_of_recording() -> str:
    """What stands for all that a recording depends on."""
    from srigl_fx.runtime.ort import library

    tests = [*(ROOT / name for name in RECORDED), *(TESTS / "kernel_support").rglob("*.py")]
    files = [*library.sources(), *sorted(tests), TESTS / "ort_support" / "recording.py"]
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()


def record(folder: Path, every: int) -> Path:
    """What the oracle's tests compute here, once for these sources."""
    recorded = folder / "recorded"
    stamp, wanted = recorded / "of", f"{sources_of_recording()} {every}"
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return recorded
    print("recording what the oracle's tests compute: some minutes", flush=True)
    shutil.rmtree(recorded, ignore_errors=True)
    which = "not fallback and not stock and not reference and not any_"  # by the library, and the same each time
    selected = ("-m", "pytest", "-q", "-p", "ort_support.recording", "-p", "no:cacheprovider", "-k", which)
    paths = os.pathsep.join([str(ROOT), str(TESTS)])
    settings = {"SRIGL_FX_RECORDING": str(recorded), "SRIGL_FX_RECORDING_EVERY": str(every), "PYTHONPATH": paths}
    run(sys.executable, *selected, *RECORDED, cwd=ROOT, **settings)
    stamp.write_text(wanted, encoding="utf-8")
    return recorded


def write_cases(folder: Path) -> Path:
    """The cases that every host must get right."""
    cases = folder / "cases"
    shutil.rmtree(cases, ignore_errors=True)
    cases.mkdir()
    code = "import sys; from pathlib import Path; from ort_support.cases import *; write_cases(Path(sys.argv[1]))"
    paths = os.pathsep.join([str(ROOT), str(TESTS)])
    run(sys.executable, "-c", code, cases, cwd=ROOT, PYTHONPATH=paths)
    return cases


def unpack_own(folder: Path, library: Path) -> Path:
    """Both wheels of ours for Arm, as they are uploaded."""
    out = folder / "dist"
    shutil.rmtree(out, ignore_errors=True)
    run(sys.executable, ROOT / ".ci" / "wheels.py", out, "--only", PLATFORM, "--library", f"{PLATFORM}={library}")
    own = folder / "own"
    shutil.rmtree(own, ignore_errors=True)
    for wheel in out.glob("*aarch64.whl"):
        zipfile.ZipFile(wheel).extractall(own)
    return own


def assert_right(found: dict[str, Any], what: str) -> None:
    """The results of ``serve.py``."""
    from ort_support.cases import CASES, tolerance

    assert "failure" not in found, (what, found)
    for name, (node, _) in CASES.items():
        for by in ("library", "stock"):
            assert found["errors"][f"{name} {by}"] <= 5 * tolerance(node), (what, name, by)
    assert "'indices', row 0: 10 is outside" in found["refused"]["bad_index"], (what, found["refused"])
    assert found["stays"], what


def test_cpu(python: Emulator, cpu: str, library: Path, cases: Path, recorded: Path, every: int) -> str:
    """All that one processor must do; its row in the table of figures."""
    from ort_support.cases import CASES

    best = list(CPUS.values()).index(CPUS[cpu])
    support = TESTS / "ort_support"
    assert_right(python(support / "serve.py", library, cases), cpu)
    for position, target in enumerate(CPUS.values()):
        found = python(support / "serve.py", library, cases, SRIGL_FX_ISA=target)
        if position <= best:
            assert_right(found, f"{cpu} as {target}")
        else:
            assert "names an instruction set that this CPU lacks" in found["failure"], found
    for wrong in ("x86-64", "aarch64,aarch64+dotprod", "aarch64+dotpro", "aarch64+dotprod+i8mm+"):
        found = python(support / "serve.py", library, cases, SRIGL_FX_ISA=wrong)
        assert f"SRIGL_FX_ISA must be one of {', '.join(CPUS.values())};" in found["failure"], (wrong, found)
    full = python("-c", FULL)
    assert full == {"target": CPUS[cpu], "found": True, "ran": True, "failed": 0}, full
    small = python("-c", SMALL, cases / "linear_wide.onnx", cases / "linear_wide.npz")
    assert small["error"] < 1e-4, small
    assert small["library"].endswith("own/srigl_fx_runtime/libsrigl_fx.so"), small
    # All but the kernels of bytes is the same code on each processor.
    replayed = python(support / "replay.py", library, recorded, *(["Int8"] if best else []))
    assert replayed["calls"] > 500 // every, replayed
    assert not replayed["faults"], (cpu, len(replayed["faults"]), replayed["faults"][:20])
    print(f"{cpu} ({CPUS[cpu]}): {replayed['models']} models, {replayed['calls']} calls as on this machine", flush=True)
    which = "eight bits" if best else "all"
    numbers = f"{len(CASES)} as {best + 1} | {which}: {replayed['models']:,} | {replayed['calls']:,}"
    return f"| `{cpu}` | `{CPUS[cpu]}` | {numbers} | {replayed['largest']:.1e}, and 0 of whole numbers |"


def note(rows: list[str], every: int) -> None:
    """Put the figures into the page."""
    page = PAGE.read_text(encoding="utf-8")
    before, after = page.split(MARKS[0])[0], page.split(MARKS[1])[1]
    table = [
        "| processor | its best instruction set | hosts' cases | operators' models | calls | largest difference |",
        "|---|---|---|---|---|---|",
        *rows,
    ]
    emulator = run("qemu-aarch64", "--version").split()[2]
    sample = f" Of the oracle's tests one in {every} was taken." if every > 1 else ""
    where = f"qemu-aarch64 {emulator}, {ONNXRUNTIME.replace('==', ' ')}, {datetime.now(UTC):%Y-%m-%d}.{sample}"
    PAGE.write_text("\n".join([before + MARKS[0], "", *table, "", where, "", MARKS[1] + after]), encoding="utf-8")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to keep what is downloaded")
    parser.add_argument("--library", type=Path, help="an operator library of these sources, in place of building one")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="record every N-th of the oracle's tests")
    options = parser.parse_args()
    if options.every < 1:
        parser.error(f"--every must be at least 1, not {options.every}")
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    sys.path[:0] = [str(ROOT), str(TESTS)]
    if not shutil.which("qemu-aarch64"):
        raise SystemExit("there is no qemu-aarch64: install Debian's package qemu-user")
    root = unpack_debian(folder)
    site = unpack_wheels(folder, Emulator(root, [], "max").name)
    if options.library is None:
        from srigl_fx.runtime import library_path

        print("compiling the operator library for Arm, if it is not there yet: some minutes", flush=True)
        options.library = library_path(PLATFORM)
    cases, recorded = write_cases(folder), record(folder, options.every)
    own, rows = unpack_own(folder, options.library), []
    for cpu in CPUS:
        python = Emulator(root, [own, site], cpu)
        rows.append(test_cpu(python, cpu, options.library, cases, recorded, options.every))
    note(rows, options.every)


if __name__ == "__main__":
    main()
