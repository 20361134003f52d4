"""The demonstration itself: train every run, serve every file, and show what was measured.

Owns the order of events and the table; it must not know how anything is trained, exported or drawn.
"""

import copy
import csv
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import onnxruntime as ort
import torch
from tqdm import tqdm

import srigl_fx as sx
from srigl_fx.demo import figures, serve, train
from srigl_fx.demo.serve import Served
from srigl_fx.demo.train import Run, Task
from srigl_fx.reports.text_tables import format_table

SPARSITIES = (0.9, 0.95)
WIDE_SPARSITY = 0.9


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table and of the CSV file; latencies are medians of one call, batch 1, one thread.

    Attributes:
        network: The task's name.
        training: The method.
        sparsity: What was asked of the method.
        metric: What ``score`` is: test accuracy, or the test images' mean squared error.
        score: Measured on the ONNX file, in ONNX Runtime.
        kept_weights: Fraction of the weights kept, dense layers included.
        active_neurons: Neurons of the sparse layers that kept at least one weight.
        neurons: All neurons of the layers that are sparse.
        file_bytes: The ONNX file.
        dense_us: The dense network's file.
        sparse_us: This run's file; None for a dense run.
        max_difference: The largest absolute difference between PyTorch and ONNX Runtime over the test set.
        train_seconds: How long training took.
    """

    network: str
    training: str
    sparsity: float
    metric: str
    score: float
    kept_weights: float
    active_neurons: int
    neurons: int
    file_bytes: int
    dense_us: float
    sparse_us: float | None
    max_difference: float
    train_seconds: float


def run_demo(out: Path, *, quick: bool = False) -> int:
    """Run the whole demonstration and write its files into ``out``.

    Args:
        out: The folder for ONNX files, ``results.csv``, ``results.txt`` and ``topology.png``; made if missing.
        quick: A tenth of the training: checks that everything works, and teaches the networks little.

    Returns:
        0, or 1 where the wide network's sparse file was not faster than its dense twin.
    """
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    print(
        "1. Train on scikit-learn's digits: a vision transformer and a residual network, dense, static sparse and\n"
        "   with SRigL; then a wide perceptron with SRigL.\n"
    )
    runs = [run for task in train.TASKS for run in _train_all(task, quick)]
    wide = train.train(train.WIDE, "srigl", WIDE_SPARSITY, steps=_steps(train.WIDE, quick))

    print("\n2. Lower, export and serve: one ONNX file for each network, run in ONNX Runtime.\n")
    rows = [row for task in train.TASKS for row in _serve_task([run for run in runs if run.task is task], out)]
    small = f"{_table(rows)}\n{_explanation(rows)}"
    print(small)

    print(
        "\n3. A network wide enough to matter: digits are tiny, so the networks above mostly wait for ONNX Runtime\n"
        "   itself. This one is a 1024-4096-4096-1024 perceptron that removes noise from digits enlarged to 32x32;\n"
        "   its dense twin holds the same weights with the zeros written in.\n"
    )
    wide_rows, by_threads = _serve_wide(wide, out)
    large = "\n".join([_table(wide_rows), *(_speedup(threads, times) for threads, times in by_threads.items())])
    print(large)

    (out / "results.txt").write_text(f"{small}\n\n{large}\n", encoding="utf-8")
    _write_csv(rows + wide_rows, out / "results.csv")
    figures.draw_topology([run for run in (*runs, wide) if run.method == "srigl"], out / "topology.png")
    print(_what_next(out, wide, time.perf_counter() - started))

    single = by_threads[1]
    if single["sparse"] >= single["dense"]:
        print(
            f"\nThe wide network's sparse file took {single['sparse']:.0f} us, its dense twin {single['dense']:.0f} us:"
            " it should be faster.\nRun srigl-fx doctor: without the operator library the file's fallback runs, which "
            "is dense.",
            file=sys.stderr,
        )
        return 1
    return 0


def _steps(task: Task, quick: bool) -> int:
    return max(task.steps // 10, 2 * task.update_every) if quick else task.steps


def _train_all(task: Task, quick: bool) -> list[Run]:
    steps = _steps(task, quick)
    runs = [train.train(task, "dense", steps=steps)]
    for sparsity in SPARSITIES:
        runs.append(train.train(task, "static", sparsity, steps=steps))
        runs.append(train.train(task, "srigl", sparsity, steps=steps))
    return runs


def _serve_task(runs: Sequence[Run], out: Path) -> list[Row]:
    """Serve the dense run and its sparse siblings, and time each sibling in turns with the dense one."""
    dense, *others = (
        serve.serve(run, out) for run in tqdm(runs, desc=f"{runs[0].task.name:>4} exporting", unit="file")
    )
    sample = dense.run.split.test_x[:1].numpy()
    rows = []
    for served in others:
        latency = serve.latencies_us({"dense": dense.session, "sparse": served.session}, sample, seconds=0.6)
        rows.append(_row(served, latency["dense"], latency["sparse"]))
    alone = serve.latencies_us({"dense": dense.session}, sample, seconds=0.3)["dense"]
    return [_row(dense, alone, None, neurons=rows[0].neurons), *rows]


def _serve_wide(run: Run, out: Path) -> tuple[list[Row], dict[int, dict[str, float]]]:
    """Serve the wide network and its dense twin: the same weights, with the zeros written in."""
    served = serve.serve(run, out)
    twin = sx.finalize(copy.deepcopy(run.model))
    dense = serve.serve(Run(run.task, "dense", 0.0, twin, run.split, run.seconds), out)
    sample = run.split.test_x[:1].numpy()
    by_threads = {}
    for threads in sorted({1, os.cpu_count() or 1}):
        sessions = {
            "dense": serve.load(dense.path, threads=threads),
            "sparse": serve.load(served.path, threads=threads),
        }
        by_threads[threads] = serve.latencies_us(sessions, sample, seconds=1.5)
    sparse_row = _row(served, by_threads[1]["dense"], by_threads[1]["sparse"])
    return [_row(dense, by_threads[1]["dense"], None, neurons=sparse_row.neurons), sparse_row], by_threads


def _row(served: Served, dense_us: float, sparse_us: float | None, *, neurons: int | None = None) -> Row:
    run = served.run
    kept, active = 1.0, neurons or 0
    if run.method != "dense":
        summary = sx.summary(run.model)
        kept = summary.kept / summary.total
        sparse = [row for row in summary.rows if row.status != "dense"]
        active = sum(row.active_neurons for row in sparse)
        neurons = sum(row.neurons for row in sparse)
    return Row(
        network=run.task.name,
        training=train.METHOD_NAMES[run.method],
        sparsity=run.sparsity,
        metric="accuracy" if run.split.test_y.dim() == 1 else "mean squared error",
        score=served.score,
        kept_weights=kept,
        active_neurons=active,
        neurons=neurons or 0,
        file_bytes=served.file_bytes,
        dense_us=dense_us,
        sparse_us=sparse_us,
        max_difference=served.max_difference,
        train_seconds=run.seconds,
    )


def _table(rows: Sequence[Row]) -> str:
    score = "test error" if rows[0].metric == "mean squared error" else "accuracy"
    headers = ("network", "training", score, "kept", "active", "file", "dense", "sparse", "PyTorch-ORT")
    cells = [
        (
            row.network,
            row.training + (f" {row.sparsity:.0%}" if row.sparsity else ""),
            f"{row.score:.2%}" if row.metric == "accuracy" else f"{row.score:.4f}",
            f"{row.kept_weights:.1%}",
            f"{row.active_neurons}/{row.neurons}",
            f"{row.file_bytes / 1024:,.0f} KiB",
            f"{row.dense_us:,.0f} us",
            "" if row.sparse_us is None else f"{row.sparse_us:,.0f} us",
            f"{row.max_difference:.0e}",
        )
        for row in rows
    ]
    return format_table(headers, cells, right=range(2, len(headers)))


def _explanation(rows: Sequence[Row]) -> str:
    """How the table was measured, and which of its rows did not gain."""
    text = (
        "   Accuracy, latency and the largest difference between PyTorch and ONNX Runtime come from the ONNX files.\n"
        "   Latency: median of one call, batch 1, one thread, dense and sparse in turns. Active: neurons of the "
        "sparse\n   layers; which layers are too small to be sparse depends on the sparsity.\n"
        f"   ONNX Runtime {ort.__version__}, PyTorch {torch.__version__}, {_cpu()}."
    )
    if any(row.sparse_us is not None and row.sparse_us > row.dense_us for row in rows):
        text += (
            "\n   Where sparse is slower than dense, layers are too small to gain: these files condense every layer "
            "all\n   the same.\n"
            "   sx.export_onnx(..., min_speedup=1.0) condenses only the layers that gain, measured on your machine."
        )
    return text


def _speedup(threads: int, latency_us: Mapping[str, float]) -> str:
    dense, sparse = latency_us["dense"], latency_us["sparse"]
    return (
        f"   {threads} thread{'s' * (threads > 1)}: dense {dense / 1000:.2f} ms, sparse {sparse / 1000:.2f} ms: "
        f"{dense / sparse:.1f} times as fast"
    )


def _cpu() -> str:
    """The processor's name, as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # no Linux: the platform module knows best
    return platform.processor() or platform.machine()


def _write_csv(rows: Sequence[Row], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def _what_next(out: Path, wide: Run, seconds: float) -> str:
    return (
        f"\nDone in {seconds:.0f} seconds. What to look at next, in {out}:\n"
        "   topology.png   fan-in and active neurons by layer over training (a flat line: no neuron was ablated)\n"
        "   results.csv    the tables above, unrounded (results.txt: as printed)\n"
        f"   *.onnx         the networks; try: srigl-fx inspect {out / wide.file_name}\n"
        "The code that trained them: srigl_fx/demo/train.py. For a model of your own: examples/quickstart.py."
    )
