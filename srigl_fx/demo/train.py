"""How the demonstration trains: an ordinary PyTorch loop, with two lines that make it sparse.

Owns the recipes and the loop; it must not know about lowering, files or tables. The loop is the same for dense,
static sparse and SRigL training: only :func:`prepare` differs.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

import srigl_fx as sx
from srigl_fx.demo import data, models

Method = Literal["dense", "static", "srigl"]
METHOD_NAMES: dict[Method, str] = {"dense": "dense", "static": "static sparse", "srigl": "SRigL"}
SEED = 0


@dataclass(frozen=True, kw_only=True)
class Task:
    """A network, its data and the recipe to train it.

    Attributes:
        name: Short name, used in file names.
        build: Makes the untrained network.
        split: Makes the data.
        augment: What is done to the images of a training batch.
        loss: Mean loss of outputs against targets.
        steps: Optimizer steps.
        batch: Batch size.
        learning_rate: Peak learning rate of AdamW; it warms up, then falls to zero along a cosine.
        update_every: Optimizer steps between two topology updates of SRigL.
        ablation: SRigL's ablation threshold; the paper takes 0.3 for convolutional networks, 0.95 for transformers.
        threads: Threads to train with; in small networks several would mostly wait for one another.
        convolutional: Whether int8 has given scales, as ONNX Runtime's guide says of such networks; else each call
            finds its own.
    """

    name: str
    build: Callable[[], nn.Module]
    split: Callable[[], data.Split]
    augment: Callable[[Tensor, torch.Generator], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    steps: int
    batch: int
    learning_rate: float
    update_every: int
    ablation: float
    threads: int
    convolutional: bool = False


TASKS = (
    Task(
        name="vit",
        build=models.VisionTransformer,
        split=data.digits,
        augment=data.as_is,
        loss=functional.cross_entropy,
        steps=450,
        batch=64,
        learning_rate=8e-3,
        update_every=25,
        ablation=0.95,
        threads=1,
    ),
    Task(
        name="cnn",
        build=models.ResidualNetwork,
        split=data.digits,
        augment=data.shift,
        loss=functional.cross_entropy,
        steps=200,
        batch=64,
        learning_rate=5e-3,
        update_every=15,
        ablation=0.3,
        threads=1,
        convolutional=True,
    ),
)
WIDE = Task(
    name="wide",
    build=models.denoiser,
    split=data.noisy_digits,
    augment=data.add_noise,
    loss=functional.mse_loss,
    steps=200,
    batch=32,
    learning_rate=1e-3,
    update_every=40,
    ablation=0.3,
    threads=os.cpu_count() or 1,
)


@dataclass(frozen=True)
class Snapshot:
    """One layer at one step of training."""

    step: int
    layer: str
    fan_in: float
    active: int
    neurons: int


@dataclass
class Run:
    """A trained model and how its layers changed on the way."""

    task: Task
    method: Method
    sparsity: float
    model: nn.Module
    split: data.Split
    seconds: float
    history: list[Snapshot] = field(default_factory=list)

    @property
    def title(self) -> str:
        """What people read: the method and its sparsity."""
        return METHOD_NAMES[self.method] + (f" {self.sparsity:.0%}" if self.method != "dense" else "")

    def file_name(self, *, eight_bits: bool = False) -> str:
        """The name of the ONNX file in float32, or in int8."""
        sparsity = f"_{round(100 * self.sparsity)}" if self.method != "dense" else ""
        return f"{self.task.name}_{self.method}{sparsity}{'_int8' * eight_bits}.onnx"


def prepare(model: nn.Module, method: Method, sparsity: float, task: Task, steps: int) -> torch.optim.Optimizer:
    """Make ``model`` sparse as ``method`` says and return its optimizer: all that sparse training adds to a script."""
    if method != "dense":
        sx.sparsify(model, sparsity=sparsity, mask_init="random", seed=SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.learning_rate, weight_decay=0.05, fused=True)
    if method == "srigl":
        sx.SRigL(
            model,
            optimizer,
            total_steps=steps,
            update_every=task.update_every,
            ablation=task.ablation,
            protect="output",  # as the published results of the demo were trained
        )
    elif method == "static":
        sx.Static(model, optimizer, total_steps=steps)
    return optimizer


def train(task: Task, method: Method, sparsity: float = 0.0, *, steps: int | None = None) -> Run:
    """Train ``task``'s network from scratch, with a progress bar, and return it in eval mode."""
    steps = task.steps if steps is None else steps
    torch.set_num_threads(task.threads)
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    split = task.split()
    model = task.build()
    optimizer = prepare(model, method, sparsity, task, steps)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, task.learning_rate, total_steps=steps, pct_start=0.1)

    run = Run(task, method, sparsity, model, split, seconds=0.0, history=snapshots(model, 0))
    started = time.perf_counter()
    bar = tqdm(range(1, steps + 1), desc=f"{task.name:>4} {run.title:<17}", unit="step", mininterval=0.5)
    for step in bar:
        chosen = torch.randint(len(split.train_x), (task.batch,), generator=generator)
        inputs, targets = task.augment(split.train_x[chosen], generator), split.train_y[chosen]

        optimizer.zero_grad()
        loss = task.loss(model(inputs), targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()

        if step % task.update_every == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
            run.history += snapshots(model, step)
    run.seconds = time.perf_counter() - started
    model.eval()
    return run


def snapshots(model: nn.Module, step: int) -> list[Snapshot]:
    """Mean fan-in of the active neurons and their number, for each sparse weight of ``model``; [] if it is dense."""
    taken = []
    for name, mask in sx.masks.named_masks(model):
        fan_ins = mask.flatten(1).sum(dim=1)
        active = int((fan_ins > 0).sum())
        taken.append(
            Snapshot(step, name.removesuffix(".weight"), int(fan_ins.sum()) / max(active, 1), active, len(mask))
        )
    return taken
