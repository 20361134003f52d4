"""The demonstration's figure: fan-in and active neurons of each layer over training.

Owns the drawing; it must not know where the numbers come from.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from srigl_fx.demo.train import Run, Snapshot


def draw_topology(runs: Sequence[Run], path: Path) -> None:
    """One row of panels for each run: on the left the fan-in by layer, on the right the share of active neurons."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.4 * len(runs)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(runs), 2, squeeze=False)
    for (left, right), run in zip(panels, runs, strict=True):
        layers: dict[str, list[Snapshot]] = defaultdict(list)
        for snapshot in run.history:
            layers[snapshot.layer].append(snapshot)
        for layer, taken in layers.items():
            steps = [snapshot.step for snapshot in taken]
            left.plot(steps, [snapshot.fan_in for snapshot in taken], label=layer)
            right.plot(steps, [100 * snapshot.active / snapshot.neurons for snapshot in taken], label=layer)
        left.set(title=f"{run.task.name}, {run.title}: fan-in", ylabel="weights per active neuron")
        left.set_ylim(bottom=0)
        right.set(title=f"{run.task.name}, {run.title}: active neurons", ylabel="% of the layer", ylim=(0, 105))
        for panel in (left, right):
            panel.set_xlabel("optimizer step")
            panel.grid(alpha=0.3)
        right.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="x-small", frameon=False)
    figure.savefig(path, dpi=110)
