"""LSTM, GRU and stacks of experts in ONNX Runtime: the operator as it is, and condensed by ``condense_onnx``.

Weights are random, and a tenth of each row is kept. The two files go in turns, on one thread; times are the least of
all calls, so that other work on the machine counts little. "forecast" is what the cost model expects, by which
``condense_onnx`` decides.

    python benchmarks/recurrent_layers.py [--batch 1 16] [--steps 64] [--rounds 20]

Prints a Markdown table: benchmarks/results/recurrent_layers.md. Below 1, the condensed form loses.
"""

import argparse
import functools
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from harness.machine import describe
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from srigl_fx.onnx_condensing.decide import estimated_speedup, expanded
from srigl_fx.onnx_condensing.drafts import Names
from srigl_fx.onnx_condensing.pipeline import condense_onnx
from srigl_fx.runtime import load
from srigl_fx.runtime.costs.autotune import measure

KEPT = 0.1
HIDDEN = (128, 256, 512, 1024)
EXPERTS = ((8, 256, 512), (8, 1024, 2048))  # experts, inputs, outputs


def sparse(outputs: int, inputs: int, seed: int) -> NDArray[np.float32]:
    """A weight of which each row keeps a tenth."""
    rng = np.random.default_rng(seed)
    kept = rng.random((outputs, inputs)).argsort(axis=1) < int(KEPT * inputs)
    return np.where(kept, rng.standard_normal((outputs, inputs)) / np.sqrt(KEPT * inputs), 0).astype(np.float32)


def save(path: Path, node: onnx.NodeProto, arrays: dict[str, NDArray[np.float32]], x: list[int], y: list[int]) -> None:
    """A file of one node."""
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, y)],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)


def recurrent(path: Path, operator: str, hidden: int, steps: int, batch: int) -> None:
    """A file of one LSTM or GRU, whose inputs are as many as its state."""
    gates = 4 if operator == "LSTM" else 3
    arrays = {name: sparse(gates * hidden, hidden, i)[None] for i, name in enumerate("wr")}
    more = {"linear_before_reset": 1} if operator == "GRU" else {}
    node = helper.make_node(operator, ["x", "w", "r"], ["y"], hidden_size=hidden, **more)
    save(path, node, arrays, [steps, batch, hidden], [steps, 1, batch, hidden])


def experts(path: Path, count: int, inputs: int, outputs: int, tokens: int) -> None:
    """A file of a MatMul with a stack of weights."""
    stack = np.stack([np.ascontiguousarray(sparse(outputs, inputs, i).T) for i in range(count)])
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    save(path, node, {"w": stack}, [count, tokens, inputs], [count, tokens, outputs])


def forecast(path: Path) -> float:
    """The speed-up that is expected of the file's node."""
    model = ir.load(path)
    (node,) = model.graph
    expansion = expanded(node, Names(model))
    assert expansion is not None
    return estimated_speedup(expansion, 0.5, 1)  # the file's sizes are fixed, its batch among them


def row(name: str, source: Path, rounds: int) -> str:
    """Both files, measured in turns."""
    expected = forecast(source)
    result = source.with_suffix(".condensed.onnx")
    condense_onnx(source, result, min_speedup=0, verify=False)
    sessions = []
    for path in (source, result):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        sessions.append(load(path, session_options=options))
    x = np.random.default_rng(5).standard_normal(sessions[0].get_inputs()[0].shape).astype(np.float32)
    calls = {i: functools.partial(session.run, None, {"x": x}) for i, session in enumerate(sessions)}
    first, second = (call()[0] for call in calls.values())
    assert np.abs(first - second).max() < 1e-3 * np.abs(first).max()
    times = measure(calls, rounds=rounds, seconds=0, typical=min)
    dense, condensed = (1e6 * times[i] for i in calls)
    return f"| {name} | {dense:.0f} | {condensed:.0f} | {dense / condensed:.2f} | {expected:.2f} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    print(f"{describe(1)} Microseconds a call.\n", flush=True)
    print("| layer | as it is | condensed | speed-up | forecast |\n|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.onnx")
        for batch in options.batch:
            for operator in ("LSTM", "GRU"):
                for hidden in HIDDEN:
                    recurrent(path, operator, hidden, options.steps, batch)
                    name = f"{operator} {hidden}, {options.steps} steps, batch {batch}"
                    print(row(name, path, options.rounds), flush=True)
            for count, inputs, outputs in EXPERTS:
                experts(path, count, inputs, outputs, batch)
                name = f"{count} experts {inputs} -> {outputs}, {batch} tokens each"
                print(row(name, path, options.rounds), flush=True)


if __name__ == "__main__":
    main()
