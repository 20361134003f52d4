"""The figures: score and active neurons against sparsity, and the widths that layers learned.

Owns the drawing; it must not know where the numbers come from. Times and random ids are left out of the files, so that
equal results give equal files.
"""

import json
import statistics
from pathlib import Path
from typing import Any

from claims.analysis import Estimate, Results
from claims.runs import METHODS, TASKS

COLOURS = {
    "static": "0.6",
    "set": "tab:olive",
    "rigl": "tab:blue",
    "srigl_no_ablation": "tab:orange",
    "srigl": "tab:red",
    "srigl_other_gamma": "tab:pink",
}


def draw(results: Results, folder: Path) -> None:
    """Write ``score.svg``, ``active_neurons.svg`` and ``widths.svg``."""
    folder.mkdir(parents=True, exist_ok=True)
    _against_sparsity(results, "score", folder / "score.svg")
    _against_sparsity(results, "active_share", folder / "active_neurons.svg")
    _widths(results, folder / "widths.svg")


def _against_sparsity(results: Results, column: str, path: Path) -> None:
    """One panel a task; each method slightly beside the others, so that the error bars can be told apart."""
    figure, panels = row_of_panels(height=4.0)
    scale = 100 if column == "active_share" else 1
    for panel, (name, task) in zip(panels, TASKS.items(), strict=True):
        places = dict(zip(task.sparsities, range(len(task.sparsities)), strict=True))
        dense = results.estimate(name, ("dense", 0.0), column)
        if column == "score" and dense:
            panel.axhline(dense.mean, color="black", linewidth=1, linestyle="--", label="dense")
        for position, (method, colour) in enumerate(COLOURS.items()):
            offset = 0.06 * (position - (len(COLOURS) - 1) / 2)
            found: list[tuple[int, Estimate]] = []
            for sparsity, place in places.items():
                estimate = results.estimate(name, (method, sparsity), column)
                if estimate:
                    found.append((place, estimate))
            if found:
                panel.errorbar(
                    [place + offset for place, _ in found],
                    [scale * estimate.mean for _, estimate in found],
                    yerr=[0 if estimate.count == 1 else scale * estimate.half_width for _, estimate in found],
                    color=colour,
                    marker="o",
                    markersize=3,
                    linewidth=1.2,
                    capsize=2,
                    label=METHODS[method].title,
                )
        panel.set_xticks(list(places.values()), [f"{sparsity:.0%}" for sparsity in places])
        panel.set(title=task.title, xlabel="sparsity", ylabel="active neurons (%)" if scale == 100 else task.unit)
    legend(panels)
    save(figure, path)


def _widths(results: Results, path: Path) -> None:
    """The share of active neurons that SRigL leaves each layer, mean over the seeds; one line a sparsity."""
    figure, panels = row_of_panels(height=4.6)
    for panel, (name, task) in zip(panels, TASKS.items(), strict=True):
        names: list[str] = []
        for order, sparsity in enumerate(task.sparsities):
            shares: dict[str, list[float]] = {}
            for row in results.rows(name, ("srigl", sparsity)).values():
                for layer, (active, neurons, *_) in json.loads(row.values["layers"]).items():
                    shares.setdefault(_short(layer), []).append(100 * active / neurons)
            names += [layer for layer in shares if layer not in names]
            places = [names.index(layer) for layer in shares]
            means = [statistics.fmean(values) for values in shares.values()]
            shade = (order + 1) / len(task.sparsities)
            panel.plot(
                places,
                means,
                marker="o",
                markersize=4,
                linestyle="",
                color=(0.85, 0.1, 0.1, shade),
                label=f"{sparsity:.0%}",
            )
        panel.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        panel.set(title=task.title, ylabel="active neurons (%)", ylim=(0, 105))
    legend(panels, title="sparsity", title_fontsize=7)
    save(figure, path)


def _short(layer: str) -> str:
    return layer.removesuffix(".weight").removesuffix("_weight").replace("blocks.", "").replace("attention.", "")


def row_of_panels(height: float) -> tuple[Any, Any]:
    """A figure, and its panels: one a task."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.subplots(1, len(TASKS))


def legend(panels: Any, **options: Any) -> None:
    """A legend in the first panel that shows something."""
    filled = [panel for panel in panels if panel.get_legend_handles_labels()[0]]
    if filled:
        filled[0].legend(fontsize=7, loc="lower left", **options)


def save(figure: Any, path: Path) -> None:
    """Write a figure so that equal ones are equal files."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": path.name}):
        figure.savefig(path, metadata={"Date": None})
