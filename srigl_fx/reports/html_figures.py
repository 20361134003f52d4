"""The geometry of the figures on a report's page: numbers in, coordinates out.

Owns where things are drawn. It must not know HTML: the templates turn coordinates into SVG.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from srigl_fx.reports.removal import describe_folds
from srigl_fx.reports.text_tables import format_seconds

Plain = Mapping[str, Any]

WIDTH = 1000  # of the landscape, in its own units
_FULL, _GAP, _TOP = 48, 24, 20  # a bar of all channels, between bars, above the first: pixels of a removal figure
_LEFT, _RIGHT, _BAR = 330, 600, 10  # where producer and consumers stand, and how wide their bars are
_NAME, _THROUGH = 44, 42  # characters that fit beside a bar, and above it
_READERS = 6  # drawn for one weight; the caption counts the others


def landscape(rows: Iterable[Plain]) -> list[dict[str, Any]]:
    """One column a weight: as wide as it has weights when dense, as high as the fraction that is left.

    The area that is filled is what is left of the model. A dense form has all weights, whatever its mask keeps.

    Example:
        >>> row = {"name": "fc", "neurons": 8, "dense_fan_in": 4, "kept": 16, "status": "condensed"}
        >>> landscape([row, {**row, "name": "head", "kept": 32, "status": "dense"}])[1]["x"]
        500.0
    """
    rows = list(rows)
    sizes = [row["neurons"] * row["dense_fan_in"] for row in rows]
    scale = WIDTH / max(sum(sizes), 1)
    columns, x = [], 0.0
    for row, size in zip(rows, sizes, strict=True):
        left = row["kept"]
        if row["status"] == "dense":
            left = size
        elif row["status"] in ("shrunk", "active rows (dense compute)"):
            left = row["active_neurons"] * row["dense_fan_in"]
        width, height = size * scale, 100 * left / max(size, 1)
        told = f"{row['name']}: {row['kept']:,} of {size:,} weights kept"
        columns.append(
            {
                "x": round(x, 2),
                "width": round(width, 2),
                "y": round(100 - height, 1),
                "height": round(height, 1),
                "dense": row["status"] == "dense",
                "label": told if left == row["kept"] else f"{told}, {left:,} stored",
            }
        )
        x += width
    return columns


def latency(layer: Plain) -> dict[str, dict[str, Any]]:
    """For each batch size one bar a form, as long, in percent, as its time against the slowest form's.

    Example:
        >>> layer = {"decision": "condensed", "seconds": {"1": {"dense": 3e-4, "condensed": 1e-4}}}
        >>> figure = latency(layer)["1"]
        >>> [(bar["share"], bar["chosen"]) for bar in figure["bars"]], figure["label"], figure["speedup"]
        ([(100, False), (33, True)], 'dense 300 µs, condensed 100 µs', 3.0)
    """
    figures = {}
    for batch, seconds in layer["seconds"].items():
        slowest = max(seconds.values()) or 1.0
        bars = [
            {
                "y": 18 * position + 3,
                "share": round(100 * time / slowest),
                "time": format_seconds(time),
                "chosen": form == layer["decision"],
            }
            for position, (form, time) in enumerate(seconds.items())
        ]
        figures[batch] = {
            "bars": bars,
            "forms": tuple(seconds),
            "label": ", ".join(f"{form} {bar['time']}" for form, bar in zip(seconds, bars, strict=True)),
            "speedup": round(seconds["dense"] / seconds.get(layer["decision"], seconds["dense"]), 2),
        }
    return figures


def removal(weight: Plain, readers: Sequence[tuple[Plain, Sequence[str]]]) -> dict[str, Any]:
    """A weight that lost rows, the weights that read them, and two ribbons to each: what stays, and what is gone.

    A bar stands for the layer before removal, its filled part for the layer after.

    Args:
        weight: Its removal, as plain data.
        readers: The removals of its readers, each with the operators between.

    Example:
        >>> fc1 = {"fqn": "fc1.weight", "rows": 8, "rows_removed": 4}
        >>> fc2 = {"fqn": "fc2.weight", "columns": 8, "columns_removed": 4, "folded": {"bias": 4}}
        >>> figure = removal(fc1, [(fc2, ["relu"])])
        >>> figure["producer"]["kept"], figure["readers"][0]["label"]
        (24, '8 → 4 inputs: 4 folded into the bias')
    """
    shown = readers[:_READERS]
    middle = _TOP + (max(len(shown), 1) - 1) * (_FULL + _GAP) // 2
    producer = _bar(weight["fqn"], weight["rows"], weight["rows_removed"], (_LEFT, middle))
    producer["label"] += " channels"
    bars = []
    for position, (reader, through) in enumerate(shown):
        at = (_RIGHT, _TOP + position * (_FULL + _GAP))
        bar = _bar(reader["fqn"], reader["columns"], reader["columns_removed"], at)
        bar["label"] += ": ".join([" inputs", *filter(None, [describe_folds(reader["folded"])])])
        bar["through"] = _shorten(" → ".join(through), _THROUGH, tail=False)
        bar["stays"] = _ribbon(producer, bar, (0, producer["kept"]), (0, bar["kept"]))
        bar["gone"] = _ribbon(producer, bar, (producer["kept"], _FULL), (bar["kept"], _FULL))
        bars.append(bar)
    return {
        "label": f"{weight['fqn']}: {producer['label']}",
        "producer": producer,
        "readers": bars,
        "more": len(readers) - len(shown),
        "height": _TOP + max(len(shown), 1) * (_FULL + _GAP) - _GAP + 6,
    }


def _bar(name: str, before: int, removed: int, at: tuple[int, int]) -> dict[str, Any]:
    return {
        "name": _shorten(name, _NAME),
        "full_name": name,
        "label": f"{before:,} → {before - removed:,}",
        "x": at[0],
        "y": at[1],
        "kept": max(round(_FULL * (before - removed) / max(before, 1)), 1),
    }


def _ribbon(source: Plain, sink: Plain, leaves: tuple[int, int], arrives: tuple[int, int]) -> str:
    """The path of a ribbon between two bars; spans are (top, bottom) distances from the bars' upper ends."""
    x0, x1 = source["x"] + _BAR, sink["x"]
    mid = (x0 + x1) // 2
    (top0, bottom0), (top1, bottom1) = (
        [bar["y"] + edge for edge in span] for bar, span in ((source, leaves), (sink, arrives))
    )
    return (
        f"M{x0} {top0}C{mid} {top0} {mid} {top1} {x1} {top1}V{bottom1}C{mid} {bottom1} {mid} {bottom0} {x0} {bottom0}Z"
    )


def _shorten(text: str, length: int, *, tail: bool = True) -> str:
    """At most ``length`` characters; of names the end tells more, of sequences the beginning."""
    if len(text) <= length:
        return text
    return "…" + text[1 - length :] if tail else text[: length - 1] + "…"
