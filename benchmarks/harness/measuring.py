"""Measuring layers cell by cell: every contender in one interleaved run, DeepSparse in its process among them.

Owns the order of the cells and what is recorded of each. It must not know how contenders compute.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from harness.cells import DEEPSPARSE, DEEPSPARSE_ORT, OURS_BF16, OURS_INT8, Record
from harness.contenders import TOLERANCE, LayerContenders, difference
from harness.deepsparse_process import PeerError, Worker
from harness.layers import Array, Layer, random_input, random_weight
from harness.timing import Timer, interleaved, timer

WORKER_NAMES = {DEEPSPARSE: "deepsparse", DEEPSPARSE_ORT: "ort"}


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How long to measure: about ``seconds`` for each contender and cell, in ``rounds`` turns."""

    seconds: float = 0.3
    rounds: int = 7


@dataclass(frozen=True, kw_only=True)
class Bench:
    """How to measure: threads of each contender, how long, and the process of DeepSparse or why there is none."""

    threads: int
    effort: Effort
    worker: Worker | None
    no_worker: str = "not run"


def measure_layers(
    section: str,
    layers: Sequence[Layer],
    sparsities: Sequence[float],
    batches: Sequence[int],
    contenders: tuple[str, ...],
    bench: Bench,
) -> Iterator[list[Record]]:
    """Measure every cell; yield its records as soon as they are there."""
    for layer in layers:
        for sparsity in sparsities:
            torch.set_num_threads(bench.threads)
            made = LayerContenders(layer, random_weight(layer, sparsity), contenders, bench.threads)
            for batch in batches:
                x = random_input(layer, batch)
                with torch.inference_mode():
                    timers, missing = _timers(made, x, bench)
                    times = interleaved(timers, seconds=bench.effort.seconds, rounds=bench.effort.rounds)
                yield _records(section, made, sparsity, x, times, missing)


def measure_threads(
    layers: Sequence[Layer],
    sparsities: Sequence[float],
    batches: Sequence[int],
    contenders: tuple[str, ...],
    counts: Sequence[int],
    effort: Effort,
    calm: Callable[[int], bool] | None,
) -> Iterator[list[Record]]:
    """Measure every contender with each number of threads, in turns; a number of threads has a cell of its own.

    What is measured counts if the machine is ``calm`` for so many threads before and after.
    """
    for layer in layers:
        for sparsity in sparsities:
            weight = random_weight(layer, sparsity)
            made = {count: LayerContenders(layer, weight, contenders, count) for count in counts}
            for batch in batches:
                x = random_input(layer, batch)
                times: dict[tuple[int, str], float] = {}
                missing: dict[int, dict[str, str]] = {count: {} for count in counts}
                with torch.inference_mode():
                    fit = None if calm is None else lambda key: calm(key[0])
                    # One contender at a time: the pool of another, awake, would take a core from it.
                    for name in contenders:
                        timers: dict[tuple[int, str], Timer] = {}
                        for count in counts:
                            torch.set_num_threads(count)
                            calls, why = made[count].calls(x, only=name)
                            missing[count] |= why
                            timers |= {(count, one): _with_threads(count, timer(call)) for one, call in calls.items()}
                        found = interleaved(timers, seconds=effort.seconds, rounds=effort.rounds, calm=fit)
                        for count, one in timers.keys() - found.keys():
                            missing[count][one] = "no turn in which the machine was calm"
                        times |= found
                torch.set_num_threads(counts[0])
                for count in counts:
                    own = {name: seconds for (at, name), seconds in times.items() if at == count}
                    yield _records("threads", made[count], sparsity, x, own, missing[count])


def _with_threads(count: int, inner: Timer) -> Timer:
    def taken(calls: int) -> float:
        torch.set_num_threads(count)
        return inner(calls)

    return taken


def _timers(made: LayerContenders, x: Array, bench: Bench) -> tuple[dict[str, Timer], dict[str, str]]:
    """The contenders of this process and of the other, and why those that are missing are."""
    calls, missing = made.calls(x)
    timers: dict[str, Timer] = {name: timer(call) for name, call in calls.items()}
    remote = [name for name in made.wanted if name in WORKER_NAMES]
    if remote:
        try:
            timers |= remote_timers(remote, bench, made.dense_model, {"x": x}, made.expected(x), TOLERANCE)
        except PeerError as error:
            missing |= dict.fromkeys(remote, str(error))
    return timers, missing


def remote_timers(
    names: Sequence[str],
    bench: Bench,
    model: bytes | Path,
    inputs: Mapping[str, Array],
    expected: torch.Tensor,
    tolerance: float,
) -> dict[str, Timer]:
    """The timers of DeepSparse's process, after its output was compared.

    Raises:
        PeerError: There is no such process, it refuses the model, or its output is another.
    """
    if bench.worker is None:
        raise PeerError(bench.no_worker)
    problem = difference(bench.worker.load(model, inputs, threads=bench.threads), expected, tolerance)
    if problem:
        raise PeerError(f"wrong: {problem}")
    return {name: bench.worker.timer(WORKER_NAMES[name]) for name in names}


def _records(
    section: str,
    made: LayerContenders,
    sparsity: float,
    x: Array,
    times: Mapping[str, float],
    missing: Mapping[str, str],
) -> list[Record]:
    layer, kept, batch = made.layer, made.weight.values.size, len(x)
    activations = x.nbytes + 4 * batch * layer.outputs * layer.positions
    return [
        Record(
            section=section,
            layer=str(layer),
            sparsity=sparsity,
            batch=batch,
            threads=made.threads,
            contender=name,
            microseconds=1e6 * times.get(name, float("nan")),
            note=missing.get(name, ""),
            bytes=(4 if name in OURS_BF16 else 3 if name in OURS_INT8 else 6) * kept + activations,
            fmas=kept * batch * layer.positions,
        )
        for name in made.wanted
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
