"""Whole models that make discovery hard: what the graph cannot show, what only a run shows, and what looking leaves."""

import copy
import cProfile
import os
import pstats
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sites_support import discover, train_some
from torch import Tensor, fx, nn

import srigl_fx as sx


class Branching(nn.Module):
    """Its way depends on data and on an optional argument, and it calls out to NumPy."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.randn(8, 8)) for _ in range(3))

    def forward(self, x: Tensor, extra: Tensor | None = None, **options: Any) -> Tensor:
        y = F.linear(x, self.a) if x.sum() > 0 else F.linear(x, self.b)
        if extra is not None:
            y = y + extra @ self.c
        if options.get("scale") is not None:
            y = y * options["scale"]
        return y


def test_ways_that_depend_on_data_and_arguments_are_all_looked_at() -> None:
    assert [f.site.kind for f in discover(Branching()).values()] == ["linear", "linear", "linear_in_out"]


class Stateful(nn.Module):
    """Writes caches and counts to itself and to a child while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.cache: dict[str, Any] = {}
        self.config = SimpleNamespace(problem=None)
        self.log: list[Any] = []
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros(1))
        self.child = nn.Module()

    def forward(self, x: Tensor) -> Tensor:
        self.cache["last"] = x
        self.config.problem = "regression" if x.dtype.is_floating_point else "classification"
        self.log.append(x)
        self.child.last = x
        self.seen = self.seen + 1
        self.seen.add_(1)
        y: Tensor = self.fc(x)
        return y


def test_tracing_leaves_no_symbols_behind() -> None:
    model = Stateful()
    discover(model)
    assert (model.cache, model.log, hasattr(model.child, "last")) == ({}, [], False)
    assert vars(model.config) == {"problem": None}
    discover(model, (torch.randn(2, 8),))
    assert not any(isinstance(value, fx.Proxy) for value in (*model.cache.values(), *model.log))
    assert model.seen.item() == 0


class Untraceable(nn.Module):
    """torch.fx stops at its first line; every weight is used in another way behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 8))
        self.stack = nn.Parameter(torch.randn(3, 8, 8))
        self.table = nn.Parameter(torch.randn(5, 8))
        self.position = nn.Parameter(torch.randn(1, 8))
        self.conv = nn.Parameter(torch.randn(4, 8, 1))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.unused = nn.Parameter(torch.randn(4, 4))
        self.unused_layer = nn.Linear(8, 4)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        assert isinstance(x, Tensor)
        length = int(x.detach().numpy().shape[1])
        x = x + self.position + F.embedding(ids, self.table)
        x = F.linear(x, self.w)
        x = self.attention(x, x, x)[0]
        for expert in range(min(3, length)):
            x = x + x @ self.stack[expert]
        return F.conv1d(x.transpose(1, 2), self.conv)


def test_one_run_resolves_what_cannot_be_traced() -> None:
    inputs = (torch.randn(2, 5, 8), torch.randint(0, 5, (2, 5)))
    blind = discover(Untraceable())
    assert not any(blind[name].reached for name in ("w", "stack", "table", "position", "conv"))
    assert "cannot be traced" in blind["w"].reason
    found = discover(Untraceable(), inputs)
    kinds = {name: f.site.kind for name, f in found.items() if not f.reason}
    assert kinds == {
        "w": "linear",
        "stack": "stack",
        "conv": "conv1d",
        "attention.in_proj_weight": "attention_in",
        "attention.out_proj.weight": "linear",
        "unused_layer.weight": "linear",
    }
    assert "looked up" in found["table"].reason
    assert "not a contraction" in found["position"].reason
    assert not found["unused"].reached


def test_a_weight_that_no_run_used_is_noted_and_keeps_its_finding() -> None:
    from srigl_fx.passes.base import run
    from srigl_fx.passes.discover import Discover
    from srigl_fx.passes.draft import Draft

    inputs = (torch.randn(2, 5, 8), torch.randint(0, 5, (2, 5)))
    result = run((Discover(inputs),), Draft(Untraceable()))
    assert [note.where for note in result.notes] == ["unused", "unused_layer.weight"]
    assert all("no use of it was seen" in note.reason for note in result.notes)


def test_a_run_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), Stateful())
    x, state, random = torch.randn(4, 8), copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    discover(model, (x,))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


class Hyper(nn.Module):
    """A network whose weights another one makes."""

    def __init__(self) -> None:
        super().__init__()
        self.maker = nn.Linear(4, 6 * 8)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return F.linear(x, self.maker(z).view(6, 8))


class Graph(nn.Module):
    """Messages along edges, scattered to nodes; one weight for each kind of edge."""

    def __init__(self) -> None:
        super().__init__()
        self.relations = nn.Parameter(torch.randn(3, 8, 8))
        self.own = nn.Linear(8, 8)

    def forward(self, x: Tensor, source: Tensor, target: Tensor, kind: Tensor) -> Tensor:
        messages = torch.einsum("ei,eio->eo", x[source], self.relations[kind])
        y: Tensor = self.own(x).index_add(0, target, messages)
        return y


class Masked(nn.Linear):
    """A layer with a mask of its own, as in an autoregressive autoencoder."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.allowed: Tensor
        self.register_buffer("allowed", torch.ones(outputs, inputs).tril())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.allowed, self.bias)


class Locally(nn.Module):
    """A kernel of its own for every position."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = nn.Parameter(torch.randn(5, 6, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bpi,poi->bpo", x, self.kernels)


class Heads(nn.Module):
    """Attention with one matrix for each head, and a low-rank product on the side."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Parameter(torch.randn(3, 2, 8, 4))
        self.out = nn.Parameter(torch.randn(2, 4, 8))
        self.down, self.up = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = torch.einsum("btd,shde->sbhte", x, self.qkv)
        y = F.scaled_dot_product_attention(q, k, v)
        z: Tensor = torch.einsum("bhte,hed->btd", y, self.out) + self.up(self.down(x))
        return z


class UNet(nn.Module):
    """A diffusion model's blocks: time embedding, grouped norms, skips, attention over pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 16))
        self.down = nn.ModuleList([nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, 2, 1)])
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.up = nn.ModuleDict({"t": nn.ConvTranspose2d(16, 16, 2, 2), "out": nn.Conv2d(32, 3, 3, padding=1)})
        self.norm = nn.GroupNorm(4, 16)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t[:, None] * torch.arange(1, 5)
        scale = self.time(torch.cat([angles.sin(), angles.cos()], 1))
        skip = self.down[0](x) * scale[..., None, None]
        h = self.norm(self.down[1](skip)).relu()
        tokens = h.flatten(2).transpose(1, 2)
        h = h + self.attention(tokens, tokens, tokens)[0].transpose(1, 2).view_as(h)
        y: Tensor = self.up["out"](torch.cat([self.up["t"](h), skip], 1))
        return y


CASES = {
    "hypernetwork": (Hyper, (torch.randn(3, 8), torch.randn(4)), {"maker.weight": "linear"}),
    "graph": (
        Graph,
        (torch.randn(4, 8), torch.tensor([0, 1, 2]), torch.tensor([1, 2, 3]), torch.tensor([0, 2, 1])),
        {"relations": "stack", "own.weight": "linear"},
    ),
    "masked": (
        lambda: nn.Sequential(Masked(8, 8), nn.ReLU(), Masked(8, 8)),
        (torch.randn(3, 8),),
        {"0.weight": "linear", "2.weight": "linear"},
    ),
    "locally": (Locally, (torch.randn(2, 5, 8),), {"kernels": "stack"}),
    "heads": (
        Heads,
        (torch.randn(2, 5, 8),),
        {"qkv": "einsum", "out": "einsum", "down.weight": "linear", "up.weight": "linear"},
    ),
    "unet": (
        UNet,
        (torch.randn(2, 3, 8, 8), torch.rand(2)),
        {
            "time.0.weight": "linear",
            "time.2.weight": "linear",
            "down.0.weight": "conv2d",
            "down.1.weight": "conv2d",
            "attention.in_proj_weight": "attention_in",
            "attention.out_proj.weight": "linear",
            "up.t.weight": "conv_transpose2d",
            "up.out.weight": "conv2d",
        },
    ),
    "flatten": (
        lambda: nn.Sequential(nn.Conv1d(2, 8, 3), nn.Flatten(), nn.Unflatten(1, (4, 12)), nn.Linear(12, 8)),
        (torch.randn(2, 2, 8),),
        {"0.weight": "conv1d", "3.weight": "linear"},
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("by_run", [False, True])
def test_hard_models(name: str, by_run: bool) -> None:
    make, inputs, expected = CASES[name]
    found = discover(make(), inputs if by_run else None)
    assert {fqn: f.site.kind for fqn, f in found.items() if not f.reason} == expected
    assert all(finding.reached for finding in found.values())


@pytest.mark.parametrize("name", CASES)
def test_hard_models_train(name: str) -> None:
    make, inputs, expected = CASES[name]
    assert train_some(make(), *inputs) == list(expected)


def test_functional_transforms_of_a_model_still_work() -> None:
    """A physics-informed network: derivatives with respect to its inputs, through its parameters."""

    class Physics(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))

        def forward(self, x: Tensor) -> Tensor:
            parameters: dict[str, Tensor] = dict(self.net.named_parameters())

            def u(point: Tensor) -> Tensor:
                value: Tensor = torch.func.functional_call(self.net, parameters, point[None])
                return value.sum()

            slope: Tensor = torch.func.vmap(torch.func.jacrev(u))(x)
            return slope

    x = torch.randn(5, 2)
    for inputs in (None, (x,)):
        assert [f.site.kind for f in discover(Physics(), inputs).values()] == ["linear"] * 3
    assert train_some(Physics(), x, rules={"net.0": None}) == ["net.2.weight", "net.4.weight"]


def test_sparsify_keeps_outputs_gradients_and_names() -> None:
    torch.manual_seed(1)
    inputs = (torch.randn(2, 3, 8, 8), torch.rand(2))
    model = UNet()
    reference = copy.deepcopy(model)
    names = list(model.state_dict())
    sx.sparsify(model, sparsity=0.5)
    assert [name for name in model.state_dict() if name in set(names)] == names
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.copy_(model.get_parameter(name))
    outputs, expected = model(*inputs), reference(*inputs)
    assert torch.equal(outputs, expected)
    outputs.square().sum().backward()
    expected.square().sum().backward()
    for name, parameter in reference.named_parameters():
        assert torch.equal(parameter.grad, model.get_parameter(name).grad)  # type: ignore[arg-type]


class Block(nn.Module):
    """A bare weight, behind a branch that tracing does not need to take."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 8))
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor, scale: float | None = None) -> Tensor:
        y = F.linear(self.norm(x), self.w)
        return x + (y if scale is None else y * scale)


def calls_of_discovery(by_run: bool) -> tuple[int, int, int]:
    """Calls of Python's functions to find 100 layers, 200, and of torch.fx to trace one."""

    def calls(function: Callable[..., Any], *args: Any) -> tuple[int, Any]:
        profile = cProfile.Profile()
        result = profile.runcall(function, *args)
        return int(pstats.Stats(profile).total_calls), result  # type: ignore[attr-defined]

    def discovery(layers: int) -> int:
        model = nn.Sequential(*(Block() for _ in range(layers)))
        count, found = calls(discover, model, (torch.randn(2, 8),) if by_run else None)
        assert sum(not finding.reason for finding in found.values()) == layers
        return count

    discovery(10)
    half, whole = discovery(100), discovery(200)
    fx.symbolic_trace(nn.Sequential(Block()))
    trace, _ = calls(fx.symbolic_trace, nn.Sequential(Block()))
    return half, whole, trace


@pytest.mark.long
@pytest.mark.parametrize("by_run", [False, True])
def test_hundreds_of_layers_are_found_in_calls_linear_in_their_number(by_run: bool) -> None:
    """Counted, as seconds differ between machines, in a process of its own: what others import makes more calls."""
    done = subprocess.run(
        [sys.executable, "-c", f"import test_sites_hard as here; print(*here.calls_of_discovery({by_run}))"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    half, whole, trace = map(int, done.stdout.split())
    assert whole < 2.1 * half
    assert whole < 2 * 200 * trace
