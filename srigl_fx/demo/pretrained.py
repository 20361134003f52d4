"""A pretrained encoder from dense to sparse to a small file, and what each step of that brings and costs.

Owns the order of events and the tables of ``srigl-fx demo --pretrained``; it must not know how any step works inside.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

import srigl_fx as sx
from srigl_fx.demo import doc_strings, encoder, serve
from srigl_fx.demo.encoder import SentenceEncoder
from srigl_fx.demo.output import cpu, write_csv
from srigl_fx.reports.text_tables import format_table

BATCH, TEST_BATCH = 32, 64
SHAPES = {"tokens": {0: "batch", 1: "length"}, "mask": {0: "batch", 1: "length"}}

Vectors = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is done.

    Attributes:
        sparsities: Of the encoders.
        steps: Of each distillation.
        pairs: Held-out pairs that recall is measured on.
        fitted: Training texts that layers are fitted to.
        exchanges: Rounds in which kept inputs are exchanged for better ones.
        calls: What is timed: batch and tokens of each call.
        seconds: How long each kind of call is timed.
        min_speedup: As for :func:`srigl_fx.export_onnx`.
    """

    sparsities: Sequence[float] = (0.8, 0.9)
    steps: int = 150
    pairs: int = 1000
    fitted: int = 512
    exchanges: int = 4
    calls: Sequence[tuple[int, int]] = ((1, 16), (1, 64), (1, 256), (8, 16), (8, 64))
    seconds: float = 4.0
    min_speedup: float | Literal["auto"] = "auto"


QUICK = Plan(sparsities=(0.9,), steps=5, pairs=50, fitted=64, exchanges=1, calls=((1, 16), (2, 64)), seconds=0.5)


@dataclass(frozen=True, kw_only=True)
class Row:
    """An encoder after one step of its way.

    Attributes:
        sparsity: Of its layers; 0 for the dense one.
        step: What was done last.
        recall: The share of held-out queries whose own answer is nearest, in float32.
        recall_int8: The same of its file in int8; None where none was made.
        file_bytes: Its file in float32; None likewise.
        file_bytes_int8: Its file in int8, embeddings included.
        seconds: How long the step took.
    """

    sparsity: float
    step: str
    recall: float
    recall_int8: float | None = None
    file_bytes: int | None = None
    file_bytes_int8: int | None = None
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Call:
    """The median time of one kind of call of one file, on one thread."""

    batch: int
    tokens: int
    file: str
    milliseconds: float


@dataclass(frozen=True)
class Files:
    """One encoder's two files."""

    name: str
    whole: Path
    int8: Path


@dataclass(frozen=True)
class Texts:
    """Training texts, and held-out queries with their answers, as tokens."""

    train: encoder.Batch
    queries: encoder.Batch
    answers: encoder.Batch


def run_pretrained(out: Path, plan: Plan | None = None) -> int:
    """Run the whole of it and write its files into ``out``.

    Args:
        out: The folder for ONNX files, ``recovery.csv``, ``calls.csv`` and ``results.txt``; made if missing.
        plan: How much is done; by default all.

    Returns:
        0.

    Raises:
        MissingExtraError: The package with the weights is not installed.
    """
    plan = plan or Plan()
    started = time.perf_counter()
    folder = encoder.pretrained_folder()
    out.mkdir(parents=True, exist_ok=True)
    print("1. A pretrained sentence encoder, and doc strings of the packages on this machine.\n")
    given, dense = read(folder, plan.pairs), encoder.load(folder)
    print(
        f"   {len(given.train[0])} texts to train on. Of other files: {len(given.queries[0])} first paragraphs, each to"
        " find the rest of its doc string.\n\n2. Make it sparse, recover, export, serve.\n"
    )
    files = [dense_files(dense, given, out)]
    rows = [_measured(0.0, "dense", files[0], given, 0.0)]
    for sparsity in plan.sparsities:
        made, sparse = recovered(dense, given, sparsity, plan, out)
        rows += made
        files.append(sparse)
    first = f"{_recovery_table(rows)}\n{_explanation(len(given.queries[0]))}"
    print(f"\n{first}\n\n3. How long calls take.\n")
    calls = timed(files, given, plan)
    second = _calls_table(calls)
    print(second)
    (out / "results.txt").write_text(f"{first}\n\n{second}\n", encoding="utf-8")
    write_csv(rows, out / "recovery.csv")
    write_csv(calls, out / "calls.csv")
    print(f"\nDone in {time.perf_counter() - started:.0f} seconds; the files and unrounded tables are in {out}.")
    return 0


def read(folder: Path, pairs: int) -> Texts:
    """The doc strings of this machine."""
    found = doc_strings.read()
    held_out = doc_strings.spread(found.held_out, pairs)
    return Texts(
        encoder.tokens(folder, [text for pair in found.train for text in pair]),
        *(encoder.tokens(folder, part) for part in zip(*held_out, strict=True)),
    )


def recovered(dense: SentenceEncoder, given: Texts, sparsity: float, plan: Plan, out: Path) -> tuple[list[Row], Files]:
    """A sparse encoder after each step: one shot by the largest weights, a fit to inputs, and distillation."""
    title, rows = f"{sparsity:.0%} sparse", list[Row]()

    def note(step: str, model: nn.Module, seconds: float) -> None:
        row = Row(sparsity=sparsity, step=step, recall=_recall(partial(_in_torch, model), given), seconds=seconds)
        rows.append(_told(row))

    started = time.perf_counter()
    largest = encoder.largest_weights(dense, sparsity)
    note("largest weights", largest, time.perf_counter() - started)

    started = time.perf_counter()
    fitted_to = encoder.drawn(given.train, BATCH, max(1, plan.fitted // BATCH), seed=0)
    with _progress(f"{title}: prune") as progress:
        model = encoder.reconstructed(dense, fitted_to, sparsity, exchanges=plan.exchanges, progress=progress)
    note("prune", model, time.perf_counter() - started)

    started = time.perf_counter()
    with _progress(f"{title}: distil") as progress:
        encoder.distil(model, dense, encoder.drawn(given.train, BATCH, plan.steps, seed=0), progress=progress)
    seconds = time.perf_counter() - started
    files = sparse_files(model, given, out, title, plan.min_speedup)
    return [*rows, _measured(sparsity, f"prune, {plan.steps} steps of distil", files, given, seconds)], files


def _measured(sparsity: float, step: str, files: Files, given: Texts, seconds: float) -> Row:
    """A row of files, as ONNX Runtime answers with them."""
    threads = os.cpu_count() or 1
    found = [
        _recall(partial(serve.answer, serve.load(path, threads=threads)), given) for path in (files.whole, files.int8)
    ]
    return _told(
        Row(
            sparsity=sparsity,
            step=step,
            recall=found[0],
            recall_int8=found[1],
            file_bytes=files.whole.stat().st_size,
            file_bytes_int8=files.int8.stat().st_size,
            seconds=seconds,
        )
    )


def _told(row: Row) -> Row:
    """The row; whoever waits for the table sees its recall at once."""
    sparse = f"{row.sparsity:.0%} sparse, " if row.sparsity else ""
    int8 = "" if row.recall_int8 is None else f", in int8 {row.recall_int8:.1%}"
    print(f"   {sparse}{row.step}: recall@1 {row.recall:.1%}{int8}", flush=True)
    return row


def _in_torch(model: nn.Module, *inputs: NDArray[np.int64]) -> Vectors:
    with torch.no_grad():
        found: Vectors = model(*map(torch.from_numpy, inputs)).numpy()
    return found


def _recall(encode: Callable[..., Vectors], given: Texts) -> float:
    queries, answers = (
        np.concatenate([encode(*(part.numpy() for part in batch)) for batch in encoder.batches(texts, TEST_BATCH)])
        for texts in (given.queries, given.answers)
    )
    return recall(queries, answers)


def recall(queries: Vectors, answers: Vectors) -> float:
    """The share of queries (N, D) whose own answer, of as many (N, D), is the most similar one.

    Example:
        >>> recall(np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32)[[0, 2, 1]])
        0.3333333333333333
    """
    return float(((queries @ answers.T).argmax(axis=1) == np.arange(len(queries))).mean())


def dense_files(model: SentenceEncoder, given: Texts, out: Path) -> Files:
    """The dense encoder as PyTorch exports it, and in eight bits by ONNX Runtime's own tools."""
    files = Files("dense", out / "dense.onnx", out / "dense_int8.onnx")
    serve.export_dense(model, files.whole, *_examples(given), free=(0, 1))
    files.int8.write_bytes(serve.in_eight_bits(files.whole.read_bytes()))
    return files


def sparse_files(
    model: SentenceEncoder, given: Texts, out: Path, name: str, min_speedup: float | Literal["auto"]
) -> Files:
    """A sparse encoder in float32, and in eight bits with its embeddings; any batch of texts of any length."""
    stem = f"sparse_{name.partition('%')[0]}"
    files = Files(name, out / f"{stem}.onnx", out / f"{stem}_int8.onnx")
    for path, dtype in ((files.whole, torch.float32), (files.int8, torch.int8)):
        sx.export_onnx(
            model,
            path,
            _examples(given),
            dynamic_shapes=SHAPES,
            min_speedup=min_speedup,
            value_dtype=dtype,
            embedding_dtype=dtype,
        )
    return files


def _examples(given: Texts) -> encoder.Batch:
    (examples,) = encoder.drawn(given.train, 8, 1, seed=0)
    return examples


def timed(files: Sequence[Files], given: Texts, plan: Plan) -> list[Call]:
    """Every kind of call of every file, all files in turns."""
    sessions = {
        f"{one.name}{kind}": serve.load(path, threads=1)
        for one in files
        for kind, path in (("", one.whole), (" int8", one.int8))
    }
    calls = []
    words = given.train[0][given.train[1].bool()].numpy()
    for batch, length in tqdm(plan.calls, desc="timing", unit="kind of call"):
        tokens = np.resize(words, (batch, length))
        found = serve.latencies_us(sessions, tokens, np.ones_like(tokens), seconds=plan.seconds)
        calls += [Call(batch=batch, tokens=length, file=name, milliseconds=us / 1000) for name, us in found.items()]
    return calls


@contextmanager
def _progress(title: str) -> Iterator[Callable[[int, int], None]]:
    with tqdm(desc=title, unit="step", mininterval=0.5) as bar:

        def show(done: int, of: int) -> None:
            bar.total = of
            bar.update(done - bar.n)

        yield show


def _recovery_table(rows: Sequence[Row]) -> str:
    headers = ("sparsity", "after", "recall@1", "in int8", "file", "in int8", "step took")
    cells = [
        (
            f"{row.sparsity:.0%}" if row.sparsity else "",
            row.step,
            *("" if share is None else f"{share:.1%}" for share in (row.recall, row.recall_int8)),
            *("" if size is None else f"{size / 2**20:.1f} MiB" for size in (row.file_bytes, row.file_bytes_int8)),
            f"{row.seconds:.0f} s" if row.seconds else "",
        )
        for row in rows
    ]
    return format_table(headers, cells, right=(0, *range(2, len(headers))))


def _explanation(pairs: int) -> str:
    return (
        f"   Recall@1: of {pairs} queries, how many have their own answer nearest; its standard error is up to "
        f"{50 / pairs**0.5:.1f} points.\n"
        f"   Texts are cut off after {encoder.LENGTH} tokens. In int8: without further training, embeddings included;"
        " the dense\n   one by ONNX Runtime's own tools."
    )


def _calls_table(calls: Sequence[Call]) -> str:
    kinds: dict[tuple[int, int], dict[str, float]] = {}
    for call in calls:
        kinds.setdefault((call.batch, call.tokens), {})[call.file] = call.milliseconds
    names = list(next(iter(kinds.values())))
    cells = [(*map(str, kind), *map("{:.2f} ms".format, found.values())) for kind, found in kinds.items()]
    table = format_table(("batch", "tokens", *names), cells, right=range(2 + len(names)))
    return f"{table}\n{_verdict(kinds)}"


def _verdict(kinds: Mapping[tuple[int, int], Mapping[str, float]]) -> str:
    """How the table was measured, and in which calls sparse int8 is not the faster one."""
    lost = [
        f"{name} at batch {batch}, {tokens} tokens"
        for (batch, tokens), found in kinds.items()
        for name, time in found.items()
        if name.endswith("sparse int8") and time >= found["dense int8"]
    ]
    text = (
        "   Medians of one call, one thread, all files in turns.\n"
        f"   ONNX Runtime {ort.__version__}, PyTorch {torch.__version__}, {cpu()}."
    )
    return text + (f"\n   Not faster than dense int8: {'; '.join(lost)}." if lost else "")
