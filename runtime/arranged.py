"""Tensors with samples innermost: what that means, for whole blocks of 16 samples, in torch's own terms.

Owns the arrangement and its plain form, and that of pooling; it must not know kernels or graphs. Arranged, a tensor
(N, C, sizes...) keeps its shape and holds the same numbers in another order: those of each 16 samples lie as
(sizes..., C, 16), and samples behind the last sixteen as they were. So what treats each element for itself needs not
know, and a batch of fewer than 16 samples does not change at all. A device without kernels for it leaves samples as
they are.
"""

from collections.abc import Sequence
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

SAMPLES: Final = 16  # of a block
_contiguous = torch.contiguous_format


def whole_blocks(batch: int) -> int:
    """How many of the samples are in whole blocks.

    Example:
        >>> [whole_blocks(batch) for batch in (15, 16, 33)]
        [0, 16, 32]
    """
    return batch // SAMPLES * SAMPLES


def arrange(x: Tensor) -> Tensor:
    """The tensor arranged, as a new one; gradients go through.

    Example:
        >>> import torch
        >>> x = torch.arange(32.0).reshape(16, 2, 1)
        >>> arrange(x).flatten()[:4].tolist(), torch.equal(arrange_back(arrange(x)), x)
        ([0.0, 2.0, 4.0, 6.0], True)
    """
    whole, y = whole_blocks(x.shape[0]), x.clone(memory_format=_contiguous)
    if whole:
        blocks = x[:whole].reshape(-1, SAMPLES, *x.shape[1:]).flatten(3)
        y[:whole] = blocks.permute(0, 3, 2, 1).reshape(whole, *x.shape[1:])
    return y


def arrange_back(x: Tensor) -> Tensor:
    """What :func:`arrange` was given."""
    whole, y = whole_blocks(x.shape[0]), x.clone(memory_format=_contiguous)
    if whole:
        channels = x.shape[1]
        blocks = x[:whole].reshape(whole // SAMPLES, -1, channels, SAMPLES)
        y[:whole] = blocks.permute(0, 3, 2, 1).reshape(whole, *x.shape[1:])
    return y


def pool(
    x: Tensor, window: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], mean: bool
) -> Tensor:
    """What pooling does to a tensor (N, C, sizes...) whose samples lie as they were; gradients go through.

    Args:
        x: With as many sizes as ``window`` has: one or two.
        window: How many elements are pooled along each axis.
        stride: How far windows are apart.
        padding: On both sides of each axis. A mean counts it, as zeros.
        dilation: How far the elements of a window are apart; ones for a mean.
        mean: Whether it is the mean of each window, rather than the largest element.

    Example:
        >>> import torch
        >>> pool(torch.arange(4.0).reshape(1, 1, 4), [2], [2], [0], [1], mean=True).flatten().tolist()
        [0.5, 2.5]
    """
    flat, settings = len(window) == 1, (list(window), list(stride), list(padding))
    if mean:
        return F.avg_pool1d(x, *settings) if flat else F.avg_pool2d(x, *settings)
    return (F.max_pool1d if flat else F.max_pool2d)(x, *settings, list(dilation))
