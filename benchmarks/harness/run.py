"""The parts of the benchmark: which cells each has, and the files it writes.

Owns the order of a run and its files; the parts' figures come from the other modules.
"""

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from harness.bars import outcomes
from harness.cells import (
    CONV,
    DEEPSPARSE,
    DEEPSPARSE_ORT,
    DENSE,
    LINEAR,
    OURS,
    OURS_BF16,
    Record,
    read_csv,
    write_csv,
)
from harness.deepsparse_process import PeerError, Worker, default_folder, make_environment
from harness.layers import Layer
from harness.machine import describe
from harness.measuring import Effort, collect, measure_layers
from harness.plots import plot_linear, plot_speedups
from harness.tables import bars_table, cell_line, cells_table

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
    """What a part needs: the options, how long to measure, and the process of DeepSparse or why there is none."""

    options: argparse.Namespace
    effort: Effort
    worker: Worker | None
    no_worker: str

    def measure(
        self,
        section: str,
        layers: Sequence[Layer],
        sparsities: Sequence[float],
        batches: Sequence[int],
        contenders: tuple[str, ...],
        threads: int | None = None,
    ) -> list[Record]:
        """Measure the cells of a part, with what the options say instead."""
        options = self.options
        chosen = tuple(options.contenders or contenders)
        unknown = set(chosen) - {*LINEAR, *OURS_BF16, "gather, eager"}
        if unknown:
            sys.exit(f"no contender {', '.join(sorted(unknown))}; there are: {', '.join(LINEAR)}")
        cells = measure_layers(
            section,
            layers,
            options.sparsities or sparsities,
            options.batches or batches,
            contenders=chosen,
            threads=threads or options.threads,
            effort=self.effort,
            worker=self.worker,
            no_worker=self.no_worker,
        )
        return collect(cells, cell_line, lambda records: write_csv(self.path(section, "csv"), records))

    def path(self, section: str, suffix: str) -> Path:
        return Path(self.options.out) / f"peers_{section}.{suffix}"

    def linear_layers(self) -> list[Layer]:
        shapes = LINEAR_SHAPES
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
    records = job.measure("linear", job.linear_layers(), SPARSITIES, batches, LINEAR)
    plot_linear(job.path("linear", "png"), records, "Linear layers")
    return records


def small(job: Job) -> list[Record]:
    return job.measure("small", job.linear_layers()[:1], SPARSITIES, (2, 4, 8), (*DENSE, *OURS, DEEPSPARSE, DEEPSPARSE_ORT))


def conv(job: Job) -> list[Record]:
    layers = [
        Layer(inputs=inputs, outputs=outputs, kernel=kernel, size=size, stride=stride)
        for inputs, outputs, kernel, size, stride in (((16, 16, 3, 8, 1),) if job.options.quick else RESNET50)
    ]
    records = job.measure("conv", layers, (0.9,), (1, 2) if job.options.quick else (1, 16), CONV)
    plot_speedups(job.path("conv", "png"), records, "Convolutions of ResNet-50, 90% sparse")
    return records


def bf16(job: Job) -> list[Record]:
    return job.measure("bf16", job.linear_layers(), SPARSITIES, (1,), (*DENSE, *OURS, *OURS_BF16))


def threads(job: Job) -> list[Record]:
    found: list[Record] = []
    for layer in job.linear_layers():
        for count in (1, 2):
            found += job.measure("threads", [layer], (0.9,), (16, 64, 256, 2048), (*DENSE, *OURS), count)
    write_csv(job.path("threads", "csv"), found)
    return found


SECTIONS: dict[str, Callable[[Job], list[Record]]] = {
    "linear": linear,
    "small": small,
    "conv": conv,
    "bf16": bf16,
    "threads": threads,
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
        job = Job(options=options, effort=effort, worker=worker, no_worker=no_worker)
        machine = describe(options.threads, {"DeepSparse": worker.versions["deepsparse"]} if worker else None)
        print(machine, flush=True)
        for section in options.only or [name for name in SECTIONS if name != "models"]:
            records = SECTIONS[section](job)
            write_page(job.path(section, "md"), section, records, machine, options)
            print(bars_table(outcomes(records)), flush=True)


def write_page(
    path: Path, section: str, records: Sequence[Record], machine: str, options: argparse.Namespace
) -> None:
    command = "python benchmarks/peers.py " + shlex.join(sys.argv[1:])
    found = outcomes(records)
    text = [f"# Peers: {section}", "", f"`{command.strip()}`", "", machine, ""]
    if found:
        text += ["## Bars", "", bars_table(found), ""]
    text += ["## Every cell", "", cells_table(records), ""]
    path.write_text("\n".join(text), encoding="utf-8")


def read_all(folder: Path) -> list[Record]:
    """The records of all parts that a folder holds."""
    return [record for path in sorted(folder.glob("peers_*.csv")) for record in read_csv(path)]
