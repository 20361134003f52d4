"""Dead channels of linear layers and convolutions leave the graph, and nothing else changes: case by case."""

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from passes_support import masked, relative_error, removed, shapes
from torch import Tensor, nn

from srigl_fx.masks.records import MASK_SUFFIX
from srigl_fx.passes.channels.cut import Cut
from srigl_fx.passes.program import Program, tensor_at
from srigl_fx.passes.removal import Removal


class Net(nn.Module):
    """A model whose forward is a function of its layers and the input."""

    def __init__(self, forward: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(layers)
        self._forward = forward

    def forward(self, *inputs: Tensor) -> Any:
        return self._forward(self.layers, *inputs)


def cut(model: nn.Module, *inputs: Tensor, columns: dict[str, list[int]] | None = None, **dead: list[int]) -> Program:
    """The program after removal of a model with these dead rows (and columns), checked against the model."""
    model = masked(
        model,
        {f"layers.{name}.weight": rows for name, rows in dead.items()},
        columns={f"layers.{name}.weight": found for name, found in (columns or {}).items()},
    )
    result = removed(model, inputs)
    assert not any(note.undone for note in result.notes)
    program = result.subject
    for batch in (None, 1, 3, 7):
        assert relative_error(model, program, batch) < 1e-6
    for node in program.module.graph.nodes:
        assert "val" in node.meta or node.op == "output"
    return program


def entry(program: Program, name: str) -> Removal:
    assert program.removals is not None
    return next(weight for weight in program.removals.weights if weight.fqn == f"layers.{name}.weight")


IMAGE = torch.randn(2, 3, 6, 6)
VECTOR = torch.randn(2, 5)


# -- what a constant becomes ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("bias", [True, False])
def test_a_constant_goes_into_the_bias_of_its_reader(bias: bool) -> None:
    net = Net(lambda m, x: m["b"](torch.sigmoid(m["a"](x))), a=nn.Linear(5, 6), b=nn.Linear(6, 4, bias=bias))
    program = cut(net, VECTOR, a=[0, 4])
    assert shapes(program, "linear") == [(4, 5), (4, 4)]
    assert entry(program, "b").folded == {"bias": 2}
    names = dict(program.module.named_parameters())
    assert "layers.a.weight" in names, "the model's own parameters stay"


def test_zero_leaves_nothing() -> None:
    net = Net(lambda m, x: m["b"](F.relu(m["a"](x))), a=nn.Linear(5, 6, bias=False), b=nn.Linear(6, 4, bias=False))
    program = cut(net, VECTOR, a=[1, 2])
    assert shapes(program, "linear") == [(4, 5), (4, 4)]
    assert entry(program, "b").folded == {"zero": 2}
    assert "add" not in program.module.code


@pytest.mark.slow
def test_one_constant_channel_stays_before_zero_padding_and_carries_the_others() -> None:
    conv = nn.Conv2d(3, 6, 3)
    net = Net(lambda m, x: m["b"](torch.sigmoid(m["a"](x))), a=conv, b=nn.Conv2d(6, 4, 3, padding=1))
    program = cut(net, IMAGE, a=[0, 2, 5])
    assert shapes(program, "conv2d") == [(4, 3, 3, 3), (4, 4, 3, 3)]
    assert entry(program, "b").folded == {"carrier": 2}
    assert sum(entry(program, "a").kept.values()) == 1


@pytest.mark.parametrize("padding", [0, (0, 0), "valid"])
def test_without_padding_the_bias_takes_all(padding: Any) -> None:
    net = Net(
        lambda m, x: m["b"](torch.sigmoid(m["a"](x))),
        a=nn.Conv2d(3, 6, 3),
        b=nn.Conv2d(6, 4, 3, padding=padding, dilation=1, bias=False),
    )
    program = cut(net, IMAGE, a=[0, 2, 5])
    assert shapes(program, "conv2d") == [(3, 3, 3, 3), (4, 3, 3, 3)]
    assert entry(program, "b").folded == {"bias": 3}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_with_the_data_itself_keeps_a_constant_uniform(
    mode: Literal["reflect", "replicate", "circular"],
) -> None:
    net = Net(
        lambda m, x: m["b"](torch.sigmoid(m["a"](x))),
        a=nn.Conv2d(3, 6, 3),
        b=nn.Conv2d(6, 4, 3, padding=1, padding_mode=mode),
    )
    assert entry(cut(net, IMAGE, a=[0, 2]), "b").folded == {"bias": 2}


@pytest.mark.slow
def test_a_constant_that_is_not_uniform_becomes_a_small_map() -> None:
    net = Net(
        lambda m, x: m["c"](m["b"](torch.sigmoid(m["a"](x)))),
        a=nn.Conv2d(3, 8, 1),
        b=nn.Conv2d(8, 8, 3, padding=1, groups=8),
        c=nn.Conv2d(8, 40, 3, padding=2),
    )
    program = cut(net, torch.randn(2, 3, 3, 3), a=[0, 2, 5])
    assert shapes(program, "conv2d") == [(5, 3, 1, 1), (5, 1, 3, 3), (40, 5, 3, 3)]
    assert entry(program, "c").folded == {"map": 3}


def test_a_map_larger_than_what_it_saves_is_not_made() -> None:
    net = Net(
        lambda m, x: m["c"](m["b"](torch.sigmoid(m["a"](x)))),
        a=nn.Conv2d(3, 8, 1),
        b=nn.Conv2d(8, 8, 3, padding=1, groups=8),
        c=nn.Conv2d(8, 4, 1),
    )
    program = cut(net, torch.randn(2, 3, 19, 19), a=[0, 2])
    assert shapes(program, "conv2d")[0] == (8, 3, 1, 1)
    assert "larger than what it saves" in next(iter(entry(program, "a").kept))


@pytest.mark.slow
def test_a_constant_with_a_position_is_folded_along_it() -> None:
    position = nn.Embedding(4, 6)
    net = Net(
        lambda m, x: m["b"](m["a"](x) + m["position"](torch.arange(4))),
        a=nn.Linear(5, 6),
        b=nn.Linear(6, 30),
        position=position,
    )
    program = cut(net, torch.randn(2, 4, 5), a=[0, 1, 3, 5])
    assert shapes(program, "linear") == [(2, 5), (30, 2)]
    assert entry(program, "b").folded == {"map": 4}


@pytest.mark.slow
def test_batch_norm_between_is_part_of_the_constant() -> None:
    norm = nn.BatchNorm2d(6)
    net = Net(
        lambda m, x: m["b"](torch.tanh(m["n"](F.relu(m["a"](x))))), a=nn.Conv2d(3, 6, 3), n=norm, b=nn.Conv2d(6, 4, 1)
    )
    program = cut(net, IMAGE, a=[1, 2])
    assert shapes(program, "conv2d") == [(4, 3, 3, 3), (4, 4, 1, 1)]


# -- what goes together -----------------------------------------------------------------------------------------------


def residual(m: nn.ModuleDict, x: Tensor) -> Tensor:
    return m["c"](F.relu(m["a"](x) + m["b"](x)))  # type: ignore[no-any-return]


@pytest.mark.slow
def test_a_residual_channel_goes_if_all_its_writers_are_dead() -> None:
    net = Net(residual, a=nn.Linear(5, 6), b=nn.Linear(5, 6), c=nn.Linear(6, 4))
    program = cut(net, VECTOR, a=[1, 2, 3], b=[2, 3, 4])
    assert shapes(program, "linear") == [(4, 5), (4, 5), (4, 4)]


@pytest.mark.slow
def test_a_residual_channel_with_a_live_writer_stays_with_the_reason() -> None:
    net = Net(residual, a=nn.Linear(5, 6), b=nn.Linear(5, 6), c=nn.Linear(6, 4))
    model = masked(net, {"layers.a.weight": [1]})
    result = removed(model, (VECTOR,))
    assert shapes(result.subject, "linear")[0] == (6, 5)
    (note,) = [note for note in result.notes if note.by == "RemoveDead"]
    assert note.where == "layers.a.weight"
    assert "added to, or multiplied with, channels that are live" in note.reason


def test_the_stem_of_a_residual_pins_it() -> None:
    net = Net(lambda m, x: m["b"](x + m["a"](x)), a=nn.Linear(5, 5), b=nn.Linear(5, 4))
    assert entry(cut(net, VECTOR, a=[1]), "a").rows_removed == 0


@pytest.mark.parametrize("gate", [torch.sigmoid, F.silu])
def test_gate_and_up(gate: Callable[[Tensor], Tensor]) -> None:
    net = Net(
        lambda m, x: m["d"](gate(m["g"](x)) * m["u"](x)),
        g=nn.Linear(5, 6),
        u=nn.Linear(5, 6, bias=False),
        d=nn.Linear(6, 4),
    )
    program = cut(net, VECTOR, g=[0], u=[1, 2])
    assert shapes(program, "linear") == [(4, 5), (4, 5), (4, 4)], "a dead gate only scales; a zero goes"


@pytest.mark.slow
def test_packed_gate_and_up() -> None:
    net = Net(lambda m, x: m["d"](F.glu(m["u"](x))), u=nn.Linear(5, 12), d=nn.Linear(6, 4))
    assert shapes(cut(net, VECTOR, u=[1, 7, 2]), "linear") == [(10, 5), (4, 5)]

    def chunked(m: nn.ModuleDict, x: Tensor) -> Tensor:
        gate, up = m["u"](x).chunk(2, -1)
        return m["d"](F.gelu(gate) * up)  # type: ignore[no-any-return]

    net = Net(chunked, u=nn.Linear(5, 12), d=nn.Linear(6, 4))
    assert shapes(cut(net, VECTOR, u=[1, 7, 2]), "linear") == [(10, 5), (4, 5)]


@pytest.mark.slow
def test_concatenation() -> None:
    net = Net(
        lambda m, x: m["c"](torch.cat([m["a"](x), x, torch.sigmoid(m["b"](x))], 1)),
        a=nn.Conv2d(3, 6, 1),
        b=nn.Conv2d(3, 5, 1),
        c=nn.Conv2d(14, 4, 3),
    )
    assert shapes(cut(net, IMAGE, a=[0, 5], b=[1]), "conv2d") == [(4, 3, 1, 1), (4, 3, 1, 1), (4, 11, 3, 3)]


@pytest.mark.slow
def test_split_and_slices() -> None:
    def forward(m: nn.ModuleDict, x: Tensor) -> tuple[Tensor, Tensor]:
        one, two, three = m["a"](x).split([2, 6, 3], 1)
        return m["b"](two[:, 1:5]), m["c"](torch.cat([three.roll(1, 1), one], 1))

    net = Net(forward, a=nn.Linear(5, 11), b=nn.Linear(4, 4), c=nn.Linear(5, 3))
    program = cut(net, VECTOR, a=[0, 4, 5])
    assert shapes(program, "linear")[0] == (6, 5), "three are dead, and two more are not in the slice"
    assert shapes(program, "linear")[1:] == [(4, 2), (3, 4)]


@pytest.mark.slow
def test_select_stack_unbind_and_index() -> None:
    def forward(m: nn.ModuleDict, x: Tensor) -> Tensor:
        h = torch.stack([m["a"](x), m["b"](x)], 1).unsqueeze(0).squeeze(0)
        first, second = h.unbind(1)
        return m["c"](first + second.flip(1)[:, [5, 4, 3, 2, 1, 0]] * h[:, 0])  # type: ignore[no-any-return]

    net = Net(forward, a=nn.Linear(5, 6), b=nn.Linear(5, 6), c=nn.Linear(6, 4))
    program = cut(net, VECTOR, a=[1, 3], b=[1, 3])
    assert entry(program, "c").columns_removed in (0, 2)


@pytest.mark.slow
def test_flatten_to_linear() -> None:
    net = Net(
        lambda m, x: m["b"](F.max_pool2d(F.gelu(m["a"](x)), 2).flatten(1)), a=nn.Conv2d(3, 6, 3), b=nn.Linear(24, 4)
    )
    program = cut(net, IMAGE, a=[0, 3])
    assert shapes(program, "linear") == [(4, 16)]
    assert entry(program, "b").columns_removed == 8


def test_from_linear_to_an_image() -> None:
    net = Net(
        lambda m, x: m["b"](m["a"](x).reshape(-1, 6, 2, 2).permute(0, 2, 3, 1).permute(0, 3, 1, 2)),
        a=nn.Linear(5, 24, bias=False),
        b=nn.Conv2d(6, 4, 1),
    )
    program = cut(net, VECTOR, a=[0, 1, 2, 3, 8, 9, 10])
    assert shapes(program, "linear") == [(20, 5)], "a channel goes if all its pixels are dead"


POOLS: list[Callable[[Tensor], Tensor]] = [
    lambda x: F.max_pool2d(x, 3, 2, 1),
    lambda x: F.avg_pool2d(x, 2),
    lambda x: F.adaptive_avg_pool2d(x, 2),
    lambda x: F.interpolate(x, scale_factor=2.0),
    lambda x: F.interpolate(x, size=(5, 5), mode="bilinear"),
    lambda x: x.mean((2, 3), keepdim=True),
    lambda x: x.amax(3, keepdim=True) + x.sum(2, keepdim=True),
    lambda x: F.softmax(x.flatten(2), -1).reshape(x.shape),
    lambda x: F.pad(x, (1, 0, 1, 0), mode="reflect"),
    lambda x: F.instance_norm(x),
]


@pytest.mark.slow
@pytest.mark.parametrize("pool", POOLS)
def test_pools_norms_and_resizes_over_space_pass_channels_on(pool: Callable[[Tensor], Tensor]) -> None:
    net = Net(lambda m, x: m["b"](pool(torch.sigmoid(m["a"](x)))), a=nn.Conv2d(3, 6, 3), b=nn.Conv2d(6, 4, 1))
    assert shapes(cut(net, IMAGE, a=[0, 3]), "conv2d") == [(4, 3, 3, 3), (4, 4, 1, 1)]


def test_zero_padding_leaves_a_constant_that_is_not_uniform() -> None:
    net = Net(lambda m, x: m["b"](F.pad(m["a"](x), (1, 1, 1, 1))), a=nn.Conv2d(3, 6, 3), b=nn.Conv2d(6, 40, 3))
    assert entry(cut(net, torch.randn(2, 3, 4, 4), a=[0, 3]), "b").folded == {"map": 2}


@pytest.mark.slow
def test_padding_of_channels() -> None:
    net = Net(
        lambda m, x: m["c"](F.pad(m["a"](x), (0, 0, 0, 0, 1, 1)) + m["b"](x)),
        a=nn.Conv2d(3, 4, 1),
        b=nn.Conv2d(3, 6, 1),
        c=nn.Conv2d(6, 2, 1),
    )
    assert shapes(cut(net, IMAGE, a=[1, 2], b=[0, 2, 3]), "conv2d") == [(2, 3, 1, 1), (4, 3, 1, 1), (2, 4, 1, 1)]


@pytest.mark.slow
def test_depthwise_passes_channels_on_and_loses_its_own_dead_rows() -> None:
    net = Net(
        lambda m, x: m["c"](m["b"](F.relu(m["a"](x)))),
        a=nn.Conv2d(3, 6, 1),
        b=nn.Conv2d(6, 6, 3, groups=6),
        c=nn.Conv2d(6, 4, 1),
    )
    program = cut(net, IMAGE, a=[0], b=[3])
    assert shapes(program, "conv2d") == [(4, 3, 1, 1), (4, 1, 3, 3), (4, 4, 1, 1)]


def test_depthwise_with_a_multiplier() -> None:
    net = Net(
        lambda m, x: m["c"](m["b"](m["a"](x))),
        a=nn.Conv2d(3, 4, 1),
        b=nn.Conv2d(4, 8, 3, groups=4),
        c=nn.Conv2d(8, 4, 1),
    )
    program = cut(net, IMAGE, b=[2, 3])
    assert shapes(program, "conv2d") == [(3, 3, 1, 1), (6, 1, 3, 3), (4, 6, 1, 1)]


@pytest.mark.long
def test_grouped_convolutions_lose_whole_groups_or_equally_many_of_each() -> None:
    def build() -> Net:
        return Net(
            lambda m, x: m["c"](m["b"](m["a"](x))),
            a=nn.Conv2d(3, 6, 1),
            b=nn.Conv2d(6, 9, 3, groups=3),
            c=nn.Conv2d(9, 4, 1),
        )

    whole = cut(build(), IMAGE, b=[3, 4, 5])
    assert shapes(whole, "conv2d") == [(4, 3, 1, 1), (6, 2, 3, 3), (4, 6, 1, 1)]
    equal = cut(build(), IMAGE, a=[0, 2, 5], b=[1, 3, 4, 7])
    assert shapes(equal, "conv2d") == [(3, 3, 1, 1), (6, 1, 3, 3), (4, 6, 1, 1)]
    unequal = cut(build(), IMAGE, a=[0, 2], b=[1])
    assert shapes(unequal, "conv2d") == [(6, 3, 1, 1), (9, 2, 3, 3), (4, 9, 1, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolution(groups: int) -> None:
    net = Net(
        lambda m, x: m["c"](m["b"](torch.sigmoid(m["a"](x)))),
        a=nn.Conv2d(3, 6, 1),
        b=nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1, groups=groups),
        c=nn.Conv2d(4, 2, 1),
    )
    program = cut(net, IMAGE, a=[0, 1, 3, 4], b=[0, 2])
    left = (6 - 4 + groups) // groups, 2 // groups
    assert shapes(program, "conv_transpose2d") == [(left[0] * groups, left[1], 3, 3)]
    assert shapes(program, "conv2d")[1] == (2, 2, 1, 1)


@pytest.mark.slow
def test_pixel_and_channel_shuffles() -> None:
    net = Net(
        lambda m, x: m["b"](F.pixel_unshuffle(F.channel_shuffle(F.pixel_shuffle(m["a"](x), 2), 2), 2)),
        a=nn.Conv2d(3, 16, 1),
        b=nn.Conv2d(16, 4, 1),
    )
    program = cut(net, IMAGE, a=[0, 1, 2, 3, 8, 9, 10, 11])
    assert shapes(program, "conv2d") == [(8, 3, 1, 1), (4, 8, 1, 1)]


@pytest.mark.slow
def test_unfolding_repeats_a_channel_over_its_window() -> None:
    net = Net(lambda m, x: m["b"](F.unfold(m["a"](x), 2).transpose(1, 2)), a=nn.Conv2d(3, 6, 1), b=nn.Linear(24, 4))
    assert shapes(cut(net, IMAGE, a=[2]), "linear") == [(4, 20)]


# -- unused channels --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_channel_that_nothing_reads_goes_whatever_it_is() -> None:
    net = Net(
        lambda m, x: m["c"](F.relu(m["b"](F.gelu(m["a"](x))))), a=nn.Linear(5, 6), b=nn.Linear(6, 7), c=nn.Linear(7, 4)
    )
    program = cut(net, VECTOR, columns={"b": [2]})
    assert shapes(program, "linear") == [(5, 5), (7, 5), (4, 7)]


def test_unused_travels_backwards_through_rows_that_go() -> None:
    net = Net(
        lambda m, x: m["c"](m["b"](m["a"](x))), a=nn.Linear(5, 6), b=nn.Linear(6, 7, bias=False), c=nn.Linear(7, 4)
    )
    model = masked(net, {"layers.b.weight": [0, 1]})
    layer = model.get_submodule("layers.b")
    with torch.no_grad():  # channel 3 of a is read by rows 0 and 1 of b only, and those go
        mask = layer.get_buffer("weight" + MASK_SUFFIX)
        mask[2:, 3] = False
        layer.get_parameter("weight").mul_(mask)
    program = removed(model, (VECTOR,)).subject
    assert shapes(program, "linear") == [(5, 5), (5, 5), (4, 5)]
    assert relative_error(model, program, 3) < 1e-6


def test_constants_travel_forwards_through_rows_without_live_inputs() -> None:
    net = Net(
        lambda m, x: m["c"](torch.tanh(m["b"](m["a"](x)))), a=nn.Linear(5, 4), b=nn.Linear(4, 6), c=nn.Linear(6, 3)
    )
    model = masked(net, {"layers.a.weight": [0, 1]})
    layer = model.get_submodule("layers.b")
    with torch.no_grad():  # rows 4 and 5 of b read dead channels only
        mask = layer.get_buffer("weight" + MASK_SUFFIX)
        mask[4:, 2:] = False
        layer.get_parameter("weight").mul_(mask)
    program = removed(model, (VECTOR,)).subject
    assert shapes(program, "linear") == [(2, 5), (4, 2), (3, 4)]
    assert relative_error(model, program, 3) < 1e-6


def test_masks_follow_their_weights() -> None:
    net = Net(lambda m, x: m["b"](torch.sigmoid(m["a"](x))), a=nn.Conv2d(3, 6, 3), b=nn.Conv2d(6, 4, 3, padding=1))
    program = cut(net, IMAGE, a=[0, 2, 5], columns={"b": [1]})
    read = {str(node.target) for node in program.module.graph.nodes if node.op == "get_attr"}
    found = {target: entry for target, entry in program.masked.items() if target in read}
    assert sorted(entry.fqn for entry in found.values()) == ["layers.a.weight", "layers.b.weight"]
    for target, tensor in found.items():
        weight = tensor_at(program.module, target)
        assert weight.shape == tensor.mask.shape
        assert not bool(weight[~tensor.mask].any())


# -- what stays -------------------------------------------------------------------------------------------------------

PINS: dict[str, Callable[[Tensor], Any]] = {
    "layer norm": lambda h: F.layer_norm(h, (6,)),
    "softmax": lambda h: h.softmax(-1),
    "log softmax": lambda h: h.log_softmax(1),
    "cumulative sum": lambda h: h.cumsum(-1),
    "sort": lambda h: h.sort(-1).values,
    "top k": lambda h: F.pad(h.topk(4, -1).values, (1, 1)),
    "variance": lambda h: h - h.var(-1, keepdim=True),
    "outer product": lambda h: (h[:, :, None] * h[:, None, :]).sum(2),
    "norm": lambda h: h / h.norm(dim=-1, keepdim=True),
    "gather": lambda h: h.gather(1, h.argsort(1)),
    "unknown": lambda h: torch.linalg.matrix_exp(h[:, :, None] @ h[:, None, :] / 9)[:, 0],
}


@pytest.mark.parametrize("name", PINS)
def test_what_mixes_channels_keeps_them(name: str) -> None:
    net = Net(lambda m, x: m["b"](PINS[name](m["a"](x))), a=nn.Linear(5, 6, bias=name != "norm"), b=nn.Linear(6, 4))
    program = cut(net, VECTOR, a=[1, 2])
    assert shapes(program, "linear") == [(6, 5), (4, 6)]
    assert sum(entry(program, "a").kept.values()) == 2


@pytest.mark.long
def test_outputs_keep_their_channels() -> None:
    net = Net(lambda m, x: (m["b"](F.relu(m["a"](x))), {"h": m["a"](x)}), a=nn.Linear(5, 6), b=nn.Linear(6, 4))
    program = cut(net, VECTOR, a=[1], b=[0])
    assert shapes(program, "linear")[0] == (6, 5)
    assert entry(program, "b").kept == {"it is an output of the model": 1}


@pytest.mark.slow
def test_group_norm_loses_whole_groups() -> None:
    net = Net(
        lambda m, x: m["b"](F.relu(m["n"](m["a"](x)))), a=nn.Conv2d(3, 6, 1), n=nn.GroupNorm(3, 6), b=nn.Conv2d(6, 4, 1)
    )
    program = cut(net, IMAGE, a=[0, 2, 3])
    assert shapes(program, "conv2d") == [(4, 3, 1, 1), (4, 4, 1, 1)]


def rms_norm(x: Tensor, gain: Tensor) -> Tensor:
    return gain * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3)


@pytest.mark.long
@pytest.mark.parametrize("fused", [True, False])
def test_rms_norm_keeps_its_length_where_zeros_go(fused: bool) -> None:
    gain = nn.RMSNorm(6, eps=1e-3)

    def forward(m: nn.ModuleDict, x: Tensor) -> Tensor:
        h = F.relu(m["a"](x))
        weight = m["n"].weight
        assert isinstance(weight, Tensor)
        return m["b"](m["n"](h) if fused else rms_norm(h, weight))  # type: ignore[no-any-return]

    net = Net(forward, a=nn.Linear(5, 6, bias=False), n=gain, b=nn.Linear(6, 4))
    assert shapes(cut(net, torch.randn(2, 3, 5), a=[0, 4]), "linear") == [(4, 5), (4, 4)]
    net = Net(forward, a=nn.Linear(5, 6), n=gain, b=nn.Linear(6, 4))
    with torch.no_grad():
        live = cut(net, torch.randn(2, 3, 5), a=[0, 4])
    assert shapes(live, "linear")[0][0] in (4, 5, 6)  # relu may have made the constants zero


def test_no_axis_becomes_empty() -> None:
    net = Net(lambda m, x: m["b"](F.relu(m["a"](x))), a=nn.Linear(5, 3), b=nn.Linear(3, 4))
    program = cut(net, VECTOR, a=[0, 1, 2])
    assert shapes(program, "linear") == [(1, 5), (4, 1)]


def test_nothing_dead_changes_nothing() -> None:
    model = masked(nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4)), {})
    result = removed(model, (VECTOR,))
    names = {str(node.target) for node in result.subject.module.graph.nodes if node.op == "get_attr"}
    assert names == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert result.subject.removals is not None
    assert result.subject.removals.channels == (10, 10)


# -- shared, tied, looked up ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_shared_layer_stays_one() -> None:
    def forward(m: nn.ModuleDict, x: Tensor) -> Tensor:
        return m["c"](m["b"](F.relu(m["a"](x)))) + m["c"](m["b"](torch.tanh(m["a"](2 * x))))  # type: ignore[no-any-return]

    net = Net(forward, a=nn.Linear(5, 6), b=nn.Linear(6, 7), c=nn.Linear(7, 4))
    program = cut(net, VECTOR, a=[1, 5], b=[0])
    assert set(shapes(program, "linear")) == {(4, 5), (6, 4), (4, 6)}
    weights = {str(n.args[1]) for n in program.module.graph.nodes if n.target is torch.ops.aten.linear.default}
    assert len(weights) == 3


@pytest.mark.slow
def test_a_layer_applied_to_its_own_output_keeps_what_is_live() -> None:
    net = Net(lambda m, x: m["b"](m["a"](F.relu(m["a"](x)))), a=nn.Linear(5, 5), b=nn.Linear(5, 4))
    assert entry(cut(net, VECTOR, a=[1]), "a").rows_removed == 0


@pytest.mark.slow
def test_columns_of_an_embedding() -> None:
    net = Net(
        lambda m, x: m["b"](m["e"](x) + m["a"](m["e"](x))), e=nn.Embedding(9, 6), a=nn.Linear(6, 6), b=nn.Linear(6, 4)
    )
    program = cut(net, torch.randint(0, 9, (2, 3)), columns={"a": [2], "b": [2]})
    embedding = next(n for n in program.module.graph.nodes if n.target is torch.ops.aten.embedding.default)
    assert tuple(embedding.args[0].meta["val"].shape) == (9, 5)


def test_a_tied_embedding_keeps_one_set_of_columns() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(9, 6)
            self.a = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(torch.sigmoid(self.a(self.table(x))), self.table.weight)

    model = masked(Tied(), {"a.weight": [2]})
    program = removed(model, (torch.randint(0, 9, (2, 3)),)).subject
    assert relative_error(model, program, 3) < 1e-6
    assert shapes(program, "linear")[-1] == (9, 6), "the embedding's column 2 is live"


def test_transposed_linear_layers() -> None:
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.empty(5, 6)), nn.Parameter(torch.empty(6, 4))
            self.bias = nn.Parameter(torch.ones(4))
            self.c = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.addmm(self.bias, torch.tanh(x @ self.a + 0.5), self.b))  # type: ignore[no-any-return]

    model = masked(Transposed(), {"c.weight": []})
    with torch.no_grad():
        model.get_parameter("a")[:, [1, 3]] = 0
        model.get_parameter("b")[:, 0] = 0
    program = removed(model, (VECTOR,)).subject
    assert shapes(program, "matmul") == [(5, 4)]
    assert shapes(program, "addmm") == [(4, 3)]
    assert shapes(program, "linear") == [(3, 3)]
    assert relative_error(model, program, 3) < 1e-6


def test_a_buffer_that_is_written_is_left_alone() -> None:
    class Counting(nn.Module):
        seen: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 4)
            self.register_buffer("seen", torch.zeros(6))

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.a(x))
            self.seen.add_(1.0)
            return self.b(h * self.seen)  # type: ignore[no-any-return]

    model = masked(Counting(), {"a.weight": [1]})
    program = removed(model, (VECTOR,)).subject
    assert shapes(program, "linear") == [(6, 5), (4, 6)]


def test_the_account_adds_up() -> None:
    net = Net(lambda m, x: m["b"](torch.sigmoid(m["a"](x))), a=nn.Linear(5, 6), b=nn.Linear(6, 4))
    program = cut(net, VECTOR, a=[0, 4])
    removals = program.removals
    assert removals is not None
    assert removals.channels == (10, 8)
    assert removals.parameters == (5 * 6 + 6 + 6 * 4 + 4, 5 * 4 + 4 + 4 * 4 + 4)
    assert removals.flops == (2 * (30 + 24), 2 * (20 + 16))
    assert entry(program, "a") == Removal(
        fqn="layers.a.weight", rows=6, ablated=2, rows_removed=2, columns=5, columns_removed=0
    )


def test_the_model_keeps_its_parameters() -> None:
    net = Net(lambda m, x: m["b"](torch.sigmoid(m["a"](x))), a=nn.Linear(5, 6), b=nn.Linear(6, 4))
    model = masked(net, {"layers.a.weight": [1]})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    removed(model, (VECTOR,))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.get_parameter("layers.a.weight").shape == (6, 5)


# -- operators with rules of their own ---------------------------------------------------------------------------------

TOKENS = torch.randn(2, 5, 12)


def outputs_of(function: Callable[..., Any], x: Tensor = TOKENS, reads: int = 16) -> Program:
    """The program of a function of two layers with the same dead rows, and of one that may read them."""
    layers = {"a": nn.Linear(12, 16), "d": nn.Linear(12, 16), "c": nn.Linear(reads, 4)}
    return cut(Net(lambda m, x: function(m["a"](x), m["d"](x), m["c"]), **layers), x, a=[0, 1, 5], d=[0, 1, 5])


@pytest.mark.slow
@pytest.mark.parametrize(
    "function",
    [
        lambda h, g, c: torch.einsum("bsc,btc->bst", h, g),
        lambda h, g, c: torch.einsum("bsc,btc,btc->bsc", h, g, g),
        lambda h, g, c: torch.einsum("bss->bs", h[..., :5]),
        lambda h, g, c: torch.einsum(
            "bhst,bthd->bshd",
            torch.einsum("bshd,bthd->bhst", h.unflatten(-1, (4, 4)), g.unflatten(-1, (4, 4))).softmax(-1),
            g.unflatten(-1, (4, 4)),
        ),
        lambda h, g, c: c(torch.hstack([h, g])),
        lambda h, g, c: c(torch.dstack([h.flatten(0, 1), g.flatten(0, 1)])[..., 0]),
        lambda h, g, c: c(torch.block_diag(h[0], g[0])[:, :16]),  # type: ignore[no-untyped-call]
        lambda h, g, c: c(torch.column_stack([h[:, 0], g[:, 0]])[:, :16]),
        lambda h, g, c: torch.linalg.multi_dot([h[0], c.weight.t(), c.weight]),
        lambda h, g, c: c(torch.broadcast_tensors(h, g[:, :1])[1]),  # type: ignore[no-untyped-call]
        lambda h, g, c: F.mse_loss(h, g, reduction="none"),
    ],
)
def test_operators_that_take_tensors_in_a_list(function: Callable[..., Any]) -> None:
    outputs_of(function)


@pytest.mark.slow
@pytest.mark.parametrize("equation", ["bsc,oc->bso", "...c,oc->...o"])
def test_an_einsum_that_is_a_linear_layer_loses_what_it_would(equation: str) -> None:
    program = outputs_of(lambda h, g, c: torch.einsum(equation, torch.sigmoid(h), c.weight))
    assert entry(program, "c").folded == {"bias": 3}
    assert entry(program, "a").rows_removed == 3


@pytest.mark.slow
def test_a_batch_norm_without_running_statistics() -> None:
    norm = nn.BatchNorm1d(16, track_running_stats=False)
    layers = {"a": nn.Linear(12, 16), "n": norm, "c": nn.Linear(16, 4)}
    net = Net(lambda m, x: m["c"](m["n"](m["a"](x).transpose(1, 2)).transpose(1, 2)), **layers)
    cut(net, TOKENS, a=[0, 1, 5])


@pytest.mark.slow
@pytest.mark.parametrize("reader_too", [True, False])
def test_half_precision_inside_the_model(reader_too: bool) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = torch.sigmoid(m["a"](x))
            h = m["c"](h) if reader_too else h
        out: Tensor = h.float() if reader_too else m["c"](h.float())
        return out

    program = cut(Net(forward, a=nn.Linear(12, 16), c=nn.Linear(16, 4)), TOKENS, a=[0, 1, 5])
    assert program.removals is not None
    lost = sum(weight.rows_removed for weight in program.removals.weights)
    assert lost == (0 if reader_too else 3), "a product in half precision keeps its order of sums"


@pytest.mark.slow
@pytest.mark.parametrize("amounts", [(-1, 1), (0, 0, -1, 1), (-2, 0)])
def test_negative_padding(amounts: tuple[int, ...], capfd: pytest.CaptureFixture[str]) -> None:
    outputs_of(lambda h, g, c: c(F.pad(h, amounts)), reads=14 if amounts == (-2, 0) else 16)
    assert "fake_tensor" not in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_with_channels_themselves_keeps_them(mode: str) -> None:
    program = outputs_of(lambda h, g, c: c(F.pad(h, (2, 1), mode=mode)), reads=19)
    assert entry(program, "a").rows_removed == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "reads"),
    [
        (lambda h, g, c: c(h.chunk(4, -1)[0].split([0, 4], -1)[1]), 4),
        (lambda h, g, c: c(h) + h[..., :0].sum(), 16),
        (lambda h, g, c: c(torch.cat([h, g[..., :0]], -1)), 16),
    ],
)
def test_parts_without_channels(function: Callable[..., Any], reads: int) -> None:
    outputs_of(function, reads=reads)


@pytest.mark.slow
@pytest.mark.parametrize(
    "function",
    [
        lambda h, g, c: c(F.relu(h.sum(0, keepdim=True) - 1) + h),
        lambda h, g, c: c(F.relu(h.flatten().sum() - 1) + h),
        lambda h, g, c: c(h.softmax(0)) + c(h.cumsum(0)),
        lambda h, g, c: c(h * (3.0 / h.shape[0])),
        lambda h, g, c: c(h + torch.ones(h.shape[0]).sum().clamp(max=3)),
        lambda h, g, c: c(h + torch.arange(h.shape[0])[-1]),
        lambda h, g, c: c(h + torch.einsum("bsi,bsi->i", g, h).clamp(max=1)),
        lambda h, g, c: c(h + 0.1 * (h[:, 0].t() @ g[:, 0]).sum(0)),
    ],
)
def test_what_depends_on_the_batch_size_is_not_constant(function: Callable[..., Any]) -> None:
    outputs_of(function)


def test_a_removal_that_fails_is_undone_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Cut, site: Any) -> Any:
        self.program.module.graph.erase_node(next(iter(self.program.module.graph.nodes)))

    monkeypatch.setattr(Cut, "_site", fail)
    net = Net(lambda m, x: m["b"](F.relu(m["a"](x))), a=nn.Linear(5, 6), b=nn.Linear(6, 4))
    model = masked(net, {"layers.a.weight": [1, 2]})
    result = removed(model, (VECTOR,))
    (note,) = result.notes
    assert note.undone
    assert note.by == "RemoveDead"
    assert "RuntimeError: Tried to erase Node" in note.reason
    assert shapes(result.subject, "linear") == [(6, 5), (4, 6)]
    assert relative_error(model, result.subject, 3) == 0
    assert result.subject.removals is None


BORDERS: dict[str, Callable[[int], tuple[nn.Module, Callable[[Tensor], Tensor]]]] = {
    "uneven": lambda c: (nn.Conv2d(c, c, 3), lambda x: F.pad(x, (0, 1, 0, 1))),
    "even": lambda c: (nn.Conv2d(c, c, 3), lambda x: F.pad(x, (1, 1, 1, 1))),
    "causal": lambda c: (nn.Conv2d(c, c, (1, 2), dilation=2), lambda x: F.pad(x, (2, 0))),
    "own": lambda c: (nn.Conv2d(c, c, 3, padding=1), lambda x: x),
    "same": lambda c: (nn.Conv2d(c, c, 3, padding="same"), lambda x: x),
    "transposed": lambda c: (nn.ConvTranspose2d(c, c, 3, padding=1), lambda x: x),
}
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "groups of four": lambda c: nn.GroupNorm(4, c),
    "one group": lambda c: nn.GroupNorm(1, c),
    "instance norm": lambda c: nn.InstanceNorm2d(c, affine=True),
    "batch norm": nn.BatchNorm2d,
    "none": lambda c: nn.Identity(),
}


@pytest.mark.long
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("border", BORDERS.values(), ids=BORDERS)
def test_constant_channels_at_borders_in_front_of_a_norm(
    border: Callable[[int], tuple[nn.Module, Callable[[Tensor], Tensor]]], norm: Callable[[int], nn.Module]
) -> None:
    conv, pad = border(16)
    model = masked(
        Net(
            lambda m, x: m["out"](F.relu(m["norm"](m["conv"](pad(F.relu(m["first"](x))))))),
            first=nn.Conv2d(3, 16, 1),
            conv=conv,
            norm=norm(16),
            out=nn.Conv2d(16, 2, 1),
        ),
        {"layers.first.weight": [3, 4, 5, 6]},
    )
    result = removed(model, (torch.randn(2, 3, 7, 6),))
    assert not any(note.undone for note in result.notes)
    for batch in (None, 1, 3):
        assert relative_error(model, result.subject, batch) < 1e-5
    assert shapes(result.subject, "conv")[0][0] <= 13  # at most one stays, to carry the others


@pytest.mark.slow
def test_a_constant_map_in_front_of_another_convolution() -> None:
    """The second convolution reads the sum that the first one's map made: nothing lies in between."""
    model = masked(
        Net(
            lambda m, x: m["third"](F.pad(m["second"](F.pad(F.relu(m["first"](x)), (0, 1, 0, 1))), (1, 0, 1, 0))),
            first=nn.Conv2d(3, 16, 1),
            second=nn.Conv2d(16, 16, 2),
            third=nn.Conv2d(16, 4, 2),
        ),
        {"layers.first.weight": [3, 4, 5], "layers.second.weight": [0, 1, 2, 3, 4, 5, 6]},
    )
    result = removed(model, (torch.randn(2, 3, 2, 2),))
    assert not any(note.undone for note in result.notes)
    assert relative_error(model, result.subject, 3) < 1e-5
    assert [shape[:2] for shape in shapes(result.subject, "conv")] == [(13, 3), (9, 13), (4, 9)]
