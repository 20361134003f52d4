"""Which results may change with the batch size, although no input does.

Owns the question for one node of a graph, answered by the axes whose size in its metadata is symbolic. It must not know
values, nor what is live. A size is no element: ``B`` as a number, and what is summed over ``B`` samples, are right for
the sizes they were tried at and no other.

With B for the batch size, as export writes it into the metadata, a result depends on it:

1. if a size is computed with: it is an operand (``x * B``), and not only a size of the result (``reshape(x, [B])``).
   Of what fills, the number that it fills with counts; of a slice, its borders, but along an axis of samples;
2. never, without an operand that has a batch axis;
3. of ``einsum``, if a letter at a batch axis is not in the result: it is summed over;
4. of products, if the last axis of the left factor, which is summed over, is a batch axis;
5. of attention, if an axis of positions or channels is: keys are summed over, and so is what queries share with keys;
6. of a batch norm, if it takes statistics of the batch;
7. of parts and of selections by number, if they are of an axis that merges samples with others (B * 3): which sample an
   element belongs to changes with B there;
8. never, where elements keep to themselves: element by element, moved, padded, looked up, created;
9. if an axis is named that elements meet along, and it is a batch axis; of a layer norm, if one of its last axes is;
10. where no axis is named, unless the batch is the first axis of all operands, and each result has it still: that is
    what operators do that treat samples one by one.

Reshapes are told of apart, since it is a matter of values whether they mix samples (``regrouped_axes``):

11. (o, B, i) -> (o, B, i') keeps each sample's elements together in as many outer places: nothing is mixed; nor is it
    where there are several batch axes, as of samples and their tokens, with as many places between them as before.
12. (o, B, i) -> (k B, j), with k j a multiple of i: what repeats with a period of i still does, so that all needs only
    be the same along the axes up to the batch axis.
13. (o, B, T, i) -> (o B T, i) and back: what is the same for all samples and tokens stays so, however they are merged.
14. After any other reshape, all elements must be the same.
"""

import math
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from srigl_fx.passes.operators import Operator, operator_of, plain_name
from srigl_fx.passes.program import arguments

_KEEPS_ELEMENTS = frozenset({"pointwise", "by channel", "copies", "moves", "pads", "looks up", "creates", "measures"})
_LEFT = ("batch1", "mat1")  # what a product's left factor is called where it is not the first argument


def batch_axes(node: Any) -> tuple[int, ...]:
    """The axes of a node's value whose size depends on the batch; none where it is no tensor."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(value, Tensor):
        return ()
    return tuple(axis for axis, size in enumerate(value.shape) if isinstance(size, torch.SymInt))


def sample_axes(node: fx.Node) -> tuple[int, ...]:
    """The batch axes that count samples, or samples and others: not samples times something else, merged."""
    return tuple(axis for axis in batch_axes(node) if not node.meta["val"].shape[axis].node.expr.is_Mul)


def depends_on_batch_size(node: fx.Node) -> bool:
    """Whether the elements of a node may depend on how many samples there are.

    So it is for what is reduced, normalised, sorted or contracted over an axis whose size is symbolic, for a part of an
    axis that merges samples with others, and for what computes with a size as a number. Reshapes are told of by
    :func:`regrouped_axes`.
    """
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    row, given = operator_of(node.target), arguments(node)
    if _computes_with_size(row, given):  # rule 1
        return True
    tensors = [leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, fx.Node) and batch_axes(leaf)]
    if not tensors:  # rule 2
        return False
    first = next(iter(given.values()))
    if row.family == "einsum":  # rule 3
        return _sums_over_batch(given["equation"], given["tensors"])
    # Rule 4; the right factor's summed axis has the same size.
    if row.family in {"linear", "product", "vector product", "sum of products"}:
        left = next((given[name] for name in _LEFT if name in given), first)
        return _rank(left) - 1 in batch_axes(left)
    if row.family == "attention":  # rule 5
        return any(_rank(given[key]) - axis in batch_axes(given[key]) for key in ("key", "value") for axis in (1, 2))
    if row.family == "batch norm":  # rule 6; one without such an argument always does
        return bool(given.get("training", row.does == "normalises"))
    # Rule 7.
    if row.family in {"part", "split"} or plain_name(node.target) == "index_select":
        return any(axis in set(batch_axes(first)) - set(sample_axes(first)) for axis in _dims(given, first) or ())
    if row.does in _KEEPS_ELEMENTS:  # rule 8
        return False
    dims = _dims(given, first)
    if "normalized_shape" in given:  # the last axes
        return _rank(first) - len(given["normalized_shape"]) <= max(batch_axes(first), default=-1)
    if dims:  # rule 9
        return not set(dims).isdisjoint(batch_axes(first))
    # Rule 10.
    outs = [leaf for leaf in pytree.tree_leaves(node.meta.get("val")) if isinstance(leaf, Tensor)]
    kept = all(out.dim() and isinstance(out.shape[0], torch.SymInt) for out in outs)
    return not kept or any(batch_axes(leaf) != (0,) for leaf in tensors)


def _rank(node: fx.Node) -> int:
    return int(node.meta["val"].dim())


def _dims(given: dict[str, Any], data: Any) -> list[int] | None:
    """The axes that an operator names; None where it names none."""
    dims = given.get("dim")
    dims = [dims] if isinstance(dims, int) else dims
    if not isinstance(dims, list | tuple) or not batch_axes(data):
        return None
    return [dim % _rank(data) for dim in dims if isinstance(dim, int)]


def _is_size(value: Any) -> bool:
    number = value.meta.get("val") if isinstance(value, fx.Node) else value
    return isinstance(number, torch.SymInt | torch.SymFloat | torch.SymBool)


def _computes_with_size(row: Operator, given: dict[str, Any]) -> bool:
    """Rule 1: whether a size is an operand, not only the size of the result."""
    sized = [key for key, value in given.items() if any(map(_is_size, pytree.tree_leaves(value)))]
    if not sized:
        return False
    if row.fills:
        return any(key in {"fill_value", "value"} for key in sized)
    if row.family == "part" and "index" not in given:  # x[:B] is all samples; an index B would be one of them
        return given["dim"] % _rank(given["self"]) not in sample_axes(given["self"])
    return not row.sized


def _sums_over_batch(equation: str, tensors: list[fx.Node]) -> bool:
    """Rule 3; without an arrow, which letters are left is not worked out: it may sum over any."""
    inputs, _, result = equation.replace(" ", "").partition("->")
    for term, tensor in zip(inputs.split(","), tensors, strict=True):
        before, _, behind = term.partition("...")
        labels = dict(enumerate(before))
        labels |= {_rank(tensor) - len(behind) + axis: label for axis, label in enumerate(behind)}
        if any(labels.get(axis, "...") not in result for axis in batch_axes(tensor)):
            return True
    return False


def _between(shape: torch.Size) -> list[Any]:
    """The places before the first batch axis, its size, the places between it and the next, and so on."""
    found: list[Any] = [1]
    for size in shape:
        if isinstance(size, torch.SymInt):
            found += [size.node.expr, 1]
        else:
            found[-1] *= size
    return found


def regrouped_axes(node: fx.Node) -> tuple[int, ...]:
    """The axes of its operand along which all must be the same, or else a reshape may mix samples.

    None where the reshape leaves each sample's elements together in as many outer places.
    """
    before = node.args[0] if node.args else None
    if operator_of(node.target).family != "reshape" or not isinstance(before, fx.Node):
        return ()
    one, other = batch_axes(before), batch_axes(node)
    sizes, made = before.meta["val"].shape, node.meta["val"].shape
    if not one or [*sizes] == [*made]:  # no batch, or no change
        return ()
    if _between(sizes) == _between(made):  # rule 11
        return ()
    if len(one) == len(other) == 1:
        if math.prod(sizes[: one[0]]) == math.prod(made[: other[0]]):  # rule 11
            return ()
        # Rule 12. Numbers that repeat with the period of the inner axes still do so where outer places are whole
        # periods apart.
        inner, symbols = math.prod(sizes[one[0] + 1 :]), made[other[0]].node.expr.as_coeff_Mul()
        if symbols[1].is_Symbol and int(symbols[0]) * math.prod(made[other[0] + 1 :]) % max(1, inner) == 0:
            return tuple(range(one[0] + 1))
    if other and math.prod(sizes[one[-1] + 1 :]) == math.prod(made[other[-1] + 1 :]):  # rule 13
        return tuple(range(one[-1] + 1))
    # Rule 14.
    return tuple(range(len(sizes)))
