"""Linear layers whose rows share their inputs in groups, beside the same layers without groups, and dense ones.

For each shape, sparsity and batch: our operator in PyTorch for each group size, and the fastest dense one of PyTorch,
ONNX Runtime and, where it is installed, OpenVINO. All go in turns, on one thread; times are medians. Weights are
random.

    python benchmarks/shared_inputs.py [--groups 1 4] [--sparsity 0.8 0.9 0.95] [--batch 1 16 64 256 2048] [--int8]

Prints a Markdown page: benchmarks/results/shared_inputs.md.
"""

import argparse
import itertools
from collections.abc import Callable

import numpy as np
import torch
from harness.contenders import OPENVINO_DENSE, ORT_DENSE, TORCH_DENSE, LayerContenders
from harness.layers import Layer, in_eight_bits, random_input, random_weight
from harness.machine import describe
from harness.timing import interleaved, timer

from srigl_fx.runtime.cpu.kernels import plan
from srigl_fx.runtime.cpu.kernels.isa import host_isa, level_of
from srigl_fx.runtime.cpu.prepared_weights import panel_of
from srigl_fx.runtime.format import CondensedWeight
from srigl_fx.runtime.validation import check_weight

SHAPES = (Layer(inputs=3072, outputs=768), Layer(inputs=768, outputs=3072), Layer(inputs=4096, outputs=4096))
DENSE = (TORCH_DENSE, ORT_DENSE, OPENVINO_DENSE)


def operands(weight: CondensedWeight) -> list[torch.Tensor]:
    """(values, indices, active, bias)."""
    return [torch.from_numpy(part) for part in (weight.values, weight.indices, weight.active, weight.bias)]


def ours(layer: Layer, weight: CondensedWeight, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A call of the operator."""
    parts, scales = operands(weight), None if weight.scales is None else torch.from_numpy(weight.scales)
    linear = torch.ops.srigl_fx.condensed_linear.default
    return lambda: linear(x, *parts, layer.inputs, scales=scales)


def packed_bytes(layer: Layer, weight: CondensedWeight, batch: int) -> int:
    """What the panel takes that this call reads."""
    parts, sizes = operands(weight), (layer.inputs, weight.n_active, weight.k)
    checked, level = check_weight("linear", *parts, layer.inputs), level_of(host_isa())
    assert checked is not None
    kernel = plan.linear_kernel(level, *sizes, batch, False, True)
    kernel = plan.linear_for_shared(kernel, level, *sizes, len(weight.indices))
    window = plan.window_of(kernel, level, *sizes)
    return panel_of(checked, kernel, window, *parts[:3], layer.inputs, layer.outputs, layer.outputs).nbytes


def times_table(groups: list[int], sparsities: list[float], batches: list[int], int8: bool) -> list[str]:
    """A row for each cell."""
    names = [f"g = {group}" for group in groups]
    rows = [
        f"| layer | sparsity | batch | {' | '.join(names)} | dense, its fastest | {names[0]} / {names[-1]} | "
        f"dense / {names[-1]} | 10^9 multiply-adds/s |",
        "|---" * (7 + len(groups)) + "|",
    ]
    for layer, sparsity in itertools.product(SHAPES, sparsities):
        weights = {group: random_weight(layer, sparsity, group_size=group) for group in groups}
        dense = LayerContenders(layer, weights[groups[0]], DENSE, 1)
        for batch in batches:
            x = random_input(layer, batch)
            calls: dict[str, Callable[[], object]] = dict(dense.calls(x)[0])
            for group, weight in weights.items():
                call = ours(layer, in_eight_bits(weight) if int8 else weight, torch.from_numpy(x))
                expected = x @ weight.to_dense()[0].T + weight.bias
                assert np.abs(call().numpy() - expected).max() < (0.1 if int8 else 1e-3)
                calls[f"g = {group}"] = call
            seconds = interleaved({name: timer(call) for name, call in calls.items()}, seconds=0.4)
            best = min((name for name in seconds if not name.startswith("g = ")), key=seconds.__getitem__)
            first, last = seconds[names[0]], seconds[names[-1]]
            rate = weights[groups[-1]].values.size * batch / last / 1e9
            cells = [str(layer), f"{sparsity:.0%}", str(batch), *(f"{1e6 * seconds[name]:.0f}" for name in names)]
            cells += [f"{1e6 * seconds[best]:.0f} ({best})", f"{first / last:.2f}", f"{seconds[best] / last:.2f}"]
            rows.append(f"| {' | '.join(cells)} | {rate:.0f} |")
            print(rows[-1], flush=True)
    return rows


def bytes_table(groups: list[int], sparsities: list[float]) -> list[str]:
    """What is stored, and what is packed for batches and for one sample, of the dense bytes."""
    rows = ["| layer | sparsity | group | stored | packed for batches | packed for one |", "|---|---|---|---|---|---|"]
    for layer, sparsity, group in itertools.product(SHAPES, sparsities, groups):
        weight, dense = random_weight(layer, sparsity, group_size=group), 4 * layer.inputs * layer.outputs
        found = [weight.nbytes, packed_bytes(layer, weight, 64), packed_bytes(layer, weight, 1)]
        rows.append(f"| {layer} | {sparsity:.0%} | {group} | {' | '.join(f'{one / dense:.4f}' for one in found)} |")
    return rows


def main() -> None:
    """Print the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.8, 0.9, 0.95])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64, 256, 2048])
    parser.add_argument("--int8", action="store_true", help="values of eight bits, beside dense float32")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = times_table(given.groups, given.sparsity, given.batch, given.int8)
    stored = [] if given.int8 else ["", "Bytes, of the dense ones:", "", *bytes_table(given.groups, given.sparsity)]
    kind = "Values of eight bits." if given.int8 else "float32."
    print(f"\n{kind} Microseconds a call, medians, one thread. {describe(1)}", "", *rows, *stored, sep="\n")


if __name__ == "__main__":
    main()
