"""What ONNX cannot say or says differently: promoted subtraction, projected LSTMs, inputs written into."""

from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import srigl_fx as sx
from srigl_fx.errors import CaptureError, ExportError
from srigl_fx.onnx_export.places import place_in


class _Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 6)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y: Tensor = self.fc(x) * (1.0 - mask)
        return y


@pytest.mark.long
def test_integers_are_subtracted_from_a_float(tmp_path: Path) -> None:
    model = sx.sparsify(_Masked(), sparsity=0.5).eval()
    report = sx.export_onnx(
        model, tmp_path / "model.onnx", (torch.randn(3, 8), torch.randint(2, 5, (3, 6))), min_speedup=0
    )
    assert report.fallback_error is not None
    assert report.fallback_error < 1e-5


class _Projected(nn.Module):
    def __init__(self, bidirectional: bool) -> None:
        super().__init__()
        self.rnn = nn.LSTM(8, 10, proj_size=6, num_layers=2, bias=not bidirectional, bidirectional=bidirectional)
        self.out = nn.Linear(12 if bidirectional else 6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.rnn(x)[0])
        return y


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("bidirectional", [True, False])
def test_an_lstm_with_projections_is_refused(tmp_path: Path, bidirectional: bool) -> None:
    model = sx.sparsify(_Projected(bidirectional), sparsity=0.5).eval()
    with pytest.raises(ExportError, match=r"the LSTM 'rnn' projects its outputs .* ONNX's LSTM has no projections"):
        sx.export_onnx(model, tmp_path / "model.onnx", (torch.randn(5, 2, 8),), min_speedup=0)
    assert not list(tmp_path.iterdir())


class _Halves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x.mul_(0.5))
        return y


@pytest.mark.long
def test_inputs_that_the_model_writes_into_are_compared_fairly(tmp_path: Path) -> None:
    x = torch.randn(3, 8)
    before = x.clone()
    report = sx.export_onnx(sx.sparsify(_Halves(), sparsity=0.5).eval(), tmp_path / "model.onnx", (x,), min_speedup=0)
    assert torch.equal(x, before)
    assert report.fallback_error is not None
    assert report.fallback_error < 1e-5


class _Vocoder(nn.Module):
    window: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(17, 17)
        self.register_buffer("window", torch.hann_window(32))

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.stft(x, 32, 8, window=self.window, return_complex=True)
        gain = torch.sigmoid(self.fc(spectrum.abs().transpose(1, 2))).transpose(1, 2)
        return torch.istft(spectrum * gain, 32, 8, window=self.window, length=x.shape[1])


@pytest.mark.long
@pytest.mark.parametrize("verify", [True, False])
def test_what_is_made_into_no_onnx_is_refused_by_the_name_of_its_module(verify: bool, tmp_path: Path) -> None:
    model = sx.sparsify(nn.Sequential(OrderedDict(vocoder=_Vocoder())), sparsity=0.5).eval()
    with pytest.raises(ExportError, match=r"\(in vocoder\) that is no ONNX.*lower\(...\)\.save"):
        sx.export_onnx(model, tmp_path / "model.onnx", (torch.randn(2, 128),), min_speedup=0, verify=verify)
    assert not list(tmp_path.iterdir())


class _Chooses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(torch.cond(x.sum() > 0, lambda y: self.one(y), lambda y: self.other(y) * 2, (x,)))
        return y


@pytest.mark.long
def test_branches_of_cond_are_in_the_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = sx.sparsify(_Chooses(), sparsity=0.5).eval()
    x = torch.rand(3, 8)
    report = sx.export_onnx(model, tmp_path / "model.onnx", (x,), min_speedup=0)
    assert report.fallback_error is not None
    session = sx.runtime.load(tmp_path / "model.onnx")
    with torch.no_grad():
        for given in (x, -x):
            np.testing.assert_allclose(session.run(None, {"x": given.numpy()})[0], model(given), rtol=1e-4, atol=1e-5)


class _Bags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag, self.fc = nn.EmbeddingBag(20, 8), nn.Linear(8, 4)

    def forward(self, words: Tensor, offsets: Tensor | None = None) -> Tensor:
        y: Tensor = self.fc(self.bag(words, offsets))
        return y


@pytest.mark.long
@pytest.mark.parametrize("with_offsets", [True, False])
def test_bags_of_words_with_offsets_or_as_rows(with_offsets: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = sx.sparsify(_Bags(), sparsity=0.5).eval()
    words = torch.arange(15) % 7
    inputs = (words, torch.tensor([0, 4, 9])) if with_offsets else (words.reshape(3, 5),)
    sx.export_onnx(model, tmp_path / "model.onnx", inputs, min_speedup=0)
    other = [inputs[0].flip(0), *inputs[1:]]
    session = sx.runtime.load(tmp_path / "model.onnx")
    feeds = {entry.name: value.numpy() for entry, value in zip(session.get_inputs(), other, strict=True)}
    with torch.no_grad():
        np.testing.assert_allclose(session.run(None, feeds)[0], model(*other), rtol=1e-4, atol=1e-5)


class _Doubles(nn.Module):
    """Computes in float64 what ONNX Runtime computes in float32 alone."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.fc, self.kind = nn.Linear(6, 8), kind

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x).double()
        if self.kind == "erf":
            return torch.erf(torch.erf(y)).float()
        if self.kind == "conv":
            return nn.functional.conv1d(y[:, None], y.new_ones(1, 1, 3)).float()
        return nn.functional.instance_norm(y[:, None]).float()


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "operator"), [("erf", "erf"), ("conv", "conv1d|convolution"), ("norm", "instance_norm|batch_norm")]
)
def test_what_onnx_runtime_does_not_run_is_refused_by_its_module(kind: str, operator: str, tmp_path: Path) -> None:
    model = sx.sparsify(nn.Sequential(nn.Sequential(nn.Linear(6, 6), _Doubles(kind))), sparsity=0.5).eval()
    said = rf"\(library\), because of aten\.\w*({operator})\S* \(in 0\.1\): .*NOT_IMPLEMENTED.*; replace it, give it"
    with pytest.raises(ExportError, match=said):
        sx.export_onnx(model, tmp_path / "model.onnx", (torch.randn(2, 6),), min_speedup=0)
    assert not list(tmp_path.iterdir())


class _Half(nn.Module):
    """Multiplies and adds in bfloat16, which ONNX Runtime makes one node of, and does not run."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.bfloat16() @ torch.ones(6, 6, dtype=torch.bfloat16) + torch.ones(6, dtype=torch.bfloat16)
        return y.float()


@pytest.mark.long
def test_a_node_that_onnx_runtime_fused_is_named_by_one_that_is_in_it(tmp_path: Path) -> None:
    model = sx.sparsify(nn.Sequential(nn.Linear(6, 6), _Half()), sparsity=0.5)
    model = nn.Sequential(model, nn.Linear(6, 4)).eval()  # with a Gemm of its own, which is not to blame
    said = r"\(library\), because of aten\.m\w+\.default \(in 0\.1\), fused with others: .*Gemm.*; replace it, give it"
    with pytest.raises(ExportError, match=said):
        sx.export_onnx(model, tmp_path / "model.onnx", (torch.randn(2, 6),), min_speedup=0)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("node_conv", "one"),
        ("fused node_conv", "one, fused with others"),
        ("node_conv/ConvActivation", "one, fused with others"),
        ("node_conv_1/Fusion/", "two, fused with others"),
        ("node_conv_2", ""),  # not the first with a number
        ("Gelu_token_3", ""),  # nor the only one of its kind
    ],
)
def test_names_of_fused_nodes_are_read_as_far_as_they_tell(name: str, place: str) -> None:
    known = {"node_conv": "one", "node_conv_1": "two", "Conv": "three"}
    message = f"Could not find an implementation for Conv(11) node with name '{name}'"
    assert place_in(message, known) == place


class _OffsetBags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bags, self.fc = nn.EmbeddingBag(20, 16), nn.Linear(16, 8)

    def forward(self, rows: Tensor, starts: Tensor) -> Tensor:
        y: Tensor = self.fc(self.bags(rows, starts))
        return y


def test_offsets_in_two_dimensions_are_refused_by_the_module_that_gets_them(tmp_path: Path) -> None:
    model = sx.sparsify(_OffsetBags(), sparsity=0.5).eval()
    inputs = (torch.arange(9), torch.tensor([[0, 3, 3, 7]]))
    with pytest.raises(CaptureError, match=r"in bags \(EmbeddingBag\): offsets has to be a 1D Tensor"):
        sx.export_onnx(model, tmp_path / "model.onnx", inputs, min_speedup=0)


def _plain() -> nn.Module:
    return sx.sparsify(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)), sparsity=0.5).eval()


@pytest.mark.slow
def test_an_example_that_requires_grad_is_an_example(tmp_path: Path) -> None:
    x = torch.randn(2, 8, requires_grad=True)
    report = sx.export_onnx(_plain(), tmp_path / "model.onnx", (x,), min_speedup=0)
    assert report.fallback_error is not None
    assert report.fallback_error < 1e-5
    assert x.requires_grad
    assert x.grad is None


@pytest.mark.parametrize("dynamic_batch", [True, False])
def test_a_batch_of_no_examples_is_refused(dynamic_batch: bool, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"\(0, 8\), a batch of 0 examples: give at least one"):
        sx.export_onnx(_plain(), tmp_path / "model.onnx", (torch.randn(0, 8),), dynamic_batch=dynamic_batch)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("given", ["yes", 1, None])
def test_dynamic_batch_is_true_or_false(given: object, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="dynamic_batch must be True or False, not "):
        sx.export_onnx(_plain(), tmp_path / "model.onnx", (torch.randn(2, 8),), dynamic_batch=given)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
