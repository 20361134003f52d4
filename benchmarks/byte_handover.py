"""Neighbouring layers of eight bits: what it saves that they hand each other bytes where scales are given.

For each model and batch: the lowered model in PyTorch and its file in ONNX Runtime, with the pass ``HandOverBytes`` and
without it (layers then store float32, which the next one rounds with the same scale), and the model that finds its
scales at each call. All go in turns, on one thread; times are medians. Weights and scales are those of random data.

    python benchmarks/byte_handover.py [--sparsity 0.9] [--batch 1 16 64]

Prints a Markdown page: benchmarks/results/byte_handover.md.
"""

import argparse
import itertools
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import onnxruntime
import torch
from harness.machine import describe
from harness.timing import interleaved, timer
from torch import Tensor, nn

import srigl_fx as sx
from srigl_fx import runtime
from srigl_fx.passes.hand_over_bytes import HandOverBytes
from srigl_fx.passes.pipelines import CONDENSING, LOWERING

WITHOUT = tuple(step for step in (*LOWERING, *CONDENSING) if not isinstance(step, HandOverBytes))
WAYS = ("bytes", "float32", "found at each call")


class Bottleneck(nn.Module):
    """Three convolutions of ResNet-50's first stage, batch norms folded, with the residual."""

    def __init__(self) -> None:
        super().__init__()
        self.reduce, self.middle = nn.Conv2d(256, 64, 1), nn.Conv2d(64, 64, 3, padding=1)
        self.expand = nn.Conv2d(64, 256, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.expand(torch.relu(self.middle(torch.relu(self.reduce(x))))))


def perceptron(*widths: int) -> nn.Module:
    """Linear layers with a ReLU after each but the last."""
    layers = [part for pair in itertools.pairwise(widths) for part in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "768 -> 3072 -> 768": (lambda: perceptron(768, 3072, 768), (768,)),
    "3072 -> 768 -> 3072": (lambda: perceptron(3072, 768, 3072), (3072,)),
    "1024, six times": (lambda: perceptron(*[1024] * 7), (1024,)),
    "bottleneck of ResNet-50, 56x56": (Bottleneck, (256, 56, 56)),
}


def contenders(model: nn.Module, x: Tensor, folder: Path) -> dict[str, Callable[[], object]]:
    """A call of each way in each host."""
    calls: dict[str, Callable[[], object]] = {}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    for way in WAYS:
        given = {} if way == "found at each call" else {"calibration": [x]}
        passes = {"passes": WITHOUT} if way == "float32" else {}
        lowered = sx.lower(model, (x,), value_dtype=torch.int8, min_speedup=0, **given, **passes)
        handed = any(note.by == "HandOverBytes" for note in lowered.report.notes)
        assert handed == (way == "bytes"), lowered.report
        path = folder / f"{way}.onnx"
        sx.export_onnx(lowered, path, (x,))
        calls[f"PyTorch, {way}"] = partial(lowered, x)
        session = runtime.load(path, session_options=options)
        calls[f"ONNX Runtime, {way}"] = partial(session.run, None, {session.get_inputs()[0].name: x.numpy()})
    return calls


def main() -> None:
    """Print the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64])
    given = parser.parse_args()
    torch.set_num_threads(1)
    hosts = ("PyTorch", "ONNX Runtime")
    names = [f"{host}, {way}" for host in hosts for way in WAYS]
    rows = [f"| model | batch | {' | '.join(names)} | {' | '.join(f'{host}, saved' for host in hosts)} |"]
    rows.append("|---" * (2 + len(names) + len(hosts)) + "|")
    for title, (make, shape) in MODELS.items():
        torch.manual_seed(0)
        model = sx.sparsify(make(), sparsity=given.sparsity, distribution="uniform").eval()
        for batch in given.batch:
            x = torch.randn(batch, *shape)
            with tempfile.TemporaryDirectory() as folder:
                calls = contenders(model, x, Path(folder))
            with torch.inference_mode():
                seconds = interleaved({name: timer(calls[name]) for name in names}, seconds=0.5)
            saved = [1 - seconds[f"{host}, bytes"] / seconds[f"{host}, float32"] for host in hosts]
            cells = [title, str(batch), *(f"{1e6 * seconds[name]:.0f}" for name in names), *(f"{s:.0%}" for s in saved)]
            rows.append(f"| {' | '.join(cells)} |")
            print(rows[-1], flush=True)
    about = f"Sparsity {given.sparsity:.0%}. Microseconds a call, medians, one thread. {describe(1)}"
    print(f"\n{about}", "", *rows, sep="\n")


if __name__ == "__main__":
    main()
