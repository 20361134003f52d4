"""The cost model against the clock: predicted and measured times of dense and condensed layers, one thread.

Run ``python benchmarks/cost_model.py``; it prints a Markdown table, the worst cells included, and writes it to
results/cost_model.md. ``--fit`` also prints constants that fit this grid best, for ``Machine`` in
``srigl_fx/runtime/costs/cost_model.py``; ``--quick`` takes fewer layers.
"""

import argparse
import math
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from harness.layers import Layer, dense_weight, random_input, random_weight
from harness.machine import describe

from srigl_fx.lowering.layer_costs import CLEAR
from srigl_fx.runtime.costs.autotune import measure
from srigl_fx.runtime.costs.calibration import fit, probe
from srigl_fx.runtime.costs.cost_model import Machine, Work, estimate

LINEAR = tuple(
    Layer(inputs=inputs, outputs=outputs)
    for inputs, outputs in ((3072, 768), (768, 3072), (768, 768), (4096, 4096), (256, 256), (64, 64))
)
CONV = (
    Layer(inputs=64, outputs=64, kernel=3, size=56),
    Layer(inputs=256, outputs=64, kernel=1, size=56),
    Layer(inputs=128, outputs=128, kernel=3, size=28, stride=2),
    Layer(inputs=256, outputs=256, kernel=3, size=14),
    Layer(inputs=2048, outputs=512, kernel=1, size=7),
    Layer(inputs=32, outputs=32, kernel=3, size=8),
)
SPARSITIES = (0.8, 0.9, 0.99)
BATCHES = (1, 4, 16, 64, 512)
CONV_BATCHES = (1, 8)
ROUNDS = 25  # short ones: some of them have the machine to themselves
STEPS = (0.7, 0.9, 0.97, 1.03, 1.1, 1.4)


@dataclass(frozen=True)
class Cell:
    layer: Layer
    sparsity: float
    batch: int
    work: Work
    measured: dict[str, float]


def cells(layers: Iterable[Layer], sparsities: Iterable[float]) -> Iterator[Cell]:
    for layer in layers:
        for sparsity in sparsities:
            for batch in CONV_BATCHES if layer.kernel else BATCHES:
                yield cell(layer, sparsity, batch)


def cell(layer: Layer, sparsity: float, batch: int) -> Cell:
    weight = random_weight(layer, sparsity)
    x = torch.from_numpy(random_input(layer, batch))
    dense = torch.from_numpy(dense_weight(weight, layer))
    operands = [torch.from_numpy(getattr(weight, name)) for name in ("values", "indices", "active", "bias")]
    ours, bias, padding = torch.ops.srigl_fx, operands[3], [layer.padding] * 2
    settings = list(layer.weight_shape), [layer.stride] * 2, padding, [1, 1], 1
    with torch.inference_mode():
        if layer.kernel:
            measured = measure(
                {
                    "dense": lambda: torch.nn.functional.conv2d(x, dense, bias, layer.stride, layer.padding),
                    "condensed": lambda: ours.condensed_conv(x, *operands, *settings),
                },
                rounds=ROUNDS,
                typical=min,
            )
        else:
            measured = measure(
                {
                    "dense": lambda: torch.nn.functional.linear(x, dense, bias),
                    "condensed": lambda: ours.condensed_linear(x, *operands, layer.fan_in),
                },
                rounds=ROUNDS,
                typical=min,
            )
    work = Work(
        rows=layer.outputs,
        fan_in=layer.fan_in,
        active=layer.outputs,
        kept=weight.values.size,
        columns=batch * layer.positions,
        convolution=bool(layer.kernel),
    )
    return Cell(layer, sparsity, batch, work, measured)


def errors(found: list[Cell], machine: Machine, form: str) -> list[float]:
    """Predicted over measured time, cell by cell."""
    return [estimate(one.work, machine)[form] / one.measured[form] for one in found]  # type: ignore[index]


def fitted(found: list[Cell], machine: Machine) -> Machine:
    """Constants that give the smallest squared logarithms of the errors: by going up and down in one at a time."""

    def misfit(candidate: Machine) -> float:
        both = errors(found, candidate, "dense") + errors(found, candidate, "condensed")
        return sum(math.log(error) ** 2 for error in both)

    names = [field.name for field in fields(Machine) if field.name != "cache_bytes"]
    best, improved = misfit(machine), True
    while improved:
        improved = False
        for name in names:
            for step in STEPS:
                candidate = replace(machine, **{name: step * getattr(machine, name)})
                if (worth := misfit(candidate)) < best - 1e-6:
                    machine, best, improved = candidate, worth, True
    return machine


def table(found: list[Cell], machine: Machine) -> Iterator[str]:
    yield "| layer | sparsity | batch | dense, µs | predicted | condensed, µs | predicted | speedup | predicted |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for one in found:
        predicted = estimate(one.work, machine)
        numbers = [
            f"{1e6 * one.measured[form]:.1f} | {predicted[form] / one.measured[form]:.2f}x"
            for form in ("dense", "condensed")
        ]
        speedups = [times["dense"] / times["condensed"] for times in (one.measured, predicted)]  # type: ignore[index]
        numbers += [f"{speedup:.2f}x" for speedup in speedups]
        yield f"| {one.layer} | {one.sparsity:.0%} | {one.batch} | {' | '.join(numbers)} |"


def summary(found: list[Cell], machine: Machine) -> Iterator[str]:
    for form in ("dense", "condensed"):
        off = [max(error, 1 / error) for error in errors(found, machine, form)]
        within = statistics.mean(one <= 2 for one in off)
        yield f"- {form}: off by {statistics.median(off):.2f}x in the median, {max(off):.2f}x at most; {within:.0%} of"
        yield "  the cells are within 2x"
    clear = wrong = 0
    for one in found:
        predicted = estimate(one.work, machine)
        ratio = predicted["dense"] / predicted["condensed"]
        if ratio >= CLEAR or ratio <= 1 / CLEAR:
            clear += 1
            wrong += (ratio > 1) != (one.measured["dense"] > one.measured["condensed"])
    yield f"- {clear} of {len(found)} cells are predicted to be {CLEAR:g}x apart or more, so `lower` does not measure"
    yield f"  them; in {wrong} of those the other form is faster"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fit", action="store_true", help="print constants that fit best")
    parser.add_argument("--quick", action="store_true", help="fewer layers; writes no file")
    given = parser.parse_args()
    torch.set_num_threads(1)
    layers, sparsities = (*LINEAR, *CONV), SPARSITIES
    if given.quick:
        layers, sparsities = (*LINEAR[::2], *CONV[::3]), SPARSITIES[1:]
    found = list(cells(layers, sparsities))
    probed = fit(probe(), Machine())
    lines = [
        "# The cost model against the clock",
        "",
        f"{describe(1)} The fastest of {ROUNDS} interleaved rounds, in inference mode, calls",
        'included. "predicted" is predicted over measured time, or the predicted speedup. The constants are those that',
        f"the probes give on this machine: `{probed}`.",
        "",
        *summary(found, probed),
        "",
        "With the default constants instead:",
        "",
        *summary(found, Machine()),
        "",
        *table(found, probed),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if not given.quick:
        results = Path(__file__).parent / "results" / "cost_model.md"
        results.write_text(text, encoding="utf-8")
    if given.fit:
        best = fitted(found, Machine())
        print(f"Constants that fit best: {best}")
        print("\n".join(summary(found, best)))


if __name__ == "__main__":
    main()
