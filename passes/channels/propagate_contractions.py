"""What becomes of channels in contractions: with constant weights, and of activations with each other.

Owns the rules for ``linear``, convolutions, products and attention, as functions of a
:class:`~srigl_fx.passes.channels.transport.Transport`. It must not know masks, values of weights, nor what is removed.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from srigl_fx.passes.channels.flow import Pairing, Site, align, padded, shape_of, tensor_count
from srigl_fx.passes.channels.groups import FIXED, compress
from srigl_fx.passes.channels.transport import Transport
from srigl_fx.passes.operators import operator_of, plain_name
from srigl_fx.passes.program import arguments

_SOFTMAX = frozenset({"softmax", "_softmax", "_safe_softmax"})


def contract(transport: Transport, node: fx.Node) -> Any:
    """The classes of what a contraction makes; None where ``node`` is none, or not of a known form."""
    name, family = plain_name(node.target), operator_of(node.target).family
    if family == "linear":
        given = arguments(node)
        return _weighted(transport, node, given["input"], given["weight"], given["bias"], -1, -1, "rows first")
    if family in {"convolution", "transposed convolution"}:
        transposed = family == "transposed convolution"
        return _convolution(transport, node, arguments(node), int(name[-2]), transposed=transposed)
    if name == "embedding":
        return _embedding(transport, node, arguments(node))
    if name == "addmm":
        given = arguments(node)
        if given["alpha"] != 1 or given["beta"] != 1 or len(shape_of(given["self"])) != 1:
            return None
        return _weighted(transport, node, given["mat1"], given["mat2"], given["self"], -1, -1, "columns first")
    if name == "einsum":
        return _einsum(transport, node)
    if family == "product":
        left, right = node.args
        assert isinstance(left, fx.Node)
        assert isinstance(right, fx.Node)
        return _product(transport, node, left, right)
    if name == "baddbmm":
        given = arguments(node)
        scores = _product(transport, node, given["batch1"], given["batch2"])
        if scores is not None and transport.is_constant(given["self"]):
            transport.adopt(given["self"], scores, node)
        elif scores is not None:
            added = align(transport.ids(given["self"]), scores.dim())
            scores = transport.join(scores, shape_of(node), added, padded(shape_of(given["self"]), scores.dim()))
        return scores
    if name == "scaled_dot_product_attention":
        return _attention(transport, node, arguments(node))
    return None


def _is_weight(transport: Transport, node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr" and transport.is_constant(node)


def _weighted(
    transport: Transport,
    node: fx.Node,
    data: fx.Node,
    weight: fx.Node,
    bias: fx.Node | None,
    axis: int,
    out_axis: int,
    layout: str,
    groups: int = 1,
) -> Tensor | None:
    """A contraction of ``axis`` of ``data`` that makes ``out_axis``, both from the end."""
    if not _is_weight(transport, weight) or data.op == "get_attr":
        return None
    channels = transport.channels
    out_shape, ids = shape_of(node), transport.ids(data)
    count = shape_of(data)[axis]
    ids = channels.merge(ids, [a for a in range(ids.dim()) if a - ids.dim() != axis])
    columns = ids.reshape(-1).expand(count).reshape(groups, -1)
    if weight.meta["val"].dtype.itemsize < 4:
        channels.pin(columns, f"another order of sums shows in {node.name}, which has few digits")
    coupled = groups > 1 and columns.shape[1] == 1 and out_shape[out_axis] == groups
    if coupled:
        rows = columns
    else:
        rows = channels.fresh(out_shape[out_axis], node.name).reshape(groups, -1)
        if groups > 1:
            whole = channels.fresh(groups, f"groups of {node.name}")
            transport.flow.hulls += [(whole, rows), (whole, columns)]
    _tie(transport, weight, rows, columns, layout)
    if bias is not None and not _is_weight(transport, bias):
        transport.adopt(bias, rows.reshape(-1), node)
        bias = None
    kernel = tensor_count(shape_of(weight)) // (rows.numel() * columns.shape[1])
    sample = [size for size in node.meta["val"].shape if isinstance(size, int)]
    places = kernel * tensor_count(sample) // rows.numel()
    transport.flow.sites.append(Site(node, weight, bias, data, axis, rows, columns, layout, coupled, places))
    shape = [1] * len(out_shape)
    shape[out_axis] = out_shape[out_axis]
    return rows.reshape(shape)


def _tie(transport: Transport, weight: fx.Node, rows: Tensor, columns: Tensor, layout: str) -> None:
    """Two uses of one weight lose the same of each of its axes."""
    axes = (rows, columns) if layout == "rows first" else (columns, rows)
    key = str(weight.target) if len(rows) == 1 else f"{weight.target} in {len(rows)} groups"
    for one, other in zip(transport.weights.setdefault(key, axes), axes, strict=True):
        if one.shape == other.shape:
            transport.channels.couple(one, other)
        else:
            for ids in (one, other):
                transport.channels.pin(ids, f"{weight.target} is read in two ways")


def _convolution(
    transport: Transport, node: fx.Node, given: dict[str, Any], spatial: int, *, transposed: bool
) -> Tensor | None:
    axis = -1 - spatial
    layout = "groups and columns first" if transposed else "rows first"
    return _weighted(
        transport, node, given["input"], given["weight"], given["bias"], axis, axis, layout, given["groups"]
    )


def _embedding(transport: Transport, node: fx.Node, given: dict[str, Any]) -> Tensor | None:
    weight = given["weight"]
    if not _is_weight(transport, weight):
        return None
    transport.pin_others(node, weight)
    entries, width = shape_of(weight)
    rows = transport.channels.fresh(width, node.name)[None]
    columns = torch.full((1, entries), FIXED)
    _tie(transport, weight, rows, columns, "columns first")
    transport.flow.sites.append(Site(node, weight, None, None, -1, rows, columns, "columns first"))
    return align(rows.reshape(-1), len(shape_of(node)))


def _einsum(transport: Transport, node: fx.Node) -> Tensor | None:
    """An einsum with a matrix that is a linear layer on the last axis of the data, or None."""
    given = arguments(node)
    terms, _, result = given["equation"].replace(" ", "").partition("->")
    pairs = list(zip(terms.split(","), given["tensors"], strict=True))
    if len(pairs) != 2 or pairs[0][1] is pairs[1][1]:
        return None
    for (matrix, weight), (letters, data) in (pairs, pairs[::-1]):
        summed = letters[-1:]
        made = matrix.replace(summed, "")
        linear = matrix.isalpha() and len(matrix) == 2 and len(made) == 1 and made not in letters
        if linear and letters.count(summed) == 1 and result == letters[:-1] + made and _is_weight(transport, weight):
            layout = "columns first" if matrix[0] == summed else "rows first"
            return _weighted(transport, node, data, weight, None, -1, -1, layout)
    return None


def _product(transport: Transport, node: fx.Node, left: fx.Node, right: fx.Node) -> Tensor | None:
    if _is_weight(transport, right) and len(shape_of(right)) == 2 and len(shape_of(left)) >= 2:
        return _weighted(transport, node, left, right, None, -1, -1, "columns first")
    shapes = shape_of(left), shape_of(right)
    if min(map(len, shapes)) < 2 or (left.op == "get_attr" and right.op == "get_attr"):
        return None
    rank = len(shape_of(node))
    if left.op == "get_attr" or right.op == "get_attr":
        return None
    channels = transport.channels
    one, other = align(transport.ids(left), rank), align(transport.ids(right), rank)
    batch = list(range(rank - 2))
    if one.shape[-2] > 1 and (one.shape[-1] > 1 or other.shape[-1] > 1):
        one = channels.merge(one, [rank - 2])
    if other.shape[-1] > 1 and other.shape[-2] > 1:
        other = channels.merge(other, [rank - 1])
    if one.shape[-1] > 1 or other.shape[-2] > 1:
        if one.shape[-2] > 1 or other.shape[-1] > 1:
            one, other = channels.merge(one, [rank - 2]), channels.merge(other, [rank - 1])
        channels.couple(one, other.transpose(-1, -2))
        members = one if one.numel() >= other.numel() else other.transpose(-1, -2)
        return _paired(transport, node, (left, right), (-1, -2), members.squeeze(-2), softmax=_reaches_softmax(node))
    # Nothing is summed over channels: the classes of one side pass, those of the other follow along the batch axes.
    passing, outer = (other, one) if other.shape[-1] > 1 else (one, other)
    passing_shape, outer_shape = (shapes[1], shapes[0]) if other.shape[-1] > 1 else shapes
    if passing.shape[-1] == passing.shape[-2] == 1:
        return (
            transport.join(one, [*shapes[0][:-2], 1, 1], other, [*shapes[1][:-2], 1, 1])
            if len(shapes[0]) == len(shapes[1])
            else _pinned(transport, one, other)
        )
    if all(passing.shape[axis] == outer.shape[axis] == 1 for axis in batch):
        return passing
    if len(passing_shape) != rank or len(outer_shape) != rank:
        return _pinned(transport, one, other)
    if any(
        passing_shape[axis] != outer_shape[axis] for axis in batch if max(passing.shape[axis], outer.shape[axis]) > 1
    ):
        return _pinned(transport, one, other)
    _follow(transport, outer, passing)
    return passing


def _pinned(transport: Transport, *values: Tensor) -> Tensor:
    for ids in values:
        transport.channels.pin(ids, "a product of activations broadcasts over it")
    return torch.full((1,) * values[0].dim(), FIXED)


def _paired(
    transport: Transport,
    node: fx.Node,
    operands: tuple[fx.Node, fx.Node],
    axes: tuple[int, int],
    members: Tensor,
    *,
    softmax: bool,
) -> Tensor:
    """A product summed over channels; the classes of its outer axes: one goes exactly if all its channels go."""
    matrix = members.reshape(-1, members.shape[-1]).numpy()
    rows, inverse = map(torch.from_numpy, np.unique(matrix, axis=0, return_inverse=True))
    whole = transport.channels.fresh(len(rows), f"outer axes of {node.name}")
    transport.flow.hulls.append((whole, rows))
    transport.flow.pairings.append(Pairing(node, *operands, *axes, softmax, whole, rows))
    return whole[inverse].reshape(*members.shape[:-1], 1, 1)


def _follow(transport: Transport, outer: Tensor, inner: Tensor) -> None:
    """Along all axes but the last two: each of ``outer`` goes exactly if all of ``inner`` at its place go."""
    lead = np.broadcast_shapes(outer.shape[:-2], inner.shape[:-2])
    members = inner.expand(*lead, -1, -1).reshape(-1, inner.shape[-2] * inner.shape[-1])
    owners = outer.expand(*lead, -1, -1).reshape(len(members), -1)
    owners = transport.channels.merge(owners, [1])
    pairs = torch.from_numpy(np.unique(torch.cat([owners, members], 1).numpy(), axis=0))
    transport.flow.hulls.append((pairs[:, 0], pairs[:, 1:]))


def _attention(transport: Transport, node: fx.Node, given: dict[str, Any]) -> Tensor | None:
    query, key, value = given["query"], given["key"], given["value"]
    if any(operand.op == "get_attr" for operand in (query, key, value)):
        return None
    channels, rank = transport.channels, len(shape_of(query))
    if rank < 3 or len(shape_of(key)) != rank or len(shape_of(value)) != rank:
        return None
    q, k, v = (channels.merge(transport.ids(operand), [rank - 2]) for operand in (query, key, value))
    shape = shape_of(query)
    heads = shape[-3]
    repeats = heads // shape_of(key)[-3]
    if repeats > 1:
        k, v = (_repeat_heads(ids, shape_of(key)[-3], repeats) for ids in (k, v))
    channels.couple(q, k)
    members = (q if q.numel() >= k.numel() else k).squeeze(-2)
    whole = _paired(transport, node, (query, key), (-1, -1), members, softmax=True)
    _follow(transport, whole, v)
    if isinstance(given["attn_mask"], fx.Node):
        mask = given["attn_mask"]
        if transport.is_constant(mask):
            transport.adopt(mask, whole, node)
        else:
            ids = align(transport.ids(mask), rank)
            if ids.shape[-1] > 1 or ids.shape[-2] > 1:
                channels.pin(ids, f"it is a mask of {node.name}")
            transport.join(whole, [*shape[:-2], 1, 1], ids, padded(shape_of(mask), rank))
    return v


def _repeat_heads(ids: Tensor, heads: int, repeats: int) -> Tensor:
    sizes = [-1] * ids.dim()
    sizes[-3] = heads
    return compress(ids.expand(sizes).repeat_interleave(repeats, -3))


def _reaches_softmax(node: fx.Node) -> bool:
    """Whether scores go into a softmax over their last axis only, at most scaled and shifted on the way."""
    for user in node.users:
        name, family = plain_name(user.target), operator_of(user.target).family
        if name in _SOFTMAX:
            if arguments(user)["dim"] not in (-1, len(shape_of(node)) - 1):
                return False
        elif family in {"multiply", "add"} or name == "clone":
            others = [a for a in user.all_input_nodes if a is not node]
            if user.kwargs.get("alpha", 1) == 0 or (user.args[0] is not node and "div" in name):
                return False
            if family != "add" and any(shape_of(a) not in ([], [1]) for a in others):
                return False
            if shape_of(user) != shape_of(node) or not _reaches_softmax(user):
                return False
        else:
            return False
    return bool(node.users)
