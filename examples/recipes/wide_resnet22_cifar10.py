"""Wide ResNet-22-2 on CIFAR-10 with SRigL, 250 epochs.

python examples/train_recipe.py wide_resnet22_cifar10 --data /data --out runs/wide_resnet22
python examples/train_recipe.py wide_resnet22_cifar10 --smoke
srigl-fx export recipes.wide_resnet22_cifar10:build --checkpoint ../runs/wide_resnet22/last.safetensors ../model.onnx
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from recipes.resnet18_cifar10 import X1 as RESNET18
from recipes.settings import ImageRecipe, Length, stretched


class Block(nn.Module):
    """Two 3x3 convolutions, each behind its normalisation, beside a shortcut (Zagoruyko and Komodakis, 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        same = inputs == outputs and stride == 1
        self.shortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        y = torch.relu(self.norm1(x))
        beside = x if self.shortcut is None else self.shortcut(y)
        y = self.dropout(torch.relu(self.norm2(self.conv1(y))))
        out: Tensor = self.conv2(y) + beside
        return out


def network(depth: int = 22, width: int = 2, dropout: float = 0.3) -> nn.Sequential:
    """A Wide ResNet for 32x32 images, (depth - 4) / 6 blocks in each of three groups."""
    channels = 16
    layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, padding=1, bias=False)]
    for group in range(3):
        for block in range((depth - 4) // 6):
            outputs = 16 * width * 2**group
            layers.append(Block(channels, outputs, 2 if group and not block else 1, dropout))
            channels = outputs
    head = (nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))
    return nn.Sequential(*layers, *head)


X1 = replace(
    RESNET18,
    title="Wide ResNet-22-2 on CIFAR-10",
    build=network,
    # Means of five seeds of the best epoch.
    published={"x1": {0: 95.00, 0.5: 94.60, 0.8: 94.05, 0.9: 93.27, 0.95: 91.78, 0.99: 82.66}},
)
RECIPES: dict[Length, ImageRecipe] = {"x1": X1, "x2": stretched(X1, 2), "x5": stretched(X1, 5)}


def build() -> tuple[nn.Module, tuple[Tensor]]:
    """The network and an input, for ``srigl-fx export``."""
    return network(), (torch.randn(1, 3, 32, 32),)
