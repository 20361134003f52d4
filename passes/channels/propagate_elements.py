"""What becomes of channels in operators that keep elements, move them, combine them in one place or along axes.

Owns a rule for each kind of operator without a weight, in the words of :mod:`srigl_fx.passes.operators`; which family
follows which rule stands in :mod:`srigl_fx.passes.channels.rules`. It must not know contractions, masks, values of
weights, nor what is removed.

1. Copies have the labels of what they copy; so has what is only as large.
2. What is made of no element has the fixed label.
3. Element by element, operands at one place are coupled, and constants follow.
4. Elements that change places take their labels with them: the operator is run on the labels. Of a part that a free
   size counts, as in table[:tokens], the axis becomes one: at another size, others are read.
5. Elements picked by indices do so, where the indices along axes with channels are known.
6. Parts joined along an axis without channels keep their channels in common: those are coupled.
7. Padding with zeros adds what has the fixed label; padding with the data itself is for axes without channels only.
8. Where neighbours in the last axes meet, those axes become one: what a label may tell apart are the axes before.
9. Where all along an axis meet (softmax, sort, sums that run on), the axis becomes one.
10. Where an axis goes, so do the labels along it, coupled; but a sum or mean over channels alone reads each by itself,
    and tells afterwards which of them may go.
11. A norm over the last axes couples what is along them; a root mean square over channels alone reads them as a mean.
12. A norm over groups of channels couples each group, a norm by channel couples nothing; parameters follow.
13. A gate couples the half that opens with the half that passes.
14. Windows laid out behind each other have the label of their channel, as often as a window has places.
"""

from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from srigl_fx.passes.channels.coupling import FIXED, compress
from srigl_fx.passes.channels.flow import Reading
from srigl_fx.passes.channels.propagate import Propagation, is_tensor, operands
from srigl_fx.passes.channels.shapes import align, concrete, execute, index_values, joined_axis, padded, shape_of
from srigl_fx.passes.operators import operator_of, plain_name
from srigl_fx.passes.program import arguments


def copied(propagation: Propagation, node: fx.Node) -> Any:
    """Rule 1."""
    first = _first(node)
    if first is None or first.op == "get_attr":  # a constant has no labels yet, unless what it meets has
        return element_by_element(propagation, node)
    if operator_of(node.target).family != "cast":  # of the other operand of a cast, only the type matters
        propagation.pin_others(node, first)
    return propagation.labels(first)


def made(propagation: Propagation, node: fx.Node) -> Any:
    """Rule 2."""
    return propagation.fixed(node)


def made_alike(propagation: Propagation, node: fx.Node) -> Any:
    """Rule 1: the result must be as large as what it is made like, whatever that loses."""
    first = _first(node)
    return None if first is None or first.op == "get_attr" else copied(propagation, node)


def element_by_element(propagation: Propagation, node: fx.Node) -> Tensor | None:
    """Rule 3."""
    if not isinstance(node.meta["val"], Tensor):
        return None
    rank = len(shape_of(node))
    labels: Tensor | None = None
    shape: list[int] = []
    constants = []
    for operand in operands(node):
        if propagation.is_constant(operand):  # it follows what the others say together
            constants.append(operand)
            continue
        other, other_shape = align(propagation.labels(operand), rank), padded(shape_of(operand), rank)
        if labels is None:
            labels, shape = other, other_shape
        else:
            labels = propagation.join(labels, shape, other, other_shape)
            shape = [max(a, b) for a, b in zip(shape, other_shape, strict=True)]
    if labels is None:  # of constants alone: a constant, without channels
        return torch.full((1,) * rank, FIXED)
    for constant in constants:
        propagation.adopt(constant, labels, node)
    return labels


def moved(propagation: Propagation, node: fx.Node) -> Any:
    """Rule 4."""
    given = arguments(node)
    # What a second operand puts where, or a new type, is not told by running it on labels.
    if "dtype" in given or any(is_tensor(value) for key, value in given.items() if key != "self"):
        return None
    source = given.get("self")
    is_part = operator_of(node.target).family == "part" and is_tensor(source)
    if is_part and isinstance(source, fx.Node) and _is_counted_by_a_size(node):
        labels = propagation.channels.merge(propagation.labels(source), [given["dim"] % len(shape_of(source))])
        whole = labels.expand(shape_of(source))
        return compress(execute(node.target, node.args, node.kwargs, lambda _: whole))
    return _run(propagation, node)


def _is_counted_by_a_size(node: fx.Node) -> bool:
    """Whether a free size says which part is meant."""
    numbers = [other.meta.get("val") for other in node.all_input_nodes]
    return any(isinstance(number, torch.SymInt) for number in numbers)


def picked(propagation: Propagation, node: fx.Node) -> Any:
    """Rule 5."""
    if plain_name(node.target) not in {"index", "index_select"}:  # gather, take: by element
        return moved(propagation, node)
    given = arguments(node)
    propagation.pin_others(node, given["self"])
    indices = index_values(propagation.program, given, propagation.labels(given["self"]))
    if indices is None:
        return None
    return compress(torch.ops.aten.index.Tensor(propagation.full(given["self"]), indices))


def joined(propagation: Propagation, node: fx.Node) -> Any:
    """Rule 6; along an axis with channels, rule 4."""
    axis = joined_axis(node)
    if axis is None:  # it gives the parts an axis more
        return moved(propagation, node)
    parts = [propagation.labels(part) for part in arguments(node)["tensors"]]
    if all(part.shape[axis] == 1 for part in parts) and any(part.numel() > 1 for part in parts):
        for part in parts[1:]:
            propagation.channels.couple(parts[0], part)
        return max(parts, key=Tensor.numel)
    return _run(propagation, node)


def added_around(propagation: Propagation, node: fx.Node) -> Any:
    """Rule 7."""
    given, first = arguments(node), _first(node)
    if first is None:
        return None
    propagation.pin_others(node, first)
    labels = propagation.labels(first)
    amounts: list[int] = list(given["pad"] if "pad" in given else given["padding"])
    if not all(isinstance(amount, int) and amount >= 0 for amount in amounts):
        return None  # it cuts, which fake tensors of a symbolic size cannot do again
    axes = [labels.dim() - 1 - i // 2 for i, amount in enumerate(amounts) if amount != 0]
    if all(labels.shape[axis] == 1 for axis in axes):
        return labels
    zeros = plain_name(node.target) in {"pad", "constant_pad_nd"} and given.get("mode", "constant") == "constant"
    if not zeros:  # which element is repeated depends on what is left
        return None
    return compress(torch.nn.functional.pad(propagation.full(first), amounts, value=FIXED))


def over_last_axes(propagation: Propagation, node: fx.Node) -> Any:
    """Rule 8."""
    first = _first(node)
    if first is None:
        return None
    propagation.pin_others(node, first)
    row, rank = operator_of(node.target), len(shape_of(first))
    axes = rank - 2 if row.family == "sample" else row.axes  # a grid samples all but batch and channels
    labels = propagation.channels.merge(propagation.labels(first), range(rank - axes, rank))
    return pytree.tree_map(lambda _: labels, node.meta["val"])


def along_axis(propagation: Propagation, node: fx.Node) -> Any:
    """Rule 9."""
    first, dim = _first(node), arguments(node).get("dim")
    if first is None or not isinstance(dim, int):
        return None
    propagation.pin_others(node, first)
    labels = propagation.channels.merge(propagation.labels(first), [dim % len(shape_of(first))])
    return pytree.tree_map(lambda _: labels, node.meta["val"])


def reduced(propagation: Propagation, node: fx.Node) -> Any:
    """Rule 10."""
    given, first = arguments(node), _first(node)
    if first is None:
        return None
    propagation.pin_others(node, first)
    rank = len(shape_of(first))
    dims = given.get("dim")
    dims = [dims] if isinstance(dims, int) else list(dims) if dims else list(range(rank))
    dims = [dim % rank for dim in dims]
    labels = propagation.labels(first)
    active = [axis for axis, size in enumerate(labels.shape) if size > 1]
    static = all(isinstance(first.meta["val"].shape[axis], int) for axis in active)
    if plain_name(node.target) in {"mean", "sum"} and len(active) == 1 and active[0] in dims and static:
        propagation.flow.readings.append(Reading(node, first, active[0] - labels.dim()))
        labels = torch.full((1,) * labels.dim(), FIXED)
    labels = propagation.channels.merge(labels, dims)
    if not given.get("keepdim"):
        for dim in sorted(dims, reverse=True):
            labels = labels.squeeze(dim)
    return pytree.tree_map(lambda _: labels, node.meta["val"])


def layer_norm(propagation: Propagation, node: fx.Node) -> Tensor | None:
    """Rule 11, of a mean and a spread."""
    if not isinstance(node.meta["val"], Tensor):  # with its statistics, which nobody should need
        return None
    given = arguments(node)
    propagation.pin_others(node, given["input"])
    rank = len(shape_of(given["input"]))
    labels = propagation.labels(given["input"])
    return propagation.channels.merge(labels, range(rank - len(given["normalized_shape"]), rank))


def rms_norm(propagation: Propagation, node: fx.Node) -> Tensor | None:
    """Rule 11, of a root mean square."""
    if not isinstance(node.meta["val"], Tensor):
        return None
    given = arguments(node)
    labels: Tensor = propagation.labels(given["input"])
    gain = given["weight"]
    one_axis = len(given["normalized_shape"]) == 1 and labels.numel() == labels.shape[-1] > 1
    if one_axis and (gain is None or gain.op == "get_attr"):
        propagation.flow.readings.append(Reading(node, given["input"], -1))
        return labels
    return layer_norm(propagation, node)


def group_norm(propagation: Propagation, node: fx.Node) -> Tensor | None:
    """Rule 12, by group."""
    if not isinstance(node.meta["val"], Tensor):
        return None
    given = arguments(node)
    labels = propagation.labels(given["input"])
    labels = propagation.channels.merge(labels, range(2, len(shape_of(given["input"]))))
    count = shape_of(given["input"])[1]
    grouped = labels.expand(-1, count, *labels.shape[2:]).reshape(labels.shape[0], given["num_groups"], -1)
    merged = propagation.channels.merge(grouped, [2]).expand(grouped.shape)
    out = compress(merged.reshape(labels.shape[0], count, *labels.shape[2:]))
    for constant in (given["weight"], given["bias"]):
        propagation.adopt(constant, out.reshape(-1), node)
    return out


def norm_by_channel(propagation: Propagation, node: fx.Node) -> Any:
    """Rule 12, by channel: with statistics that are given, or taken over the other axes."""
    given = arguments(node)
    data = given["input"]
    labels = propagation.labels(data)
    if given.get("training") or given.get("use_input_stats"):
        labels = propagation.channels.merge(labels, range(2, labels.dim()))
    vector = _by_channel(propagation, labels)
    for key in ("weight", "bias", "running_mean", "running_var"):
        propagation.adopt(given.get(key), vector, node)
    value = node.meta["val"]
    if isinstance(value, Tensor):
        return labels
    statistics = zip(value[1:], propagation.fixed(node)[1:], strict=True)
    by_channel = [shape_of(data)[1]]
    return [labels, *(vector if concrete(one.shape) == by_channel else fixed for one, fixed in statistics)]


def prelu(propagation: Propagation, node: fx.Node) -> Tensor:
    """Rule 3, with a slope by channel."""
    given = arguments(node)
    labels: Tensor = propagation.labels(given["self"])
    if shape_of(given["weight"]) != [1]:
        propagation.adopt(given["weight"], _by_channel(propagation, labels), node)
    return labels


def gated(propagation: Propagation, node: fx.Node) -> Tensor:
    """Rule 13."""
    given = arguments(node)
    halves = propagation.full(given["self"]).chunk(2, given["dim"])
    one, other = (compress(half) for half in halves)
    propagation.channels.couple(one, other)
    return one if one.numel() >= other.numel() else other


def windows(propagation: Propagation, node: fx.Node) -> Tensor:
    """Rule 14."""
    given = arguments(node)
    labels = propagation.channels.merge(propagation.labels(given["self"]), range(2, 4)).squeeze(3)
    places = given["kernel_size"][0] * given["kernel_size"][1]
    return compress(labels.expand(-1, shape_of(given["self"])[1], -1).repeat_interleave(places, 1))


def _run(propagation: Propagation, node: fx.Node) -> Any:
    """The operator's result for the labels of its operands."""
    assert isinstance(node.target, torch._ops.OpOverload)
    return pytree.tree_map(compress, execute(node.target, node.args, node.kwargs, propagation.full))


def _first(node: fx.Node) -> fx.Node | None:
    """The first operand; None where there is none, or all are in a list."""
    return next((value for value in arguments(node).values() if is_tensor(value)), None)


def _by_channel(propagation: Propagation, labels: Tensor) -> Tensor:
    """One label for each channel (axis 1): parameters have no other axis."""
    return propagation.channels.merge(labels, [axis for axis in range(labels.dim()) if axis != 1]).reshape(-1)
