"""What an operator does to the channels that pass through it: the families of ATen operators.

Owns the table, by plain operator name. It must not know graphs, classes of channels or what is removed. An operator in
no family is unknown: nothing may be removed around it.
"""

import torch


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


POINTWISE = _names(
    "hardswish prelu_kernel _prelu_kernel log_sigmoid floor_divide __and__ __or__ __xor__ relu6 softplus logical_and "
    "logical_or logical_not where masked_fill clamp isnan nan_to_num"
)
"""Element by element, though not tagged so."""

SAME = _names(
    "_to_copy to type_as contiguous alias detach clone lift_fresh_copy lift_fresh dropout feature_dropout "
    "alpha_dropout fill zeros_like ones_like full_like empty_like rand_like randn_like"
)
"""The result has the channels of the first operand; no other operand matters."""

LAYOUT = _names(
    "view reshape _unsafe_view permute transpose t numpy_T mT movedim moveaxis slice select narrow unsqueeze squeeze "
    "expand flatten unflatten cat concat stack split split_with_sizes chunk unbind swapaxes pixel_shuffle "
    "pixel_unshuffle channel_shuffle native_channel_shuffle roll flip repeat tile repeat_interleave unfold "
    "index index_select"
)
"""Elements only change places, so the operator is run on the classes themselves."""

PADS = _names(
    "pad constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d "
    "replication_pad1d replication_pad2d replication_pad3d"
)

SPATIAL = {
    **dict.fromkeys(_names("avg_pool1d max_pool1d adaptive_avg_pool1d adaptive_max_pool1d lp_pool1d"), 1),
    **dict.fromkeys(
        _names(
            "avg_pool2d max_pool2d adaptive_avg_pool2d adaptive_max_pool2d max_pool2d_with_indices lp_pool2d "
            "_adaptive_avg_pool2d fractional_max_pool2d"
        ),
        2,
    ),
    **dict.fromkeys(
        _names(
            "avg_pool3d max_pool3d adaptive_avg_pool3d adaptive_max_pool3d max_pool3d_with_indices _adaptive_avg_pool3d"
        ),
        3,
    ),
    **dict.fromkeys(_names("upsample_nearest1d upsample_linear1d _upsample_nearest_exact1d"), 1),
    **dict.fromkeys(
        _names(
            "upsample_nearest2d upsample_bilinear2d upsample_bicubic2d _upsample_nearest_exact2d "
            "_upsample_bilinear2d_aa _upsample_bicubic2d_aa"
        ),
        2,
    ),
    **dict.fromkeys(_names("upsample_nearest3d upsample_trilinear3d _upsample_nearest_exact3d"), 3),
}
"""Channel by channel over that many last axes."""

REDUCTIONS = _names(
    "mean sum var std amax amin prod logsumexp linalg_vector_norm norm any all max min argmax argmin var_mean std_mean"
)
"""Over the axes in ``dim``, which go unless ``keepdim``."""

ALONG_AXIS = _names(
    "softmax _softmax log_softmax _log_softmax _safe_softmax cumsum cumprod logcumsumexp topk sort argsort cummax "
    "cummin"
)
"""Elements along ``dim`` are mixed, and the axis stays."""

CREATION = _names("new_zeros new_ones new_full new_empty sym_size sym_numel sym_stride sym_storage_offset")
"""Only the type and size of the operand matter."""

CONVOLUTIONS = _names("conv1d conv2d conv3d")
TRANSPOSED = _names("conv_transpose1d conv_transpose2d conv_transpose3d")
PRODUCTS = _names("matmul mm bmm")
"""Of two operands, either of which may be a weight."""


def plain_name(target: object) -> str:
    """The name of an ATen operator without namespace and overload; "" for anything else.

    Example:
        >>> plain_name(torch.ops.aten.softmax.int), plain_name(len)
        ('softmax', '')
    """
    if not isinstance(target, torch._ops.OpOverload):
        return ""
    namespace, _, name = target._schema.name.partition("::")
    return name if namespace == "aten" else ""


def is_pointwise(target: object) -> bool:
    """Whether each element of the result depends on the operands' elements at its place only.

    Example:
        >>> is_pointwise(torch.ops.aten.gelu.default), is_pointwise(torch.ops.aten.softmax.int)
        (True, False)
    """
    if not isinstance(target, torch._ops.OpOverload) or not plain_name(target):
        return False
    return torch.Tag.pointwise in target.tags or plain_name(target) in POINTWISE
