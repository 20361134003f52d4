"""Dynamic sparse training of a multilayer perceptron, once computed densely and once from the kept weights alone.

Run it with ``.venv/bin/python examples/sparse_training_step.py``. Both runs have the same seed and end with the same
weights up to rounding, which decides between gradients that are nearly equal; what differs is the time a step takes.
"""

import statistics
import time
from contextlib import nullcontext

import torch
from torch import nn

import srigl_fx as sx


def train(*, width: int, steps: int, batch: int, sparse: bool) -> tuple[nn.Module, float]:
    """Train on a random regression task; return the model and the median milliseconds of a step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))
    teacher = torch.randn(width, width) / width**0.5
    sx.sparsify(model, sparsity=0.95, distribution="uniform")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trainer = sx.SRigL(model, optimizer, total_steps=steps, update_every=5)
    times = []
    with sx.train.compute_sparse(trainer) if sparse else nullcontext():
        for _ in range(steps):
            x = torch.randn(batch, width)
            start = time.perf_counter()
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), (x @ teacher).relu()).backward()
            optimizer.step()
            times.append(1e3 * (time.perf_counter() - start))
    sx.verify(model, optimizer)
    return model, statistics.median(times)


def masks_shared(one: nn.Module, other: nn.Module) -> float:
    """The share of kept weights that both models keep."""
    pairs = zip(sx.masks.named_masks(one), sx.masks.named_masks(other), strict=True)
    counts = [(int((a & b).sum()), int(a.sum())) for (_, a), (_, b) in pairs]
    return sum(both for both, _ in counts) / sum(kept for _, kept in counts)


def main(*, width: int = 1024, steps: int = 24, batch: int = 256) -> float:
    """Train both ways and compare; return the share of kept weights that both keep."""
    torch.set_num_threads(1)
    dense, dense_ms = train(width=width, steps=steps, batch=batch, sparse=False)
    sparse, sparse_ms = train(width=width, steps=steps, batch=batch, sparse=True)
    shared = masks_shared(dense, sparse)
    print(f"masked dense step {dense_ms:.1f} ms, step from the kept weights {sparse_ms:.1f} ms")
    print(f"{shared:.3%} of the kept weights are the same")
    return shared


if __name__ == "__main__":
    main()
