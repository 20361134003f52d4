"""Sparse training in the Trainer of Lightning: handwritten digits, with TensorBoard logs.

Needs the extras ``[lightning,tensorboard]`` and scikit-learn. Run it with
``.venv/bin/python examples/train_lightning.py``.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import srigl_fx as sx
from srigl_fx.integrations.lightning import SRigLCallback


class Digits(LightningModule):
    """Stands for your module: nothing in it knows about sparsity but the line that sparsifies the network."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
        sx.sparsify(self.net, sparsity=0.8)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The loss of one batch."""
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """An ordinary optimizer."""
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def main(folder: Path, epochs: int = 10) -> float:
    """Train on a part of the digits, return the accuracy on the rest."""
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    held_out = torch.arange(len(y)) % 5 == 0
    model, callback = Digits(), SRigLCallback(update_every=20)
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[callback],
        logger=TensorBoardLogger(folder),
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(TensorDataset(x[~held_out], y[~held_out]), batch_size=64, shuffle=True))
    print(sx.summary(model))
    with torch.no_grad():
        accuracy = float((model.net(x[held_out]).argmax(1) == y[held_out]).float().mean())
    assert callback.metrics is not None
    print(f"{accuracy:.1%} right; {callback.metrics.postfix()}")
    return accuracy


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        main(Path(folder))
