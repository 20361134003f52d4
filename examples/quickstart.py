"""The whole path in six lines, on a model of your own: trained for a few seconds, served in ONNX Runtime.

Run it with ``.venv/bin/python examples/quickstart.py``.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import nn

import srigl_fx as sx


class Classifier(nn.Module):
    """Stands for your model: nothing in it knows about sparsity."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU())
        self.head = nn.Linear(512, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 64) features to (N, 4) logits."""
        logits: torch.Tensor = self.head(self.body(x))
        return logits


def main(folder: Path, steps: int = 300) -> float:
    """Train, export and serve; return the largest difference between PyTorch and ONNX Runtime."""
    torch.manual_seed(0)
    teacher = torch.randn(64, 4)

    model = sx.sparsify(Classifier(), sparsity=0.9, rules={"head": None})  # 1: masks, in place
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    sx.SRigL(model, optimizer, total_steps=steps, update_every=20)  # 2: the loop below stays ordinary
    for _ in range(steps):
        x = torch.randn(128, 64)
        loss = nn.functional.cross_entropy(model(x), (x @ teacher).argmax(dim=1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(sx.summary(model))  # 3: what became of each weight

    x = torch.randn(256, 64)
    fast = sx.lower(model.eval(), (x[:1],))  # 4: masks -> condensed operators, in PyTorch
    sx.export_onnx(model.eval(), folder / "model.onnx", (x[:2],))  # 5: one ONNX file
    session = sx.runtime.load(folder / "model.onnx")  # 6: an onnxruntime.InferenceSession
    logits = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]

    with torch.no_grad():
        expected, lowered = model(x).numpy(), fast(x[:1]).numpy()
    np.testing.assert_allclose(lowered, expected[:1], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    accuracy = float((logits.argmax(axis=1) == (x @ teacher).argmax(dim=1).numpy()).mean())
    difference = float(np.abs(logits - expected).max())
    print(f"{accuracy:.0%} right; PyTorch and ONNX Runtime differ by at most {difference:.1e}")
    return difference


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        main(Path(folder))
