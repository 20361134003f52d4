"""What a saved graph may call.

Owns the allow-list, and the names by which a file refers to functions. Anything that writes, reads files, or is not
listed is refused, when saving as when loading. It must not know the file format.
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
            *(operator.mod, operator.neg, operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge),
        )
    },
    **{
        f"torch.{function.__name__}": function
        for function in (torch.sym_max, torch.sym_min, torch.sym_int, torch.sym_float, torch.sym_not)
    },
}

# Operators of aten beyond those that torch tags as core or pointwise.
_ATEN_NAMES = """
__and__ __or__ _log_softmax _native_batch_norm_legit _native_batch_norm_legit_no_training _softmax _to_copy
_unsafe_view _weight_norm adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d
adaptive_max_pool2d addbmm addmm addmv affine_grid_generator arange argmax argmin argsort avg_pool1d avg_pool2d
avg_pool3d baddbmm batch_norm bilinear bincount bmm broadcast_to bucketize channel_shuffle chunk clone col2im concat
constant_pad_nd contiguous conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d cosine_similarity
cumprod cumsum detach diag_embed diagonal diff dot dropout einsum embedding embedding_bag empty_like expand expand_as
feature_dropout flatten flip floor_divide full full_like gather grid_sampler group_norm gru gru_cell hardswish histc
im2col index index_add index_copy index_put index_select instance_norm layer_norm lift_fresh_copy linalg_norm
linalg_vector_norm linear linspace log_softmax logsumexp lstm lstm_cell masked_fill masked_select matmul max
max_pool1d max_pool2d max_pool3d mean meshgrid min mm movedim mv narrow new_empty new_full new_ones new_zeros norm
one_hot ones ones_like outer pad permute pixel_shuffle pixel_unshuffle prod reflection_pad1d reflection_pad2d repeat
repeat_interleave replication_pad1d replication_pad2d reshape rms_norm rnn_relu rnn_relu_cell rnn_tanh rnn_tanh_cell
roll scalar_tensor scaled_dot_product_attention scatter scatter_add searchsorted select select_scatter slice
slice_scatter softmax sort split split_with_sizes squeeze stack std std_mean sum swapaxes sym_numel sym_size
sym_stride t take_along_dim tensordot tile to topk transpose tril triu type_as unbind unflatten unfold unsqueeze
upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_nearest3d
upsample_trilinear3d var var_mean vdot view_as where zeros zeros_like
"""
_ATEN = frozenset(_ATEN_NAMES.split())
_OURS = frozenset({"condensed_linear", "condensed_conv"})
_BUFFER_UPDATE = "copy_"  # how a captured graph writes a buffer that the model updates; checks shapes like any operator


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
    name = overload.overloadpacket.__name__
    if overload.namespace == "srigl_fx":
        return name in _OURS
    if name == _BUFFER_UPDATE:
        return True
    if overload._schema.is_mutable:
        return False
    return name in _ATEN or bool({torch.Tag.core, torch.Tag.pointwise} & set(overload.tags))
