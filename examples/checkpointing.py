"""A training run that survives being killed: a checkpoint every few steps, and the same weights in the end.

Run it with ``.venv/bin/python examples/checkpointing.py last.safetensors``; kill it whenever you like, or let it kill
itself with ``--kill-at 70``, and run it again: it goes on from the last checkpoint, and the fingerprint of the final
weights is that of a run that was never interrupted.
"""

import argparse
import hashlib
import os
import signal
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

import srigl_fx as sx
from srigl_fx.train import checkpoint

BATCH = 64


def main(path: Path, *, steps: int, every: int, kill_at: int | None) -> str:
    """Train on scikit-learn's digits, from ``path`` on if it exists; return a fingerprint of the final weights."""
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Dropout(0.1), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )
    sx.sparsify(model, sparsity=0.9, rules={"5": None})
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    trainer = sx.SRigL(model, optimizer, total_steps=steps, update_every=10)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.Generator().manual_seed(0)  # of the data; its state is saved like everything else

    first = 0
    if path.exists():
        extra = checkpoint.load(path, model=model, optimizer=optimizer, trainer=trainer)
        first = extra["step"]
        scheduler.load_state_dict(extra["scheduler"])
        order.set_state(extra["order"])
        torch.set_rng_state(extra["rng"])  # last: building the model drew from it
        print(f"resumed at step {first}")

    for step in range(first, steps):
        if step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        batch = torch.randint(len(x), (BATCH,), generator=order)
        loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if (step + 1) % every == 0:
            extra = {
                "step": step + 1,
                "scheduler": scheduler.state_dict(),
                "order": order.get_state(),
                "rng": torch.get_rng_state(),
            }
            # Written to another file, then renamed: a kill during this line leaves the checkpoint before it.
            checkpoint.save(path, model=model, optimizer=optimizer, trainer=trainer, extra=extra)

    sx.verify(model, optimizer)
    model.eval()
    accuracy = (model(x).argmax(dim=1) == y).float().mean()
    state = b"".join(value.numpy().tobytes() for value in model.state_dict().values())
    fingerprint = hashlib.sha256(state).hexdigest()
    print(f"{accuracy:.1%} right; fingerprint of weights and masks {fingerprint[:16]}")
    return fingerprint


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path, help="the checkpoint; training resumes from it if it exists")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps in all")
    parser.add_argument("--every", type=int, default=20, help="steps between checkpoints")
    parser.add_argument("--threads", type=int, default=None, help="sums are rounded as their number has it")
    parser.add_argument("--kill-at", type=int, default=None, help="die at this step, as in a power cut")
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    main(arguments.path, steps=arguments.steps, every=arguments.every, kill_at=arguments.kill_at)
