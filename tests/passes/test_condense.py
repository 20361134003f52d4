"""From masked weights to condensed nodes: which nodes match, what replaces them, and that it is the same function."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from lowering_support import fan_in_mask, mask_by_hand, randomise
from torch import Tensor, nn

import srigl_fx as sx
from srigl_fx.errors import InvariantError, LoweringError
from srigl_fx.masks.records import WeightRecord, WeightSite, set_records, sparse_weights
from srigl_fx.passes.base import run
from srigl_fx.passes.capture import capture
from srigl_fx.passes.condense import Condense, can_shrink, condensed_rows, rewrite, variants
from srigl_fx.passes.fold_constants import FoldConstants
from srigl_fx.passes.match import MatchWeights
from srigl_fx.passes.normalize import Normalize
from srigl_fx.passes.program import Decision, MatchedLayer, Program, arguments
from srigl_fx.passes.select import Select
from srigl_fx.passes.to_linear import ToLinear

ours = torch.ops.srigl_fx


def matched(model: nn.Module, *inputs: Tensor) -> Program:
    return run((Normalize(), FoldConstants(), ToLinear(), MatchWeights()), capture(model.eval(), inputs)).subject


def condensed(model: nn.Module, *inputs: Tensor) -> Program:
    return run((Select(), Condense()), matched(model, *inputs)).subject


def called(program: Program, target: object) -> int:
    return sum(node.target is target for node in program.module.graph.nodes)


def assert_same(program: Program, model: nn.Module, *inputs: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(program.module(*inputs), model(*inputs), rtol=1e-5, atol=1e-5)


class Attention(nn.Module):
    def __init__(self, **sizes: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **sizes)

    def forward(self, q: Tensor, k: Tensor | None = None, v: Tensor | None = None) -> Tensor:
        k = q if k is None else k
        out: Tensor = self.attention(q, k, k if v is None else v, need_weights=False)[0]
        return out


@pytest.mark.long
@pytest.mark.parametrize(("inputs", "linears"), [(1, 2), (2, 3), (3, 4)])
def test_packed_projection_whole_or_cut(inputs: int, linears: int) -> None:
    model = mask_by_hand(randomise(Attention()), 0.4)
    program = condensed(model, *(torch.randn(2, 3, 8) for _ in range(inputs)))
    assert called(program, ours.condensed_linear.default) == linears
    assert called(program, torch.ops.aten.linear.default) == 0
    assert "attention.in_proj_weight" not in dict(program.module.named_parameters())
    assert_same(program, model, *(torch.randn(5, 3, 8) for _ in range(inputs)))


@pytest.mark.slow
def test_blocks_of_very_different_fan_in_become_one_operator_each() -> None:
    model = mask_by_hand(randomise(Attention()), 0.5)
    weight = sparse_weights(model)[0]
    with torch.no_grad():
        for _ in range(2):
            first = weight.mask[8:16].int().argmax(1)
            weight.mask[range(8, 16), first] = False
        weight.weight.mul_(weight.mask)
    program = condensed(model, torch.randn(2, 3, 8))
    assert called(program, ours.condensed_linear.default) == 4
    assert called(program, torch.ops.aten.cat.default) == 1
    assert_same(program, model, torch.randn(5, 3, 8))


@pytest.mark.long
def test_separate_projections() -> None:
    model = mask_by_hand(randomise(Attention(kdim=4, vdim=6)), 0.5)
    inputs = torch.randn(2, 3, 8), torch.randn(2, 5, 4), torch.randn(2, 5, 6)
    program = condensed(model, *inputs)
    assert called(program, ours.condensed_linear.default) == 4
    assert_same(program, model, *inputs)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.mid = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, i: Tensor) -> Tensor:
        y: Tensor = self.head(self.mid(self.mid(self.embed(i))))
        return y


def test_shared_and_tied_weights() -> None:
    model = mask_by_hand(randomise(Shared()), 0.4)
    program = condensed(model, torch.randint(0, 11, (2, 3)))
    assert called(program, ours.condensed_linear.default) == 3
    mid, head = program.layers
    assert len(mid.uses) == 2
    assert "aten.embedding" in head.reason
    assert head.bytes_after > model.head.weight.nbytes  # type: ignore[union-attr, operator]
    assert sum(name.startswith("mid.weight") for name, _ in program.module.named_buffers()) == 3
    assert_same(program, model, torch.randint(0, 11, (4, 3)))


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(3, 4, 3)
        self.conv3 = nn.Conv3d(1, 2, 1)
        self.up = nn.ConvTranspose1d(4, 6, 3)
        self.product = nn.Linear(6, 5, bias=False)
        self.unused = nn.Linear(3, 3)
        self.even = nn.Conv2d(1, 2, 2, padding="same")

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(self.conv1(x))
        y = self.conv3(y[:, None, None]).sum((1, 2))
        y = torch.matmul(self.product.weight, y)
        out: Tensor = self.even(y[:, None])
        return out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_what_stays_dense_says_why() -> None:
    model = mask_by_hand(randomise(Mixed()), 0.4)
    program = condensed(model, torch.randn(2, 3, 9))
    reasons = {layer.weight.fqn: layer.reason for layer in program.layers}
    assert reasons == {
        "conv1.weight": "",
        "conv3.weight": "",
        "up.weight": "",
        "product.weight": "",
        "unused.weight": "not used by the captured graph",
        "even.weight": "",
    }
    assert called(program, ours.condensed_conv.default) == 4
    assert {layer.decision for layer in program.layers if layer.reason} == {"dense"}
    assert_same(program, model, torch.randn(2, 3, 9))


@pytest.mark.parametrize(
    "settings", [{}, {"stride": 2, "padding": 1}, {"dilation": 2, "padding": "same"}, {"groups": 2, "bias": False}]
)
def test_conv1d(settings: dict[str, Any]) -> None:
    model = mask_by_hand(randomise(nn.Sequential(nn.Conv1d(4, 6, 3, **settings))), 0.4, ablated=1)
    program = condensed(model, torch.randn(2, 4, 9))
    assert called(program, ours.condensed_conv.default) == 1
    assert_same(program, model, torch.randn(5, 4, 9))


class Products(nn.Module):
    """Matrices whose neurons are columns, on the right of each product."""

    def __init__(self) -> None:
        super().__init__()
        self.first_weight = nn.Parameter(torch.randn(6, 8))
        self.second_weight = nn.Parameter(torch.randn(8, 5))
        self.third_weight = nn.Parameter(torch.randn(5, 4))
        self.bias = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(x @ self.first_weight)
        y = torch.addmm(self.bias, y.flatten(0, 1), self.second_weight).relu()
        return torch.mm(y, self.third_weight)


@pytest.mark.slow
def test_products_with_a_matrix_on_the_right() -> None:
    model = sx.sparsify(randomise(Products()), sparsity=0.5)
    program = condensed(model, torch.randn(2, 3, 6))
    assert [layer.decision for layer in program.layers] == ["condensed"] * 3
    assert called(program, ours.condensed_linear.default) == 3
    assert_same(program, model, torch.randn(5, 3, 6))


class Einsum(nn.Module):
    def __init__(self, equation: str, shape: tuple[int, ...], *, weight_first: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))
        self.equation, self.weight_first = equation, weight_first

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum(self.equation, *((self.weight, x) if self.weight_first else (x, self.weight)))


@pytest.mark.parametrize(
    ("equation", "shape", "weight_first", "linear"),
    [
        ("btc,cd->btd", (6, 5), False, True),
        ("btc,dc->btd", (5, 6), False, True),
        ("...c,dc->...d", (5, 6), False, True),
        ("dc,btc->btd", (5, 6), True, True),
        ("btc,dc->bdt", (5, 6), False, False),
        ("btc,dt->bdc", (5, 3), False, False),
        ("btc,tdc->btd", (3, 5, 6), False, False),
        ("btc,cc->btc", (6, 6), False, False),
        ("btc,bc->bt", (2, 6), False, False),
        ("btc,cde->btde", (6, 4, 3), False, True),
        ("...c,dec->...de", (4, 3, 6), False, True),
        ("btc,tcd->bd", (3, 6, 5), False, True),
        ("btc,dtc->bd", (5, 3, 6), False, True),
        ("btc,ctd->bd", (6, 3, 5), False, False),
    ],
)
def test_einsums_that_are_linear_layers(equation: str, shape: Any, weight_first: bool, linear: bool) -> None:
    model: Any = randomise(Einsum(equation, shape, weight_first=weight_first))
    if linear:
        sx.sparsify(model, sparsity=0.5)
    else:
        site = WeightSite(owner="", attr="weight", kind="linear", shape=(shape[0], math.prod(shape[1:])))
        mask = torch.from_numpy(fan_in_mask(shape[0], math.prod(shape[1:]), 2)).reshape(shape)
        model.register_buffer("weight_mask", mask)
        model.weight.data.mul_(mask)
        set_records(model, {"weight": WeightRecord(site=site, structure="constant_fan_in")})
    program = condensed(model, torch.randn(2, 3, 6))
    assert called(program, ours.condensed_linear.default) == linear
    assert_same(program, model, torch.randn(2 if equation == "btc,bc->bt" else 4, 3, 6))
    if not linear:
        assert "einsum" in program.layers[0].reason


def test_rows_that_lost_inputs_are_padded() -> None:
    mask = np.zeros((6, 9), np.bool_)
    for row, count in enumerate((3, 0, 1, 2, 3, 1)):
        mask[row, 9 - count :] = True
    weight = np.random.default_rng(0).standard_normal(mask.shape).astype(np.float32) * mask
    layer = single(nn.Linear(9, 6), torch.randn(2, 9))
    use = replace(layer.uses[0], weight=torch.from_numpy(weight), mask=torch.from_numpy(mask))
    ((first, last, padded),) = condensed_rows(use)
    assert (first, last, padded.k, padded.active.tolist()) == (0, 6, 3, [0, 2, 3, 4, 5])
    assert np.array_equal(padded.to_dense()[0], weight)
    assert np.array_equal(padded.to_dense()[1], mask)


def test_unstructured_rows_are_padded() -> None:
    model: Any = mask_by_hand(randomise(nn.Sequential(nn.Linear(32, 24))), 0.15, structure="unstructured")
    x = torch.randn(3, 32)
    program = condensed(model, x)
    (layer,) = program.layers
    mask = model[0].weight_mask
    assert len({*mask.sum(1).tolist()}) > 1
    assert (layer.decision, layer.reason) == ("condensed", "")
    longest, active = int(mask.sum(1).max()), int(mask.any(1).sum())
    assert layer.bytes_after == active * (longest * 6 + 4)  # the bias is the model's own
    torch.testing.assert_close(program.module(x), model(x))


def with_long_rows(layer: Any) -> Any:
    """Every fourth row keeps nearly all of its weights, others two, one none."""
    transposed = isinstance(layer, nn.ConvTranspose1d)
    rows = layer.weight.detach().transpose(0, 1) if transposed else layer.weight.detach()
    flat = rows.reshape(len(rows), -1)
    counts = torch.where(torch.arange(len(flat)) % 4 == 0, flat.shape[1] - 1, 2)
    counts[5] = 0
    kept = (torch.rand(flat.shape).argsort(dim=1) < counts[:, None]).reshape(rows.shape)
    mask_by_hand(layer, 0.5, structure="unstructured")
    layer.weight_mask[:] = kept.transpose(0, 1) if transposed else kept
    with torch.no_grad():
        layer.weight[:] = torch.randn_like(layer.weight) * layer.weight_mask
    return layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda bias: nn.Linear(40, 24, bias=bias), (3, 40)),
        (lambda bias: nn.Conv2d(8, 24, 3, padding=1, groups=2, bias=bias), (2, 8, 5, 4)),
        (lambda bias: nn.ConvTranspose1d(24, 24, 3, stride=2, bias=bias), (2, 24, 6)),
    ],
    ids=["linear", "convolution", "transposed"],
)
def test_rows_of_like_length_are_operators_that_are_added(layer: Any, shape: tuple[int, ...], bias: bool) -> None:
    built = with_long_rows(randomise(layer(bias)))
    model: Any = nn.Sequential(built, nn.ReLU()).eval()
    x = torch.randn(shape)
    program = condensed(model, x)
    (found,) = program.layers
    assert (found.decision, found.reason) == ("condensed", "")
    nodes = [node for node in program.module.graph.nodes if "condensed" in str(node.target)]
    assert len(nodes) == 2
    assert nodes[1].kwargs["residual"] is nodes[0]
    assert found.bytes_after < 0.7 * built.weight.nbytes
    torch.testing.assert_close(program.module(x), model(x), rtol=1e-4, atol=1e-4)


def test_a_name_that_the_model_uses_is_not_overwritten() -> None:
    class Clash(nn.Module):
        weight_values: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 6))
            self.register_buffer("weight_values", torch.randn(5))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight) + self.weight_values

    model = mask_by_hand(randomise(Clash()), 0.5)
    program = condensed(model, torch.randn(2, 6))
    assert called(program, ours.condensed_linear.default) == 1
    assert_same(program, model, torch.randn(3, 6))


def single(module: nn.Module, x: Tensor, **options: Any) -> MatchedLayer:
    (layer,) = matched(mask_by_hand(randomise(nn.Sequential(module)), 0.3, **options), x).layers
    return layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("module", "shape"),
    [(nn.Linear, (4, 3, 10)), (nn.Conv2d, (4, 10, 6, 5))],
)
def test_every_form_of_a_layer_is_the_same_function(module: Any, shape: tuple[int, ...], bias: bool) -> None:
    x = torch.randn(shape)
    more = {"stride": (2, 1), "padding": (0, 2)} if module is nn.Conv2d else {}
    args = (10, 7, 3) if module is nn.Conv2d else (10, 7)
    layer = single(module(*args, bias=bias, **more), x, ablated=3)
    forms: tuple[Decision, ...] = ("dense", "condensed", "shrunk")
    assert can_shrink(layer.uses[0])
    results = {form: made(x) for form, made in variants(layer.uses[0], forms)}
    for form in forms:
        torch.testing.assert_close(results[form], results["dense"])
    dead = ~layer.uses[0].mask.any(1)
    axis = 1 if module is nn.Conv2d else -1
    ablated = results["shrunk"].index_select(axis, dead.nonzero()[:, 0])
    owner: Any = layer.weight.owner
    expected = owner.bias.detach()[dead] if bias else torch.zeros(int(dead.sum()))
    assert torch.equal(ablated, expected.reshape(-1, *[1] * (ablated.dim() - 2 if axis == 1 else 0)).expand_as(ablated))


def test_shrunk_in_the_graph_keeps_the_bias_of_ablated_rows() -> None:
    model = mask_by_hand(randomise(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())), 0.3, ablated=5)
    program = matched(model, torch.randn(2, 3, 6, 6))
    rewrite(program.module, program.layers[0].uses[0], "0.weight", "shrunk")
    program.module.recompile()
    assert_same(program, model, torch.randn(4, 3, 6, 6))


def test_groups_cannot_shrink() -> None:
    layer = single(nn.Conv2d(4, 8, 3, groups=2), torch.randn(2, 4, 5, 5), ablated=2)
    assert not can_shrink(layer.uses[0])
    assert arguments(layer.uses[0].node)["groups"] == 2


def test_values_off_the_mask_are_refused() -> None:
    model = mask_by_hand(randomise(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))), 0.5)
    with torch.no_grad():
        model[1].weight.add_(0.1)  # type: ignore[index]
    with pytest.raises(InvariantError, match=r"off the mask in 1\.weight.*masks\.apply"):
        matched(model, torch.randn(2, 6))


def test_rows_of_unequal_fan_in_are_refused() -> None:
    model = mask_by_hand(randomise(nn.Sequential(nn.Linear(6, 5))), 0.5)
    weight = sparse_weights(model)[0]
    with torch.no_grad():
        weight.mask[2] = False
        weight.mask[2, 0] = True
        weight.weight.mul_(weight.mask)
    with pytest.raises(InvariantError, match=r"0\.weight does not have a constant fan-in"):
        condensed(model, torch.randn(2, 6))


def test_nothing_masked_is_an_error() -> None:
    with pytest.raises(LoweringError, match="sparsify"):
        matched(nn.Sequential(nn.Linear(3, 2)), torch.randn(2, 3))
