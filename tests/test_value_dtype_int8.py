"""Condensed layers of eight bits: each node against the reference, the whole by its signal-to-noise ratio."""

import copy
import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from lowering_support import Branches, Total, mask_by_hand, randomise
from torch import Tensor, fx, nn

import srigl_fx as sx
from srigl_fx.comparison import LEAST_LAYER_SNR, LEAST_OUTPUT_SNR, signal_to_noise
from srigl_fx.errors import FormatError, LoweringError
from srigl_fx.lowering.loading import load_lowered
from srigl_fx.lowering.lowered import LoweredModule, LoweringReport
from srigl_fx.lowering.pipeline import lower
from srigl_fx.passes.condensed_nodes import LINEAR, condensed_nodes, is_condensed
from srigl_fx.passes.program import arguments
from srigl_fx.runtime import reference


class Products(nn.Module):
    """Products with a weight that are written as einsums, and one that is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(21, 21), nn.Linear(21, 7, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("bi,oi->bo", torch.relu(self.first(x)), self.first.weight)
        return torch.einsum("oi,bi->bo", self.second.weight, y)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(24, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return y + x


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(33, 33), nn.Linear(33, 33)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.second(torch.nn.functional.gelu(self.first(x))) + x)


def stack(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*layers)


FORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (stack(nn.Linear(65, 33), nn.ReLU(), nn.Linear(33, 1)), (65,)),
    "sequences": (stack(nn.Linear(19, 70), nn.GELU(), nn.Linear(70, 19)), (5, 19)),
    "conv1d": (stack(nn.Conv1d(4, 6, 3, stride=2, padding=1, bias=False)), (4, 11)),
    "conv2d": (stack(nn.Conv2d(6, 9, 3, groups=3, dilation=2), nn.SiLU(), nn.Conv2d(9, 5, 1)), (6, 9, 7)),
    "conv3d": (stack(nn.Conv3d(2, 17, (2, 3, 1), padding=(1, 0, 0))), (2, 4, 5, 3)),
    "an even kernel": (stack(nn.Conv2d(3, 16, 4, padding="same")), (3, 6, 5)),
    "transposed": (stack(nn.ConvTranspose2d(3, 6, 3, stride=2, output_padding=1, groups=3)), (3, 5, 4)),
    "einsum": (Products, (21,)),
    "packed projection": (Attention, (7, 24)),
    "residual": (Residual, (33,)),
    "state": (Total, (17,)),
}


def made(name: str, density: float = 0.3) -> tuple[nn.Module, Callable[[int], Tensor]]:
    make, shape = FORMS[name]
    model = randomise(copy.deepcopy(make()))
    ablated = {"0.weight": 3} if name in ("linear", "conv2d") else {}
    return mask_by_hand(model, density, ablated=ablated).eval(), lambda batch: torch.randn(batch, *shape)


def lowered_in_eight_bits(model: nn.Module, x: Tensor, **options: Any) -> LoweredModule:
    lowered = lower(model, (x,), **{"min_speedup": 0, "value_dtype": torch.int8, **options})
    assert isinstance(lowered, LoweredModule)
    return lowered


class _Checked(fx.Interpreter):
    """Runs a lowered graph, and each condensed node in the reference too, on what the node is handed."""

    compared = 0

    def run_node(self, n: fx.Node) -> Any:
        y = super().run_node(n)
        if is_condensed(n):
            self._compare(n, y)
        return y

    def _compare(self, node: fx.Node, y: Tensor) -> None:
        given = {
            key: self.env[value].detach().numpy() if isinstance(value, fx.Node) else value
            for key, value in arguments(node).items()
        }
        assert given["values"].dtype == np.int8
        assert given["scales"].dtype == np.float32
        operands = [given[name] for name in ("x", "values", "indices", "active", "bias")]
        epilogue = {name: given[name] for name in ("scales", "residual", "activation")}
        if node.target is LINEAR:
            expected = reference.condensed_linear(*operands, **epilogue)
        else:
            expected = reference.condensed_conv(
                *operands,
                weight_shape=given["weight_shape"],
                strides=given["stride"],
                pads=[*given["padding"], *given["padding"]],
                dilations=given["dilation"],
                group=given["groups"],
                transposed=given["transposed"],
                output_padding=given["output_padding"],
                **epilogue,
            )
        scale = np.abs(expected).max(initial=1e-30)
        np.testing.assert_allclose(y.numpy() / scale, expected / scale, rtol=2e-6, atol=2e-6)
        type(self).compared += 1


def assert_each_node_is_the_reference(lowered: fx.GraphModule, *inputs: Tensor) -> None:
    _Checked.compared = 0
    with torch.no_grad():
        _Checked(copy.deepcopy(lowered)).run(*inputs)
    assert _Checked.compared == len(list(condensed_nodes(lowered.graph)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("verify", [True, "each pass"])
@pytest.mark.parametrize("name", FORMS)
def test_each_form(name: str, verify: Any) -> None:
    model, inputs = made(name)
    lowered = lowered_in_eight_bits(model, inputs(2), verify=verify)
    report = lowered.report
    assert {layer.decision for layer in report.layers} == {"condensed"}
    assert {layer.value_dtype for layer in report.layers} == {"int8"}
    assert report.undone == ()
    for batch in (1, 3, 17, 66):
        x = inputs(batch)
        assert_each_node_is_the_reference(lowered, x)
        with torch.no_grad():
            assert signal_to_noise(copy.deepcopy(model)(x), copy.deepcopy(lowered)(x)) > 25


def pair() -> tuple[nn.Module, Tensor]:
    """Two linear layers of which no channel is removed."""
    return mask_by_hand(
        randomise(nn.Sequential(nn.Linear(65, 33), nn.ReLU(), nn.Linear(33, 40))), 0.3
    ).eval(), torch.randn(2, 65)


def test_what_is_stored_is_the_rounded_weight() -> None:
    model, x = pair()
    buffers = dict(lowered_in_eight_bits(model, x).named_buffers())
    for name in ("0.weight", "2.weight"):
        weight = model.get_parameter(name).detach()
        values, scales, indices = (buffers[f"{name}_{part}"] for part in ("values", "scales", "indices"))
        assert values.dtype is torch.int8
        assert values.abs().amax(1).tolist() == [127] * len(weight)
        torch.testing.assert_close(scales, weight.abs().amax(1) / 127)
        dense = torch.zeros_like(weight).scatter_(1, indices.long(), values * scales[:, None])
        assert ((dense - weight).abs() <= 0.5001 * scales[:, None]).all()


def test_the_report_has_the_ratio_of_each_layer_and_of_the_outputs() -> None:
    model, inputs = made("conv2d")
    x = inputs(4)
    lowered = lowered_in_eight_bits(model, x)
    report = lowered.report
    assert report.value_dtype == "int8"
    for layer in report.layers:
        assert layer.snr is not None
        assert 30 < layer.snr < 60
        assert f"{layer.snr:.1f} dB" in str(report)
        assert f"{layer.snr:.1f} dB" in report.to_html()
    assert report.min_snr is not None
    with torch.no_grad():
        assert report.min_snr <= signal_to_noise(model(x), lowered(x)) + 1e-3
    assert f"smallest signal-to-noise ratio {report.min_snr:.1f} dB" in str(report)
    assert f"{report.min_snr:.1f} dB" in report.to_html()
    assert report.limit.snr == LEAST_OUTPUT_SNR
    assert report.tolerance == math.inf
    assert LoweringReport.from_dict(json.loads(json.dumps(report.as_dict()))) == report


@pytest.mark.slow
def test_bytes_are_those_of_the_buffers() -> None:
    model, x = pair()
    full = lower(model, (x,), min_speedup=0).report
    lowered = lowered_in_eight_bits(model, x)
    for layer, before in zip(lowered.report.layers, full.layers, strict=True):
        assert before.bytes_after - layer.bytes_after == 3 * layer.kept - 4 * layer.active


@pytest.mark.slow
@pytest.mark.parametrize("name", ["conv2d", "packed projection", "state", "transposed"])
def test_copied_saved_and_compiled(name: str, tmp_path: Path) -> None:
    model, inputs = made(name)
    x = inputs(3)
    lowered = lowered_in_eight_bits(model, x)
    lowered.save(tmp_path / "model.srigl")
    copies = [copy.deepcopy(lowered) for _ in range(2)]
    compiled = torch.compile(copies.pop(), fullgraph=True, backend="aot_eager")
    again = (load_lowered(tmp_path / "model.srigl"), pickle.loads(pickle.dumps(lowered)), *copies)
    with torch.no_grad():
        expected = lowered(x)
        for one in again:
            assert one.report == lowered.report
            assert torch.equal(one(x), expected)
        torch.testing.assert_close(compiled(x), expected)


@pytest.mark.slow
def test_torch_export_takes_it(tmp_path: Path) -> None:
    model, inputs = made("sequences")
    x = inputs(3)
    lowered = lowered_in_eight_bits(model, x)
    torch.export.save(torch.export.export(lowered, (x,)), tmp_path / "model.pt2")
    again = torch.export.load(tmp_path / "model.pt2").module()
    with torch.no_grad():
        assert torch.equal(again(x), lowered(x))


def test_gradients_are_refused() -> None:
    model, inputs = made("linear")
    lowered = lowered_in_eight_bits(model, inputs(2))
    with pytest.raises(FormatError, match=r"eight bits.*no gradient"):
        lowered(inputs(2).requires_grad_()).sum().backward()


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("scales", lambda held: held.fill_(math.nan), "scales must be finite"),
        ("scales", lambda held: held.fill_(math.inf), "scales must be finite"),
        ("scales", lambda held: held.neg_(), "none negative"),
        ("values", lambda held: held.fill_(-128), "-128"),
    ],
)
def test_a_file_with_numbers_that_are_none_is_refused(
    part: str, change: Callable[[Tensor], Tensor], said: str, tmp_path: Path
) -> None:
    model, inputs = made("linear")
    lowered = lowered_in_eight_bits(model, inputs(2))
    change(dict(lowered.named_buffers())[f"2.weight_{part}"])
    lowered.save(tmp_path / "model.srigl")
    with pytest.raises(FormatError, match=rf"2\.weight is malformed: .*{said}"):
        load_lowered(tmp_path / "model.srigl")


@pytest.mark.parametrize("scales", [torch.ones(2), torch.ones(1, dtype=torch.float64), torch.ones(1, 1)])
def test_a_file_with_other_scales_is_refused(scales: Tensor, tmp_path: Path) -> None:
    model, inputs = made("linear")
    lowered = lowered_in_eight_bits(model, inputs(2))
    lowered.get_submodule("2").weight_scales = scales
    lowered.save(tmp_path / "model.srigl")
    with pytest.raises(FormatError, match=r"2\.weight is malformed: .*scales"):
        load_lowered(tmp_path / "model.srigl")


def test_a_file_whose_scales_are_missing_is_refused(tmp_path: Path) -> None:
    model, inputs = made("linear")
    lowered = lowered_in_eight_bits(model, inputs(2))
    for node in condensed_nodes(lowered.graph):
        node.kwargs = {key: value for key, value in node.kwargs.items() if key != "scales"}
    lowered.save(tmp_path / "model.srigl")
    with pytest.raises(FormatError, match="values of int8, and no others, have scales"):
        load_lowered(tmp_path / "model.srigl")


def test_zero_scales_are_taken(tmp_path: Path) -> None:
    """A row whose weights are all zero is one; its outputs are its bias."""
    model, x = pair()
    with torch.no_grad():
        model[2].weight[3] = 0  # type: ignore[index]
    lowered = lowered_in_eight_bits(model, x)
    lowered.save(tmp_path / "model.srigl")
    again = load_lowered(tmp_path / "model.srigl")
    zero = (dict(again.named_buffers())["2.weight_scales"] == 0).nonzero().flatten()
    assert zero.tolist() == [3]
    with torch.no_grad():
        assert torch.equal(again(x), lowered(x))
        assert torch.equal(again(x)[:, 3], model[2].bias[3].expand(2))  # type: ignore[index]


@pytest.mark.slow
def test_regions() -> None:
    model = mask_by_hand(randomise(Branches()), 0.3).eval()
    lowered: Any = lower(model, (torch.ones(2, 32),), min_speedup=0, value_dtype=torch.int8)
    assert len(lowered.regions) == 2
    report = lowered.report
    assert report.value_dtype == "int8"
    assert {layer.value_dtype for layer in report.layers} == {"int8"}
    assert all(layer.snr is not None for layer in report.layers)
    assert report.min_snr is not None
    assert report.min_snr >= LEAST_OUTPUT_SNR
    x = torch.randn(5, 32).abs()
    with torch.no_grad():
        assert signal_to_noise(model(x), lowered(x)) > 30


@pytest.mark.slow
def test_neighbours_have_rows_between_them() -> None:
    """Whichever kernels compute them: a sample is measured as a row, and 130 are two tiles and two samples."""
    layers = (nn.Linear(48, 40), nn.ReLU(), nn.Linear(40, 56))
    model = mask_by_hand(randomise(nn.Sequential(*layers)), 0.3).eval()
    for batch in (16, 130):
        lowered = lowered_in_eight_bits(model, torch.randn(batch, 48))
        first, second = condensed_nodes(lowered.graph)
        assert not arguments(first)["y_feature_major"]
        assert not arguments(second)["x_feature_major"]
        for samples in (1, 5, 17, 64, 130):
            assert_each_node_is_the_reference(lowered, torch.randn(samples, 48))


@pytest.mark.slow
def test_a_model_of_both_kinds_of_layers_may_be_feature_major_between_them() -> None:
    layers = (nn.Linear(48, 40), nn.ReLU(), nn.Linear(40, 56), nn.ReLU(), nn.Linear(56, 8))
    model = mask_by_hand(randomise(nn.Sequential(*layers)), 0.3).eval()
    x = torch.randn(70, 48)
    mixed = lower(model, (x,), min_speedup=0, value_dtype={"": torch.int8, "2": torch.float32})
    with torch.no_grad():
        assert signal_to_noise(model(x), mixed(x)) > 30
        for samples in (1, 16, 33):
            rows = torch.cat([mixed(row[None]) for row in x[:samples]])
            torch.testing.assert_close(mixed(x[:samples]), rows, rtol=1e-4, atol=1e-3)


class Outlier(nn.Module):
    """One input is a thousand times as large as the others, and the layer hardly looks at it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(64, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        scaled = torch.cat([1e3 * x[:, :1], x[:, 1:]], dim=1)
        y: Tensor = self.head(torch.relu(self.fc(scaled)))
        return y


def outlier() -> nn.Module:
    model = randomise(Outlier())
    with torch.no_grad():
        model.get_parameter("fc.weight")[:, 0] *= 1e-4
    return mask_by_hand(model, 0.9).eval()


@pytest.mark.slow
@pytest.mark.parametrize("verify", [True, "each pass"])
def test_a_layer_with_too_much_noise_stays_in_float32_and_says_why(verify: Any) -> None:
    model, x = outlier(), torch.randn(6, 64)
    lowered = lowered_in_eight_bits(model, x, verify=verify)
    fc, head = lowered.report.layers
    assert (fc.decision, fc.value_dtype) == ("condensed", "float32")
    assert (head.decision, head.value_dtype) == ("condensed", "int8")
    assert fc.snr is not None
    assert fc.snr < LEAST_LAYER_SNR
    assert fc.reason == (
        f"stored in float32: with int8 its signal-to-noise ratio is {fc.snr:.1f} dB, and at least 25 dB are asked for"
    )
    assert fc.reason in str(lowered.report)
    assert fc.reason in lowered.report.to_html()
    assert "fc.weight" in {note.where for note in lowered.report.notes if note.by == "CheckRounding"}
    dtypes = {name: held.dtype for name, held in lowered.named_buffers() if name.endswith("_values")}
    assert dtypes == {"fc.weight_values": torch.float32, "head.weight_values": torch.int8}
    with torch.no_grad():
        assert signal_to_noise(model(x), lowered(x)) > 30


@pytest.mark.slow
def test_a_layer_in_float32_may_stay_dense_too() -> None:
    report = lowered_in_eight_bits(outlier(), torch.randn(6, 64), min_speedup=1e9).report
    assert {layer.decision for layer in report.layers} == {"dense"}
    assert "signal-to-noise" in report.layers[0].reason
    assert "times as fast as dense" in report.layers[0].reason
    assert report.limit.snr is None
    assert report.tolerance == 1e-4


def test_a_weight_that_is_not_finite_stays_in_float32() -> None:
    model, x = pair()
    with torch.no_grad():
        model[2].weight[tuple(model[2].weight_mask.nonzero()[0])] = math.inf  # type: ignore[index]
    report = lowered_in_eight_bits(model, x, verify=False).report
    assert [layer.value_dtype for layer in report.layers] == ["int8", "float32"]
    assert "stored in float32: a weight that is not finite has no value of eight bits" in report.layers[1].reason
    assert report.layers[1].snr is None


@pytest.mark.long
def test_outputs_with_too_much_noise_are_an_error() -> None:
    class Near(nn.Module):
        """The difference of what a layer gives for two inputs that are nearly equal."""

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(64, 32)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.fc(x) - self.fc(x * (1 + 1e-2 * torch.sin(37 * x)))
            return y

    model = mask_by_hand(randomise(Near()), 0.3).eval()
    x = torch.randn(5, 64)
    before = copy.deepcopy(model.state_dict())
    said = r"output 0 .* has a signal-to-noise ratio of .* dB .*at least 20 dB.*noise.*fc\.weight \(\d\d\.\d dB\)"
    for verify in (True, "each pass"):
        with pytest.raises(sx.SriglError, match=said if verify is True else "signal-to-noise ratio of"):
            lowered_in_eight_bits(model, x, verify=verify)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    report = lowered_in_eight_bits(model, x, verify=False).report
    assert report.min_snr is None
    assert report.layers[0].snr is not None
    lower(model, (x,), min_speedup=0, value_dtype=torch.float32)


def test_other_faults_are_found_among_the_noise() -> None:
    """A model that drifts is off by more than eight bits are."""
    calls: list[int] = []

    class Drifts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(64, 32)

        def forward(self, x: Tensor) -> Tensor:
            calls.append(1)
            y: Tensor = self.fc(x) * (1 + 0.2 * len(calls))
            return y

    model = mask_by_hand(randomise(Drifts()), 0.3).eval()
    with pytest.raises(LoweringError, match=r"graph as captured is off by .*no pass has run yet"):
        lowered_in_eight_bits(model, torch.randn(2, 64))


def test_samples_that_are_not_finite_stay_apart() -> None:
    model, inputs = made("linear")
    lowered = lowered_in_eight_bits(model, inputs(2))
    x = inputs(5)
    x[2, 0] = math.nan
    with torch.no_grad():
        y = lowered(x)
        assert y[2].isnan().all()
        rest = [0, 1, 3, 4]
        torch.testing.assert_close(y[rest], lowered(x[rest]))


@pytest.mark.slow
def test_a_batch_of_none() -> None:
    model, inputs = made("linear")
    lowered = lowered_in_eight_bits(model, inputs(2))
    assert lowered(inputs(0)).shape == (0, 1)


def test_safetensors_reads_the_file(tmp_path: Path) -> None:
    model, inputs = made("linear")
    lowered_in_eight_bits(model, inputs(2)).save(tmp_path / "model.srigl")
    tensors = safetensors.torch.load_file(tmp_path / "model.srigl")
    assert {name: held.dtype for name, held in tensors.items() if name.startswith("2.weight_")} == {
        "2.weight_values": torch.int8,
        "2.weight_scales": torch.float32,
        "2.weight_indices": torch.uint16,
        "2.weight_active": torch.int32,
    }
