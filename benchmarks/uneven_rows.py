"""Linear layers whose rows keep unequal numbers of weights, in ONNX Runtime: dense, padded, in groups of like length.

Two kinds of masks: lengths of a lognormal distribution, as magnitude pruning of a whole model leaves them in its most
uneven layers; and an eighth of the rows that keep ten times as much as the others. All go in turns, on one thread;
times are the least of all calls, so that other work on the machine counts little. Weights are random.

    python benchmarks/uneven_rows.py [--batch 1 16 128] [--rounds 100]

Prints a Markdown table: benchmarks/results/uneven_rows.md. Above 1, the groups are faster.
"""

import argparse
import functools
import tempfile
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
from harness.machine import describe
from numpy.typing import NDArray

from srigl_fx.onnx_condensing.match import contractions
from srigl_fx.onnx_condensing.rewrite import condense
from srigl_fx.runtime import load
from srigl_fx.runtime.costs.autotune import measure
from srigl_fx.runtime.ort import abi
from srigl_fx.runtime.row_lengths import groups_by_length

SHAPES = ((768, 768), (3072, 768), (768, 3072))  # inputs, outputs


def lengths(kind: str, inputs: int, outputs: int) -> NDArray[np.int64]:
    """How many weights each row keeps: about 9 % of all."""
    rng = np.random.default_rng(0)
    if kind == "lognormal":
        return (0.06 * inputs * rng.lognormal(0, 0.9, outputs)).astype(np.int64).clip(1, inputs)
    return np.where(rng.random(outputs) < 0.125, int(0.45 * inputs), int(0.04 * inputs))


def model_of(weight: NDArray[np.float32], groups: int) -> ir.Model:
    """One MatMul; condensed in up to so many groups, and dense for 0."""
    outputs, inputs = weight.shape
    held = ir.tensor(np.ascontiguousarray(weight.T), name="w")
    x = ir.val("x", dtype=ir.DataType.FLOAT, shape=["n", inputs])
    w = ir.val("w", const_value=held)
    node = ir.node("MatMul", [x, w], outputs=[ir.val("y", dtype=ir.DataType.FLOAT, shape=["n", outputs])])
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[w], opset_imports={"": 18, abi.DOMAIN: 1}, name="g")
    if groups:
        (one,) = contractions(graph)
        kept = one.matrix != 0
        condense(graph, one, [kept & rows[:, None] for rows in groups_by_length(kept.sum(axis=1), groups)], None)
        graph.remove(node)
        del graph.initializers["w"]
    return ir.Model(graph, ir_version=9)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 128])
    parser.add_argument("--rounds", type=int, default=100)
    args = parser.parse_args()
    print(f"{describe(1)}; microseconds a call.\n")
    print("| layer | lengths | batch | dense | padded | groups | padded / groups | dense / groups | bytes of each |")
    print("|---|---|---|---|---|---|---|---|---|")
    for inputs, outputs in SHAPES:
        for kind in ("lognormal", "an eighth long"):
            rng = np.random.default_rng(1)
            counts = lengths(kind, inputs, outputs)
            kept = rng.random((outputs, inputs)).argsort(axis=1) < counts[:, None]
            weight = np.where(kept, rng.standard_normal(kept.shape), 0).astype(np.float32)
            sessions, sizes = {}, []
            for name, groups in (("dense", 0), ("padded", 1), ("groups", 4)):
                with tempfile.TemporaryDirectory() as folder:
                    path = Path(folder, "model.onnx")
                    ir.save(model_of(weight, groups), path)
                    sizes.append(path.stat().st_size)
                    options = onnxruntime.SessionOptions()
                    options.intra_op_num_threads = 1
                    sessions[name] = load(path, session_options=options)
            for batch in args.batch:
                feeds = {"x": rng.standard_normal((batch, inputs)).astype(np.float32)}
                calls = {name: functools.partial(session.run, None, feeds) for name, session in sessions.items()}
                times = measure(calls, rounds=args.rounds, seconds=0, typical=min)
                dense, padded, groups_ = (1e6 * times[name] for name in calls)
                shown = f"{dense:.0f} | {padded:.0f} | {groups_:.0f} | {padded / groups_:.2f} | {dense / groups_:.2f}"
                bytes_ = ", ".join(f"{size:,}" for size in sizes)
                print(f"| {inputs} -> {outputs} | {kind} | {batch} | {shown} | {bytes_} |", flush=True)


if __name__ == "__main__":
    main()
