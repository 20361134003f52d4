"""What an image recipe says: hyper-parameters, where each comes from, and what was reached with them elsewhere.

Owns the form; the values stand in the recipes. It must not know how training is done.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

Length = Literal["x1", "x2", "x5"]
LENGTHS: tuple[Length, ...] = ("x1", "x2", "x5")
SRIGL = "Lasby et al., Dynamic Sparse Training with Structured Sparsity, ICLR 2024 (arXiv 2305.02299), and its code"


@dataclass(frozen=True, kw_only=True)
class ImageRecipe:
    """One network on one data set, as it was published.

    Attributes:
        title: What people read.
        source: Where the values come from.
        build: Makes the network, dense.
        data: Which loaders.
        pixels: The width and height of what the network sees.
        classes: How many.
        epochs: Passes over the data.
        batch: Samples of an optimizer step, over all processes.
        micro_batches: Parts that a process computes one after the other, where memory is short.
        optimizer: SGD has Nesterov's momentum of 0.9, AdamW its usual betas.
        learning_rate: The highest.
        weight_decay: Of all parameters.
        label_smoothing: Of the cross-entropy.
        warmup_epochs: In which the learning rate grows linearly, from ``warmup_from``.
        warmup_from: The first learning rate.
        milestones: Epochs at which the learning rate is multiplied by ``decay``; none for a cosine.
        decay: That factor.
        cosine_epochs: The half period of the cosine, which begins after the warm-up.
        clip: The largest norm of a gradient.
        mix: Whether batches are mixed (mixup 0.2, CutMix 1.0) and images augmented by RandAugment of magnitude 9.
        sparsity: Fraction of weights removed.
        distribution: How it is shared out among layers.
        dense: Weights that stay dense, by pattern.
        ablation: Salient weights that a neuron needs, as a fraction of its fan-in (gamma_sal).
        update_every: Optimizer steps between updates of the masks.
        grad_samples: Optimizer steps whose gradients choose what grows.
        drop_fraction: Share of weights replaced at first.
        stop_at: Share of the steps after which the masks stay.
        published: Accuracy in percent by length and sparsity, with 0 for the dense network.
    """

    title: str
    source: str
    build: Callable[[], nn.Module]
    data: Literal["cifar10", "imagenet"]
    pixels: int
    classes: int
    epochs: float
    batch: int
    micro_batches: int = 1
    optimizer: Literal["sgd", "adamw"]
    learning_rate: float
    weight_decay: float
    label_smoothing: float = 0.0
    warmup_epochs: float = 0.0
    warmup_from: float = 0.0
    milestones: tuple[float, ...] = ()
    decay: float = 0.1
    cosine_epochs: float = 0.0
    clip: float | None = None
    mix: bool = False
    sparsity: float = 0.9
    distribution: Literal["erk", "uniform"] = "erk"
    dense: tuple[str, ...] = ()
    ablation: float
    update_every: int
    grad_samples: int = 1
    drop_fraction: float = 0.3
    stop_at: float = 0.75
    published: Mapping[Length, Mapping[float, float]]

    def rate(self, epoch: int) -> float:
        """The learning rate of an epoch, counted from 0."""
        if epoch < self.warmup_epochs:
            share = (epoch + 1) / self.warmup_epochs
            return self.warmup_from + share * (self.learning_rate - self.warmup_from)
        if self.milestones:
            return self.learning_rate * self.decay ** sum(epoch >= milestone for milestone in self.milestones)
        return self.learning_rate * (1 + math.cos(math.pi * (epoch - self.warmup_epochs) / self.cosine_epochs)) / 2


def stretched(recipe: ImageRecipe, factor: int) -> ImageRecipe:
    """The recipe over ``factor`` times as many epochs: all that is counted in epochs grows alike."""
    return replace(
        recipe,
        epochs=factor * recipe.epochs,
        warmup_epochs=factor * recipe.warmup_epochs,
        milestones=tuple(factor * milestone for milestone in recipe.milestones),
        cosine_epochs=factor * recipe.cosine_epochs,
    )


def smoke(recipe: ImageRecipe, processes: int = 1) -> ImageRecipe:
    """Two epochs of two steps of two samples for each process, in which everything happens once."""
    return replace(
        recipe,
        epochs=2,
        batch=2 * processes,
        micro_batches=min(recipe.micro_batches, 2),
        warmup_epochs=min(recipe.warmup_epochs, 1),
        milestones=tuple(1.0 for _ in recipe.milestones[:1]),
        cosine_epochs=min(recipe.cosine_epochs, 2),
        update_every=1,
        grad_samples=1,
    )
