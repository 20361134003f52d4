"""The parts of the benchmark: which cells each has, and the files it writes.

Owns the order of a run and its files; the parts' figures come from the other modules.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from harness.bars import outcomes
from harness.ceilings import measure_ceilings, read_ceilings, write_ceilings
from harness.cells import (
    CONV,
    DEEPSPARSE,
    DEEPSPARSE_ORT,
    DENSE,
    DENSE_INT8,
    GATHER_EAGER,
    LINEAR,
    OURS,
    OURS_BF16,
    OURS_INT8,
    Cell,
    Record,
    group,
    read_csv,
    write_csv,
)
from harness.contenders import has_compiler
from harness.deepsparse_process import PeerError, Worker, default_folder, make_environment
from harness.layers import Layer
from harness.machine import describe
from harness.measuring import Bench, Effort, collect, measure_layers, measure_threads
from harness.models import measure_networks
from harness.plots import plot_linear, plot_speedups
from harness.processors import Processors
from harness.tables import bars_table, ceilings_table, cell_line, cells_table
from harness.training import measure_steps

LINEAR_SHAPES = ((3072, 768), (768, 3072), (4096, 4096))
SPARSITIES = (0.8, 0.9, 0.95, 0.99)
BATCHES = (1, 16, 64, 256, 2048)
# The 3x3 and 1x1 convolutions of ResNet-50: inputs, outputs, kernel, size of the input, stride.
RESNET50 = (
    (64, 64, 1, 56, 1),
    (64, 64, 3, 56, 1),
    (64, 256, 1, 56, 1),
    (256, 64, 1, 56, 1),
    (256, 128, 1, 56, 1),
    (128, 128, 3, 56, 2),
    (128, 512, 1, 28, 1),
    (256, 512, 1, 56, 2),
    (512, 128, 1, 28, 1),
    (128, 128, 3, 28, 1),
    (512, 256, 1, 28, 1),
    (256, 256, 3, 28, 2),
    (256, 1024, 1, 14, 1),
    (512, 1024, 1, 28, 2),
    (1024, 256, 1, 14, 1),
    (256, 256, 3, 14, 1),
    (1024, 512, 1, 14, 1),
    (512, 512, 3, 14, 2),
    (512, 2048, 1, 7, 1),
    (1024, 2048, 1, 14, 2),
    (2048, 512, 1, 7, 1),
    (512, 512, 3, 7, 1),
)


@dataclass(kw_only=True)
class Job:
    """What a part needs: the options, and how to measure.

    Attributes:
        options: From the command line.
        bench: How to measure.
        notes: What the page of a part says of how it was measured, by its name.
    """

    options: argparse.Namespace
    bench: Bench
    notes: dict[str, str] = field(default_factory=dict)

    def measure(
        self,
        section: str,
        layers: Sequence[Layer],
        sparsities: Sequence[float],
        batches: Sequence[int],
        contenders: tuple[str, ...],
    ) -> list[Record]:
        """Measure the cells of a part, with what the options say instead."""
        options = self.options
        chosen = self.chosen(contenders)
        cells = measure_layers(
            section, layers, options.sparsities or sparsities, options.batches or batches, chosen, self.bench
        )
        return self.collect(section, cells)

    def chosen(self, contenders: tuple[str, ...]) -> tuple[str, ...]:
        names = tuple(self.options.contenders or contenders)
        unknown = set(names) - {*LINEAR, *OURS_BF16, GATHER_EAGER}
        if unknown:
            sys.exit(f"no contender {', '.join(sorted(unknown))}; there are: {', '.join((*LINEAR, GATHER_EAGER))}")
        return names

    def collect(self, section: str, cells: Iterator[list[Record]]) -> list[Record]:
        return collect(cells, cell_line, lambda records: write_csv(self.path(section, "csv"), records))

    def path(self, section: str, suffix: str) -> Path:
        return Path(self.options.out) / f"peers_{section}.{suffix}"

    def linear_layers(self) -> list[Layer]:
        shapes: tuple[tuple[int, int], ...] = LINEAR_SHAPES
        if self.options.shapes:
            shapes = tuple(_shape(text) for text in self.options.shapes)
        elif self.options.quick:
            shapes = ((128, 64),)
        return [Layer(inputs=inputs, outputs=outputs) for inputs, outputs in shapes]


def _shape(text: str) -> tuple[int, int]:
    inputs, _, outputs = text.partition("x")
    if not (inputs.isdecimal() and outputs.isdecimal()):
        sys.exit(f"cannot read the shape {text!r}: write INPUTSxOUTPUTS, such as 3072x768")
    return int(inputs), int(outputs)


def linear(job: Job) -> list[Record]:
    batches = (1, 16) if job.options.quick else BATCHES
    contenders = LINEAR if has_compiler() else (*LINEAR, GATHER_EAGER)
    records = job.measure("linear", job.linear_layers(), SPARSITIES, batches, contenders)
    plot_linear(job.path("linear", "png"), records, "Linear layers")
    return records


def small(job: Job) -> list[Record]:
    contenders = (*DENSE, *DENSE_INT8, *OURS, *OURS_INT8, DEEPSPARSE, DEEPSPARSE_ORT)
    return job.measure("small", job.linear_layers()[:1], SPARSITIES, (2, 4, 8), contenders)


def convolutions(job: Job) -> list[Layer]:
    """Those of ResNet-50."""
    return [
        Layer(inputs=inputs, outputs=outputs, kernel=kernel, size=size, stride=stride)
        for inputs, outputs, kernel, size, stride in (((16, 16, 3, 8, 1),) if job.options.quick else RESNET50)
    ]


def conv(job: Job) -> list[Record]:
    records = job.measure("conv", convolutions(job), (0.9,), (1, 2) if job.options.quick else (1, 16), CONV)
    plot_speedups(job.path("conv", "png"), records, "Convolutions of ResNet-50, 90% sparse")
    return records


def bf16(job: Job) -> list[Record]:
    return job.measure("bf16", job.linear_layers(), SPARSITIES, (1,), (*DENSE, *OURS, *OURS_BF16))


def int8(job: Job) -> list[Record]:
    contenders = (*DENSE, *DENSE_INT8, *OURS, *OURS_INT8)
    return job.measure("int8", job.linear_layers(), (0.9, 0.95), (1, 16) if job.options.quick else BATCHES, contenders)


def int8_conv(job: Job) -> list[Record]:
    contenders, batches = (*DENSE, *DENSE_INT8, *OURS, *OURS_INT8), (1, 2) if job.options.quick else (1, 16)
    return job.measure("int8_conv", convolutions(job), (0.9,), batches, contenders)


def threads(job: Job) -> list[Record]:
    options = job.options
    batches = options.batches or ((16,) if options.quick else (16, 64, 256, 2048))
    layers, contenders = job.linear_layers(), job.chosen((*DENSE, *DENSE_INT8, *OURS, *OURS_INT8))
    sparsities, calm = options.sparsities or (0.9,), None if options.quick else Processors()
    records = job.collect(
        "threads", measure_threads(layers, sparsities, batches, contenders, (1, 2), job.bench.effort, calm)
    )
    if calm is not None:
        job.notes["threads"] = calm.describe()
    return records


def train(job: Job) -> list[Record]:
    widths, batch = ((64, 128, 64), 8) if job.options.quick else ((1024, 4096, 1024), 256)
    return job.collect("train", iter([measure_steps(widths, 0.95, batch, job.bench)]))


def models(job: Job) -> list[Record]:
    quick = job.options.quick
    batches = job.options.batches or ((1, 2) if quick else (1, 16))
    with tempfile.TemporaryDirectory(prefix="srigl_fx_peers_") as folder:
        return job.collect("models", measure_networks(Path(folder), batches, job.bench, tiny=quick))


def ceilings(job: Job) -> list[Record]:
    """Measure the machine, for the limits that the other parts' pages name."""
    options = job.options
    found = measure_ceilings(0.002, 1 << 20) if options.quick else measure_ceilings()
    write_ceilings(job.path("ceilings", "csv"), found)
    page = [
        "# Peers: ceilings",
        "",
        f"`{options.command}`",
        "",
        describe(options.threads),
        "",
        ceilings_table(found),
        "",
    ]
    job.path("ceilings", "md").write_text("\n".join(page), encoding="utf-8")
    print(ceilings_table(found), flush=True)
    return []


SECTIONS: dict[str, Callable[[Job], list[Record]]] = {
    "ceilings": ceilings,
    "linear": linear,
    "small": small,
    "conv": conv,
    "bf16": bf16,
    "int8": int8,
    "int8_conv": int8_conv,
    "threads": threads,
    "train": train,
    "models": models,
}


def setup(options: argparse.Namespace) -> None:
    folder = options.peers or default_folder()
    print(f"DeepSparse is ready in {make_environment(folder)}")


def run(options: argparse.Namespace) -> None:
    """Run the parts; each writes its own files as it goes, and the table of bars is made last."""
    options.out.mkdir(parents=True, exist_ok=True)
    effort = Effort(seconds=0.01, rounds=2) if options.quick else Effort(seconds=options.seconds, rounds=options.rounds)
    with ExitStack() as stack:
        worker, no_worker = None, ""
        try:
            worker = stack.enter_context(Worker(options.peers or default_folder()))
        except PeerError as error:
            no_worker = str(error)
            print(no_worker, file=sys.stderr)
        bench = Bench(threads=options.threads, effort=effort, worker=worker, no_worker=no_worker)
        job = Job(options=options, bench=bench)
        machine = describe(options.threads, {"DeepSparse": worker.versions["deepsparse"]} if worker else None)
        print(machine, flush=True)
        for section in options.only or [name for name in SECTIONS if name != "models"]:
            records = SECTIONS[section](job)
            if records:
                about = " ".join([machine, job.notes.get(section, "")]).strip()
                write_page(job.path(section, "md"), section, records, about, options.command)
                if found := outcomes(records):
                    print(bars_table(found, limits(records, options.out)), flush=True)
    write_bars(options.out / "peers.md", options.out)


def limits(records: Sequence[Record], folder: Path) -> dict[Cell, tuple[float, str]]:
    """By the ceilings measured last, the microseconds of each cell, and what limits it; for one thread.

    Parts that another processor ran have none.
    """
    measured = folder / "peers_ceilings.csv"
    if not measured.exists():
        return {}
    processor = _processor(folder, "ceilings")
    records = [record for record in records if _processor(folder, record.section) == processor]
    machine, found = read_ceilings(measured), {}
    for key, cell in group(records).items():
        fmas = max(record.fmas for record in cell.values())
        if fmas and key[4] == 1:
            seconds, reason = machine.limit(min(record.bytes for record in cell.values()), fmas)
            found[key] = (1e6 * seconds, reason)
    return found


def write_page(path: Path, section: str, records: Sequence[Record], machine: str, command: str) -> None:
    """The page of a part: the command that made it, the machine, the bars, and every cell."""
    text = [f"# Peers: {section}", "", f"`{command}`", "", machine, ""]
    path.write_text("\n".join(text), encoding="utf-8")  # which says on what it ran
    known, found = limits(records, path.parent), outcomes(records)
    if found:
        text += ["## Bars", "", bars_table(found, known), ""]
    text += ["## Every cell", "", cells_table(records, known), ""]
    path.write_text("\n".join(text), encoding="utf-8")


def write_bars(path: Path, folder: Path) -> None:
    """The table of all bars, from every part that the folder holds."""
    records = read_all(folder)
    if found := outcomes(records):
        table = bars_table(found, limits(records, folder))
        made = [
            f"- {section}: {line}; {_processor(folder, section)}"
            for section in SECTIONS
            if (line := _line(folder, section, 2))
        ]
        text = ["# Peers: bars", "", "The commands, and what they ran on, part by part:", "", *made, "", table, ""]
        path.write_text("\n".join(text), encoding="utf-8")


def _line(folder: Path, section: str, number: int) -> str:
    """A line of the page of a part, or "" where there is none: the command that made it (2), the machine (4)."""
    page = folder / f"peers_{section}.md"
    lines = page.read_text(encoding="utf-8").splitlines() if page.exists() else []
    return lines[number] if len(lines) > number else ""


def _processor(folder: Path, section: str) -> str:
    """The processor that a part ran on."""
    return _line(folder, section, 4).partition("), ")[0] + ")"


def read_all(folder: Path) -> list[Record]:
    """The records of all parts that a folder holds."""
    parts = [folder / f"peers_{section}.csv" for section in SECTIONS if section != "ceilings"]
    return [record for path in parts if path.exists() for record in read_csv(path)]
