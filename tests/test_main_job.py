"""The whole path on models a user could bring: sparsify, train, lower, export, serve."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import srigl_fx as sx


class Attention(nn.Module):
    """A pre-norm transformer block over patches, with a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, 48, 2, stride=2)
        self.token = nn.Parameter(torch.randn(1, 1, 48) * 0.1)
        self.norm1, self.norm2 = nn.LayerNorm(48), nn.LayerNorm(48)
        self.attention = nn.MultiheadAttention(48, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 48))
        self.head = nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(x.shape[0], -1, -1), tokens], dim=1)
        normed = self.norm1(tokens)
        tokens = tokens + self.attention(normed, normed, normed, need_weights=False)[0]
        tokens = tokens + self.mlp(self.norm2(tokens))
        logits: Tensor = self.head(tokens[:, 0])
        return logits


class Convolutional(nn.Module):
    """Residual, grouped, depthwise, strided and one-dimensional convolutions with batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(24, 24, 3, padding=1, groups=2), nn.BatchNorm2d(24), nn.ReLU())
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.down = nn.Conv2d(24, 32, 3, stride=2, padding=1, dilation=1)
        self.line = nn.Conv1d(32, 32, 3, padding=1)
        self.up = nn.ConvTranspose1d(32, 16, 2, stride=2)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.depthwise(self.body(x))
        x = self.line(self.down(x).relu().flatten(2))
        logits: Tensor = self.head(self.up(x).mean(-1))
        return logits


class Functional(nn.Module):
    """Owns its weights itself, and uses one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Parameter(torch.randn(64, 64) * 0.2)
        self.bias = nn.Parameter(torch.randn(64) * 0.2)
        self.outer = nn.Parameter(torch.randn(64, 5) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x.flatten(1), self.inner, self.bias).relu()
        return F.linear(x, self.inner).relu() @ self.outer


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 5)
    ),
    "attention": Attention,
    "convolutional": Convolutional,
    "functional": Functional,
    "graph": lambda: fx.symbolic_trace(Functional()),
}


def train(model: nn.Module, method: str) -> None:
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    trainer = sx.SRigL(model, optimizer, total_steps=60, update_every=10, ablation=0.9) if method == "srigl" else None
    static = sx.Static(model, optimizer) if method == "static" else None
    for _ in range(60):
        x = torch.randn(16, 1, 8, 8, generator=generator)
        target = (x.flatten(1)[:, :5] * 2 + x.flatten(1)[:, 5:10]).argmax(1)
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()
    sx.verify(model, optimizer)
    assert trainer is None or trainer.last_update is not None
    for attached in (trainer, static):
        if attached is not None:
            attached.detach()


@pytest.mark.long
@pytest.mark.parametrize(("name", "method"), [*((name, "srigl") for name in MODELS), ("attention", "static")])
def test_every_stage_agrees(name: str, method: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = sx.sparsify(MODELS[name](), sparsity=0.8, distribution="uniform")
    train(model, method)
    model.eval()
    x = torch.randn(7, 1, 8, 8)
    with torch.no_grad():
        expected = model(x)
        bound = 1e-5 * float(expected.abs().max()) + 1e-6
        fast = sx.lower(model, (x[:1],), min_speedup=0.0)
        torch.testing.assert_close(fast(x), expected, rtol=1e-5, atol=bound)
        fast.save(tmp_path / "model.safetensors")
        loaded = sx.load_lowered(tmp_path / "model.safetensors")
        assert torch.equal(loaded(x), fast(x))
    for source in (model, fast):
        path = tmp_path / "model.onnx"
        sx.export_onnx(source, path, (x[:2],), min_speedup=0)
        session = sx.runtime.load(path)
        assert any(node.startswith("Condensed") for node in _operators(path))
        for count in (1, 7):
            (served,) = session.run(None, {session.get_inputs()[0].name: x[:count].numpy()})
            np.testing.assert_allclose(served, expected[:count].numpy(), rtol=1e-5, atol=bound)
        stock = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (served,) = stock.run(None, {stock.get_inputs()[0].name: x.numpy()})
        np.testing.assert_allclose(served, expected.numpy(), rtol=1e-5, atol=bound)


def _operators(path: Path) -> set[str]:
    import onnx

    return {node.op_type for node in onnx.load(path).graph.node}
