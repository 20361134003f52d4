"""What the neurons of a weight are to the rest of the model, by hand for small models of every kind."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from srigl_fx import sparsify
from srigl_fx.masks.records import Role, all_records
from srigl_fx.passes.sites.local_trace import traces_of
from srigl_fx.passes.sites.roles import roles_of


def roles(model: nn.Module) -> dict[str, Role | None]:
    found = roles_of(model, traces_of)
    return {name: found.get(id(parameter)) for name, parameter in model.named_parameters() if parameter.dim() >= 2}


class Attention(nn.Module):
    """One linear layer gives queries, keys and values, as timm writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = (q @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        out: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(8), Attention()
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, 8))

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm(x))
        y: Tensor = self.mlp(self.norm(x))
        return x + (y if scale is None else scale * y)


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.position = nn.Parameter(torch.randn(1, 4, 8))
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x.mean(dim=1))
        return logits


class PostNorm(nn.Module):
    """The stream is normalised after each sum; the second branch is normalised before it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first, self.second, self.head = (nn.Linear(8, 8) for _ in range(4))
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = self.norm(x + self.first(x))
        x = x + self.norm(self.second(x))
        logits: Tensor = self.head(x)
        return logits


class Residual(nn.Module):
    """Two convolutions beside a shortcut with a projection; batch normalisation looks at each neuron alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv1, self.conv2 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 16, 1)
        self.shortcut, self.after = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 4, 1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(width) for width in (8, 8, 16, 16)])

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norms[0](self.stem(x)))
        y = torch.relu(self.norms[1](self.conv1(x)))
        y = self.norms[2](self.conv2(y))
        y += self.norms[3](self.shortcut(x))
        out: Tensor = self.after(torch.relu(y))
        return out


class Conditioned(nn.Module):
    """A projected condition is added in every block: that sum skips nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.time = nn.Linear(8, 8), nn.Linear(4, 8)
        self.inner = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])
        self.outer = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])
        self.shift = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        x, time = self.stem(x), torch.relu(self.time(time))
        for inner, outer, shift in zip(self.inner, self.outer, self.shift, strict=True):
            x = x + outer(torch.relu(inner(x) + shift(time)))
        return x


class Gated(nn.Module):
    """A gated block, whose halves meet in a product neuron by neuron, and a gate on channels."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up, self.down, self.squeeze = nn.Linear(8, 32), nn.Linear(16, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        y: Tensor = self.down(functional.silu(gate) * up)
        return x + y * torch.sigmoid(self.squeeze(y.mean(dim=1, keepdim=True)))


class Skip(nn.Module):
    """A layer beside what it reads, joined in another way than by a plus."""

    def __init__(self, join: Callable[["Skip", Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.up, self.down, self.head = nn.Linear(8, 6), nn.Linear(6, 9), nn.Linear(9, 6), nn.Linear(6, 2)
        self.gate = nn.Linear(6, 6)
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        logits: Tensor = self.head(self.join(self, h, self.down(torch.relu(self.up(h)))))
        return logits


def _highway(skip: Skip, h: Tensor, y: Tensor) -> Tensor:
    gate = torch.sigmoid(skip.gate(h))
    return h * (1 - gate) + gate * y


JOINS: dict[str, Callable[[Skip, Tensor, Tensor], Tensor]] = {
    "lerp": lambda skip, h, y: torch.lerp(h, y, 0.5),
    "gated lerp": lambda skip, h, y: h.lerp(y, torch.sigmoid(skip.gate(h))),
    "stacked": lambda skip, h, y: torch.stack([h, y]).sum(0),
    "averaged": lambda skip, h, y: torch.stack((y, h), dim=-1).mean(-1),
    "addcmul": lambda skip, h, y: torch.addcmul(h, y, torch.sigmoid(skip.gate(h))),
    "highway": _highway,
}


@pytest.mark.parametrize("name", JOINS)
def test_sums_by_other_names_skip_a_layer_too(name: str) -> None:
    found = roles(Skip(JOINS[name]))
    assert {part: found[f"{part}.weight"] for part in ("stem", "up", "down", "head")} == {
        **{"stem": "stream", "up": "width", "down": "stream", "head": "width"}
    }


def test_what_is_only_stacked_skips_nothing() -> None:
    found = roles(Skip(lambda skip, h, y: torch.stack([h, y]).amax(0)))
    assert found["down.weight"] == "width"


def _layer_norm(y: Tensor) -> Tensor:
    centred = y - y.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(dim=-1, keepdim=True) + 1e-5).sqrt()


NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "rms": lambda y: y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5),
    "divided by its norm": lambda y: y / y.norm(dim=-1, keepdim=True).clamp(min=1e-6),
    "vector norm": lambda y: torch.div(y, torch.linalg.vector_norm(y, dim=-1, keepdim=True)),
    "layer norm": _layer_norm,
}


@pytest.mark.parametrize("name", NORMS)
def test_a_normalisation_that_is_written_out_is_one(name: str) -> None:
    assert roles(Skip(lambda skip, h, y: NORMS[name](y)))["down.weight"] == "normalised"
    assert roles(Skip(lambda skip, h, y: h + NORMS[name](y)))["down.weight"] == "stream"


def test_a_mean_over_neurons_that_scales_something_else_is_none() -> None:
    assert roles(Skip(lambda skip, h, y: y * h.mean(-1, keepdim=True)))["down.weight"] == "width"
    assert roles(Skip(lambda skip, h, y: y * y.mean(0, keepdim=True)))["down.weight"] == "width"


class Normalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.both, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.norm = nn.GroupNorm(2, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.before(x)))
        y = self.both(x)
        logits: Tensor = self.head(self.norm(y) * torch.cos(y))
        return logits


class Optional(nn.Module):
    """All arguments are optional, and exactly one may be given."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block = nn.Linear(8, 8), Block()

    def forward(self, x: Tensor | None = None, embedded: Tensor | None = None) -> dict[str, Tensor]:
        if (x is None) == (embedded is None):
            raise ValueError("give one of them")
        embedded = self.embed(x) if embedded is None else embedded
        return {"last": self.block(embedded, scale=embedded.mean())}


class Opaque(nn.Module):
    """Calls its parts through numbers: only what lies inside a part can be seen."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block = nn.Linear(8, 8), Block()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(int(x.sum().item() * 1e6) and [1][x.long().tolist()[0]]):
            x = self.first(x)
        out: Tensor = self.block(x)
        return out


BLOCK: dict[str, Role] = {
    "attn.qkv.weight": "attention",
    "attn.proj.weight": "stream",
    "mlp.0.weight": "width",
    "mlp.3.weight": "stream",
}


def _in(prefix: str) -> dict[str, Role]:
    return {f"{prefix}.{name}": role for name, role in BLOCK.items()}


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Role | None]]] = {
    "pre-norm": (
        Transformer,
        {
            "position": None,
            "patches.weight": "stream",
            **_in("blocks.0"),
            **_in("blocks.1"),
            "head.weight": "width",
        },
    ),
    "post-norm": (
        PostNorm,
        {"embed.weight": "stream", "first.weight": "stream", "second.weight": "stream", "head.weight": "width"},
    ),
    "residual": (
        Residual,
        {
            "stem.weight": "width",  # the shortcut projects it
            "conv1.weight": "width",
            "conv2.weight": "stream",
            "shortcut.weight": "stream",
            "after.weight": "width",
        },
    ),
    "conditioned": (
        Conditioned,
        {
            "stem.weight": "stream",
            "time.weight": "width",
            **{f"inner.{i}.weight": "width" for i in range(2)},
            **{f"outer.{i}.weight": "stream" for i in range(2)},
            **{f"shift.{i}.weight": "width" for i in range(2)},
        },
    ),
    "gated": (Gated, {"gate_up.weight": "width", "down.weight": "stream", "squeeze.weight": "stream"}),
    "normalised": (Normalised, {"before.weight": "normalised", "both.weight": "width", "head.weight": "width"}),
    "optional": (Optional, {"embed.weight": "stream", **_in("block")}),
    "opaque": (Opaque, {"first.weight": None, **_in("block"), "block.mlp.3.weight": "stream"}),
    "packed attention": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1),
        {
            "layers.0.self_attn.in_proj_weight": "attention",
            "layers.0.self_attn.out_proj.weight": "stream",
            "layers.0.linear1.weight": "width",
            "layers.0.linear2.weight": "stream",
        },
    ),
    "plain": (
        lambda: nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)),
        {"0.weight": "width", "2.weight": "width"},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_roles(name: str) -> None:
    build, expected = CASES[name]
    assert roles(build()) == expected


def test_a_graph_says_the_same_as_the_modules() -> None:
    model = fx.symbolic_trace(Residual())
    assert roles(model) == CASES["residual"][1]


def test_an_exported_graph_says_the_same() -> None:
    model = torch.export.export(Transformer().eval(), (torch.randn(1, 3, 8, 8),)).module()
    expected = CASES["pre-norm"][1]
    assert {name: role for name, role in roles(model).items() if role} == {k: v for k, v in expected.items() if v}


def test_a_shared_block_has_the_role_of_its_most_exposed_use() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.layer(torch.relu(self.layer(x)))
            out: Tensor = self.head(x)
            return out

    assert roles(Shared()) == {"layer.weight": "stream", "head.weight": "width"}


def test_sparsify_keeps_the_role_with_the_weight() -> None:
    model = sparsify(Transformer(), sparsity=0.5, distribution="uniform")
    found = {fqn: record.site.role for fqn, _, record in all_records(model)}
    assert found == CASES["pre-norm"][1]


def test_a_transformed_weight_has_a_role_too() -> None:
    model = Block()
    nn.utils.parametrizations.weight_norm(model.mlp[3])
    nn.utils.spectral_norm(model.mlp[0])
    sparsify(model, sparsity=0.5, distribution="uniform")
    found = {fqn: record.site.role for fqn, _, record in all_records(model)}
    assert found["mlp.3.parametrizations.weight.original1"] == "stream"
    assert found["mlp.0.weight_orig"] == "width"


def test_timm() -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    found = roles(timm.create_model("vit_tiny_patch16_224", depth=1))
    assert found == {
        "cls_token": None,
        "pos_embed": None,
        "patch_embed.proj.weight": "stream",
        "blocks.0.attn.qkv.weight": "attention",
        "blocks.0.attn.proj.weight": "stream",
        "blocks.0.mlp.fc1.weight": "width",
        "blocks.0.mlp.fc2.weight": "stream",
        "head.weight": "width",
    }


def test_torchvision() -> None:
    models = pytest.importorskip("torchvision", reason="torchvision is not installed").models
    found = roles(models.swin_transformer.SwinTransformer([4, 4], 8, [1, 1], [2, 2], [7, 7], num_classes=4))
    # One function of torchvision is handed both weights of attention: what it returns may be the neurons of either.
    for block in ("features.1.0", "features.3.0"):
        layers = ("attn.qkv", "attn.proj", "mlp.0", "mlp.3")
        assert [found[f"{block}.{layer}.weight"] for layer in layers] == ["stream", "stream", "width", "stream"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit", "t5", "bart"])
def test_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers", reason="the extra [transformers] is not installed")
    shape = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8, "intermediate_size": 16}
    build: dict[str, Callable[[], nn.Module]] = {
        "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, vocab_size=20)),
        "gpt2": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20, bos_token_id=1, eos_token_id=1)
        ),
        "bert": lambda: transformers.BertModel(transformers.BertConfig(**shape, vocab_size=20)),
        "vit": lambda: transformers.ViTForImageClassification(
            transformers.ViTConfig(**shape, image_size=16, patch_size=8)
        ),
        "t5": lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=20)
        ),
        "bart": lambda: transformers.BartModel(
            transformers.BartConfig(
                **{f"{part}_{size}": 1 for part in ("encoder", "decoder") for size in ("layers", "attention_heads")},
                **{f"{part}_ffn_dim": 16 for part in ("encoder", "decoder")},
                **{"d_model": 8, "vocab_size": 20, "max_position_embeddings": 8},
            )
        ),
    }
    wanted: dict[str, dict[str, list[str]]] = {
        "llama": {"attention": ["q_proj", "k_proj", "v_proj"], "stream": ["o_proj", "down_proj"], "width": ["up_proj"]},
        "gpt2": {"attention": ["c_attn"], "stream": ["attn.c_proj", "mlp.c_proj"], "width": ["c_fc"]},
        "bert": {
            "attention": ["query", "key", "value"],
            "stream": ["attention.output.dense", "0.output.dense"],
            "width": ["intermediate.dense", "pooler.dense"],
        },
        "vit": {
            "attention": ["q_proj", "k_proj", "v_proj"],
            "stream": ["o_proj", "fc2", "embeddings.projection"],
            "width": ["fc1"],
        },
        "t5": {"attention": [".q", ".k", ".v"], "stream": [".o", ".wo"], "width": [".wi"]},
        "bart": {"attention": ["q_proj", "k_proj", "v_proj"], "stream": ["out_proj", "fc2"], "width": ["fc1"]},
    }
    found = roles(build[name]())
    for role, endings in wanted[name].items():
        for ending in endings:
            layers = {layer: is_now for layer, is_now in found.items() if layer.endswith(f"{ending}.weight")}
            assert set(layers.values()) == {role}, layers
