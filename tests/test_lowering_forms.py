"""Every form of a layer that lowers, against the masked model; and what stays dense says why."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lowering_support import mask_by_hand, randomise
from torch import Tensor, nn
from torch.nn import functional

import srigl_fx as sx
from srigl_fx.lowering.pipeline import lower
from srigl_fx.masks.records import sparse_weights
from srigl_fx.passes.base import run
from srigl_fx.passes.capture import capture
from srigl_fx.passes.condense import can_shrink, variants
from srigl_fx.passes.fold_constants import FoldConstants
from srigl_fx.passes.match import MatchWeights
from srigl_fx.passes.normalize import Normalize
from srigl_fx.passes.program import MatchedLayer
from srigl_fx.runtime.ops import dense_weight

CONVOLUTIONS: tuple[Any, ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED: tuple[Any, ...] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
SIZES = (7, 6, 5)
ours = torch.ops.srigl_fx


def called(module: Any, target: object) -> int:
    return sum(node.target is target for node in module.graph.nodes)


def lowered_alike(model: nn.Module, *inputs: Tensor, others: tuple[Tensor, ...] = ()) -> Any:
    """The lowered model, all of whose layers are condensed, compared with the model on other inputs too."""
    lowered = lower(model.eval(), inputs, min_speedup=0, verify="each pass")
    assert {layer.decision for layer in lowered.report.layers} == {"condensed"}
    given = others or tuple(torch.randn(3, *x.shape[1:]) for x in inputs)
    with torch.no_grad():
        torch.testing.assert_close(lowered(*given), model(*given), rtol=1e-4, atol=1e-5)
    return lowered


@pytest.mark.slow
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"stride": 2, "padding": 1, "bias": False},
        {"groups": 2, "dilation": 2, "padding": 2},
        {"padding": "same", "dilation": 3, "groups": 2},
        {"padding": "valid"},
    ],
    ids=["plain", "strided", "grouped", "same", "valid"],
)
def test_convolutions(rank: int, settings: dict[str, Any]) -> None:
    conv = CONVOLUTIONS[rank - 1](4, 6, 3 if rank < 3 else (3, 1, 2), **settings)
    if settings.get("padding") == "same" and rank == 3:
        conv = nn.Conv3d(4, 6, (3, 1, 3), **settings)
    model = mask_by_hand(randomise(nn.Sequential(conv)), 0.4, ablated=3)
    lowered = lowered_alike(model, torch.randn(2, 4, *SIZES[:rank]))
    (node,) = lowered.graph.find_nodes(op="call_function", target=ours.condensed_conv.default)
    assert len(node.args[5]) == rank + 2
    assert not {torch.ops.aten.unsqueeze.default, torch.ops.aten.squeeze.dim} & {n.target for n in lowered.graph.nodes}


@pytest.mark.slow
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"stride": 2, "padding": 1, "bias": False},
        {"stride": 3, "output_padding": 2, "padding": 2},
        {"groups": 2, "dilation": 2, "output_padding": 1},
        {"groups": 4, "stride": 2},
    ],
    ids=["plain", "strided", "padded", "grouped", "one channel a group"],
)
def test_transposed_convolutions(rank: int, settings: dict[str, Any]) -> None:
    conv = TRANSPOSED[rank - 1](4, 8, (3, 2, 1)[:rank] if "padding" not in settings else 5, **settings)
    model = mask_by_hand(randomise(nn.Sequential(conv)), 0.4, ablated=3)
    lowered = lowered_alike(model, torch.randn(2, 4, *SIZES[:rank]))
    (node,) = lowered.graph.find_nodes(op="call_function", target=ours.condensed_conv.default)
    assert node.kwargs["transposed"]
    assert lowered.report.layers[0].active == 5


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kernel", [(3,), (3, 2), (2, 1, 3)])
def test_a_transposed_weight_has_the_matrix_view_of_its_site(kernel: tuple[int, ...], groups: int) -> None:
    conv: Any = TRANSPOSED[len(kernel) - 1](8, 12, kernel, groups=groups)
    (layer,) = matched(mask_by_hand(nn.Sequential(conv), 0.5), torch.randn(2, 8, *SIZES[: len(kernel)]))
    (use,) = layer.uses
    weight = conv.weight.detach()
    assert torch.equal(use.weight, layer.weight.record.site.to_matrix(weight))
    assert torch.equal(use.mask, layer.weight.record.site.to_matrix(layer.weight.mask))
    shape = (12, 8 // groups, *kernel)
    assert use.weight.shape == (12, math.prod(shape[1:]))
    assert torch.equal(dense_weight(use.weight, shape, groups, True), weight)


def matched(model: nn.Module, *inputs: Tensor) -> list[MatchedLayer]:
    return run((Normalize(), FoldConstants(), MatchWeights()), capture(model.eval(), inputs)).subject.layers


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("kind", [CONVOLUTIONS, TRANSPOSED], ids=["plain", "transposed"])
def test_active_rows_alone_are_the_same_function(kind: Any, rank: int, bias: bool) -> None:
    settings = {"output_padding": 1} if kind is TRANSPOSED else {}
    conv = kind[rank - 1](5, 7, 3, stride=2, padding=1, bias=bias, **settings)
    x = torch.randn(2, 5, *SIZES[:rank])
    (layer,) = matched(mask_by_hand(randomise(nn.Sequential(conv)), 0.4, ablated=3), x)
    assert can_shrink(layer.uses[0])
    results = {form: made(x) for form, made in variants(layer.uses[0], ("dense", "condensed", "shrunk"))}
    for got in results.values():
        torch.testing.assert_close(got, results["dense"], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(
    ("rank", "kernel", "dilation"), [(1, (4,), 1), (2, (2, 3), 1), (2, (4, 2), 3), (3, (2, 3, 4), 1)]
)
def test_an_even_kernel_that_keeps_the_size(rank: int, kernel: tuple[int, ...], dilation: int) -> None:
    conv = CONVOLUTIONS[rank - 1](4, 6, kernel, padding="same", dilation=dilation, groups=2)
    lowered = lowered_alike(mask_by_hand(randomise(nn.Sequential(conv)), 0.4), torch.randn(2, 4, *SIZES[:rank]))
    assert called(lowered, torch.ops.aten.constant_pad_nd.default) == 1


class OneOperator(nn.Module):
    """A convolution by ``torch.convolution``, which serves all kinds."""

    def __init__(self, conv: Any) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        conv, rank = self.conv, x.dim() - 2
        settings = (conv.stride, conv.padding, conv.dilation, conv.transposed, conv.output_padding, conv.groups)
        y: Tensor = torch.convolution(x, conv.weight, conv.bias, *settings)
        assert y.dim() == rank + 2
        return y


@pytest.mark.parametrize(
    "conv",
    [
        lambda: nn.Conv2d(4, 6, 3, stride=2, groups=2),
        lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1, groups=2),
        lambda: nn.ConvTranspose3d(4, 6, 2, padding=1),
    ],
)
def test_the_operator_of_all_convolutions(conv: Callable[[], Any]) -> None:
    made = conv()
    model = mask_by_hand(randomise(OneOperator(made)), 0.4, ablated=1)
    lowered = lowered_alike(model, torch.randn(2, 4, *SIZES[: made.weight.dim() - 2]))
    assert called(lowered, ours.condensed_conv.default) == 1


class Decoder(nn.Module):
    """Up and down, with normalisations; ablated channels of each layer disappear from the next."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 6, 4, stride=2, padding=1)
        self.norm_up = nn.BatchNorm2d(6)
        self.out = nn.ConvTranspose2d(6, 2, 3, padding=1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.down(x)))
        x = functional.relu(self.norm_up(self.up(x)))
        y: Tensor = self.out(x)
        return y


@pytest.mark.slow
def test_transposed_convolutions_lose_dead_channels_and_batch_norms() -> None:
    model = mask_by_hand(randomise(Decoder()), 0.4, ablated={"down.weight": 3, "up.weight": 2})
    lowered = lowered_alike(model, torch.randn(2, 3, 8, 8))
    assert not lowered.graph.find_nodes(op="call_function", target=torch.ops.aten.batch_norm.default)
    (removals,) = lowered.report.removals
    assert {one.fqn: one.rows_removed for one in removals.weights}[
        "down.weight"
    ] == 2  # and one carries the constants of the dead
    shapes = {name: buffer.shape for name, buffer in lowered.named_buffers() if "values" in name}
    assert shapes["up.weight_values"][0] == 4
    assert lowered.report.layers[1].bytes_after < lowered.report.layers[1].bytes_before
    copied = copy.deepcopy(lowered)
    x = torch.randn(1, 3, 12, 10)[..., :8, :8]
    torch.testing.assert_close(copied(x), lowered(x))


@pytest.mark.slow
def test_sparsified_then_lowered() -> None:
    model = nn.Sequential(nn.Conv3d(4, 16, 3), nn.ReLU(), nn.ConvTranspose3d(16, 8, 3, stride=2, groups=2))
    sx.sparsify(randomise(model), sparsity=0.75)
    assert len(sparse_weights(model)) == 2
    lowered_alike(model, torch.randn(2, 4, 4, 5, 6))


@pytest.mark.slow
def test_hugging_face_conv1d_is_a_linear_layer() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = mask_by_hand(randomise(nn.Sequential(conv1d(10, 6), nn.GELU(), conv1d(4, 10))), 0.4, ablated=1)
    assert [weight.record.site.kind for weight in sparse_weights(model)] == ["linear_in_out"] * 2
    lowered = lowered_alike(model, torch.randn(2, 3, 6))
    assert called(lowered, ours.condensed_linear.default) == 2
    assert called(lowered, torch.ops.aten.addmm.default) == 0


class Recurrent(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        y = y[0] if isinstance(y, tuple) else y
        out: Tensor = self.head(y)
        return out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layer", "shape", "operator"),
    [
        (nn.LSTM, (2, 5, 16), "aten.lstm.input"),
        (nn.GRU, (2, 5, 16), "aten.gru.input"),
        (nn.RNN, (2, 5, 16), "aten.rnn_tanh.input"),
        (nn.LSTMCell, (3, 16), "aten.lstm_cell"),
    ],
)
def test_recurrent_gates_say_why_they_are_dense(layer: Any, shape: tuple[int, ...], operator: str) -> None:
    model = sx.sparsify(randomise(Recurrent(layer(16, 16))), sparsity=0.5).eval()
    report = lower(model, (torch.randn(shape),), min_speedup=0).report
    gates = [one for one in report.layers if one.fqn.startswith("layer")]
    assert len(gates) == 2
    assert {one.reason for one in gates} == {
        f"recurrent gates are part of one fused operator of torch ({operator}): they run dense"
    }
    assert report.layers[-1].decision == "condensed"


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(3, 16, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x, self.stack)


@pytest.mark.slow
def test_a_stack_of_experts_says_why_it_is_dense() -> None:
    model = sx.sparsify(randomise(nn.Sequential(Experts(), nn.Linear(8, 8))), sparsity=0.5).eval()
    report = lower(model, (torch.randn(3, 5, 16),), min_speedup=0).report
    reasons = {one.fqn: one.reason for one in report.layers}
    assert reasons == {"0.stack": "a stack of experts is read as one tensor (aten.bmm): it runs dense", "1.weight": ""}


@pytest.mark.slow
def test_a_sample_without_batch_says_why_it_is_dense() -> None:
    model = mask_by_hand(randomise(nn.Sequential(nn.Conv2d(3, 4, 3))), 0.4)
    (layer,) = matched(model, torch.randn(3, 6, 6))
    assert layer.reason == "its input has no batch dimension"
