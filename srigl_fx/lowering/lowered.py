"""What lowering returns: a graph module that checks its inputs, knows its report and can be saved.

Owns :class:`LoweredModule` and the report. It must not know how a model is lowered.
"""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import fx
from torch.fx.graph import _PyTreeCodeGen

import srigl_fx.runtime.ops  # noqa: F401 - the operators that lowered graphs call
from srigl_fx.comparison import tolerance
from srigl_fx.files import replacing
from srigl_fx.lowering import file as graph_file
from srigl_fx.lowering.inputs import check_inputs, is_description
from srigl_fx.passes.base import Note
from srigl_fx.passes.capture import Failure
from srigl_fx.passes.example_inputs import Inputs
from srigl_fx.passes.removal import Removals
from srigl_fx.recipes import Recipe, from_plain, only, to_plain
from srigl_fx.reports.html_page import format_neurons, lowering_page, notes_by_pass, save_page
from srigl_fx.reports.removal import format_removals
from srigl_fx.reports.text_tables import format_bytes, format_table

_STATE = "srigl_fx"
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


@dataclass(frozen=True, kw_only=True, repr=False)
class LoweringReport:
    """What was lowered, what was not, and why.

    Attributes:
        layers: One for each mask-managed weight, in the model's order.
        others: One for each weight without a mask: they stay dense, each with its reason.
        capture: How the graph was captured.
        dynamic_batch: Whether any batch size may be given.
        max_error: The largest difference from the masked model in the verification, over the largest output; None where
            it was not verified.
        removals: What became of dead channels, for each captured graph.
        notes: What the passes did not do, and why; first of all, which of them failed and were undone.
        capture_failures: The attempts to capture the model, or a part of it, that failed.
        value_dtype: What condensed values are stored in: "float32", "bfloat16" or "float16".
    """

    layers: tuple[LayerReport, ...]
    capture: str
    dynamic_batch: bool
    others: tuple[LayerReport, ...] = ()
    max_error: float | None = None
    removals: tuple[Removals, ...] = ()
    notes: tuple[Note, ...] = ()
    capture_failures: tuple[Failure, ...] = ()
    value_dtype: str = "float32"

    @property
    def tolerance(self) -> float:
        """The largest ``max_error`` that the verification lets pass: 1e-4, or what rounding the values explains."""
        condensed = sum(layer.decision == "condensed" for layer in self.layers)
        return tolerance(getattr(torch, self.value_dtype), condensed)

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
            return LayerReport(**{**layer, "shape": tuple(layer["shape"]), **times})

        fields = {key: value for key, value in plain.items() if key not in ("bytes_before", "bytes_after")}
        fields |= {name: tuple(map(read, plain[name])) for name in ("layers", "others")}
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
        headers = ("weight", "shape", "fan-in", "active", "decision", "bytes", "lowered", "reason")
        rows: list[tuple[object, ...]] = [
            (
                layer.fqn,
                "x".join(map(str, layer.shape)),
                *format_neurons(layer.kept, layer.active, layer.neurons, math.prod(layer.shape), layer.reason),
                layer.decision,
                format_bytes(layer.bytes_before),
                format_bytes(layer.bytes_after),
                layer.reason,
                *([layer.region] if in_parts else []),
            )
            for layer in (*self.layers, *self.others)
        ]
        total = f"{format_bytes(self.bytes_before)} -> {format_bytes(self.bytes_after)}"
        error = "not verified" if self.max_error is None else f"largest relative error {self.max_error:.1e}"
        table = format_table((*headers, "region") if in_parts else headers, rows, right=(2, 3, 5, 6))
        stored = "" if self.value_dtype == "float32" else f"; values in {self.value_dtype}"
        table += f"\n{total}{stored}; {self.capture}; {error}{format_speedups(self.expected_speedups)}"
        first = {failure.name: failure for failure in reversed(self.capture_failures)}
        failures = "\n".join(f"not captured ({one.attempt}): {one}" for one in reversed(first.values()))
        removals = format_removals(self.removals, in_parts=in_parts)
        return "\n\n".join(filter(None, (table, failures, removals, self._format_notes())))

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
        error = "not verified" if self.max_error is None else f"largest relative error {self.max_error:.1e}"
        return f"{condensed} of {len(self.layers)} masked weights condensed, {size}, {error}"


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


class _CodeGen(_PyTreeCodeGen):
    """Never changes, so copies of a graph share it: copying the trees of inputs and outputs warns in torch itself."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "_CodeGen":
        return self


class LoweredModule(fx.GraphModule):
    """A lowered model: an ordinary ``torch.fx.GraphModule`` whose sparse layers are condensed operators.

    It keeps its class and report through ``copy.deepcopy`` and pickle, and may be called from several threads.
    """

    def __init__(
        self, root: torch.nn.Module | dict[str, Any], graph: fx.Graph, class_name: str = "LoweredModule"
    ) -> None:
        super().__init__(root, graph, class_name)
        self.register_forward_pre_hook(_check_inputs, with_kwargs=True)

    @classmethod
    def build(
        cls,
        module: fx.GraphModule,
        report: LoweringReport,
        inputs: list[dict[str, Any] | None],
        recipes: Mapping[str, Recipe] | None = None,
    ) -> "LoweredModule":
        """Wrap a lowered graph.

        Args:
            module: The graph and its tensors.
            report: What was done.
            inputs: For each flat input its "dtype" and "shape" (None for a free size; with "any_rank", only the last
                size matters), its "value" if it is a constant of the graph, or None where it may be anything. Inputs
                that have the same number as their "batch" must have the same leading size.
            recipes: Those of the model's parts; by default those that ``module`` has, where it is lowered already.
        """
        module.graph.set_codegen(_CodeGen(module.graph._codegen.pytree_info))  # type: ignore[attr-defined]
        lowered = cls(module, module.graph)
        lowered.eval()
        if recipes is None:
            recipes = module.recipes if isinstance(module, LoweredModule) else {}
        lowered.meta[_STATE] = {"report": report, "inputs": inputs, "recipes": dict(recipes)}
        return lowered

    def __repr__(self) -> str:
        return f"LoweredModule({self.report.outline})" if _STATE in self.meta else super().__repr__()

    @property
    def report(self) -> LoweringReport:
        """What was lowered, what was not, and why; ``str()`` is a table."""
        report = self.meta[_STATE]["report"]
        assert isinstance(report, LoweringReport)
        return report

    @property
    def recipe(self) -> Recipe | None:
        """The recipe of the model that was lowered; None where it had none, or parts of it have their own.

        Example:
            >>> import srigl_fx as sx
            >>> model = sx.sparsify(torch.nn.Sequential(torch.nn.Linear(16, 8)), sparsity=0.75)
            >>> sx.lower(model.eval(), (torch.ones(1, 16),), min_speedup=0).recipe == sx.recipe(model)
            True
        """
        return only(self.recipes)

    @property
    def recipes(self) -> dict[str, Recipe]:
        """The recipes of the model's parts, as :func:`srigl_fx.recipes.recipes_of` gives them."""
        recipes: dict[str, Recipe] = self.meta[_STATE].get("recipes", {})
        return recipes

    @property
    def inputs(self) -> list[dict[str, Any] | None]:
        """What the graph was captured for, by flat input: see :meth:`build`."""
        inputs: list[dict[str, Any] | None] = self.meta[_STATE]["inputs"]
        return inputs

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the module to one file: safetensors, with the graph as JSON in its header. No pickle, no code.

        The file appears whole or not at all. Output types other than tuples, lists, dicts and tensors are stored as the
        plain container they are made of. So are those of inputs: what takes and returns a ``DynamicCache`` takes and
        returns, from a file, a dict of lists, ``{"key_cache": [...], "value_cache": [...]}``.

        Raises:
            LoweringError: The graph calls something that such a file cannot hold.
        """
        with replacing(path) as part:
            part.write_bytes(self._bytes())

    def _bytes(self) -> bytes:
        extra = {"report": self.report.as_dict(), "inputs": self.meta[_STATE]["inputs"]}
        if self.recipes:
            extra["recipes"] = to_plain(self.recipes)
        return graph_file.dump(self, extra)

    @staticmethod
    def from_bytes(data: bytes, origin: str = "the data") -> "LoweredModule":
        """The module that :meth:`save` wrote.

        Raises:
            FormatError: The data is damaged, or holds anything but a lowered graph.
        """
        return graph_file.guarded(origin, lambda: _build(*graph_file.load(data)))

    def __reduce__(self) -> tuple[Any, ...]:
        return LoweredModule.from_bytes, (self._bytes(),)

    def __deepcopy__(self, memo: dict[int, Any]) -> fx.GraphModule:
        for spec in (self._in_spec, self._out_spec):
            memo[id(spec)] = spec
        return super().__deepcopy__(memo)

    def _deepcopy_init(self) -> Callable[..., None]:
        return LoweredModule.__init__


def _build(module: fx.GraphModule, extra: dict[str, Any]) -> LoweredModule:
    inputs = extra["inputs"]
    placeholders = sum(node.op == "placeholder" for node in module.graph.nodes)
    if len(inputs) != placeholders or not all(item is None or is_description(item) for item in inputs):
        raise ValueError("the inputs described are not those of the graph")
    report, recipes = LoweringReport.from_dict(extra["report"]), from_plain(extra.get("recipes"))
    return LoweredModule.build(module, report, inputs, recipes)


def _check_inputs(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs | None:
    """Refuse inputs that the captured graph was not made for; the others in the containers that it takes."""
    if torch.compiler.is_compiling():  # the compiler guards on shapes itself
        return None
    assert isinstance(module, LoweredModule)
    return check_inputs(module, module.inputs, args, kwargs)
