"""Every kernel of the table against torch's dense product: each dtype of values, each instruction set, one thread.

Kernels of bytes are measured on this machine's best target too, where that extends an instruction set.

Run ``python benchmarks/kernels.py``; it prints a Markdown table and writes it to results/kernels.md. A kernel without
a call here stops the script. The calls are chosen so that the plan takes the kernel: they are no competition among
kernels, and the layer-by-layer and model figures are other scripts'.
"""

import argparse
import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from harness.layers import Layer, random_input, random_weight
from harness.machine import describe
from harness.timing import interleaved, timer
from torch import Tensor

import srigl_fx.runtime.ops  # noqa: F401 - registers the operators
from srigl_fx.runtime.cpu import execute, execute_conv
from srigl_fx.runtime.cpu.entries import entry
from srigl_fx.runtime.cpu.kernels import job
from srigl_fx.runtime.cpu.kernels.isa import ISA_VARIABLE, ISAS, host_isa, host_target, isa_of
from srigl_fx.runtime.cpu.kernels.table import KERNELS, Kernel
from srigl_fx.runtime.cpu.prepared_weights import new_job
from srigl_fx.runtime.cpu.training_products import Pattern, pack
from srigl_fx.runtime.quantisation import quantise_weights

SPARSITY = 0.9
WIDE, CONV, FEW = (
    Layer(inputs=768, outputs=768),
    Layer(inputs=64, outputs=64, kernel=3, size=28),
    Layer(inputs=64, outputs=8, kernel=3, size=28),
)
# The layer and the samples that each kernel is measured with.
CALLS = {
    "rows_task": (WIDE, 16),
    "strided_task": (WIDE, 16),
    "dot_task": (WIDE, 1),
    "tile_task": (WIDE, 64),
    "shared_tile_task": (WIDE, 64),
    "int8_dot_task": (WIDE, 1),
    "int8_tile_task": (WIDE, 64),
    "int8_conv_task": (CONV, 8),
    "conv_rows_task": (FEW, 8),
    "conv_tile_task": (CONV, 8),
    "conv_shared_tile_task": (CONV, 8),
    "conv_innermost_task": (CONV, 16),
    "product_task": (WIDE, 64),
    "value_gradient_task": (WIDE, 64),
}
Call = Callable[[], object]


def operands(layer: Layer, dtype: str, group_size: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Those that each dtype has, and the scales of int8."""
    weight, scales = random_weight(layer, SPARSITY, group_size=group_size), {}
    if dtype == "int8":
        rounded, worth = quantise_weights(weight.values)
        values, scales = torch.from_numpy(rounded), {"scales": torch.from_numpy(worth)}
    else:
        values = torch.from_numpy(weight.values).to(getattr(torch, dtype))
    return [values, *map(torch.from_numpy, (weight.indices, weight.active, weight.bias))], scales


def dense_weight(layer: Layer) -> Tensor:
    weight = random_weight(layer, SPARSITY)
    return torch.from_numpy(weight.to_dense()[0]).reshape(layer.weight_shape)


def strided(x: Tensor, weight: list[Tensor], layer: Layer) -> Call:
    """The task as the operator library calls it, on a feature-major input."""
    values, indices, active, bias = weight
    columns, y = x.t().contiguous(), torch.empty(layer.outputs, x.shape[0])
    j = new_job(values, indices, active, layer.inputs, layer.outputs)
    j[job.X], j[job.Y], j[job.BIAS], j[job.BATCH] = columns.data_ptr(), y.data_ptr(), bias.data_ptr(), x.shape[0]
    j[job.X_FEATURE_MAJOR] = j[job.Y_FEATURE_MAJOR] = 1
    run, keep = entry("strided_task")[0], (columns, y, weight)
    return lambda: (run(ctypes.addressof(j), 0), keep)


def call_of(kernel: Kernel, dtype: str) -> tuple[Call, Call]:
    """A call that runs the kernel, and the dense one that gives the same result."""
    layer, batch = CALLS[kernel.task]
    x, dense = torch.from_numpy(random_input(layer, batch)), dense_weight(layer)
    if kernel.layer == "training":
        pattern, packed = Pattern.of_mask(dense != 0), pack(x)
        gradient = torch.randn(batch, layer.outputs)
        if kernel.task == "product_task":
            values = dense[dense != 0]
            return lambda: pattern.multiply(values, packed), lambda: x @ dense.t()
        packed_gradient = pack(gradient)
        return lambda: pattern.value_gradient(packed, packed_gradient), lambda: gradient.t() @ x
    with torch.inference_mode(kernel.reads == "canonical" and kernel.layer == "linear"):  # these are not packed
        parts, scales = operands(layer, dtype, 4 if "shared" in kernel.reads else 1)
        weight = [part.clone() for part in parts]
    bias = weight[3]
    if kernel.layer == "convolution":
        numbers: list[Any] = [[1, 1], [layer.padding] * 2, [1, 1]]
        shape = list(layer.weight_shape)
        more: dict[str, Any] = scales | ({"arranged": True} if kernel.reads == "sample panel" else {})
        return (
            lambda: torch.ops.srigl_fx.condensed_conv(x, *weight, shape, *numbers, 1, **more),
            lambda: torch.nn.functional.conv2d(x, dense, bias, padding=layer.padding),
        )
    condensed = strided(x, weight, layer) if kernel.task == "strided_task" else None
    return (
        condensed or (lambda: torch.ops.srigl_fx.condensed_linear(x, *weight, layer.inputs, **scales)),
        lambda: torch.nn.functional.linear(x, dense, bias),
    )


def tasks_of(call: Call) -> set[str]:
    """The tasks that a call through torch runs."""
    found: set[str] = set()
    plain = execute.entry
    for module in (execute, execute_conv):
        module.entry = lambda name: (found.add(name), plain(name))[1]  # type: ignore[func-returns-value]
    try:
        call()
    finally:
        execute.entry = execute_conv.entry = plain
    return found


def measure() -> Iterator[dict[str, Any]]:
    """The cells of this process's instruction set."""
    torch.set_num_threads(1)
    for kernel in KERNELS:
        extended = host_target() not in ISAS  # which the other kernels do not see
        if host_isa() not in kernel.isas or (extended and kernel.values != ("int8",)):
            continue
        for dtype in kernel.values:
            condensed, dense = call_of(kernel, dtype)
            if kernel.layer != "training" and kernel.task != "strided_task":
                assert kernel.task in tasks_of(condensed), f"the plan has another kernel than {kernel.task} here"
            times = interleaved({"condensed": timer(condensed), "dense": timer(dense)}, seconds=0.5)
            yield {"task": kernel.task, "dtype": dtype, **times}


def table(cells: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    yield "| kernel | layer | samples | values | " + " | ".join(f"{isa}: us | times dense" for isa in cells) + " |"
    yield "|---|---|---|---|" + "---|---|" * len(cells)
    by_key = {isa: {(cell["task"], cell["dtype"]): cell for cell in found} for isa, found in cells.items()}
    for kernel in KERNELS:
        layer, batch = CALLS[kernel.task]
        for dtype in kernel.values:
            row = [f"`{kernel.task}`", str(layer), str(batch), dtype]
            for found in by_key.values():
                cell = found.get((kernel.task, dtype))
                row += ["-", "-"] if cell is None else [_us(cell), f"{cell['dense'] / cell['condensed']:.2f}"]
            yield f"| {' | '.join(row)} |"


def _us(cell: dict[str, Any]) -> str:
    return f"{cell['condensed'] * 1e6:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--this", action="store_true", help="print this process's cells as JSON")
    if parser.parse_args().this:
        print(json.dumps(list(measure())))
        return
    cells = {}
    targets = list(ISAS[: ISAS.index(host_isa()) + 1])
    targets += [host_target()] if isa_of(host_target()) != host_target() else []
    for isa in targets:
        done = subprocess.run(
            [sys.executable, __file__, "--this"],
            env=os.environ | {ISA_VARIABLE: isa},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        cells[isa] = json.loads(done.stdout)
    text = "\n".join(
        [
            "# Every kernel of the table",
            "",
            f"{SPARSITY:.0%} sparse, one thread, medians of rounds; dense is torch, on any instruction set.",
            "The rows and strided kernels are what is left where no panel fits: they are not meant to win.",
            "",
            describe(1),
            "",
            *table(cells),
        ]
    )
    print(text)
    Path(__file__).with_name("results").joinpath("kernels.md").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
