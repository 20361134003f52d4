"""How a process reads its share of the data.

Owns samplers and loaders. It must not know what a sample is.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler


@dataclass(frozen=True)
class Loaders:
    """What a process reads.

    Attributes:
        train: Batches of a part of a step, in an order of its own for each epoch.
        test: The held-out samples that this process looks at.
        sampler: Is told the epoch.
    """

    train: DataLoader[Any]
    test: DataLoader[Any]
    sampler: "DistributedSampler[Any] | Draws"


@dataclass(frozen=True, kw_only=True)
class Reader:
    """One of several processes that read together.

    Attributes:
        batch: Samples of one part of one process.
        processes: How many.
        rank: Which one.
        workers: Processes that read for it.
        seed: Of the orders.
    """

    batch: int
    processes: int = 1
    rank: int = 0
    workers: int = 0
    seed: int = 0

    def loaders(
        self,
        train: Dataset[Any],
        test: Dataset[Any],
        *,
        draws: int | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
    ) -> Loaders:
        """Loaders of two data sets.

        Args:
            train: To train on.
            test: Held out.
            draws: As many samples at random make an epoch, over all processes; by default each sample once.
            collate: Makes a batch of samples, where stacking does not.
        """
        sampler: DistributedSampler[Any] | Draws
        if draws is None:
            sampler = DistributedSampler(train, self.processes, self.rank, seed=self.seed, drop_last=True)
        else:
            sampler = Draws(len(train), draws, self)  # type: ignore[arg-type]
        part: DistributedSampler[Any] = DistributedSampler(test, self.processes, self.rank, shuffle=False)
        options: dict[str, Any] = {"batch_size": self.batch, "num_workers": self.workers, "collate_fn": collate}
        options["pin_memory"] = torch.cuda.is_available()
        return Loaders(
            DataLoader(train, sampler=sampler, drop_last=True, **options),
            DataLoader(test, sampler=part, **options),
            sampler,
        )


class Draws(Sampler[int]):
    """Some of ``size`` samples at random, with replacement: ``count`` in an epoch, others in the next."""

    def __init__(self, size: int, count: int, reader: Reader) -> None:
        self.size, self.count, self.reader, self.epoch = size, count, reader, 0

    def set_epoch(self, epoch: int) -> None:
        """What is drawn depends on it."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Samples of this process."""
        return self.count // self.reader.processes

    def __iter__(self) -> Iterator[int]:
        numbers = torch.Generator().manual_seed(self.reader.seed + self.epoch)
        drawn = torch.randint(self.size, (len(self), self.reader.processes), generator=numbers)
        return iter(drawn[:, self.reader.rank].tolist())
