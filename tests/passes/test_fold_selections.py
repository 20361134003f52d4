"""Selections of channels become part of the weights that read them, rule by rule."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lowering_support import mask_by_hand, randomise
from torch import Tensor, nn

from srigl_fx.passes.base import PassResult, run
from srigl_fx.passes.capture import capture
from srigl_fx.passes.fold_constants import FoldConstants
from srigl_fx.passes.fold_selections import FoldSelections
from srigl_fx.passes.normalize import Normalize
from srigl_fx.passes.operators import operator_of
from srigl_fx.passes.program import Program, tensor_at
from srigl_fx.passes.to_linear import ToLinear

aten = torch.ops.aten
SELECTIONS = {"pick", "order", "shuffle"}


class Selecting(nn.Module):
    """A layer behind a selection that a user wrote by hand."""

    def __init__(self, layer: nn.Module, places: list[int], axis: int = -1, form: str = "index_select") -> None:
        super().__init__()
        self.layer, self.axis, self.form = layer, axis, form
        self.register_buffer("places", torch.tensor(places))
        self.listed = places

    def forward(self, x: Tensor) -> Tensor:
        places: Any = self.places
        if self.form == "index_select":
            x = x.index_select(self.axis, places)
        elif self.form == "index":
            x = x[..., places] if self.axis == -1 else x[:, places]
        elif self.form == "list":
            x = x[..., self.listed]
        elif self.form == "flip":
            x = x.flip(self.axis)
        else:
            x = nn.functional.channel_shuffle(x, 3)
        y: Tensor = self.layer(x)
        return y


def fold(model: nn.Module, *args: Tensor) -> PassResult[Program]:
    mask_by_hand(randomise(model), 0.5)
    program = run((Normalize(), FoldConstants(), ToLinear()), capture(model.eval(), args)).subject
    return run((FoldSelections(),), program)


def left(program: Program) -> int:
    return sum(operator_of(node.target).family in SELECTIONS for node in program.module.graph.nodes)


def agrees(model: nn.Module, program: Program, *args: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(program.module(*args), model(*args), rtol=1e-5, atol=1e-5)


def masks_hold(program: Program) -> None:
    read = {str(node.target) for node in program.module.graph.find_nodes(op="get_attr")}
    assert program.masked.keys() <= read
    for target, masked in program.masked.items():
        tensor = tensor_at(program.module, target).detach()
        assert masked.mask.shape == tensor.shape
        assert masked.mask.dtype is torch.bool
        assert not bool((tensor.ne(0) & ~masked.mask).any())


@pytest.mark.parametrize("form", ["index_select", "index", "list", "flip"])
def test_rule_1_every_form_of_a_selection(form: str) -> None:
    places = [5, 4, 3, 2, 1, 0] if form == "flip" else [3, -1, 0, 1, 4, 2] if form == "index" else [3, 5, 0, 1, 4, 2]
    model, x = Selecting(nn.Linear(6, 8), places, form=form), torch.randn(4, 3, 6)
    result = fold(model, x)
    assert result.changed
    assert left(result.subject) == 0
    assert not result.notes
    masks_hold(result.subject)
    agrees(model, result.subject, torch.randn(5, 3, 6))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: nn.Conv1d(6, 8, 3, padding=1), (2, 6, 5)),
        (lambda: nn.Conv2d(6, 8, (3, 2), stride=2), (2, 6, 5, 5)),
        (lambda: nn.ConvTranspose1d(6, 8, 3), (2, 6, 5)),
        (lambda: nn.ConvTranspose2d(6, 4, 2, groups=1), (2, 6, 3, 3)),
        (lambda: nn.Conv3d(6, 4, 2), (2, 6, 3, 3, 3)),
    ],
    ids=["conv1d", "conv2d", "transposed1d", "transposed2d", "conv3d"],
)
def test_rule_2_convolutions(layer: Any, shape: tuple[int, ...]) -> None:
    for form in ("index_select", "shuffle"):
        model = Selecting(layer(), [3, 5, 0, 1, 4, 2], axis=1, form=form)
        result = fold(model, torch.randn(shape))
        assert result.changed
        assert left(result.subject) == 0
        masks_hold(result.subject)
        agrees(model, result.subject, torch.randn(3, *shape[1:]))


@pytest.mark.long
@settings(max_examples=12, deadline=None)
@given(st.data())
def test_rule_3_any_selection_of_any_channels_repeated_and_left_out(data: st.DataObject) -> None:
    channels = data.draw(st.integers(1, 7))
    places = data.draw(st.lists(st.integers(0, channels - 1), min_size=1, max_size=9))
    convolution = data.draw(st.booleans())
    layer: nn.Module = nn.Conv1d(len(places), 5, 2) if convolution else nn.Linear(len(places), 5)
    shape = (2, channels, 4) if convolution else (2, channels)
    model = Selecting(layer, places, axis=1 if convolution else -1)
    mask_by_hand(randomise(model), 0.5)
    program = run((Normalize(), FoldConstants(), ToLinear()), capture(model.eval(), (torch.randn(shape),))).subject
    result = run((FoldSelections(),), program)
    assert left(result.subject) == 0
    masks_hold(result.subject)
    agrees(model, result.subject, torch.randn(3, *shape[1:]))


def test_rule_3_weights_of_a_repeated_channel_are_added() -> None:
    model = Selecting(nn.Linear(3, 2), [1, 1, 0])
    result = fold(model, torch.randn(2, 4))
    weight: Any = model.layer.weight
    (target,) = result.subject.masked
    found = tensor_at(result.subject.module, target)
    zero = torch.zeros(2)
    by_hand = torch.stack([weight[:, 2], weight[:, 0] + weight[:, 1], zero, zero], 1)
    torch.testing.assert_close(found, by_hand.detach(), rtol=0, atol=0)


@pytest.mark.parametrize("transposed", [False, True])
def test_rule_4_groups_keep_their_channels(transposed: bool) -> None:
    kind: Any = nn.ConvTranspose1d if transposed else nn.Conv1d
    inside = Selecting(kind(6, 8, 3, groups=2), [2, 0, 1, 4, 5, 3], axis=1)
    result = fold(inside, torch.randn(2, 6, 5))
    assert left(result.subject) == 0
    masks_hold(result.subject)
    agrees(inside, result.subject, torch.randn(3, 6, 5))
    across = Selecting(kind(6, 8, 3, groups=2), [3, 0, 1, 4, 5, 2], axis=1)
    result = fold(across, torch.randn(2, 6, 5))
    assert not result.changed
    assert "moves channels from one group" in result.notes[0].reason
    agrees(across, result.subject, torch.randn(3, 6, 5))


def test_rule_5_selections_of_selections() -> None:
    model = Selecting(Selecting(nn.Linear(4, 8), [3, 3, 0, 1], form="index"), [4, 2, 0, 1])
    result = fold(model, torch.randn(2, 5))
    assert left(result.subject) == 0
    agrees(model, result.subject, torch.randn(3, 5))


class Several(nn.Module):
    """Two layers that read one selection, and what else may read it."""

    def __init__(self, other: str = "") -> None:
        super().__init__()
        self.first, self.second, self.other = nn.Linear(6, 8), nn.Linear(6, 4), other
        self.register_buffer("places", torch.tensor([3, 5, 0, 1, 4, 2]))

    def forward(self, x: Tensor) -> Any:
        places: Any = self.places
        x = x[:, places]
        if self.other == "output":
            return self.first(x), self.second(x), x
        if self.other == "sum":
            return self.first(x), self.second(x) + x.sum()
        if self.other == "written":
            places.add_(0)
        return self.first(x), self.second(x)


def test_rule_1_each_of_several_layers_folds_its_own() -> None:
    model = Several()
    result = fold(model, torch.randn(2, 6))
    assert left(result.subject) == 0
    assert len(result.subject.masked) == 2
    agrees(model, result.subject, torch.randn(3, 6))


@pytest.mark.parametrize(("other", "reason"), [("output", "it is an output, too"), ("sum", "reads it, too")])
def test_rule_6_what_must_be_computed_anyway_stays(other: str, reason: str) -> None:
    model = Several(other)
    result = fold(model, torch.randn(2, 6))
    assert not result.changed
    assert left(result.subject) == 1
    assert [note.where for note in result.notes] == ["first.weight", "second.weight"]
    assert all(note.reason.endswith(reason) for note in result.notes)


def test_rule_6_selections_over_another_axis_stay() -> None:
    model = Selecting(nn.Linear(6, 8), [1, 0, 2], axis=1)
    result = fold(model, torch.randn(2, 3, 6))
    assert not result.changed
    assert "not over the channels" in result.notes[0].reason
    convolution = Selecting(nn.Conv1d(3, 8, 1), [1, 0, 2, 4], axis=2)
    assert "not over the channels" in fold(convolution, torch.randn(2, 3, 6)).notes[0].reason


def test_rule_1_numbers_that_the_graph_writes_or_computes_are_not_folded() -> None:
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 8)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(x.index_select(1, x[0].argsort()))
            return y

    for model in (Sorted(), Several("written")):
        result = fold(model, torch.randn(2, 6))
        assert not result.changed
        assert left(result.subject) >= 1


def test_a_layer_that_is_called_twice_behind_equal_selections_has_one_weight_for_them() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Selecting(nn.Linear(6, 6), [3, 5, 0, 1, 4, 2])

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(torch.relu(self.layer(x)))
            return y

    model = Twice()
    result = fold(model, torch.randn(2, 6))
    assert left(result.subject) == 0
    agrees(model, result.subject, torch.randn(3, 6))


def test_dense_layers_keep_their_selection() -> None:
    model = Selecting(nn.Linear(6, 8), [3, 5, 0, 1, 4, 2])
    program = run((Normalize(),), capture(randomise(model).eval(), (torch.randn(2, 6),))).subject
    result = run((FoldSelections(),), program)
    assert not result.changed
    assert not result.notes
    assert left(result.subject) == 1
