"""Condensed against dense linear layers in torch, one sample, one thread: where it pays and where it does not.

Run ``python benchmarks/linear_batch1.py``; it prints a Markdown table and writes it to results/linear_batch1.md.
"""

import platform
from pathlib import Path

import numpy as np
import torch

import srigl_fx.runtime.ops  # noqa: F401 - registers the operators
from srigl_fx.runtime.autotune import measure
from srigl_fx.runtime.format import CondensedWeight

SHAPES = ((3072, 768), (768, 3072), (768, 768), (256, 256), (64, 64))
SPARSITIES = (0.8, 0.9, 0.95, 0.99)


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def row(in_features: int, out_features: int, sparsity: float) -> str:
    rng = np.random.default_rng(0)
    k = max(1, round(in_features * (1 - sparsity)))
    mask = rng.random((out_features, in_features)).argsort(axis=1) < k
    weight = (rng.standard_normal(mask.shape) * mask).astype(np.float32)
    condensed = CondensedWeight.from_dense(weight, mask, rng.standard_normal(out_features))
    arrays = condensed.values, condensed.indices, condensed.active, condensed.bias
    operands = [torch.from_numpy(array) for array in arrays]
    dense, bias, x = torch.from_numpy(weight), operands[3], torch.randn(1, in_features)
    operator = torch.ops.srigl_fx.condensed_linear.default
    with torch.inference_mode():
        times = measure(
            {
                "dense": lambda: torch.nn.functional.linear(x, dense, bias),
                "condensed": lambda: operator(x, *operands, in_features),
            },
            rounds=25,
            seconds=1.0,
        )
    cells = f"{times['dense'] * 1e6:.1f} | {times['condensed'] * 1e6:.1f} | {times['dense'] / times['condensed']:.2f}x"
    return f"| {in_features} -> {out_features} | {sparsity:.0%} | {cells} |"


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    lines = [
        "# Linear layers, batch 1, one thread",
        "",
        f"{cpu_name()}, torch {torch.__version__}, float32; interleaved medians in one process, in inference mode, the",
        "cost of calling the operator included. Ratios below 1x are where dense is faster.",
        "",
        "| layer | sparsity | dense, µs | condensed, µs | speedup |",
        "|---|---|---|---|---|",
    ]
    lines += [row(*shape, sparsity) for shape in SHAPES for sparsity in SPARSITIES]
    table = "\n".join(lines) + "\n"
    print(table)
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / "linear_batch1.md").write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
