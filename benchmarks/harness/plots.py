"""Records as plots: speed-up over dense against sparsity, one line for each batch size, the bars as marks.

Owns the drawing. It must not know how the figures were measured.
"""

from collections.abc import Sequence
from pathlib import Path

from harness.bars import LINEAR_BARS, ratio
from harness.cells import DEEPSPARSE, DENSE, OURS, Record, geometric_mean, group


def plot_linear(path: Path, records: Sequence[Record], title: str) -> None:
    """One panel a layer; solid lines are ours, dotted ones DeepSparse, crosses the bars."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    cells = group(records)
    layers = list(dict.fromkeys(key[1] for key in cells))
    batches = sorted({key[3] for key in cells})
    figure = Figure(figsize=(5 * len(layers), 4.5), layout="constrained")
    for position, layer in enumerate(layers):
        axes = figure.add_subplot(1, len(layers), position + 1)
        for index, batch in enumerate(batches):
            chosen = sorted((key[2], cell) for key, cell in cells.items() if (key[1], key[3]) == (layer, batch))
            ticks = [f"{sparsity:.0%}" for sparsity, _ in chosen]
            colour = f"C{index}"
            axes.plot(
                ticks, [ratio(cell, DENSE, OURS) for _, cell in chosen], "o-", color=colour, label=f"batch {batch}"
            )
            axes.plot(ticks, [ratio(cell, DENSE, [DEEPSPARSE]) for _, cell in chosen], ":", color=colour)
            bars = [LINEAR_BARS.get(batch, {}).get(sparsity, float("nan")) for sparsity, _ in chosen]
            axes.plot(ticks, bars, "x", color=colour, markersize=9)
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.set(title=layer, xlabel="sparsity", ylabel="times faster than the faster dense", yscale="log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}x")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.legend(fontsize=8)
    figure.suptitle(f"{title}: solid ours, dotted DeepSparse, crosses what is aimed at", fontsize=10)
    figure.savefig(path, dpi=120)


def plot_speedups(path: Path, records: Sequence[Record], title: str) -> None:
    """Bars for each layer and batch: ours and DeepSparse over the faster dense, with their geometric means."""
    from matplotlib.figure import Figure

    cells = group(records)
    labels = [f"{key[1]}, batch {key[3]}" for key in cells]
    series = {"ours": OURS, "DeepSparse": (DEEPSPARSE,)}
    figure = Figure(figsize=(8, 1.5 + 0.28 * len(labels)), layout="constrained")
    axes = figure.add_subplot()
    for index, (name, contenders) in enumerate(series.items()):
        speedups = [ratio(cell, DENSE, contenders) for cell in cells.values()]
        places = [row + 0.4 * index for row in range(len(labels))]
        axes.barh(places, speedups, 0.38, label=f"{name}, mean {geometric_mean(speedups):.1f}x")
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_yticks([row + 0.2 for row in range(len(labels))], labels, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="times faster than the faster dense", title=title)
    axes.legend()
    figure.savefig(path, dpi=120)
