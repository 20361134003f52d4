"""What each operator does to the elements that it is given: one table, a row for each family of ATen operators.

Owns the table, and the questions that are asked of it. It must not know graphs, masks or what anybody concludes from an
answer. An operator without a row is unknown: whoever asks must take it to do anything.

``does`` says how the elements of a result come about:

==============  ========================================================================================================
pointwise       each from the elements in its place of the operands, broadcast to one shape
by channel      each from the element in its place of the first operand, and parameters of its channel (axis 1)
copies          they are those of the first operand, in their places, perhaps in another type
creates         from no element at all, only from shapes, types and numbers
measures        a number of the shape of the first operand
moves           they are elements of the operands in other places; where there is none, zero
pads            as "moves", with other numbers too where there is none
pools           each from elements of one neighbourhood in the last ``axes`` axes of the first operand
along           each from elements that differ from it along one axis only, which stays
reduces         each from all elements along some axes, which go
normalises      each from its own element, a mean and a spread of elements, and parameters
multiplies      sums of products of elements of two operands
looks up        rows of its weight, picked by numbers
checks          there is no result
==============  ========================================================================================================

Torch tags most pointwise operators as such; those need no row.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch

Does = Literal[
    "pointwise",
    "by channel",
    "copies",
    "creates",
    "measures",
    "moves",
    "pads",
    "pools",
    "along",
    "reduces",
    "normalises",
    "multiplies",
    "looks up",
    "checks",
    "unknown",
]


@dataclass(frozen=True)
class Operator:
    """What all operators of a row have in common.

    Attributes:
        does: How the elements of the result come about.
        family: What they are called together; several rows may share it.
        axes: Over how many last axes elements meet or move, those before being kept apart; 0 where it is not so.
        data: The arguments whose elements are in the result; by default the first one.
        sized: Whether a number among its arguments is only ever a size of the result.
        fills: Whether ``value`` or ``fill_value`` is an element of the result.
        keeps_zero: Whether zeros give zero, however many there are.
        hides_nan: Whether one of its elements may be NaN and the result a number.
    """

    does: Does
    family: str
    axes: int = 0
    data: tuple[str, ...] = ()
    sized: bool = False
    fills: bool = False
    keeps_zero: bool = False
    hides_nan: bool = False


def _row(does: Does, family: str, names: str, **facts: Any) -> tuple[Operator, tuple[str, ...]]:
    return Operator(does, family, **facts), tuple(names.split())


UNKNOWN = Operator("unknown", "")
TAGGED = Operator("pointwise", "tagged")
"""What torch tags as pointwise, without a row of its own."""

# fmt: off
_ROWS = (
    # -- element by element: what is tagged needs a row only where its family is asked for -----------------------------
    _row("pointwise", "add", "add sub rsub subtract"),
    _row("pointwise", "multiply", "mul multiply div divide true_divide"),
    _row("pointwise", "between", "lerp"),
    _row("pointwise", "scaled add", "addcmul addcdiv"),
    _row("pointwise", "choose", "where"),
    _row("pointwise", "fill", "masked_fill", fills=True),
    _row("pointwise", "activation", "hardswish _prelu_kernel log_sigmoid relu6 softplus"),
    _row("pointwise", "alias", "negative absolute fix arccos arccosh arcsin arcsinh arctan arctan2 arctanh "
         "special_exp2 special_expit special_expm1 special_erf special_erfc special_log1p special_sinc special_xlogy"),
    _row("pointwise", "compare", "not_equal less less_equal greater greater_equal logical_and logical_or logical_not "
         "logical_xor isnan __and__ __or__ __xor__ bitwise_and bitwise_or bitwise_not"),
    _row("pointwise", "round", "floor_divide nan_to_num clamp fake_quantize_per_tensor_affine"),
    _row("by channel", "prelu", "prelu"),
    _row("by channel", "quantize", "fake_quantize_per_channel_affine"),
    _row("copies", "copy", "clone contiguous lift_fresh_copy"),
    _row("copies", "same", "alias detach lift_fresh"),
    _row("copies", "cast", "_to_copy to type_as"),
    _row("copies", "dropout", "dropout feature_dropout alpha_dropout feature_alpha_dropout"),  # those that are off
    # -- from nothing --------------------------------------------------------------------------------------------------
    _row("creates", "like", "zeros_like ones_like empty_like rand_like randn_like"),
    _row("creates", "like", "full_like", fills=True),
    _row("creates", "filled", "zero"),
    _row("creates", "filled", "fill", fills=True),
    _row("creates", "new", "new_zeros new_ones new_empty", sized=True),
    _row("creates", "new", "new_full", sized=True, fills=True),
    _row("creates", "constant", "zeros ones empty rand randn", sized=True),
    _row("creates", "constant", "full", sized=True, fills=True),
    _row("measures", "size", "sym_size sym_numel sym_stride", sized=True),
    _row("measures", "size", "sym_storage_offset size numel dim stride"),
    # -- to other places -----------------------------------------------------------------------------------------------
    _row("moves", "reshape", "view reshape _unsafe_view view_as reshape_as flatten unflatten ravel", sized=True),
    _row("moves", "one", "squeeze unsqueeze"),
    _row("moves", "axes", "permute transpose t numpy_T mT mH adjoint matrix_H movedim moveaxis swapaxes swapdims"),
    _row("moves", "expand", "expand expand_as broadcast_to", sized=True),
    _row("moves", "repeat", "repeat tile", sized=True),
    _row("moves", "repeat", "repeat_interleave"),
    _row("moves", "part", "slice select narrow"),
    _row("moves", "split", "split split_with_sizes unsafe_split unsafe_split_with_sizes", sized=True),
    _row("moves", "split", "chunk unsafe_chunk unbind tensor_split hsplit vsplit dsplit"),
    _row("moves", "join", "cat concat concatenate stack hstack vstack dstack column_stack row_stack"),
    _row("moves", "order", "flip fliplr flipud rot90 roll"),
    _row("moves", "shuffle", "channel_shuffle native_channel_shuffle"),
    _row("moves", "shuffle", "pixel_shuffle pixel_unshuffle", sized=True),
    _row("moves", "window", "unfold"),
    _row("moves", "patches", "im2col", axes=2),
    _row("moves", "pick", "index index_select gather take_along_dim take"),
    _row("moves", "put", "slice_scatter select_scatter diagonal_scatter scatter", data=("self", "src")),
    _row("moves", "put", "index_put", data=("self", "values")),
    _row("moves", "put", "index_copy", data=("self", "source")),
    _row("moves", "put", "index_fill"),
    _row("moves", "diagonal", "tril triu diagonal diag diag_embed block_diag"),
    _row("moves", "grid", "meshgrid"),
    _row("moves", "resize", "upsample_nearest1d _upsample_nearest_exact1d", axes=1),
    _row("moves", "resize", "upsample_nearest2d _upsample_nearest_exact2d", axes=2),
    _row("moves", "resize", "upsample_nearest3d _upsample_nearest_exact3d", axes=3),
    _row("pads", "pad", "pad constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d "
         "replication_pad2d replication_pad3d"),
    # -- from a neighbourhood ------------------------------------------------------------------------------------------
    _row("pools", "pool", "avg_pool1d max_pool1d adaptive_avg_pool1d adaptive_max_pool1d max_pool1d_with_indices",
         axes=1),
    _row("pools", "pool", "avg_pool2d max_pool2d adaptive_avg_pool2d adaptive_max_pool2d max_pool2d_with_indices "
         "_adaptive_avg_pool2d", axes=2),
    _row("pools", "pool", "avg_pool3d max_pool3d adaptive_avg_pool3d adaptive_max_pool3d max_pool3d_with_indices "
         "_adaptive_avg_pool3d", axes=3),
    _row("pools", "resize", "upsample_linear1d", axes=1),
    _row("pools", "resize", "upsample_bilinear2d upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa",
         axes=2),
    _row("pools", "resize", "upsample_trilinear3d", axes=3),
    _row("pools", "sample", "grid_sampler grid_sampler_2d grid_sampler_3d"),  # over all axes but the first two
    _row("pools", "fold", "col2im"),
    # -- along axes ----------------------------------------------------------------------------------------------------
    _row("along", "softmax", "softmax _softmax _safe_softmax log_softmax _log_softmax"),
    _row("along", "scan", "cumsum cumprod logcumsumexp diff"),
    _row("along", "gate", "glu"),
    _row("along", "sort", "sort argsort topk cummax cummin", hides_nan=True),
    _row("reduces", "sum", "mean sum amax amin", keeps_zero=True),
    _row("reduces", "spread", "var std var_mean std_mean norm linalg_vector_norm"),
    _row("reduces", "other", "max min prod logsumexp argmax argmin any all"),
    _row("reduces", "other", "aminmax median nanmedian kthvalue mode nansum nanmean count_nonzero", hides_nan=True),
    _row("reduces", "matrix", "linalg_norm", hides_nan=True),
    _row("normalises", "layer norm", "layer_norm native_layer_norm"),
    _row("normalises", "rms norm", "rms_norm _fused_rms_norm"),
    _row("normalises", "group norm", "group_norm native_group_norm"),
    _row("normalises", "instance norm", "instance_norm"),
    _row("normalises", "batch norm", "batch_norm native_batch_norm _native_batch_norm_legit "
         "_native_batch_norm_legit_functional"),
    _row("by channel", "batch norm", "_native_batch_norm_legit_no_training"),
    # -- products ------------------------------------------------------------------------------------------------------
    _row("multiplies", "linear", "linear", keeps_zero=True),
    _row("multiplies", "convolution", "conv1d conv2d conv3d"),
    _row("multiplies", "transposed convolution", "conv_transpose1d conv_transpose2d conv_transpose3d"),
    _row("multiplies", "any convolution", "convolution"),
    _row("multiplies", "product", "matmul mm bmm", keeps_zero=True),
    _row("multiplies", "vector product", "mv dot vdot", keeps_zero=True),
    _row("multiplies", "sum of products", "addmm baddbmm", keeps_zero=True),
    _row("multiplies", "einsum", "einsum", keeps_zero=True),
    _row("multiplies", "attention", "scaled_dot_product_attention", keeps_zero=True),
    _row("looks up", "lookup", "embedding", data=("weight",)),
    # -- no value ------------------------------------------------------------------------------------------------------
    _row("checks", "assertion", "_assert_tensor_metadata _assert_scalar _assert_async sym_constrain_range "
         "sym_constrain_range_for_size"),
)
# fmt: on

OPERATORS: dict[str, Operator] = {name: row for row, names in _ROWS for name in names}

# Overloads that do not do what their operator's other ones do.
_APART = frozenset({"repeat_interleave.Tensor", "scatter.reduce", "scatter.value_reduce"})

# fmt: off
ALIASES: dict[str, str] = {
    "subtract": "sub", "multiply": "mul", "divide": "div", "true_divide": "div", "negative": "neg", "absolute": "abs",
    "fix": "trunc", "clip": "clamp", "arccos": "acos", "arccosh": "acosh", "arcsin": "asin", "arcsinh": "asinh",
    "arctan": "atan", "arctan2": "atan2", "arctanh": "atanh", "special_exp2": "exp2", "special_expit": "sigmoid",
    "special_expm1": "expm1", "special_erf": "erf", "special_erfc": "erfc", "special_log1p": "log1p",
    "special_sinc": "sinc", "special_xlogy": "xlogy", "not_equal": "ne", "less": "lt", "less_equal": "le",
    "greater": "gt", "greater_equal": "ge", "concat": "cat", "concatenate": "cat", "swapaxes": "transpose",
    "swapdims": "transpose", "moveaxis": "movedim", "row_stack": "vstack", "native_channel_shuffle": "channel_shuffle",
    "special_erfinv": "erfinv", "special_gammaln": "lgamma", "special_logit": "logit", "special_i0": "i0",
    "special_logsumexp": "logsumexp", "special_softmax": "softmax", "linalg_matmul": "matmul", "ger": "outer",
}
# fmt: on
"""Operators that are another one under a second name."""

# Functions and methods of torch and Python that are no ATen operators by name, and one that does the same to elements.
SPELLINGS: dict[str, str] = {
    **dict.fromkeys(("iadd", "radd", "isub"), "add"),
    **dict.fromkeys(("imul", "rmul", "truediv", "itruediv"), "mul"),
    "rtruediv": "reciprocal",
    **dict.fromkeys(("and", "or", "xor", "iand", "ior", "ixor", "invert"), "logical_and"),
    **dict.fromkeys(("floordiv", "mod"), "floor_divide"),
    **dict.fromkeys(("softsign", "tanhshrink", "logsigmoid"), "log_sigmoid"),
    **dict.fromkeys(("float", "half", "bfloat16", "double", "type", "cpu", "cuda", "convert_element_type"), "to"),
    **dict.fromkeys(("data", "requires_grad_"), "alias"),
    **dict.fromkeys(("shape", "ndim", "ndimension", "dtype", "device", "is_cuda", "requires_grad"), "size"),
    **dict.fromkeys(("T", "H"), "numpy_T"),
    "vector_norm": "linalg_vector_norm",
    "normalize": "layer_norm",
    "softmin": "softmax",
}


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


@cache
def first_named(target: torch._ops.OpOverload) -> torch._ops.OpOverload:
    """The operator that a target is a second name of, with the same arguments in order; else the target itself.

    Example:
        >>> first_named(torch.ops.aten.multiply.Tensor), first_named(torch.ops.aten.swapaxes.default)
        (<OpOverload(op='aten.mul', overload='Tensor')>, <OpOverload(op='aten.transpose', overload='int')>)
    """
    packet = getattr(torch.ops.aten, ALIASES.get(plain_name(target), ""), None)
    if packet is None:
        return target
    taken = [(str(argument.type), argument.kwarg_only) for argument in target._schema.arguments]
    own = target.__name__.rpartition(".")[2]
    for overload in sorted(packet.overloads(), key=lambda name: name != own):  # that of the same name first
        found: torch._ops.OpOverload = getattr(packet, overload)
        if [(str(argument.type), argument.kwarg_only) for argument in found._schema.arguments] == taken:
            return found
    return target


def operator_of(target: object) -> Operator:
    """The row of an ATen operator; :data:`UNKNOWN` for anything else, and where there is none.

    Example:
        >>> operator_of(torch.ops.aten.swapaxes.default).family, operator_of(torch.ops.aten.gelu.default).does
        ('axes', 'pointwise')
        >>> operator_of(torch.ops.aten.max.dim).does, operator_of(torch.ops.aten.max.other).does
        ('reduces', 'pointwise')
    """
    name = plain_name(target)
    if not name:
        return UNKNOWN
    assert isinstance(target, torch._ops.OpOverload)
    row = UNKNOWN if str(target).removeprefix("aten.") in _APART else OPERATORS.get(name, UNKNOWN)
    tagged = torch.Tag.pointwise in target.tags
    return TAGGED if tagged and row.does not in ("pointwise", "copies") else row


@cache
def operator_named(name: str) -> Operator:
    """The row of a function, a method or an operator of torch, by its name alone; :data:`UNKNOWN` where it has none.

    Methods that write into their tensor, and those behind Python's signs, do what the others do.

    Example:
        >>> [operator_named(name).family for name in ("swapaxes", "__iadd__", "relu_", "softmin", "print")]
        ['axes', 'add', 'tagged', 'softmax', '']
    """
    for spelling in (name, name.strip("_")):
        if row := OPERATORS.get(SPELLINGS.get(spelling, spelling)):
            return row
    packet = getattr(torch.ops.aten, SPELLINGS.get(name.strip("_"), name.strip("_")), None)
    tags = [getattr(packet, overload).tags for overload in packet.overloads()] if packet is not None else []
    tagged = any(torch.Tag.pointwise in each for each in tags)
    return TAGGED if tagged and not any(torch.Tag.nondeterministic_seeded in each for each in tags) else UNKNOWN


def is_pointwise(target: object) -> bool:
    """Whether each element of the result depends on the operands' elements at its place only.

    Example:
        >>> is_pointwise(torch.ops.aten.gelu.default), is_pointwise(torch.ops.aten.softmax.int)
        (True, False)
    """
    return operator_of(target).does == "pointwise"


def names_of(*families: str) -> frozenset[str]:
    """The names of all operators of some families.

    Example:
        >>> sorted(names_of("product", "linear"))
        ['bmm', 'linear', 'matmul', 'mm']
    """
    return frozenset(name for name, row in OPERATORS.items() if row.family in families)
