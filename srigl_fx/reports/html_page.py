"""Reports as one self-contained HTML page: no script, style, font or picture from elsewhere.

Owns the page: its templates, figures and units. It must not know how a report came about: it reads the plain data of a
report's ``as_dict()``. Every name and reason is untrusted text, so the templates escape all values, and the page's
content security policy runs nothing but the one script whose hash it names.
"""

import base64
import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from srigl_fx.files import replacing
from srigl_fx.reports.html_figures import landscape, latency, removal
from srigl_fx.reports.removal import why_kept
from srigl_fx.reports.text_tables import format_bytes, format_seconds

if TYPE_CHECKING:
    import jinja2

Plain = Mapping[str, Any]

_SHOWN, _DRAWN = 12, 200  # of the weights that lost channels: figures open at once, and in all; the rest is a table
_WORK = ("channels", "parameters", "flops")


def summary_page(plain: Plain, title: str = "Sparsity report") -> str:
    """The page of a :func:`srigl_fx.summary`.

    Args:
        plain: The summary's ``as_dict()``.
        title: The page's heading.

    Example:
        >>> import torch, srigl_fx as sx
        >>> report = sx.summary(sx.sparsify(torch.nn.Linear(64, 32)))
        >>> "<h1>Sparsity report</h1>" in summary_page(report.as_dict())
        True
    """
    rows = [
        dict(row, bytes_before=None, place=" ".join(row["nodes"]), contracts=is_contraction(row["reason"]))
        for row in plain["rows"]
    ]
    return _render("summary.html", title=title, report=plain, rows=rows, place="node", landscape=landscape(rows))


def lowering_page(plain: Plain, title: str = "Lowering report") -> str:
    """The page of the report of :func:`srigl_fx.lower`.

    Args:
        plain: The report's ``as_dict()``.
        title: The page's heading.

    Example:
        >>> import torch, srigl_fx as sx
        >>> model = sx.sparsify(torch.nn.Linear(64, 32)).eval()
        >>> report = sx.lower(model, (torch.ones(1, 64),), min_speedup=0).report
        >>> "condensed" in lowering_page(report.as_dict())
        True
    """
    rows = [_lowered_row(layer) for layer in (*plain["layers"], *plain["others"])]
    measured = [(layer, latency(layer)) for layer in plain["layers"] if layer["seconds"]]
    weights = [weight for removals in plain["removals"] for weight in removals["weights"]]
    gone = sorted((one for removals in plain["removals"] for one in _removed(removals)), key=lambda one: -one[2])
    figures = [removal(weight, readers) for weight, readers, _ in gone[:_DRAWN]]
    in_parts = any(layer["region"] for layer in plain["layers"])
    stay = [
        (weight["fqn"], count, why_kept(why, in_parts=in_parts))
        for weight in weights
        for why, count in weight["kept"].items()
    ]
    return _render(
        "lowering.html",
        title=title,
        report=plain,
        rows=rows,
        place="region",
        landscape=landscape(rows),
        decisions={form: sum(row["status"] == form for row in rows) for form in ("condensed", "shrunk", "dense")},
        rounded=[layer for layer in plain["layers"] if layer["snr"] is not None],
        measured=measured,
        form_sets={figure["forms"] for _, each in measured for figure in each.values()},
        totals=_latency_totals(plain["layers"]),
        removed=figures[:_SHOWN],
        more_removed=figures[_SHOWN:],
        undrawn=gone[_DRAWN:],
        work={name: _sums(removals[name] for removals in plain["removals"]) for name in _WORK},
        stay=sorted(stay, key=lambda item: -item[1]),
        attempts=plain["capture_failures"],
        notes=notes_by_pass(plain),
    )


def is_contraction(reason: str) -> bool:
    """Whether a weight has neurons and a fan-in, by the reason why it is dense.

    Example:
        >>> is_contraction(""), is_contraction("not a contraction weight: it only meets other operations")
        (True, False)
    """
    return "not a contraction weight" not in reason


def format_neurons(kept: int, active: int, neurons: int, total: int, reason: str) -> tuple[str, str]:
    """Fan-in, the mean where neurons differ, and active neurons, as tables have them.

    Args:
        kept: Weights kept.
        active: Neurons with at least one weight.
        neurons: All neurons.
        total: Weights of the dense form.
        reason: Why the weight is dense.

    Example:
        >>> format_neurons(18, 3, 4, 32, ""), format_neurons(32, 4, 4, 32, "")
        (('6/8', '3/4'), ('8', '4/4'))
    """
    if not is_contraction(reason):
        return "-", "-"
    dense = total // max(neurons, 1)
    fan_in = str(dense) if kept == total else f"{round(kept / max(active, 1), 2):g}/{dense}"
    return fan_in, f"{active}/{neurons}"


def save_page(path: str | os.PathLike[str], page: str) -> None:
    """Write a page as UTF-8; the file appears whole or not at all.

    Raises:
        OSError: The file cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_page(f"{folder}/report.html", "<!doctype html>")
    """
    with replacing(path) as part:
        part.write_bytes(page.encode())


def _lowered_row(layer: Plain) -> dict[str, Any]:
    total = math.prod(layer["shape"])
    return {
        "name": layer["fqn"],
        "shape": layer["shape"],
        "fan_in": round(layer["kept"] / max(layer["active"], 1), 2),
        "dense_fan_in": total // max(layer["neurons"], 1),
        "active_neurons": layer["active"],
        "neurons": layer["neurons"],
        "kept": layer["kept"],
        "sparsity": 1 - layer["kept"] / max(total, 1),
        "status": layer["decision"],
        "reason": layer["reason"],
        "bytes": layer["bytes_after"],
        "bytes_before": layer["bytes_before"],
        "place": layer["region"],
        "contracts": is_contraction(layer["reason"]),
    }


def _removed(removals: Plain) -> Iterator[tuple[Plain, list[tuple[Plain, list[str]]], int]]:
    """The weights that lost rows, each with its readers and the operators on the way, and how many rows it lost."""
    weights = removals["weights"]
    readers: dict[int, list[tuple[Plain, list[str]]]] = {}
    for link in removals["links"]:
        readers.setdefault(link["producer"], []).append((weights[link["reader"]], link["through"]))
    for position, weight in enumerate(weights):
        if weight["rows_removed"]:
            yield weight, readers.get(position, []), weight["rows_removed"]


def _sums(pairs: Iterable[Sequence[int]]) -> list[int]:
    return [sum(column) for column in zip(*pairs, strict=True)] or [0, 0]


def _latency_totals(layers: Iterable[Plain]) -> dict[str, dict[str, float]]:
    """Seconds of all measured layers together, by batch size: all dense, and each as decided."""
    totals: dict[str, dict[str, float]] = {}
    for layer in layers:
        for batch, seconds in layer["seconds"].items():
            total = totals.setdefault(str(batch), {"dense": 0.0, "lowered": 0.0})
            total["dense"] += seconds["dense"]
            total["lowered"] += seconds.get(layer["decision"], seconds["dense"])
    return totals


def notes_by_pass(plain: Plain) -> dict[str, list[Plain]]:
    """The notes of each pass in a lowering report's ``as_dict()``, passes that were undone first.

    Those that the tables of layers and of removed channels tell already are left out.

    Example:
        >>> notes = [{"where": "fc", "reason": why, "by": "Select", "undone": False} for why in ("slow", "big")]
        >>> layers = [{"fqn": "fc", "reason": "slow"}]
        >>> [note["reason"] for note in notes_by_pass(
        ...     {"notes": notes, "layers": layers, "others": [], "removals": []})["Select"]]
        ['big']
    """
    told = {(layer["fqn"], layer["reason"]) for layer in (*plain["layers"], *plain["others"])}
    weights = [weight for removals in plain["removals"] for weight in removals["weights"]]
    tabled = {weight["fqn"] for weight in weights if weight["kept"]}
    grouped: dict[str, list[Plain]] = {}
    for note in sorted(plain["notes"], key=lambda note: not note.get("undone", False)):
        in_table = note["where"] in tabled and "rows stay in" in note["reason"]
        if (note["where"], note["reason"]) not in told and not in_table:
            grouped.setdefault(note["by"], []).append(note)
    return grouped


def _template_source(name: str) -> str:
    return resources.files("srigl_fx").joinpath("templates", name).read_text(encoding="utf-8")


@cache
def _environment() -> "jinja2.Environment":
    import jinja2  # comes with torch, as does markupsafe; needed by nothing else here
    import markupsafe

    environment = jinja2.Environment(
        autoescape=True,
        loader=jinja2.FunctionLoader(_template_source),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = _template_source("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment.globals.update(script=script, style=_template_source("report.css"), script_hash=f"sha256-{digest}")
    environment.filters.update(
        size=format_bytes,
        seconds=format_seconds,
        dotted=lambda name: markupsafe.Markup(".<wbr>").join(name.split(".")),
    )
    return environment


def _render(template: str, **values: Any) -> str:
    return _environment().get_template(template).render(values)
