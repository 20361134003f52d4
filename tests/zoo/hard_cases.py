"""Models written by hand, each hard to reach or to capture in its own way."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo.entry import Entry, Inputs, images, sequences, vectors


class DataDependent(nn.Module):
    """Branches on the values of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(16, 24)
        self.b = nn.Linear(24, 24)
        self.c = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.a(x))
        if hidden.sum() > 0:
            hidden = self.b(hidden)
        out: Tensor = self.c(hidden)
        return out


class Recurrent(nn.Module):
    """Two layers in both directions."""

    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.r = kind(16, 12, 2, batch_first=True, bidirectional=True)
        self.h = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.r(x)
        out: Tensor = self.h(hidden[:, -1])
        return out


class SharedTwice(nn.Module):
    """Calls one layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(16, 16)
        self.o = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.o(self.l(F.relu(self.l(x))))
        return out


class Tied(nn.Module):
    """Shares a weight between an embedding and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 16)
        self.f = nn.Linear(16, 16)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, words: Tensor) -> Tensor:
        out: Tensor = self.head(F.relu(self.f(self.emb(words))))
        return out


class FunctionalLinear(nn.Module):
    """Multiplies with parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(24, 16))
        self.bias = nn.Parameter(torch.zeros(24))
        self.w2 = nn.Parameter(torch.randn(24, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.linear(x, self.weight, self.bias)) @ self.w2


class FunctionalConv(nn.Module):
    """Convolves with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.k = nn.Parameter(torch.randn(8, 3, 3, 3))
        self.bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(F.relu(self.bn(F.conv2d(x, self.k, padding=1))).mean((2, 3)))
        return out


class Containers(nn.Module):
    """Keeps its layers in a list and a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.ls = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.d = nn.ModuleDict({"o": nn.Linear(16, 4)})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.ls:
            x = F.relu(layer(x)) + x
        out: Tensor = self.d["o"](x)
        return out


class VariableArguments(nn.Module):
    """Takes any number of inputs, and keywords."""

    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(16, 16)

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        total = args[0]
        for other in args[1:]:
            total = total + other
        if kwargs.get("scale") is not None:
            total = total * kwargs["scale"]
        out: Tensor = self.l(total)
        return out


class Checkpointed(nn.Module):
    """Recomputes a block in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.blk = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 16))
        self.o = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.o(checkpoint(self.blk, x, use_reentrant=False))
        return out


class Scripted(nn.Module):
    """Has a TorchScript child."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(16, 16)
        self.s = torch.jit.script(nn.Sequential(nn.Linear(16, 16), nn.ReLU()))
        self.o = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.o(self.s(F.relu(self.a(x))))
        return out


class Attention(nn.Module):
    """Packed projections, used by PyTorch's own attention module."""

    def __init__(self) -> None:
        super().__init__()
        self.m = nn.MultiheadAttention(16, 4, batch_first=True, dropout=0.1)
        self.o = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.o(x + self.m(x, x, x, need_weights=False)[0])
        return out


class Parametrized(nn.Module):
    """Computes its weights from others: both forms of weight normalisation, and spectral normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.utils.parametrizations.weight_norm(nn.Linear(16, 24))
        self.b = nn.utils.parametrizations.spectral_norm(nn.Linear(24, 16))
        self.c = nn.utils.weight_norm(nn.Linear(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c(F.relu(self.b(F.relu(self.a(x)))))
        return out


class Reshaping(nn.Module):
    """Computes sizes from its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv2d(3, 8, 3, padding=1)
        self.l = nn.Linear(8, 12)
        self.o = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        y = self.c(x).flatten(2).transpose(1, 2)
        y = self.l(y).reshape(b, h * w, -1, 4).permute(0, 2, 1, 3).contiguous().view(b, -1, 4).mean(1, keepdim=True)
        out: Tensor = self.o(y.expand(b, 3, 4).reshape(b, 12))
        return out


class BilinearBag(nn.Module):
    """A product of two inputs with a three-dimensional weight, and a bag of embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.e = nn.EmbeddingBag(20, 16)
        self.b = nn.Bilinear(16, 16, 8)
        self.o = nn.Linear(8, 4)

    def forward(self, words: Tensor, x: Tensor) -> Tensor:
        out: Tensor = self.o(F.relu(self.b(self.e(words), x)))
        return out


class LeavesTorch(nn.Module):
    """Computes with NumPy in between."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(16, 8)
        self.b = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x)
        out: Tensor = self.b(hidden / (1 + abs(float(hidden.detach().numpy().max()))))
        return out


class FusedProjections(nn.Module):
    """Queries, keys and values from one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.o = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        out: Tensor = self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, 16))
        return out


class TensorLoop(nn.Module):
    """Loops as often as a tensor says, and indexes with a condition."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(16, 16)
        self.o = nn.Linear(16, 4)

    def forward(self, x: Tensor, n: Tensor) -> Tensor:
        for _ in range(int(n.max())):
            x = torch.tanh(self.a(x))
        out: Tensor = self.o(x[n > 0])
        return out


class ShapeChecks(nn.Module):
    """Asserts on shapes, and branches on them."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv1d(8, 12, 3)
        self.o = nn.Conv1d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == 8, "channels"
        if x.size(-1) % 2:
            x = F.pad(x, (0, 1))
        out: Tensor = self.o(F.silu(self.c(x)))
        return out


def _grouped() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU6(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.BatchNorm2d(8),
        nn.Hardswish(),
        nn.Conv2d(8, 16, 1, groups=4),
        nn.ChannelShuffle(4),
        nn.PixelShuffle(2),
        nn.GroupNorm(2, 4),
        nn.Conv2d(4, 4, 1),
    )


def _nested() -> nn.Module:
    inner = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8))
    return nn.Sequential(nn.Linear(16, 16), nn.Sequential(nn.ReLU(), inner), nn.Dropout(0.2), nn.Linear(8, 4))


def _words_and_vectors(batch: int) -> Inputs:
    return (torch.randint(0, 20, (batch, 3)), torch.randn(batch, 16)), {}


def _two_and_scale(batch: int) -> Inputs:
    return (torch.randn(batch, 16), torch.randn(batch, 16)), {"scale": torch.rand(batch, 1)}


_MODELS: list[tuple[str, Any, Any]] = [
    ("data_dep", DataDependent, vectors()),
    ("lstm", lambda: Recurrent(nn.LSTM), sequences()),
    ("gru", lambda: Recurrent(nn.GRU), sequences()),
    ("shared_twice", SharedTwice, vectors()),
    ("tied", Tied, lambda batch: ((torch.randint(0, 20, (batch, 5)),), {})),
    ("flinear", FunctionalLinear, vectors()),
    ("fconv", FunctionalConv, images(8)),
    ("nested_seq", _nested, vectors()),
    ("modlist", Containers, vectors()),
    ("varargs", VariableArguments, _two_and_scale),
    ("ckpt", Checkpointed, vectors()),
    ("scripted", Scripted, vectors()),
    ("mha", Attention, sequences()),
    ("tenc", lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2), sequences()),
    (
        "transformer",
        lambda: nn.Transformer(16, 4, 1, 1, 32, batch_first=True),
        lambda batch: ((torch.randn(batch, 5, 16), torch.randn(batch, 4, 16)), {}),
    ),
    ("groups", _grouped, images(8)),
    ("parametrized", Parametrized, vectors()),
    ("dyn_reshape", Reshaping, images(4)),
    ("bilinear_emb", BilinearBag, _words_and_vectors),
    ("numpy_op", LeavesTorch, vectors()),
    ("fused_qkv", FusedProjections, sequences()),
    ("tensor_iter", TensorLoop, lambda batch: ((torch.randn(batch, 16), torch.tensor([2] * batch)), {})),
    ("assert_shape", ShapeChecks, lambda batch: ((torch.randn(batch, 8, 9),), {})),
]

ENTRIES = [Entry(f"nasty_{name}", "by hand", cast(Any, make), inputs) for name, make, inputs in _MODELS]
