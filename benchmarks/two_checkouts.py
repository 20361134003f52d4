"""Two checkouts of this library beside each other: kernels, lowering and discovery, in one run, interleaved.

Run ``python benchmarks/two_checkouts.py OLD NEW`` with two source trees; it prints a Markdown table of medians and
ratios. Each tree runs in a process of its own, one thread, through names that are public in both. What differs by less
than the noise, which the page names as the spread of the old tree against itself, has not changed.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from harness.timing import Timer, interleaved

BATCHES = (1, 3, 16, 64)


def cases() -> dict[str, Callable[[], object]]:
    """What is timed, by name, in a process that has one of the trees on its path."""
    import torch
    from torch import nn

    import srigl_fx as sx

    torch.set_num_threads(1)
    torch.manual_seed(0)
    found: dict[str, Callable[[], object]] = {}

    def network(layers: int) -> nn.Module:
        parts = [part for _ in range(layers) for part in (nn.Linear(256, 256), nn.ReLU())]
        return nn.Sequential(*parts)

    def add(name: str, model: nn.Module, x: torch.Tensor) -> None:
        lowered = sx.lower(model, (x,), min_speedup=0)
        found[f"torch, {name}"] = lambda: lowered(x)
        path = Path(tempfile.mkdtemp()) / "model.onnx"
        sx.export_onnx(model, path, (x,), min_speedup=0)
        session = sx.runtime.load(path)
        feed = {session.get_inputs()[0].name: x.numpy()}
        found[f"ONNX Runtime, {name}"] = lambda: session.run(None, feed)

    for size, sparsity in ((32, 0.8), (768, 0.9)):
        layer = sx.sparsify(nn.Sequential(nn.Linear(size, size)), sparsity=sparsity).eval()
        for batch in BATCHES:
            add(f"{size} x {size}, {batch} samples", layer, torch.randn(batch, size))
    convolution = sx.sparsify(nn.Sequential(nn.Conv2d(64, 64, 3, padding=1)), sparsity=0.9).eval()
    add("convolution of 64 channels, 28 x 28", convolution, torch.randn(1, 64, 28, 28))
    model = sx.sparsify(network(10), sparsity=0.9).eval()
    x = torch.randn(4, 256)
    found["lower, 10 layers"] = lambda: sx.lower(model, (x,), min_speedup=0)
    found["sparsify, 100 layers"] = lambda: sx.sparsify(network(100), sparsity=0.9)
    return found


def work() -> None:
    """Answer ``CALLS NAME`` on the standard input with the seconds that they took."""
    known = cases()
    print("\t".join(known), flush=True)
    for line in sys.stdin:
        calls, _, name = line.strip().partition(" ")
        start = time.perf_counter()
        for _ in range(int(calls)):
            known[name]()
        print(time.perf_counter() - start, flush=True)


def started(tree: Path) -> tuple["subprocess.Popen[str]", list[str]]:
    process = subprocess.Popen(
        [sys.executable, __file__, "--work"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tree), str(Path(__file__).parent)])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    output: IO[str] = process.stdout  # type: ignore[assignment]
    return process, output.readline().strip().split("\t")


def asked(process: "subprocess.Popen[str]", name: str) -> Timer:
    channel: Any = process

    def taken(calls: int) -> float:
        channel.stdin.write(f"{calls} {name}\n")
        channel.stdin.flush()
        return float(channel.stdout.readline())

    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trees", nargs="*", type=Path, help="the old and the new source tree")
    parser.add_argument("--work", action="store_true", help="answer another process")
    options = parser.parse_args()
    if options.work:
        work()
        return
    old, new = (tree.resolve() for tree in options.trees)
    processes, names = {}, []
    for key, tree in {"old": old, "new": new, "old again": old}.items():
        processes[key], names = started(tree)
    print("| case | old | new | new / old | old again / old |\n|---|---|---|---|---|")
    for name in names:
        timers = {key: asked(process, name) for key, process in processes.items()}
        times = interleaved(timers, seconds=1.0, rounds=15)
        first, second, third = times["old"], times["new"], times["old again"]
        print(f"| {name} | {first * 1e6:.1f} us | {second * 1e6:.1f} us | {second / first:.2f} | {third / first:.2f} |")
    for process in processes.values():
        process.kill()


if __name__ == "__main__":
    main()
