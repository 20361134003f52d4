"""What ONNX cannot say or says differently: promoted subtraction, projected LSTMs, inputs written into."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import srigl_fx as sx
from srigl_fx.errors import ExportError


class _Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 6)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y: Tensor = self.fc(x) * (1.0 - mask)
        return y


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


def test_inputs_that_the_model_writes_into_are_compared_fairly(tmp_path: Path) -> None:
    x = torch.randn(3, 8)
    before = x.clone()
    report = sx.export_onnx(sx.sparsify(_Halves(), sparsity=0.5).eval(), tmp_path / "model.onnx", (x,), min_speedup=0)
    assert torch.equal(x, before)
    assert report.fallback_error is not None
    assert report.fallback_error < 1e-5
