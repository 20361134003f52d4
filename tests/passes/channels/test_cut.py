"""A cut graph gives what the whole one gave: on weights without a zero but for the columns of what goes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from channels_support import Builder, Removal, aten
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from torch import Tensor, fx

from srigl_fx.passes.channels.coupling import kept_shape
from srigl_fx.passes.channels.cut import cut_constant
from srigl_fx.passes.constness import Constant

C = 8


def random(generator: torch.Generator, *shape: int) -> Tensor:
    """Numbers from 0.5 to 1.5 of either sign: no zero, and no two alike."""
    sign = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    return ((torch.rand(shape, generator=generator) + 0.5) * sign).double()


def settled(b: Builder, out: fx.Node, h: fx.Node, fixed: Tensor) -> Removal:
    """What can go from the graph that ends at ``out``, where some elements of ``h`` are constant."""
    removal = Removal(b.propagate(out), {h: Constant(fixed=fixed, value=torch.where(fixed, h.meta["val"], 0.0))})
    removal.decision.settle()
    return removal


def cut_and_compare(b: Builder, removal: Removal, tolerance: float = 1e-12) -> None:
    """Cut the graph; it gives what it gave before."""
    expected = removal.program.module(*b.inputs)
    removal.cut()
    torch.testing.assert_close(removal.program.module(*b.inputs), expected, rtol=tolerance, atol=tolerance)


Step = Callable[[Builder, fx.Node, torch.Generator], fx.Node]


def scale(b: Builder, h: fx.Node, g: torch.Generator) -> fx.Node:
    return b.call(aten.mul.Tensor, h, b.constant(random(g, h.meta["val"].shape[1], 1), "scale"))


def normalise(b: Builder, h: fx.Node, g: torch.Generator) -> fx.Node:
    channels = h.meta["val"].shape[1]
    more = [b.constant(random(g, channels).abs(), name) for name in ("weight", "bias", "mean", "var")]
    return b.call(aten.batch_norm.default, h, *more, False, 0.1, 1e-5, False)


def depthwise(b: Builder, h: fx.Node, g: torch.Generator) -> fx.Node:
    channels = h.meta["val"].shape[1]
    weight, bias = b.constant(random(g, channels, 1, 3), "depthwise"), b.constant(random(g, channels), "bias")
    return b.call(aten.conv1d.default, h, weight, bias, [1], [1], [1], channels)


def permuted(b: Builder, h: fx.Node, g: torch.Generator) -> fx.Node:
    order = torch.randperm(h.meta["val"].shape[1], generator=g)
    return b.call(aten.index.Tensor, h, [None, b.constant(order, "order")])


def split(b: Builder, h: fx.Node, g: torch.Generator) -> fx.Node:
    one, other = b.call(aten.slice.Tensor, h, 1, 0, 3), b.call(aten.slice.Tensor, h, 1, 3)
    return b.call(aten.cat.default, [b.call(aten.tanh.default, other), one], 1)


STEPS: dict[str, Step] = {
    "relu": lambda b, h, g: b.call(aten.relu.default, h),
    "scale": scale,
    "norm": normalise,
    "prelu": lambda b, h, g: b.call(
        aten.prelu.default, h, b.constant(random(g, h.meta["val"].shape[1]).abs(), "slope")
    ),
    "depthwise": depthwise,
    "shuffle": lambda b, h, g: b.call(aten.channel_shuffle.default, h, 2),
    "roll": lambda b, h, g: b.call(aten.roll.default, h, [3], [1]),
    "flip": lambda b, h, g: b.call(aten.flip.default, h, [1, 2]),
    "permuted": permuted,
    "split": split,
    "turned": lambda b, h, g: b.call(
        aten.transpose.int, b.call(aten.tanh.default, b.call(aten.transpose.int, h, 1, 2)), 1, 2
    ),
    "padded": lambda b, h, g: b.call(aten.constant_pad_nd.default, h, [1, 0]),
    "pooled": lambda b, h, g: b.call(aten.avg_pool1d.default, h, [2], [1]),
    "gated": lambda b, h, g: b.call(aten.mul.Tensor, h, b.call(aten.sigmoid.default, h)),
}


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["linear", "conv", "transposed", "matmul"])
@given(
    steps=st.lists(st.sampled_from(sorted(STEPS)), max_size=4),
    dead=st.sets(st.integers(0, C - 1), min_size=1, max_size=C - 3),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=25, derandomize=True)
def test_columns_of_zeros_go_with_all_that_makes_them(layer: str, steps: list[str], dead: set[int], seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    b = Builder()
    x = b.input(random(g, 2, 3, 6))
    h = b.call(aten.conv1d.default, x, b.constant(random(g, C, 3, 2), "a"), b.constant(random(g, C), "bias"))
    for step in steps:
        h = STEPS[step](b, h, g)
    columns = sorted(dead)
    bias = b.constant(random(g, 4), "last_bias")
    if layer in {"conv", "transposed"}:
        weight = random(g, *((4, C, 2) if layer == "conv" else (C, 4, 2)))
        weight.movedim(0 if layer == "transposed" else 1, 0)[columns] = 0.0
        target = aten.conv1d.default if layer == "conv" else aten.conv_transpose1d.default
        out = b.call(target, h, b.constant(weight, "b"), bias)
    else:
        h = b.call(aten.transpose.int, h, 1, 2)
        weight = random(g, 4, C)
        weight[:, columns] = 0.0
        if layer == "linear":
            out = b.call(aten.linear.default, h, b.constant(weight, "b"), bias)
        else:
            out = b.call(aten.matmul.default, h, b.constant(weight.t(), "b"))
    removal = Removal(b.propagate(out))
    removal.decision.settle()
    # A slice may keep one of its channels, since no part becomes empty: all others of the dead ones go.
    gone = int(removal.decision.gone(removal.flow.sites[0].rows).sum())
    assert gone <= len(dead)
    assert gone == len(dead) or "split" in steps
    cut_and_compare(b, removal, 1e-10)
    read = [node for node in removal.program.module.graph.nodes if node.op == "get_attr" and node.users]
    assert (C - gone, 3, 2) in [tuple(node.meta["val"].shape) for node in read]


def test_a_uniform_constant_is_added_to_the_bias_or_to_one_that_is_made() -> None:
    for with_bias in (True, False):
        g = torch.Generator().manual_seed(0)
        b = Builder()
        first = random(g, C, 3)
        first[[1, 4]] = 0.0
        offset = random(g, C)
        h = b.call(aten.linear.default, b.input(random(g, 5, 3)), b.constant(first, "a"), b.constant(offset, "a_bias"))
        h = b.call(aten.sigmoid.default, h)
        bias = [b.constant(random(g, 4), "b_bias")] if with_bias else []
        out = b.call(aten.linear.default, h, b.constant(random(g, 4, C), "b"), *bias)
        fixed = torch.zeros(5, C, dtype=torch.bool)
        fixed[:, [1, 4]] = True
        removal = Removal(b.propagate(out), {h: Constant(fixed=fixed, value=torch.where(fixed, h.meta["val"], 0.0))})
        removal.decision.settle()
        expected = removal.program.module(*b.inputs)
        removal.cut()
        torch.testing.assert_close(removal.program.module(*b.inputs), expected, rtol=1e-12, atol=1e-12)
        assert out.args[1].meta["val"].shape == (4, C - 2)  # type: ignore[union-attr]


def constant_channels(first: Tensor, value: Tensor) -> Tensor:
    """Where a value does not depend on the input: rows of the first layer that are zero."""
    return (first == 0).reshape(len(first), -1).all(1)[None, :, None].expand(value.shape)


@pytest.mark.parametrize("kind", ["padding", "transposed"])
def test_one_constant_channel_carries_the_others_over_the_border(kind: str) -> None:
    g = torch.Generator().manual_seed(1)
    b = Builder()
    first = random(g, C, 3, 1)
    first[[0, 3, 6]] = 0.0
    h = b.call(
        aten.conv1d.default, b.input(random(g, 2, 3, 6)), b.constant(first, "a"), b.constant(random(g, C), "a_bias")
    )
    h = b.call(aten.tanh.default, h)
    if kind == "padding":
        out = b.call(aten.conv1d.default, h, b.constant(random(g, 4, C, 3), "b"), None, [1], [2])
    else:
        out = b.call(aten.conv_transpose1d.default, h, b.constant(random(g, C, 4, 3), "b"))
    fixed = constant_channels(first, h.meta["val"])
    removal = settled(b, out, h, fixed)
    assert int(removal.decision.gone(removal.flow.sites[0].rows).sum()) == 2
    cut_and_compare(b, removal)


def test_a_constant_that_varies_over_positions_becomes_a_map() -> None:
    g = torch.Generator().manual_seed(2)
    b = Builder()
    first = random(g, C, 30, 1)
    first[[2, 5]] = 0.0
    h = b.call(aten.conv1d.default, b.input(random(g, 1, 30, 3)), b.constant(first, "a"))
    h = b.call(aten.add.Tensor, h, b.constant(random(g, C, 3), "position"))
    out = b.call(aten.conv1d.default, h, b.constant(random(g, 4, C, 1), "b"))
    fixed = constant_channels(first, h.meta["val"])
    removal = settled(b, out, h, fixed)
    assert removal.decision.fold(removal.flow.sites[1]).mapped.sum() == 2
    cut_and_compare(b, removal)
    assert aten.add.Tensor in [user.target for user in out.users]


@pytest.mark.parametrize("name", ["mean", "rms_norm", "rms_norm with a gain", "sum"])
def test_what_is_read_over_channels_keeps_its_length(name: str) -> None:
    g = torch.Generator().manual_seed(3)
    b = Builder()
    first = random(g, C, 3)
    first[[0, 7]] = 0.0
    h = b.call(aten.relu.default, b.call(aten.linear.default, b.input(random(g, 5, 3)), b.constant(first, "a")))
    if name in {"mean", "sum"}:
        out = b.call(aten.mean.dim if name == "mean" else aten.sum.dim_IntList, h, [1])
    else:
        gain = (b.constant(random(g, C), "gain"),) if "gain" in name else (None,)
        out = b.call(aten.rms_norm.default, h, [C], *gain)
        last = random(g, 4, C)
        last[:, [0, 7]] = 0.0
        out = b.call(aten.linear.default, out, b.constant(last, "b"))
    fixed = torch.zeros(5, C, dtype=torch.bool)
    fixed[:, [0, 7]] = True
    removal = settled(b, out, h, fixed)
    assert int(removal.decision.gone(removal.flow.sites[0].rows).sum()) == 2
    cut_and_compare(b, removal)


def test_groups_of_a_norm_and_of_a_convolution_go_with_their_channels() -> None:
    g = torch.Generator().manual_seed(4)
    b = Builder()
    h = b.call(aten.conv1d.default, b.input(random(g, 2, 3, 6)), b.constant(random(g, C, 3, 1), "a"))
    h = b.call(aten.group_norm.default, h, 4, b.constant(random(g, C), "gain"), b.constant(random(g, C), "shift"))
    h = b.call(aten.conv1d.default, h, b.constant(random(g, C, 4, 3), "grouped"), None, [1], [0], [1], 2)
    last = random(g, 3, C, 1)
    last[:, 4:] = 0.0  # the second group of the convolution, which is the last two of the norm
    out = b.call(aten.conv1d.default, h, b.constant(last, "b"))
    removal = Removal(b.propagate(out))
    removal.decision.settle()
    cut_and_compare(b, removal)
    norm, grouped = h.args[0], h
    assert norm.args[1] == 2  # type: ignore[union-attr]
    assert grouped.args[6] == 1
    assert grouped.args[1].meta["val"].shape == (4, 4, 3)  # type: ignore[union-attr]


def test_equal_constants_of_one_tensor_stay_one() -> None:
    g = torch.Generator().manual_seed(5)
    b = Builder()
    last = random(g, 4, C)
    last[:, [1, 2]] = 0.0
    tied = b.constant(last, "tied")
    again = b.module.graph.node_copy(tied)
    x = b.input(random(g, 2, 3))
    h = b.call(aten.linear.default, x, b.constant(random(g, C, 3), "a"))
    one, other = b.call(aten.linear.default, h, tied), b.call(aten.linear.default, b.call(aten.relu.default, h), again)
    removal = Removal(b.propagate(one, other))
    removal.decision.settle()
    removal.cut()
    assert one.args[1] is other.args[1] or one.args[1].target == other.args[1].target  # type: ignore[union-attr]
    assert one.args[1].meta["val"].shape == (4, C - 2)  # type: ignore[union-attr]


# -- constants --------------------------------------------------------------------------------------------------------


def by_elements(tensor: Tensor, kept: Tensor) -> Tensor | None:
    """What a constant must be: broadcast to the values, cut element by element."""
    shape = kept_shape(kept)
    return None if shape is None else tensor.expand(kept.shape)[kept].reshape(shape)


@pytest.mark.slow
@given(data=st.data())
@settings(deadline=None, max_examples=150, derandomize=True)
def test_a_constant_is_cut_like_what_it_meets(data: Any) -> None:
    shape = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)))
    own = tuple(data.draw(st.sampled_from([1, size])) for size in shape)[data.draw(st.integers(0, 2)) :]
    array: NDArray[Any] = data.draw(arrays(bool, shape))
    kept = torch.from_numpy(array)
    tensor = torch.arange(float(torch.Size(own).numel())).reshape(own)
    expected = by_elements(tensor, kept)
    if expected is None:
        return
    assert torch.equal(cut_constant(tensor, kept).expand(expected.shape), expected)


def test_a_constant_that_is_the_same_for_all_channels_stays() -> None:
    number = torch.tensor([[2.0], [3.0]])
    assert cut_constant(number, torch.tensor([[True, False, True]])) is number
