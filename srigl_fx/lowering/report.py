"""What lowering did to each weight of a model, and how far the result is from the model.

Owns :class:`LoweringReport` and how it reads. It must not know how a model is lowered.
"""

import math
import os
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from srigl_fx.comparison import Limit, limit
from srigl_fx.passes.base import Note
from srigl_fx.passes.capture import Failure
from srigl_fx.passes.removal import Removals
from srigl_fx.passes.sizes import FixedSize, FreeSize
from srigl_fx.reports.html_page import format_neurons, lowering_page, notes_by_pass, save_page
from srigl_fx.reports.removal import format_removals
from srigl_fx.reports.sizes import format_sizes
from srigl_fx.reports.text_tables import format_bytes, format_table

_LISTED = ("axes", "tried", "conditions")  # of a free size, as lists in a file
_TOLD = 20  # notes of one pass that the text of a report has


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """What became of one weight.

    Attributes:
        fqn: The weight's fully-qualified name.
        shape: Its dense shape.
        neurons: Rows n of its matrix view.
        active: Rows that are not ablated.
        fan_in: Weights that each active row keeps; 0 where rows differ.
        kept: Weights kept in all.
        decision: "condensed", "shrunk" (the dense operator on active rows only) or "dense".
        reason: Why, in one sentence ("" where it is simply condensed).
        bytes_before: Bytes of the dense weight.
        bytes_after: Bytes the lowered module stores for it.
        seconds: Median seconds a call as measured, by batch size and form; empty where nothing was measured.
        estimates: The same by the cost model, whether measured or not; empty where nothing was estimated.
        value_dtype: What its values are stored in where it is condensed.
        snr: The signal-to-noise ratio in dB that its outputs have with values of int8, on the example inputs; None
            where these were not asked for. Where it is too small, ``value_dtype`` and ``reason`` say so.
        calibrated: Whether its activations are rounded with scales that calibration gave, not with those found at each
            call.
        region: The sub-modules whose graphs read it, by name, where the model is not one graph; "" where it is, or
            where none does.
    """

    fqn: str
    shape: tuple[int, ...]
    neurons: int
    active: int
    fan_in: int
    kept: int
    decision: str
    reason: str
    bytes_before: int
    bytes_after: int
    seconds: dict[int, dict[str, float]] = field(default_factory=dict)
    estimates: dict[int, dict[str, float]] = field(default_factory=dict)
    region: str = ""
    value_dtype: str = "float32"
    snr: float | None = None
    calibrated: bool = False


@dataclass(frozen=True, kw_only=True, repr=False)
class LoweringReport:
    """What was lowered, what was not, and why.

    Attributes:
        layers: One for each mask-managed weight, in the model's order.
        others: One for each weight without a mask: they stay dense, each with its reason.
        capture: How the graph was captured.
        dynamic_batch: Whether any batch size may be given.
        free_sizes: All sizes of inputs that are free, by name.
        fixed_sizes: Those that "auto" or ``Dim.AUTO`` of ``dynamic_shapes`` has not freed, and why.
        tried_sizes: Numbers for free sizes at which the model was compared, beside those of the example; with
            ``dynamic_shapes`` alone, else there is another batch size.
        max_error: The largest difference from the masked model in the verification, over the largest output; None where
            it was not verified.
        min_snr: The smallest signal-to-noise ratio in dB of an output in the verification; None where it was not
            verified, or no layer has values of int8.
        removals: What became of dead channels, for each captured graph.
        notes: What the passes did not do, and why; first of all, which of them failed and were undone.
        capture_failures: The attempts to capture the model, or a part of it, that failed.
        value_dtype: What condensed values were to be stored in: "float32", "bfloat16", "float16" or "int8", or "mixed"
            where layers have several; each layer says what became of it.
    """

    layers: tuple[LayerReport, ...]
    capture: str
    dynamic_batch: bool
    others: tuple[LayerReport, ...] = ()
    free_sizes: tuple[FreeSize, ...] = ()
    fixed_sizes: tuple[FixedSize, ...] = ()
    tried_sizes: tuple[dict[str, int], ...] = ()
    max_error: float | None = None
    removals: tuple[Removals, ...] = ()
    notes: tuple[Note, ...] = ()
    capture_failures: tuple[Failure, ...] = ()
    value_dtype: str = "float32"
    min_snr: float | None = None

    @property
    def limit(self) -> Limit:
        """What the verification lets pass, with the layers that are condensed."""
        return limit(getattr(torch, layer.value_dtype) for layer in self.layers if layer.decision == "condensed")

    @property
    def tolerance(self) -> float:
        """The largest ``max_error`` that the verification lets pass: 1e-4, or what rounding the values explains.

        With values of int8 it is infinite: the signal-to-noise ratio counts then.
        """
        return self.limit.error if self.limit.snr is None else math.inf

    @property
    def undone(self) -> tuple[Note, ...]:
        """The notes of passes that failed, so that what they did was undone: please report them with the model."""
        return tuple(note for note in self.notes if note.undone)

    @property
    def bytes_before(self) -> int:
        """Bytes of the dense weights of all layers."""
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Bytes the lowered module stores for all layers."""
        return sum(layer.bytes_after for layer in self.layers)

    @property
    def expected_speedups(self) -> dict[int, float]:
        """How many times as fast as dense the masked layers together are expected to be, by batch size.

        From the times that were measured, else from the cost model's; what is between the layers is left out. Empty
        where nothing is known.

        Example:
            >>> LoweringReport(layers=(), capture="torch.export", dynamic_batch=True).expected_speedups
            {}
        """
        known = [(layer.decision, layer.seconds or layer.estimates) for layer in self.layers]
        costed = [(decision, costs) for decision, costs in known if costs]
        batches = set.intersection(*(set(costs) for _, costs in costed)) if costed else set()
        return {
            batch: sum(costs[batch]["dense"] for _, costs in costed)
            / sum(costs[batch][decision] for decision, costs in costed)
            for batch in sorted(batches)
        }

    def as_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and strings, as JSON would hold them."""
        plain = asdict(self)
        for name in ("layers", "others"):
            plain[name] = [{**layer, "shape": list(layer["shape"])} for layer in plain[name]]
            for layer in plain[name]:
                for times in ("seconds", "estimates"):
                    layer[times] = {str(batch): forms for batch, forms in layer[times].items()}
        plain["free_sizes"] = [{**one, **{key: list(one[key]) for key in _LISTED}} for one in plain["free_sizes"]]
        plain["fixed_sizes"], plain["tried_sizes"] = list(plain["fixed_sizes"]), list(plain["tried_sizes"])
        plain["removals"] = [removal.as_dict() for removal in self.removals]
        plain["notes"] = [asdict(note) for note in self.notes]
        plain["capture_failures"] = [asdict(failure) for failure in self.capture_failures]
        return {**plain, "bytes_before": self.bytes_before, "bytes_after": self.bytes_after}

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> "LoweringReport":
        """The inverse of :meth:`as_dict`.

        Example:
            >>> report = LoweringReport(layers=(), capture="torch.export", dynamic_batch=True)
            >>> LoweringReport.from_dict(report.as_dict()) == report
            True
        """

        def read(layer: dict[str, Any]) -> LayerReport:
            times = {
                name: {int(batch): dict(forms) for batch, forms in layer.get(name, {}).items()}
                for name in ("seconds", "estimates")
            }
            # Files from before layers had dtypes of their own have one for all.
            dtype = layer.get("value_dtype", plain.get("value_dtype", "float32"))
            return LayerReport(**{**layer, "shape": tuple(layer["shape"]), "value_dtype": dtype, **times})

        fields = {key: value for key, value in plain.items() if key not in ("bytes_before", "bytes_after")}
        fields |= {name: tuple(map(read, plain[name])) for name in ("layers", "others")}
        fields["free_sizes"] = tuple(
            FreeSize(**{**one, **{key: tuple(one.get(key, ())) for key in _LISTED}})
            for one in plain.get("free_sizes", ())
        )
        fields["fixed_sizes"] = tuple(FixedSize(**one) for one in plain.get("fixed_sizes", ()))
        fields["tried_sizes"] = tuple(dict(one) for one in plain.get("tried_sizes", ()))
        fields["removals"] = tuple(map(Removals.from_dict, plain.get("removals", ())))
        fields["notes"] = tuple(Note(**note) for note in plain.get("notes", ()))
        fields["capture_failures"] = tuple(Failure(**failure) for failure in plain.get("capture_failures", ()))
        return cls(**fields)

    def to_html(self, title: str = "Lowering report") -> str:
        """The report as one self-contained HTML page.

        Example:
            >>> report = LoweringReport(layers=(), capture="torch.export", dynamic_batch=True)
            >>> report.to_html("My model").splitlines()[0]
            '<!doctype html>'
        """
        return lowering_page(self.as_dict(), title)

    def save_html(self, path: str | os.PathLike[str], title: str = "Lowering report") -> None:
        """Write :meth:`to_html` to a file, which appears whole or not at all.

        Raises:
            OSError: The file cannot be written.

        Example:
            >>> import tempfile
            >>> report = LoweringReport(layers=(), capture="torch.export", dynamic_batch=True)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     report.save_html(f"{folder}/report.html")
        """
        save_page(path, self.to_html(title))

    def __str__(self) -> str:
        in_parts = any(layer.region for layer in self.layers)
        with_values = self.value_dtype in ("int8", "mixed")
        headers = (
            *("weight", "shape", "fan-in", "active", "decision", "bytes", "lowered"),
            *(("values", "SNR") if with_values else ()),
            "reason",
            *(("region",) if in_parts else ()),
        )
        rows: list[tuple[object, ...]] = [
            (
                layer.fqn,
                "x".join(map(str, layer.shape)),
                *format_neurons(layer.kept, layer.active, layer.neurons, math.prod(layer.shape), layer.reason),
                layer.decision,
                format_bytes(layer.bytes_before),
                format_bytes(layer.bytes_after),
                *(_values_of(layer) if with_values else ()),
                layer.reason,
                *([layer.region] if in_parts else []),
            )
            for layer in (*self.layers, *self.others)
        ]
        total = f"{format_bytes(self.bytes_before)} -> {format_bytes(self.bytes_after)}"
        table = format_table(headers, rows, right=(2, 3, 5, 6, *((8,) if with_values else ())))
        stored = "" if self.value_dtype == "float32" else f"; values in {self.value_dtype}"
        table += f"\n{total}{stored}; {self.capture}; {self._verified}{format_speedups(self.expected_speedups)}"
        first = {failure.name: failure for failure in reversed(self.capture_failures)}
        failures = "\n".join(f"not captured ({one.attempt}): {one}" for one in reversed(first.values()))
        removals = format_removals(self.removals, in_parts=in_parts)
        sizes = format_sizes(self.free_sizes, self.fixed_sizes) if self.tried_sizes or self.fixed_sizes else ""
        return "\n\n".join(filter(None, (table, sizes, failures, removals, self._format_notes())))

    def _format_notes(self) -> str:
        """What the tables do not tell, a line for each note."""
        lines = []
        for by, notes in notes_by_pass(self.as_dict()).items():
            lines += [f"{by}: {note['where']}: {note['reason']}" for note in notes[:_TOLD]]
            if len(notes) > _TOLD:
                lines.append(f"{by}: {len(notes) - _TOLD} more in .notes")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.outline})"

    @property
    def outline(self) -> str:
        """Layers, memory and error in one line.

        Example:
            >>> LoweringReport(layers=(), capture="torch.export", dynamic_batch=True).outline
            '0 of 0 masked weights condensed, 0 B -> 0 B, not verified'
        """
        condensed = sum(layer.decision == "condensed" for layer in self.layers)
        size = f"{format_bytes(self.bytes_before)} -> {format_bytes(self.bytes_after)}"
        return f"{condensed} of {len(self.layers)} masked weights condensed, {size}, {self._verified}"

    @property
    def _verified(self) -> str:
        if self.max_error is None:
            return "not verified"
        snr = "" if self.min_snr is None else f", smallest signal-to-noise ratio {self.min_snr:.1f} dB"
        return f"largest relative error {self.max_error:.1e}{snr}"


def _values_of(layer: LayerReport) -> tuple[str, str]:
    """What a layer's values are stored in, and its signal-to-noise ratio, as the table has them."""
    return (
        f"{layer.value_dtype}{', calibrated' if layer.calibrated else ''}" if layer.decision == "condensed" else "",
        "" if layer.snr is None else f"{layer.snr:.1f} dB",
    )


def format_speedups(expected: dict[int, float]) -> str:
    """Expected speedups as the end of a line; "" where none is known.

    Example:
        >>> format_speedups({1: 2.96, 16: 2.5})
        '; masked layers together expected 3.0 times as fast as dense at batch 1, 2.5 at 16'
    """
    said = [
        f"{ratio:.1f} times as fast as dense at batch {batch}" if i == 0 else f"{ratio:.1f} at {batch}"
        for i, (batch, ratio) in enumerate(expected.items())
    ]
    return f"; masked layers together expected {', '.join(said)}" if said else ""
