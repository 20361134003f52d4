"""Condensed against dense convolutions in torch and ONNX Runtime, one thread: where it pays and where it does not.

Run ``python benchmarks/conv.py``; it prints a Markdown table and writes it to results/conv.md.
"""

import platform
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

import srigl_fx.runtime.ops  # noqa: F401 - registers the operators
from srigl_fx.runtime import register
from srigl_fx.runtime.autotune import measure
from srigl_fx.runtime.format import CondensedWeight
from srigl_fx.runtime.ort.fallback import IR_VERSION, OPSET_VERSION, fallback_functions

# Input channels, output channels, height and width, kernel, stride.
SHAPES = (
    (32, 32, 8, 3, 1),
    (64, 64, 8, 3, 1),
    (128, 128, 14, 3, 1),
    (256, 256, 14, 3, 1),
    (64, 64, 56, 3, 1),
    (256, 64, 56, 1, 1),
    (128, 128, 28, 3, 2),
)
SPARSITIES = (0.9, 0.95)
BATCHES = (1, 16)


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def onnx_model(condensed: CondensedWeight, shape: list[int], stride: int, padding: int) -> bytes:
    weights = {name: getattr(condensed, name) for name in ("values", "indices", "active", "bias")}
    node = helper.make_node(
        "CondensedConv",
        ["x", *weights],
        ["y"],
        domain="srigl_fx",
        in_features=int(np.prod(shape[1:])),
        weight_shape=shape,
        flat_size=int(np.prod(shape)),
        strides=[stride] * 2,
        pads=[padding] * 4,
        dilations=[1, 1],
        group=1,
    )
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * 4) for name in "xy")
    initializers = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    model: onnx.ModelProto = helper.make_model(
        helper.make_graph([node], "graph", [x], [y], initializers),
        opset_imports=[helper.make_opsetid("", OPSET_VERSION), helper.make_opsetid("srigl_fx", 1)],
        ir_version=IR_VERSION,
        functions=fallback_functions(),
    )
    return model.SerializeToString()


def session(model: bytes, *, library: bool) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    if library:
        register(options)
    return onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"])


def row(layer: tuple[int, int, int, int, int], sparsity: float, batch: int) -> str:
    channels, filters, size, kernel, stride = layer
    shape, padding = [filters, channels, kernel, kernel], kernel // 2
    rng = np.random.default_rng(0)
    in_features = channels * kernel * kernel
    mask = rng.random((filters, in_features)).argsort(axis=1) < round(in_features * (1 - sparsity))
    weight = (rng.standard_normal(mask.shape) * mask).astype(np.float32)
    condensed = CondensedWeight.from_dense(weight, mask, rng.standard_normal(filters))
    arrays = condensed.values, condensed.indices, condensed.active, condensed.bias
    operands = [torch.from_numpy(array) for array in arrays]
    dense, x = torch.from_numpy(weight).reshape(shape), torch.randn(batch, channels, size, size)
    geometry = shape, [stride] * 2, [padding] * 2, [1, 1], 1
    operator = torch.ops.srigl_fx.condensed_conv.default
    model, feeds = onnx_model(condensed, shape, stride, padding), {"x": x.numpy()}
    stock, ours = session(model, library=False), session(model, library=True)
    with torch.inference_mode():
        times = measure(
            {
                "torch dense": lambda: torch.nn.functional.conv2d(x, dense, operands[3], stride, padding),
                "torch": lambda: operator(x, *operands, *geometry),
                "ort dense": lambda: stock.run(None, feeds),
                "ort": lambda: ours.run(None, feeds),
            },
            rounds=9,
            seconds=1.0,
        )
    cells = [
        f"{times[host + ' dense'] * 1e6:.0f} | {times[host] * 1e6:.0f} | {times[host + ' dense'] / times[host]:.2f}x"
        for host in ("torch", "ort")
    ]
    name = f"{kernel}x{kernel}, {channels} -> {filters}, {size}x{size}, stride {stride}"
    return f"| {name} | {sparsity:.0%} | {batch} | {' | '.join(cells)} |"


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    lines = [
        "# Convolutions, one thread",
        "",
        f"{cpu_name()}, torch {torch.__version__}, ONNX Runtime {onnxruntime.__version__}, float32; interleaved",
        "medians in one process, calls included. ONNX Runtime dense is the same file in a stock session, in",
        "which the fallback folds to Conv. Times in µs; ratios below 1x are where dense is faster.",
        "",
        "| layer | sparsity | batch | torch dense | torch condensed | speedup | ORT dense | ORT condensed | speedup |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [row(layer, sparsity, batch) for layer in SHAPES for sparsity in SPARSITIES for batch in BATCHES]
    table = "\n".join(lines) + "\n"
    print(table)
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / "conv.md").write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
