"""Linear layers whose rows keep unequal numbers of weights: dense, padded, and in groups of like length.

Two kinds of masks: lengths of a lognormal distribution, as magnitude pruning of a whole model leaves them in its most
uneven layers; and an eighth of the rows that keep ten times as much as the others. All go in turns, on one thread;
times are the least of all calls, so that other work on the machine counts little. Weights are random.

    python benchmarks/uneven_rows.py [--batch 1 16 128] [--rounds 100] [--torch]

They run in ONNX Runtime, or in PyTorch, where the saved places of panels for each further operator are shown, too.
Prints a Markdown table: benchmarks/results/uneven_rows.md. Above 1, the groups are faster.
"""

import argparse
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from harness.machine import describe
from numpy.typing import NDArray

import srigl_fx.runtime.ops  # noqa: F401 - registers the operators
from srigl_fx.onnx_condensing.drafts import Names
from srigl_fx.onnx_condensing.match import contraction
from srigl_fx.onnx_condensing.rewrite import condense
from srigl_fx.runtime import load
from srigl_fx.runtime.costs.autotune import measure
from srigl_fx.runtime.format import CondensedWeight
from srigl_fx.runtime.ort import abi
from srigl_fx.runtime.row_lengths import groups_by_length, places

Run = Callable[[NDArray[np.float32]], object]
FORMS = {"dense": 0, "padded": 1, "groups": 4}  # groups of rows, at most
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
        one = contraction(node)
        assert one is not None
        kept = one.matrix != 0
        parts = [kept & rows[:, None] for rows in groups_by_length(kept.sum(axis=1), groups)]
        condense(one, parts, None, Names(ir.Model(graph, ir_version=9)))
        graph.remove(node)
        del graph.initializers["w"]
    return ir.Model(graph, ir_version=9)


def sessions_of(weight: NDArray[np.float32]) -> tuple[dict[str, Run], str]:
    """The layer in each form in ONNX Runtime, and the bytes of its files."""
    runs: dict[str, Run] = {}
    sizes = []
    for name, groups in FORMS.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "model.onnx")
            ir.save(model_of(weight, groups), path)
            sizes.append(f"{path.stat().st_size:,}")
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            session = load(path, session_options=options)
        runs[name] = lambda x, session=session: session.run(None, {"x": x})
    return runs, ", ".join(sizes)


def operators_of(weight: NDArray[np.float32]) -> tuple[dict[str, Run], str]:
    """The same in PyTorch, and the places that are saved for each further operator."""
    kept = weight != 0
    counts = kept.sum(axis=1)
    dense, bias = torch.from_numpy(weight), torch.zeros(len(weight))
    linear = torch.ops.srigl_fx.condensed_linear.default
    runs: dict[str, Run] = {"dense": lambda x: torch.nn.functional.linear(torch.from_numpy(x), dense, bias)}
    saved = places(counts)
    for name in ("padded", "groups"):
        rows = groups_by_length(counts, FORMS[name])
        weights = [CondensedWeight.from_dense(weight, kept & one[:, None], pad=True) for one in rows]
        parts = [[torch.from_numpy(part) for part in (one.values, one.indices, one.active)] for one in weights]

        def run(x: NDArray[np.float32], parts: list[list[torch.Tensor]] = parts) -> torch.Tensor | None:
            y: torch.Tensor | None = None
            for one in parts:
                y = linear(torch.from_numpy(x), *one, bias, weight.shape[1], residual=y)
            return y

        runs[name] = run
        if name == "groups":
            saved = (saved - sum(places(np.where(one, counts, 0)) for one in rows)) // max(1, len(rows) - 1)
    return runs, f"{saved:,}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 128])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--torch", action="store_true", help="in PyTorch")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{describe(1)}; microseconds a call.\n")
    last = "places saved for each further operator" if args.torch else "bytes of each"
    print(f"| layer | lengths | batch | dense | padded | groups | padded / groups | dense / groups | {last} |")
    print("|---|---|---|---|---|---|---|---|---|")
    for inputs, outputs in SHAPES:
        for kind in ("lognormal", "an eighth long"):
            rng = np.random.default_rng(1)
            kept = rng.random((outputs, inputs)).argsort(axis=1) < lengths(kind, inputs, outputs)[:, None]
            weight = np.where(kept, rng.standard_normal(kept.shape), 0).astype(np.float32)
            runs, more = (operators_of if args.torch else sessions_of)(weight)
            for batch in args.batch:
                x = rng.standard_normal((batch, inputs)).astype(np.float32)
                calls = {name: functools.partial(run, x) for name, run in runs.items()}
                times = measure(calls, rounds=args.rounds, seconds=0, typical=min)
                dense, padded, groups = (1e6 * times[name] for name in FORMS)
                shown = f"{dense:.0f} | {padded:.0f} | {groups:.0f} | {padded / groups:.2f} | {dense / groups:.2f}"
                print(f"| {inputs} -> {outputs} | {kind} | {batch} | {shown} | {more} |", flush=True)


if __name__ == "__main__":
    main()
