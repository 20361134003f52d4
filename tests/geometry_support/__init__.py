"""Random convolutions over one to three axes, ordinary and transposed, as PyTorch's own layers.

Numbers are small and lean towards those that a shortcut could mistake for another case: kernels and strides of one,
padding that output padding makes up for, sizes that a layer keeps though it does not read them one by one.
"""

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

_LARGEST = (40, 9, 5)  # of an input's axis, by rank
_FILTERS = (1, 2, 3, 16, 17)  # of a group: 16 are a vector
MODES = ("zeros", "reflect", "replicate", "circular")
CLASSES: dict[tuple[bool, int], type[nn.Module]] = {
    (False, 1): nn.Conv1d,
    (False, 2): nn.Conv2d,
    (False, 3): nn.Conv3d,
    (True, 1): nn.ConvTranspose1d,
    (True, 2): nn.ConvTranspose2d,
    (True, 3): nn.ConvTranspose3d,
}


@dataclass(frozen=True, kw_only=True)
class Axis:
    """The settings of a layer along one axis."""

    kernel: int
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    output_padding: int = 0

    @property
    def reach(self) -> int:
        """How far apart the first and the last position that one output reads are, and one."""
        return self.dilation * (self.kernel - 1) + 1

    def smallest(self, *, transposed: bool) -> int:
        """The smallest input that leaves an output."""
        if not transposed:
            return max(1, self.reach - 2 * self.padding)
        needed = 1 + 2 * self.padding - self.reach - self.output_padding
        return max(1, -(-needed // self.stride) + 1)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A convolution and the size of its input.

    Attributes:
        axes: The settings of each axis.
        groups: Groups of channels.
        filters: Output channels of each group.
        channels: Input channels of each group.
        transposed: Whether it is a transposed convolution.
        named: "same" or "valid" instead of the padding of the axes.
        mode: What is padded with.
        bias: Whether it has one.
        size: The input's axes.
    """

    axes: tuple[Axis, ...]
    groups: int
    filters: int
    channels: int
    transposed: bool
    named: str
    mode: str
    bias: bool
    size: tuple[int, ...]

    def make(self) -> nn.Module:
        """The layer, with PyTorch's initialisation."""
        settings: dict[str, Any] = {
            name: tuple(getattr(axis, name) for axis in self.axes)
            for name in ("stride", "padding", "dilation", "output_padding")
        }
        if not self.transposed:
            del settings["output_padding"]
        if self.named:
            settings["padding"] = self.named
        return CLASSES[self.transposed, len(self.axes)](
            self.groups * self.channels,
            self.groups * self.filters,
            tuple(axis.kernel for axis in self.axes),
            groups=self.groups,
            bias=self.bias,
            padding_mode=self.mode,
            **settings,
        )

    def input(self, batch: int) -> Tensor:
        """A random batch for the layer."""
        return torch.randn(batch, self.groups * self.channels, *self.size)


@st.composite
def _axes(draw: st.DrawFn, transposed: bool) -> Axis:
    kernel, stride = draw(st.sampled_from((1, 1, 2, 3, 4))), draw(st.sampled_from((1, 1, 2, 3)))
    padding, dilation = draw(st.integers(0, 3)), draw(st.sampled_from((1, 2, 3, 5)))
    extra = 0
    if transposed:  # PyTorch wants it below the stride or the dilation
        extra = draw(st.sampled_from((0, 1, 2, 2 * padding)))
        extra = min(extra, max(stride, dilation) - 1)
    return Axis(kernel=kernel, stride=stride, padding=padding, dilation=dilation, output_padding=extra)


@st.composite
def layers(draw: st.DrawFn, *, modes: tuple[str, ...] = MODES) -> Layer:
    """Any convolution that PyTorch takes; half of them have the same settings along all axes."""
    rank, transposed = draw(st.integers(1, 3)), draw(st.booleans())
    if draw(st.booleans()):
        axes = (draw(_axes(transposed)),) * rank
    else:
        axes = tuple(draw(_axes(transposed)) for _ in range(rank))
    named, mode = "", "zeros"
    if not transposed:
        mode = draw(st.sampled_from(modes))
        named = draw(st.sampled_from(("", "", "same", "valid")))
        if named == "same":
            axes = tuple(Axis(kernel=axis.kernel, dilation=axis.dilation) for axis in axes)
    size = []
    for axis in axes:
        least = Axis(kernel=axis.kernel, stride=axis.stride, dilation=axis.dilation) if named else axis
        smallest = 1 if named == "same" else least.smallest(transposed=transposed)
        if mode != "zeros":  # what is reflected or repeated must be there
            smallest = max(smallest, axis.padding + 1, axis.reach)
        size.append(smallest + draw(st.integers(0, _LARGEST[rank - 1])))
    return Layer(
        axes=axes,
        groups=draw(st.integers(1, 3)),
        filters=draw(st.sampled_from(_FILTERS)),
        channels=draw(st.integers(1, 3)),
        transposed=transposed,
        named=named,
        mode=mode,
        bias=draw(st.booleans()),
        size=tuple(size),
    )


def shifting(size: int, *, rank: int = 1, filters: int = 2, padding: int = 1) -> Layer:
    """A transposed convolution that keeps the size, but moves what it reads by ``padding``, zeros coming in."""
    axis = Axis(kernel=1, padding=padding, dilation=2 * padding + 1, output_padding=2 * padding)
    return Layer(
        axes=(axis,) * rank,
        groups=1,
        filters=filters,
        channels=3,
        transposed=True,
        named="",
        mode="zeros",
        bias=True,
        size=(size,) * rank,
    )
