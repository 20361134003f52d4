"""How one operator passes on what is live: which elements of its result depend on live elements of its operands.

Owns a rule for each family of ATen operators, and nothing else: it must not know graphs, masks or what is done with the
answer. An element is live if it may depend on an input of the model. The rules err on the live side only, under one
assumption: activations are finite, so that zero times anything is zero.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

Live = bool | Tensor  # nothing, everything, or a bool tensor that broadcasts to the value's shape


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Only the shape and type of the first operand matter.
_SHAPES = _names(
    "zeros_like ones_like full_like new_zeros new_ones new_full fill zero sym_size sym_numel sym_stride expand_as"
)
# Element by element, though not tagged so: casts, and what has no tag for historical reasons.
_POINTWISE = _names(
    "_to_copy to type_as contiguous alias detach lift_fresh_copy lift_fresh hardswish _prelu_kernel log_sigmoid "
    "floor_divide dropout feature_dropout alpha_dropout __and__ __or__ __xor__ relu6 softplus"
)
# Elements change places; the data are the first argument unless named below, and every other operand must be known.
_MOVES = _names(
    "view reshape _unsafe_view view_as reshape_as permute transpose t numpy_T mT movedim slice select narrow unsqueeze "
    "squeeze expand flatten unflatten cat concat stack split split_with_sizes chunk unbind tensor_split swapaxes "
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
_DATA = {
    "embedding": ("weight",),
    "slice_scatter": ("self", "src"),
    "select_scatter": ("self", "src"),
    "index_put": ("self", "values"),
}
_CONVOLUTIONS = _names("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution")
_PRODUCTS = _names("matmul bmm mm mv dot vdot")


@dataclass(frozen=True)
class Call:
    """One evaluated call of an operator.

    Attributes:
        op: The operator.
        given: Its arguments by name, defaults filled in.
        live: What is live in each argument: of the same structure, a ``Live`` in place of each leaf.
        out: The value or values it returned.
        weighted_mean: The first operand's rows along the last axis are known to sum to one.
    """

    op: torch._ops.OpOverload
    given: dict[str, Any]
    live: dict[str, Any]
    out: Any
    weighted_mean: bool = False

    @property
    def name(self) -> str:
        """The operator's name without namespace and overload."""
        return str(self.op._schema.name).removeprefix("aten::")

    def only(self, *names: str) -> bool:
        """Whether nothing but the arguments called ``names`` is live."""
        return not any(any_live(live) for name, live in self.live.items() if name not in names)


def any_live(live: Any) -> bool:
    """Whether anything in a structure of ``Live`` is live.

    Example:
        >>> any_live([False, None]), any_live([False, torch.tensor([False, True])])
        (False, True)
    """
    return any(leaf is not None and leaf is not False for leaf in pytree.tree_leaves(live))


def simplify(live: Live) -> Live:
    """``live``, as a bool where it says the same of all elements.

    Example:
        >>> simplify(torch.ones(2, dtype=torch.bool)), simplify(torch.zeros(2, dtype=torch.bool))
        (True, False)
    """
    if isinstance(live, bool):
        return live
    return live if bool(live.any()) and not bool(live.all()) else bool(live.any())


def spread(live: Live, value: Tensor) -> Tensor:
    """``live`` element by element.

    Example:
        >>> spread(True, torch.zeros(2)).tolist()
        [True, True]
    """
    mask = torch.tensor(live) if isinstance(live, bool) else live
    return mask.expand(value.shape)


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
        [[False, True]]
    """
    if (torch.Tag.nondeterministic_seeded in call.op.tags and not _is_off(call)) or "empty" in call.name:
        return True
    if not any_live(call.live) or (call.name in _SHAPES and call.only(*_data(call))):
        return False
    if _live_number(call) or any(leaf.is_complex() for leaf in _tensors((call.given, call.out))):
        return None
    rule = _rule(call)
    return None if rule is None else rule(call)


def _is_off(call: Call) -> bool:
    """Whether an operator that may draw random numbers does not."""
    if call.name == "scaled_dot_product_attention":
        return bool(call.given["dropout_p"] == 0)
    return call.given.get("train") is False


def _live_number(call: Call) -> bool:
    """Whether an argument that is no tensor (a fill value, a size) depends on an input."""
    for name, value in call.given.items():
        if not any(True for _ in _tensors(value)) and any_live(call.live.get(name)):
            return True
    return False


def _tensors(value: Any) -> Iterator[Tensor]:
    return (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))


def _rule(call: Call) -> Callable[[Call], Any] | None:
    if call.op is torch.ops.aten.repeat_interleave.Tensor:
        return None  # its data are counts
    if call.name in _SPECIAL:
        return _SPECIAL[call.name]
    for names, rule in ((_CONVOLUTIONS, _convolution), (_PRODUCTS, _product), (_MOVES, _moves), (_MIXES, _mixes)):
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
            mask = spread(leaf, value)
            if leaf is True or not _broadcasts(mask.shape, call.out.shape):
                return True
            union = union | mask
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
    values = list(_tensors([call.given[name] for name in names]))
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


def _bilinear(multiply: Callable[[Tensor, Tensor], Tensor], a: Tensor, live_a: Live, b: Tensor, live_b: Live) -> Live:
    """What is live in a sum of products: the terms with one live factor and another that is not known to be zero."""
    parts = []
    if live_a is not False:
        parts.append((spread(live_a, a), (b != 0) | spread(live_b, b)))
    if live_b is not False:
        parts.append(((a != 0) | spread(live_a, a), spread(live_b, b)))
    return sum(multiply(one.float(), other.float()) for one, other in parts) > 0.5


def _plus(live: Live, call: Call, addend: str, trailing: int = 0) -> Live:
    """``live``, and where the addend is, which has that many dimensions of size 1 behind it."""
    value, more = call.given[addend], call.live[addend]
    if more is False or more is None:
        return live
    return live | spread(more, value).view(*value.shape, *[1] * trailing)


def _linear(call: Call) -> Live:
    x, live, weight = call.given["input"], call.live["input"], call.given["weight"]
    if live is True and not any_live(call.live["weight"]):
        out: Live = (weight != 0).any(-1).expand(call.out.shape)
    else:
        x, live = _one_sample(x, live)
        out = _bilinear(F.linear, x, live, weight, call.live["weight"])
    return _plus(out, call, "bias")


def _one_sample(value: Tensor, live: Live) -> tuple[Tensor, Live]:
    """One sample for all where they do not differ in what is live."""
    if value.dim() < 2:
        return value, live
    mask = spread(live, value)
    return (value[:1], mask[:1]) if bool((mask == mask[:1]).all()) else (value, live)


def _convolution(call: Call) -> Live:
    x, live, weight = call.given["input"], call.live["input"], call.given["weight"]
    settings = {name: value for name, value in call.given.items() if name not in {"input", "weight", "bias"}}
    batched, transposed = call.out.dim() == weight.dim(), "transpose" in call.name or call.given.get("transposed")
    if live is True and not any_live(call.live["weight"]) and batched and not transposed:
        out: Live = (weight != 0).flatten(1).any(1).view(-1, *[1] * (weight.dim() - 2))
    else:
        if batched and not any_live(call.live["weight"]):
            x, live = _one_sample(x, live)
        out = _bilinear(
            lambda one, other: call.op(input=one, weight=other, bias=None, **settings),
            x,
            live,
            weight,
            call.live["weight"],
        )
    return _plus(out, call, "bias", weight.dim() - 2)


def _product(call: Call) -> Live:
    """Products of two tensors. A weighted mean of equal numbers is that number."""
    names = [argument.name for argument in call.op._schema.arguments[:2]]
    (a, live_a), (b, live_b) = ((call.given[name], call.live[name]) for name in names)
    live = True if live_a is True and live_b is True else _bilinear(call.op, a, live_a, b, live_b)
    if not call.weighted_mean or min(a.dim(), b.dim()) < 2:
        return live
    constant = _equal_rows(b, live_b)
    return spread(live, call.out) & ~constant if bool(constant.any()) else live


def _equal_rows(value: Tensor, live: Live) -> Tensor:
    """The columns that are known and equal in all rows, as (..., 1, columns)."""
    known = ~spread(live, value).any(-2, keepdim=True)
    return known & (value == value[..., :1, :]).all(-2, keepdim=True)


def _sum_of_products(call: Call) -> Live:
    """``addmm`` and ``baddbmm``."""
    names = [argument.name for argument in call.op._schema.arguments[1:3]]
    (a, live_a), (b, live_b) = ((call.given[name], call.live[name]) for name in names)
    return _plus(_bilinear(torch.matmul, a, live_a, b, live_b), call, "self")


def _einsum(call: Call) -> Live:
    """``einsum`` of two operands; of another number, all is live."""
    tensors, lives = call.given["tensors"], call.live["tensors"]
    if len(tensors) != 2:
        return True
    equation = call.given["equation"]
    return _bilinear(lambda a, b: torch.einsum(equation, a, b), tensors[0], lives[0], tensors[1], lives[1])


def _attention(call: Call) -> Live:
    """Every row is a weighted mean of the values, so a value channel that is equal at all positions stays.

    A row that the mask hides wholly gives zero: unless there is none, only zeros stay.
    """
    if not call.only("query", "key", "value", "attn_mask"):
        return True
    value = call.given["value"]
    constant = _equal_rows(value, call.live["value"])
    if not _sees_something(call):
        constant = constant & (value[..., :1, :] == 0)
    heads = call.out.dim() - 3
    if call.given["enable_gqa"] and value.shape[heads] != call.out.shape[heads]:
        constant = constant.repeat_interleave(call.out.shape[heads] // value.shape[heads], heads)
    return ~constant.expand(call.out.shape)


def _sees_something(call: Call) -> bool:
    """Whether every query is known to see a key."""
    mask = call.given["attn_mask"]
    if mask is None:
        return True
    if any_live(call.live["attn_mask"]) or call.given["is_causal"]:
        return False
    seen = mask if mask.dtype == torch.bool else mask > -torch.inf
    return bool(seen.any(-1).all())


_SPECIAL: dict[str, Callable[[Call], Any]] = {
    "mul": _multiplied,
    "div": _multiplied,
    "where": _chosen,
    "masked_fill": _filled,
    "prelu": _parametric,
    "_prelu_kernel": _pointwise,
    "_native_batch_norm_legit_no_training": _normalised,
    "batch_norm": _normalised,
    "rms_norm": _scaled,
    "linear": _linear,
    "addmm": _sum_of_products,
    "baddbmm": _sum_of_products,
    "einsum": _einsum,
    "scaled_dot_product_attention": _attention,
}
