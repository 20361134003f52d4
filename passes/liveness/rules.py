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
from srigl_fx.passes.operators import names_of, operator_of


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
    row = operator_of(call.op)
    shapes_alone = row.family in {"like", "filled", "new"} or row.does == "measures"
    if not any_live(call.live) or (shapes_alone and call.only(*_data(call))):
        return False
    if _live_number(call) or any(leaf.is_complex() for leaf in tensors_in((call.given, call.out))):
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
        if not any(True for _ in tensors_in(value)) and any_live(call.live.get(name)):
            return True
    return False


def _rule(call: Call) -> Callable[[Call], Any] | None:
    row = operator_of(call.op)
    if row.does != "unknown" and call.name in _SPECIAL:
        return _SPECIAL[call.name]
    if row.does in {"along", "reduces"} and row.hides_nan:
        return _over_axes
    return _BY_KIND.get(row.does)


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
    if call.name in {"mul", "multiply"}:
        zero = zero | _zero(call, "other")
    union = _pointwise(call)
    return spread(union, call.out) & ~zero if bool(zero.any()) else union


def _chosen(call: Call) -> Live:
    """``where`` takes what is live from the branch it takes, where its condition is known."""
    if call.live["condition"] is True:
        return True
    condition, one, other = (torch.as_tensor(call.live[name]) for name in ("condition", "self", "other"))
    return condition | torch.where(call.given["condition"], one, other)


def _filled(call: Call) -> Live:
    """``masked_fill`` hides what its mask covers, where that is known."""
    if not call.only("self", "mask"):
        return True
    mask: Tensor = call.given["mask"]
    return spread(call.live["mask"], mask) | (spread(call.live["self"], call.given["self"]) & ~mask)


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


def _over_axes(call: Call) -> Any:
    """Along the axes that are named, one live element makes all live: for what sorts, or passes over NaNs."""
    (name,) = _data(call)
    value, dims = call.given[name], call.given.get("dim")
    if not call.only(name) or dims is None:
        return True
    dims = sorted(dim % value.dim() for dim in ([dims] if isinstance(dims, int) else dims)) if value.dim() else []
    live = spread(call.live[name], value).any(dim=dims, keepdim=True) if dims else spread(call.live[name], value)

    def of(out: Any) -> Any:
        return live if not isinstance(out, Tensor) or out.dim() == value.dim() else live.squeeze(dims)

    return pytree.tree_map(of, call.out)


def _data(call: Call) -> tuple[str, ...]:
    named = operator_of(call.op).data or (call.op._schema.arguments[0].name,)
    return tuple(name for name in named if name in call.given)


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


_BY_KIND: dict[str, Callable[[Call], Any]] = {
    "pointwise": _pointwise,
    "copies": _pointwise,
    "moves": _moves,
    "pads": _moves,
    "looks up": _moves,
    "pools": _mixes,
    "along": _mixes,
    "reduces": _mixes,
    "normalises": _mixes,
}
_SPECIAL: dict[str, Callable[[Call], Any]] = {
    **PRODUCT_RULES,
    **dict.fromkeys(names_of("multiply"), _multiplied),
    "where": _chosen,
    "masked_fill": _filled,
    "prelu": _parametric,
    **dict.fromkeys(names_of("batch norm") - {"_native_batch_norm_legit"}, _normalised),
    "rms_norm": _scaled,
}
