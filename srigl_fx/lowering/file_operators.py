"""What a saved graph may call.

Owns the allow-list, and the names by which a file refers to functions. Anything that writes, reads files, or is not
listed is refused, when saving as when loading. A file is untrusted, so the list names each operator one by one: only
those that check what they are given, and of those that torch keeps for itself (a leading underscore) only what a
captured graph cannot do without. It must not know the file format.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch

_PYTHON: dict[str, Callable[..., Any]] = {
    **{
        f"_operator.{function.__name__}": function
        for function in (
            *(operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv, operator.truediv),
            *(operator.mod, operator.abs, operator.neg, operator.eq, operator.ne),
            *(operator.lt, operator.le, operator.gt, operator.ge),
        )
    },
    **{
        f"torch.{function.__name__}": function
        for function in (torch.sym_max, torch.sym_min, torch.sym_int, torch.sym_float, torch.sym_not)
    },
}

# Those of aten, by overload: what graphs of models call, and what checks its arguments. tests/test_graph_ops.py calls
# each with random ones.
_ATEN_NAMES = """
__and__.Scalar __and__.Tensor __or__.Scalar __or__.Tensor __xor__.Scalar __xor__.Tensor _to_copy.default abs.default
acos.default acosh.default add.Scalar add.Tensor addbmm.default addcdiv.default
addcmul.default addmm.default addmv.default affine_grid_generator.default alias.default amax.default amin.default
angle.default any.default any.dim any.dims arange.default arange.start argmax.default argmin.default argsort.default
asin.default asinh.default atan.default atan2.default atanh.default avg_pool1d.default avg_pool2d.default
avg_pool3d.default baddbmm.default batch_norm.default bilinear.default bincount.default bitwise_and.Scalar
bitwise_and.Scalar_Tensor bitwise_and.Tensor bitwise_left_shift.Scalar_Tensor bitwise_left_shift.Tensor
bitwise_left_shift.Tensor_Scalar bitwise_not.default bitwise_or.Scalar bitwise_or.Scalar_Tensor bitwise_or.Tensor
bitwise_right_shift.Scalar_Tensor bitwise_right_shift.Tensor bitwise_right_shift.Tensor_Scalar bitwise_xor.Scalar
bitwise_xor.Scalar_Tensor bitwise_xor.Tensor bmm.default broadcast_to.default bucketize.Scalar bucketize.Tensor
cat.default ceil.default celu.default channel_shuffle.default chunk.default clamp.Tensor clamp.default
clamp_max.Tensor clamp_max.default clamp_min.Tensor clamp_min.default clip.Tensor clip.default clone.default
concat.default conj_physical.default constant_pad_nd.default contiguous.default conv1d.default
conv1d.padding conv2d.default conv2d.padding conv3d.default conv3d.padding conv_transpose1d.default
conv_transpose2d.input conv_transpose3d.input convolution.default copy.default copysign.Scalar copysign.Tensor
cos.default cosh.default cosine_similarity.default cumprod.default cumsum.default deg2rad.default detach.default
diag_embed.default diagonal.default diff.default div.Scalar div.Tensor dot.default dropout.default einsum.default
elu.default embedding.default empty.memory_format empty_like.default eq.Scalar eq.Tensor erf.default erfc.default
erfinv.default exp.default exp2.default expand.default expand_as.default expm1.default feature_dropout.default
fill.Scalar fill.Tensor flatten.using_ints flip.default float_power.Scalar float_power.Tensor_Scalar
float_power.Tensor_Tensor floor.default fmax.default fmin.default frac.default frexp.Tensor full.default
full_like.default gather.default ge.Scalar ge.Tensor gelu.default grid_sampler.default grid_sampler_2d.default
group_norm.default gru_cell.default gt.Scalar gt.Tensor hardshrink.default hardsigmoid.default hardswish.default
hardtanh.default heaviside.default histc.default hypot.default i0.default im2col.default index.Tensor
index_add.default index_copy.default index_put.default index_select.default instance_norm.default isfinite.default
isinf.default isnan.default isneginf.default isposinf.default item.default layer_norm.default ldexp.Tensor le.Scalar
le.Tensor leaky_relu.default lerp.Scalar lerp.Tensor lgamma.default lift_fresh_copy.default linalg_norm.default
linalg_vector_norm.default linear.default linspace.Scalar_Tensor linspace.Tensor_Scalar linspace.Tensor_Tensor
linspace.default log.default log10.default log1p.default log2.default log_softmax.int logaddexp.default
logaddexp2.default logical_and.default logical_not.default logical_or.default logical_xor.default logit.default
logsumexp.default lstm_cell.default lt.Scalar lt.Tensor masked_fill.Scalar masked_fill.Tensor masked_select.default
matmul.default max.default max.dim max.other maximum.default mean.default mean.dim meshgrid.default meshgrid.indexing
min.default min.dim min.other minimum.default mish.default mm.default movedim.int movedim.intlist mul.Scalar
mul.Tensor mv.default nan_to_num.default narrow.default native_layer_norm.default ne.Scalar
ne.Tensor neg.default new_empty.default new_full.default new_ones.default new_zeros.default nonzero.default
norm.Scalar norm.ScalarOpt_dim norm.ScalarOpt_dim_dtype norm.ScalarOpt_dtype one_hot.default ones.default
ones_like.default outer.default permute.default pixel_shuffle.default pixel_unshuffle.default
positive.default pow.Scalar pow.Tensor_Scalar pow.Tensor_Tensor prod.default prod.dim_int rad2deg.default
reciprocal.default reflection_pad1d.default reflection_pad2d.default reflection_pad3d.default relu.default
relu6.default repeat.default repeat_interleave.Tensor repeat_interleave.self_Tensor repeat_interleave.self_int
reshape.default rms_norm.default
rnn_relu_cell.default rnn_tanh_cell.default roll.default round.decimals round.default rsqrt.default rsub.Scalar
scalar_tensor.default scatter.reduce scatter.src scatter.value scatter.value_reduce scatter_add.default
scatter_reduce.two searchsorted.Scalar searchsorted.Tensor select.int select_scatter.default selu.default sgn.default
sigmoid.default sign.default signbit.default silu.default sin.default sinc.default sinh.default slice.Tensor
slice_scatter.default softmax.int softplus.default softshrink.default sort.default sort.stable split.Tensor
split_with_sizes.default sqrt.default square.default squeeze.default squeeze.dim squeeze.dims stack.default
std.correction std.default std.dim std_mean.correction std_mean.default std_mean.dim sub.Scalar sub.Tensor sum.default
sum.dim_IntList swapaxes.default sym_numel.default sym_size.int t.default take_along_dim.default tan.default
tanh.default tensordot.default threshold.default tile.default to.dtype topk.default transpose.int tril.default
triu.default true_divide.Tensor trunc.default type_as.default unbind.int unflatten.int unfold.default
unsqueeze.default upsample_bicubic2d.default upsample_bicubic2d.vec upsample_bilinear2d.default
upsample_bilinear2d.vec upsample_linear1d.default upsample_linear1d.vec upsample_nearest1d.default
upsample_nearest1d.vec upsample_nearest2d.default upsample_nearest2d.vec upsample_nearest3d.default
upsample_nearest3d.vec upsample_trilinear3d.default upsample_trilinear3d.vec var.correction var.default var.dim
var_mean.correction var_mean.default var_mean.dim vdot.default view.default view_as.default where.Scalar
where.ScalarOther where.ScalarSelf where.default where.self xlogy.Scalar_Other xlogy.Scalar_Self xlogy.Tensor
zeros.default zeros_like.default
"""
_ATEN = frozenset(_ATEN_NAMES.split())
# What graphs call and what checks too little: graph_guards.py checks it, or puts something else in its place.
GUARDED = frozenset(
    f"aten.{name}"
    for name in (
        *("_native_batch_norm_legit_no_training.default", "_native_batch_norm_legit.no_stats"),
        *("lstm.input", "gru.input", "rnn_tanh.input", "rnn_relu.input"),
        "scaled_dot_product_attention.default",
        *("max_pool1d.default", "max_pool2d.default", "max_pool3d.default", "arange.start_step"),
        *(f"adaptive_{kind}_pool{axes}d.default" for kind in ("avg", "max") for axes in (1, 2)),
        "adaptive_avg_pool3d.default",
        *("div.Tensor_mode", "div.Scalar_mode", "floor_divide.default", "floor_divide.Scalar"),
        "embedding_bag.padding_idx",
        *("remainder.Tensor", "remainder.Scalar", "fmod.Tensor", "fmod.Scalar"),
        *("col2im.default", "native_group_norm.default", "pad.default"),
        *(f"replication_pad{axes}d.default" for axes in (1, 2, 3)),
    )
)
_OURS = frozenset(
    f"{name}.default"
    for name in (
        *("condensed_linear", "condensed_conv", "round_samples"),
        *("arrange_samples", "pool_samples", "pad_samples", "affine_samples", "concat_samples"),
    )
)
_BUFFER_UPDATE = (
    "copy_.default"  # how a captured graph writes a buffer that the model updates; checks shapes like any operator
)


def function_name(target: Any) -> str:
    """The name of a node's function.

    Example:
        >>> function_name(torch.ops.aten.linear.default)
        'aten.linear.default'
    """
    if isinstance(target, torch._ops.OpOverload):
        return f"{target.namespace}.{target.__name__}"
    module = "torch" if target.__module__.startswith("torch.") or target.__module__ == "torch" else target.__module__
    return f"{module}.{target.__name__}"


def function_named(name: str) -> Callable[..., Any]:
    """The function of this name.

    Raises:
        ValueError: It is not one that a saved graph may call.

    Example:
        >>> function_named("aten.from_file.default")
        Traceback (most recent call last):
        ValueError: 'aten.from_file.default' is not an operator that a saved graph may call
    """
    if name in _PYTHON:
        return _PYTHON[name]
    namespace, _, rest = name.partition(".")
    packet_name, _, overload = rest.partition(".")
    if namespace in ("aten", "srigl_fx") and packet_name.isidentifier() and overload.isidentifier():
        found = getattr(getattr(getattr(torch.ops, namespace), packet_name, None), overload, None)
        if isinstance(found, torch._ops.OpOverload) and found.namespace == namespace and _allowed(found):
            return found
    raise ValueError(f"{name!r} is not an operator that a saved graph may call")


def _allowed(overload: "torch._ops.OpOverload[..., Any]") -> bool:
    name = overload.__name__
    if overload.namespace == "srigl_fx":
        return name in _OURS
    return name in _ATEN or name == _BUFFER_UPDATE or f"aten.{name}" in GUARDED
