"""The images of the recipes: CIFAR-10 and ImageNet as torchvision reads them, and random ones of the same shape.

Owns transforms, and how images become a loss and a score. It must not know networks.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from recipes.data import Loaders, Reader
from recipes.settings import ImageRecipe

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
SMOKE_BATCHES = 2  # of each epoch of a smoke run

Batch = tuple[Tensor, Tensor]


class Images:
    """Images with a class each; without ``data``, random ones."""

    score = "accuracy"

    def __init__(self, recipe: ImageRecipe, data: Path | None) -> None:
        self.recipe, self.data = recipe, data
        self._loss = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
        self._mix = mixer(recipe)

    def network(self) -> nn.Module:
        """The network, dense."""
        return self.recipe.build()

    def loaders(self, reader: Reader) -> Loaders:
        """What a process reads."""
        if self.data is None:
            return reader.loaders(*_random(self.recipe))
        sets = _cifar10(self.data) if self.recipe.data == "cifar10" else _imagenet(self.data, augment=self.recipe.mix)
        return reader.loaders(*sets)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean over a batch."""
        images, labels = self._mix(*batch)
        loss: Tensor = self._loss(model(images), labels)
        return loss

    def sums(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        """A hundred for each image that is classified rightly, and how many images there are."""
        images, labels = batch
        return 100 * (model(images).argmax(dim=1) == labels).sum(), len(labels)


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
