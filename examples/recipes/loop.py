"""The training loop of the image recipes: plain PyTorch, in which one line attaches SRigL.

Under ``torchrun`` each process takes its share of every batch. A checkpoint is written after each epoch, whole or not
at all; a run that begins where one is goes on from it, with the same weights in the end as without the interruption:
random numbers begin anew with every epoch. Owns the loop. It must not know networks or data sets.
"""

import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import srigl_fx as sx
from recipes.images import Loaders, loaders, mixer
from recipes.settings import ImageRecipe
from srigl_fx.train import checkpoint
from srigl_fx.train.metrics import MaskMetrics

SEED = 42


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a run decides beside its recipe.

    Attributes:
        data: The folder of the data; None for random images.
        out: The folder of checkpoint and log.
        amp: The dtype of autocast, None for none.
        ema: The decay of the average of weights; 0 for none.
        workers: Processes that read images, for each that trains.
        stop_after: Epochs after which this run ends; a later one goes on.
    """

    data: Path | None
    out: Path
    amp: torch.dtype | None = None
    ema: float = 0.0
    workers: int = 0
    stop_after: int | None = None


class Run:
    """One process of a run: everything that a checkpoint holds, built anew and then loaded."""

    def __init__(self, recipe: ImageRecipe, options: Options, rank: int, processes: int) -> None:
        self.recipe, self.options, self.rank = recipe, options, rank
        # Each process has made its GPU the current one.
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.data: Loaders = loaders(
            recipe, options.data, processes=processes, rank=rank, workers=options.workers, seed=SEED
        )
        torch.manual_seed(SEED)
        # The order matters: sparsify, then wrap, then the optimizer, then the trainer.
        self.model = sx.sparsify(
            recipe.build(),
            sparsity=recipe.sparsity,
            distribution=recipe.distribution,
            weight_init="kaiming",
            rules=dict.fromkeys(recipe.dense),
        ).to(self.device)
        self.parallel = DistributedDataParallel(self.model) if processes > 1 else None
        self.wrapped: nn.Module = self.model if self.parallel is None else self.parallel
        self.optimizer = _optimizer(recipe, self.wrapped)
        self.steps_an_epoch = len(self.data.train) // recipe.micro_batches
        self.trainer = sx.SRigL(
            self.wrapped,
            self.optimizer,
            total_steps=max(1, round(recipe.epochs * self.steps_an_epoch)),
            ablation=recipe.ablation,
            update_every=recipe.update_every,
            grad_samples=recipe.grad_samples,
            drop_fraction=recipe.drop_fraction,
            stop_at=recipe.stop_at,
        )
        self.metrics = MaskMetrics(self.trainer)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=options.amp is torch.float16)
        average = get_ema_multi_avg_fn(options.ema)  # type: ignore[no-untyped-call]
        self.average = AveragedModel(self.model, multi_avg_fn=average) if options.ema else None
        self.loss = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
        self.mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = mixer(recipe)

    def epoch(self, epoch: int) -> float:
        """Train one epoch; return the mean loss of this process."""
        torch.manual_seed(SEED + 1000 * (epoch + 1) + self.rank)
        self.data.sampler.set_epoch(epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate(epoch)
        self.wrapped.train()
        losses, parts = [], self.recipe.micro_batches
        # What is left when all steps are done are no whole batch: their gradients would be part of the next epoch's.
        for position, batch in enumerate(islice(self.data.train, parts * self.steps_an_epoch)):
            last = (position + 1) % parts == 0
            images, labels = self.mix(*(tensor.to(self.device, non_blocking=True) for tensor in batch))
            with nullcontext() if last or self.parallel is None else self.parallel.no_sync():
                with torch.autocast(self.device.type, self.options.amp, enabled=self.options.amp is not None):
                    loss = self.loss(self.wrapped(images), labels) / parts
                self.scaler.scale(loss).backward()
            losses.append(parts * loss.detach())
            if last:
                self._step()
        return float(torch.stack(losses).mean())

    def _step(self) -> None:
        self.scaler.unscale_(self.optimizer)
        if self.recipe.clip is not None:
            nn.utils.clip_grad_norm_(self.wrapped.parameters(), self.recipe.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update_parameters(self.model)

    @torch.no_grad()
    def accuracy(self) -> float:
        """Percent of the held-out images that are classified rightly, by the average of weights where there is one."""
        judged: nn.Module = self.model
        if self.average is not None:
            sx.masks.apply(self.average)  # what other masks have kept
            judged = self.average.module
        judged.eval()
        right = torch.zeros(2, device=self.device)
        for images, labels in self.data.test:
            with torch.autocast(self.device.type, self.options.amp, enabled=self.options.amp is not None):
                guessed = judged(images.to(self.device)).argmax(dim=1)
            right += torch.tensor([(guessed == labels.to(self.device)).sum(), len(labels)], device=self.device)
        if dist.is_initialized():
            dist.all_reduce(right)
        return float(100 * right[0] / right[1])

    def numbers(self) -> dict[str, float]:
        """How sparse the model is, and how many neurons are left."""
        self.metrics.poll()
        total = self.metrics.total()
        return {name: total[name] for name in ("sparsity", "active_share")}

    def save(self, path: Path, epoch: int) -> None:
        """Write the checkpoint; on every process, of which the first writes."""
        if self.rank:
            self.trainer.state_dict()  # what is summed on each process is joined
            return
        extra: dict[str, Any] = {"epoch": epoch, "scaler": self.scaler.state_dict()}
        if self.average is not None:
            extra["average"] = dict(self.average.state_dict())
        checkpoint.save(path, model=self.model, optimizer=self.optimizer, trainer=self.trainer, extra=extra)

    def load(self, path: Path) -> int:
        """Load a checkpoint; return the epochs that it has seen."""
        extra = checkpoint.load(path, model=self.model, optimizer=self.optimizer, trainer=self.trainer)
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(extra["scaler"])
        if self.average is not None:
            self.average.load_state_dict(extra["average"])
        return int(extra["epoch"])


def _optimizer(recipe: ImageRecipe, model: nn.Module) -> torch.optim.Optimizer:
    options: dict[str, Any] = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), **options)
    return torch.optim.SGD(model.parameters(), momentum=0.9, nesterov=True, **options)


def train(recipe: ImageRecipe, options: Options) -> Run:
    """Train, from the checkpoint on if there is one; a line for each epoch is printed and kept in ``log.jsonl``."""
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    run = Run(recipe, options, rank, processes)
    path = options.out / "last.safetensors"
    first = run.load(path) if path.exists() else 0
    epochs = math.ceil(recipe.epochs)
    last = epochs if options.stop_after is None else min(epochs, options.stop_after)
    for epoch in range(first, last):
        loss, accuracy = run.epoch(epoch), run.accuracy()
        run.save(path, epoch + 1)
        if rank == 0:
            line = {"epoch": epoch + 1, "loss": loss, "accuracy": accuracy, **run.numbers()}
            with (options.out / "log.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
            print(json.dumps({name: round(value, 4) for name, value in line.items()}), flush=True)
    sx.verify(run.model, run.optimizer)
    return run
