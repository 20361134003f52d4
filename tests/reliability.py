"""What is tried for longer than a suite may take: ``python tests/reliability.py [NAMES]``, or ``make reliability``.

Each check runs in processes of its own, so that a crash is a failed check and not the end. Its figures are written into
``docs/reliability.md``, in place of the last ones. ``--share 0.01`` tries a hundredth.
"""

import argparse
import ctypes
import itertools
import json
import mmap
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from kernel_support import check_linear, condensed, operands, scales_of
from numpy.typing import NDArray
from ort_support import objects, serve
from ort_support.cases import write_cases
from ort_support.models import Node, conv, linear
from ort_support.mutations import SAMPLES, attempt, mutated, write

import srigl_fx as sx
from srigl_fx.runtime.ort.library import library_path, library_status

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reliability.md"
MARKS = "<!-- figures -->", "<!-- /figures -->"
FILES, CALLS, SECONDS, THREADS, SESSIONS, DAMAGES = 20_000, 4_000, 60, 8, 10_000, 300
FILES_AT_ONCE = 500
MOST_GROWTH = 8  # MB, over all but the first tenth of the sessions


def mutated_files(share: float) -> str:
    """Random changes of models' attributes and weights: an exception of Python, or numbers, and never a crash."""
    stages: dict[str, int] = {"load": 0, "run": 0, "ok": 0}
    for start in range(0, whole(FILES, share), FILES_AT_ONCE):
        with tempfile.TemporaryDirectory() as folder:
            for name, node in mutated(FILES_AT_ONCE, 1 + start, start // FILES_AT_ONCE % 2 == 1).items():
                write(
                    Path(folder),
                    name,
                    node.model(fallback=False),
                    node.feeds(np.ones(SAMPLES[node.x_rank], np.float32)),
                )
            for found in attempt(Path(folder), library_path()).values():
                stages[found["stage"]] += 1
    total, refused = sum(stages.values()), stages["load"] + stages["run"]
    assert 0 < refused < total
    return (
        f"{total:,} files: {refused:,} refused ({stages['load']:,} at loading), {stages['ok']:,} computed, none crashed"
    )


class Guarded:
    """Arrays that end where memory that nobody may touch begins."""

    def __init__(self) -> None:
        self.memory: list[mmap.mmap] = []

    def room(self, nbytes: int) -> memoryview:
        """So many bytes before a guard page."""
        size = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        memory = mmap.mmap(-1, size + mmap.PAGESIZE)
        self.memory.append(memory)
        guard = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + size
        if ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(guard), mmap.PAGESIZE, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
        return memoryview(memory)[size - nbytes : size]

    def copy(self, array: NDArray[Any]) -> NDArray[Any]:
        """The same array there."""
        found: NDArray[Any] = np.frombuffer(self.room(array.nbytes), array.dtype).reshape(array.shape)
        found[...] = array
        return found


def guard_pages(share: float) -> str:
    """Operands, inputs, residuals and outputs that end at a page that may not be touched, at odd sizes."""
    rng, calls = np.random.default_rng(0), whole(CALLS, share)
    kinds = list(itertools.product(("float32", "bfloat16", "float16", "int8"), ((1,), (4,), (2, 1))))
    for i in range(calls):
        dtype, groups = kinds[i % len(kinds)]
        n, in_features, batch = (int(rng.integers(1, most)) for most in (70, 300, 70))
        weight = condensed(n, in_features, int(rng.integers(1, in_features + 1)), dtype=dtype, groups=groups, seed=i)  # type: ignore[arg-type]
        guarded, x, residual = Guarded(), *(rng.standard_normal((batch, size), np.float32) for size in (in_features, n))
        given = [
            torch.from_numpy(guarded.copy(part.view(torch.uint8).numpy())).view(part.dtype) for part in parts(weight)
        ]
        check_linear(
            weight,
            torch.from_numpy(guarded.copy(x)),
            tensors=tuple(given[:4]),  # type: ignore[arg-type]
            residual=torch.from_numpy(guarded.copy(residual)),
            activation="relu" if i % 2 else "none",
        )
    runs = whole(CALLS // 4, share)
    for i in range(runs):
        node = (linear(), conv(pads=[1, 0, 0, 1]))[i % 2]
        node = node if i % 4 < 2 else node.of_eight_bits()
        into_guarded(node, rng, (int(rng.integers(1, 80)), *SAMPLES[node.x_rank][1:]))
    return f"{calls:,} calls from PyTorch, {runs:,} runs in ONNX Runtime: nothing beyond an operand was touched"


def parts(weight: Any) -> list[torch.Tensor]:
    """All operands of a weight, flat enough to be copied as bytes."""
    scales = scales_of(weight)
    return [*operands(weight), *([] if scales is None else [scales])]


def into_guarded(node: Node, rng: np.random.Generator, shape: tuple[int, ...]) -> None:
    """Run a node from and into guarded memory."""
    guarded = Guarded()
    x = guarded.copy(rng.standard_normal(shape, np.float32))
    expected = node.expected(x)
    y = guarded.copy(np.zeros(expected.shape, np.float32))
    binding = (session := session_of(node.model(fallback=False).SerializeToString())).io_binding()
    binding.bind_input("x", "cpu", 0, np.float32, x.shape, x.ctypes.data)
    binding.bind_output("y", "cpu", 0, np.float32, y.shape, y.ctypes.data)
    session.run_with_iobinding(binding)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def session_of(model: bytes) -> onnxruntime.InferenceSession:
    """A session with the library."""
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library_path()))
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def threads(share: float) -> str:
    """Threads that call one session and one lowered model at once, each with its own samples."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(96, 80), torch.nn.GELU(), torch.nn.Linear(80, 33)).eval()
    sx.sparsify(model, sparsity=0.8)
    lowered = sx.lower(model, (torch.randn(4, 96),), min_speedup=0)
    node = linear()
    session, end = session_of(node.model(fallback=False).SerializeToString()), time.monotonic() + SECONDS * share
    counts, wrong = [0] * THREADS, list[int]()

    def work(number: int) -> None:
        generator, rng = torch.Generator().manual_seed(number), np.random.default_rng(number)
        while time.monotonic() < end and not wrong:
            x = torch.randn(1 + counts[number] % 40, 96, generator=generator)
            y = rng.standard_normal((1 + counts[number] % 40, *SAMPLES[2][1:]), np.float32)
            with torch.no_grad():
                same = torch.allclose(lowered(x), model(x), rtol=1e-4, atol=1e-4)
            same = same and np.allclose(session.run(None, {"x": y})[0], node.expected(y), rtol=1e-4, atol=1e-4)
            counts[number] += 1
            if not same:
                wrong.append(number)

    team = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for one in team:
        one.start()
    for one in team:
        one.join()
    assert not wrong
    assert min(counts) > 0
    return f"{THREADS} threads, {SECONDS * share:.0f} s: {sum(counts):,} calls of each, all right"


def sessions(share: float) -> str:
    """Sessions made, run and dropped one after another: memory does not grow with them."""
    models = [make(**given).model(fallback=False).SerializeToString() for make, given in ((linear, {}), (conv, {}))]
    feeds = [{"x": np.ones(SAMPLES[rank], np.float32)} for rank in (2, 4)]
    count, before = whole(SESSIONS, share), 0.0
    for i in range(count):
        session_of(models[i % 2]).run(None, feeds[i % 2])
        if i == count // 10:
            before = resident()
    growth = resident() - before
    assert growth < MOST_GROWTH, f"{growth:.1f} MB more after {count:,} sessions"
    return f"{count:,} sessions: {growth:.1f} MB more at the end than after the first tenth"


def resident() -> float:
    """This process's memory, MB."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None
    return int(found[1]) / 1024


def damaged_library(share: float) -> str:
    """A library cut off or with changed bits in the cache is told, and not loaded; the whole one is."""
    rng, count, built = np.random.default_rng(0), whole(DAMAGES, share), library_path()
    content, folder = built.read_bytes(), Path(tempfile.mkdtemp())
    os.environ["SRIGL_FX_CACHE"] = str(folder)
    place = folder / built.name
    try:
        folder.chmod(0o700)
        for i in range(count + 1):
            changed = bytearray(content)
            if i % 2:
                changed = changed[: int(rng.integers(len(content)))]
            elif i < count:
                changed[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
            place.write_bytes(changed)
            place.chmod(0o755)
            shutil.copy(f"{built}.sha256", f"{place}.sha256")
            # The last one is whole.
            assert (library_status().path == place) == (i == count and not i % 2), f"damage {i}: {library_status()}"
    finally:
        shutil.rmtree(folder)
    return f"{count} damages: each was told; the whole library was taken"


def memory_checker(share: float) -> str:
    """A sample of calls under valgrind: nothing that the library does is an error of memory."""
    if (found := shutil.which("valgrind")) is None:
        return "not tried: valgrind is not installed"
    nodes = (linear(), conv(), linear().of_eight_bits(), conv().of_eight_bits())
    with tempfile.TemporaryDirectory() as folder:
        count = len(write_cases(Path(folder)))
        for (i, node), batch in itertools.product(enumerate(nodes), (1, 2, 17, 33)):
            x = np.random.default_rng(i).standard_normal((batch, *SAMPLES[node.x_rank][1:]), np.float32)
            feeds = {"x": x, "expected": node.expected(x)}
            write(Path(folder), f"sample_{i}_{batch}", node.model(), feeds)
            count += 1
        # A host with NumPy and ONNX Runtime alone: torch takes minutes to import there.
        command = [
            found,
            "--error-limit=no",
            "--num-callers=12",
            sys.executable,
            serve.__file__,
            str(library_path()),
            folder,
        ]
        environment = {**os.environ, "PYTHONMALLOC": "malloc", "SRIGL_FX_ISA": "x86-64-v3", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert "failure" not in result, result
    assert len(result["errors"]) == 2 * count
    assert max(result["errors"].values()) < 1e-4, result
    assert "bad_index" in result["refused"]
    # A block with frames is an error; the first one repeats the command, which names the library.
    blocks = [block for block in re.split(r"==\d+== \n", done.stderr) if re.search("0x.*libsrigl_fx", block)]
    assert not blocks, blocks[0]
    return (
        f"{count} models, in the operators and in the fallback, and 1 that is refused, under valgrind "
        f"{version_of(found)}, AVX2: no error with the library on the stack"
    )


def version_of(program: str) -> str:
    return (
        subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout.strip().split("-")[-1]
    )


CHECKS: dict[str, Callable[[float], str]] = {
    "mutated_files": mutated_files,
    "guard_pages": guard_pages,
    "threads": threads,
    "sessions": sessions,
    "damaged_library": damaged_library,
    "memory_checker": memory_checker,
}


def whole(count: int, share: float) -> int:
    return max(2, int(count * share) // 2 * 2)


def rows(page: str) -> dict[str, str]:
    """The rows of the table there is, by check."""
    return {line.split("`")[1]: line for line in page.split(MARKS[0])[1].split(MARKS[1])[0].splitlines() if "`" in line}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAMES", help=f"of {', '.join(CHECKS)}; all if none is given")
    parser.add_argument("--share", type=float, default=1.0, help="of what is tried; the page is written at 1 only")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - set(CHECKS):
        parser.error(f"no such check: {', '.join(sorted(unknown))}")
    if os.environ.get("SRIGL_FX_TEST_OBJECTS"):
        objects.use()
    if options.inside:
        print(CHECKS[options.inside](options.share))
        return 0
    failed = 0
    for name in options.names or CHECKS:
        start = time.monotonic()
        command = [sys.executable, "-X", "faulthandler", __file__, "--inside", name, "--share", str(options.share)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        outcome = done.stdout.strip() if done.returncode == 0 else f"failed with status {done.returncode}"
        print(f"{name}: {outcome} ({time.monotonic() - start:.0f} s)", flush=True)
        if done.returncode:
            failed += 1
            print(done.stderr[-4000:], file=sys.stderr, flush=True)
        elif options.share == 1:
            note(name, outcome, time.monotonic() - start)
    return 1 if failed else 0


def note(name: str, outcome: str, seconds: float) -> None:
    """Put a figure into the page."""
    page = PAGE.read_text(encoding="utf-8")
    when = f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, {seconds:.0f} s"
    known = {**rows(page), name: f"| `{name}` | {(CHECKS[name].__doc__ or '').strip()} | {outcome} | {when} |"}
    table = ["| check | what is tried | outcome | when, where, how long |", "|---|---|---|---|"]
    table += [known[each] for each in CHECKS if each in known]
    before, after = page.split(MARKS[0])[0], page.split(MARKS[1])[1]
    PAGE.write_text("\n".join([before + MARKS[0], "", *table, "", MARKS[1] + after]), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
