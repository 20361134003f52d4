"""The training loop of all recipes: plain PyTorch, in which one line attaches SRigL.

Under ``torchrun`` each process takes its share of every batch. A checkpoint is written after each epoch, whole or not
at all; a run that begins where one is goes on from it, with the same weights in the end as without the interruption:
random numbers begin anew with every epoch. Owns the loop. It must not know networks or data sets: a task says what a
batch is.
"""

import json
import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import srigl_fx as sx
from recipes.data import Loaders, Reader
from recipes.settings import Recipe
from srigl_fx.train import checkpoint
from srigl_fx.train.base import Trainer
from srigl_fx.train.metrics import MaskMetrics

SEED = 42


class Task(Protocol):
    """A kind of data: how its batches become a loss and a score.

    Attributes:
        recipe: The hyper-parameters.
        score: What the score is called.
    """

    score: str

    @property
    def recipe(self) -> Recipe: ...

    def network(self) -> nn.Module:
        """The network, dense."""

    def loaders(self, reader: Reader) -> Loaders:
        """What one process reads: batches are tensors by name, or one after the other."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The mean over a batch, to be trained on."""

    def sums(self, model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        """The score of a held-out batch, summed, and over how many: the score of all is the mean."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a run decides beside its recipe.

    Attributes:
        out: The folder of checkpoint and log.
        amp: The dtype of autocast, None for none.
        ema: The decay of the average of weights; 0 for none.
        workers: Processes that read samples, for each that trains.
        stop_after: Epochs after which this run ends; a later one goes on.
    """

    out: Path
    amp: torch.dtype | None = None
    ema: float = 0.0
    workers: int = 0
    stop_after: int | None = None


class Run:
    """One process of a run: everything that a checkpoint holds, built anew and then loaded."""

    def __init__(self, task: Task, options: Options, rank: int, processes: int) -> None:
        self.task, self.options, self.rank = task, options, rank
        self.recipe = recipe = task.recipe
        # Each process has made its GPU the current one.
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        reader = Reader(
            batch=_part(recipe, processes), processes=processes, rank=rank, workers=options.workers, seed=SEED
        )
        self.data: Loaders = task.loaders(reader)
        torch.manual_seed(SEED)
        # The order matters: sparsify, then wrap, then the optimizer, then the trainer.
        self.model = sx.sparsify(
            task.network(),
            sparsity=recipe.sparsity,
            distribution=recipe.distribution,
            mask_init="dense" if recipe.method == "gmp" else "magnitude",
            weight_init=recipe.weight_init,
            rules=dict.fromkeys(recipe.dense),
        ).to(self.device)
        self.parallel = DistributedDataParallel(self.model) if processes > 1 else None
        self.wrapped: nn.Module = self.model if self.parallel is None else self.parallel
        self.optimizer = _optimizer(recipe, self.wrapped)
        self.steps_an_epoch = len(self.data.train) // recipe.micro_batches
        self.trainer = _trainer(recipe, self.wrapped, self.optimizer, round(recipe.epochs * self.steps_an_epoch))
        self.metrics = MaskMetrics(self.trainer)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=options.amp is torch.float16)
        average = get_ema_multi_avg_fn(options.ema)  # type: ignore[no-untyped-call]
        self.average = AveragedModel(self.model, multi_avg_fn=average) if options.ema else None

    def epoch(self, epoch: int) -> float:
        """Train one epoch; return the mean loss of this process."""
        torch.manual_seed(SEED + 1000 * (epoch + 1) + self.rank)
        self.data.sampler.set_epoch(epoch)
        self.wrapped.train()
        losses, parts = [], self.recipe.micro_batches
        # What is left when all steps are done are no whole batch: their gradients would be part of the next epoch's.
        for position, batch in enumerate(islice(self.data.train, parts * self.steps_an_epoch)):
            step, part = divmod(position, parts)
            last = part == parts - 1
            with nullcontext() if last or self.parallel is None else self.parallel.no_sync():
                with self._autocast():
                    loss = self.task.loss(self.wrapped, self._here(batch)) / parts
                self.scaler.scale(loss).backward()
            losses.append(parts * loss.detach())
            if last:
                self._step(self.recipe.rate(epoch + step / self.steps_an_epoch))
        return float(torch.stack(losses).mean())

    def _step(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.scaler.unscale_(self.optimizer)
        if self.recipe.clip is not None:
            nn.utils.clip_grad_norm_(self.wrapped.parameters(), self.recipe.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update_parameters(self.model)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.options.amp, enabled=self.options.amp is not None)

    def _here(self, batch: Any) -> Any:
        """The tensors of a batch on the device."""
        if isinstance(batch, Mapping):
            return {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
        return tuple(tensor.to(self.device, non_blocking=True) for tensor in batch)

    @torch.no_grad()
    def score(self) -> float:
        """The mean score of all held-out samples, by the average of weights where there is one."""
        judged: nn.Module = self.model
        if self.average is not None:
            sx.masks.apply(self.average)  # what other masks have kept
            judged = self.average.module
        judged.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for batch in self.data.test:
            with self._autocast():
                score, count = self.task.sums(judged, self._here(batch))
            sums += torch.stack([score.double(), score.new_tensor(count).double()])
        if dist.is_initialized():
            dist.all_reduce(sums)
        return float(sums[0] / sums[1])

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


def _part(recipe: Recipe, processes: int) -> int:
    """Samples of one part of one process."""
    share, rest = divmod(recipe.batch, processes * recipe.micro_batches)
    if rest or not share:
        raise ValueError(
            f"a batch of {recipe.batch} cannot be cut into {recipe.micro_batches} parts of {processes} processes"
        )
    return share


def _optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    parameters = list(model.parameters())
    groups: list[dict[str, Any]] = [{"params": parameters, "weight_decay": recipe.weight_decay}]
    if not recipe.decay_vectors:
        groups = [
            {"params": [one for one in parameters if one.dim() > 1], "weight_decay": recipe.weight_decay},
            {"params": [one for one in parameters if one.dim() <= 1], "weight_decay": 0.0},
        ]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas)
    return torch.optim.SGD(groups, lr=recipe.learning_rate, momentum=0.9, nesterov=True)


def _trainer(recipe: Recipe, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> Trainer:
    total, every, stop_at = max(1, steps), recipe.update_every, recipe.stop_at
    if recipe.method == "gmp":
        return sx.GMP(model, optimizer, total_steps=total, update_every=every, stop_at=stop_at)
    return sx.SRigL(
        model,
        optimizer,
        total_steps=total,
        ablation=recipe.ablation,
        update_every=every,
        grad_samples=recipe.grad_samples,
        drop_fraction=recipe.drop_fraction,
        stop_at=stop_at,
    )


def train(task: Task, options: Options) -> Run:
    """Train, from the checkpoint on if there is one; a line for each epoch is printed and kept in ``log.jsonl``."""
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    run = Run(task, options, rank, processes)
    path = options.out / "last.safetensors"
    first = run.load(path) if path.exists() else 0
    epochs = math.ceil(run.recipe.epochs)
    last = epochs if options.stop_after is None else min(epochs, options.stop_after)
    for epoch in range(first, last):
        loss, score = run.epoch(epoch), run.score()
        run.save(path, epoch + 1)
        if rank == 0:
            line = {"epoch": epoch + 1, "loss": loss, task.score: score, **run.numbers()}
            with (options.out / "log.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
            print(json.dumps({name: round(value, 4) for name, value in line.items()}), flush=True)
    sx.verify(run.model, run.optimizer)
    return run
