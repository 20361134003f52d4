"""A model of 3 GB, condensed: what memory it takes to write the result, and to serve it.

Makes a file of square layers with its weights beside it, of which each row keeps a twelfth; condenses it, weights again
beside it; and runs both in ONNX Runtime. Each step is a process of its own, whose memory is looked at while it works.
Memory of its own ("anonymous") is what a process cannot share; pages of the file of weights ("of files") are shared by
all processes that serve it, and given back when memory is short.

    python benchmarks/large_files.py FOLDER [--gigabytes 3]

FOLDER takes the dense and the condensed model, and is emptied behind. Prints a Markdown table:
benchmarks/results/large_files.md.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from harness.machine import describe
from numpy.typing import NDArray
from onnx import TensorProto, helper

SIZE, KEPT = 4096, 340
LAYER_BYTES = 4 * SIZE * SIZE
# A single sample alone, many, both, and both where a single one is repeated to as many as take the form that many take.
BATCHES = ([1], [64], [1, 64], [3, 64])


def sparse(seed: int) -> NDArray[np.float32]:
    """A weight of which each row keeps equally many, spread over all inputs."""
    rng = np.random.default_rng(seed)
    step = SIZE // KEPT
    columns = np.arange(KEPT) * step + rng.integers(0, step, (SIZE, KEPT))
    weight = np.zeros((SIZE, SIZE), np.float32)
    weight[np.arange(SIZE)[:, None], columns] = rng.standard_normal((SIZE, KEPT), np.float32) / np.sqrt(KEPT)
    return weight


def make(path: Path, layers: int) -> None:
    """The dense file, layer by layer."""
    tensors, nodes = [], []
    with path.with_suffix(".data").open("wb") as file:
        for i in range(layers):
            file.write(sparse(i).tobytes())
            tensor = TensorProto(name=f"w{i}", data_type=TensorProto.FLOAT, dims=[SIZE, SIZE])
            tensor.data_location = TensorProto.EXTERNAL
            places = {"location": path.with_suffix(".data").name, "offset": i * LAYER_BYTES, "length": LAYER_BYTES}
            for key, entry in places.items():
                tensor.external_data.add(key=key, value=str(entry))
            tensors.append(tensor)
            after = "y" if i == layers - 1 else f"h{i + 1}"
            nodes.append(helper.make_node("Gemm", [f"h{i}" if i else "x", f"w{i}"], [after], transB=1))
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", SIZE]) for name in "xy"]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    path.write_bytes(model.SerializeToString())


def memory() -> dict[str, float]:
    """Megabytes of this process: its own, and of files."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    rows = dict(line.split(":", 1) for line in status.splitlines() if line.startswith(("RssAnon", "RssFile")))
    return {name: int(text.split()[0]) * 1024 / 1e6 for name, text in rows.items()}


def watched(work: Callable[[], Any]) -> dict[str, Any]:
    """What some work takes: seconds, megabytes at most, and megabytes that it leaves."""
    before, most, done = memory(), memory(), threading.Event()

    def look() -> None:
        while not done.wait(0.02):
            most.update({name: max(most[name], size) for name, size in memory().items()})

    thread = threading.Thread(target=look)
    thread.start()
    start = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - start
    done.set()
    thread.join()
    after = memory()
    sizes = {"peak": most["RssAnon"] - before["RssAnon"], "own": after["RssAnon"] - before["RssAnon"]}
    return {"seconds": seconds, **sizes, "files": after["RssFile"] - before["RssFile"], "result": result}


def condense(source: Path, result: Path) -> dict[str, Any]:
    """Condense the dense file."""
    from srigl_fx.onnx_condensing.pipeline import condense_onnx

    def work() -> int:
        return condense_onnx(source, result, min_speedup=0, external_data=True, verify=False).condensed_layers

    return watched(work)


def run(path: Path, batches: list[int]) -> dict[str, Any]:
    """Open a file and run it twice with each batch: seconds of the second calls, and outputs of the first batch."""
    import onnxruntime

    from srigl_fx.runtime import load

    rng = np.random.default_rng(7)
    inputs = [rng.standard_normal((batch, SIZE), np.float32) for batch in batches]

    def work() -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = load(path, session_options=options)
        seconds, outputs = [], []
        for x in inputs:
            for _ in range(2):
                start = time.perf_counter()
                (y,) = session.run(None, {"x": x})
                last = time.perf_counter() - start
            seconds.append(last)
            outputs.append(y[0, :64].tolist())
        kept.append(session)
        return {"seconds": seconds, "y": outputs[0]}

    kept: list[Any] = []
    return watched(work)


def step(*arguments: str) -> dict[str, Any]:
    """One step, as a process."""
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """All steps, and the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--step", choices=["condense", "run"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--file", type=Path)
    options = parser.parse_args()
    source, result = options.folder / "dense.onnx", options.folder / "condensed.onnx"
    if options.step:
        print(json.dumps(condense(source, result) if options.step == "condense" else run(options.file, options.batch)))
        return
    layers = -(-int(options.gigabytes * 1e9) // LAYER_BYTES)
    try:
        make(source, layers)
        made = step(str(options.folder), "--step", "condense")
        dense, sparse_bytes = (sum(one.stat().st_size for one in weights_of(path)) / 1e6 for path in (source, result))
        print(f"{describe(1)} {layers} layers of {SIZE} x {SIZE}\n")
        print("| step | seconds | peak, own MB | left, own MB | left, MB of files | own / condensed weights |")
        print("|---|---|---|---|---|---|")
        print(row(f"condense {dense:.0f} MB to {sparse_bytes:.0f} MB", made, sparse_bytes), flush=True)
        outputs = []
        for path, name in ((result, "condensed"), (source, "dense")):
            for batches in BATCHES if path == result else BATCHES[:1]:
                numbers = [str(batch) for batch in batches]
                found = step(str(options.folder), "--step", "run", "--file", str(path), "--batch", *numbers)
                times = ", ".join(f"{1e3 * seconds:.0f} ms" for seconds in found["result"]["seconds"])
                label = f"{name}: session, two calls of batch {' and of batch '.join(numbers)} ({times})"
                print(row(label, found, sparse_bytes), flush=True)
                outputs += [found["result"]["y"]] if batches == [1] else []
        first, second = (np.array(one) for one in outputs)
        print(
            f"\nLargest difference over the largest output: {np.abs(first - second).max() / np.abs(second).max():.1e}"
        )
        onnx.checker.check_model(str(result))
    finally:
        for one in (source, result, *weights_of(source), *weights_of(result)):
            one.unlink(missing_ok=True)


def weights_of(path: Path) -> list[Path]:
    """The files of weights beside a file."""
    return list(path.parent.glob(f"{path.stem}*.data"))


def row(name: str, found: dict[str, Any], condensed: float) -> str:
    """One step in the table."""
    cells = [f"{found['seconds']:.1f}", *(f"{found[item]:.0f}" for item in ("peak", "own", "files"))]
    return f"| {name} | {' | '.join(cells)} | {found['own'] / condensed:.2f} |"


if __name__ == "__main__":
    main()
