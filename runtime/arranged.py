"""Tensors with samples innermost: what that means, for whole blocks of samples, in torch's own terms.

Owns the arrangement and its plain form, and those of what stands between convolutions; it must not know kernels or
graphs. Arranged, a tensor (N, C, sizes...) keeps its shape and holds the same numbers in another order: those of each
block of samples lie as (sizes..., C, samples), and samples behind the last whole block as they were. A block has 16
samples with AVX-512 and 8 on other processors, so that what is arranged is for this process alone. What treats each
element for itself needs not know, and a batch of fewer samples than a block does not change at all. A device without
kernels for it leaves samples as they are.
"""

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from srigl_fx.runtime.cpu.kernels.isa import host_isa, level_of
from srigl_fx.runtime.cpu.kernels.plan import innermost_samples

_contiguous = torch.contiguous_format


@functools.cache
def block_samples() -> int:
    """How many samples a block has on this processor, or with the instruction set that SRIGL_FX_ISA names.

    Raises:
        LibraryError: SRIGL_FX_ISA names one that is unknown, or that this CPU lacks.

    Example:
        >>> block_samples() in (8, 16)
        True
    """
    return innermost_samples(level_of(host_isa()))


def whole_blocks(batch: int) -> int:
    """How many of the samples are in whole blocks.

    Example:
        >>> [whole_blocks(batch) for batch in (7, 16, 33)]
        [0, 16, 32]
    """
    return batch // block_samples() * block_samples()


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
        blocks = x[:whole].reshape(whole // block_samples(), block_samples(), *x.shape[1:]).flatten(3)
        y[:whole] = blocks.permute(0, 3, 2, 1).reshape(whole, *x.shape[1:])
    return y


def arrange_back(x: Tensor) -> Tensor:
    """What :func:`arrange` was given."""
    whole, y = whole_blocks(x.shape[0]), x.clone(memory_format=_contiguous)
    if whole:
        channels = x.shape[1]
        blocks = x[:whole].reshape(whole // block_samples(), math.prod(x.shape[2:]), channels, block_samples())
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


def pad(x: Tensor, before: Sequence[int], after: Sequence[int], value: float) -> Tensor:
    """The tensor with ``value`` before and behind each of its sizes; what is negative is cut off.

    Example:
        >>> import torch
        >>> pad(torch.ones(1, 1, 2), [1], [0], 5.0).tolist()
        [[[5.0, 1.0, 1.0]]]
    """
    pairs = [p for pair in zip(reversed(before), reversed(after), strict=True) for p in pair]
    return F.pad(x, pairs, value=value).contiguous()


def affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """A tensor whose samples lie as they were, times ``scale`` plus ``shift``, a number for each channel.

    Example:
        >>> import torch
        >>> affine(torch.ones(1, 2, 1), torch.tensor([2.0, 3.0]), torch.tensor([0.5, 0.0])).tolist()
        [[[2.5], [3.0]]]
    """
    each = (-1, *[1] * (x.dim() - 2))
    return x * scale.reshape(each) + shift.reshape(each)
