"""Condensed linear layers on a GPU: what the model predicts, what comes out, and what dense and CSR layers take.

``python benchmarks/gpu.py`` needs a GPU and some minutes: it builds the kernels, checks each against float64, times it
beside cuBLAS (float32, TF32, bfloat16), cuSPARSE CSR, the dense layer of the active rows, and 2:4 sparsity, and prints
every cell. ``--predict`` needs none: it writes the prediction into ``benchmarks/results/gpu.md``, which is to be done
before a measurement. Times are medians by events over replays of a CUDA graph in which each call has operands of its
own, more together than the cache holds; CSR and 2:4 products are not captured.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from srigl_fx.runtime import ops
from srigl_fx.runtime.cuda import build, execute
from srigl_fx.runtime.cuda.model import GPUS, Gpu, Layer
from srigl_fx.runtime.cuda.plan import Launch, candidates
from srigl_fx.runtime.format import CondensedWeight, ValueDtype
from srigl_fx.runtime.validation import check_weight

SHAPES = ((3072, 768), (768, 3072), (4096, 4096))  # inputs, outputs
SPARSITIES = (0.8, 0.9, 0.95, 0.99)
BATCHES = (1, 16, 64, 256, 2048)
ABLATED = 0.3  # of the rows, where the dense layer of the active rows is the rival
BEYOND_CACHE = 150e6  # bytes of operands that calls in a row read, at least
BUDGET = 440.0  # seconds, after which no cell is begun
PAGE = Path(__file__).with_name("results") / "gpu.md"
MARK = "<!-- prediction -->"


def cells() -> Iterator[tuple[int, int, float, int]]:
    """(inputs, outputs, sparsity, batch), those of the bars first."""
    every = [(*shape, sparsity, batch) for shape in SHAPES for sparsity in SPARSITIES for batch in BATCHES]
    return iter(sorted(every, key=lambda cell: cell[2] != 0.9))


def layer_of(in_features: int, n: int, sparsity: float, value_bytes: int) -> Layer:
    k = max(1, round(in_features * (1 - sparsity)))
    return Layer(in_features=in_features, n=n, n_active=n, k=k, value_bytes=value_bytes)


def predicted(gpu: Gpu) -> str:
    """The prediction for a GPU as a table: the planned kernel with its time, and the other kernels' times."""
    lines = [
        "| layer | sparsity | batch | float32 | waits for | others | bfloat16 |",
        "|---|---|---|---|---|---|---|",
    ]
    for in_features, n, sparsity, batch in cells():
        ranked = _ranked(gpu, layer_of(in_features, n, sparsity, 4), batch)
        half = _ranked(gpu, layer_of(in_features, n, sparsity, 2), batch)[0]
        first, *others = ranked
        lines.append(
            f"| {in_features} -> {n} | {sparsity:.0%} | {batch} | `{first.kernel.name}` {_us(first)} | "
            f"{first.prediction.bound} | {', '.join(f'`{one.kernel.name}` {_us(one)}' for one in others)} | "
            f"`{half.kernel.name}` {_us(half)} |"
        )
    return "\n".join(lines)


def _ranked(gpu: Gpu, layer: Layer, batch: int) -> list[Launch]:
    return sorted(candidates(gpu, layer, batch, "uint16", True, False), key=lambda one: one.prediction.seconds)


def _us(launch: Launch) -> str:
    return f"{launch.prediction.seconds * 1e6:.1f} us"


def write_prediction() -> None:
    page = PAGE.read_text(encoding="utf-8")
    parts = [f"### {gpu.name}\n\n{predicted(gpu)}" for gpu in GPUS]
    PAGE.write_text(page.partition(MARK)[0] + MARK + "\n\n" + "\n\n".join(parts) + "\n", encoding="utf-8")


def condensed(in_features: int, n: int, k: int, n_active: int, dtype: ValueDtype, seed: int) -> CondensedWeight:
    rng = np.random.default_rng(seed)
    mask = np.zeros((n, in_features), np.bool_)
    rows = np.sort(rng.permutation(n)[:n_active])
    mask[rows[:, None], rng.random((n_active, in_features)).argpartition(k - 1, axis=1)[:, :k]] = True
    dense = rng.standard_normal(mask.shape).astype(np.float32) * mask / math.sqrt(k)
    return CondensedWeight.from_dense(dense, mask, rng.standard_normal(n).astype(np.float32), dtype=dtype)


def on_gpu(weight: CondensedWeight) -> tuple[torch.Tensor, ...]:
    arrays = weight.values, weight.indices, weight.active, weight.bias
    bits = [array.view(np.int16) if array.dtype.name == "bfloat16" else array for array in arrays]
    moved = [torch.from_numpy(array).cuda() for array in bits]
    if weight.values.dtype.name == "bfloat16":
        moved[0] = moved[0].view(torch.bfloat16)
    return tuple(moved)


def timed(calls: Sequence[Callable[[], Any]], captured: bool = True) -> float:
    """Seconds of one of these calls, made one after another."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    run: Callable[[], Any] = lambda: [call() for call in calls]  # noqa: E731
    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        run = graph.replay
    seconds = []
    for _ in range(12):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) * 1e-3 / len(calls))
    return statistics.median(seconds[2:])


def forced(launch: Launch) -> Callable[..., torch.Tensor]:
    """The operator by this kernel, whatever the plan has."""

    def call(checked: Any, x: torch.Tensor, parts: Sequence[torch.Tensor], in_features: int) -> torch.Tensor:
        planned, execute.plan = execute.plan, lambda *_: launch  # type: ignore[assignment]
        try:
            return execute.linear(checked, x, parts, in_features, None, "none", False)
        finally:
            execute.plan = planned

    return call


def check(y: torch.Tensor, x: torch.Tensor, weight: CondensedWeight, what: str) -> None:
    """Stop at a result that is not that of float64, up to the rounding of float32 sums."""
    dense = torch.from_numpy(weight.to_dense()[0]).cuda().double()
    expected = x.double() @ dense.t() + torch.from_numpy(weight.bias).cuda().double()
    size = x.double().abs() @ dense.abs().t() + 1
    worst = float(((y.double() - expected).abs() / size).max())
    if not worst <= 2**-24 * (8 + weight.k**0.5):
        raise SystemExit(f"{what}: wrong by {worst:.2e} of the sum of absolute values")


def ours(gpu: Gpu, cell: tuple[int, int, float, int], dtype: ValueDtype) -> Iterator[tuple[str, float, float]]:
    """(kernel, seconds, seconds that were predicted) of all that can."""
    in_features, n, sparsity, batch = cell
    layer = layer_of(in_features, n, sparsity, 4 if dtype == "float32" else 2)
    copies = _copies(layer.n * layer.k * (layer.value_bytes + 2) + 4 * batch * (in_features + n))
    weights = [condensed(in_features, n, layer.k, n, dtype, seed) for seed in range(copies)]
    parts = [on_gpu(weight) for weight in weights]
    xs = [torch.randn(batch, in_features, device="cuda") for _ in range(copies)]
    known = [check_weight("benchmark", *part, in_features) for part in parts]
    for launch in _ranked(gpu, layer, batch):
        call = forced(launch)
        check(call(known[0], xs[0], parts[0], in_features), xs[0], weights[0], f"{launch.kernel.name} {dtype} {cell}")
        calls = [partial(call, known[i], xs[i], parts[i], in_features) for i in range(copies)]
        yield launch.kernel.name, timed(calls), launch.prediction.seconds


def _copies(nbytes: float) -> int:
    return min(24, max(2, math.ceil(BEYOND_CACHE / nbytes)))


def rivals(cell: tuple[int, int, float, int]) -> Iterator[tuple[str, float]]:
    """(name, seconds) of other layers of the same shape."""
    in_features, n, sparsity, batch = cell
    copies = _copies(4 * (in_features * n + batch * (in_features + n)))
    xs = [torch.randn(batch, in_features, device="cuda") for _ in range(copies)]
    dense = [torch.randn(n, in_features, device="cuda") for _ in range(copies)]
    bias = torch.randn(n, device="cuda")

    def products(a: Sequence[torch.Tensor], b: Sequence[Any], c: torch.Tensor) -> list[Callable[[], Any]]:
        return [partial(functional.linear, a[i], b[i], c) for i in range(len(a))]

    for name, allowed in (("cuBLAS fp32", False), ("cuBLAS TF32", True)):
        torch.backends.cuda.matmul.allow_tf32 = allowed
        yield name, timed(products(xs, dense, bias))
    torch.backends.cuda.matmul.allow_tf32 = False
    halves, half_xs = [one.bfloat16() for one in dense], [x.bfloat16() for x in xs]
    yield "cuBLAS bf16", timed(products(half_xs, halves, bias.bfloat16()))
    active = round(n * (1 - ABLATED))
    rows = [one[:active].contiguous() for one in dense]
    yield f"dense, {ABLATED:.0%} of rows left out", timed(products(xs, rows, bias[:active]))
    kept = torch.rand(n, in_features, device="cuda") >= sparsity
    csr = [(one * kept).to_sparse_csr() for one in dense[:4]]
    columns = [x.t().contiguous() for x in xs[:4]]
    yield "cuSPARSE CSR", timed([partial(torch.matmul, csr[i], columns[i]) for i in range(len(csr))], captured=False)
    if batch % 8 == 0:
        pattern = torch.tensor([True, True, False, False], device="cuda").repeat(in_features // 4)
        two_of_four = [torch.sparse.to_sparse_semi_structured(one * pattern) for one in halves[:4]]
        yield "2:4 bf16", timed(products(half_xs[:4], two_of_four, bias.bfloat16()), captured=False)


def call_overhead() -> float:
    """Seconds that Python takes for a call of the operator, on a layer that takes the GPU less."""
    weight = condensed(256, 256, 26, 256, "float32", 0)
    parts, x = on_gpu(weight), torch.randn(1, 256, device="cuda")
    with torch.inference_mode(False), torch.no_grad():
        for _ in range(50):
            ops.LINEAR(x, *parts, 256)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(500):
            ops.LINEAR(x, *parts, 256)
        return (time.perf_counter() - start) / 500


def measure() -> None:
    begun = time.perf_counter()
    gpu = execute.machine_of(torch.device("cuda", torch.cuda.current_device())).gpu
    print(f"{gpu.name}, {gpu.multiprocessors} multiprocessors, torch {torch.__version__}, CUDA {torch.version.cuda}")
    symbols = [name for name in build.symbols() if not name.startswith("rows") and not name.endswith("_float16")]
    build.build(symbols)
    print(f"kernels built after {time.perf_counter() - begun:.0f} s")
    print(f"a call takes {call_overhead() * 1e6:.1f} us of Python")
    print("| layer | sparsity | batch | what | us | predicted us | of bandwidth | multiply-adds/ns | of cuBLAS fp32 |")
    print("|---|---|---|---|---|---|---|---|---|")
    for cell in cells():
        if time.perf_counter() - begun > BUDGET:
            print(f"| the time is up: cells from {cell} on were not measured | | | | | | | | |")
            break
        in_features, n, sparsity, batch = cell
        others = dict(rivals(cell))
        base = others["cuBLAS fp32"]
        head = f"| {in_features} -> {n} | {sparsity:.0%} | {batch} "
        for name, seconds in others.items():
            print(f"{head}| {name} | {seconds * 1e6:.1f} | | | | {base / seconds:.2f}x |")
        for dtype in ("float32", "bfloat16"):
            layer = layer_of(in_features, n, sparsity, 4 if dtype == "float32" else 2)
            moved = layer.n * layer.k * (layer.value_bytes + 2) + 4 * batch * (in_features + n)
            for name, seconds, foreseen in ours(gpu, cell, dtype):
                rate = layer.n * layer.k * batch / seconds * 1e-9
                print(
                    f"{head}| `{name}` {dtype} | {seconds * 1e6:.1f} | {foreseen * 1e6:.1f} | "
                    f"{moved / seconds / gpu.memory:.0%} | {rate:.0f} | {base / seconds:.2f}x |",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--predict", action="store_true", help="write the prediction, and measure nothing")
    if parser.parse_args().predict:
        write_prediction()
        return
    if not torch.cuda.is_available():
        raise SystemExit("torch finds no GPU here; --predict needs none")
    with torch.no_grad():
        measure()


if __name__ == "__main__":
    main()
