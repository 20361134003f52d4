"""How contractions and attention pass on what is live.

Owns the rules of sums of products, where zeros count, and of weighted means, where equal terms do. It must not know
other operators, nor graphs.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from srigl_fx.passes.liveness.values import Call, Live, any_live, spread
from srigl_fx.passes.operators import names_of


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
    if any_live(call.live["weight"]):
        out = _bilinear(F.linear, x, live, weight, call.live["weight"])
    elif live is True:
        out = (weight != 0).any(-1)
    else:
        out = _bilinear(F.linear, *_one_sample(x, live), weight, False)
    return _plus(out, call, "bias")


def _one_sample(value: Tensor, live: Live) -> tuple[Tensor, Live]:
    """One sample for all where they do not differ in what is live."""
    same = isinstance(live, bool) or live.dim() < value.dim() or live.shape[0] == 1
    return (value[:1], live) if same and value.dim() > 1 else (value, live)


def _convolution(call: Call) -> Live:
    x, live, weight = call.given["input"], call.live["input"], call.given["weight"]
    space = weight.dim() - 2
    whole = isinstance(live, bool) or all(size == 1 for size in (*live.shape[: -1 - space], *live.shape[-space:]))
    if any_live(call.live["weight"]) or call.out.dim() != weight.dim() or not whole:
        settings = {name: value for name, value in call.given.items() if name not in {"input", "weight", "bias"}}

        def convolve(one: Tensor, other: Tensor) -> Tensor:
            return call.op(input=one, weight=other, bias=None, **settings)  # type: ignore[no-any-return]

        if not any_live(call.live["weight"]) and call.out.dim() == weight.dim():
            x, live = _one_sample(x, live)
        out = _bilinear(convolve, x, live, weight, call.live["weight"])
    else:
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
