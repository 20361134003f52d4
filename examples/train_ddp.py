"""Data parallel sparse training on scikit-learn's digits, saved and resumed.

Run it with ``torchrun --nproc-per-node 2 examples/train_ddp.py``; it takes a few seconds on two CPU cores.
"""

import argparse
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import srigl_fx as sx

TEST = 400  # digits held out


def digits() -> tuple[TensorDataset, Tensor, Tensor]:
    """Training set, test images (N, 64) and test labels."""
    bundle = load_digits()
    images = torch.as_tensor(bundle.data / 16, dtype=torch.float32)
    labels = torch.as_tensor(bundle.target)
    return TensorDataset(images[TEST:], labels[TEST:]), images[:TEST], labels[:TEST]


def network() -> nn.Sequential:
    """Stands for your model: nothing in it knows about sparsity or processes."""
    return nn.Sequential(
        nn.Linear(64, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )


def train(checkpoint: Path, epochs: int, resume: bool) -> float:
    """Train some epochs and save; return the accuracy on the test images."""
    dataset, test_images, test_labels = digits()
    sampler: DistributedSampler[tuple[Tensor, ...]] = DistributedSampler(dataset)
    loader = DataLoader(dataset, batch_size=32, sampler=sampler, drop_last=True)

    # The order matters: sparsify, then wrap, then the optimizer, then the trainer.
    model = DistributedDataParallel(sx.sparsify(network(), sparsity=0.9))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    trainer = sx.SRigL(model, optimizer, total_steps=20 * len(loader), update_every=15)

    first = 0
    if resume:
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        trainer.load_state_dict(state["trainer"])
        first = state["epoch"]

    for epoch in range(first, first + epochs):  # an ordinary loop
        sampler.set_epoch(epoch)
        for images, labels in loader:
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    trainer_state = trainer.state_dict()  # on every process: what is summed on each must be joined
    if dist.get_rank() == 0:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "trainer": trainer_state}
        torch.save({**state, "epoch": first + epochs}, checkpoint.with_suffix(".new"))
        os.replace(checkpoint.with_suffix(".new"), checkpoint)
    dist.barrier()

    sx.verify(model, optimizer)
    with torch.no_grad():
        accuracy = (model.module.eval()(test_images).argmax(1) == test_labels).float().mean()
    if dist.get_rank() == 0:
        print(f"step {trainer.steps}: {float(accuracy):.1%} right, {sx.summary(model).sparsity:.1%} sparse")
    return float(accuracy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=4, help="before the save, and as many after the resume")
    epochs = parser.parse_args().epochs
    torch.set_num_threads(1)
    dist.init_process_group("gloo")  # "nccl" with one GPU a process
    with TemporaryDirectory() as own:
        shared = [own]
        dist.broadcast_object_list(shared)  # all processes use the first one's folder
        checkpoint = Path(shared[0]) / "checkpoint.pt"
        train(checkpoint, epochs, resume=False)
        train(checkpoint, epochs, resume=True)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
