"""The demonstration itself: train every run, serve every file, and show what was measured.

Owns the order of events and the table; it must not know how anything is trained, exported or drawn.
"""

import copy
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnxruntime as ort
import torch
from tqdm import tqdm

import srigl_fx as sx
from srigl_fx.demo import figures, serve, train
from srigl_fx.demo.output import cpu, write_csv
from srigl_fx.demo.serve import Pair
from srigl_fx.demo.train import Run, Task
from srigl_fx.reports.text_tables import format_table

SPARSITIES = (0.9, 0.95)
WIDE_SPARSITY = 0.9


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table and of the CSV file; latencies are medians of one call, batch 1, one thread.

    What ends in ``_int8`` is of the same network in int8, without further training.

    Attributes:
        network: The task's name.
        training: The method.
        sparsity: What was asked of the method.
        metric: What ``score`` is: test accuracy, or the test images' mean squared error.
        score: Measured on the ONNX file, in ONNX Runtime.
        kept_weights: Fraction of the weights kept, dense layers included.
        active_neurons: Neurons of the sparse layers that kept at least one weight.
        neurons: All neurons of the layers that are sparse.
        score_int8: The same of the file in int8.
        file_bytes: The ONNX file.
        file_bytes_int8: The one in int8.
        dense_us: The dense network's file.
        dense_us_int8: The dense network's file in int8, by ONNX Runtime's own tools.
        sparse_us: This run's file; None for a dense run.
        sparse_us_int8: This run's file in int8; None for a dense run.
        max_difference: The largest absolute difference between PyTorch and ONNX Runtime over the test set.
        train_seconds: How long training took.
    """

    network: str
    training: str
    sparsity: float
    metric: str
    score: float
    score_int8: float
    kept_weights: float
    active_neurons: int
    neurons: int
    file_bytes: int
    file_bytes_int8: int
    dense_us: float
    dense_us_int8: float
    sparse_us: float | None
    sparse_us_int8: float | None
    max_difference: float
    train_seconds: float


def run_demo(out: Path, *, quick: bool = False) -> int:
    """Run the whole demonstration and write its files into ``out``.

    Args:
        out: The folder for ONNX files, ``results.csv``, ``results.txt`` and ``topology.png``; made if missing.
        quick: A tenth of the training, and the first of the sparsities alone: checks that everything works, and teaches
            the networks little.

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
    write_csv(rows + wide_rows, out / "results.csv")
    figures.draw_topology([run for run in (*runs, wide) if run.method == "srigl"], out / "topology.png")
    print(_what_next(out, wide, time.perf_counter() - started))

    single = by_threads[1]
    if single[SPARSE] >= single[DENSE]:
        print(
            f"\nThe wide network's sparse file took {single[SPARSE]:.0f} us, its dense twin {single[DENSE]:.0f} us:"
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
    for sparsity in SPARSITIES[:1] if quick else SPARSITIES:
        runs.append(train.train(task, "static", sparsity, steps=steps))
        runs.append(train.train(task, "srigl", sparsity, steps=steps))
    return runs


DENSE, DENSE_INT8, SPARSE, SPARSE_INT8 = "dense", "dense int8", "sparse", "sparse int8"  # columns of the table


def _serve_task(runs: Sequence[Run], out: Path) -> list[Row]:
    """Serve the dense run and its sparse siblings, and time each sibling in turns with the dense one."""
    dense, *others = (serve.serve(run, out) for run in tqdm(runs, desc=f"{runs[0].task.name:>4} exporting", unit="run"))
    sample = dense.whole.run.split.test_x[:1].numpy()
    rows = []
    for served in others:
        sessions = _sessions(dense, served, threads=1)
        rows.append(_row(served, serve.latencies_us(sessions, sample, seconds=0.8)))
    alone = serve.latencies_us(_sessions(dense, None, threads=1), sample, seconds=0.4)
    return [_row(dense, alone, neurons=rows[0].neurons), *rows]


def _serve_wide(run: Run, out: Path) -> tuple[list[Row], dict[int, dict[str, float]]]:
    """Serve the wide network and its dense twin: the same weights, with the zeros written in."""
    served = serve.serve(run, out)
    twin = sx.finalize(copy.deepcopy(run.model))
    dense = serve.serve(Run(run.task, "dense", 0.0, twin, run.split, run.seconds), out)
    sample = run.split.test_x[:1].numpy()
    by_threads = {
        threads: serve.latencies_us(_sessions(dense, served, threads=threads), sample, seconds=2)
        for threads in sorted({1, os.cpu_count() or 1})
    }
    sparse_row = _row(served, by_threads[1])
    alone = {name: by_threads[1][name] for name in (DENSE, DENSE_INT8)}
    return [_row(dense, alone, neurons=sparse_row.neurons), sparse_row], by_threads


def _sessions(dense: Pair, sparse: Pair | None, *, threads: int) -> dict[str, ort.InferenceSession]:
    files = {DENSE: dense.whole, DENSE_INT8: dense.int8}
    if sparse is not None:
        files |= {SPARSE: sparse.whole, SPARSE_INT8: sparse.int8}
    if threads == 1:
        return {name: served.session for name, served in files.items()}
    return {name: serve.load(served.path, threads=threads) for name, served in files.items()}


def _row(pair: Pair, latency_us: Mapping[str, float], *, neurons: int | None = None) -> Row:
    served = pair.whole
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
        score_int8=pair.int8.score,
        kept_weights=kept,
        active_neurons=active,
        neurons=neurons or 0,
        file_bytes=served.file_bytes,
        file_bytes_int8=pair.int8.file_bytes,
        dense_us=latency_us[DENSE],
        dense_us_int8=latency_us[DENSE_INT8],
        sparse_us=latency_us.get(SPARSE),
        sparse_us_int8=latency_us.get(SPARSE_INT8),
        max_difference=served.max_difference,
        train_seconds=run.seconds,
    )


def _table(rows: Sequence[Row]) -> str:
    score = "test error" if rows[0].metric == "mean squared error" else "accuracy"
    times = (DENSE, DENSE_INT8, SPARSE, SPARSE_INT8)
    headers = ("network", "training", score, "in int8", "kept", "active", "file", "in int8", *times)
    cells = [
        (
            row.network,
            row.training + (f" {row.sparsity:.0%}" if row.sparsity else ""),
            *(f"{one:.2%}" if row.metric == "accuracy" else f"{one:.4f}" for one in (row.score, row.score_int8)),
            f"{row.kept_weights:.1%}",
            f"{row.active_neurons}/{row.neurons}",
            *(f"{size / 1024:,.0f} KiB" for size in (row.file_bytes, row.file_bytes_int8)),
            *(
                "" if time is None else f"{time:,.0f} us"
                for time in (row.dense_us, row.dense_us_int8, row.sparse_us, row.sparse_us_int8)
            ),
        )
        for row in rows
    ]
    return format_table(headers, cells, right=range(2, len(headers)))


def _explanation(rows: Sequence[Row]) -> str:
    """How the table was measured, and which of its rows did not gain."""
    text = (
        "   Accuracy and latency come from the ONNX files; ONNX Runtime's outputs in float32 are PyTorch's to "
        f"{max(row.max_difference for row in rows):.0e}.\n"
        "   Latency: median of one call, batch 1, one thread, all in turns. In int8: without further training, the "
        "dense\n   ones by ONNX Runtime's own tools. Active: neurons of the sparse layers; which layers are too small\n"
        "   to be sparse depends on the sparsity.\n"
        f"   ONNX Runtime {ort.__version__}, PyTorch {torch.__version__}, {cpu()}."
    )
    if any(row.sparse_us is not None and row.sparse_us > row.dense_us for row in rows):
        text += (
            "\n   Where sparse is slower than dense, layers are too small to gain: these files condense every layer "
            "all\n   the same.\n"
            "   sx.export_onnx(..., min_speedup=1.0) condenses only the layers that gain, measured on your machine."
        )
    return text


def _speedup(threads: int, latency_us: Mapping[str, float]) -> str:
    dense, sparse = min(latency_us[DENSE], latency_us[DENSE_INT8]), min(latency_us[SPARSE], latency_us[SPARSE_INT8])
    times = ", ".join(f"{name} {time / 1000:.2f} ms" for name, time in latency_us.items())
    return (
        f"   {threads} thread{'s' * (threads > 1)}: {times}.\n"
        f"   Sparse is {latency_us[DENSE] / latency_us[SPARSE]:.1f} times as fast as dense in float32, "
        f"{latency_us[DENSE_INT8] / latency_us[SPARSE_INT8]:.1f} times in int8; the faster of the sparse ones "
        f"{dense / sparse:.1f} times as the faster of the dense ones."
    )


def _what_next(out: Path, wide: Run, seconds: float) -> str:
    return (
        f"\nDone in {seconds:.0f} seconds. What to look at next, in {out}:\n"
        "   topology.png   fan-in and active neurons by layer over training (a flat line: no neuron was ablated)\n"
        "   results.csv    the tables above, unrounded (results.txt: as printed)\n"
        f"   *.onnx         the networks; try: srigl-fx inspect {out / wide.file_name()}\n"
        "The code that trained them: srigl_fx/demo/train.py. For a model of your own: examples/quickstart.py."
    )
