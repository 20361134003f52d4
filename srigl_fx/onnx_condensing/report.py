"""What condensing a file did: one row for each layer with a constant weight."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from srigl_fx.reports.text_tables import format_bytes, format_table


@dataclass(frozen=True, kw_only=True)
class CondensingRow:
    """One layer.

    Attributes:
        name: Its weight, as the file calls it.
        operator: The operator that reads it in the source.
        shape: The weight's shape, outputs first.
        sparsity: The fraction of it that is zero.
        condensed: Whether it is condensed now.
        eight_bits: Whether it is in eight bits then, with numbers and scales of the source.
        parts: How many nodes it is: more than one where rows of like length are nodes of their own.
        form_of_all: What became of the operator, where it is several nodes now, in words.
        reason: Why it is not, or why in float32 although the source is in eight bits.
    """

    name: str
    operator: str
    shape: tuple[int, ...]
    sparsity: float
    condensed: bool
    eight_bits: bool
    parts: int
    reason: str
    form_of_all: str = ""

    @property
    def form(self) -> str:
        """What became of it, in words."""
        if not self.condensed:
            return "dense"
        more = [self.form_of_all] if self.form_of_all else []
        more += ["int8"] if self.eight_bits else []
        more += [f"{self.parts} groups of rows"] if self.parts > 1 else []
        return ", ".join(("condensed", *more))


@dataclass(frozen=True, kw_only=True)
class CondensingReport:
    """What was written; ``str()`` is a table.

    Attributes:
        path: The file.
        bytes: Its size.
        rows: Its layers, in the order of the graph.
        library_error: The largest difference from the source, over the largest output, with the operator library; None
            where that was not checked.
        fallback_error: The same without it.
        allowed_error: What was allowed: 1e-4, or 0.02 where numbers are rounded to eight bits behind a condensed layer.
    """

    path: Path
    bytes: int
    rows: tuple[CondensingRow, ...]
    library_error: float | None
    fallback_error: float | None
    allowed_error: float

    @property
    def condensed_layers(self) -> int:
        """How many nodes are condensed."""
        return sum(row.condensed for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts."""
        rows = [{**asdict(row), "form": row.form} for row in self.rows]
        return {**asdict(self), "path": str(self.path), "rows": rows, "condensed_layers": self.condensed_layers}

    def __str__(self) -> str:
        headers = ("weight", "operator", "shape", "zeros", "form", "why")
        cells = [
            (
                row.name,
                row.operator,
                "x".join(map(str, row.shape)),
                f"{row.sparsity:.1%}",
                row.form,
                row.reason,
            )
            for row in self.rows
        ]
        errors = {"the operator library": self.library_error, "the fallback": self.fallback_error}
        checked = ", ".join(f"{error:.1e} with {host}" for host, error in errors.items() if error is not None)
        return "\n".join(
            (
                format_table(headers, cells, right=(3,)),
                f"{self.condensed_layers} of {len(self.rows)} layers condensed; {self.path} takes "
                f"{format_bytes(self.bytes)}; largest relative difference "
                + (f"{checked}, allowed {self.allowed_error:.0e}" if checked else "not checked"),
            )
        )
