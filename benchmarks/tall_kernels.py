"""A pitch network whose convolutions are long along one axis and one wide along the other, in ONNX Runtime.

CREPE (Kim, Salamon, Li and Bello, "CREPE: a convolutional representation for pitch estimation", 2018): six convolutions
with 512 or 64 taps along time over windows of 1,024 samples, the first with a stride of 4 and one input channel. It is
exported with each layer condensed, and again as the dense network; both run in turns. Weights are random: times do not
depend on them.

    python benchmarks/tall_kernels.py [--capacity tiny full] [--sparsity 0.8 0.9] [--batch 1 16] [--threads 1]

Prints a Markdown table: benchmarks/results/tall_kernels.md.
"""

import argparse
import itertools
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

import srigl_fx as sx
from srigl_fx.onnx_tools import densify
from srigl_fx.runtime.costs.autotune import measure

WIDTHS = {"full": (1024, 128, 128, 128, 256, 512), "tiny": (128, 16, 16, 16, 32, 64)}
TAPS = (512, 64, 64, 64, 64, 64)


class Crepe(nn.Module):
    """(batch, 1024) samples of sound -> (batch, 360) scores of pitches.

    "tiny" is the published network with an eighth of the filters.
    """

    def __init__(self, capacity: str) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 1
        for width, taps in zip(WIDTHS[capacity], TAPS, strict=True):
            stride = 4 if channels == 1 else 1
            before = (taps - stride) // 2
            layers += [
                nn.ZeroPad2d((0, 0, before, taps - stride - before)),
                nn.Conv2d(channels, width, (taps, 1), (stride, 1)),
                nn.ReLU(),
                nn.BatchNorm2d(width),
                nn.MaxPool2d((2, 1)),
            ]
            channels = width
        self.features, self.classifier = nn.Sequential(*layers), nn.Linear(4 * channels, 360)

    def forward(self, sound: Tensor) -> Tensor:
        """Scores of pitches."""
        features: Tensor = self.features(sound[:, None, :, None])
        return torch.sigmoid(self.classifier(features.permute(0, 2, 1, 3).flatten(1)))


def session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    """A session with so many threads, and the operators."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return sx.runtime.load(path, session_options=options)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capacity", nargs="+", choices=WIDTHS, default=list(WIDTHS))
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.8, 0.9])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    print(f"ONNX Runtime {onnxruntime.__version__}, {given.threads} thread(s); milliseconds a call, medians.\n")
    print("| capacity | sparsity | batch | dense | sparse | dense / sparse |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        sparse_file, dense_file = Path(folder, "sparse.onnx"), Path(folder, "dense.onnx")
        for capacity, sparsity in itertools.product(given.capacity, given.sparsity):
            torch.manual_seed(0)
            model = sx.sparsify(Crepe(capacity), sparsity=sparsity).eval()
            sx.export_onnx(model, sparse_file, (torch.randn(2, 1024),), min_speedup=0)
            densify(sparse_file, dense_file)
            sessions = {"sparse": session(sparse_file, given.threads), "dense": session(dense_file, given.threads)}
            for batch in given.batch:
                sound = {"sound": np.random.default_rng(0).standard_normal((batch, 1024)).astype(np.float32)}
                times = measure(
                    {name: lambda one=one, sound=sound: one.run(None, sound) for name, one in sessions.items()},
                    rounds=11,
                    seconds=4.0,
                )
                dense, sparse = 1e3 * times["dense"], 1e3 * times["sparse"]
                print(
                    f"| {capacity} | {sparsity:.0%} | {batch} | {dense:.1f} | {sparse:.1f} | {dense / sparse:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
