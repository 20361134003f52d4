"""A training method of one's own, in a few lines: growth drawn at random, in proportion to the gradient.

RigL always grows the largest gradients, SET any weight. Between the two, this method draws without replacement, each
weight with a chance proportional to the magnitude of its gradient (the largest of ``|g| / E`` with E exponentially
distributed). It trains on scikit-learn's digits beside RigL and SET. Run it with
``.venv/bin/python examples/custom_update.py``; it takes some ten seconds and needs scikit-learn.
"""

import statistics

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import srigl_fx as sx
from srigl_fx.train.dynamic import DynamicTrainer, Layer
from srigl_fx.train.updates import random_scores


class SampledRigL(DynamicTrainer):
    """RigL whose growth is drawn in proportion to the gradient's magnitude."""

    def growth(self, layer: Layer) -> Tensor:
        """|g| / E: the largest of them are a weighted draw without replacement."""
        uniform = random_scores(layer.mask.shape, layer.generator(seed=0)).to(layer.mask.device)
        return layer.gradient.abs() / -torch.log1p(-uniform)


def accuracy(method: type[DynamicTrainer], seed: int, *, sparsity: float = 0.95, steps: int = 400) -> float:
    """Test accuracy in percent of a small network trained by ``method``."""
    bundle = load_digits()
    inputs, targets = torch.tensor(bundle.data, dtype=torch.float32) / 16, torch.tensor(bundle.target)
    test = torch.arange(len(inputs)) % 3 == 0
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    sx.sparsify(model, sparsity=sparsity, mask_init="random", weight_init="kaiming", seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    method(model, optimizer, total_steps=steps, update_every=10)
    for _ in range(steps):
        chosen = torch.randint(0, len(inputs) - int(test.sum()), (64,))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs[~test][chosen]), targets[~test][chosen])
        torch.autograd.backward(loss)
        optimizer.step()
    sx.verify(model, optimizer)
    with torch.no_grad():
        return 100 * float((model(inputs[test]).argmax(1) == targets[test]).float().mean())


def main(seeds: int = 3, steps: int = 400) -> dict[str, float]:
    """Print each method's mean accuracy, and return them."""
    torch.set_num_threads(1)
    means = {}
    for method in (SampledRigL, sx.RigL, sx.SET):
        scores = [accuracy(method, seed, steps=steps) for seed in range(seeds)]
        means[method.__name__] = statistics.mean(scores)
        print(f"{method.__name__:12} {means[method.__name__]:.1f} % ± {statistics.stdev(scores):.1f}")
    return means


if __name__ == "__main__":
    main()
