"""What became of each weight: the report behind ``summary``.

Owns the report's rows and totals; it must not know how the decisions were taken.
"""

import math
import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from srigl_fx.errors import SriglError
from srigl_fx.masks.invariants import check_sound
from srigl_fx.masks.records import MASK_SUFFIX, WeightRecord, all_records
from srigl_fx.reports.html_page import format_neurons, save_page, summary_page
from srigl_fx.reports.text_tables import format_bytes, format_table

if TYPE_CHECKING:
    from srigl_fx.lowering.lowered import LayerReport


@dataclass(frozen=True, kw_only=True)
class WeightSummary:
    """One weight.

    Attributes:
        name: Its fully-qualified name.
        shape: Its dense shape.
        fan_in: Weights kept per active neuron; the mean where neurons differ; the dense fan-in where it is dense.
        dense_fan_in: Inputs per neuron.
        active_neurons: Neurons with at least one weight.
        neurons: All neurons.
        kept: Weights kept.
        sparsity: Fraction removed.
        status: ``"masked (dense compute)"``, ``"dense"`` or, in a lowered model, ``"condensed"`` or
            ``"active rows (dense compute)"``.
        reason: Why it is dense.
        bytes: What it takes in memory now.
        nodes: The graph nodes that use it, where the model is a GraphModule.
    """

    name: str
    shape: tuple[int, ...]
    fan_in: float
    dense_fan_in: int
    active_neurons: int
    neurons: int
    kept: int
    sparsity: float
    status: str
    reason: str
    bytes: int
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Summary:
    """The weights of a model, in registration order; ``str()`` is a table.

    Attributes:
        rows: One for each weight of two or more dimensions.
    """

    rows: tuple[WeightSummary, ...]

    @property
    def kept(self) -> int:
        """Weights kept, dense ones included."""
        return sum(row.kept for row in self.rows)

    @property
    def total(self) -> int:
        """Weights of the dense model."""
        return sum(row.neurons * row.dense_fan_in for row in self.rows)

    @property
    def sparsity(self) -> float:
        """Fraction of all weights removed."""
        return 1 - self.kept / self.total if self.total else 0.0

    @property
    def masked_sparsity(self) -> float:
        """Fraction removed over the sparse weights alone."""
        sparse = [row for row in self.rows if row.status != "dense"]
        total = sum(row.neurons * row.dense_fan_in for row in sparse)
        return 1 - sum(row.kept for row in sparse) / total if total else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Rows and totals as plain data."""
        return {
            "rows": [asdict(row) for row in self.rows],
            "kept": self.kept,
            "total": self.total,
            "sparsity": self.sparsity,
            "masked_sparsity": self.masked_sparsity,
        }

    def to_html(self, title: str = "Sparsity report") -> str:
        """The report as one self-contained HTML page.

        Example:
            >>> Summary(()).to_html("My model").splitlines()[0]
            '<!doctype html>'
        """
        return summary_page(self.as_dict(), title)

    def save_html(self, path: str | os.PathLike[str], title: str = "Sparsity report") -> None:
        """Write :meth:`to_html` to a file, which appears whole or not at all.

        Raises:
            OSError: The file cannot be written.

        Example:
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     Summary(()).save_html(f"{folder}/report.html")
        """
        save_page(path, self.to_html(title))

    def __str__(self) -> str:
        with_nodes = any(row.nodes for row in self.rows)
        headers = ["weight", "shape", "fan-in", "active", "sparsity", "status", "bytes"]
        headers += (["node"] if with_nodes else []) + ["why dense"]
        cells = []
        for row in self.rows:
            line: list[object] = [
                row.name,
                "x".join(map(str, row.shape)),
                *format_neurons(row.kept, row.active_neurons, row.neurons, math.prod(row.shape), row.reason),
                f"{row.sparsity:.2%}",
                row.status,
                format_bytes(row.bytes),
            ]
            cells.append(line + ([" ".join(row.nodes)] if with_nodes else []) + [row.reason])
        sparse_rows = sum(row.status != "dense" for row in self.rows)
        footer = (
            f"{self.kept:,} of {self.total:,} weights kept ({self.sparsity:.2%} sparse; {self.masked_sparsity:.2%} "
            f"over the {sparse_rows} sparse of {len(self.rows)} weights)"
        )
        return format_table(headers, cells, right=(2, 3, 4, 6)) + "\n" + footer


def summary(model: nn.Module) -> Summary:
    """Say what became of each weight of a sparsified, trained or lowered model.

    Args:
        model: A model after :func:`srigl_fx.sparsify`, whatever wraps it, or the result of :func:`srigl_fx.lower`.

    Returns:
        A report: ``str()`` is a table, ``.rows`` and ``.as_dict()`` the data.

    Raises:
        SriglError: If nothing in ``model`` was sparsified.
        InvariantError: The model is not what its masks say, as :func:`srigl_fx.verify` finds: numbers would be wrong.

    Example:
        >>> import torch, srigl_fx as sx
        >>> model = sx.sparsify(torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 4)), rules={"1": None})
        >>> print(sx.summary(model))
        weight    shape  fan-in  active  sparsity  status                      bytes  why dense
        --------  -----  ------  ------  --------  ----------------------  ---------  ----------------------------
        0.weight  32x64    6/64   32/32    90.62%  masked (dense compute)  10.00 KiB
        1.weight  4x32       32     4/4     0.00%  dense                       512 B  the rule '1' leaves it dense
        320 of 2,176 weights kept (85.29% sparse; 90.62% over the 1 sparse of 2 weights)
    """
    report = getattr(model, "report", None)
    if report is not None:
        from srigl_fx.lowering.lowered import (
            LoweringReport,  # imported only where it may be one: it loads the operators
        )

        if isinstance(report, LoweringReport):
            return Summary(tuple(_lowered_row(layer) for layer in (*report.layers, *report.others)))
    check_sound(model)
    rows = [_row(fqn, owner, record) for fqn, owner, record in all_records(model)]
    if not rows:
        raise SriglError(f"nothing in this {type(model).__name__} was sparsified; call srigl_fx.sparsify(model) first")
    return Summary(tuple(rows))


def _lowered_row(layer: "LayerReport") -> WeightSummary:
    total = math.prod(layer.shape)
    return WeightSummary(
        name=layer.fqn,
        shape=layer.shape,
        fan_in=round(layer.kept / max(layer.active, 1), 2),
        dense_fan_in=total // max(layer.neurons, 1),
        active_neurons=layer.active,
        neurons=layer.neurons,
        kept=layer.kept,
        sparsity=1 - layer.kept / max(total, 1),
        status={"condensed": "condensed", "shrunk": "active rows (dense compute)"}.get(layer.decision, "dense"),
        reason=layer.reason,
        bytes=layer.bytes_after,
    )


def _row(fqn: str, owner: nn.Module, record: WeightRecord) -> WeightSummary:
    site = record.site
    weight = getattr(owner, site.attr)
    neurons, dense_fan_in = site.matrix_shape
    size = weight.numel() * weight.element_size()
    active, kept = neurons, weight.numel()
    if record.sparse:
        mask = getattr(owner, site.attr + MASK_SUFFIX)
        counts = site.to_matrix(mask).sum(1)
        active, kept = int((counts > 0).sum()), int(counts.sum())
        size += mask.numel() * mask.element_size()
    return WeightSummary(
        name=fqn,
        shape=tuple(weight.shape),
        fan_in=round(kept / active, 2) if active else 0.0,
        dense_fan_in=dense_fan_in,
        active_neurons=active,
        neurons=neurons,
        kept=kept,
        sparsity=1 - kept / max(weight.numel(), 1),
        status="masked (dense compute)" if record.sparse else "dense",
        reason=record.reason,
        bytes=size,
        nodes=site.nodes,
    )
