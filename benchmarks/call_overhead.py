"""What one call of a small sparse layer takes in PyTorch beside the dense one: mostly the way to the kernel.

Each layer is a model of its own, called with one sample: ``nn.Linear``, the lowered module (which calls kernels past
torch's dispatcher where no gradients are recorded), and the operator itself. A convolution and a perceptron of eight
layers stand beside. All go in turns, on one thread; times are medians. Then fresh processes that serve a file, which
has run before: what comes beyond importing the host, up to the first result.

    python benchmarks/call_overhead.py

Prints a Markdown page: benchmarks/results/call_overhead.md.
"""

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial

import torch
from harness.machine import describe
from harness.timing import interleaved, timer
from torch import Tensor, nn

import srigl_fx as sx
from srigl_fx.lowering.lowered import LoweredModule
from srigl_fx.passes.condensed_nodes import condensed_nodes
from srigl_fx.passes.program import arguments

SPARSITY = 0.9
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    **{f"{size} -> {size}": (partial(nn.Linear, size, size), (1, size)) for size in (16, 64, 256, 512, 1024)},
    "3x3 convolution, 16 -> 16, 8x8": (partial(nn.Conv2d, 16, 16, 3, padding=1), (1, 16, 8, 8)),
    "eight layers of 64": (lambda: nn.Sequential(*(nn.Linear(64, 64) for _ in range(8))), (1, 64)),
}


def operator_call(lowered: LoweredModule, x: Tensor) -> Callable[[], object] | None:
    """A call of the operator with the tensors of the only condensed layer; None where there are several."""
    nodes = list(condensed_nodes(lowered.graph))
    if len(nodes) != 1:
        return None
    tensors = lowered.state_dict(keep_vars=True)
    given = {
        name: tensors[value.target] if isinstance(value, torch.fx.Node) and name != "x" else value
        for name, value in arguments(nodes[0]).items()
    }
    return partial(nodes[0].target, **{**given, "x": x})  # type: ignore[arg-type]


TORCH = """
import torch
start = time.perf_counter()
import srigl_fx as sx
model = sx.load_lowered(sys.argv[1])
with torch.inference_mode():
    model(torch.ones(1, 64))
"""
ONNX_RUNTIME = """
import numpy, onnxruntime
start = time.perf_counter()
import srigl_fx as sx
session = sx.runtime.load(sys.argv[1])
session.run(None, {session.get_inputs()[0].name: numpy.ones((1, 64), numpy.float32)})
"""
LAST = "print(time.perf_counter() - start, [name for name in ('numba', 'onnx', 'networkx') if name in sys.modules])"


def fresh_processes() -> list[str]:
    """Milliseconds beyond the import of the host, up to the first result."""
    model = MODELS["eight layers of 64"][0]()
    sparse, x = sx.sparsify(model, sparsity=SPARSITY, distribution="uniform").eval(), torch.ones(1, 64)
    rows = ["| host | milliseconds, medians of nine | imported besides |", "|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        sx.lower(sparse, (x,), min_speedup=0).save(f"{folder}/model.srigl")
        sx.export_onnx(sparse, f"{folder}/model.onnx", (x,), min_speedup=0)
        for host, code, file in (("PyTorch", TORCH, "model.srigl"), ("ONNX Runtime", ONNX_RUNTIME, "model.onnx")):
            command = [sys.executable, "-c", f"import sys, time\n{code}{LAST}", f"{folder}/{file}"]
            said = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(10)]
            seconds, others = zip(*(line.strip().split(" ", 1) for line in said[1:]), strict=True)
            rows.append(
                f"| {host} | {1e3 * statistics.median(map(float, seconds)):.0f} | {others[0][1:-1] or 'none'} |"
            )
    return rows


def main() -> None:
    """Print the page."""
    torch.set_num_threads(1)
    rows = [
        "| model | dense | lowered | operator | lowered without `inference_mode` | lowered - dense |",
        "|---" * 6 + "|",
    ]
    for title, (make, shape) in MODELS.items():
        torch.manual_seed(0)
        model = make()
        if not isinstance(model, nn.Sequential):
            model = nn.Sequential(model)
        dense = make().eval()
        sparse = sx.sparsify(model, sparsity=SPARSITY, distribution="uniform").eval()
        x = torch.randn(shape)
        lowered = sx.lower(sparse, (x,), min_speedup=0)
        operator = operator_call(lowered, x)
        calls: dict[str, Callable[[], object]] = {"dense": partial(dense, x), "lowered": partial(lowered, x)}
        if operator is not None:
            calls["operator"] = operator
        with torch.inference_mode():
            seconds = interleaved({name: timer(call) for name, call in calls.items()}, seconds=0.3)
        recorded = interleaved({"lowered": timer(partial(lowered, x))}, seconds=0.2)["lowered"]
        cells = [f"{1e6 * seconds[name]:.1f}" if name in seconds else "" for name in ("dense", "lowered", "operator")]
        beyond = 1e6 * (seconds["lowered"] - seconds["dense"])
        rows.append(f"| {title} | {' | '.join(cells)} | {1e6 * recorded:.1f} | {beyond:+.1f} |")
        print(rows[-1], flush=True)
    about = f"Sparsity {SPARSITY:.0%}, one sample. Microseconds a call, medians, one thread. {describe(1)}"
    fresh = ["", "A fresh process, of those modules that are not for serving:", "", *fresh_processes()]
    print(f"\n{about}", "", *rows, *fresh, sep="\n")


if __name__ == "__main__":
    main()
