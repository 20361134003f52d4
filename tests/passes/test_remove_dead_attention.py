"""Dead channels and heads of attention leave the graph: by operator, by hand, packed, grouped and rotated."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from passes_support import masked, relative_error, removed, shapes
from torch import Tensor, nn

from srigl_fx.passes.program import Program, arguments

HEADS, WIDTH = 2, 4
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) / 2.0
    return (scores + torch.eye(q.shape[-2])).softmax(-1) @ v


def merged_batch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, heads, tokens, width = q.shape
    q, k, v = (t.reshape(batch * heads, tokens, -1) for t in (q, k, v))
    return torch.bmm(F.softmax(torch.bmm(q, k.transpose(1, 2)), -1), v).view(batch, heads, tokens, width)


class Attention(nn.Module):
    def __init__(self, attend: Attend = fused, rotate: bool = False, kv_heads: int = HEADS) -> None:
        super().__init__()
        self.q = nn.Linear(6, HEADS * WIDTH)
        self.k, self.v = nn.Linear(6, kv_heads * WIDTH), nn.Linear(6, kv_heads * WIDTH)
        self.o = nn.Linear(HEADS * WIDTH, 5)
        self.attend, self.rotate, self.kv_heads = attend, rotate, kv_heads

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = (p(x).view(batch, tokens, -1, WIDTH).transpose(1, 2) for p in (self.q, self.k, self.v))
        if self.rotate:
            angle = torch.arange(tokens)[:, None] / torch.tensor([1.0, 9.0])
            cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)
            q, k = (t * cos + torch.cat([-t[..., 2:], t[..., :2]], -1) * sin for t in (q, k))
        if self.kv_heads != HEADS:
            k, v = (t.repeat_interleave(HEADS // self.kv_heads, 1) for t in (k, v))
        return self.o(self.attend(q, k, v).transpose(1, 2).reshape(batch, tokens, -1))  # type: ignore[no-any-return]


def cut(model: nn.Module, *inputs: Tensor, **dead: list[int]) -> Program:
    model = masked(model, {f"{name}.weight": rows for name, rows in dead.items()})
    program = removed(model, inputs).subject
    for batch in (None, 1, 3):
        assert relative_error(model, program, batch) < 2e-6
    return program


TOKENS = torch.randn(2, 5, 6)
UNMERGED = pytest.mark.parametrize("attend", [fused, causal, by_hand])
EVERY = pytest.mark.parametrize("attend", [fused, causal, by_hand, merged_batch])


@pytest.mark.long
@EVERY
def test_dead_values_go_into_the_bias_of_the_projection(attend: Attend) -> None:
    program = cut(Attention(attend), TOKENS, v=[1, 6])
    assert shapes(program, "linear") == [(8, 6), (8, 6), (6, 6), (5, 6)]


@pytest.mark.slow
@UNMERGED
def test_dead_keys_take_their_queries_along(attend: Attend) -> None:
    program = cut(Attention(attend), TOKENS, k=[0, 7])
    assert shapes(program, "linear") == [(6, 6), (6, 6), (8, 6), (5, 8)]


@pytest.mark.long
@UNMERGED
def test_a_dead_query_stays_unless_it_is_zero(attend: Attend) -> None:
    model = Attention(attend)
    assert shapes(cut(model, TOKENS, q=[0, 7]), "linear")[0] == (8, 6)
    model.q = nn.Linear(6, 8, bias=False)
    assert shapes(cut(model, TOKENS, q=[0, 7]), "linear")[:2] == [(6, 6), (6, 6)]


@pytest.mark.long
@EVERY
def test_a_whole_head_goes(attend: Attend) -> None:
    program = cut(Attention(attend), TOKENS, v=[4, 5, 6, 7])
    assert shapes(program, "linear") == [(4, 6), (4, 6), (4, 6), (5, 4)]


@pytest.mark.long
def test_keys_stay_where_heads_share_an_axis_with_the_batch() -> None:
    assert shapes(cut(Attention(merged_batch), TOKENS, k=[0, 7]), "linear")[1] == (8, 6)


@pytest.mark.long
def test_a_head_and_more() -> None:
    program = cut(Attention(), TOKENS, v=[0, 1, 2, 3, 5], k=[6])
    assert shapes(program, "linear") == [(3, 6), (3, 6), (3, 6), (5, 3)]


@pytest.mark.long
def test_heads_keep_equally_many_channels() -> None:
    program = cut(Attention(), TOKENS, v=[0, 1, 2, 6], k=[1, 2])
    assert shapes(program, "linear") == [(8, 6), (8, 6), (6, 6), (5, 6)]


@pytest.mark.long
def test_the_scale_is_that_of_the_whole_width() -> None:
    program = cut(Attention(), TOKENS, k=[0, 7])
    node = next(n for n in program.module.graph.nodes if "scaled_dot" in str(n.target))
    assert arguments(node)["scale"] == WIDTH**-0.5


@pytest.mark.long
@pytest.mark.parametrize("attend", [fused, by_hand])
def test_rotated_channels_go_in_pairs_where_zero(attend: Attend) -> None:
    model = Attention(attend, rotate=True)
    assert shapes(cut(model, TOKENS, k=[0, 2, 4, 6]), "linear")[1] == (8, 6), "rotated, a constant has a position"
    model.k = nn.Linear(6, 8, bias=False)
    assert shapes(cut(model, TOKENS, k=[0, 2, 4, 6]), "linear")[:2] == [(4, 6), (4, 6)]
    assert shapes(cut(model, TOKENS, k=[0, 4]), "linear")[1] == (8, 6), "half of a pair"


@pytest.mark.long
@pytest.mark.parametrize("rotate", [False, True])
def test_grouped_queries(rotate: bool) -> None:
    program = cut(Attention(rotate=rotate, kv_heads=1), TOKENS, v=[2])
    assert shapes(program, "linear") == [(8, 6), (4, 6), (3, 6), (5, 6)]


@pytest.mark.long
def test_grouped_queries_in_the_operator() -> None:
    class Grouped(Attention):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (p(x).unflatten(-1, (-1, WIDTH)).transpose(1, 2) for p in (self.q, self.k, self.v))
            out = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
            return self.o(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    program = cut(Grouped(kv_heads=1), TOKENS, v=[2], k=[0, 1])
    assert shapes(program, "linear") == [(4, 6), (2, 6), (3, 6), (5, 6)]


@pytest.mark.long
def test_packed_projection() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.o = nn.Linear(6, 24), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            batch, tokens, _ = x.shape
            q, k, v = self.qkv(x).reshape(batch, tokens, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4).unbind(0)
            out = F.scaled_dot_product_attention(q, k, v)
            return self.o(out.transpose(1, 2).reshape(batch, tokens, 8))  # type: ignore[no-any-return]

    program = cut(Packed(), TOKENS, qkv=[8, 13, 17, 20])
    assert shapes(program, "linear") == [(18, 6), (5, 6)], "one each of queries, keys and values in each head"
    program = cut(Packed(), TOKENS, qkv=[20, 21, 22, 23])
    assert shapes(program, "linear") == [(12, 6), (5, 4)], "a head"


@pytest.mark.long
@pytest.mark.parametrize("batch_first", [True, False])
def test_the_module_of_torch(batch_first: bool) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)

        def forward(self, x: Tensor) -> Tensor:
            x = x if batch_first else x.transpose(0, 1)
            out: Tensor = self.attention(x, x, x, need_weights=False)[0]
            return out if batch_first else out.transpose(0, 1)

    model = masked(Wrapped(), {"attention.in_proj_weight": [8, 13, 17, 20]})
    program = removed(model, (torch.randn(2, 5, 8),)).subject
    for batch in (None, 1, 3):
        assert relative_error(model, program, batch) < 2e-6
    assert program.removals is not None
    assert sum(weight.columns_removed for weight in program.removals.weights) == 2
    assert program.removals.channels[1] < program.removals.channels[0]


@pytest.mark.long
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_mask_that_comes_with_the_input(kind: str) -> None:
    class Masked(Attention):
        def forward(self, x: Tensor, mask: Any = None) -> Tensor:
            q, k, v = (p(x).unflatten(-1, (-1, WIDTH)).transpose(1, 2) for p in (self.q, self.k, self.v))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
            return self.o(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    mask = torch.rand(2, 5) > 0.3 if kind == "bool" else torch.randn(2, 5)
    program = cut(Masked(), TOKENS, mask, k=[0, 7])
    assert shapes(program, "linear")[:2] == [(6, 6), (6, 6)]


@pytest.mark.slow
def test_a_bias_by_head_loses_the_heads_that_go() -> None:
    class Biased(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(HEADS, 5, 5))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (p(x).unflatten(-1, (-1, WIDTH)).transpose(1, 2) for p in (self.q, self.k, self.v))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.table[None])
            return self.o(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    program = cut(Biased(), TOKENS, v=[0, 1, 2, 3])
    assert shapes(program, "linear") == [(4, 6), (4, 6), (4, 6), (5, 4)]


@pytest.mark.long
def test_a_norm_of_each_head_keeps_its_channels_but_not_a_dead_head() -> None:
    class Normed(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (p(x).unflatten(-1, (-1, WIDTH)).transpose(1, 2) for p in (self.q, self.k, self.v))
            out = F.scaled_dot_product_attention(self.norm(q), self.norm(k), v)
            return self.o(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    assert shapes(cut(Normed(), TOKENS, k=[0, 7]), "linear")[0] == (8, 6)
    assert shapes(cut(Normed(), TOKENS, v=[4, 5, 6, 7]), "linear") == [(4, 6), (4, 6), (4, 6), (5, 4)]


@pytest.mark.long
def test_cross_attention_of_a_decoder_layer() -> None:
    layer = nn.TransformerDecoderLayer(8, 2, 12, batch_first=True)
    model = masked(layer, {"linear1.weight": [1, 2, 3], "multihead_attn.in_proj_weight": [17, 20]})
    program = removed(model, (torch.randn(2, 4, 8), torch.randn(2, 5, 8))).subject
    for batch in (None, 1, 3):
        assert relative_error(model, program, batch) < 2e-6
    assert (9, 8) in shapes(program, "linear")
