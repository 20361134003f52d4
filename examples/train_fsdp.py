"""Sparse training of a transformer whose weights are sharded over processes (FSDP2), on scikit-learn's digits.

Run it with ``torchrun --nproc-per-node 2 examples/train_fsdp.py``; it takes a few seconds on two CPU cores.
"""

import argparse

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

import srigl_fx as sx

TEST = 400  # digits held out


class Transformer(nn.Module):
    """Each of the 8 rows of an image is a token."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.position = nn.Parameter(torch.randn(8, width) * 0.1)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True) for _ in range(2)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """(N, 8, 8) images to (N, 10) logits."""
        tokens = self.embed(images) + self.position
        for block in self.blocks:
            tokens = block(tokens)
        logits: Tensor = self.head(tokens.mean(1))
        return logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=120)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    dist.init_process_group("gloo")  # "nccl" with one GPU a process
    rank, processes = dist.get_rank(), dist.get_world_size()
    bundle = load_digits()
    images = torch.as_tensor(bundle.images / 16, dtype=torch.float32)
    labels = torch.as_tensor(bundle.target)

    # The order matters: sparsify, then shard, then the optimizer, then the trainer.
    torch.manual_seed(0)
    model = sx.sparsify(Transformer(), sparsity=0.8, rules={"embed": None})
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    trainer = sx.SRigL(model, optimizer, total_steps=steps, update_every=10)

    torch.manual_seed(rank)
    for _ in range(steps):  # an ordinary loop; each process draws a batch of its own
        batch = torch.randint(TEST, len(images), (64 // processes,))
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    sx.verify(model, optimizer)

    # The whole weights and masks, on the first process: a model that can be lowered, exported or finalized.
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        trained = sx.sparsify(Transformer(), sparsity=0.8, rules={"embed": None})
        trained.load_state_dict(state)
        sx.verify(trained)
        with torch.no_grad():
            accuracy = (trained.eval()(images[:TEST]).argmax(1) == labels[:TEST]).float().mean()
        print(f"step {trainer.steps}, last update at {trainer.last_update}: {float(accuracy):.1%} right")
        print(sx.summary(trained))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
