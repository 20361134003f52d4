"""Batch norms folded into the layers before them, rule by rule."""

from typing import Any

import pytest
import torch
from lowering_support import mask_by_hand, randomise
from torch import Tensor, nn

from srigl_fx.masks.records import sparse_weights
from srigl_fx.passes.base import PassResult, run
from srigl_fx.passes.capture import capture
from srigl_fx.passes.fold_batch_norm import FoldBatchNorm
from srigl_fx.passes.normalize import Normalize
from srigl_fx.passes.program import MaskedTensor, Program, tensor_at

aten = torch.ops.aten


def fold(model: nn.Module, *args: Tensor) -> PassResult[Program]:
    program = run((Normalize(),), capture(model.eval(), args)).subject
    for node in program.module.graph.find_nodes(op="get_attr"):
        for handle in sparse_weights(model):
            if tensor_at(program.module, str(node.target)) is handle.weight:
                program.masked[str(node.target)] = MaskedTensor(fqn=handle.fqn, mask=handle.mask)
    return run((FoldBatchNorm(),), program)


def norms(program: Program) -> int:
    return sum("batch_norm" in str(node.target) for node in program.module.graph.nodes)


def agrees(model: nn.Module, program: Program, *args: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(program.module(*args), model(*args), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (lambda bias: nn.Linear(6, 8, bias=bias), nn.BatchNorm1d, (4, 6)),
        (lambda bias: nn.Conv1d(6, 8, 3, padding="same", bias=bias), nn.BatchNorm1d, (2, 6, 9)),
        (lambda bias: nn.Conv2d(6, 8, 3, groups=2, bias=bias), nn.BatchNorm2d, (2, 6, 9, 9)),
        (lambda bias: nn.Conv2d(8, 8, (3, 2), padding="same", groups=8, bias=bias), nn.BatchNorm2d, (2, 8, 9, 9)),
        (lambda bias: nn.Conv3d(6, 8, 3, stride=2, bias=bias), nn.BatchNorm3d, (2, 6, 5, 5, 5)),
        (lambda bias: nn.ConvTranspose1d(6, 8, 3, bias=bias), nn.BatchNorm1d, (2, 6, 5)),
        (lambda bias: nn.ConvTranspose2d(6, 8, 3, 2, groups=2, bias=bias), nn.BatchNorm2d, (2, 6, 5, 5)),
        (lambda bias: nn.ConvTranspose3d(6, 8, 2, bias=bias), nn.BatchNorm3d, (2, 6, 3, 3, 3)),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_rule_1_every_layer(layer: Any, norm: Any, shape: tuple[int, ...], bias: bool, affine: bool) -> None:
    model = randomise(nn.Sequential(layer(bias), norm(8, affine=affine), nn.ReLU()))
    result = fold(model, torch.randn(shape))
    assert result.changed
    assert norms(result.subject) == 0
    assert not result.notes
    agrees(model, result.subject, torch.randn(5, *shape[1:]))


@pytest.mark.slow
def test_rule_1_through_two_norms() -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8)))
    result = fold(model, torch.randn(2, 3, 6, 6))
    assert norms(result.subject) == 0
    agrees(model, result.subject, torch.randn(3, 3, 6, 6))


def test_rule_2_masks_zeros_and_the_models_parameters_stay() -> None:
    first, norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
    model = randomise(nn.Sequential(first, norm, nn.ReLU(), nn.Conv2d(8, 4, 3)))
    mask_by_hand(model, 0.3, ablated={"0.weight": 3}, skip=("3.weight",))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = fold(model, torch.randn(2, 3, 6, 6))
    program = result.subject
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    ((target, masked),) = program.masked.items()
    weight = tensor_at(program.module, target)
    assert target != "0.weight"
    assert masked.fqn == "0.weight"
    assert torch.equal(masked.mask, first.get_buffer("weight_mask"))
    assert torch.equal(weight != 0, masked.mask)
    (conv, _) = (node for node in program.module.graph.nodes if node.target is aten.conv2d.default)
    assert conv.args[1].target == target
    assert conv.meta["nn_module_stack"]
    dead = ~masked.mask.flatten(1).any(1)
    assert int(dead.sum()) == 3
    expected = norm.double()(before["0.bias"].double().view(1, 8, 1, 1)).flatten().float()
    torch.testing.assert_close(tensor_at(program.module, conv.args[2].target)[dead], expected[dead])


class Shared(nn.Module):
    """One convolution, used before two batch norms."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.one, self.other = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.conv(self.one(self.conv(x))))  # type: ignore[no-any-return]


class UsedTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + y  # type: ignore[no-any-return]


class ByAnInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(nn.functional.conv2d(x, x.mean(0, keepdim=True).expand(4, -1, -1, -1)[..., :3, :3]))  # type: ignore[no-any-return]


class Sequences(nn.Module):
    """Batch norm over the axis that a linear layer does not make."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(6, 5), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(x))  # type: ignore[no-any-return]


def overflowing() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, eps=0.0))
    assert isinstance(model[1].running_var, Tensor)
    model[1].running_var[0] = 0
    return model


@pytest.mark.parametrize(
    ("make", "shape", "where", "reason"),
    [
        (Shared, (2, 4, 6, 6), "one", "the weight conv.weight is read by other nodes too"),
        (UsedTwice, (2, 4, 6, 6), "norm", "the output of conv2d is used elsewhere too"),
        (ByAnInput, (2, 4, 6, 6), "norm", "its parameters, or the layer's, are computed from the input"),
        (Sequences, (2, 4, 6), "norm", "its channels are not the features of linear"),
        (
            lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm1d(4)),
            (2, 4),
            "1",
            "it does not follow a convolution or linear",
        ),
        (overflowing, (2, 4, 6, 6), "1", "its scale is not finite"),
    ],
    ids=["shared", "used-twice", "computed", "other-axis", "no-layer", "not-finite"],
)
def test_rule_3_what_is_not_folded_is_noted(make: Any, shape: tuple[int, ...], where: str, reason: str) -> None:
    model = make()
    if make is not overflowing:
        randomise(model)
    result = fold(model, torch.randn(shape))
    assert not result.changed
    assert norms(result.subject) == len(result.notes) > 0
    assert result.notes[0].where == where
    assert result.notes[0].reason.startswith(f"batch norm not folded: {reason}")


def test_rule_3_another_dtype() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3).bfloat16(), nn.BatchNorm2d(4))
    result = fold(model, torch.randn(2, 4, 6, 6, dtype=torch.bfloat16))
    assert [note.reason for note in result.notes] == ["batch norm not folded: its dtype is not the layer's"]
