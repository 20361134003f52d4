"""How one operator passes on what is live: which elements of its result depend on live elements of its operands.

Owns the table of rules, and those of operators other than contractions. It must not know graphs, masks or what is done
with the answer. An element is live if it may depend on an input of the model. The rules err on the live side only,
under one assumption: activations are finite, so that zero times anything is zero.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from srigl_fx.passes.liveness.products import PRODUCT_RULES
from srigl_fx.passes.liveness.values import Call, Live, any_live, spread, tensors_in


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Only the shape and type of the first operand matter.
_SHAPES = _names("zeros_like ones_like full_like new_zeros new_ones new_full fill zero sym_size sym_numel sym_stride")
# Element by element, though not tagged so: casts, and what has no tag for historical reasons.
_POINTWISE = _names(
    "_to_copy to type_as contiguous alias detach lift_fresh_copy lift_fresh hardswish _prelu_kernel log_sigmoid "
    "floor_divide dropout feature_dropout alpha_dropout __and__ __or__ __xor__ relu6 softplus"
)
# Elements change places; the data are the first argument unless named below, and every other operand must be known.
_MOVES = _names(
    "view reshape _unsafe_view view_as reshape_as permute transpose t numpy_T mT movedim slice select narrow unsqueeze "
    "squeeze expand expand_as flatten unflatten cat concat stack split split_with_sizes chunk unbind tensor_split "
    "pixel_shuffle pixel_unshuffle channel_shuffle roll flip rot90 pad constant_pad_nd reflection_pad1d "
    "reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d repeat repeat_interleave "
    "tile unfold im2col index index_select gather take_along_dim embedding slice_scatter select_scatter index_put "
    "tril triu diagonal upsample_nearest1d upsample_nearest2d upsample_nearest3d meshgrid"
)
# A result is a function of several elements, and is not a number as soon as one of them is not.
_MIXES = _names(
    "mean sum var std var_mean std_mean amax amin max min prod cumsum logsumexp norm linalg_vector_norm "
    "softmax _softmax log_softmax _log_softmax _safe_softmax layer_norm native_layer_norm group_norm native_group_norm "
    "instance_norm _native_batch_norm_legit avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d "
    "max_pool2d_with_indices max_pool3d_with_indices adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d "
    "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d "
    "upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d _upsample_bilinear2d_aa "
    "_upsample_bicubic2d_aa grid_sampler grid_sampler_2d grid_sampler_3d glu diff col2im"
)
# Element by element, by a rule of their own.
_ELEMENTWISE = _names("mul div where masked_fill prelu _native_batch_norm_legit_no_training")
_DATA = {
    "embedding": ("weight",),
    "slice_scatter": ("self", "src"),
    "select_scatter": ("self", "src"),
    "index_put": ("self", "values"),
}


def liveness(call: Call) -> Any:
    """What is live in the value or values of ``call``; None where its operator has no rule.

    Without a live operand nothing is; an operator that draws random numbers, or leaves memory as it finds it, is
    live always.

    Example:
        >>> x = torch.zeros(1, 2)
        >>> weight = torch.tensor([[0.0, 0.0], [0.0, 3.0]])
        >>> op = torch.ops.aten.linear.default
        >>> given = {"input": x, "weight": weight, "bias": None}
        >>> call = Call(op, given, {"input": True, "weight": False, "bias": False}, op(x, weight))
        >>> liveness(call).tolist()
        [False, True]
    """
    if (torch.Tag.nondeterministic_seeded in call.op.tags and not _is_off(call)) or "empty" in call.name:
        return True
    if not any_live(call.live) or (call.name in _SHAPES and call.only(*_data(call))):
        return False
    if _live_number(call) or any(leaf.is_complex() for leaf in tensors_in((call.given, call.out))):
        return None
    rule = _rule(call)
    return None if rule is None else rule(call)


def is_move(name: str) -> bool:
    """Whether the operator of that name only moves elements.

    Example:
        >>> is_move("permute"), is_move("softmax")
        (True, False)
    """
    return name in _MOVES or name in _SHAPES


def is_elementwise(op: torch._ops.OpOverload) -> bool:
    """Whether each element of the result depends on the operands' elements at its place only.

    Example:
        >>> is_elementwise(torch.ops.aten.gelu.default), is_elementwise(torch.ops.aten.softmax.int)
        (True, False)
    """
    name = str(op._schema.name).removeprefix("aten::")
    return torch.Tag.pointwise in op.tags or name in _POINTWISE or name in _ELEMENTWISE


def _is_off(call: Call) -> bool:
    """Whether an operator that may draw random numbers does not."""
    if call.name == "scaled_dot_product_attention":
        return bool(call.given["dropout_p"] == 0)
    return call.given.get("train") is False


def _live_number(call: Call) -> bool:
    """Whether an argument that is no tensor (a fill value, a size) depends on an input."""
    for name, value in call.given.items():
        if not any(True for _ in tensors_in(value)) and any_live(call.live.get(name)):
            return True
    return False


def _rule(call: Call) -> Callable[[Call], Any] | None:
    if call.op is torch.ops.aten.repeat_interleave.Tensor:
        return None  # its data are counts
    if call.name in _SPECIAL:
        return _SPECIAL[call.name]
    for names, rule in ((_MOVES, _moves), (_MIXES, _mixes)):
        if call.name in names:
            return rule
    if torch.Tag.pointwise in call.op.tags or call.name in _POINTWISE:
        return _pointwise
    return None


def _pointwise(call: Call) -> Live:
    """The union over the operands."""
    if not isinstance(call.out, Tensor):
        return True
    union: Live = False
    for name, live in call.live.items():
        for leaf, value in zip(pytree.tree_leaves(live), pytree.tree_leaves(call.given[name]), strict=True):
            if leaf is None or leaf is False or not isinstance(value, Tensor):
                continue
            if leaf is True or not _broadcasts(value.shape, call.out.shape):
                return True
            union = union | leaf
    return union


def _broadcasts(shape: torch.Size, target: torch.Size) -> bool:
    return len(shape) <= len(target) and all(
        size in (1, whole) for size, whole in zip(reversed(shape), reversed(target), strict=False)
    )


def _zero(call: Call, name: str) -> Tensor:
    """Where the operand called ``name`` is known to be zero."""
    value = call.given[name]
    if not isinstance(value, Tensor):
        return torch.zeros((), dtype=torch.bool)
    return (value == 0) & ~spread(call.live.get(name, False), value)


def _multiplied(call: Call) -> Live:
    """Zero times anything is zero; of a quotient, only the numerator counts."""
    zero = _zero(call, "self")
    if call.name == "mul":
        zero = zero | _zero(call, "other")
    union = _pointwise(call)
    return spread(union, call.out) & ~zero if bool(zero.any()) else union


def _chosen(call: Call) -> Live:
    """``where`` with a known condition takes what is live from the branch it takes."""
    if any_live(call.live["condition"]):
        return True
    one, other = (torch.as_tensor(call.live[name]) for name in ("self", "other"))
    return torch.where(call.given["condition"], one, other)


def _filled(call: Call) -> Live:
    """``masked_fill`` with a known mask hides what it covers."""
    if not call.only("self"):
        return True
    mask: Tensor = call.given["mask"]
    return spread(call.live["self"], call.given["self"]) & ~mask


def _parametric(call: Call) -> Live:
    """``prelu``: its weight lies along dimension 1."""
    return spread(call.live["self"], call.given["self"]) if call.only("self") else True


def _moves(call: Call) -> Any:
    """Where the live elements go: the operator is applied to NaNs in their places."""
    names = _data(call)
    if not call.only(*names):
        return True
    marked = {name: pytree.tree_map(_mark, call.given[name], call.live[name]) for name in names}
    return _not_a_number(call.op(**{**call.given, **marked}))


def _mixes(call: Call) -> Any:
    """As for moves, with the known elements' values: one NaN makes the whole result one."""
    names = _data(call)
    values = list(tensors_in([call.given[name] for name in names]))
    counts = call.given.get("ord") == 0 or call.given.get("p") == 0  # the norm that counts takes a NaN for a number
    if counts or not call.only(*names) or not all(value.is_floating_point() for value in values):
        return True
    marked = {name: pytree.tree_map(_poison, call.given[name], call.live[name]) for name in names}
    return _not_a_number(call.op(**{**call.given, **marked}))


def _data(call: Call) -> tuple[str, ...]:
    return _DATA.get(call.name, (call.op._schema.arguments[0].name,))


def _mark(value: Any, live: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.zeros(value.shape).masked_fill(spread(live, value), torch.nan)


def _poison(value: Any, live: Any) -> Any:
    return value.masked_fill(spread(live, value), torch.nan) if isinstance(value, Tensor) else value


def _not_a_number(out: Any) -> Any:
    return pytree.tree_map(
        lambda leaf: leaf.isnan() if isinstance(leaf, Tensor) and leaf.is_floating_point() else True, out
    )


def _normalised(call: Call) -> Any:
    """Batch norm with stored statistics is element by element; a scale of zero leaves the shift."""
    if not call.only("input") or call.given.get("training"):
        return True
    value, live = call.given["input"], call.live["input"]
    scale = call.given["weight"]
    if scale is not None and bool((scale == 0).any()):
        live = spread(live, value) & (scale != 0).view(-1, *[1] * (value.dim() - 2))
    return live if isinstance(call.out, Tensor) else (live, *[False] * (len(call.out) - 1))


def _scaled(call: Call) -> Live:
    """RMS norm: zero stays zero, anything else is live as soon as one element of its row is."""
    if not call.only("input"):
        return True
    value: Tensor = call.given["input"]
    live = spread(call.live["input"], value)
    row = live.any(dim=tuple(range(-len(call.given["normalized_shape"]), 0)), keepdim=True)
    return live | (row & value.ne(0))


_SPECIAL: dict[str, Callable[[Call], Any]] = {
    **PRODUCT_RULES,
    "mul": _multiplied,
    "div": _multiplied,
    "where": _chosen,
    "masked_fill": _filled,
    "prelu": _parametric,
    "_prelu_kernel": _pointwise,
    "_native_batch_norm_legit_no_training": _normalised,
    "batch_norm": _normalised,
    "rms_norm": _scaled,
}
