"""Two pages to look at: what training made of a small network, and what lowering made of that.

A convolutional network learns scikit-learn's digits at 95 % sparsity, which ablates neurons; it is lowered, and each
report is written as one HTML file that opens in any browser. Run it with
``.venv/bin/python examples/report.py FOLDER``; it takes some twenty seconds and needs scikit-learn.
"""

import sys
from collections import OrderedDict
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

import srigl_fx as sx


def network() -> nn.Sequential:
    """(N, 1, 8, 8) pictures to (N, 10) logits."""
    layers = {
        "stem": nn.Conv2d(1, 32, 3, padding=1),
        "relu0": nn.ReLU(),
        "conv": nn.Conv2d(32, 64, 3, padding=1, bias=False),
        "norm": nn.BatchNorm2d(64),
        "relu1": nn.ReLU(),
        "pool": nn.MaxPool2d(2),
        "flatten": nn.Flatten(),
        "fc1": nn.Linear(1024, 512),
        "relu2": nn.ReLU(),
        "fc2": nn.Linear(512, 256),
        "relu3": nn.ReLU(),
        "head": nn.Linear(256, 10),
    }
    return nn.Sequential(OrderedDict(layers))


def train(steps: int) -> tuple[nn.Module, float]:
    """The network, sparse from the first step on, and its accuracy on the third of the digits it has not seen."""
    bundle = load_digits()
    inputs = torch.tensor(bundle.images, dtype=torch.float32).unsqueeze(1) / 16
    targets = torch.tensor(bundle.target)
    test = torch.arange(len(inputs)) % 3 == 0
    torch.manual_seed(0)
    model = sx.sparsify(network(), sparsity=0.95, rules={"stem": None, "head": None})
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    sx.SRigL(model, optimizer, total_steps=steps, update_every=10, ablation=0.7)
    for _ in range(steps):
        chosen = torch.randint(0, len(inputs) - int(test.sum()), (64,))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs[~test][chosen]), targets[~test][chosen])
        torch.autograd.backward(loss)
        optimizer.step()
    model.eval()
    with torch.no_grad():
        return model, float((model(inputs[test]).argmax(1) == targets[test]).float().mean())


def main(folder: Path, steps: int = 400) -> tuple[Path, Path]:
    """Train, lower, and write ``summary.html`` and ``lowering.html`` to ``folder``."""
    torch.set_num_threads(1)
    model, accuracy = train(steps)
    summary, lowering = folder / "summary.html", folder / "lowering.html"
    sx.summary(model).save_html(summary, title="Digits network after training")
    lowered = sx.lower(model, (torch.rand(1, 1, 8, 8),), batch_sizes=(1, 64))
    lowered.report.save_html(lowering, title="Digits network, lowered")
    print(f"{accuracy:.1%} right; see {summary} and {lowering}")
    return summary, lowering


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
