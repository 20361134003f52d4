"""The table of operators against torch itself, and models that use what only some of the old lists knew."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from passes_support import masked, relative_error, removed
from torch import Tensor, nn

import srigl_fx as sx
from srigl_fx.masks.records import sparse_weights
from srigl_fx.passes.capture import capture
from srigl_fx.passes.operators import ALIASES, OPERATORS, SPELLINGS, first_named, operator_named, operator_of

aten = torch.ops.aten

X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
V = torch.arange(144.0).reshape(1, 4, 6, 6) + 1
PICKED = torch.tensor([3, 0])


def test_every_operator_is_one_of_torch() -> None:
    assert [name for name in OPERATORS if not hasattr(aten, name)] == []


def test_every_other_spelling_is_no_operator_and_stands_for_one() -> None:
    assert [name for name in SPELLINGS if name in OPERATORS] == []
    assert [name for name in SPELLINGS if operator_named(name).does == "unknown"] == []


SECOND: dict[str, tuple[Any, ...]] = {  # what is given besides, to other overloads than those of two tensors
    **{"clip": (-0.5, 0.5), "swapaxes": (1, 3), "swapdims": (0, 2), "moveaxis": (1, 3), "native_channel_shuffle": (2,)},
    **{"special_logsumexp": ([1, 2],), "special_softmax": (1,)},
}
TWO = {"subtract", "multiply", "divide", "true_divide", "arctan2", "special_xlogy", "not_equal", "less", "less_equal",
       "greater", "greater_equal", "linalg_matmul"}  # fmt: skip


@pytest.mark.parametrize("name", ALIASES)
def test_a_second_name_is_of_the_same_operator(name: str) -> None:
    data = (torch.rand(2, 4, 6, 6, generator=torch.Generator().manual_seed(1)) * 2 - 1).clamp(-0.9, 0.9)
    data = data + 2 if name == "arccosh" else data.abs() + 0.05 if name in {"special_logit", "special_xlogy"} else data
    given: tuple[Any, ...] = (data, *SECOND.get(name, (data.flip(0),) if name in TWO else ()))
    if name in {"concat", "concatenate", "row_stack"}:
        given = ([data, -data],)
    if name == "ger":
        given = (data[0, 0, 0], data[0, 0, 1])
    called = getattr(aten, name)
    assert torch.equal(called(*given), getattr(aten, ALIASES[name])(*given))
    functional = [each for each in called.overloads() if "out" not in each and each not in {"names", "dimname"}]
    for overload in functional:
        first = first_named(getattr(called, overload))
        assert first is not getattr(called, overload), f"{name}.{overload} has no counterpart"
        assert first_named(first) is first
    if name in OPERATORS and OPERATORS[name].family != "alias":
        first_row = operator_of(first_named(getattr(called, functional[0])))
        assert (first_row.does, first_row.axes) == (OPERATORS[name].does, OPERATORS[name].axes)


# What an operator of a row needs besides its first operand, by family; others are called with that alone.
MOVES: dict[str, tuple[Any, ...]] = {
    **{"view": ([4, 36],), "reshape": ([4, 36],), "_unsafe_view": ([4, 36],), "view_as": (V,), "reshape_as": (V,)},
    **{"flatten": (1,), "unflatten": (1, [2, 2]), "unsqueeze": (1,), "permute": ([0, 2, 3, 1],)},
    **{"transpose": (1, 2), "movedim": (1, 3), "moveaxis": (1, 3), "swapaxes": (1, 2), "swapdims": (1, 2)},
    **{"expand": ([3, 4, 6, 6],), "expand_as": (V,), "broadcast_to": ([3, 4, 6, 6],), "repeat": ([2, 1, 1, 1],)},
    **{"tile": ([2],), "repeat_interleave": (2,), "slice": (1, 1, 3), "select": (1, 2), "narrow": (1, 1, 2)},
    **{"split": (2, 1), "split_with_sizes": ([1, 3], 1), "unsafe_split": (2, 1), "unbind": (1,)},
    **{"unsafe_split_with_sizes": ([1, 3], 1), "chunk": (2, 1), "unsafe_chunk": (2, 1), "tensor_split": (2, 1)},
    **{"hsplit": (2,), "vsplit": (1,), "dsplit": (2,), "flip": ([1],), "roll": ([1], [1]), "rot90": (1, [1, 2])},
    **{"channel_shuffle": (2,), "native_channel_shuffle": (2,), "pixel_shuffle": (2,), "pixel_unshuffle": (2,)},
    **{"unfold": (2, 3, 1), "im2col": ([2, 2], [1, 1], [1, 1], [1, 1]), "index": ([None, PICKED],)},
    **{"index_select": (1, PICKED), "gather": (1, torch.zeros(1, 2, 6, 6, dtype=torch.long)), "take": (PICKED,)},
    **{"take_along_dim": (torch.zeros(1, 2, 6, 6, dtype=torch.long), 1), "index_fill": (1, PICKED, 0.0)},
    **{"slice_scatter": (-V[:, :2], 1, 0, 2), "select_scatter": (-V[:, 0], 1, 0), "index_put": ([PICKED * 0], -V)},
    **{"diagonal_scatter": (-V[..., 0], 0, 2, 3), "index_copy": (1, PICKED, -V[:, :2])},
    **{"scatter": (1, torch.zeros(1, 1, 6, 6, dtype=torch.long), -V[:, :1]), "diagonal": (0, 2, 3)},
    **{f"upsample_nearest{n}d": ([8] * n,) for n in (1, 2, 3)},
    **{f"_upsample_nearest_exact{n}d": ([8] * n,) for n in (1, 2, 3)},
    **{"pad": ([1, 1],), "constant_pad_nd": ([1, 1],), "reflection_pad1d": ([1, 1],), "reflection_pad2d": ([1] * 4,)},
    **{"reflection_pad3d": ([1] * 6,), "replication_pad1d": ([1, 1],), "replication_pad2d": ([1] * 4,)},
    **{"replication_pad3d": ([1] * 6,)},
}
LISTS = {"cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack", "column_stack", "row_stack"}


def operand(name: str) -> Any:
    """What the operator of that name takes first."""
    if name in LISTS or name == "block_diag":
        return [V[0, 0], -V[0, 0]]
    if name == "meshgrid":
        return [V[0, 0, 0], -V[0, 0, 1]]
    if name in {"t", "numpy_T", "adjoint", "mH", "matrix_H", "diag"}:
        return V[0, 0]
    return V[0] if name.endswith("1d") else V[:, None] if name.endswith("3d") else V


@pytest.mark.parametrize("name", [name for name, row in OPERATORS.items() if row.does in {"moves", "pads"}])
def test_what_moves_makes_no_new_elements(name: str) -> None:
    given = (operand(name), *MOVES.get(name, ()))
    out = getattr(aten, name)(*given)
    numbers = {0.0} | {n for leaf in torch.utils._pytree.tree_leaves(given) for n in _numbers(leaf)}
    for leaf in torch.utils._pytree.tree_leaves(out):
        assert set(leaf.flatten().tolist()) <= numbers


def _numbers(leaf: Any) -> list[float]:
    return list(leaf.flatten().tolist()) if isinstance(leaf, Tensor) and leaf.is_floating_point() else []


AXES: dict[str, tuple[Any, ...]] = {
    **{
        "im2col": ([2, 2], [1, 1], [1, 1], [1, 1]),
    },
    **{f"upsample_{mode}": (size, False) for mode, size in (("linear1d", [8]), ("trilinear3d", [4, 8, 8]))},
    **{f"{mode}2d{end}": ([8, 9], False) for mode, end in (("upsample_bilinear", ""), ("upsample_bicubic", ""))},
    **{f"_upsample_{mode}2d_aa": ([8, 9], False) for mode in ("bilinear", "bicubic")},
}


def _pooled(name: str, axes: int) -> tuple[Any, ...]:
    if name in AXES:
        return AXES[name]
    if "nearest" in name:
        return ([8] * axes,)
    return ([2] * axes,)


@pytest.mark.parametrize("name", [name for name, row in OPERATORS.items() if row.axes])
def test_axes_before_the_last_ones_are_kept_apart(name: str) -> None:
    axes = OPERATORS[name].axes
    data = torch.randn(1, 3, *[6] * axes)
    changed = data.clone()
    changed[:, 1] += 1.0
    out, other = (getattr(aten, name)(value, *_pooled(name, axes)) for value in (data, changed))
    one, two = (value[0] if isinstance(value, tuple) else value for value in (out, other))
    one, two = (value.reshape(1, 3, -1) for value in (one, two))
    assert torch.equal(one[:, ::2], two[:, ::2])
    assert not torch.equal(one[:, 1], two[:, 1])


POINTWISE: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("lerp",), (X.flip(0), X.sigmoid())),
    **dict.fromkeys(("addcmul", "addcdiv"), (X.flip(0), X.exp())),
    **{"where": (X, X.flip(0)), "masked_fill": (X > 0, 2.0), "_prelu_kernel": (X.exp(),), "clamp": (0.0,)},
    **{"fake_quantize_per_tensor_affine": (0.1, 0, -8, 8), "_to_copy": (), "to": (torch.float64,), "type_as": (X,)},
    **dict.fromkeys(("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"), (0.5, False)),
    "fake_quantize_per_channel_affine": (torch.rand(4) + 0.1, torch.zeros(4, dtype=torch.int32), 1, -8, 8),
    "prelu": (torch.rand(4),),
    "_native_batch_norm_legit_no_training": (*(torch.rand(4) for _ in range(4)), 0.1, 1e-5),
}
BINARY = {"add", "sub", "rsub", "subtract", "mul", "multiply", "div", "divide", "true_divide", "arctan2", "not_equal",
          "less", "less_equal", "greater", "greater_equal", "logical_and", "logical_or", "logical_xor", "floor_divide",
          "special_xlogy"}  # fmt: skip
BITS = {"__and__", "__or__", "__xor__", "bitwise_and", "bitwise_or", "bitwise_not"}


@pytest.mark.parametrize(
    "name", [name for name, row in OPERATORS.items() if row.does in {"pointwise", "copies", "by channel"}]
)
def test_an_element_depends_on_those_in_its_place_alone(name: str) -> None:
    data = X > 0 if name in BITS or name == "where" else X
    more = POINTWISE.get(name, (data.flip(0),) if name in BINARY | BITS - {"bitwise_not"} else ())
    changed = data.clone()
    changed[1, 2, 3, 4] = ~changed[1, 2, 3, 4] if data.dtype == torch.bool else changed[1, 2, 3, 4] + 3.0
    out, other = (getattr(aten, name)(value, *more) for value in (data, changed))
    one, two = (value[0] if isinstance(value, tuple) else value for value in (out, other))
    same = (one == two) | (one != one) & (two != two)
    same[1, 2, 3, 4] = True
    assert one.shape == X.shape
    assert bool(same.all())


ALONG: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("softmax", "_safe_softmax", "log_softmax", "cumsum", "cumprod", "logcumsumexp"), (2,)),
    **dict.fromkeys(("_softmax", "_log_softmax"), (2, False)),
    **{"diff": (1, 2), "topk": (2, 2)},
}


@pytest.mark.parametrize("name", [name for name, row in OPERATORS.items() if row.does == "along"])
def test_only_what_differs_along_the_axis_meets(name: str) -> None:
    changed = X.clone()
    changed[:, :, :, 4] += torch.randn(2, 4, 6)
    out, other = (getattr(aten, name)(value, *ALONG.get(name, (2,))) for value in (X, changed))
    one, two = (value[0] if isinstance(value, tuple) else value for value in (out, other))
    assert one.dim() == 4
    assert torch.equal(one[..., :4], two[..., :4])
    assert torch.equal(one[..., 5:], two[..., 5:])


NO_NUMBERS = {"argmax", "argmin", "any", "all"}
SHOWS_NAN = [
    name
    for name, row in OPERATORS.items()
    if row.does in {"along", "reduces"} and not row.hides_nan and name not in NO_NUMBERS
]


@pytest.mark.parametrize("name", SHOWS_NAN)
def test_a_nan_shows_where_the_table_says_so(name: str) -> None:
    data = X.clone()
    data[0, 0, 0, 0] = torch.nan
    dim = ALONG.get(name, (2,)) if OPERATORS[name].does == "along" or name == "logsumexp" else ()
    out = getattr(aten, name)(data, *dim)
    leaves = torch.utils._pytree.tree_leaves(out)
    assert any(bool(leaf.isnan().any()) for leaf in leaves if leaf.is_floating_point())


ANYBODYS = ("rand", "empty", "new_empty")  # how the names of operators start whose elements may be any


@pytest.mark.parametrize(
    "name", [name for name, row in OPERATORS.items() if row.does == "creates" and not name.startswith(ANYBODYS)]
)
def test_what_is_created_depends_on_no_element(name: str) -> None:
    row = OPERATORS[name]
    first: tuple[Any, ...] = () if row.family == "constant" else (X,)
    sizes: tuple[Any, ...] = ([2, 3],) if row.sized else ()
    given = (*sizes, *((2.0,) if row.fills else ()))
    assert torch.equal(getattr(aten, name)(*first, *given), getattr(aten, name)(*(x * 2 for x in first), *given))


# -- models that use them ---------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, between: Callable[[Tensor], Tensor], a: nn.Module, b: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.between = a, b, between

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(torch.sigmoid(self.a(x))))  # type: ignore[no-any-return]


def shuffled(x: Tensor) -> Tensor:
    """ShuffleNet's."""
    batch, channels, height, width = x.shape
    return x.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)


CONVS: dict[str, tuple[Callable[[Tensor], Tensor], int, int]] = {  # between, channels read, rows that must go
    "swapaxes": (lambda x: torch.swapaxes(torch.swapaxes(x, 1, 2) * 2, 2, 1), 8, 2),
    "swapdims": (lambda x: x.swapdims(2, 3).relu(), 8, 2),
    "moveaxis": (lambda x: torch.moveaxis(torch.moveaxis(x, 1, -1) + 1, -1, 1), 8, 2),
    "movedim": (lambda x: x.movedim(1, -1).tanh().movedim(-1, 1), 8, 2),
    "F.channel_shuffle": (lambda x: F.channel_shuffle(x, 2), 8, 2),
    "native_channel_shuffle": (lambda x: torch.native_channel_shuffle(x, 2), 8, 2),
    "nn.ChannelShuffle": (nn.ChannelShuffle(2), 8, 2),
    "ShuffleNet": (shuffled, 8, 2),
    "rot90": (lambda x: x.rot90(1, (2, 3)), 8, 2),
    "fliplr": (lambda x: x.fliplr(), 8, 2),
    "flipud over features": (lambda x: x.transpose(0, 1).flipud().transpose(0, 1), 8, 2),
    "hstack": (lambda x: torch.hstack([x, x]), 16, 2),
    "column_stack": (lambda x: torch.column_stack([x, x]), 16, 2),
    "dstack": (lambda x: torch.dstack([x, x]), 8, 2),
    "vstack": (lambda x: torch.vstack([x, x]), 8, 2),
    "unsafe_split": (lambda x: torch.cat(torch.unsafe_split(x, 4, 1)[::-1], 1), 8, 2),
    "roll": (lambda x: x.roll(3, 1), 8, 2),
    "roll over channels and space": (lambda x: x.roll((3, 2), (1, -1)), 8, 0),
    "roll over channels and batch": (lambda x: x.roll((3, 2), (1, 0)), 8, 0),
    "a constant permutation": (lambda x: x[:, torch.tensor([3, 1, 0, 2, 7, 6, 4, 5])], 8, 2),
    "index_select": (lambda x: x.index_select(1, torch.tensor([5, 0, 0, 7])), 4, 6),
    "every other channel": (lambda x: torch.cat([x[:, ::2], x[:, 1::2]], 1), 8, 2),
    "multiply": (lambda x: torch.multiply(x, x), 8, 2),
    "subtract": (lambda x: torch.subtract(x, 1.0), 8, 2),
    "negative, absolute": (lambda x: torch.absolute(torch.negative(x)), 8, 2),
    "greater": (lambda x: torch.where(torch.greater(x, 0.3), x, 0.0), 8, 2),
    "grid_sample": (
        lambda x: F.grid_sample(x, torch.zeros(1, 5, 5, 2).expand(x.shape[0], 5, 5, 2), align_corners=False),
        8,
        2,
    ),
    "median over space": (lambda x: x.median(3, keepdim=True).values, 8, 2),
    "argsort over space": (lambda x: x.sort(2).values, 8, 2),
    "kthvalue": (lambda x: x.kthvalue(2, 3, keepdim=True).values, 8, 2),
    "nansum": (lambda x: x.nansum(3, keepdim=True), 8, 2),
    "a cut along the other axis": (lambda x: x.diagonal(0, 2, 3)[..., None], 8, 2),
}


SHUFFLES: dict[str, Callable[[Tensor], Tensor]] = {
    "F.channel_shuffle": CONVS["F.channel_shuffle"][0],
    "native_channel_shuffle": CONVS["native_channel_shuffle"][0],
    "ShuffleNet": shuffled,
    "movedim, flatten": lambda x: x.reshape(-1, 4, 2, 6, 6).movedim(2, 1).flatten(1, 2),
    "permute": lambda x: x.view(-1, 2, 4, 6, 6).permute(0, 2, 1, 3, 4).contiguous().view(-1, 8, 6, 6),
}


@pytest.mark.slow
@pytest.mark.parametrize("dead", [[0, 5], [0, 3, 5], [1, 2], [0, 1, 2, 3], [7]], ids=str)
@pytest.mark.parametrize("name", SHUFFLES)
def test_groups_of_a_shuffle_may_lose_different_places(name: str, dead: list[int]) -> None:
    model = masked(Net(SHUFFLES[name], nn.Conv2d(3, 8, 1), nn.Conv2d(8, 5, 1)), {"a.weight": dead})
    result = removed(model, (torch.randn(2, 3, 6, 6),))
    assert not result.notes
    assert result.subject.removals is not None
    assert result.subject.removals.weights[0].rows_removed == len(dead)
    for batch in (None, 1, 3, 7):
        assert relative_error(model, result.subject, batch) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", CONVS)
def test_dead_channels_go_through_it(name: str) -> None:
    between, read, gone = CONVS[name]
    model = masked(Net(between, nn.Conv2d(3, 8, 1), nn.Conv2d(read, 5, 1)), {"a.weight": [1, 5]})
    data = torch.randn(2, 3, 6, 6)
    result = removed(model, (data,))
    assert not any(note.undone for note in result.notes)
    program = result.subject
    assert program.removals is not None
    assert program.removals.weights[0].rows_removed == gone
    for batch in (None, 1, 3, 7):
        assert relative_error(model, program, batch) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["swapaxes", "moveaxis", "native_channel_shuffle", "ShuffleNet", "hstack", "rot90"])
def test_a_lowered_model_with_ablated_channels_gives_what_the_masked_one_does(name: str) -> None:
    between, read, gone = CONVS[name]
    model = Net(between, nn.Conv2d(3, 8, 1), nn.Conv2d(read, 5, 1)).eval()
    sx.sparsify(model, sparsity=0.5)
    first, second = sparse_weights(model)
    with torch.no_grad():
        first.mask[[1, 5]] = False
        first.weight.mul_(first.mask)
        second.mask.fill_(True)  # every channel is read
        second.weight.normal_()
    data = torch.randn(4, 3, 6, 6)
    with torch.no_grad():
        expected = copy.deepcopy(model)(data)
        lowered = sx.lower(model, (data,), min_speedup=0)
        torch.testing.assert_close(lowered(data), expected, rtol=1e-5, atol=1e-5)
    assert lowered.report.removals[0].weights[0].rows_removed >= gone


@pytest.mark.slow
def test_pixel_shuffle_loses_whole_channels() -> None:
    first = nn.Conv2d(3, 8, 1, bias=False)
    model = masked(Net(lambda x: F.pixel_shuffle(x, 2), first, nn.Conv2d(2, 5, 1)), {"a.weight": [4, 5, 6, 7]})
    program = removed(model, (torch.randn(2, 3, 6, 6),)).subject
    assert program.removals is not None
    assert program.removals.weights[0].rows_removed == 4
    assert relative_error(model, program, 3) < 1e-5


def test_the_row_of_an_overload_that_differs() -> None:
    assert operator_of(aten.scatter.src).does == "moves"
    assert operator_of(aten.scatter.reduce).does == "unknown"
    assert operator_of(aten.max.other).does == "pointwise"
    assert operator_of(torch.ops.aten.mul_.Tensor).does == "pointwise"
    assert operator_of(len).does == "unknown"


@pytest.mark.slow
def test_capture_keeps_what_the_table_is_asked_about() -> None:
    program = capture(
        Net(CONVS["native_channel_shuffle"][0], nn.Conv2d(3, 8, 1), nn.Conv2d(8, 5, 1)).eval(), (X[:, :3],)
    )
    assert program.module.graph.find_nodes(op="call_function", target=aten.native_channel_shuffle.default)


class Named(nn.Module):
    """A model that calls operators by their second names."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.native_channel_shuffle(torch.special.expit(self.a(x)), 2)
        h = torch.multiply(torch.subtract(h, 0.5, alpha=2), torch.arctan(torch.divide(h, 3.0)))
        h = torch.where(torch.less_equal(h, 0.25), torch.negative(h), torch.clip(torch.absolute(h), max=2.0))
        out: Tensor = self.b(torch.concatenate([h, torch.true_divide(h, 2.0)], dim=1))
        return out


@pytest.mark.slow
def test_a_lowered_model_that_uses_second_names_is_saved_and_loaded(tmp_path: Path) -> None:
    model = Named().eval()
    sx.sparsify(model, sparsity=0.5)
    with torch.no_grad():
        for handle in sparse_weights(model):
            handle.weight.normal_().mul_(handle.mask)
        first = sparse_weights(model)[0]
        first.mask[[1, 2, 5]] = False
        first.weight.mul_(first.mask)
    data = torch.randn(4, 3, 6, 6)
    with torch.no_grad():
        expected = copy.deepcopy(model)(data)
        lowered = sx.lower(model, (data,), min_speedup=0)
        lowered.save(tmp_path / "named.srigl")
        found = sx.load_lowered(tmp_path / "named.srigl")(data)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert lowered.report.removals[0].weights[0].rows_removed >= 3
