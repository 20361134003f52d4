"""What a recipe says: hyper-parameters, where each comes from, and what was reached with them elsewhere.

Owns the form; the values stand in the recipes. It must not know how training is done.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from torch import nn

Length = Literal["x1", "x2", "x5"]
LENGTHS: tuple[Length, ...] = ("x1", "x2", "x5")
Method = Literal["srigl", "gmp"]
METHODS: tuple[Method, ...] = ("srigl", "gmp")
SRIGL = "Lasby et al., Dynamic Sparse Training with Structured Sparsity, ICLR 2024 (arXiv 2305.02299), and its code"


@dataclass(frozen=True, kw_only=True)
class Recipe(ABC):
    """One network on one data set: what all kinds of data have in common.

    Attributes:
        title: What people read.
        source: Where the values come from.
        epochs: Passes over the data, after each of which there is a checkpoint.
        batch: Samples of an optimizer step, over all processes.
        micro_batches: Parts that a process computes one after the other, where memory is short.
        optimizer: SGD has Nesterov's momentum of 0.9.
        learning_rate: The highest.
        betas: Of AdamW.
        weight_decay: Of all parameters.
        decay_vectors: False leaves biases and normalisations without that decay.
        clip: The largest norm of a gradient.
        method: SRigL, from the largest weights on, or gradual magnitude pruning, from all of them on.
        sparsity: Fraction of weights removed.
        distribution: How it is shared out among layers.
        dense: Weights that stay dense, by pattern.
        weight_init: How kept weights start; "keep" is for what was trained before.
        ablation: Salient weights that a neuron needs, as a fraction of its fan-in (gamma_sal); None for no ablation.
        update_every: Optimizer steps between updates of the masks; None for the library's share of all steps.
        grad_samples: Optimizer steps whose gradients choose what grows.
        drop_fraction: Share of weights replaced at first.
        stop_at: Share of the steps after which the masks stay.
        published: The score by length and sparsity, with 0 for the dense network.
        published_with: How the sparse ones were reached.
    """

    title: str
    source: str
    epochs: float
    batch: int
    micro_batches: int = 1
    optimizer: Literal["sgd", "adamw"]
    learning_rate: float
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float
    decay_vectors: bool = True
    clip: float | None = None
    method: Method = "srigl"
    sparsity: float = 0.9
    distribution: Literal["erk", "uniform"] = "erk"
    dense: tuple[str, ...] = ()
    weight_init: Literal["keep", "kaiming", "torch"] = "kaiming"
    ablation: float | None
    update_every: int | None
    grad_samples: int = 1
    drop_fraction: float = 0.3
    stop_at: float = 0.75
    published: Mapping[Length, Mapping[float, float]]
    published_with: str = "SRigL"

    @abstractmethod
    def rate(self, epoch: float) -> float:
        """The learning rate of a step, by the epochs before it."""

    def smoke(self, processes: int = 1) -> Self:
        """Two epochs of two steps of two samples for each process, in which everything happens once."""
        changes: dict[str, Any] = {"epochs": 2, "batch": 2 * processes, "micro_batches": min(self.micro_batches, 2)}
        return replace(self, **changes, update_every=1, grad_samples=1, **self._smoke())

    @abstractmethod
    def _smoke(self) -> dict[str, Any]:
        """What a smoke run changes besides."""


@dataclass(frozen=True, kw_only=True)
class ImageRecipe(Recipe):
    """Images with a class each, as it was published.

    Attributes:
        build: Makes the network, dense.
        data: Which loaders.
        pixels: The width and height of what the network sees.
        classes: How many.
        label_smoothing: Of the cross-entropy.
        warmup_epochs: In which the learning rate grows linearly, from ``warmup_from``.
        warmup_from: The first learning rate.
        milestones: Epochs at which the learning rate is multiplied by ``decay``; none for a cosine.
        decay: That factor.
        cosine_epochs: The half period of the cosine, which begins after the warm-up.
        mix: Whether batches are mixed (mixup 0.2, CutMix 1.0) and images augmented by RandAugment of magnitude 9.
    """

    build: Callable[[], nn.Module]
    data: Literal["cifar10", "imagenet"]
    pixels: int
    classes: int
    label_smoothing: float = 0.0
    warmup_epochs: float = 0.0
    warmup_from: float = 0.0
    milestones: tuple[float, ...] = ()
    decay: float = 0.1
    cosine_epochs: float = 0.0
    mix: bool = False

    def rate(self, epoch: float) -> float:
        """The learning rate, which stays as it is within an epoch."""
        epoch = math.floor(epoch)
        if epoch < self.warmup_epochs:
            share = (epoch + 1) / self.warmup_epochs
            return self.warmup_from + share * (self.learning_rate - self.warmup_from)
        if self.milestones:
            return self.learning_rate * self.decay ** sum(epoch >= milestone for milestone in self.milestones)
        return self.learning_rate * (1 + math.cos(math.pi * (epoch - self.warmup_epochs) / self.cosine_epochs)) / 2

    def stretched(self, factor: int) -> Self:
        """The recipe over ``factor`` times as many epochs: all that is counted in epochs grows alike."""
        return replace(
            self,
            epochs=factor * self.epochs,
            warmup_epochs=factor * self.warmup_epochs,
            milestones=tuple(factor * milestone for milestone in self.milestones),
            cosine_epochs=factor * self.cosine_epochs,
        )

    def _smoke(self) -> dict[str, Any]:
        return {
            "warmup_epochs": min(self.warmup_epochs, 1),
            "milestones": tuple(1.0 for _ in self.milestones[:1]),
            "cosine_epochs": min(self.cosine_epochs, 2),
        }


@dataclass(frozen=True, kw_only=True)
class SentenceRecipe(Recipe):
    """Sentences, or pairs of sentences, with a class each, for a pretrained BERT.

    Attributes:
        build: Makes a network of this kind with random weights; its argument is whether for a smoke run.
        model: The pretrained one: its name on the hub.
        data: The data set's name on the hub, and after a colon that of its configuration.
        tokens: What is longer is cut.
        classes: How many.
        final_rate: The learning rate at the end of each cycle, within which it falls linearly.
        first_cycle: Epochs of the first.
        cycle: Epochs of the others.
        temperature: Of the distributions of classes, where a teacher stands in the place of labels.
    """

    build: Callable[[bool], nn.Module]
    model: str
    data: str
    tokens: int
    classes: int
    final_rate: float
    first_cycle: float
    cycle: float
    temperature: float

    def rate(self, epoch: float) -> float:
        """The learning rate, which falls and begins anew."""
        if epoch < self.first_cycle:
            share = epoch / self.first_cycle
        else:
            share = (epoch - self.first_cycle) % self.cycle / self.cycle
        return self.learning_rate + share * (self.final_rate - self.learning_rate)

    def _smoke(self) -> dict[str, Any]:
        return {"tokens": 16, "first_cycle": 1, "cycle": 1}


@dataclass(frozen=True, kw_only=True)
class LanguageRecipe(Recipe):
    """Running text, of which the next byte is to be told.

    Attributes:
        build: Makes the network, dense.
        tokens: The length of a sample.
        steps_an_epoch: Optimizer steps between two checkpoints: samples begin anywhere in the text.
        final_rate: The last learning rate, at the end of a cosine.
        warmup_epochs: In which the learning rate grows linearly.
    """

    build: Callable[[], nn.Module]
    tokens: int
    steps_an_epoch: int
    final_rate: float
    warmup_epochs: float

    def rate(self, epoch: float) -> float:
        """The learning rate."""
        if epoch < self.warmup_epochs:
            return self.learning_rate * min(1, (epoch + 1 / self.steps_an_epoch) / self.warmup_epochs)
        share = (epoch - self.warmup_epochs) / (self.epochs - self.warmup_epochs)
        return self.final_rate + (self.learning_rate - self.final_rate) * (1 + math.cos(math.pi * share)) / 2

    def stretched(self, factor: int) -> Self:
        """The recipe over ``factor`` times as many steps, with the same warm-up."""
        return replace(self, epochs=factor * self.epochs)

    def _smoke(self) -> dict[str, Any]:
        return {"tokens": 32, "steps_an_epoch": 2, "warmup_epochs": min(self.warmup_epochs, 1)}
