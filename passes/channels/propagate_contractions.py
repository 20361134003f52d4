"""What becomes of channels in contractions: with constant weights, and of activations with each other.

Owns the rules for ``linear``, convolutions, products, attention and rows that are looked up; which family follows which
rule stands in :mod:`srigl_fx.passes.channels.rules`. It must not know masks, values of weights, nor what is removed.

1. A constant weight reads columns and makes rows: the labels along the channel axis of the data become the columns, and
   the rows are new labels. Other axes of the data go through as one each: a channel goes at all places or at none.
2. In groups, columns and rows of a group are equally many for all groups that stay, and a group goes as a whole. Where
   each group has one column and one row of its own (depthwise), the row is the column's.
3. A weight that is read twice loses the same of its axes both times.
4. Rows that are looked up are one channel for each column of the table; its entries stay.
5. A product of activations summed over channels (queries and keys) couples those of both; along its outer axes (heads),
   an index goes exactly if all its channels go.
6. A product of activations summed over anything else (positions) lets the channels of one side through; the other side
   goes, along its outer axes, exactly if all that it is multiplied with goes.
7. Attention is rule 5 for queries and keys, and rule 6 for scores and values.
8. What is added to scores follows their outer axes.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from srigl_fx.passes.channels.coupling import FIXED, compress
from srigl_fx.passes.channels.flow import Pairing, Site
from srigl_fx.passes.channels.propagate import Propagation
from srigl_fx.passes.channels.shapes import align, padded, shape_of, tensor_count
from srigl_fx.passes.operators import operator_of, plain_name
from srigl_fx.passes.program import arguments

_SOFTMAX = frozenset({"softmax", "_softmax", "_safe_softmax"})


def linear(propagation: Propagation, node: fx.Node) -> Tensor | None:
    """Rule 1, along the last axis."""
    given = arguments(node)
    return _weighted(propagation, node, given["input"], given["weight"], given["bias"], -1, -1, "rows first")


def convolution(propagation: Propagation, node: fx.Node) -> Tensor | None:
    """Rules 1 and 2, along the axis in front of those of the kernel."""
    given = arguments(node)
    axis = 1 - len(shape_of(given["weight"]))
    transposed = operator_of(node.target).family == "transposed convolution"
    layout = "groups and columns first" if transposed else "rows first"
    return _weighted(
        propagation, node, given["input"], given["weight"], given["bias"], axis, axis, layout, given["groups"]
    )


def product(propagation: Propagation, node: fx.Node) -> Tensor | None:
    """Rule 1 with a constant matrix on the right, else rule 5 or 6."""
    left, right = node.args
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)
    return _product(propagation, node, left, right)


def sum_of_products(propagation: Propagation, node: fx.Node) -> Tensor | None:
    """Rule 1 with a bias (``addmm``), or rule 8 (``baddbmm``)."""
    given = arguments(node)
    if plain_name(node.target) == "addmm":
        if given["alpha"] != 1 or given["beta"] != 1 or len(shape_of(given["self"])) != 1:
            return None
        return _weighted(propagation, node, given["mat1"], given["mat2"], given["self"], -1, -1, "columns first")
    scores = _product(propagation, node, given["batch1"], given["batch2"])
    if scores is not None and propagation.is_constant(given["self"]):
        propagation.adopt(given["self"], scores, node)
    elif scores is not None:
        added = align(propagation.labels(given["self"]), scores.dim())
        scores = propagation.join(scores, shape_of(node), added, padded(shape_of(given["self"]), scores.dim()))
    return scores


def _is_weight(propagation: Propagation, node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr" and propagation.is_constant(node)


def _weighted(
    propagation: Propagation,
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
    if not _is_weight(propagation, weight) or data.op == "get_attr":
        return None
    channels = propagation.channels
    out_shape, labels = shape_of(node), propagation.labels(data)
    count = shape_of(data)[axis]
    labels = channels.merge(labels, [a for a in range(labels.dim()) if a - labels.dim() != axis])
    columns = labels.reshape(-1).expand(count).reshape(groups, -1)
    if weight.meta["val"].dtype.itemsize < 4:  # sums of fewer terms round differently
        channels.pin(columns, f"another order of sums shows in {node.name}, which has few digits")
    coupled = groups > 1 and columns.shape[1] == 1 and out_shape[out_axis] == groups
    if coupled:  # rule 2, depthwise
        rows = columns
    else:  # rule 1
        rows = channels.fresh(out_shape[out_axis], node.name).reshape(groups, -1)
        if groups > 1:  # rule 2: a group is either read and made, or neither
            whole = channels.fresh(groups, f"groups of {node.name}")
            propagation.flow.hulls += [(whole, rows), (whole, columns)]
    _tie(propagation, weight, rows, columns, layout)
    if bias is not None and not _is_weight(propagation, bias):  # computed: it is added like any other value
        propagation.adopt(bias, rows.reshape(-1), node)
        bias = None
    kernel = tensor_count(shape_of(weight)) // (rows.numel() * columns.shape[1])
    sample = [size for size in node.meta["val"].shape if isinstance(size, int)]
    places = kernel * tensor_count(sample) // rows.numel()
    propagation.flow.sites.append(Site(node, weight, bias, data, axis, rows, columns, layout, coupled, places))
    shape = [1] * len(out_shape)
    shape[out_axis] = out_shape[out_axis]
    return rows.reshape(shape)


def _tie(propagation: Propagation, weight: fx.Node, rows: Tensor, columns: Tensor, layout: str) -> None:
    """Rule 3."""
    axes = (rows, columns) if layout == "rows first" else (columns, rows)
    key = str(weight.target) if len(rows) == 1 else f"{weight.target} in {len(rows)} groups"
    for one, other in zip(propagation.weights.setdefault(key, axes), axes, strict=True):
        if one.shape == other.shape:
            propagation.channels.couple(one, other)
        else:
            for labels in (one, other):
                propagation.channels.pin(labels, f"{weight.target} is read in two ways")


def lookup(propagation: Propagation, node: fx.Node) -> Tensor | None:
    """Rule 4."""
    weight = arguments(node)["weight"]
    if not _is_weight(propagation, weight):
        return None
    propagation.pin_others(node, weight)
    entries, width = shape_of(weight)
    rows = propagation.channels.fresh(width, node.name)[None]
    columns = torch.full((1, entries), FIXED)
    _tie(propagation, weight, rows, columns, "columns first")
    propagation.flow.sites.append(Site(node, weight, None, None, -1, rows, columns, "columns first"))
    return align(rows.reshape(-1), len(shape_of(node)))


def einsum(propagation: Propagation, node: fx.Node) -> Tensor | None:
    """Rule 1, where one operand is a matrix and the equation a linear layer on the last axis of the other."""
    given = arguments(node)
    terms, _, result = given["equation"].replace(" ", "").partition("->")
    pairs = list(zip(terms.split(","), given["tensors"], strict=True))
    if len(pairs) != 2 or pairs[0][1] is pairs[1][1]:
        return None
    for (matrix, weight), (letters, data) in (pairs, pairs[::-1]):
        summed = letters[-1:]
        made = matrix.replace(summed, "")
        linear = matrix.isalpha() and len(matrix) == 2 and len(made) == 1 and made not in letters
        if linear and letters.count(summed) == 1 and result == letters[:-1] + made and _is_weight(propagation, weight):
            layout = "columns first" if matrix[0] == summed else "rows first"
            return _weighted(propagation, node, data, weight, None, -1, -1, layout)
    return None


def _product(propagation: Propagation, node: fx.Node, left: fx.Node, right: fx.Node) -> Tensor | None:
    if _is_weight(propagation, right) and len(shape_of(right)) == 2 and len(shape_of(left)) >= 2:
        return _weighted(propagation, node, left, right, None, -1, -1, "columns first")
    shapes = shape_of(left), shape_of(right)
    if min(map(len, shapes)) < 2 or (left.op == "get_attr" and right.op == "get_attr"):
        return None
    rank = len(shape_of(node))
    if left.op == "get_attr" or right.op == "get_attr":
        return None
    channels = propagation.channels
    # The free axes of the two come to stand across each other in the result. Where an operand has channels along both
    # of its last axes, or the other has some along its free axis too, those of the free axis become one.
    one, other = align(propagation.labels(left), rank), align(propagation.labels(right), rank)
    batch = list(range(rank - 2))
    if one.shape[-2] > 1 and (one.shape[-1] > 1 or other.shape[-1] > 1):
        one = channels.merge(one, [rank - 2])
    if other.shape[-1] > 1 and other.shape[-2] > 1:
        other = channels.merge(other, [rank - 1])
    if one.shape[-1] > 1 or other.shape[-2] > 1:  # rule 5
        if one.shape[-2] > 1 or other.shape[-1] > 1:
            one, other = channels.merge(one, [rank - 2]), channels.merge(other, [rank - 1])
        channels.couple(one, other.transpose(-1, -2))
        members = one if one.numel() >= other.numel() else other.transpose(-1, -2)
        return _paired(propagation, node, (left, right), (-1, -2), members.squeeze(-2), softmax=_reaches_softmax(node))
    # Rule 6: nothing is summed over channels. The labels of one side pass; the other may have some along outer axes.
    passing, outer = (other, one) if other.shape[-1] > 1 else (one, other)
    passing_shape, outer_shape = (shapes[1], shapes[0]) if other.shape[-1] > 1 else shapes
    if passing.shape[-1] == passing.shape[-2] == 1:  # channels along outer axes only: a product index by index there
        return (
            propagation.join(one, [*shapes[0][:-2], 1, 1], other, [*shapes[1][:-2], 1, 1])
            if len(shapes[0]) == len(shapes[1])
            else _pinned(propagation, one, other)
        )
    if all(passing.shape[axis] == outer.shape[axis] == 1 for axis in batch):
        return passing
    if len(passing_shape) != rank or len(outer_shape) != rank:
        return _pinned(propagation, one, other)
    if any(
        passing_shape[axis] != outer_shape[axis] for axis in batch if max(passing.shape[axis], outer.shape[axis]) > 1
    ):
        return _pinned(propagation, one, other)
    _follow(propagation, outer, passing)
    return passing


def _pinned(propagation: Propagation, *values: Tensor) -> Tensor:
    for labels in values:
        propagation.channels.pin(labels, "a product of activations broadcasts over it")
    return torch.full((1,) * values[0].dim(), FIXED)


def _paired(
    propagation: Propagation,
    node: fx.Node,
    operands: tuple[fx.Node, fx.Node],
    axes: tuple[int, int],
    members: Tensor,
    *,
    softmax: bool,
) -> Tensor:
    """Rule 5: a label for each different row of ``members``, which goes exactly if all of the row go."""
    matrix = members.reshape(-1, members.shape[-1]).numpy()
    rows, inverse = map(torch.from_numpy, np.unique(matrix, axis=0, return_inverse=True))
    whole = propagation.channels.fresh(len(rows), f"outer axes of {node.name}")
    propagation.flow.hulls.append((whole, rows))
    propagation.flow.pairings.append(Pairing(node, *operands, *axes, softmax, whole, rows))
    return whole[inverse].reshape(*members.shape[:-1], 1, 1)


def _follow(propagation: Propagation, outer: Tensor, inner: Tensor) -> None:
    """Rule 6, along all axes but the last two: each of ``outer`` goes exactly if all of ``inner`` at its place go."""
    lead = np.broadcast_shapes(outer.shape[:-2], inner.shape[:-2])
    members = inner.expand(*lead, -1, -1).reshape(-1, inner.shape[-2] * inner.shape[-1])
    owners = outer.expand(*lead, -1, -1).reshape(len(members), -1)
    owners = propagation.channels.merge(owners, [1])
    pairs = torch.from_numpy(np.unique(torch.cat([owners, members], 1).numpy(), axis=0))
    propagation.flow.hulls.append((pairs[:, 0], pairs[:, 1:]))


def attention(propagation: Propagation, node: fx.Node) -> Tensor | None:
    """Rule 7; a mask is rule 8."""
    given = arguments(node)
    query, key, value = given["query"], given["key"], given["value"]
    if any(operand.op == "get_attr" for operand in (query, key, value)):
        return None
    channels, rank = propagation.channels, len(shape_of(query))
    if rank < 3 or len(shape_of(key)) != rank or len(shape_of(value)) != rank:
        return None
    q, k, v = (channels.merge(propagation.labels(operand), [rank - 2]) for operand in (query, key, value))
    shape = shape_of(query)
    heads = shape[-3]
    repeats = heads // shape_of(key)[-3]
    if repeats > 1:  # one head of keys and values serves several heads of queries
        k, v = (_repeat_heads(labels, shape_of(key)[-3], repeats) for labels in (k, v))
    channels.couple(q, k)
    members = (q if q.numel() >= k.numel() else k).squeeze(-2)
    whole = _paired(propagation, node, (query, key), (-1, -1), members, softmax=True)
    _follow(propagation, whole, v)
    if isinstance(given["attn_mask"], fx.Node):
        mask = given["attn_mask"]
        if propagation.is_constant(mask):  # rule 8
            propagation.adopt(mask, whole, node)
        else:  # rule 8: positions of a mask that is computed stay, whatever gives them channels
            labels = align(propagation.labels(mask), rank)
            if labels.shape[-1] > 1 or labels.shape[-2] > 1:
                channels.pin(labels, f"it is a mask of {node.name}")
            propagation.join(whole, [*shape[:-2], 1, 1], labels, padded(shape_of(mask), rank))
    return v


def _repeat_heads(labels: Tensor, heads: int, repeats: int) -> Tensor:
    sizes = [-1] * labels.dim()
    sizes[-3] = heads
    return compress(labels.expand(sizes).repeat_interleave(repeats, -3))


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
