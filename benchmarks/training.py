"""What sparse training costs beside dense training: the ordinary step, the topology update, its working memory.

Run ``python benchmarks/training.py``; it prints Markdown tables and writes them to results/training.csv and, between
the two marker lines, to results/training.md. ``--only step`` (or update, syncs) runs one part and writes nothing.
"""

import argparse
import csv
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

import srigl_fx as sx
from srigl_fx.masks import named_masks

RESULTS = Path(__file__).parent / "results"
MARKERS = "<!-- measured: begin -->", "<!-- measured: end -->"
NEVER = 1_000_000  # steps between updates, where none shall happen


@dataclass(frozen=True)
class Row:
    """One measured cell: a quantity against its bar."""

    part: str
    case: str
    quantity: str
    value: float
    bar: float
    details: str

    @property
    def met(self) -> str:
        return "yes" if self.value <= self.bar else "**no**"


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        y = (y + self.shortcut(x)).relu()
        return y


class ResNet18(nn.Module):
    """ResNet-18 for images of 32x32: a 3x3 stem, no max-pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        widths = (64, 64, 128, 256, 512)
        blocks = [
            BasicBlock(widths[stage] if first else widths[stage + 1], widths[stage + 1], 2 if first and stage else 1)
            for stage in range(4)
            for first in (True, False)
        ]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(self.stem(x)).mean((2, 3)))
        return logits


def encoder(width: int, heads: int, layers: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


class ViT(nn.Module):
    """ViT-B/16: 86 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 768, 16, 16)
        self.position = nn.Parameter(torch.randn(1, 197, 768) * 0.02)
        self.token = nn.Parameter(torch.zeros(1, 1, 768))
        self.encoder = encoder(768, 12, 12)
        self.head = nn.Linear(768, 1000)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], dim=1) + self.position
        logits: Tensor = self.head(self.encoder(tokens)[:, 0])
        return logits


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(1024, 4096), nn.ReLU(), nn.Linear(4096, 1024))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4)


def momentum(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)


Optimize = Callable[[nn.Module], torch.optim.Optimizer]
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Optimize, float]] = {
    "ResNet-18, 3x32x32, batch 64, SGD momentum": (ResNet18, (64, 3, 32, 32), momentum, 1.03),
    "transformer, 6 layers, width 384, 16 x 128 tokens, AdamW": (
        lambda: encoder(384, 6, 6),
        (16, 128, 384),
        adamw,
        1.03,
    ),
    "MLP 1024-4096-1024, batch 64, SGD momentum": (mlp, (64, 1024), momentum, 1.10),
}


def training_step(
    make: Callable[[], nn.Module], optimize: Optimize, x: Tensor, *, sparse: bool
) -> tuple[Callable[[], None], Any]:
    """One step of ordinary training of a new model, and its trainer where it is sparse."""
    torch.manual_seed(0)
    model = make()
    optimizer = optimize(model)
    trainer = None
    if sparse:
        sx.sparsify(model, sparsity=0.9)
        trainer = sx.SRigL(model, optimizer, total_steps=10 * NEVER, update_every=NEVER)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return step, trainer


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def paired(first: Callable[[], object], second: Callable[[], object], budget: float) -> tuple[float, float, float]:
    """Median seconds of both, and the median of second over first of the same round; the order alternates."""
    for call in (first, second, first, second):
        call()
    repeats = max(1, int(0.1 / seconds(first)))

    def many(call: Callable[[], object]) -> float:
        return seconds(lambda: [call() for _ in range(repeats)]) / repeats

    times: list[tuple[float, float]] = []
    end = time.perf_counter() + budget
    while time.perf_counter() < end or len(times) < 6:
        if len(times) % 2:
            later = many(second)
            times.append((many(first), later))
        else:
            earlier = many(first)
            times.append((earlier, many(second)))
    ratio = statistics.median(b / a for a, b in times)
    return statistics.median(a for a, _ in times), statistics.median(b for _, b in times), ratio


def ordinary_steps(budget: float) -> list[Row]:
    rows = []
    for name, (make, shape, optimize, bar) in CASES.items():
        x = torch.randn(shape)
        dense, _ = training_step(make, optimize, x, sparse=False)
        sparse, _ = training_step(make, optimize, x, sparse=True)
        before, after, ratio = paired(dense, sparse, budget)
        details = f"dense {before * 1e3:.1f} ms, sparse {after * 1e3:.1f} ms"
        rows.append(Row("step", name, "sparse / dense", ratio, bar, details))
        print(f"{name}: {ratio:.3f} ({details})", flush=True)
    return rows


def working_memory(prepare: Callable[[], object], call: Callable[[], object]) -> int:
    """The most bytes of tensors that were live during ``call`` beyond those before it, by the allocator's own log."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        # Once unmeasured: of what was allocated before the log begins, it does not tell the end.
        prepare()
        call()
        prepare()
        with record_function("measured"):
            call()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = profiler.profiler.kineto_results.events()
    (start,) = (event.start_ns() for event in events if event.name() == "measured")
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]" and event.start_ns() >= start:
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def topology_update(rounds: int) -> list[Row]:
    """All of an update of ViT-B/16 at 90 %, optimizer state included, against a dense step; then what it allocates."""
    name, x = "ViT-B/16, 90 %, dense step at batch 8, AdamW", torch.randn(8, 3, 224, 224)
    dense, _ = training_step(ViT, adamw, x, sparse=False)
    torch.manual_seed(0)
    model = ViT()
    optimizer = adamw(model)
    sx.sparsify(model, sparsity=0.9, distribution="uniform")
    trainer = sx.SRigL(model, optimizer, total_steps=NEVER, update_every=1, auto=False)
    largest = max(mask.numel() * 4 for _, mask in named_masks(model))

    def make_due() -> None:
        optimizer.zero_grad()
        model(x[:2]).square().mean().backward()
        optimizer.step()

    times: list[tuple[float, float]] = []
    dense()
    for _ in range(rounds):
        make_due()
        update = seconds(trainer.step)
        times.append((seconds(dense), update))
    assert trainer.last_update == rounds
    before, after = (statistics.median(column) for column in zip(*times, strict=True))
    peak = working_memory(make_due, trainer.step)
    return [
        Row(
            "update",
            name,
            "update / dense step",
            statistics.median(update / step for step, update in times),
            1.0,
            f"dense step {before:.2f} s, update {after:.2f} s",
        ),
        Row(
            "update",
            name,
            "working memory / largest layer",
            peak / largest,
            2.0,
            f"{peak / 1e6:.1f} MB beyond weights, gradients and masks",
        ),
    ]


class HostSyncs(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations that make the host wait: those that return a number, or a shape that depends on values."""

    READS = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "_unique2", "unique_dim")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in self.READS
        return func(*args, **(kwargs or {}))


def host_syncs() -> list[Row]:
    rows = []
    for name, (make, shape, optimize, _) in CASES.items():
        counts = []
        for sparse in (False, True):
            step, _ = training_step(make, optimize, torch.randn(shape), sparse=sparse)
            step()
            with HostSyncs() as syncs:
                step()
            counts.append(syncs.count)
        # Adam and its kin read their own step counter, a CPU tensor, which stalls nothing.
        details = f"dense {counts[0]}, sparse {counts[1]}"
        rows.append(Row("syncs", name, "more than dense", counts[1] - counts[0], 0, details))
    return rows


def table(rows: list[Row]) -> str:
    lines = ["| part | case | quantity | measured | bar | met | details |", "|---|---|---|---|---|---|---|"]
    lines += [
        f"| {row.part} | {row.case} | {row.quantity} | {row.value:.3f} | {row.bar:.2f} | {row.met} | {row.details} |"
        for row in rows
    ]
    return "\n".join(lines)


def write(rows: list[Row]) -> None:
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / "training.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["cpu", "torch", "threads", "part", "case", "quantity", "value", "bar", "details"])
        machine = [cpu_name(), torch.__version__, torch.get_num_threads()]
        for row in rows:
            writer.writerow([*machine, row.part, row.case, row.quantity, f"{row.value:.4f}", row.bar, row.details])
    page = RESULTS / "training.md"
    text = page.read_text(encoding="utf-8") if page.exists() else "# Training\n\n{}\n{}\n".format(*MARKERS)
    head, rest = text.split(MARKERS[0])
    _, tail = rest.split(MARKERS[1])
    host = f"{cpu_name()}, torch {torch.__version__}, {torch.get_num_threads()} threads, float32."
    page.write_text(f"{head}{MARKERS[0]}\n{host}\n\n{table(rows)}\n{MARKERS[1]}{tail}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("step", "update", "syncs"), help="run one part and write no files")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=20.0, help="time to spend on each step case")
    parser.add_argument("--rounds", type=int, default=7, help="topology updates to time")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows: list[Row] = []
    if arguments.only in (None, "step"):
        rows += ordinary_steps(arguments.seconds)
    if arguments.only in (None, "syncs"):
        rows += host_syncs()
    if arguments.only in (None, "update"):
        rows += topology_update(arguments.rounds)
    print(table(rows))
    if arguments.only is None:
        write(rows)


if __name__ == "__main__":
    main()
