"""One run: a task, a method, a sparsity and a seed in, a row of results out.

Owns the recipes and the training loop, which is the same for every method: initialisation seeds, order of the data,
optimizer, learning rate and number of steps do not depend on the method. It must not know files or figures.
"""

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

import srigl_fx as sx
from claims import data, models

Batch = tuple[Tensor, Tensor]
TEST_BATCH = 128
Trainer = Literal["Static", "SET", "RigL", "SRigL"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A network, its data and the recipe that all methods share.

    Attributes:
        title: What people read.
        build: Makes the untrained network.
        split: Makes the data.
        draw: A training batch of so many samples.
        sparsities: What is asked of :func:`srigl_fx.sparsify`.
        seeds: How many seeds.
        dense: Modules that stay dense for every method: the first layer, whose neurons see a handful of pixels.
        steps: Optimizer steps.
        batch: Samples a step.
        learning_rate: Peak of AdamW's; the best of a few for the dense network.
        update_every: Optimizer steps between two topology updates.
        gamma: Ablation threshold of SRigL as the paper sets it for this kind of network.
        other_gamma: The threshold the paper sets for the other kind.
        positions: How often a weight is used for one sample, by the first prefix of its name that fits.
        bits: Whether the score is bits per character, where less is better, rather than accuracy in percent.
    """

    title: str
    build: Callable[[], nn.Module]
    split: Callable[[], data.Split]
    draw: Callable[[data.Split, int, torch.Generator], Batch]
    sparsities: tuple[float, ...] = (0.8, 0.9, 0.95, 0.98, 0.99)
    seeds: int = 5
    dense: tuple[str, ...] = ()
    steps: int
    batch: int
    learning_rate: float
    update_every: int
    gamma: float
    other_gamma: float
    positions: Mapping[str, int]
    bits: bool = False

    @property
    def unit(self) -> str:
        """The axis of the score."""
        return "bits per character on held-out text" if self.bits else "test accuracy (%)"


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to train sparsely; ``trainer`` None is the dense network."""

    title: str
    trainer: Trainer | None
    ablation: Callable[[Task], float] | None = None

    @property
    def constant_fan_in(self) -> bool:
        """Whether all neurons of a layer keep equally many weights."""
        return self.trainer == "SRigL"


@dataclass(frozen=True, order=True)
class Key:
    """What tells one run from another."""

    seed: int
    task: str
    method: str
    sparsity: float
    steps: int


def draw_images(split: data.Split, size: int, generator: torch.Generator) -> Batch:
    """Random images."""
    chosen = torch.randint(len(split.train_x), (size,), generator=generator)
    return split.train_x[chosen], split.train_y[chosen]


def draw_moved_images(split: data.Split, size: int, generator: torch.Generator) -> Batch:
    """Random images, moved together by up to one pixel each way."""
    images, labels = draw_images(split, size, generator)
    down, right = torch.randint(-1, 2, (2,), generator=generator).tolist()
    return torch.roll(images, (down, right), dims=(2, 3)), labels


def draw_text(split: data.Split, size: int, generator: torch.Generator) -> Batch:
    """Random windows of the text, and the same one character later."""
    starts = torch.randint(len(split.train_x) - data.CONTEXT, (size, 1), generator=generator)
    windows = split.train_x[starts + torch.arange(data.CONTEXT + 1)].long()
    return windows[:, :-1], windows[:, 1:]


TASKS = {
    "cnn": Task(
        title="digits, CNN with BatchNorm",
        build=models.ConvNet,
        split=data.digits,
        draw=draw_moved_images,
        dense=("stem",),
        steps=250,
        batch=64,
        learning_rate=5e-3,
        update_every=10,
        gamma=0.3,
        other_gamma=0.95,
        positions={"stem": 64, "blocks.0": 64, "blocks.1": 16, "blocks.2": 4, "head": 1},
    ),
    "vit": Task(
        title="digits, vision transformer",
        build=models.VisionTransformer,
        split=data.digits,
        draw=draw_images,
        dense=("patches",),
        steps=500,
        batch=32,
        learning_rate=2e-3,
        update_every=10,
        gamma=0.95,
        other_gamma=0.3,
        positions={"head": 1, "": 16},
    ),
    "gpt": Task(
        title="Python sources, character GPT",
        build=models.GPT,
        split=data.library_text,
        draw=draw_text,
        sparsities=(0.8, 0.9, 0.95),
        seeds=3,
        steps=1000,
        batch=16,
        learning_rate=6e-3,
        update_every=20,
        gamma=0.95,
        other_gamma=0.3,
        positions={"": data.CONTEXT},
        bits=True,
    ),
}
METHODS = {
    "dense": Method(title="dense", trainer=None),
    "static": Method(title="Static", trainer="Static"),
    "set": Method(title="SET", trainer="SET"),
    "rigl": Method(title="RigL", trainer="RigL"),
    "srigl_no_ablation": Method(title="SRigL w/o ablation", trainer="SRigL"),
    "srigl": Method(title="SRigL", trainer="SRigL", ablation=lambda task: task.gamma),
    "srigl_other_gamma": Method(title="SRigL, other gamma", trainer="SRigL", ablation=lambda task: task.other_gamma),
}


def prepare(model: nn.Module, optimizer: torch.optim.Optimizer, key: Key, group_size: int = 1) -> None:
    """All that sparse training adds to the script: masks for the model, a trainer for its optimizer."""
    task, method = TASKS[key.task], METHODS[key.method]
    if method.trainer is None:
        return
    sx.sparsify(
        model,
        sparsity=key.sparsity,
        structure="constant_fan_in" if method.constant_fan_in else "unstructured",
        group_size=group_size,
        rules=dict.fromkeys(task.dense, None),
        mask_init="random",
        weight_init="torch",  # PyTorch's own initialisation, for the fan-in that is left
        strict=True,
        seed=key.seed,
    )
    steps, every = key.steps, min(task.update_every, max(1, key.steps // 4))  # a shortened run has updates, too
    if method.trainer == "Static":
        sx.Static(model, optimizer, total_steps=steps)
    elif method.trainer == "SET":
        sx.SET(model, optimizer, total_steps=steps, update_every=every, seed=key.seed)
    elif method.trainer == "RigL":
        sx.RigL(model, optimizer, total_steps=steps, update_every=every)
    else:
        ablation = method.ablation(task) if method.ablation else None
        # The rows were trained with only the outputs protected, as in the paper; the library's default protects more.
        sx.SRigL(model, optimizer, total_steps=steps, update_every=every, ablation=ablation, protect="output")


@dataclass(frozen=True)
class Trained:
    """What a run leaves: the network, which weights were part of it at some time, and how long training took.

    Attributes:
        model: The network, in training mode, masks in place.
        explored: For each mask, what was kept by it at any step that was looked at.
        cpu_seconds: Processor time of the training loop.
    """

    model: nn.Module
    explored: Mapping[str, Tensor]
    cpu_seconds: float


def train(key: Key, group_size: int = 1) -> Trained:
    """Train one network, in which so many neighbouring neurons share their inputs."""
    task = TASKS[key.task]
    split = task.split()
    torch.manual_seed(key.seed)
    model = task.build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.learning_rate, weight_decay=0.05, fused=True)
    prepare(model, optimizer, key, group_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, task.learning_rate, total_steps=key.steps, pct_start=max(0.1, 2 / key.steps)
    )
    generator = torch.Generator().manual_seed(key.seed)
    explored = {name: mask.clone() for name, mask in sx.masks.named_masks(model)}

    started = time.process_time()
    for step in range(1, key.steps + 1):
        inputs, targets = task.draw(split, task.batch, generator)
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs), targets).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % task.update_every == 0:
            for name, mask in sx.masks.named_masks(model):
                explored[name] |= mask
    return Trained(model, explored, time.process_time() - started)


def execute(key: Key, group_size: int = 1) -> dict[str, object]:
    """Train and test one network; the columns of a row by name."""
    task, method, trained = TASKS[key.task], METHODS[key.method], train(key, group_size)
    return {
        "score": round(evaluate(trained.model, task.split(), task), 4),
        "train_cpu_seconds": round(trained.cpu_seconds, 2),
        **topology(trained.model, task, method, trained.explored),
    }


@torch.no_grad()
def evaluate(model: nn.Module, split: data.Split, task: Task) -> float:
    """Accuracy in percent on the test images, or bits per character of the test text."""
    model.eval()
    logits = torch.cat([model(part) for part in torch.split(split.test_x, TEST_BATCH)])
    return bits(logits, split) if task.bits else 100 * float((logits.argmax(dim=1) == split.test_y).float().mean())


def bits(logits: Tensor, split: data.Split) -> float:
    """Cross-entropy in bits, a prediction, of the logits (N, classes, ...) of the test data."""
    return float(functional.cross_entropy(logits, split.test_y)) / math.log(2)


def topology(model: nn.Module, task: Task, method: Method, explored: Mapping[str, Tensor]) -> dict[str, object]:
    """What is left of the network: sparsity, active neurons, share of weights ever tried, cost of training."""
    if method.trainer is None:
        return {"sparsity_masked": 0, "sparsity_all": 0, "active_share": 1, "itop": 1, "train_flops": 1, "layers": "{}"}
    report = sx.summary(model)
    sparse = [row for row in report.rows if row.status != "dense"]
    layers = {row.name: [row.active_neurons, row.neurons, row.fan_in, row.dense_fan_in] for row in sparse}
    tried = sum(int(mask.sum()) for mask in explored.values())
    used = [
        (row, next(count for prefix, count in task.positions.items() if row.name.startswith(prefix)))
        for row in report.rows
        if not row.name.startswith(("characters", "position"))  # looked up or added, not multiplied
    ]
    dense_cost = sum(count * row.neurons * row.dense_fan_in for row, count in used)
    ratio = sum(count * row.kept for row, count in used) / dense_cost
    cost = ratio
    if method.trainer in ("RigL", "SRigL"):  # a dense gradient once per update (RigL, Evci et al., 2020, appendix H)
        cost = (3 * ratio * task.update_every + 2 * ratio + 1) / (3 * (task.update_every + 1))
    return {
        "sparsity_masked": round(report.masked_sparsity, 5),
        "sparsity_all": round(report.sparsity, 5),
        "active_share": round(sum(row.active_neurons for row in sparse) / sum(row.neurons for row in sparse), 5),
        "itop": round(tried / sum(mask.numel() for mask in explored.values()), 5),
        "train_flops": round(cost, 5),
        "layers": json.dumps(layers),
    }
