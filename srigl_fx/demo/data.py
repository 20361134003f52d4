"""The demonstration's data: scikit-learn's handwritten digits, which come with the package and need no download.

Owns loading, the fixed split and the noise of the denoising task; it must not know the networks.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

NOISE = 0.5  # standard deviation of the noise on pixels that lie in [0, 1]


@dataclass(frozen=True)
class Split:
    """Inputs and targets for training and for testing."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def digits() -> Split:
    """The 1797 digits as (N, 1, 8, 8) float32 images of zero mean and unit variance, with int64 labels.

    One quarter of each class is held out for testing, always the same images.

    Example:
        >>> split = digits()
        >>> tuple(split.train_x.shape), tuple(split.test_x.shape), int(split.test_y.max())
        ((1347, 1, 8, 8), (450, 1, 8, 8), 9)
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bundle = load_digits()
    train_x, test_x, train_y, test_y = train_test_split(
        bundle.images, bundle.target, test_size=0.25, stratify=bundle.target, random_state=0
    )
    mean, deviation = train_x.mean(), train_x.std()

    def images(array: Any) -> Tensor:
        normal: Tensor = (torch.as_tensor(array) - mean) / deviation
        return normal.float().unsqueeze(1)

    return Split(images(train_x), torch.as_tensor(train_y).long(), images(test_x), torch.as_tensor(test_y).long())


def noisy_digits() -> Split:
    """The digits enlarged to 32x32 and flattened to (N, 1024): noisy inputs, clean targets, pixels in [0, 1].

    The training inputs are clean too: training draws its noise anew at each step (:func:`add_noise`).

    Example:
        >>> split = noisy_digits()
        >>> tuple(split.test_x.shape), tuple(split.test_y.shape)
        ((450, 1024), (450, 1024))
    """
    small = digits()

    def enlarge(images: Tensor) -> Tensor:
        low, high = small.train_x.min(), small.train_x.max()
        large = functional.interpolate((images - low) / (high - low), size=(32, 32), mode="bilinear")
        return large.clamp(0, 1).flatten(1)

    train, test = enlarge(small.train_x), enlarge(small.test_x)
    return Split(train, train, add_noise(test, torch.Generator().manual_seed(0)), test)


def add_noise(images: Tensor, generator: torch.Generator) -> Tensor:
    """``images`` with Gaussian noise of standard deviation :data:`NOISE`."""
    return images + NOISE * torch.randn(images.shape, generator=generator)


def as_is(images: Tensor, generator: torch.Generator) -> Tensor:
    """``images`` unchanged."""
    return images


def shift(images: Tensor, generator: torch.Generator) -> Tensor:
    """(N, 1, H, W) images moved together by up to one pixel each way."""
    down, right = torch.randint(-1, 2, (2,), generator=generator).tolist()
    return torch.roll(images, (down, right), dims=(2, 3))
