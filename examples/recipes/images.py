"""The images of the recipes: CIFAR-10 and ImageNet as torchvision reads them, and random ones of the same shape.

Owns transforms and loaders. It must not know networks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

from recipes.settings import ImageRecipe

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
SMOKE_BATCHES = 2  # of each epoch of a smoke run

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Loaders:
    """What a process reads.

    Attributes:
        train: Batches of a part of a step, in an order of its own for each epoch.
        test: The held-out images that this process looks at.
        sampler: Is told the epoch.
    """

    train: DataLoader[Batch]
    test: DataLoader[Batch]
    sampler: "DistributedSampler[Batch]"


def loaders(
    recipe: ImageRecipe, data: Path | None, *, processes: int, rank: int, workers: int, seed: int = 0
) -> Loaders:
    """The loaders of one process; without ``data``, of random images.

    Raises:
        ValueError: A step's batch cannot be cut evenly.
    """
    share, rest = divmod(recipe.batch, processes * recipe.micro_batches)
    if rest or not share:
        raise ValueError(
            f"a batch of {recipe.batch} cannot be cut into {recipe.micro_batches} parts of {processes} processes"
        )
    if data is None:
        train, test = _random(recipe)
    else:
        train, test = _cifar10(data) if recipe.data == "cifar10" else _imagenet(data, augment=recipe.mix)
    sampler: DistributedSampler[Batch] = DistributedSampler(train, processes, rank, seed=seed, drop_last=True)
    part: DistributedSampler[Batch] = DistributedSampler(test, processes, rank, shuffle=False)
    options: dict[str, Any] = {"batch_size": share, "num_workers": workers, "pin_memory": torch.cuda.is_available()}
    return Loaders(
        DataLoader(train, sampler=sampler, drop_last=True, **options),
        DataLoader(test, sampler=part, **options),
        sampler,
    )


def _random(recipe: ImageRecipe) -> tuple[Dataset[Batch], Dataset[Batch]]:
    numbers = torch.Generator().manual_seed(0)
    count = SMOKE_BATCHES * recipe.batch

    def draw() -> Any:
        images = torch.randn(count, 3, recipe.pixels, recipe.pixels, generator=numbers)
        return TensorDataset(images, torch.randint(recipe.classes, (count,), generator=numbers))

    return draw(), draw()


def _cifar10(data: Path) -> tuple[Any, Any]:
    from torchvision.datasets import CIFAR10
    from torchvision.transforms import v2

    crop = [v2.RandomCrop(32, padding=4, padding_mode="reflect"), v2.RandomHorizontalFlip()]
    number = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    return (
        CIFAR10(data, train=True, download=True, transform=v2.Compose([*crop, *number])),
        CIFAR10(data, train=False, download=True, transform=v2.Compose(number)),
    )


def _imagenet(data: Path, *, augment: bool = False) -> tuple[Any, Any]:
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    number = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, DEVIATION)]
    crop = [v2.RandomChoice([v2.Resize(256), v2.Resize(480)]), v2.RandomCrop(224), v2.RandomHorizontalFlip()]
    crop += [v2.RandAugment(magnitude=9)] if augment else []
    return (
        ImageFolder(data / "train", v2.Compose([*crop, *number])),
        ImageFolder(data / "val", v2.Compose([v2.Resize(256), v2.CenterCrop(224), *number])),
    )


def mixer(recipe: ImageRecipe) -> Callable[[Tensor, Tensor], Batch]:
    """What is done to a batch before the network sees it: mixed images have shares of classes as labels."""
    if not recipe.mix:
        return lambda images, labels: (images, labels)
    from torchvision.transforms import v2

    mix: Any = v2.RandomChoice(
        [v2.MixUp(alpha=0.2, num_classes=recipe.classes), v2.CutMix(alpha=1.0, num_classes=recipe.classes)]
    )
    return lambda images, labels: mix(images, labels)
