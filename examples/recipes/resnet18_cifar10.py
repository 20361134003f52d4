"""ResNet-18 on CIFAR-10 with SRigL, 250 epochs.

python examples/train_recipe.py resnet18_cifar10 --data /data --out runs/resnet18
python examples/train_recipe.py resnet18_cifar10 --smoke
srigl-fx export recipes.resnet18_cifar10:build --checkpoint ../runs/resnet18/last.safetensors ../model.onnx
"""

import torch
from torch import Tensor, nn

from recipes.settings import SRIGL, ImageRecipe, Length, stretched


def network() -> nn.Module:
    """ResNet-18 of torchvision with a stem for small images: a 3x3 convolution, and no pooling behind it."""
    from torchvision.models import resnet18

    model: nn.Module = resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


X1 = ImageRecipe(
    title="ResNet-18 on CIFAR-10",
    source=SRIGL,
    build=network,
    data="cifar10",
    pixels=32,
    classes=10,
    epochs=250,
    batch=128,
    optimizer="sgd",
    learning_rate=0.1,
    weight_decay=5e-4,
    milestones=(77, 154, 231),
    decay=0.2,
    ablation=0.3,
    update_every=100,
    # Means of five seeds of the best epoch.
    published={"x1": {0: 95.45, 0.5: 95.36, 0.8: 95.22, 0.9: 95.11, 0.95: 94.70, 0.99: 92.79}},
)
RECIPES: dict[Length, ImageRecipe] = {"x1": X1, "x2": stretched(X1, 2), "x5": stretched(X1, 5)}


def build() -> tuple[nn.Module, tuple[Tensor]]:
    """The network and an input, for ``srigl-fx export``."""
    return network(), (torch.randn(1, 3, 32, 32),)
