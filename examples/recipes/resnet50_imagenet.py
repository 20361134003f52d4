"""ResNet-50 on ImageNet with SRigL, 102 epochs (x1), twice and five times as long.

    torchrun --nproc-per-node 4 examples/train_recipe.py resnet50_imagenet --data /data/imagenet
    python examples/train_recipe.py resnet50_imagenet --smoke

The folder of the data has ``train`` and ``val``, each with a folder for every class.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from recipes.settings import SRIGL, ImageRecipe, Length


def network() -> nn.Module:
    """ResNet-50 of torchvision, not trained."""
    from torchvision.models import resnet50

    model: nn.Module = resnet50()
    return model


X1 = ImageRecipe(
    title="ResNet-50 on ImageNet",
    source=SRIGL,
    build=network,
    data="imagenet",
    pixels=224,
    classes=1000,
    epochs=102.3,  # 256,000 steps
    batch=512,
    optimizer="sgd",
    learning_rate=0.2,
    weight_decay=1e-4,
    label_smoothing=0.1,
    warmup_epochs=5,
    warmup_from=1e-6,
    milestones=(30, 70, 90),
    ablation=0.3,
    update_every=800,
    grad_samples=8,
    # Table of ResNet-50, SRigL with ablation; dense beside it.
    published={
        "x1": {0: 76.74, 0.8: 75.01, 0.9: 72.71, 0.95: 69.18, 0.99: 51.55},
        "x2": {0.8: 76.53, 0.9: 74.76, 0.95: 71.52, 0.99: 55.34},
        "x5": {0.9: 76.26, 0.95: 73.68, 0.99: 59.06},
    },
)
RECIPES: dict[Length, ImageRecipe] = {
    "x1": X1,
    # Twice the batch in as many steps.
    "x2": replace(
        X1,
        epochs=205,
        batch=1024,
        learning_rate=0.4,
        warmup_epochs=10,
        milestones=(60, 140, 180),
        update_every=400,
        grad_samples=4,
    ),
    "x5": replace(
        X1,
        epochs=512,  # 160,000 steps
        batch=4096,
        micro_batches=4,
        learning_rate=1.6,
        warmup_epochs=25,
        milestones=(150, 350, 450),
        update_every=100,
        grad_samples=1,  # the four micro-batches of a step
    ),
}


def build() -> tuple[nn.Module, tuple[Tensor]]:
    """The network and an input, for ``srigl-fx export``."""
    return network(), (torch.randn(1, 3, 224, 224),)
