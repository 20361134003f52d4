"""Which elements of which activations are the same for every input, and what they are.

Owns the interpretation of a whole graph: the values on the example inputs and, beside them, which elements may depend
on an input. It must not know what is done about it, nor change the graph. How a single operator passes that on is in
:mod:`srigl_fx.passes.liveness.rules`.

Beside each value x runs a table L(x) of what may depend on an input (live). What is not live is constant.

1. Inputs are live; parameters and buffers are not, unless the graph writes into them: then they differ from call to
   call.
2. An operator passes L on by its rule. One that has none, and any call that is no ATen operator, is live as soon as one
   of its operands is; a note names it.
3. What writes to an operand, or has a shape that depends on values, is live.
4. A product whose left factor's rows come out of a softmax is a weighted mean: sum over j of p[i, j] = 1.

With a dynamic batch, besides:

5. What may change with the number of samples (:mod:`srigl_fx.passes.liveness.batch`) is live, but for zeros where the
   operator makes zeros of zeros, however many.
6. What is not the same for all samples is live: L(x)[b] or x[b] != x[0]. The example's other samples say nothing of
   those that a larger batch has.
7. Before a reshape that may mix samples, the same is asked along the axes that it mixes.
8. Only what agrees at two batch sizes is constant: whatever depends on the size in a way that nobody foresaw, differs.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

from srigl_fx.passes.base import Note
from srigl_fx.passes.liveness.batch import batch_axes, depends_on_batch_size, regrouped_axes, sample_axes
from srigl_fx.passes.liveness.rules import liveness
from srigl_fx.passes.liveness.values import Call, any_live, simplify, spread
from srigl_fx.passes.operators import operator_of
from srigl_fx.passes.program import Program, arguments
from srigl_fx.passes.sizes import At

aten = torch.ops.aten

# Between a softmax and the product with the values; where the last size stays, the rows do.
_KEEPS_ROWS = frozenset({"copy", "same", "cast", "reshape", "expand", "one"})
_SOFTMAX = frozenset({aten.softmax.int, aten._softmax.default})


@dataclass(frozen=True, kw_only=True)
class Constant:
    """What is known of the value of a node, without the axes whose size depends on the batch.

    Attributes:
        fixed: bool; the elements that do not depend on any input, and are the same all along the axes left out.
        value: Their values; 0 where not fixed. Of the node's dtype.
    """

    fixed: Tensor
    value: Tensor


@dataclass(frozen=True, kw_only=True)
class Constness:
    """The result of the analysis.

    Attributes:
        known: The operators with at least one fixed element; parameters and buffers are not listed.
        notes: The operators without a rule, whose results are taken to depend on everything.
    """

    known: dict[fx.Node, Constant]
    notes: tuple[Note, ...]


def constants(program: Program, keep: Callable[[fx.Node], bool] = lambda node: True) -> Constness:
    """Find the elements of activations that are the same for every input.

    The graph is run on the example inputs; beside each value runs a mask of the elements that may depend on an input.
    It starts full at the inputs, and every operator passes it on by its rule: a contraction by the zeros of its weight,
    an operator without a rule in full. With a dynamic batch, the batch axes of a node are those with a symbolic size:
    what mixes elements along these, computes with such a size, or is not the same for all samples counts as dependent
    on an input, but for zeros. This is done at two batch sizes, and only what agrees at both is constant.

    Exact in exact arithmetic, for finite activations and sizes other than the batch's as captured. Values are dropped
    once their last reader ran, but for the nodes of ``keep``.

    Args:
        program: A functional graph; neither it nor any buffer is changed.
        keep: The operators to tell of; all of them by default.

    Source:
        Abstract interpretation after Cousot and Cousot (1977), on the domain "constant or not" of every element.

    Example:
        >>> from torch import nn
        >>> from srigl_fx.passes.capture import capture
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU()).eval()
        >>> with torch.no_grad():
        ...     _ = model[0].weight[1].zero_(), model[0].bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
        >>> found = constants(capture(model, (torch.ones(2, 2),)), lambda node: "relu" in node.name)
        >>> [(known.fixed.tolist(), known.value.tolist()) for known in found.known.values()]
        [([False, True, False], [0.0, 2.0, 0.0])]
    """
    unknown: dict[str, str] = {}
    if not program.symbolic:
        known = _interpret(program, None, keep, unknown)
    else:
        try:
            # Rule 8; no size of 1, which broadcasts, and one of two that is odd.
            runs = [_interpret(program, at, keep, unknown) for at in _sizes(program, 2, 3)]
        except (RuntimeError, IndexError):  # a batch folded into groups, or indices into it: multiples of the size do
            size = max(2, program.batch_size)
            runs = [_interpret(program, at, keep, unknown) for at in _sizes(program, size, 2 * size)]
        both = {node: _agreed(runs[0][node], runs[1][node]) for node in runs[0] if node in runs[1]}
        known = {node: constant for node, constant in both.items() if constant is not None}
    notes = tuple(
        Note(where=where, reason=f"{name} has no rule for constants: all that derives from it is taken to vary")
        for name, where in unknown.items()
    )
    return Constness(known=known, notes=notes)


def _sizes(program: Program, batch: int, other: int) -> list[At]:
    """Two batch sizes, all batches alike; with the second of them other sizes of the rest, where these are known."""
    first, second = (program.batches(size, apart=False) for size in (batch, other))
    tried = program.sizes.tried[-1] if program.sizes.tried else {}
    return [At.of(first), At.of({**tried, **second})]


def _interpret(
    program: Program, at: At | None, keep: Callable[[fx.Node], bool], unknown: dict[str, str]
) -> dict[fx.Node, Constant]:
    """One run; adds the operators without a rule, and where each stands first, to ``unknown``."""
    nodes = list(program.module.graph.nodes)
    last_reader = {operand: node for node in nodes for operand in node.all_input_nodes}
    mutated = {  # by identity: a buffer may have several names
        id(_attribute(program.module, str(operand.target)))
        for node in nodes
        if _mutates(node)
        for operand in node.all_input_nodes
        if operand.op == "get_attr"
    }
    inputs = iter(pytree.tree_leaves(program.inputs_at(at)))
    values: dict[fx.Node, Any] = {}
    live: dict[fx.Node, Any] = {}
    known: dict[fx.Node, Constant] = {}
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for node in nodes:
            if node.op == "output":
                break
            if node.op == "placeholder":  # rule 1; numbers among the inputs are part of the graph
                values[node] = next(inputs)
                live[node] = isinstance(values[node], Tensor)
            elif node.op == "get_attr":  # rule 1
                values[node] = _attribute(program.module, str(node.target))
                live[node] = id(values[node]) in mutated
            else:
                values[node], live[node] = _call(program.module, node, values, live, unknown)
            value = values[node]
            if isinstance(value, Tensor):
                if program.symbolic and node.op == "call_function":  # rule 6
                    live[node] = _unlike(sample_axes(node), value, live[node])
                live[node] = simplify(live[node])
                if node.op != "get_attr" and live[node] is not True and keep(node):
                    constant = _without_batch(node, value, live[node])
                    if constant is not None:
                        known[node] = constant
            for operand in (*node.all_input_nodes, node):
                if last_reader.get(operand, node) is node:
                    del values[operand], live[operand]
    return known


def _attribute(module: fx.GraphModule, target: str) -> Any:
    """A parameter or buffer, or the graph that a higher-order operator calls."""
    owner, _, attr = target.rpartition(".")
    return getattr(module.get_submodule(owner), attr)


def _mutates(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _call(
    module: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Any], live: dict[fx.Node, Any], unknown: dict[str, str]
) -> tuple[Any, Any]:
    """The value of a node and what is live in it."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    if _mutates(node):  # this run must not change the model's buffers, nor the example inputs
        args, kwargs = pytree.tree_map_only(Tensor, Tensor.clone, (args, kwargs))
    target = node.target if callable(node.target) else module.get_submodule(str(node.target))
    out = target(*args, **kwargs)
    if node.target is operator.getitem:  # one of several results
        return out, live[node.all_input_nodes[0]][node.args[1]]
    if not isinstance(node.target, torch._ops.OpOverload):  # rule 2: torch.cond, arithmetic on sizes
        found: Any = None if any(any_live(live[operand]) for operand in node.all_input_nodes) else False
    elif _mutates(node) or _has_data_dependent_shape(node):  # rule 3
        found = True
    else:  # rule 2
        given = arguments(node)
        lives = {operand: live[operand] for operand in node.all_input_nodes}
        if axes := regrouped_axes(node):  # rule 7
            source = node.all_input_nodes[0]
            lives[source] = _unlike(axes, values[source], live[source])
        call = Call(
            op=node.target,
            given=fx.node.map_arg(given, values.__getitem__),
            live=fx.node.map_aggregate(given, lambda leaf: lives[leaf] if isinstance(leaf, fx.Node) else False),
            out=out,
            weighted_mean=isinstance(node.args[0], fx.Node) and _sums_to_one(node.args[0]) if node.args else False,
        )
        found = liveness(call)
    if found is not None and found is not True and depends_on_batch_size(node):  # rule 5
        found = _but_zero(out, found) if operator_of(node.target).keeps_zero else True
    if found is None:  # rule 2
        unknown.setdefault(str(node.target).removesuffix(".default"), node.name)
        found = True
    return out, pytree.tree_map(lambda _: found, out) if isinstance(found, bool) else found


def _but_zero(out: Any, live: Any) -> Any:
    """Rule 5: all is live but zeros that were not."""
    return spread(live, out) | (out != 0) if isinstance(out, Tensor) else True


def _unlike(axes: tuple[int, ...], value: Tensor, live: bool | Tensor) -> bool | Tensor:
    """Rules 6 and 7: what is live, and what is not the same all along some axes; of size 1 there."""
    if live is True or not axes or value.numel() == 0 or value.is_complex():
        return live
    first = value
    for axis in axes:
        first = first.narrow(axis, 0, 1)
    return (spread(live, value) | ~_same(value, first)).any(dim=axes, keepdim=True)


def _has_data_dependent_shape(node: fx.Node) -> bool:
    return any(
        free_unbacked_symbols(leaf)
        for leaf in pytree.tree_leaves(node.meta.get("val"))
        if isinstance(leaf, Tensor | torch.SymInt)
    )


def _sums_to_one(node: fx.Node) -> bool:
    """Rule 4: whether the rows of a node's value along its last axis come out of a softmax, and so sum to one."""
    while node.target not in _SOFTMAX:
        if operator_of(node.target).family not in _KEEPS_ROWS or not isinstance(node.args[0], fx.Node):
            return False
        source = node.args[0]
        before, after = source.meta.get("val"), node.meta.get("val")
        if not isinstance(before, Tensor) or not isinstance(after, Tensor) or not after.is_floating_point():
            return False
        # A reshape keeps rows whole if it keeps the size of the last axis; a symbolic size cannot be compared.
        rows = [value.shape[-1] for value in (before, after) if value.dim() and isinstance(value.shape[-1], int)]
        if len(rows) != 2 or rows[0] != rows[1]:
            return False
        node = source
    value = node.meta.get("val")
    return isinstance(value, Tensor) and arguments(node)["dim"] in (-1, value.dim() - 1)


def _without_batch(node: fx.Node, value: Tensor, live: bool | Tensor) -> Constant | None:
    """What is known of a value, the same all along its batch axes; None where that is nothing."""
    shape = node.meta["val"].shape if isinstance(node.meta.get("val"), Tensor) else None
    if shape is None or len(shape) != value.dim() or value.numel() == 0 or value.is_complex():
        return None
    axes = batch_axes(node)
    first = value
    for axis in axes:
        first = first.narrow(axis, 0, 1)
    fixed = ~spread(live, value) & _same(value, first)
    if axes:
        fixed, first = fixed.all(dim=axes), first.squeeze(axes)
    return Constant(fixed=fixed, value=first.masked_fill(~fixed, 0)) if bool(fixed.any()) else None


def _agreed(one: Constant, other: Constant) -> Constant | None:
    """Rule 8: what is the same at two batch sizes."""
    if one.fixed.shape != other.fixed.shape:
        return None
    fixed = one.fixed & other.fixed & _same(one.value, other.value)
    return Constant(fixed=fixed, value=one.value.masked_fill(~fixed, 0)) if bool(fixed.any()) else None


def _same(one: Tensor, other: Tensor) -> Tensor:
    """Equal up to the rounding of kernels that do not sum all samples in the same order; false if not finite."""
    if not one.is_floating_point():
        return one == other
    return (one - other).abs() <= 1e-6 + 1e-5 * other.abs()
