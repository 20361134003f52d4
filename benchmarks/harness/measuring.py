"""Measuring layers cell by cell: every contender in one interleaved run, DeepSparse in its process among them.

Owns the order of the cells and what is recorded of each. It must not know how contenders compute.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from harness.cells import DEEPSPARSE, DEEPSPARSE_ORT, Record
from harness.contenders import TOLERANCE, LayerContenders, difference
from harness.deepsparse_process import PeerError, Worker
from harness.layers import Layer, random_input, random_weight
from harness.timing import Timer, interleaved, timer

_WORKER_NAMES = {DEEPSPARSE: "deepsparse", DEEPSPARSE_ORT: "ort"}


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How long to measure: about ``seconds`` for each contender and cell, in ``rounds`` turns."""

    seconds: float = 0.3
    rounds: int = 7


def measure_layers(
    section: str,
    layers: Sequence[Layer],
    sparsities: Sequence[float],
    batches: Sequence[int],
    *,
    contenders: tuple[str, ...],
    threads: int,
    effort: Effort,
    worker: Worker | None,
    no_worker: str = "not run",
) -> Iterator[list[Record]]:
    """Measure every cell; yield its records as soon as they are there.

    Args:
        section: What the records belong to.
        layers: The layers.
        sparsities: Fractions removed.
        batches: Samples.
        contenders: Names of :mod:`harness.cells`.
        threads: Of each contender.
        effort: How long to measure.
        worker: The process of DeepSparse, if there is one.
        no_worker: Why there is none.
    """
    torch.set_num_threads(threads)
    for layer in layers:
        for sparsity in sparsities:
            weight = random_weight(layer, sparsity)
            made = LayerContenders(layer, weight, contenders, threads)
            for batch in batches:
                x = random_input(layer, batch)
                with torch.inference_mode():
                    calls, missing = made.calls(x)
                    timers: dict[str, Timer] = {name: timer(call) for name, call in calls.items()}
                    remote = [name for name in contenders if name in _WORKER_NAMES]
                    try:
                        if worker is None:
                            raise PeerError(no_worker)
                        if remote:
                            reference = torch.nn.functional.conv2d if layer.kernel else torch.nn.functional.linear
                            output = worker.load(made.dense_model, {"x": x}, threads=threads)
                            geometry = (layer.stride, layer.padding) if layer.kernel else ()
                            expected = reference(torch.from_numpy(x), made.dense, made.bias, *geometry)
                            problem = difference(output, expected, TOLERANCE)
                            if problem:
                                raise PeerError(f"wrong: {problem}")
                            timers |= {name: worker.timer(_WORKER_NAMES[name]) for name in remote}
                    except PeerError as error:
                        missing |= dict.fromkeys(remote, str(error))
                    pause = 0.005 if threads > 1 else 0.0
                    times = interleaved(timers, seconds=effort.seconds, rounds=effort.rounds, pause=pause)
                fmas = weight.values.size * batch * layer.positions
                moved = 6 * weight.values.size + x.nbytes + 4 * batch * layer.outputs * layer.positions
                yield [
                    Record(
                        section=section,
                        layer=str(layer),
                        sparsity=sparsity,
                        batch=batch,
                        threads=threads,
                        contender=name,
                        microseconds=1e6 * times.get(name, float("nan")),
                        note=missing.get(name, ""),
                        bytes=moved,
                        fmas=fmas,
                    )
                    for name in contenders
                ]


def collect(
    cells: Iterator[list[Record]], show: Callable[[list[Record]], str], save: Callable[[list[Record]], None]
) -> list[Record]:
    """Go through the cells; print and save each as it comes."""
    records: list[Record] = []
    started = time.perf_counter()
    for found in cells:
        records += found
        save(records)
        print(f"[{time.perf_counter() - started:5.0f} s] {show(found)}", flush=True)
    return records
