"""Where the channels of a graph go: labels for the elements of every value, and what reads them.

Owns :class:`Flow`, the record that other modules fill in and read. It must not know how operators pass channels on, nor
what is removed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from srigl_fx.passes.channels.coupling import Channels


@dataclass
class Site:
    """A contraction of data with a constant weight, or rows looked up in one.

    The weight is seen as (groups, rows, columns, kernel).

    Attributes:
        node: The operator.
        weight: The ``get_attr`` node of its weight.
        bias: The ``get_attr`` node of its bias.
        data: What it contracts; None where that has no channels (an embedding).
        axis: The channel axis of the data, from the end.
        rows: (groups, rows) labels, of what it makes.
        columns: (groups, columns) labels, of what it reads.
        layout: How the weight is stored: "rows first" (linear, convolution), "columns first" (matmul, embedding) or
            "groups and columns first" (transposed convolution).
        coupled: Whether each row is its own column's (depthwise), so that nothing is contracted away.
        places: At how many places of one sample the weight is applied, times its kernel.
    """

    node: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    data: fx.Node | None
    axis: int
    rows: Tensor
    columns: Tensor
    layout: str
    coupled: bool = False
    places: int = 0

    def matrix(self, tensor: Tensor) -> Tensor:
        """The weight, or a mask of its shape, as (groups, rows, columns, kernel)."""
        groups, rows, columns = *self.rows.shape, self.columns.shape[1]
        if self.layout == "rows first":
            return tensor.reshape(groups, rows, columns, -1)
        return tensor.reshape(groups, columns, rows, -1).transpose(1, 2)

    def tensor(self, matrix: Tensor, kernel: Sequence[int]) -> Tensor:
        """The weight as it is stored, from :meth:`matrix`."""
        groups, rows, columns, _ = matrix.shape
        if self.layout == "rows first":
            return matrix.reshape(groups * rows, columns, *kernel)
        return matrix.transpose(1, 2).reshape(groups * columns, rows, *kernel)


@dataclass
class Pairing:
    """A product of two activations, summed over channels that both have: queries and keys.

    Attributes:
        node: The operator.
        left: The first activation.
        right: The second.
        left_axis: The summed axis of the first, from the end; the other one of its last two axes is free.
        right_axis: The same of the second.
        softmax: Whether a softmax over the free axis of the second follows, so that what is the same for all of it
            does not matter.
        whole: (n,) labels of the outer indices (heads): where such a one goes, so do its channels.
        members: (n, channels), their labels.
    """

    node: fx.Node
    left: fx.Node
    right: fx.Node
    left_axis: int
    right_axis: int
    softmax: bool
    whole: Tensor
    members: Tensor


@dataclass
class Reading:
    """A sum, mean or root mean square over a channel axis: ``axis`` of ``data``, from the end."""

    node: fx.Node
    data: fx.Node
    axis: int


@dataclass
class Flow:
    """All that is known of the channels of a graph.

    Attributes:
        labels: For every node, the labels of its value, of a shape that broadcasts to it (a list for several values).
        channels: The labels and their coupling.
        sites: The contractions with constant weights, in the graph's order.
        pairings: The products of activations.
        readings: Reductions over channels that can tell what a constant adds.
        hulls: Pairs of (n,) and (n, m) labels: each of the n goes exactly if all m of its row go.
        adopted: Other constants (``get_attr`` nodes, or nodes that depend on the batch size only), the node that reads
            each, and the labels of the values it is combined with there, aligned at the last axis.
    """

    labels: dict[fx.Node, Any] = field(default_factory=dict)
    channels: Channels = field(default_factory=Channels)
    sites: list[Site] = field(default_factory=list)
    pairings: list[Pairing] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)
    hulls: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    adopted: list[tuple[fx.Node, fx.Node, Tensor]] = field(default_factory=list)
