"""Every operator's rule against the operator itself: what is said to be dead does not move when the live part does."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from srigl_fx.passes.liveness import rules
from srigl_fx.passes.liveness.rules import liveness
from srigl_fx.passes.liveness.values import Call, spread
from srigl_fx.passes.operators import OPERATORS

aten = torch.ops.aten


def call_of(op: Any, args: dict[str, Any], live: dict[str, Any], **options: Any) -> Call:
    given = {argument.name: args.get(argument.name, argument.default_value) for argument in op._schema.arguments}
    masks = {name: live.get(name, pytree.tree_map(lambda _: False, value)) for name, value in given.items()}
    return Call(op, given, masks, op(**given), **options)


def moves(op: Any, args: dict[str, Any], live: dict[str, Any]) -> None:
    """Check a rule: change the live elements, and see that no other element of the result changes."""
    call = call_of(op, args, live)
    answer = liveness(call)
    assert answer is not None, "there is a rule"
    out = pytree.tree_leaves(call.out)
    answers = [answer] * len(out) if isinstance(answer, bool) else pytree.tree_leaves(answer)
    assert len(answers) == len(out)
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        shaken = functools.partial(shake, generator=generator)
        changed = {name: pytree.tree_map(shaken, args[name], live[name]) for name in live}
        after = pytree.tree_leaves(op(**{**call.given, **changed}))
        for one, other, mask in zip(out, after, answers, strict=True):
            if isinstance(one, Tensor):
                dead = ~spread(mask, one)
                torch.testing.assert_close(one[dead], other[dead], rtol=1e-5, atol=1e-5, equal_nan=True)


def shake(value: Any, live: Any, generator: torch.Generator) -> Any:
    if not isinstance(value, Tensor):
        return value
    noise = torch.randn(value.shape, generator=generator) * 10
    noise = noise if value.is_floating_point() else (noise > 0).to(value.dtype)
    return torch.where(spread(live, value), noise.to(value.dtype), value)


def some(*shape: int, share: float = 0.3, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1))
LIVE = some(2, 4, 6, 6, share=0.05)
ONE = {"self": LIVE}

CASES: list[tuple[Any, dict[str, Any]]] = [
    *((op, {"self": X}) for op in (aten.relu.default, aten.gelu.default, aten.hardswish.default, aten.sin.default)),
    *((op, {"self": X}) for op in (aten.isnan.default, aten.clone.default, aten.softplus.default, aten.abs.default)),
    (aten.hardtanh.default, {"self": X}),
    (aten._to_copy.default, {"self": X, "dtype": torch.int64}),
    (aten.clamp.default, {"self": X, "min": 0.0}),
    (aten.add.Tensor, {"self": X, "other": X[:1, :, :1]}),
    (aten.mul.Tensor, {"self": X, "other": X[:1].relu()}),
    (aten.where.self, {"condition": X[:1] > 0, "self": X, "other": X * 2}),
    (aten.masked_fill.Scalar, {"self": X, "mask": X[0] > 0, "value": 3.0}),
    (aten.prelu.default, {"self": X, "weight": torch.rand(4)}),
    (aten.max.other, {"self": X, "other": X * 0}),
    (aten.reshape.default, {"self": X, "shape": [2, -1]}),
    (aten.permute.default, {"self": X, "dims": [2, 0, 3, 1]}),
    (aten.expand.default, {"self": X, "size": [3, 2, 4, 6, 6]}),
    (aten.expand_as.default, {"self": X, "other": torch.zeros(3, 2, 4, 6, 6)}),
    (aten.reshape_as.default, {"self": X, "other": torch.zeros(8, 36)}),
    (aten.repeat.default, {"self": X, "repeats": [2, 1, 1, 3]}),
    (aten.flip.default, {"self": X, "dims": [1, 2]}),
    (aten.channel_shuffle.default, {"self": X, "groups": 2}),
    (aten.repeat_interleave.self_int, {"self": X, "repeats": 2, "dim": 1}),
    (aten.type_as.default, {"self": X, "other": X}),
    (aten.full_like.default, {"self": X, "fill_value": 2.0}),
    (aten.fill.Scalar, {"self": X, "value": 2.0}),
    (aten.slice.Tensor, {"self": X, "dim": 2, "start": 1, "end": 5, "step": 2}),
    (aten.split.Tensor, {"self": X, "split_size": 3, "dim": 1}),
    (aten.unbind.int, {"self": X, "dim": 1}),
    (aten.roll.default, {"self": X, "shifts": [1], "dims": [2]}),
    (aten.pixel_shuffle.default, {"self": X, "upscale_factor": 2}),
    (aten.pad.default, {"self": X, "pad": [1, 2], "value": 5.0}),
    (aten.pad.default, {"self": X, "pad": [1, 2, 1, 1], "mode": "reflect"}),
    (aten.unfold.default, {"self": X, "dimension": 2, "size": 3, "step": 2}),
    (aten.im2col.default, {"self": X, "kernel_size": [3, 3], "dilation": [1, 1], "padding": [1, 1], "stride": [1, 1]}),
    (aten.index.Tensor, {"self": X, "indices": [None, torch.tensor([3, 0])]}),
    (aten.gather.default, {"self": X, "dim": 1, "index": torch.tensor([3, 0]).view(1, 2, 1, 1).expand(2, 2, 6, 6)}),
    (aten.tril.default, {"self": X}),
    (aten.mean.dim, {"self": X, "dim": [2]}),
    (aten.sum.dim_IntList, {"self": X, "dim": [1, 3]}),
    (aten.amax.default, {"self": X, "dim": [2]}),
    (aten.max.dim, {"self": X, "dim": 2}),
    (aten.min.dim, {"self": X, "dim": 2}),
    (aten.prod.dim_int, {"self": X, "dim": 2}),
    (aten.var.correction, {"self": X, "dim": [2]}),
    (aten.cumsum.default, {"self": X, "dim": 3}),
    (aten.logsumexp.default, {"self": X, "dim": [3]}),
    (aten.softmax.int, {"self": X, "dim": 3}),
    (aten.log_softmax.int, {"self": X, "dim": 1}),
    (aten.linalg_vector_norm.default, {"self": X, "dim": [3]}),
    (aten.avg_pool2d.default, {"self": X, "kernel_size": [3], "padding": [1]}),
    (aten.max_pool2d.default, {"self": X, "kernel_size": [3], "stride": [1], "padding": [1]}),
    (aten.max_pool2d_with_indices.default, {"self": X, "kernel_size": [3]}),
    (aten.adaptive_avg_pool2d.default, {"self": X, "output_size": [4, 4]}),
    (aten.adaptive_max_pool2d.default, {"self": X, "output_size": [2, 3]}),
    (aten.max_pool1d.default, {"self": X[0], "kernel_size": [2]}),
    (aten.upsample_nearest2d.default, {"self": X, "output_size": [8, 9]}),
    (aten.upsample_bilinear2d.default, {"self": X, "output_size": [8, 9], "align_corners": False}),
    (aten.upsample_bicubic2d.default, {"self": X, "output_size": [8, 9], "align_corners": False}),
    (aten.glu.default, {"self": X, "dim": 1}),
    (aten.native_channel_shuffle.default, {"self": X, "groups": 2}),
    *((op, {"self": X}) for op in (aten.fliplr.default, aten.flipud.default, aten.triu.default, aten.mT.default)),
    *((op, {"self": X}) for op in (aten.negative.default, aten.absolute.default, aten.arctan.default)),
    *((op, {"self": X, "axis0": 1, "axis1": -1}) for op in (aten.swapaxes.default,)),
    *((op, {"self": X, "dim0": 1, "dim1": -1}) for op in (aten.swapdims.default,)),
    *((op, {"self": X, "source": [1], "destination": [3]}) for op in (aten.movedim.intlist, aten.moveaxis.intlist)),
    (aten.rot90.default, {"self": X, "k": 1, "dims": [1, 2]}),
    (aten.unsafe_split.Tensor, {"self": X, "split_size": 3, "dim": 1}),
    (aten.hsplit.int, {"self": X, "sections": 2}),
    (aten.diagonal.default, {"self": X, "dim1": 2, "dim2": 3}),
    (aten.diag_embed.default, {"self": X}),
    (aten.take.default, {"self": X, "index": torch.tensor([5, 200, 7])}),
    (aten.index_fill.int_Scalar, {"self": X, "dim": 1, "index": torch.tensor([2]), "value": 3.0}),
    (aten.multiply.Tensor, {"self": X, "other": X[:1].relu()}),
    (aten.subtract.Tensor, {"self": X, "other": X[:1].relu()}),
    (aten.divide.Tensor, {"self": X.relu(), "other": X.exp()}),
    (aten.true_divide.Tensor, {"self": X.relu(), "other": X.exp()}),
    *((op, {"self": X, "other": X.flip(0)}) for op in (aten.greater.Tensor, aten.less_equal.Tensor)),
    *((op, {"self": X, "dim": 2}) for op in (aten.sort.default, aten.argsort.default, aten.cummax.default)),
    *((op, {"self": X, "dim": 2}) for op in (aten.cumprod.default, aten.logcumsumexp.default)),
    *((op, {"self": X, "dim": 2}) for op in (aten.median.dim, aten.nanmedian.dim, aten.mode.default)),
    *((op, {"self": X, "dim": 2}) for op in (aten.argmax.default, aten.aminmax.default)),
    (aten.topk.default, {"self": X, "k": 2, "dim": 2}),
    (aten.kthvalue.default, {"self": X, "k": 2, "dim": 2}),
    (aten.nansum.default, {"self": X, "dim": [1, 2]}),
    (aten.count_nonzero.dim_IntList, {"self": X, "dim": [3]}),
    (aten._upsample_nearest_exact2d.default, {"self": X, "output_size": [8, 9]}),
    (aten.diff.default, {"self": X, "dim": 2}),
    (aten.mul.Scalar, {"self": X, "other": 0.0}),
    (aten.zeros_like.default, {"self": X}),
    (aten.new_ones.default, {"self": X, "size": [3]}),
]


@pytest.mark.parametrize(("op", "args"), CASES, ids=lambda value: str(value) if callable(value) else "")
@pytest.mark.parametrize("channels_last", [False, True])
def test_operators_of_one_live_tensor(op: Any, args: dict[str, Any], channels_last: bool) -> None:
    args = dict(args)
    x = args["self"]
    if channels_last and x.dim() == 4:
        args["self"] = x.contiguous(memory_format=torch.channels_last)
    moves(op, args, {"self": LIVE if x.dim() == 4 else LIVE[0]})


def weight_of(*shape: int) -> Tensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    return weight * some(*shape, share=0.3, seed=3)


@pytest.mark.parametrize(
    "live",
    [
        LIVE,
        some(1, 4, 1, 1, share=0.5, seed=1).expand(2, 4, 6, 6),
        torch.tensor([True, False, False, False]).view(1, 4, 1, 1),
        torch.tensor([False, False, True, False]).view(4, 1, 1),
        some(2, 1, 1, 6),
        True,
    ],
    ids=["scattered", "expanded", "channel", "trailing", "by sample", "all"],
)
@pytest.mark.parametrize(
    ("op", "weight", "settings"),
    [
        (aten.conv2d.default, weight_of(6, 4, 3, 3), {"padding": [1]}),
        (aten.conv2d.default, weight_of(6, 2, 3, 3), {"groups": 2, "stride": [2], "dilation": [2]}),
        (aten.conv2d.padding, weight_of(6, 4, 3, 3), {"padding": "same"}),
        (aten.conv2d.default, weight_of(8, 1, 3, 3), {"groups": 4}),
        (aten.conv_transpose2d.input, weight_of(4, 3, 3, 3), {"groups": 2, "stride": [2], "output_padding": [1]}),
        (aten.conv_transpose2d.input, weight_of(4, 3, 3, 3), {}),
        (aten.linear.default, weight_of(5, 6), {}),
        (aten.batch_norm.default, torch.tensor([1.0, 0.0, 2.0, 1.0]), {"statistics": True}),
        (aten._native_batch_norm_legit_no_training.default, torch.tensor([1.0, 0.0, 2.0, 1.0]), {"statistics": True}),
        (aten.group_norm.default, torch.rand(4), {"num_groups": 2}),
        (aten.layer_norm.default, torch.rand(6), {"normalized_shape": [6]}),
        (aten.rms_norm.default, torch.rand(6), {"normalized_shape": [6]}),
        (aten.instance_norm.default, torch.rand(4), {"use_input_stats": True}),
    ],
    ids=lambda value: str(value) if callable(value) else "",
)
def test_layers_with_known_weights(op: Any, weight: Tensor, settings: dict[str, Any], live: Any) -> None:
    settings = dict(settings)
    if settings.pop("statistics", False):
        settings |= {"running_mean": torch.rand(4), "running_var": torch.rand(4) + 0.5, "momentum": 0.1, "eps": 1e-5}
        settings |= {"training": False, "cudnn_enabled": False, "bias": torch.rand(4)}
    if op is aten.instance_norm.default:
        settings |= {"momentum": 0.1, "eps": 1e-5, "cudnn_enabled": False}
    x = torch.where(some(2, 4, 6, 6, seed=5), X, 0.0)
    moves(op, {"input": x, "weight": weight, **settings}, {"input": live})


@pytest.mark.parametrize("live", [("a",), ("b",), ("a", "b")])
@pytest.mark.parametrize(
    ("op", "shapes", "names"),
    [
        (aten.matmul.default, ((2, 3, 4), (4, 5)), ("self", "other")),
        (aten.matmul.default, ((4,), (2, 4, 5)), ("self", "other")),
        (aten.bmm.default, ((2, 3, 4), (2, 4, 5)), ("self", "mat2")),
        (aten.mv.default, ((3, 4), (4,)), ("self", "vec")),
        (aten.addmm.default, ((3, 4), (4, 5)), ("mat1", "mat2")),
        (aten.linear.default, ((2, 3, 4), (5, 4)), ("input", "weight")),
        (aten.conv1d.default, ((2, 3, 6), (4, 3, 3)), ("input", "weight")),
        (aten.mul.Tensor, ((2, 3, 4), (3, 4)), ("self", "other")),
        (aten.add.Tensor, ((2, 3, 4), (3, 4)), ("self", "other")),
    ],
    ids=lambda value: str(value) if callable(value) else "",
)
def test_operators_of_two_tensors(op: Any, shapes: Any, names: tuple[str, str], live: tuple[str, ...]) -> None:
    args = {
        name: weight_of(*shape) * some(*shape, share=0.6, seed=i)
        for i, (name, shape) in enumerate(zip(names, shapes, strict=True))
    }
    if op is aten.addmm.default:
        args["self"] = torch.rand(5)
    masks = {
        name: some(*shape, seed=9 + i)
        for i, (name, shape, which) in enumerate(zip(names, shapes, "ab", strict=True))
        if which in live
    }
    moves(op, args, masks)


def test_a_convolution_by_its_live_channels() -> None:
    weight = torch.zeros(4, 2, 3, 3)
    weight[0, 1, 0, 0], weight[1, 0, 1, 1], weight[2, 0, 2, 2] = 1.0, 1.0, 1.0
    live = torch.tensor([True, False, False, True]).view(1, 4, 1, 1)
    call = call_of(aten.conv2d.default, {"input": X, "weight": weight, "groups": 2}, {"input": live})
    assert spread(liveness(call), call.out).flatten(2).all(2)[0].tolist() == [False, True, False, False]
    call = call_of(aten.conv_transpose2d.input, {"input": X, "weight": weight, "groups": 2}, {"input": live})
    # in (group 0: 0, 1; group 1: 2, 3), out / 2: input 0 feeds the group's second output, input 3 nothing
    assert spread(liveness(call), call.out).flatten(2).all(2)[0].tolist() == [False, True, False, False]


def test_lists_of_tensors() -> None:
    tensors, masks = [X, X * 2], [LIVE, some(2, 4, 6, 6, seed=4)]
    moves(aten.cat.default, {"tensors": tensors, "dim": 1}, {"tensors": masks})
    moves(aten.stack.default, {"tensors": tensors, "dim": 2}, {"tensors": [False, True]})
    pair = [weight_of(2, 3), weight_of(3, 4)]
    moves(aten.einsum.default, {"equation": "ij,jk->ik", "tensors": pair}, {"tensors": [some(2, 3), False]})


def test_index_put_and_slice_scatter_carry_both_tensors() -> None:
    args = {"self": X, "indices": [None, torch.tensor([2])], "values": X[:, 1:2] * 0}
    moves(aten.index_put.default, args, {"self": LIVE})
    moves(aten.index_put.default, args, {"values": LIVE[:, 1:2]})
    moves(aten.slice_scatter.default, {"self": X, "src": X[:1] * 2, "end": 1}, {"src": LIVE[:1]})


@pytest.mark.parametrize(
    ("op", "args", "live"),
    [
        (aten.index.Tensor, {"self": X, "indices": [torch.tensor([1])]}, {"indices": [True]}),
        (aten.where.self, {"condition": X > 0, "self": X, "other": X}, {"condition": True}),
        (aten.fill.Tensor, {"self": X, "value": torch.tensor(3.0)}, {"value": True}),
        (aten.rand_like.default, {"self": X}, {}),
        (aten.empty_like.default, {"self": X}, {}),
        (aten.grid_sampler.default, {"input": X, "grid": X[..., :2], "interpolation_mode": 0, "padding_mode": 0,
                                     "align_corners": False}, {"grid": LIVE[..., :2]}),
        (aten.mul.Scalar, {"self": X, "other": 3.0}, {"other": True}),
        (aten.linalg_vector_norm.default, {"self": X, "ord": 0.0}, {"self": LIVE}),
        (aten.sum.dim_IntList, {"self": torch.ones(3, dtype=torch.int64), "dim": [0]}, {"self": True}),
    ],
    ids=lambda value: str(value) if callable(value) else "",
)  # fmt: skip
def test_everything_is_live(op: Any, args: dict[str, Any], live: dict[str, Any]) -> None:
    answer = liveness(call_of(op, args, live))
    assert answer in (True, None) or bool(torch.as_tensor(answer).all())


@pytest.mark.parametrize(
    ("op", "args"),
    [
        (aten._cdist_forward.default, {"x1": X, "x2": X, "p": 2.0, "compute_mode": None}),
        (aten.scatter.reduce, {"self": X, "dim": 1, "index": (X > 0).long(), "src": X, "reduce": "add"}),
        (aten.repeat_interleave.Tensor, {"repeats": torch.tensor([1, 2])}),
        (aten.mul.Tensor, {"self": X.to(torch.complex64), "other": X}),
    ],
    ids=lambda value: str(value) if callable(value) else "",
)
def test_no_rule(op: Any, args: dict[str, Any]) -> None:
    assert liveness(call_of(op, args, {next(iter(args)): True})) is None


@pytest.mark.parametrize("known", [False, True])
def test_what_is_chosen_is_live_where_the_condition_or_what_it_takes_is(known: bool) -> None:
    condition = X > 0
    live = {"condition": False if known else some(2, 4, 1, 1, seed=1).expand(X.shape), "self": LIVE}
    moves(aten.where.self, {"condition": condition, "self": X, "other": X * 2}, live)
    answer = liveness(call_of(aten.where.self, {"condition": condition, "self": X, "other": X * 2}, live))
    assert not bool(answer.all())
    live = {"mask": False if known else some(2, 4, 1, 1, seed=1).expand(X.shape), "self": LIVE}
    moves(aten.masked_fill.Scalar, {"self": X, "mask": condition, "value": 3.0}, live)


def test_special_rules_are_for_operators_of_the_table() -> None:
    assert set(rules._SPECIAL) <= set(OPERATORS)
