"""What goes, what comes back and why: each condition on a graph of two layers, with weights by hand."""

from typing import Any

import pytest
import torch
from channels_support import Builder, Removal, aten
from torch import Tensor, fx

from srigl_fx.passes.channels.decision import columns_of, count_reasons, even, has_borders, known_of
from srigl_fx.passes.channels.flow import Site
from srigl_fx.passes.constness import Constant


def constant(fixed: Any, value: Any) -> Constant:
    return Constant(fixed=torch.tensor(fixed), value=torch.tensor(value))


class Layers:
    """Two layers with an activation between: what the second one reads may be constant, as far as is told."""

    def __init__(self, first: Tensor, second: Tensor, x: Tensor, *, padding: int | None = None) -> None:
        self.b = Builder()
        self.second = second
        target = aten.linear.default if first.dim() == 2 else aten.conv1d.default
        self.a = self.b.call(target, self.b.input(x), self.b.constant(first, "a"))
        self.h = self.b.call(aten.sigmoid.default, self.a)
        more = () if padding is None else (None, [1], [padding])
        self.out = self.b.call(target, self.h, self.b.constant(second, "b"), *more)

    def settle(self, known: Constant | None = None) -> Removal:
        removal = Removal(self.b.propagate(self.out), {} if known is None else {self.h: known})
        removal.decision.settle()
        return removal


def gone(removal: Removal, site: int = 0) -> list[bool]:
    rows: list[bool] = removal.decision.gone(removal.flow.sites[site].rows).flatten().tolist()
    return rows


def reasons(removal: Removal) -> dict[str, int]:
    return dict(count_reasons(removal.decision, removal.flow.sites[0].rows))


READ = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
X = torch.ones(2, 3)


def test_a_channel_that_nobody_reads_goes() -> None:
    weight = READ.clone()
    weight[:, 2] = 0.0
    removal = Layers(torch.ones(4, 3), weight, X).settle()
    assert gone(removal) == [False, False, True, False]
    assert sum(reasons(removal).values()) == 3


def test_a_channel_that_one_row_reads_stays_with_the_reason() -> None:
    weight = READ.clone()
    weight[1, 2] = 0.0
    removal = Layers(torch.ones(4, 3), weight, X).settle()
    assert gone(removal) == [False] * 4
    assert all("live, before b reads them" in reason for reason in reasons(removal))


def test_a_constant_channel_goes_into_the_bias() -> None:
    removal = Layers(torch.ones(4, 3), READ, X).settle(constant([False, True, False, True], [0.0, 0.5, 0.0, 0.25]))
    assert gone(removal) == [False, True, False, True]
    site = removal.flow.sites[1]
    fold = removal.decision.fold(site)
    assert fold.bias.tolist() == [[False, True, False, True]]
    assert not bool(fold.mapped.any() | fold.carried.any())
    assert removal.decision.arriving(site).value[0, [1, 3]].tolist() == [0.5, 0.25]


def test_a_constant_zero_leaves_nothing() -> None:
    removal = Layers(torch.ones(4, 3), READ, X).settle(constant([False, True, False, False], [0.0] * 4))
    assert gone(removal) == [False, True, False, False]
    fold = removal.decision.fold(removal.flow.sites[1])
    assert not bool(fold.bias.any() | fold.mapped.any() | fold.carried.any())


def test_no_axis_becomes_empty() -> None:
    removal = Layers(torch.ones(4, 3), torch.zeros(2, 4), X).settle()
    assert gone(removal) == [False, True, True, True]
    assert list(reasons(removal)) == [f"the last channel of {removal.flow.sites[0].node.name}"]


CONV = torch.arange(1.0, 17.0).reshape(2, 4, 2)


@pytest.mark.parametrize(("padding", "expected"), [(0, [True, False, True, True]), (1, [True, False, False, True])])
def test_the_largest_constant_stays_in_front_of_borders(padding: int, expected: list[bool]) -> None:
    known = constant([[True], [False], [True], [True]], [[0.25], [0.0], [0.5], [-0.125]])
    layers = Layers(torch.ones(4, 3, 1), CONV, torch.ones(2, 3, 6), padding=padding)
    known = Constant(fixed=known.fixed.expand(4, 6)[None], value=known.value.expand(4, 6)[None])
    removal = layers.settle(known)
    assert gone(removal) == expected
    site = removal.flow.sites[1]
    fold = removal.decision.fold(site)
    assert has_borders(site) == bool(padding)
    assert fold.carrier.tolist() == [2 if padding else -1]
    assert fold.carried.tolist() == [[bool(padding), False, False, bool(padding)]]
    assert fold.bias.tolist() == [[not padding, False, not padding, not padding]]
    if padding:
        assert "carries the constant channels that b reads beyond its borders" in reasons(removal)


@pytest.mark.parametrize(("rows", "expected"), [(2, False), (40, True)])
def test_a_map_is_made_where_it_is_smaller_than_what_goes(rows: int, expected: bool) -> None:
    """The result has 2 x 4 positions a row, so that the map has 8 numbers a row: too many for 2 x 3 weights."""
    first, second = torch.ones(4, 3 if rows == 2 else 400), torch.rand(rows, 4) + 0.5
    layers = Layers(first, second, torch.ones(2, 4, first.shape[1]))
    fixed = torch.tensor([True, False, False, False]).expand(1, 4, 4)
    removal = layers.settle(Constant(fixed=fixed, value=torch.arange(16.0).reshape(1, 4, 4)))
    assert gone(removal)[0] == expected
    if expected:
        assert removal.decision.fold(removal.flow.sites[1]).mapped.tolist() == [[True, False, False, False]]
    else:
        assert any("larger than what it saves" in reason for reason in reasons(removal))


@pytest.mark.parametrize(("value", "expected"), [(0.0, True), (0.5, False)])
def test_a_sum_over_channels_tells_zero_alone(value: float, expected: bool) -> None:
    b = Builder()
    h = b.call(aten.relu.default, b.call(aten.linear.default, b.input(X), b.constant(torch.ones(4, 3), "a")))
    out = b.call(aten.sum.dim_IntList, h, [1])
    known = constant([True, False, False, False], [value, 1.0, 1.0, 1.0])
    removal = Removal(b.propagate(out), {h: Constant(fixed=known.fixed[None], value=known.value[None])})
    removal.decision.settle()
    assert gone(removal) == [expected, False, False, False]
    assert any("summed over" in reason for reason in reasons(removal))


def scores(known_keys: Constant | None, *, softmax: bool) -> Removal:
    """Scores of one head of four channels, from queries and keys that layers make."""
    b = Builder()
    x = b.input(torch.rand(2, 5, 3))
    q = b.call(aten.linear.default, x, b.constant(torch.ones(4, 3), "q"))
    k = b.call(aten.linear.default, x, b.constant(torch.ones(4, 3), "k"))
    turned = b.call(aten.transpose.int, k, 1, 2)
    out = b.call(aten.matmul.default, q, turned)
    out = b.call(aten.softmax.int, out, -1) if softmax else out
    removal = Removal(b.propagate(out), {} if known_keys is None else {turned: known_keys})
    removal.decision.settle()
    return removal


@pytest.mark.parametrize(
    ("value", "softmax", "expected"), [(0.0, False, True), (0.5, True, True), (0.5, False, False), (None, True, False)]
)
def test_queries_and_keys_go_where_the_key_says_nothing(value: float | None, softmax: bool, expected: bool) -> None:
    known = None
    if value is not None:
        fixed = torch.tensor([False, True, False, False])[None, :, None].expand(1, 4, 5)
        known = Constant(fixed=fixed, value=torch.full((1, 4, 5), value))
    removal = scores(known, softmax=softmax)
    assert gone(removal, 0) == gone(removal, 1) == [False, expected, False, False]


def test_a_group_goes_if_all_of_it_goes_and_keeps_one_if_it_stays() -> None:
    """Two groups of two columns and two rows; the first group is not read at all, of the second one row is not."""
    b = Builder()
    x = b.input(torch.rand(2, 3, 5))
    h = b.call(aten.conv1d.default, x, b.constant(torch.ones(4, 3, 1), "a"))
    h = b.call(aten.conv1d.default, h, b.constant(torch.ones(4, 2, 1), "grouped"), None, [1], [0], [1], 2)
    last = torch.ones(2, 4, 1)
    last[:, :2] = 0.0
    out = b.call(aten.conv1d.default, h, b.constant(last, "b"))
    removal = Removal(b.propagate(out))
    removal.decision.settle()
    assert gone(removal, 0) == gone(removal, 1) == [True, True, False, False]
    last[:, 1] = 1.0
    removal = Removal(removal_flow(last))
    removal.decision.settle()
    assert gone(removal, 0) == [False] * 4
    assert gone(removal, 1) == [False] * 4, "as many rows of each group"
    assert any("unequal numbers along an axis" in reason for reason in removal.decision.reason.values())


def removal_flow(last: Tensor) -> Any:
    b = Builder()
    h = b.call(aten.conv1d.default, b.input(torch.rand(2, 3, 5)), b.constant(torch.ones(4, 3, 1), "a"))
    h = b.call(aten.conv1d.default, h, b.constant(torch.ones(4, 2, 1), "grouped"), None, [1], [0], [1], 2)
    return b.propagate(b.call(aten.conv1d.default, h, b.constant(last, "b")))


def test_channels_of_heads_are_equally_many() -> None:
    """Two heads of two channels: one of the first and none of the second is not read, so that it comes back."""
    for unread, expected in (
        ([0], [False] * 4),
        ([0, 3], [True, False, False, True]),
        ([2, 3], [False, False, True, True]),
    ):
        b = Builder()
        h = b.call(aten.linear.default, b.input(torch.rand(2, 3)), b.constant(torch.ones(4, 3), "a"))
        h = b.call(aten.reshape.default, b.call(aten.exp.default, b.call(aten.reshape.default, h, [2, 2, 2])), [2, 4])
        last = torch.ones(2, 4)
        last[:, unread] = 0.0
        removal = Removal(b.propagate(b.call(aten.linear.default, h, b.constant(last, "b"))))
        removal.decision.settle()
        assert gone(removal) == expected


def test_what_is_kept_by_hand_stays_with_its_first_reason() -> None:
    weight = READ.clone()
    weight[:, :2] = 0.0
    removal = Layers(torch.ones(4, 3), weight, X).settle()
    numbers = removal.groups.of(removal.flow.sites[0].rows[0, :1])
    removal.decision.keep(numbers, "first")
    removal.decision.keep(numbers, "second")
    assert gone(removal) == [False, True, False, False]
    assert removal.decision.reason[int(numbers)] == "first"


# -- what arrives -----------------------------------------------------------------------------------------------------


def test_what_arrives_at_columns_is_uniform_fixed_or_neither() -> None:
    builder = Builder()
    data = builder.input(torch.ones(2, 3, 4))
    known = {
        data: Constant(
            fixed=torch.tensor([[[True] * 4, [True] * 4, [True, True, True, False]]]),
            value=torch.tensor([[[2.0] * 4, [1.0, 2.0, 1.0, 2.0], [3.0] * 4]]),
        )
    }
    site = Site(data, data, None, data, -2, torch.zeros(1, 2), torch.zeros(1, 3), "rows first")
    found = columns_of(site, data, torch.Size([1, 3]), known)
    assert found.fixed.tolist() == [[True, True, False]]
    assert found.uniform.tolist() == [[True, False, False]]
    assert float(found.value[0, 0]) == 2.0
    nothing = columns_of(site, data, torch.Size([1, 3]), {})
    assert not bool(nothing.fixed.any() | nothing.uniform.any())


def test_a_batch_that_is_left_out_of_what_is_known_gets_its_axis_back() -> None:
    class Sized:
        shape = ("batch", 3)

    node: fx.Node = fx.Graph().placeholder("x")
    node.meta["val"] = Sized()
    known = known_of(node, {node: constant([True, False, True], [1.0, 0.0, 2.0])})
    assert known is not None
    assert known.fixed.tolist() == [[True, False, True]]
    assert known_of(node, {}) is None


def test_even_is_equal_up_to_rounding() -> None:
    one = torch.tensor([1.0, 1.0 + 1e-6, 1.0 + 1e-5, 0.0])
    assert even(one, torch.tensor([1.0, 1.0, 1.0, 0.0])).tolist() == [True, True, False, True]
    assert even(torch.tensor([3, 4]), torch.tensor([3, 3])).tolist() == [True, False]


@pytest.mark.parametrize(
    ("padding", "expected"), [([0], False), ([1], True), ("valid", False), ("same", True), (None, True)]
)
def test_borders_are_where_zeros_are_read(padding: Any, expected: bool) -> None:
    b = Builder()
    x, weight = b.input(torch.ones(1, 2, 6)), b.constant(torch.ones(2, 2, 3))
    if padding is None:
        node = b.call(aten.conv_transpose1d.default, x, weight)
    elif isinstance(padding, str):
        node = b.call(aten.conv1d.padding, x, weight, None, [1], padding)
    else:
        node = b.call(aten.conv1d.default, x, weight, None, [1], padding)
    site = Site(node, weight, None, x, -2, torch.zeros(1, 2), torch.zeros(1, 2), "rows first")
    assert has_borders(site) == expected
