"""What rounding to eight bits costs on real tasks: the networks of the claims page, sparse, in float32 and in less.

Trains them with SRigL as ``examples/reproduce_claims.py`` does, lowers each in float32, bfloat16 and int8, and compares
these on the test data. The same weights stored densely and quantised by ONNX Runtime are there for scale. Run
``python benchmarks/int8_accuracy.py`` (about ten minutes of one core, needs scikit-learn). It can be stopped and
started again at will: each finished network stays in results/int8_accuracy.csv; ``docs/quantised.md`` shows the tables.
``--table-only`` makes them from the rows there are, and the table of speeds from what ``peers.py`` wrote.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
from harness import forms, guide, losses, tables
from torch import Tensor

from srigl_fx.comparison import signal_to_noise

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "examples"))

from claims import analysis, report, rows, runs  # noqa: E402 - a package of the examples

OUT = ROOT / "benchmarks" / "results" / "int8_accuracy.csv"
PAGE = ROOT / "docs" / "quantised.md"
SPARSITIES = (0.9,)
REFERENCE = "float32"
CALIBRATION = 512  # training samples that scales are taken from where these are given
COLUMNS = (
    *("task", "sparsity", "seed", "steps", "form"),
    *("score", "bits", "changed", "snr", "bytes_share", "layers"),
)


@dataclass(frozen=True)
class Key:
    """What tells one row from another; the same training serves all forms."""

    task: str
    sparsity: float
    seed: int
    steps: int
    form: str

    @property
    def run(self) -> runs.Key:
        """The run that trains the network."""
        return runs.Key(self.seed, self.task, "srigl", self.sparsity, self.steps)


@dataclass(frozen=True)
class Row:
    """What a network gives in one form.

    Attributes:
        score: Accuracy in percent, or bits per character.
        bits: Cross-entropy in bits, a prediction.
        changed: Share of the predictions that float32 does not make, in percent.
        snr: Signal-to-noise ratio of the outputs on the test data, in dB, beside float32.
        bytes_share: Bytes that the masked layers take, of those that they take densely in float32; nan where nothing is
            lowered.
        layers: For each weight that was to be int8: its ratio on training data in dB, or None, the dtype that its
            values have, "dense" where it is not condensed, and the reason for that.
    """

    score: float
    bits: float
    changed: float
    snr: float
    bytes_share: float
    layers: forms.Layers


Rows = dict[Key, Row]


def plan(tasks: Iterable[str], sparsities: Iterable[float], seeds: int | None = None, scale: float = 1.0) -> list[Key]:
    """The rows to make. ONNX Runtime is asked for the first seed only: its numbers must be those of PyTorch."""
    tasks = tuple(tasks)
    return [
        Key(name, sparsity, seed, max(4, round(runs.TASKS[name].steps * scale)), form)
        for sparsity in sparsities
        for seed in range(max(runs.TASKS[name].seeds for name in tasks) if seeds is None else seeds)
        for name in tasks
        if seed < runs.TASKS[name].seeds
        for form in forms.TITLES
        if form != forms.CAREFUL and (form != forms.IN_ORT or seed == 0)
    ]


def execute(keys: Sequence[Key]) -> Iterator[tuple[Key, Row]]:
    """Train one network, and measure it in these forms of it."""
    first = keys[0]
    task = runs.TASKS[first.task]
    split = task.split()
    model = runs.train(first.run).model.eval()
    texts = not split.train_x.is_floating_point()
    examples = _windows(split.train_x, runs.TEST_BATCH) if texts else split.train_x[: runs.TEST_BATCH]
    seen = _windows(split.train_x, CALIBRATION) if texts else split.train_x[-CALIBRATION:]
    parts = torch.split(split.test_x, runs.TEST_BATCH)

    def measured(outputs: forms.Outputs) -> Tensor:
        with torch.no_grad():
            return torch.cat([outputs(part) for part in parts])

    expected = measured(model)
    for key in keys:
        outputs, lowering = forms.form(
            key.form, model, (examples,), calibration=[(seen,)], convolutional=key.task == "cnn"
        )
        logits = measured(outputs)
        bits = runs.bits(logits, split)
        accuracy = 100 * float((logits.argmax(dim=1) == split.test_y).float().mean())
        yield (
            key,
            Row(
                score=round(bits if task.bits else accuracy, 5),
                bits=round(bits, 6),
                changed=round(100 * float((logits.argmax(dim=1) != expected.argmax(dim=1)).float().mean()), 4),
                snr=round(signal_to_noise(expected, logits), 2),
                bytes_share=forms.bytes_share(lowering),
                layers=forms.layers(lowering) if lowering and key.form == "int8" else {},
            ),
        )


def _windows(text: Tensor, count: int) -> Tensor:
    """So many windows of the training text, evenly spread."""
    starts = torch.linspace(0, len(text) - runs.data.CONTEXT, count).long()
    return text[starts[:, None] + torch.arange(runs.data.CONTEXT)].long()


def read(path: Path) -> Rows:
    """The finished rows in ``path``, without a last line that was cut off; none where it is missing.

    Raises:
        ValueError: The file is damaged; the message names the line.
    """
    return rows.read(path, COLUMNS, _parsed)


def _parsed(line: dict[str, str]) -> tuple[Key, Row]:
    for name, known in (("task", runs.TASKS), ("form", forms.TITLES)):
        if line[name] not in known:
            raise ValueError(f"no {name} is called {line[name]!r}")
    key = Key(line["task"], float(line["sparsity"]), int(line["seed"]), int(line["steps"]), line["form"])
    numbers = (float(line[name]) for name in ("score", "bits", "changed", "snr", "bytes_share"))
    return key, Row(*numbers, {name: tuple(found) for name, found in json.loads(line["layers"]).items()})


def _forget(path: Path, keys: Sequence[Key]) -> None:
    """Take the rows of a network that is trained again out of the file: on another machine it becomes another one."""
    found = read(path)
    others = {key: row for key, row in found.items() if key not in keys}
    if len(others) == len(found):
        return
    made = path.with_suffix(".part")
    made.unlink(missing_ok=True)
    for key, row in others.items():
        append(made, key, row)
    if others:
        made.replace(path)
    else:
        path.unlink()


def append(path: Path, key: Key, row: Row) -> None:
    """Write a finished row in one piece, and see it on the disk; a line cut off before is removed."""
    values = dict(zip(COLUMNS, (*astuple(key), *astuple(row)), strict=True))
    rows.append(path, COLUMNS, values | {"layers": json.dumps(row.layers)})


def parts(found: Rows) -> dict[str, str]:
    """The tables by the names of their places on the page."""
    settings = [(task, sparsity) for task in runs.TASKS for sparsity in sorted({key.sparsity for key in found})]
    keys = plan(runs.TASKS, SPARSITIES)
    planned = {key.run for key in keys}
    done = planned - {key.run for key in keys if key not in found}
    return {
        "progress": f"{len(done)} of {len(planned)} networks are in; the script trains those that are missing.",
        "accuracy": tables.markdown(
            (
                *("network", "sparsity", "values", "score", "lost", "bits lost", "predictions that change, %"),
                *("outputs, dB", "bytes of layers", "seeds", "within the limit"),
            ),
            [line for setting in settings for form in forms.TITLES if (line := _scores(found, *setting, form))],
        ),
        "rounding": tables.markdown(
            ("network", "sparsity", "weights in int8", "smallest, dB", "median, dB", "largest, dB", "not in int8"),
            [line for setting in settings if (line := _rounding(found, *setting))],
        ),
        "same_numbers": tables.markdown(
            ("network", "sparsity", "float32", "int8 in PyTorch", "int8 in ONNX Runtime"),
            [line for setting in settings if (line := _same_numbers(found, *setting))],
        ),
        "speeds": tables.markdown(
            (
                *("layer", "sparsity", "batch", "int8 / ours in float32", "int8 / dense int8", "int8 / dense float32"),
                "bfloat16 / ours in float32",
            ),
            guide.speeds(OUT.parent),
        ),
        "instruction_sets": tables.markdown(
            ("instruction set", "1 sample", "16 samples", "full tiles"), guide.instruction_sets()
        ),
    }


def _by_seed(found: Rows, task: str, sparsity: float, form: str) -> dict[int, Row]:
    return {key.seed: row for key, row in found.items() if (key.task, key.sparsity, key.form) == (task, sparsity, form)}


def _scores(found: Rows, name: str, sparsity: float, form: str) -> list[str]:
    """A line of the table; empty where nothing was run."""
    task, these, base = (
        runs.TASKS[name],
        _by_seed(found, name, sparsity, form),
        _by_seed(found, name, sparsity, REFERENCE),
    )
    if not these or form == forms.IN_ORT:
        return []
    pairs = [(these[seed], base[seed]) for seed in sorted(these.keys() & base)]
    sign, digits, limit = (1, 4, losses.LIMITS["bits"]) if task.bits else (-1, 2, losses.LIMITS["accuracy"])
    lost = analysis.estimate([sign * (one.score - other.score) for one, other in pairs])
    bits = analysis.estimate([one.bits - other.bits for one, other in pairs])
    shares = {row.bytes_share for row in these.values()}
    return [
        task.title,
        f"{sparsity:.0%}",
        forms.TITLES[form],
        _number(analysis.estimate([row.score for row in these.values()]), 3 if task.bits else 2)
        + (" bits" if task.bits else " %"),
        *(
            ("", "", "", "")
            if form == REFERENCE
            else (
                _number(lost, digits),
                _number(bits, 4),
                f"{statistics.fmean(row.changed for row in these.values()):.2f}",
                f"{min(row.snr for row in these.values()):.1f}",
            )
        ),
        "" if any(map(math.isnan, shares)) else f"{100 * statistics.fmean(shares):.1f} %",
        str(len(these)),
        "" if form == REFERENCE or lost is None else losses.verdict(lost.mean, lost.half_width, limit),
    ]


def _rounding(found: Rows, name: str, sparsity: float) -> list[str]:
    """What became of the layers: how many were rounded, how well, and why others were not."""
    these = _by_seed(found, name, sparsity, "int8")
    if not these:
        return []
    layers = [(fqn, *layer) for row in these.values() for fqn, layer in row.layers.items()]
    ratios = [ratio for _, ratio, dtype, _ in layers if dtype == "int8" and ratio is not None]
    others: dict[str, set[str]] = {}
    for fqn, _, dtype, reason in layers:
        if dtype != "int8":
            others.setdefault(reason, set()).add(f"`{fqn}`")
    counts = sorted({sum(dtype == "int8" for _, dtype, _ in row.layers.values()) for row in these.values()})
    return [
        runs.TASKS[name].title,
        f"{sparsity:.0%}",
        " to ".join(str(count) for count in {counts[0]: None, counts[-1]: None}),
        *(f"{ratio:.1f}" for ratio in (min(ratios), statistics.median(ratios), max(ratios))),
        "; ".join(f"{', '.join(sorted(names))}: {reason}" for reason, names in others.items()),
    ]


def _same_numbers(found: Rows, name: str, sparsity: float) -> list[str]:
    """The scores of one seed in both runtimes."""
    task, in_ort = runs.TASKS[name], _by_seed(found, name, sparsity, forms.IN_ORT)
    cells = [
        f"{by_seed[seed].score:.{4 if task.bits else 2}f}"
        for seed in in_ort
        for by_seed in (_by_seed(found, name, sparsity, REFERENCE), _by_seed(found, name, sparsity, "int8"), in_ort)
    ]
    return [task.title, f"{sparsity:.0%}", *cells] if cells else []


def _number(estimate: analysis.Estimate | None, digits: int) -> str:
    return "" if estimate is None else losses.number(estimate.mean, estimate.half_width, digits)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, then make the tables."""
    from tqdm import tqdm

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=runs.TASKS, default=list(runs.TASKS))
    parser.add_argument("--sparsities", nargs="+", type=float, default=list(SPARSITIES))
    parser.add_argument("--seeds", type=int, help="at most this many")
    parser.add_argument("--steps-scale", type=float, default=1.0, help="train this much longer or, below 1, shorter")
    parser.add_argument("--out", type=Path, default=OUT, help=f"the CSV file (default: {OUT.relative_to(ROOT)})")
    parser.add_argument("--table-only", action="store_true", help="train nothing")
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)
    networks: dict[runs.Key, list[Key]] = {}
    for key in plan(options.tasks, options.sparsities, options.seeds, options.steps_scale):
        networks.setdefault(key.run, []).append(key)
    done = read(options.out)
    missing = [] if options.table_only else [keys for keys in networks.values() if not done.keys() >= {*keys}]
    for keys in tqdm(missing, unit="network", disable=options.table_only):
        _forget(options.out, keys)
        for key, row in execute(keys):
            append(options.out, key, row)
    made = parts(read(options.out))
    if options.out == OUT:
        PAGE.write_text(report.fill(PAGE.read_text(encoding="utf-8"), made), encoding="utf-8")
    print("\n\n".join(made.values()))


if __name__ == "__main__":
    main()
