"""What one call of a small sparse layer takes in PyTorch beside the dense one: mostly the way to the kernel.

Each layer is a model of its own, called with one sample: ``nn.Linear``, the lowered module (which calls kernels past
torch's dispatcher where no gradients are recorded), and the operator itself. A convolution and a perceptron of eight
layers stand beside. All go in turns, on one thread; times are medians.

    python benchmarks/call_overhead.py

Prints a Markdown page: benchmarks/results/call_overhead.md.
"""

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
    print(f"\n{about}", "", *rows, sep="\n")


if __name__ == "__main__":
    main()
