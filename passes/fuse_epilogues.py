"""Activations and residual additions, taken into the condensed operators before them.

Owns :class:`FuseEpilogues`. It must not know formats or kernels, nor how a layer came to be condensed.
"""

import math
from bisect import bisect
from typing import Any

import torch
from torch import fx

from srigl_fx.passes.base import Note, Pass, PassResult
from srigl_fx.passes.condensed_nodes import is_condensed, name_of, same_shape, set_arguments
from srigl_fx.passes.program import Program, arguments
from srigl_fx.runtime.activations import ACTIVATIONS, Activation

aten = torch.ops.aten


def _overloads(name: str) -> list[Any]:
    """The ATen operator of this name, and the one that writes into its input if there is one."""
    packets = [getattr(aten, name), getattr(aten, f"{name}_", None)]
    return [packet.default for packet in packets if packet is not None]


_OPERATORS: dict[Any, list[Activation]] = {}
for _row in ACTIVATIONS:
    for _overload in _overloads(_row.aten) if _row.aten else ():
        _OPERATORS.setdefault(_overload, []).append(_row)
_RANGES = {  # operators that clamp, with the names of their limits
    aten.hardtanh.default: ("min_val", "max_val"),
    aten.hardtanh_.default: ("min_val", "max_val"),
    **dict.fromkeys((aten.clamp.default, aten.clamp_.default, aten.clip.default, aten.clip_.default), ("min", "max")),
    aten.clamp_min.default: ("min", ""),
    aten.clamp_min_.default: ("min", ""),
}
_CLAMPS = {  # None for no limit
    tuple(None if math.isinf(limit) else limit for limit in row.limits): row.name
    for row in ACTIVATIONS
    if row.limits is not None and row.aten
}
_ADDITIONS = frozenset({aten.add.Tensor, aten.add_.Tensor})


class FuseEpilogues(Pass[Program]):
    """Take what follows a condensed operator into it: a residual and an activation are applied before it stores.

    The kernel computes ``y = activation(x @ weight.T + bias + residual)``: residual and activation are applied to the
    accumulator while that is in registers, so that the value in between is never written to memory.

    1. An activation of :data:`srigl_fx.runtime.activations.ACTIVATIONS` that is the only reader of a condensed operator
       becomes its activation; one that only limits its input also where it is written as ``clamp`` or ``hardtanh``.
    2. An addition of two float32 tensors of one shape that is the only reader of a condensed operator without epilogue
       gives it the other operand as residual; an activation after the addition follows by rule 1. The operator moves to
       where the addition was, as the other operand may be computed after it.
    3. Of two condensed operators that are added, the later one takes the other's output.
    4. Nothing is taken in, with a note, where the value in between is needed elsewhere, an output included; nor where
       an operator between the two writes into its operand.
    """

    only_improves = True

    def run(self, subject: Program) -> PassResult[Program]:
        """Rewrite the graph in place."""
        graph, notes, changed = subject.module.graph, [], False
        order = {node: i for i, node in enumerate(graph.nodes)}
        writes = [i for node, i in order.items() if _writes(node)]
        for node in list(graph.nodes):
            found = activation_of(node)
            if found:  # rule 1
                source = arguments(node)["self"]
                if not _takes(source, "activation"):
                    continue
                epilogue: dict[str, Any] = {"activation": found}
            elif node.target in _ADDITIONS:  # rules 2 and 3
                taken = _added(node, order, writes)
                if taken is None:
                    continue
                source, residual = taken
                epilogue = {"residual": residual}
            else:
                continue
            if len(source.users) > 1:  # rule 4
                where = name_of(source)
                what = f"{node.name} not fused: what it reads is used elsewhere too"
                notes.append(Note(where=where, reason=what))
                continue
            set_arguments(source, **epilogue)
            if "residual" in epilogue:  # rule 2: to where the other operand is there
                node.prepend(source)
                order[source] = order[node]
            source.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(source)
            graph.erase_node(node)
            changed = True
        if changed:
            graph.lint()
            subject.module.recompile()
        return PassResult(subject=subject, changed=changed, notes=tuple(notes))


def activation_of(node: fx.Node) -> str:
    """The activation that a node computes, as a condensed operator calls it; "" where it is none of those.

    Example:
        >>> graph = fx.Graph()
        >>> x = graph.placeholder("x")
        >>> activation_of(graph.call_function(aten.clamp.default, (x, 0, 6))), activation_of(x)
        ('relu6', '')
    """
    if node.target not in _OPERATORS and node.target not in _RANGES:
        return ""
    given = arguments(node)
    for row in _OPERATORS.get(node.target, ()):
        if all(given[name] == value for name, value in row.settings.items()):
            return row.name
    if node.target in _RANGES:
        return _CLAMPS.get(tuple(given.get(name) for name in _RANGES[node.target]), "")
    return ""


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _is_own(node: fx.Node) -> bool:
    """Whether a value that is written into is seen by nobody else."""
    return is_condensed(node) and len(node.users) == 1


def _takes(node: Any, what: str) -> bool:
    """Whether ``node`` is a condensed operator that can still take in an activation or a residual."""
    if not isinstance(node, fx.Node) or not is_condensed(node):
        return False
    given = arguments(node)
    return given["activation"] == "none" and (what == "activation" or given["residual"] is None)


def _added(node: fx.Node, order: dict[fx.Node, int], writes: list[int]) -> tuple[fx.Node, fx.Node] | None:
    """The condensed operator that can take in an addition, and the addition's other operand."""
    given = arguments(node)
    pair = given["self"], given["other"]
    if given["alpha"] != 1 or not all(isinstance(side, fx.Node) for side in pair) or pair[0] is pair[1]:
        return None
    if not same_shape(*pair) or (_writes(node) and not _is_own(pair[0])):
        return None
    sources = [side for side in pair if _takes(side, "residual")]
    if not sources:
        return None
    # Of two that could, one that is read by the addition alone; of two such, the later one.
    source = max(sources, key=lambda side: (len(side.users) == 1, order[side]))
    if bisect(writes, order[source]) != bisect(writes, order[node] - 1):
        return None
    return source, pair[1] if source is pair[0] else pair[0]
