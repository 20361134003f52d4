"""Weights of modules that hold several: recurrent layers and cells, experts, containers, lazy and scripted children."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sites_support import assert_blocks_tile, discover, train_some
from torch import Tensor, nn

import srigl_fx as sx
from srigl_fx.errors import SparsifyError
from srigl_fx.masks.records import WeightSite

GATES = {"LSTM": ["i", "f", "g", "o"], "GRU": ["r", "z", "n"], "RNN": [""]}


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize("cell", [False, True])
def test_recurrent_weights_have_one_block_a_gate(kind: str, cell: bool) -> None:
    module = getattr(nn, kind + "Cell")(6, 8) if cell else getattr(nn, kind)(6, 8, 2, bidirectional=True)
    found = discover(module)
    assert set(found) == {name for name, parameter in module.named_parameters() if parameter.dim() == 2}
    for finding in found.values():
        assert (finding.reason, finding.site.kind) == ("", "rnn_gates")
        assert [block.name for block in finding.site.blocks] == GATES[kind]
        assert not any(block.ablatable for block in finding.site.blocks)
        assert_blocks_tile(finding.site)


def test_the_projection_of_an_lstm_has_no_gates() -> None:
    site = discover(nn.LSTM(6, 8, proj_size=4))["weight_hr_l0"].site
    assert (site.matrix_shape, [block.name for block in site.blocks]) == ((4, 8), [""])


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("make", [lambda: nn.LSTM(12, 16, 2, bidirectional=True, proj_size=8), lambda: nn.GRU(12, 16)])
def test_recurrent_layers_train_copy_and_reload(make: Callable[[], nn.Module]) -> None:
    model, x = nn.ModuleDict({"rnn": make()}), torch.randn(5, 3, 12)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = model["rnn"]

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.rnn(x)[0]
            return y

    net = Net()
    assert set(train_some(net, x)) == {f"rnn.{name}" for name, p in net.rnn.named_parameters() if p.dim() == 2}
    clone = copy.deepcopy(net)
    assert torch.equal(clone(x), net(x))
    sx.masks.verify(clone)
    sx.finalize(net)
    assert type(net.rnn) in (nn.LSTM, nn.GRU)
    assert torch.equal(clone(x), net(x))


class LoopCells(nn.Module):
    """A cell in a loop, and its weights used by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(4, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[1], 8)
        for step in x:
            h = self.cell(step, h)
        y: Tensor = self.head(h)
        return y


def test_a_cell_in_a_loop_over_the_input() -> None:
    found = discover(LoopCells())
    assert all(not finding.reason and finding.reached for finding in found.values())
    assert len(train_some(LoopCells(), torch.randn(5, 3, 4))) == 3


class Experts(nn.Module):
    """Stored and said to be stored as the expert modules of transformers are; ``forward`` is decorated there."""

    def __init__(self, transposed: bool, concatenated: bool, gate: bool) -> None:
        super().__init__()
        self.is_transposed, self.is_concatenated, self.has_gate = transposed, concatenated, gate
        name, out = ("gate_up_proj", 24) if gate else ("up_proj", 12)
        shape = (3, 8, out) if transposed else (3, out, 8)
        self.name = name
        self.register_parameter(name, nn.Parameter(torch.randn(shape)))
        self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(3, out)))
        self.down_proj = nn.Parameter(torch.randn((3, 12, 8) if transposed else (3, 8, 12)))

    def forward(self, x: Tensor, which: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert in range(int(which.max()) + 1):
            rows = which == expert
            weight, down = getattr(self, self.name)[expert], self.down_proj[expert]
            weight, down = (weight, down) if self.is_transposed else (weight.T, down.T)
            y = x[rows] @ weight + getattr(self, f"{self.name}_bias")[expert]
            if self.has_gate:
                gate, y = y.chunk(2, -1) if self.is_concatenated else (y[..., ::2], y[..., 1::2])
                y = y * gate.sigmoid()
            out[rows] = y @ down
        return out


def decorated(forward: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    wrapper.__wrapped__ = forward  # type: ignore[attr-defined]
    return wrapper


class DecoratedExperts(Experts):
    forward = decorated(Experts.forward)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("concatenated", "gate"), [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("how", ["rule", "graph", "run"])
def test_expert_stacks(transposed: bool, concatenated: bool, gate: bool, how: str) -> None:
    """By what such modules say of themselves, by the graph of their forward, and by one run: the same axes."""
    module = (DecoratedExperts if how == "rule" else Experts)(transposed, concatenated, gate)
    inputs = (torch.randn(9, 8), torch.arange(9) % 3)
    found = discover(module, inputs if how == "run" else None)
    site = found[module.name].site
    assert (found[module.name].reason, site.kind, site.neuron_axes) == ("", "stack", (0, 2) if transposed else (0, 1))
    packed = how == "rule" and concatenated and gate
    assert len(site.blocks) == (6 if packed else 3)
    assert site.blocks[1].name == ("0.up" if packed else "1")
    assert all(block.ablatable for block in site.blocks)
    assert_blocks_tile(site)
    assert found["down_proj"].site.matrix_shape == (24, 12)
    assert "bias" in found[f"{module.name}_bias"].reason or how != "rule"


def test_expert_stacks_train_and_each_expert_keeps_its_budget() -> None:
    module = DecoratedExperts(True, True, True)
    assert train_some(module, torch.randn(9, 8), torch.arange(9) % 3) == ["gate_up_proj", "down_proj"]
    for handle in sx.masks.records.sparse_weights(module):
        for block, budget in zip(handle.record.site.blocks, handle.record.budgets, strict=True):
            assert int(handle.record.site.to_matrix(handle.mask)[block.start : block.stop].sum()) <= budget


def test_experts_handed_to_a_child() -> None:
    class One(nn.Module):
        def forward(self, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
            return x.matmul(up.T).relu().matmul(down)

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Parameter(torch.randn(24, 8)), nn.Parameter(torch.randn(24, 8))
            self.one = One()

        def forward(self, x: Tensor, which: Tensor) -> Tensor:
            out = torch.zeros_like(x)
            for expert in range(int(which.max()) + 1):
                rows = which == expert
                up, down = self.up.view(-1, 12, 8)[expert], self.down.view(-1, 12, 8)[expert]
                out[rows] = self.one(x[rows], up, down)
            return out

    inputs = (torch.randn(8, 8), torch.arange(8) % 2)
    for example in (None, inputs):
        found = discover(Stack(), example)
        assert [(f.site.kind, f.site.view, len(f.site.blocks)) for f in found.values()] == [
            ("stack", (2, 12, 8), 2)
        ] * 2
        assert [f.site.neuron_axes for f in found.values()] == [(0, 1), (0, 2)]
    assert train_some(Stack(), *inputs) == ["up", "down"]


@pytest.mark.slow
def test_hugging_face_experts() -> None:
    transformers = pytest.importorskip("transformers")
    common: dict[str, Any] = {
        "vocab_size": 50,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 24,
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
    }
    mixtral = transformers.MixtralForCausalLM(transformers.MixtralConfig(**common))
    found = {name.rpartition("mlp.")[2]: f for name, f in discover(mixtral).items() if "mlp" in name}
    assert {name: (f.site.kind, f.reason) for name, f in found.items()} == {
        "gate.weight": ("linear", ""),
        "experts.gate_up_proj": ("stack", ""),
        "experts.down_proj": ("stack", ""),
    }
    blocks = found["experts.gate_up_proj"].site.blocks
    assert [block.name for block in blocks] == ["0.gate", "0.up", "1.gate", "1.up", "2.gate", "2.up"]
    ids = torch.randint(0, 50, (2, 7))
    assert any("gate_up_proj" in name for name in train_some(mixtral.train(), ids, updates=1))


def test_a_lazy_module_is_initialised_by_the_example_inputs() -> None:
    model = nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(4))
    with pytest.raises(SparsifyError, match="example_inputs"):
        discover(model)
    x = torch.randn(2, 3, 6, 6)
    found = discover(model, (x,))
    assert {name: f.site.kind for name, f in found.items()} == {"0.weight": "conv2d", "3.weight": "linear"}
    assert model.training
    assert model[1].num_batches_tracked == 0
    assert type(model[3]) is nn.Linear
    assert train_some(nn.Sequential(nn.LazyLinear(8), nn.LazyLinear(4)), x, example_inputs=(x,))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
def test_a_scripted_child_says_why_it_stays_dense() -> None:
    model = nn.Sequential(nn.Linear(8, 8), torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.ReLU())))
    for inputs in (None, (torch.randn(2, 8),)):
        finding = discover(model, inputs)["1.0.weight"]
        assert "cannot take a mask" in finding.reason
        assert "before torch.jit.script" in finding.reason


def test_frozen_and_shared_modules_are_sites_like_any_other() -> None:
    shared = nn.Linear(8, 8)
    shared.weight.requires_grad_(False)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    assert list(discover(model)) == ["0.weight"]
    assert discover(model)["0.weight"].reason == ""


def test_sites_stored_before_they_named_their_axes_still_load() -> None:
    site = WeightSite(owner="", attr="weight", kind="conv_transpose2d", shape=(4, 3, 2, 2), groups=2)
    buffer = io.BytesIO()
    old = {name: value for name, value in site.__dict__.items() if name not in ("view", "neuron_axes", "input_axes")}
    loaded = WeightSite.__new__(WeightSite)
    loaded.__setstate__(old)
    assert loaded == site
    torch.save(site, buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=False) == site
    weight = torch.randn(4, 3, 2, 2)
    assert torch.equal(loaded.from_matrix(loaded.to_matrix(weight)), weight)


def test_a_functional_use_of_an_embedding_keeps_it_dense() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(9, 8)

        def forward(self, ids: Tensor) -> Tensor:
            return F.linear(self.embedding(ids), self.embedding.weight)

    for inputs in (None, (torch.tensor([1, 2]),)):
        assert "tied with an embedding" in discover(Tied(), inputs)["embedding.weight"].reason


@pytest.mark.parametrize("by_run", [False, True])
def test_a_weight_read_by_somebody_elses_forward_needs_both_to_agree(by_run: bool) -> None:
    class Reads(nn.Module):
        def __init__(self, transposed: bool) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 8, bias=False)
            self.bias = nn.Parameter(torch.randn(8))
            self.transposed = transposed

        def forward(self, x: Tensor) -> Tensor:
            y = F.linear(x, self.qkv.weight, torch.cat([self.bias[:4], torch.zeros(4)]))
            return F.linear(y, self.qkv.weight.t()) if self.transposed else y

    inputs = (torch.randn(2, 8),) if by_run else None
    assert discover(Reads(False), inputs)["qkv.weight"].reason == ""
    assert "different layouts" in discover(Reads(True), inputs)["qkv.weight"].reason
    assert train_some(Reads(False), torch.randn(2, 8)) == ["qkv.weight"]
