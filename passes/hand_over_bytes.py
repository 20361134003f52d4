"""Outputs that only layers of eight bits read, stored as the bytes that these would make of them.

Owns :class:`HandOverBytes` and its rules. It must not know kernels, nor where a scale comes from.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from srigl_fx.passes.base import Note, Pass, PassResult
from srigl_fx.passes.condensed_nodes import ROUND, condensed_nodes, is_condensed, name_of, set_arguments
from srigl_fx.passes.fake_values import fake_result
from srigl_fx.passes.operators import operator_of, plain_name
from srigl_fx.passes.program import Program, arguments

_MOVES = frozenset({"reshape", "one", "axes", "part", "copy", "same"})  # families of operators with one tensor
_POOLS = frozenset({"max_pool1d", "max_pool2d", "max_pool3d"})


@dataclass
class _Readers:
    """What becomes of an output on its way to condensed operators.

    Attributes:
        scales: The scales that these round it with, and their offsets.
        layers: These operators.
        between: What moves elements, or picks them, before.
        roundings: What rounds it for several of them.
    """

    scales: set[tuple[float, int]] = field(default_factory=set)
    layers: list[fx.Node] = field(default_factory=list)
    between: set[fx.Node] = field(default_factory=set)
    roundings: list[fx.Node] = field(default_factory=list)


class HandOverBytes(Pass[Program]):
    """Let neighbouring layers of eight bits hand each other bytes, where the scales of samples are given.

    A layer rounds what it is handed. Where nothing else reads that, the layer before rounds it with the same scale
    while its outputs are in registers: a quarter of the bytes goes through memory, and no number changes.

    1. The output of a condensed operator with values of eight bits is stored as bytes where every path from it leads to
       the data operand of condensed operators that have one given scale and offset in common, or to ``round_samples``
       with these, which goes then.
    2. On the way there may be operators that move the elements of one tensor (reshape, permute, slice, clone), and
       max-pooling: rounding keeps the order of numbers. It does not keep NaN, so that pooling is passed only by layers
       that round their own samples with a given scale and have no residual: these yield none.
    3. An output that something else reads too, a residual addition or an output of the model, stays float32.
    """

    only_improves = True

    def run(self, subject: Program) -> PassResult[Program]:
        """Rewrite the graph in place."""
        graph, notes = subject.module.graph, []
        for node in list(condensed_nodes(graph)):
            if arguments(node)["scales"] is None or arguments(node)["y_scale"] is not None:
                continue
            found = _readers(node)
            if found is None:
                continue
            ((scale, offset),) = found.scales
            set_arguments(node, y_scale=scale, y_offset=offset)
            node.meta["val"] = torch.empty_like(node.meta["val"], dtype=torch.uint8)
            for one in graph.nodes:
                if one in found.between:
                    _infer(one)
            for rounding in found.roundings:
                rounding.replace_all_uses_with(arguments(rounding)["x"])
                graph.erase_node(rounding)
            count = len(found.layers)
            notes.append(Note(where=name_of(node), reason=f"hands bytes to {count} layer{'s' if count > 1 else ''}"))
        if notes:
            graph.lint()
            subject.module.recompile()
        return PassResult(subject=subject, changed=bool(notes), notes=tuple(notes))


def _readers(node: fx.Node) -> _Readers | None:
    """What reads an output, if its readers could read bytes, all the same ones."""
    given, found, waiting = arguments(node), _Readers(), [node]
    pools = given["x_scale"] is not None and given["residual"] is None  # rule 2
    while waiting:
        value = waiting.pop()
        if not value.users:
            return None
        for user in value.users:
            if user.target is ROUND:
                asked = arguments(user)
                found.scales.add((asked["scale"], asked["offset"]))
                found.roundings.append(user)
                found.layers += user.users  # by whom RoundOnce had it made
            elif is_condensed(user) and _is_rounded_by(user, value):
                found.scales.add((arguments(user)["x_scale"], arguments(user)["x_offset"]))
                found.layers.append(user)
            elif _moves(user, value, pools):
                found.between.add(user)
                waiting.append(user)
            else:  # rule 3
                return None
    return found if len(found.scales) == 1 else None


def _is_rounded_by(layer: fx.Node, value: fx.Node) -> bool:
    given = arguments(layer)
    others = [operand for name, operand in given.items() if name != "x"]
    return given["x"] is value and value not in others and given["x_scale"] is not None


def _moves(node: fx.Node, value: fx.Node, pools: bool) -> bool:
    """Whether a node gives elements of ``value``, in the order that they have by size."""
    row = operator_of(node.target)
    if not (row.family in _MOVES or (pools and plain_name(node.target) in _POOLS)):
        return False
    result: Any = node.meta.get("val")
    tensors = [one for one in node.all_input_nodes if isinstance(one.meta.get("val"), Tensor)]
    return tensors == [value] and isinstance(result, Tensor) and result.dtype is torch.float32


def _infer(node: fx.Node) -> None:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda operand: operand.meta["val"])
    assert callable(node.target)
    node.meta["val"] = fake_result(node.meta["val"].fake_mode, node.target, args, kwargs)
