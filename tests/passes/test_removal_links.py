"""Who read the channels that were removed: pairs with the operators between, on networks ablated by hand."""

import torch
from lowering_support import randomise
from torch import Tensor, nn

import srigl_fx as sx
from srigl_fx.passes.base import run
from srigl_fx.passes.capture import capture
from srigl_fx.passes.fold_constants import FoldConstants
from srigl_fx.passes.normalize import Normalize
from srigl_fx.passes.removal import Removals
from srigl_fx.passes.remove_dead import RemoveDead


def removals(model: nn.Module, x: Tensor, ablated: dict[str, int]) -> Removals:
    """What is removed once the first rows of the named weights keep nothing."""
    sx.sparsify(randomise(model), sparsity=0.5, distribution="uniform")
    with torch.no_grad():
        for name, count in ablated.items():
            owner = model.get_submodule(name)
            assert isinstance(owner.weight, Tensor)
            assert isinstance(owner.weight_mask, Tensor)
            owner.weight_mask[:count] = False
            owner.weight[:count] = 0.0
    program = run((Normalize(), FoldConstants(), RemoveDead()), capture(model.eval(), (x,))).subject
    assert program.removals is not None
    return program.removals


def named(found: Removals) -> set[tuple[str, str, tuple[str, ...]]]:
    return {(found.weights[link.producer].fqn, found.weights[link.reader].fqn, link.through) for link in found.links}


class Branches(nn.Module):
    """One producer with two readers, one of them behind a second operator; their sum is read by a head."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.left, self.right = nn.Linear(8, 16), nn.Linear(16, 12), nn.Linear(16, 12)
        self.head = nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.one(x))
        out: Tensor = self.head(torch.tanh(self.left(hidden) + self.right(torch.sigmoid(hidden))))
        return out


def test_each_reader_is_paired_with_the_operators_on_its_way() -> None:
    found = removals(Branches(), torch.randn(2, 8), {"one": 5})
    assert named(found) == {
        ("one.weight", "left.weight", ("relu",)),
        ("one.weight", "right.weight", ("relu", "sigmoid")),
    }
    assert found.weights[0].rows_removed == 5


def test_both_writers_of_a_sum_are_producers() -> None:
    found = removals(Branches(), torch.randn(2, 8), {"left": 4, "right": 4})
    assert named(found) == {
        ("left.weight", "head.weight", ("add", "tanh")),
        ("right.weight", "head.weight", ("add", "tanh")),
    }


def test_one_dead_writer_of_a_sum_pairs_nothing() -> None:
    found = removals(Branches(), torch.randn(2, 8), {"left": 4})
    assert named(found) == set()
    assert sum(found.weights[1].kept.values()) == 4


def test_layout_operators_are_named_and_a_depthwise_convolution_is_passed_through() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 8, 1),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 16, 12),
        nn.Linear(12, 5),
    )
    found = removals(model, torch.randn(2, 4, 6, 6), {"0": 3})
    through = {(producer, reader): path for producer, reader, path in named(found)}
    assert through["0.weight", "4.weight"][:2] == ("conv2d", "relu")
    assert through["1.weight", "4.weight"][0] == "relu"
    assert Removals.from_dict(found.as_dict()) == found
