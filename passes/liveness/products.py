"""How contractions and attention pass on what is live.

Owns the rules of sums of products, where zeros count, and of weighted means, where equal terms do. It must not know
other operators, nor graphs.

With L(a) for what is live in a, as a table of 0 and 1:

1. A term of a sum of products is live if one factor is live and the other is not known to be zero. For y = a b::

       L(y)  =  L(a) (b != 0 or L(b))  +  (a != 0 or L(a)) L(b)  >  0

   The operator that multiplies a and b (a product, an einsum, a convolution) multiplies the tables.
2. ``linear`` of an input that is live all over: row o of y is live if any W[o, c] != 0. No product is needed.
3. A convolution of whole channels that are live or not: channel o is live if, for some live channel c, W[o, c] has a
   tap that is not zero. Where the input differs from place to place, rule 1 is applied to the convolution itself.
4. What is added adds what is live in it: L(y + b) = L(y) or L(b).
5. A weighted mean of equal numbers is that number: sum over j of p[i, j] v = v, if sum over j of p[i, j] = 1. So the
   columns of b that are known and equal in all rows stay known in p b, whatever p is.
6. Attention is such a mean of the values' rows, whatever queries and keys are. A query that sees no key gets zero from
   torch, no mean: where that may happen, only values that are zero stay known.
7. Of an einsum of any other number of operands than two, all is live.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from srigl_fx.passes.liveness.values import Call, Live, any_live, spread
from srigl_fx.passes.operators import names_of


def _bilinear(multiply: Callable[[Tensor, Tensor], Tensor], a: Tensor, live_a: Live, b: Tensor, live_b: Live) -> Live:
    """Rule 1."""
    parts = []
    if live_a is not False:
        parts.append((spread(live_a, a), (b != 0) | spread(live_b, b)))
    if live_b is not False:
        parts.append(((a != 0) | spread(live_a, a), spread(live_b, b)))
    # Each element counts its live terms, as there are no products of booleans: a half, since sums may be rounded.
    return sum(multiply(one.float(), other.float()) for one, other in parts) > 0.5


def _plus(live: Live, call: Call, addend: str, trailing: int = 0) -> Live:
    """Rule 4: ``live``, and where the addend is, which has that many dimensions of size 1 behind it."""
    value, more = call.given[addend], call.live[addend]
    if more is False or more is None:
        return live
    return live | spread(more, value).view(*value.shape, *[1] * trailing)


def _linear(call: Call) -> Live:
    x, live, weight = call.given["input"], call.live["input"], call.given["weight"]
    if any_live(call.live["weight"]):  # rule 1: the weight is computed from an input
        out = _bilinear(F.linear, x, live, weight, call.live["weight"])
    elif live is True:  # rule 2
        out = (weight != 0).any(-1)
    else:  # rule 1, with a weight that is known
        out = _bilinear(F.linear, *_one_sample(x, live), weight, False)
    return _plus(out, call, "bias")


def _one_sample(value: Tensor, live: Live) -> tuple[Tensor, Live]:
    """One sample for all where they do not differ in what is live."""
    same = isinstance(live, bool) or live.dim() < value.dim() or live.shape[0] == 1
    return (value[:1], live) if same and value.dim() > 1 else (value, live)


def _convolution(call: Call) -> Live:
    x, live, weight = call.given["input"], call.live["input"], call.given["weight"]
    space = weight.dim() - 2
    # Whether samples and places say the same: then channels tell all.
    whole = isinstance(live, bool) or all(size == 1 for size in (*live.shape[: -1 - space], *live.shape[-space:]))
    if any_live(call.live["weight"]) or call.out.dim() != weight.dim() or not whole:  # rule 1
        settings = {name: value for name, value in call.given.items() if name not in {"input", "weight", "bias"}}

        def convolve(one: Tensor, other: Tensor) -> Tensor:
            return call.op(input=one, weight=other, bias=None, **settings)  # type: ignore[no-any-return]

        # A convolution also takes one sample without a batch axis, whose first axis is the channels'.
        if not any_live(call.live["weight"]) and call.out.dim() == weight.dim():
            x, live = _one_sample(x, live)
        out = _bilinear(convolve, x, live, weight, call.live["weight"])
    else:  # rule 3
        out = _by_channel(call, spread(live, x[:1])[0].flatten(1).any(1), weight).view(-1, *[1] * space)
    return _plus(out, call, "bias", space)


def _by_channel(call: Call, live: Tensor, weight: Tensor) -> Tensor:
    """The output channels that read a live input channel, wherever in the kernel."""
    groups = call.given["groups"]
    reads = (weight != 0).flatten(2).any(2)
    if "transpose" in call.name or call.given.get("transposed"):  # (in, out / groups)
        return (reads.view(groups, -1, reads.shape[1]) & live.view(groups, -1, 1)).any(1).flatten()
    return (reads.view(groups, -1, reads.shape[1]) & live.view(groups, 1, -1)).any(2).flatten()


def _product(call: Call) -> Live:
    """Products of two tensors: rule 1 and, where the left one's rows are weights of a mean, rule 5."""
    names = [argument.name for argument in call.op._schema.arguments[:2]]
    (a, live_a), (b, live_b) = ((call.given[name], call.live[name]) for name in names)
    live = True if live_a is True and live_b is True else _bilinear(call.op, a, live_a, b, live_b)  # rule 1
    if not call.weighted_mean or min(a.dim(), b.dim()) < 2:  # of a vector, torch sums over the only axis
        return live
    # Rule 5.
    constant = _equal_rows(b, live_b)
    return spread(live, call.out) & ~constant if bool(constant.any()) else live


def _equal_rows(value: Tensor, live: Live) -> Tensor:
    """The columns that are known and equal in all rows, as (..., 1, columns)."""
    known = ~spread(live, value).any(-2, keepdim=True)
    return known & (value == value[..., :1, :]).all(-2, keepdim=True)


def _sum_of_products(call: Call) -> Live:
    """``addmm`` and ``baddbmm``: rules 1 and 4, whatever the two are scaled by."""
    names = [argument.name for argument in call.op._schema.arguments[1:3]]
    (a, live_a), (b, live_b) = ((call.given[name], call.live[name]) for name in names)
    return _plus(_bilinear(torch.matmul, a, live_a, b, live_b), call, "self")


def _einsum(call: Call) -> Live:
    """Rule 1 of two operands, else rule 7."""
    tensors, lives = call.given["tensors"], call.live["tensors"]
    if len(tensors) != 2:
        return True
    equation = call.given["equation"]
    return _bilinear(lambda a, b: torch.einsum(equation, a, b), tensors[0], lives[0], tensors[1], lives[1])


def _attention(call: Call) -> Live:
    """Rule 6: a value channel that is equal at all positions stays."""
    if not call.only("query", "key", "value", "attn_mask"):  # such as a scale or a dropout that is computed
        return True
    value = call.given["value"]
    constant = _equal_rows(value, call.live["value"])
    if not _sees_something(call):
        constant = constant & (value[..., :1, :] == 0)
    # With grouped queries, one head of the values serves several neighbouring heads of the result.
    heads = call.out.dim() - 3
    if call.given["enable_gqa"] and value.shape[heads] != call.out.shape[heads]:
        constant = constant.repeat_interleave(call.out.shape[heads] // value.shape[heads], heads)
    return ~constant.expand(call.out.shape)


def _sees_something(call: Call) -> bool:
    """Whether every query is known to see a key."""
    mask = call.given["attn_mask"]
    if mask is None:  # a causal mask alone shows every query the first key
        return True
    # Of a mask that depends on an input nothing is known; a causal one beside another may hide what that shows.
    if any_live(call.live["attn_mask"]) or call.given["is_causal"]:
        return False
    seen = mask if mask.dtype == torch.bool else mask > -torch.inf
    return bool(seen.any(-1).all())


PRODUCT_RULES: dict[str, Callable[[Call], Live]] = {
    **dict.fromkeys(names_of("convolution", "transposed convolution", "any convolution"), _convolution),
    **dict.fromkeys(names_of("product", "vector product"), _product),
    "linear": _linear,
    "addmm": _sum_of_products,
    "baddbmm": _sum_of_products,
    "einsum": _einsum,
    "scaled_dot_product_attention": _attention,
}
"""The rules by the operators' names."""
