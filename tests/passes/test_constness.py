"""What the analysis claims is true, and what is constant by hand is found."""

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from lowering_support import randomise
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from zoo import ZOO

from srigl_fx.passes.base import run
from srigl_fx.passes.capture import capture
from srigl_fx.passes.constness import Constant, Constness, constants
from srigl_fx.passes.normalize import Normalize
from srigl_fx.passes.program import Program

aten = torch.ops.aten


def ablate(model: nn.Module, share: float = 0.3, seed: int = 0) -> nn.Module:
    """Random values everywhere, and a share of the rows of every weight set to zero."""
    randomise(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and "emb" not in name:
                weight[torch.rand(weight.shape[0], generator=generator) < share] = 0
    return model.eval()


def program_of(model: nn.Module, *args: Any, **kwargs: Any) -> Program:
    return run((Normalize(),), capture(model.eval(), (args, kwargs))).subject


class Checker(fx.Interpreter):
    """Runs a graph and collects the claims that its values contradict."""

    def __init__(self, program: Program, found: Constness) -> None:
        super().__init__(program.module)
        self.found = found
        self.wrong: list[tuple[str, str, float]] = []
        self.checked = 0

    def run_node(self, n: fx.Node) -> Any:
        if isinstance(n.target, torch._ops.OpOverload) and n.target._schema.is_mutable:
            return self.fetch_args_kwargs_from_env(n)[0][0]
        value = super().run_node(n)
        if n in self.found.known:
            claim, fixed = self.found.known[n].value, self.found.known[n].fixed
            for axis, size in enumerate(n.meta["val"].shape):
                if isinstance(size, torch.SymInt):
                    claim, fixed = claim.unsqueeze(axis), fixed.unsqueeze(axis)
            off = (claim.expand(value.shape).double() - value.double()).abs() / (1 + claim.double().abs())
            off = off[fixed.expand(value.shape)]
            self.checked += off.numel()
            if not bool((off < 1e-5).all()):
                self.wrong.append((n.name, str(n.target), float(off.max())))
        return value


def claims_hold(program: Program, found: Constness, *inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> int:
    """Check every claim on other inputs; return how many numbers were checked."""
    checked = 0
    for args, kwargs in inputs:
        checker = Checker(program, found)
        with torch.no_grad():
            checker.run(*pytree.tree_leaves((args, kwargs)), enable_io_processing=False)
        assert not checker.wrong
        checked += checker.checked
    return checked


def last(program: Program, found: Constness) -> Constant | None:
    """What is known of the (first) output."""
    output = next(node for node in program.module.graph.nodes if node.op == "output")
    return found.known.get(pytree.tree_leaves(output.args)[0])


def known_in(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[list[bool], list[float]]:
    """Which elements of the output are constant, and their values; checked on other inputs."""
    program = program_of(model, *args, **kwargs)
    found = constants(program)
    others = [pytree.tree_map_only(Tensor, _other, (args, kwargs)) for _ in range(2)]
    claims_hold(program, found, *others)
    known = last(program, found)
    if known is None:
        return [], []
    return known.fixed.flatten().tolist(), known.value.flatten().tolist()


def _other(x: Tensor) -> Tensor:
    return torch.randn_like(x) * 3 if x.is_floating_point() else torch.randint_like(x, 0, max(2, int(x.max()) + 1))


class Function(nn.Module):
    """A linear layer without row 1 (its value is 2), and a function of what it gives."""

    def __init__(self, function: Any, features: int = 4) -> None:
        super().__init__()
        self.layer = nn.Linear(3, features)
        with torch.no_grad():
            self.layer.bias.copy_(torch.arange(1.0, features + 1))
            self.layer.weight[1] = 0
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self.layer(inputs[0]), *inputs[1:])


ONE_OF_FOUR = [False, True, False, False]


@pytest.mark.parametrize(
    ("function", "fixed", "value"),
    [
        (lambda h: h, ONE_OF_FOUR, 2.0),
        (lambda h: F.relu(h - 3), ONE_OF_FOUR, 0.0),
        (lambda h: h.flip(1), [False, False, True, False], 2.0),
        (lambda h: h[:, 1:3].sin(), [True, False], float(torch.tensor(2.0).sin())),
        (lambda h: h.chunk(2, 1)[0] * h.chunk(2, 1)[1], [False, False], 0.0),
        (lambda h: (h - 2).chunk(2, 1)[0] * h.chunk(2, 1)[1], [False, True], 0.0),
        (lambda h: (h - 2)[:, :2] / (1 + h[:, 2:].square()), [False, True], 0.0),
        (lambda h: torch.cat([h, h.new_full((h.shape[0], 1), 7.0)], 1), [*ONE_OF_FOUR, True], 2.0),
        (lambda h: h.unsqueeze(2).expand(-1, 4, 3).mean(2), ONE_OF_FOUR, 2.0),
        (lambda h: h.mean(1, keepdim=True), [False], 0.0),
        (lambda h: h.softmax(1), [False] * 4, 0.0),
        (lambda h: F.layer_norm(h, (4,)), [False] * 4, 0.0),
        (lambda h: F.group_norm(h, 2), [False] * 4, 0.0),
        (lambda h: F.rms_norm(h, (4,)), [False] * 4, 0.0),
        (lambda h: F.rms_norm(h - 2, (4,)), ONE_OF_FOUR, 0.0),
        (lambda h: F.max_pool1d(h.unsqueeze(2).expand(-1, 4, 5), 3)[:, :, 0], ONE_OF_FOUR, 2.0),
        (lambda h: F.interpolate(h.view(-1, 4, 1, 1), scale_factor=2, mode="bilinear")[:, :, 0, 0], ONE_OF_FOUR, 2.0),
        (lambda h: h.masked_fill(torch.tensor([True, False, False, True]), 5.0), [True, True, False, True], 5.0),
        (lambda h: torch.where(torch.tensor([True, False, False, True]), h, 0.0), [False, True, True, False], 0.0),
        (lambda h: torch.where(h > 0, h, h), ONE_OF_FOUR, 2.0),
        (lambda h: h.topk(4, 1)[0], [False] * 4, 0.0),
        (lambda h: h * h.shape[0], [False] * 4, 0.0),
        (lambda h: h + torch.rand_like(h), [False] * 4, 0.0),
        (lambda h: (h > 1).float(), ONE_OF_FOUR, 1.0),
        (lambda h: h * h.argmax(), [False] * 4, 0.0),
        (lambda h: torch.zeros_like(h).masked_fill(h > 0, 1.0), ONE_OF_FOUR, 1.0),
        (lambda h: torch.log(h - 3)[:, :2], [False, False], 0.0),  # not a number
        (lambda h: torch.full_like(h, 3.0), [True] * 4, 3.0),
        (lambda h: torch.einsum("bi,oi->bo", h, torch.tensor([[0.0, 2.0, 0.0, 0.0]])), [True], 4.0),
        (lambda h: torch.addmm(torch.ones(1), h, torch.tensor([[0.0], [2.0], [0.0], [0.0]])), [True], 5.0),
        (lambda h: h.cumsum(1), [False] * 4, 0.0),
        (lambda h: F.pad(h, (1, 0)), [True, *ONE_OF_FOUR], 0.0),
        (lambda h: h.sum(0), [False] * 4, 0.0),  # the constant's sum depends on the batch size
        (lambda h: h.amax(0), [False] * 4, 0.0),
        (lambda h: F.relu(h - 3).sum(0), ONE_OF_FOUR, 0.0),  # but not that of zeros
        (lambda h: h.t() @ F.relu(h - 3), [False, True, False, False] * 4, 0.0),
        (lambda h: h.t() @ torch.ones_like(h), [False] * 16, 0.0),
        (lambda h: h.reshape(4, -1), [False] * 4, 0.0),
        (lambda h: torch.stack([h, h]).reshape(-1, 4).reshape(2, -1, 4)[0], ONE_OF_FOUR, 2.0),
        (lambda h: torch.ones(h.shape[0]).sum().clamp(max=1) * h, [False] * 4, 0.0),
        (lambda h: h[-1] + torch.arange(h.shape[0])[:1].clamp(max=0), [False] * 4, 0.0),
    ],
)
@pytest.mark.slow
def test_what_is_constant_by_hand(function: Any, fixed: list[bool], value: float) -> None:
    found, values = known_in(Function(function), torch.randn(2, 3))
    assert (found or [False] * len(fixed)) == fixed
    if any(fixed):
        assert values[fixed.index(True)] == pytest.approx(value)


def attention(h: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    """(B, 4 positions, 6) to one head's attention, its values the last two channels."""
    q, k, v = (part.unsqueeze(1) for part in torch.split(h, 2, dim=-1))
    return F.scaled_dot_product_attention(q, k, v, mask, **options)[:, 0, 0]


def by_hand(h: Tensor) -> Tensor:
    q, k, v = torch.split(h, 2, dim=-1)
    weights = (q @ k.transpose(1, 2)).softmax(-1).unsqueeze(1).expand(-1, 1, -1, -1).clone()
    out: Tensor = weights @ v.unsqueeze(1)
    return out[:, 0, 0]


def grouped(h: Tensor) -> Tensor:
    q, k, v = (part.unsqueeze(-1).transpose(1, 2) for part in torch.split(h, [4, 1, 1], dim=-1))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)[:, :, 0, 0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "dead", "bias", "expected"),
    [
        (attention, 4, 5.0, [5.0, None]),
        (attention, 0, 5.0, [None, None]),
        (lambda h: attention(h, is_causal=True), 5, 5.0, [None, 5.0]),
        (lambda h: attention(h, torch.ones(4, 4, dtype=torch.bool).tril()), 5, 5.0, [None, 5.0]),
        (lambda h: attention(h, torch.ones(4, 4, dtype=torch.bool).tril(-1)), 5, 5.0, [None, None]),
        (lambda h: attention(h, torch.ones(4, 4, dtype=torch.bool).tril(-1)), 5, 0.0, [None, 0.0]),
        (lambda h: attention(h, torch.zeros(4, 4).fill_diagonal_(-torch.inf)), 5, 5.0, [None, 5.0]),
        (lambda h: attention(h, (h[:, :1, :1] > 0).unsqueeze(1).expand(-1, 1, 4, 4)), 5, 5.0, [None, None]),
        (lambda h: attention(h, (h[:, :1, :1] > 0).unsqueeze(1).expand(-1, 1, 4, 4)), 5, 0.0, [None, 0.0]),
        (by_hand, 4, 5.0, [5.0, None]),
        (by_hand, 2, 5.0, [None, None]),
        (grouped, 5, 5.0, [5.0] * 4),
    ],
)
def test_dead_value_channels_in_attention(function: Any, dead: int, bias: float, expected: list[float | None]) -> None:
    model = Function(function, 6)
    randomise(model)
    with torch.no_grad():
        model.layer.weight[dead], model.layer.bias[dead] = 0, bias
    fixed, values = known_in(model, torch.randn(2, 4, 3))
    fixed, values = fixed or [False] * len(expected), values or [0.0] * len(expected)
    assert fixed == [value is not None for value in expected]
    assert values == pytest.approx([value or 0.0 for value in expected])


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_convolutions_by_their_zeros_and_their_borders(kind: type[nn.Conv2d], padding: int) -> None:
    first, second = kind(2, 4, 3, padding=padding), kind(4, 4, 3, padding=padding, groups=2)
    randomise(model := nn.Sequential(first, nn.ReLU(), second))
    with torch.no_grad():
        rows = first.weight if kind is nn.Conv2d else first.weight.transpose(0, 1)
        rows[:2] = 0
        first.bias[:2] = torch.tensor([1.0, -1.0])  # type: ignore[index]
    program = program_of(model, torch.randn(2, 2, 9, 9))
    found = constants(program)
    assert claims_hold(program, found, ((torch.randn(2, 2, 9, 9),), {}))
    known = last(program, found)
    assert known is not None
    assert known.fixed.flatten(1).all(1).tolist() == [True, True, False, False]  # a whole group is dead
    uniform = [float(v.max() - v.min()) < 1e-6 for v in known.value[:2]]
    assert uniform == ([True, True] if kind is nn.Conv2d and padding == 0 else [False, False])


def test_an_embedding_by_an_input_is_live_and_parameters_are_constant() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb = nn.Embedding(5, 3)
            self.token = nn.Parameter(torch.randn(1, 3))

        def forward(self, i: Tensor) -> Tensor:
            return torch.cat([self.token.expand(i.shape[0], -1), self.emb(i)], 1)

    fixed, _ = known_in(Model(), torch.tensor([1, 4]))
    assert fixed == [True] * 3 + [False] * 3


def test_a_buffer_that_the_graph_writes_is_live_and_left_alone() -> None:
    class Counter(nn.Module):
        count: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            self.count.add_(1)
            return x * 0 + self.count

    model = Counter().eval()
    program = program_of(model, torch.randn(2, 3))
    found = constants(program)
    assert last(program, found) is None
    assert model.count.tolist() == [1.0, 1.0, 1.0]


def test_an_operator_without_a_rule_is_noted_once() -> None:
    class Shortens(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.renorm(torch.renorm(x, 2, 0, 1.0) * 0, 2, 0, 1.0)

    found = constants(program_of(Shortens(), torch.randn(2, 3)))
    assert [note.reason.split()[0] for note in found.notes] == ["aten.renorm"]


def test_only_what_is_asked_for_is_kept() -> None:
    program = program_of(ablate(nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 9))), torch.randn(2, 4))
    found = constants(program, lambda node: node.target is aten.relu.default)
    assert [node.target for node in found.known] == [aten.relu.default]


def test_a_static_program_keeps_its_leading_axis() -> None:
    program = program_of(Function(lambda h: h.reshape(4)), torch.randn(1, 3))
    assert not program.dynamic
    known = last(program, constants(program))
    assert known is not None
    assert known.fixed.tolist() == ONE_OF_FOUR


def _layer(step: str, c: int) -> nn.Module:
    match step:
        case "conv":
            return nn.Conv2d(c, c, 3, padding=1)
        case "valid":
            return nn.Sequential(nn.ConstantPad2d(1, 0.5), nn.Conv2d(c, c, 3))
        case "grouped":
            return nn.Conv2d(c, c, 3, padding=1, groups=4)
        case "depthwise":
            return nn.Conv2d(c, c, 3, padding=1, groups=c)
        case "transposed":
            return nn.ConvTranspose2d(c, c, 3, padding=1)
        case "linear" | "gate":
            return nn.Linear(c, c)
        case "norm":
            return nn.BatchNorm2d(c)
        case "group_norm":
            return nn.GroupNorm(4, c)
        case "glu":
            return nn.Conv2d(c, 2 * c, 1)
        case "attention":
            return nn.Linear(c, 3 * c)
        case _:
            return nn.Identity()


class Random(nn.Module):
    """A random graph: every step takes channels, mixes, reshapes or joins what the steps before it left."""

    def __init__(self, steps: list[str], seed: int) -> None:
        super().__init__()
        self.steps = steps
        c = 8
        self.layers = nn.ModuleList(_layer(step, c) for step in steps)
        ablate(self, seed=seed)

    def forward(self, x: Tensor) -> Tensor:
        before = x
        for step, layer in zip(self.steps, self.layers, strict=True):
            now = self._step(step, layer, x, before)
            before, x = x, now
        return x

    def _step(self, step: str, layer: nn.Module, x: Tensor, before: Tensor) -> Tensor:
        match step:
            case "linear":
                return layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # type: ignore[no-any-return]
            case "glu":
                a, b = layer(x).chunk(2, 1)
                return F.silu(a) * F.relu(b)
            case "attention":
                batch, c, height, width = x.shape
                qkv = layer(x.flatten(2).transpose(1, 2)).reshape(batch, height * width, 3, 2, c // 2)
                q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
                return F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(x.shape)
            case "gate":
                gate = torch.sigmoid(layer(x.mean((2, 3))))
                return x * gate[:, :, None, None]
            case "add":
                return x + before
            case "mul":
                return F.relu(x) * before
            case "shuffle":
                return F.channel_shuffle(x, 2).roll(1, 2)
            case "swap":
                return torch.cat([before[:, 4:], x[:, :4]], 1)
            case "pool":
                return F.avg_pool2d(x, 3, 1, 1)
            case "max_pool":
                return F.max_pool2d(x, 3, 1, 1)
            case "resize":
                return F.interpolate(F.max_pool2d(x, 2), size=x.shape[2:], mode="bilinear")
            case "relu":
                return F.relu(x)
            case "hardswish":
                return F.hardswish(x)
            case "rms":
                return F.rms_norm(x.transpose(1, 3), (x.shape[1],)).transpose(1, 3)
            case _:
                return layer(x)  # type: ignore[no-any-return]


STEPS = (
    "conv valid grouped depthwise transposed linear norm group_norm glu attention gate add mul shuffle swap pool "
    "max_pool resize relu hardswish rms"
)


def check_random(steps: list[str], seed: int) -> int:
    model = Random(["conv", *steps], seed)
    program = program_of(model, torch.randn(2, 8, 6, 6))
    found = constants(program)
    return claims_hold(program, found, *(((torch.randn(size, 8, 6, 6),), {}) for size in (2, 5)))


@pytest.mark.parametrize("step", STEPS.split())
def test_claims_hold_after_each_operation(step: str) -> None:
    assert check_random([step, "relu"], seed=3)


@pytest.mark.long
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(steps=st.lists(st.sampled_from(STEPS.split()), min_size=3, max_size=12), seed=st.integers(0, 99))
def test_claims_hold_on_random_graphs(steps: list[str], seed: int) -> None:
    check_random(steps, seed)


QUICK = {"nasty_fused_qkv", "nasty_groups", "nasty_mha"}
ZOO_SAMPLE = (
    "tv_resnet18 tv_swin timm_beit_base_patch16_224 timm_mambaout_femto hf_bert hf_llama hf_gpt2 hf_t5 "
    "nasty_fused_qkv nasty_groups nasty_mha nasty_lstm"
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.long) for name in ZOO_SAMPLE.split()]
)
def test_claims_hold_on_real_models(name: str) -> None:
    pytest.importorskip({"tv": "torchvision", "hf": "transformers", "timm": "timm"}.get(name.split("_")[0], "torch"))
    entry = ZOO[name]
    args, kwargs = entry.inputs(2)
    program = program_of(ablate(entry.make()), *args, **kwargs)
    assert claims_hold(program, constants(program), entry.inputs(2), entry.inputs(3))


def test_indices_into_the_batch_are_not_cut_out_of_range() -> None:
    class Gathering(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x: Tensor, source: Tensor) -> Tensor:
            return torch.relu(self.fc(x))[source]

    model = randomise(Gathering()).eval()
    with torch.no_grad():
        model.fc.weight[1] = 0  # type: ignore[union-attr, operator]
    program = capture(model, (torch.randn(6, 4), torch.tensor([5, 0, 3, 1, 2, 4])))
    found = constants(program, lambda node: "relu" in node.name)
    assert [known.fixed.tolist() for known in found.known.values()] == [[False, True, False]]
