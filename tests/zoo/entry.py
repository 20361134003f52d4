"""What the zoo knows of a model: how it is made, what it is called with, and what training it needs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Entry:
    """A model of the zoo.

    Attributes:
        name: Its name.
        family: Where it comes from.
        make: Makes it, with random weights.
        inputs: Its inputs for a batch size, random.
        train_inputs: Where training takes others.
        train: False where it cannot train on such small inputs: gradients are then taken in eval mode.
        static: Whether its inputs have no batch dimension.
        never_ablated: Globs of weights that the test ablates no neurons of.
    """

    name: str
    family: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]
    train_inputs: Callable[[int], Inputs] | None = None
    train: bool = True
    static: bool = False
    never_ablated: tuple[str, ...] = ()


def images(size: int, channels: int = 3) -> Callable[[int], Inputs]:
    """Random pictures."""
    return lambda batch: ((torch.randn(batch, channels, size, size),), {})


def vectors(size: int = 16) -> Callable[[int], Inputs]:
    """Random vectors."""
    return lambda batch: ((torch.randn(batch, size),), {})


def sequences(length: int = 6, size: int = 16) -> Callable[[int], Inputs]:
    """Random sequences of vectors."""
    return lambda batch: ((torch.randn(batch, length, size),), {})
