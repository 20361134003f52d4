"""Do ablated neurons come back for a reason? What batch normalisation does to SRigL's revivals, and two remedies.

A neuron without weights feeds batch normalisation a constant, so its gradients come out multiplied by 1 / sqrt(eps).
They fill the largest gradients of the layer, and the neuron comes back at the next update, whatever it is worth. This
script trains a small network of two hidden layers, a small convolutional network (both on scikit-learn's digits) and
a toy regression, each with and without batch normalisation, and counts how many neurons come back under each
treatment. Run it with ``.venv/bin/python examples/batchnorm_revival.py``; it takes some 80 seconds and needs
scikit-learn.
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import srigl_fx as sx
from srigl_fx.masks import named_masks
from srigl_fx.train.dynamic import Layer


class ToTheMean(sx.SRigL):
    """A stricter remedy that we tried: no dead row may exceed the mean gradient of the live rows."""

    def new_mask(self, layer: Layer) -> Tensor:
        """The mask for the scaled gradient."""
        live = layer.mask.any(dim=1)
        rows = layer.gradient.abs().mean(dim=1)
        factor = torch.where(live, 1.0, (rows[live].mean() / rows).nan_to_num(1.0).clamp(max=1.0))
        return super().new_mask(replace(layer, gradient=layer.gradient * factor[:, None]))


TREATMENTS: dict[str, tuple[type[sx.SRigL], dict[str, Any]]] = {
    "reference": (sx.SRigL, {"revival": "reference"}),
    "scaled": (sx.SRigL, {"revival": "scaled"}),
    "to the mean": (ToTheMean, {"revival": "reference"}),
    "permanent": (sx.SRigL, {"permanent_ablation": True}),
}


@dataclass(frozen=True)
class Task:
    """Inputs and targets for training and testing; the score is accuracy, or R^2 for real targets."""

    inputs: Tensor
    targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor

    def score(self, model: nn.Module) -> float:
        """Share of correct test predictions, or of the targets' variance explained, in percent."""
        with torch.no_grad():
            outputs = model.eval()(self.test_inputs)
        if self.test_targets.is_floating_point():
            residual = (outputs - self.test_targets).square().mean()
            return 100 * float(1 - residual / self.test_targets.var(correction=0))
        return 100 * float((outputs.argmax(1) == self.test_targets).float().mean())

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Squared error or cross entropy."""
        if targets.is_floating_point():
            return nn.functional.mse_loss(outputs, targets)
        return nn.functional.cross_entropy(outputs, targets)


def digits(image: bool) -> Task:
    """The 1797 handwritten digits of 8 x 8 pixels, every third one for testing."""
    bundle = load_digits()
    inputs = torch.tensor(bundle.data, dtype=torch.float32) / 16
    targets = torch.tensor(bundle.target)
    test = torch.arange(len(inputs)) % 3 == 0
    if image:
        inputs = inputs.reshape(-1, 1, 8, 8)
    return Task(inputs[~test], targets[~test], inputs[test], targets[test])


def toy() -> Task:
    """A random small network of 32 inputs and 4 outputs, to be learned from 1024 samples."""
    generator = torch.Generator().manual_seed(7)
    first, second = (torch.randn(shape, generator=generator) for shape in ((32, 16), (16, 4)))
    inputs = torch.randn(1536, 32, generator=generator)
    targets = (inputs @ first / 32**0.5).relu() @ second / 4
    return Task(inputs[:1024], targets[:1024], inputs[1024:], targets[1024:])


def mlp(inputs: int, outputs: int, normalised: bool) -> nn.Module:
    """Two hidden layers of 128."""
    layers: list[nn.Module] = []
    for before in (inputs, 128):
        layers += [nn.Linear(before, 128), *([nn.BatchNorm1d(128)] if normalised else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(128, outputs))


def cnn(normalised: bool) -> nn.Module:
    """Three convolutions of 24 channels and a linear layer."""
    layers: list[nn.Module] = []
    for before in (1, 24, 24):
        layers += [nn.Conv2d(before, 24, 3, padding=1), *([nn.BatchNorm2d(24)] if normalised else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(24 * 16, 10))


CASES: dict[str, tuple[Callable[[], Task], Callable[[bool], nn.Module]]] = {
    "digits, MLP": (lambda: digits(image=False), lambda normalised: mlp(64, 10, normalised)),
    "digits, CNN": (lambda: digits(image=True), cnn),
    "toy, MLP": (toy, lambda normalised: mlp(32, 4, normalised)),
}


def dead_rows(model: nn.Module) -> dict[str, Tensor]:
    """Which neurons of each weight have no connection."""
    return {name: ~mask.flatten(1).any(dim=1) for name, mask in named_masks(model)}


def run(
    task: Task, model: nn.Module, treatment: str, steps: int, seed: int, ablation: float, sparsity: float
) -> tuple[int, float, float]:
    """Train once; return the revivals, the share of active neurons and the score, both in percent."""
    torch.manual_seed(seed)
    sx.sparsify(model, sparsity=sparsity, weight_init="kaiming", mask_init="random", seed=seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    method, options = TREATMENTS[treatment]
    method(model, optimizer, total_steps=steps, update_every=8, ablation=ablation, **options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    dead, revivals = dead_rows(model), 0
    for _ in range(steps):
        chosen = torch.randint(len(task.inputs), (64,), generator=generator)
        optimizer.zero_grad()
        torch.autograd.backward(task.loss(model(task.inputs[chosen]), task.targets[chosen]))
        optimizer.step()
        schedule.step()
        now = dead_rows(model)
        revivals += sum(int((dead[name] & ~now[name]).sum()) for name in now)
        dead = now
    active = torch.cat([~rows for rows in dead.values()]).float().mean()
    return revivals, 100 * float(active), task.score(model)


def main(seeds: int = 3, steps: int = 320, ablation: float = 0.9, sparsity: float = 0.9) -> list[list[str]]:
    """Print the table, and return its rows."""
    torch.set_num_threads(1)
    rows = []
    print("| task | batch norm | revival | neurons that came back | active neurons % | score % |")
    print("|---|---|---|---|---|---|")
    for case, (make_task, make_model) in CASES.items():
        task = make_task()
        for normalised in (True, False):
            for treatment in TREATMENTS:
                results = []
                for seed in range(seeds):
                    torch.manual_seed(seed)
                    model = make_model(normalised)
                    results.append(run(task, model, treatment, steps, seed, ablation, sparsity))
                revivals, active, scores = zip(*results, strict=True)
                score = f"{statistics.mean(scores):.1f} ± {statistics.stdev(scores):.1f}"
                numbers = [f"{statistics.mean(revivals):.0f}", f"{statistics.mean(active):.0f}", score]
                rows.append([case, "yes" if normalised else "no", treatment, *numbers])
                print("| " + " | ".join(rows[-1]) + " |", flush=True)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Count the neurons that come back under SRigL, and what it costs.")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind, at least 2")
    parser.add_argument("--steps", type=int, default=320, help="optimizer steps a run")
    parser.add_argument("--ablation", type=float, default=0.9, help="gamma_sal")
    parser.add_argument("--sparsity", type=float, default=0.9, help="share of weights removed")
    arguments = parser.parse_args()
    main(arguments.seeds, arguments.steps, arguments.ablation, arguments.sparsity)
