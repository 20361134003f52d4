"""The picture and the table of README.md and docs/index.md, from the results of peers.py that are committed.

Run ``python benchmarks/front_page.py`` (``make picture``): it measures nothing. It draws how many times as fast as the
fastest dense contender ours is, against sparsity, a line for each batch size: the worst of the layers that were
measured. So does the table, with what loses in bold. The picture holds a digest of its figures: a test sees when it
is old.
"""

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.cells import DENSE, DENSE_INT8, OURS, OURS_INT8, Record, best, group, read_csv
from harness.tables import markdown

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "index.md")
PICTURES = {"light": ROOT / "docs" / "speed" / "light.svg", "dark": ROOT / "docs" / "speed" / "dark.svg"}
BEGIN, END = "<!-- speed -->\n\n", "\n\n<!-- end speed -->"
# The batch sizes that have a line: its colour (of Okabe and Ito, told apart by all kinds of eyes) and its marks.
DRAWN = {1: "#0072B2o", 4: "#D55E00s", 16: "#009E73^", 64: "#CC79A7D", 256: "#E69F00v", 2048: "#56B4E9P"}
Speedups = Mapping[tuple[int, float], float]  # by batch and sparsity


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One picture of four: a kind of processor and of numbers."""

    numbers: str
    instructions: str
    folder: Path
    sections: tuple[str, ...]
    dense: tuple[str, ...]
    ours: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"{self.numbers}, {self.instructions}"

    @property
    def records(self) -> list[Record]:
        return [record for name in self.sections for record in read_csv(self.folder / f"peers_{name}.csv")]


def panels() -> list[Panel]:
    """Those of both instruction sets, float32 and int8."""
    made = []
    for instructions, folder in (("AVX-512", RESULTS), ("AVX2", RESULTS / "avx2")):
        for numbers, sections, dense, ours in (
            ("float32", ("linear", "small"), DENSE, OURS),
            ("int8", ("int8",), DENSE_INT8, OURS_INT8),
        ):
            made.append(
                Panel(
                    numbers=numbers,
                    instructions=instructions,
                    folder=folder,
                    sections=sections,
                    dense=dense,
                    ours=ours,
                )
            )
    return made


def worst(records: Iterable[Record], dense: Sequence[str], ours: Sequence[str]) -> dict[tuple[int, float], float]:
    """How many times as fast as the fastest dense one ours is, on one thread: the worst layer of each cell."""
    found: defaultdict[tuple[int, float], list[float]] = defaultdict(list)
    for (_, _, sparsity, batch, _), cell in group(record for record in records if record.threads == 1).items():
        speedup = best(cell, dense) / best(cell, ours)
        if not math.isnan(speedup):
            found[batch, sparsity].append(speedup)
    return {key: min(values) for key, values in sorted(found.items())}


def digest(figures: Sequence[Speedups]) -> str:
    """A few letters that change with any figure that is drawn."""
    text = json.dumps([sorted((*key, f"{value:.3f}") for key, value in one.items()) for one in figures])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def processor(panel: Panel) -> str:
    """What a panel's figures were measured on, as the page of its first part says."""
    page = (panel.folder / f"peers_{panel.sections[0]}.md").read_text(encoding="utf-8")
    name = page.split("\n\n")[2].partition(", avx2")[0]
    known = {"(family 25, model 17)": "Zen 4", "(family 25, model 1)": "Zen 3"}
    for family, core in known.items():
        name = name.replace(family, f"({core})")
    return name


def table(corner: str, names: Sequence[str], figures: Sequence[Speedups]) -> str:
    """Every batch size and sparsity of some panels; what loses in bold."""
    columns = [(index, sparsity) for index, one in enumerate(figures) for sparsity in sorted({key[1] for key in one})]
    header = [corner, *(f"{names[index]}, {sparsity:.0%}" for index, sparsity in columns)]
    rows = []
    for batch in sorted({key[0] for one in figures for key in one}):
        cells = [figures[index].get((batch, sparsity), math.nan) for index, sparsity in columns]
        rows.append([str(batch), *map(_times, cells)])
    return markdown(header, rows)


def _times(value: float) -> str:
    text = "" if math.isnan(value) else f"{value:.2f}" if value < 10 else f"{value:.1f}"
    return f"**{text}**" if value < 1 else text


def with_table(page: str, made: str) -> str:
    """The page with the table as the results are now; what stands outside of the marks stays."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError("the page has no place for the table")
    return before + begin + made + end + after


def draw(path: Path, titles: Sequence[str], figures: Sequence[Speedups], *, dark: bool) -> None:
    """The picture, on a ground of its own, so that it can be read wherever it stands."""
    import matplotlib
    from matplotlib.figure import Figure

    ground, ink, faint = ("#0d1117", "#e6edf3", "#30363d") if dark else ("#ffffff", "#1f2328", "#d0d7de")
    style = {"text.color": ink, "axes.labelcolor": ink, "xtick.color": ink, "ytick.color": ink, "axes.edgecolor": faint}
    with matplotlib.rc_context(style | {"svg.hashsalt": "srigl_fx", "font.size": 11}):
        figure = Figure(figsize=(9, 6.4), layout="constrained", facecolor=ground)
        axes = figure.subplots(2, 2, sharey=True, sharex=True).flat
        for one, title, speedups in zip(axes, titles, figures, strict=True):
            one.set(title=title, yscale="log", facecolor=ground, xticks=range(4), ylim=(0.75, 40))
            one.set_xticks(range(4), ["80 %", "90 %", "95 %", "99 %"])
            one.set_yticks([1, 2, 5, 10, 20], ["1x", "2x", "5x", "10x", "20x"])
            one.minorticks_off()
            one.grid(color=faint, linewidth=0.7)
            one.axhline(1, color=ink, linewidth=1.2, linestyle="--")
            for batch, look in DRAWN.items():
                points = [(_place(sparsity), value) for (of, sparsity), value in speedups.items() if of == batch]
                if points:
                    one.plot(*zip(*points, strict=True), f"{look[-1]}-", color=look[:-1], label=f"{batch:,}")
        figure.supxlabel("weights removed")
        figure.supylabel("times as fast as the fastest dense")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        legend = figure.legend(
            handles, labels, title="samples", loc="outside upper center", ncols=len(DRAWN), facecolor=ground
        )
        legend.get_frame().set_edgecolor(faint)
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None, "Description": digest(figures)})


def _place(sparsity: float) -> int:
    return (0.8, 0.9, 0.95, 0.99).index(sparsity)


def text(chosen: Sequence[Panel], figures: Sequence[Speedups]) -> str:
    """A table for each instruction set, and what each was measured on."""
    parts = []
    for instructions in dict.fromkeys(one.instructions for one in chosen):
        here = [index for index, one in enumerate(chosen) if one.instructions == instructions]
        names = [chosen[index].numbers for index in here]
        parts.append(table(f"{instructions}, samples", names, [figures[index] for index in here]))
        machines = ", ".join(f"{chosen[index].numbers} on {processor(chosen[index])}" for index in here)
        parts.append(f"One thread; {machines}.")
    return "\n\n".join(parts)


def main() -> None:
    chosen = panels()
    figures = [worst(one.records, one.dense, one.ours) for one in chosen]
    for name, path in PICTURES.items():
        draw(path, [one.title for one in chosen], figures, dark=name == "dark")
    for page in PAGES:
        made = with_table(page.read_text(encoding="utf-8"), text(chosen, figures))
        page.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
