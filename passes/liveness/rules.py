"""How one operator passes on what is live: which elements of its result depend on live elements of its operands.

Owns the table of rules, and those of operators other than contractions. It must not know graphs, masks or what is done
with the answer. An element is live if it may depend on an input of the model. The rules err on the live side only,
under one assumption: activations are finite, so that zero times anything is zero.

With L(x) for what is live in x:

1. What draws random numbers, or leaves memory as it finds it, is live always.
2. Without a live operand nothing is live; nor is it where only shapes and types of operands count.
3. There is no rule for a number that depends on an input (a fill value, a size), nor for complex values.
4. Element by element, and for copies: L(y) is the union of L over the operands, broadcast.
5. Zero times anything is zero: L(a b) = (L(a) or L(b)) and neither a nor b known to be zero; of a / b, only a counts.
6. ``where(c, a, b)`` takes what is live from the branch it takes: L(c) or where(c, L(a), L(b)).
7. ``masked_fill(x, m, v)`` hides what m covers: L(m) or (L(x) and not m).
8. ``prelu`` has L of its data, if its weight is known.
9. What moves elements moves L: it is applied to NaNs in their places, y' = op(NaN where L(x), else 0), and y is live
   where y' is NaN. So no operator's way to move has to be written down here.
10. What mixes elements is applied to x with NaNs where L(x), the known elements keeping their values: arithmetic makes
    NaN of all that a NaN goes into.
11. What may hide a NaN (it sorts, or passes over NaNs) mixes all along the axes it names: L(y) = any L(x) along them.
12. A batch norm with stored statistics is element by element; a scale of zero leaves the shift, which is known.
13. ``rms_norm`` is x gain / sqrt(mean of x^2 + eps), without a shift: zero stays zero; any other element is live as
    soon as one of its row is.
14. Contractions and attention have their rules in :mod:`srigl_fx.passes.liveness.products`.
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
    if (torch.Tag.nondeterministic_seeded in call.op.tags and not _is_off(call)) or "empty" in call.name:  # rule 1
        return True
    row = operator_of(call.op)
    shapes_alone = row.family in {"like", "filled", "new"} or row.does == "measures"
    if not any_live(call.live) or (shapes_alone and call.only(*_data(call))):  # rule 2
        return False
    # Rule 3.
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
    if row.does != "unknown" and call.name in _SPECIAL:  # rules 5 to 8 and 12 to 14, before those of its kind
        return _SPECIAL[call.name]
    if row.does in {"along", "reduces"} and row.hides_nan:  # rule 11: NaNs would not show
        return _over_axes
    return _BY_KIND.get(row.does)


def _pointwise(call: Call) -> Live:
    """Rule 4."""
    if not isinstance(call.out, Tensor):
        return True
    union: Live = False
    for name, live in call.live.items():
        for leaf, value in zip(pytree.tree_leaves(live), pytree.tree_leaves(call.given[name]), strict=True):
            if leaf is None or leaf is False or not isinstance(value, Tensor):
                continue
            # An operand that does not broadcast to the result (it is copied into it, say) may be anywhere in it.
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
    """Rule 5."""
    zero = _zero(call, "self")
    if call.name in {"mul", "multiply"}:
        zero = zero | _zero(call, "other")
    union = _pointwise(call)
    return spread(union, call.out) & ~zero if bool(zero.any()) else union


def _chosen(call: Call) -> Live:
    """Rule 6."""
    if call.live["condition"] is True:
        return True
    condition, one, other = (torch.as_tensor(call.live[name]) for name in ("condition", "self", "other"))
    return condition | torch.where(call.given["condition"], one, other)


def _filled(call: Call) -> Live:
    """Rule 7."""
    if not call.only("self", "mask"):  # it fills with something that depends on an input
        return True
    mask: Tensor = call.given["mask"]
    return spread(call.live["mask"], mask) | (spread(call.live["self"], call.given["self"]) & ~mask)


def _parametric(call: Call) -> Live:
    """Rule 8; its weight lies along dimension 1, and so does not broadcast as rule 4 has it."""
    return spread(call.live["self"], call.given["self"]) if call.only("self") else True


def _moves(call: Call) -> Any:
    """Rule 9."""
    names = _data(call)
    if not call.only(*names):  # where they go depends on an input, as with indices that are computed
        return True
    marked = {name: pytree.tree_map(_mark, call.given[name], call.live[name]) for name in names}
    return _not_a_number(call.op(**{**call.given, **marked}))


def _mixes(call: Call) -> Any:
    """Rule 10."""
    names = _data(call)
    values = list(tensors_in([call.given[name] for name in names]))
    counts = call.given.get("ord") == 0 or call.given.get("p") == 0  # the norm that counts takes a NaN for a number
    if counts or not call.only(*names) or not all(value.is_floating_point() for value in values):  # no NaN in integers
        return True
    marked = {name: pytree.tree_map(_poison, call.given[name], call.live[name]) for name in names}
    return _not_a_number(call.op(**{**call.given, **marked}))


def _over_axes(call: Call) -> Any:
    """Rule 11."""
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
    """Rule 12."""
    if not call.only("input") or call.given.get("training"):  # statistics of the batch mix all samples
        return True
    value, live = call.given["input"], call.live["input"]
    scale = call.given["weight"]
    if scale is not None and bool((scale == 0).any()):
        live = spread(live, value) & (scale != 0).view(-1, *[1] * (value.dim() - 2))
    # Beside the result, some overloads give statistics that serve a backward: those in use are stored, so known.
    return live if isinstance(call.out, Tensor) else (live, *[False] * (len(call.out) - 1))


def _scaled(call: Call) -> Live:
    """Rule 13."""
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
