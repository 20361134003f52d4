"""What a file calls its inputs, outputs and sizes: by the forward and what it returns, never by the graph's values."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import srigl_fx as sx
from srigl_fx.errors import LoweringError


class Pair(NamedTuple):
    logits: Tensor
    hidden: Tensor


class Net(nn.Module):
    def __init__(self, outputs: Callable[[Tensor, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.outputs = nn.Linear(16, 32), nn.Linear(32, 4), outputs

    def forward(self, x: Tensor) -> Any:
        hidden = torch.relu(self.a(x))
        return self.outputs(x, hidden, self.b(hidden))


CASES: tuple[tuple[Callable[[Tensor, Tensor, Tensor], Any], list[str]], ...] = (
    (lambda x, h, y: y, ["output"]),
    (lambda x, h, y: {"logits": y, "aux": None, "hidden": h}, ["logits", "hidden"]),
    (lambda x, h, y: {"logits": y, "n": 3}, ["logits"]),
    (lambda x, h, y: (y, None, h), ["output_0", "output_2"]),
    (lambda x, h, y: Pair(y, h), ["logits", "hidden"]),
    (lambda x, h, y: {"a": {"b": y}, "a_b": h}, ["a_b", "a_b_2"]),
    (lambda x, h, y: {"x": x, "y": y, "again": y}, ["x_out", "y", "again"]),
    *[
        (lambda x, h, y, key=key: {key: y.softmax(-1), "flat": h.view(-1, 32).sum(1)}, [key, "flat"])
        for key in ("mean", "view", "linear", "a.bias", "condensed_linear", "a.weight_values", "softmax", "val_0")
    ],
)


@pytest.mark.long
@pytest.mark.parametrize("sparsity", [0.5, 0.9])
@pytest.mark.parametrize(("outputs", "names"), CASES, ids=lambda case: "-".join(case) if isinstance(case, list) else "")
def test_outputs_are_called_by_their_places(
    outputs: Callable[[Tensor, Tensor, Tensor], Any], names: list[str], sparsity: float, tmp_path: Path
) -> None:
    model = sx.sparsify(Net(outputs), sparsity=sparsity).eval()
    x = torch.randn(2, 16)
    report = sx.export_onnx(model, tmp_path / "model.onnx", (x,), verify=False, min_speedup=0)
    session = sx.runtime.load(tmp_path / "model.onnx")
    assert [value.name for value in session.get_outputs()] == names == list(report.outputs)
    assert [value.name for value in session.get_inputs()] == ["x"]
    with torch.no_grad():
        expected = [leaf for leaf in torch.utils._pytree.tree_leaves(model(x)) if isinstance(leaf, Tensor)]
    for one, served in zip(expected, session.run(None, {"x": x.numpy()}), strict=True):
        np.testing.assert_allclose(served, one, rtol=1e-4, atol=1e-5)


class Clip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.i, self.t = nn.Linear(16, 24), nn.Linear(12, 24)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        y: Tensor = self.i(image) @ self.t(text).T
        return y


@pytest.mark.long
def test_only_sizes_that_the_graph_ties_have_one_name(tmp_path: Path) -> None:
    model = sx.sparsify(Clip(), sparsity=0.5).eval()
    report = sx.export_onnx(model, tmp_path / "clip.onnx", (torch.randn(2, 16), torch.randn(2, 12)), min_speedup=0)
    assert report.inputs == {"image": ("batch", 16), "text": ("text_batch", 12)}
    assert report.outputs == {"output": ("batch", "text_batch")}
    session = sx.runtime.load(tmp_path / "clip.onnx")
    for images, texts in ((2, 5), (4, 2), (1, 9), (8, 3)):
        image, text = torch.randn(images, 16), torch.randn(texts, 12)
        with torch.no_grad():
            expected = model(image, text)
        served = session.run(None, {"image": image.numpy(), "text": text.numpy()})[0]
        np.testing.assert_allclose(served, expected, rtol=1e-4, atol=1e-5)


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.i, self.t = nn.Linear(16, 24), nn.Linear(12, 24)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z: Tensor = self.i(x) + self.t(y)
        return z


@pytest.mark.slow
def test_tied_sizes_are_the_batch(tmp_path: Path) -> None:
    model = sx.sparsify(Sum(), sparsity=0.5).eval()
    report = sx.export_onnx(
        model, tmp_path / "sum.onnx", (torch.randn(2, 16), torch.randn(2, 12)), verify=False, min_speedup=0
    )
    assert report.inputs == {"x": ("batch", 16), "y": ("batch", 12)}
    assert "batch: any;" in str(report)


class Chunks(nn.Module):
    """Runs with equal batches only, which no symbol of the graph says: two halves of what was joined."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        halves = torch.chunk(self.layer(torch.cat([first, second])), 2)
        return torch.bmm(halves[0].unsqueeze(1), second.unsqueeze(2)) + halves[1].unsqueeze(1)


@pytest.mark.long
def test_batches_that_only_the_model_ties_are_one(tmp_path: Path) -> None:
    model = sx.sparsify(Chunks(), sparsity=0.5).eval()
    example = (torch.randn(2, 16), torch.randn(2, 16))
    lowered = sx.lower(model, example, min_speedup=0)
    report = sx.export_onnx(lowered, tmp_path / "chunks.onnx", example, min_speedup=0)
    assert report.inputs == {"first": ("batch", 16), "second": ("batch", 16)}
    assert "batch: any;" in str(report)
    session = sx.runtime.load(tmp_path / "chunks.onnx")
    for batch in (1, 5):
        first, second = torch.randn(batch, 16), torch.randn(batch, 16)
        with torch.no_grad():
            expected = model(first, second)
        served = session.run(None, {"first": first.numpy(), "second": second.numpy()})[0]
        np.testing.assert_allclose(served, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(lowered(first, second), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(LoweringError, match="input 1 of the lowered module has batch 3 and input 0 has 5"):
        lowered(torch.randn(5, 16), torch.randn(3, 16))
    lowered.save(tmp_path / "chunks.safetensors")
    with pytest.raises(LoweringError, match="input 1 of the lowered module has batch 3"):
        sx.load_lowered(tmp_path / "chunks.safetensors")(torch.randn(5, 16), torch.randn(3, 16))


class Step(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.g = nn.Linear(20, 24), nn.GRU(24, 16, 2, batch_first=True)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        y: tuple[Tensor, Tensor] = self.g(torch.relu(self.a(x)), h)
        return y


class Graph(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 24)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        h: Tensor = self.a(x)
        return torch.zeros_like(h).index_add(0, edges[1], h[edges[0]])


@pytest.mark.long
def test_the_report_says_what_is_fixed_and_why(tmp_path: Path) -> None:
    model: nn.Module = sx.sparsify(Step(), sparsity=0.5).eval()
    inputs = (torch.randn(2, 10, 20), torch.randn(2, 2, 16))
    report = sx.export_onnx(model, tmp_path / "step.onnx", inputs, verify=False, min_speedup=0)
    assert "batch: as in the example inputs" in str(report)
    assert "takes x (2, 10, 20), h (2, 2, 16)" in str(report)
    assert any(note.startswith("the batch is fixed: the model (Step)") for note in report.notes)
    model = sx.sparsify(Graph(), sparsity=0.5).eval()
    inputs = (torch.randn(14, 12), torch.randint(14, (2, 40)))
    report = sx.export_onnx(model, tmp_path / "graph.onnx", inputs, verify=False, min_speedup=0)
    assert "batch: any of x, else as in the example inputs" in str(report)
    assert report.inputs == {"x": ("batch", 12), "edges": (2, 40)}
    assert any(note.startswith("the leading size of input 1 is fixed at 2") for note in report.notes)
