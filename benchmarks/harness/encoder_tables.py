"""What a pretrained encoder gives in each form, and the tables that say so.

Owns the rows and their wording. It must not know how an encoder was made or measured.
"""

import math
import statistics
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from harness import forms, losses, tables

DENSE = 0.0  # the sparsity of the encoder as it comes
REFERENCE = "float32"
LEVEL = 1.96  # standard errors that a 95 % interval reaches to both sides


@dataclass(frozen=True)
class Key:
    """What tells one row from another; the encoder of a sparsity, a seed and a number of steps serves all forms."""

    sparsity: float
    seed: int
    steps: int
    form: str

    @property
    def encoder(self) -> tuple[float, int, int]:
        """What tells one encoder from another."""
        return self.sparsity, self.seed, self.steps


@dataclass(frozen=True)
class Row:
    """What an encoder gives in one form, beside the same encoder in float32.

    Attributes:
        pairs: How many pairs were held out.
        recall: Queries whose own answer is the most similar one, in percent.
        missed: Number of queries that float32 answers and this form does not.
        gained: Number of queries that this form answers and float32 does not.
        bits: Cross-entropy of the choice among all answers, in the mean.
        bits_lost: By how many bits it is more than float32's.
        bits_error: Standard error of that, over the queries.
        cosine: Between both vectors of a text, in the mean.
        cosine_low: The same at the fifth percentile.
        rank: Spearman's correlation of all similarities.
        top_1: Share of the queries with the same most similar answer.
        top_10: Share of the ten most similar answers that are the same.
        snr: Signal-to-noise ratio of the vectors in dB.
        bytes_share: As in ``int8_accuracy.py``.
        layers: As there.
    """

    pairs: int
    recall: float
    missed: int
    gained: int
    bits: float
    bits_lost: float
    bits_error: float
    cosine: float
    cosine_low: float
    rank: float
    top_1: float
    top_10: float
    snr: float
    bytes_share: float
    layers: forms.Layers


Rows = dict[Key, Row]


def parts(found: Rows, planned: Collection[Key]) -> dict[str, str]:
    """The tables by the names of their places on the page: of what is planned, what there is."""
    found = {key: found[key] for key in planned if key in found}
    settings = list(dict.fromkeys((key.sparsity, key.form) for key in planned))
    encoders = {key.encoder for key in planned if key.sparsity != DENSE}
    done = encoders - {key.encoder for key in planned if key not in found}
    return {
        "encoder_progress": f"{len(done)} of {len(encoders)} sparse encoders are in with all forms.",
        "encoder_found": tables.markdown(
            (
                *("weights", "values", "recall, %", "points lost", "within 0.2 points"),
                *("bits", "bits lost", "within 0.01 bits", "seeds"),
            ),
            [line for setting in settings if (line := _found(found, *setting))],
        ),
        "encoder_vectors": tables.markdown(
            (
                *("weights", "values", "cosine, mean", "cosine, 5th percentile", "rank correlation"),
                *("same first answer, %", "same ten answers, %", "vectors, dB", "bytes of layers"),
            ),
            [line for setting in settings if (line := _vectors(found, *setting))],
        ),
        "encoder_rounding": tables.markdown(
            (
                *("weights", "values", "in int8", "of these, given scales", "smallest, dB", "median, dB"),
                *("largest, dB", "the smallest", "not in int8"),
            ),
            [line for setting in settings if (line := _rounding(found, *setting))],
        ),
    }


def _of(found: Rows, sparsity: float, form: str) -> list[Row]:
    """The rows of the seeds there are."""
    return [row for key, row in found.items() if (key.sparsity, key.form) == (sparsity, form)]


def _names(sparsity: float, form: str) -> tuple[str, str]:
    return "dense" if sparsity == DENSE else f"{sparsity:.0%} sparse", forms.TITLES[form]


def _found(found: Rows, sparsity: float, form: str) -> list[str]:
    """How well texts are found; empty where nothing was run."""
    if not (these := _of(found, sparsity, form)):
        return []
    cells = ["", "", "", ""]
    if form != REFERENCE:
        points = together(recall_lost(row) for row in these)
        bits = together((row.bits_lost, row.bits_error) for row in these)
        cells = [
            losses.number(*points, 2),
            losses.verdict(*points, losses.LIMITS["accuracy"], of="pairs"),
            losses.number(*bits, 4),
            losses.verdict(*bits, losses.LIMITS["bits"], of="pairs"),
        ]
    return [
        *_names(sparsity, form),
        f"{statistics.fmean(row.recall for row in these):.2f}",
        *cells[:2],
        f"{statistics.fmean(row.bits for row in these):.3f}",
        *cells[2:],
        "" if sparsity == DENSE else str(len(these)),
    ]


def recall_lost(row: Row) -> tuple[float, float]:
    """How many points of recall are lost, and the standard error of that: each query is answered twice.

    Example:
        >>> row = Row(100, 50.0, 3, 1, 2.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 40.0, 0.1, {})
        >>> lost, error = recall_lost(row)
        >>> lost, round(error, 3)
        (2.0, 2.0)
    """
    lost = (row.missed - row.gained) / row.pairs
    return 100 * lost, 100 * math.sqrt(((row.missed + row.gained) / row.pairs - lost**2) / (row.pairs - 1))


def together(estimates: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """The mean of several estimates with standard errors, and how far its 95 % interval reaches to both sides.

    Example:
        >>> mean, half_width = together([(1.0, 0.3), (2.0, 0.4)])
        >>> mean, round(half_width, 2)
        (1.5, 0.49)
    """
    means, errors = zip(*estimates, strict=True)
    return statistics.fmean(means), LEVEL * math.hypot(*errors) / len(errors)


def _vectors(found: Rows, sparsity: float, form: str) -> list[str]:
    """How alike the vectors are; empty for what they are compared with."""
    these = _of(found, sparsity, form)
    if not these or form == REFERENCE:
        return []
    share = statistics.fmean(row.bytes_share for row in these)
    return [
        *_names(sparsity, form),
        f"{statistics.fmean(row.cosine for row in these):.5f}",
        f"{min(row.cosine_low for row in these):.5f}",
        f"{statistics.fmean(row.rank for row in these):.5f}",
        f"{100 * statistics.fmean(row.top_1 for row in these):.1f}",
        f"{100 * statistics.fmean(row.top_10 for row in these):.1f}",
        f"{min(row.snr for row in these):.1f}",
        "" if math.isnan(share) else f"{100 * share:.1f} %",
    ]


def _rounding(found: Rows, sparsity: float, form: str) -> list[str]:
    """What became of the sparse layers: how many were rounded, how well, and why others were not; empty for floats."""
    weights = [(fqn, *layer) for row in _of(found, sparsity, form) for fqn, layer in row.layers.items()]
    layers = [weight for weight in weights if weight[1] is not None]
    rounded = sorted((ratio, fqn, dtype) for fqn, ratio, dtype, _ in layers if dtype in ("int8", forms.GIVEN))
    if not rounded:
        return []
    others = {f"`{fqn}`: {reason}" for fqn, _, dtype, reason in layers if dtype not in ("int8", forms.GIVEN)}
    return [
        *_names(sparsity, form),
        f"{len(rounded)} of {len(layers)}",
        str(sum(dtype == forms.GIVEN for _, _, dtype in rounded)),
        *(f"{rounded[index][0]:.1f}" for index in (0, len(rounded) // 2, -1)),
        f"`{rounded[0][1]}`",
        "; ".join(sorted(others)),
    ]
