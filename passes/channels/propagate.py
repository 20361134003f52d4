"""How channels travel through a graph: labels for the elements of every value.

Owns :class:`Propagation`: the way through the graph, and what its rules have in common. It must not know any operator
(its rules do), masks, values of weights, nor what is removed.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from srigl_fx.passes.channels.coupling import FIXED
from srigl_fx.passes.channels.flow import Flow
from srigl_fx.passes.channels.shapes import align, shape_of, tensor_count
from srigl_fx.passes.operators import plain_name
from srigl_fx.passes.program import Program, arguments

_LARGEST_CONSTANT = 1 << 21

Rule = Callable[["Propagation", fx.Node], Any]
"""The labels of a node's value, from those of its operands; None where they cannot be told."""


class Propagation:
    """Carries labels through a graph whose constants have one user each.

    1. What the model is given has no channels: its label is the fixed one. What it returns stays as it is.
    2. A constant has no labels of its own where a rule lets it follow those of what it is combined with (``adopt``);
       where it is data itself, each of its elements gets a label.
    3. A size that is computed with pins the axis that it measures: the number would change.
    4. Any other node gets what the rule of its operator says; where there is none, or it cannot tell, everything around
       the node stays.
    """

    def __init__(
        self, program: Program, constant: frozenset[fx.Node], rule_of: Callable[[object], Rule | None]
    ) -> None:
        self.program = program
        self.constant = constant
        self.flow = Flow()
        self.channels = self.flow.channels
        self.weights: dict[str, tuple[Tensor, Tensor]] = {}
        self.written = {str(node.target) for node in program.module.graph.nodes if _is_written(node)}
        self._rule_of = rule_of

    def run(self) -> Flow:
        """Visit every node."""
        for node in self.program.module.graph.nodes:
            if node.op == "output":  # rule 1
                for operand in node.all_input_nodes:
                    self.pin(operand, "it is an output of the model")
            elif node.op == "placeholder":  # rule 1
                self.flow.labels[node] = self.fixed(node)
            elif node.op == "get_attr":  # rule 2: who reads it decides
                continue
            elif not isinstance(node.meta.get("val"), Tensor | tuple | list) and node.target is not operator.getitem:
                self.number(node)  # rule 3
            else:  # rule 4
                rule = self._rule_of(node.target)
                labels = None if rule is None else rule(self, node)
                self.flow.labels[node] = self.unknown(node) if labels is None or _is_empty(labels) else labels
        return self.flow

    # -- values ---------------------------------------------------------------------------------------------------

    def labels(self, node: fx.Node) -> Any:
        """The labels of a node; a constant gets one for every element when it is first asked for."""
        if node not in self.flow.labels:
            shape = shape_of(node)
            count = tensor_count(shape)
            own = self.fixed(node)
            # A single element is a number, not channels; a table as large as the limit would take as many labels.
            if self.is_constant(node) and node.op == "get_attr" and 1 < count <= _LARGEST_CONSTANT:
                own = self.channels.fresh(count, node.name).reshape(shape)
                self.flow.adopted.append((node, node, own))
            self.flow.labels[node] = own
        return self.flow.labels[node]

    def full(self, node: fx.Node) -> Tensor:
        """The labels of a node's value, at full shape."""
        labels: Tensor = self.labels(node)
        return labels.expand(shape_of(node))

    def fixed(self, node: fx.Node) -> Any:
        """The fixed label for every value of a node."""
        return pytree.tree_map(
            lambda value: torch.full((1,) * value.dim(), FIXED) if isinstance(value, Tensor) else None, node.meta["val"]
        )

    def pin(self, node: fx.Node, reason: str) -> None:
        """Nothing of a node's value may be removed."""
        if node.op == "get_attr" and node not in self.flow.labels:
            return  # a constant without labels is read whole
        for labels in pytree.tree_leaves(self.labels(node)):
            if isinstance(labels, Tensor):
                self.channels.pin(labels, reason)

    def pin_others(self, node: fx.Node, *handled: fx.Node | None) -> None:
        """Keep all operands but those given: they are read in a way of their own."""
        for operand in operands(node):
            if operand not in handled:
                self.pin(operand, f"it is a setting of {node.name}")

    def adopt(self, constant: fx.Node | None, labels: Tensor, reader: fx.Node) -> None:
        """Let an operand that may be a constant follow ``labels``."""
        if not isinstance(constant, fx.Node):
            return
        if self.is_constant(constant):
            self.flow.adopted.append((constant, reader, labels))
        else:
            own = self.labels(constant)
            self.channels.couple(align(own, labels.dim()), labels)

    def is_constant(self, node: fx.Node) -> bool:
        """Whether a node can be replaced by a buffer where it is read."""
        if node.op == "get_attr":
            return node not in self.flow.labels and str(node.target) not in self.written
        # Not one that is made of a constant with labels: that is cut already.
        return node in self.constant and not bool(self.flow.labels[node].any())

    # -- what becomes of them -------------------------------------------------------------------------------------

    def unknown(self, node: fx.Node) -> Any:
        """Keep everything around an operator that is not understood."""
        name = str(node.target).removesuffix(".default")
        for operand in node.all_input_nodes:
            self.pin(operand, f"{name} mixes channels, or is not known")
        return self.fixed(node)

    def number(self, node: fx.Node) -> None:
        """A size: whatever axis it measures must keep it."""
        self.flow.labels[node] = None
        for operand in node.all_input_nodes:
            labels = self.flow.labels.get(operand)
            if not isinstance(labels, Tensor):
                continue
            if plain_name(node.target) == "sym_size":  # of one axis: others may lose channels
                axis = arguments(node)["dim"]
                labels = labels if labels.shape[axis] > 1 else torch.tensor([FIXED])
            self.channels.pin(labels, "its number is computed with")

    def join(self, one: Tensor, one_shape: Sequence[int], other: Tensor, other_shape: Sequence[int]) -> Tensor:
        """The labels of an element-wise combination of two values of equal rank, of which axes may have size 1.

        1. Channels along an axis that both have: those at the same place are coupled.
        2. Channels of both, along different axes: no rule for such a table of pairs, so both stay.
        3. Channels of one only: they are the result's, and the other is the same for all of them.
        """
        active = [max(a, b) > 1 for a, b in zip(one.shape, other.shape, strict=True)]
        both = [a > 1 and b > 1 for a, b in zip(one_shape, other_shape, strict=True)]
        if any(a and b for a, b in zip(active, both, strict=True)):  # rule 1
            self.channels.couple(one, other)
            return one if one.numel() >= other.numel() else other
        if one.numel() > 1 and other.numel() > 1:  # rule 2
            for labels in (one, other):
                self.channels.pin(labels, "it is combined with channels of another axis")
            return torch.full((1,) * one.dim(), FIXED)
        if one.numel() == other.numel() and list(one_shape) == list(other_shape):  # rule 1, of one label each
            self.channels.couple(one, other)
        return one if one.numel() > 1 or other.numel() == 1 else other  # rule 3


def operands(node: fx.Node) -> list[fx.Node]:
    """The tensors that a node is given, those in lists too."""
    return [leaf for leaf in pytree.tree_leaves((node.args, node.kwargs)) if is_tensor(leaf)]


def is_tensor(value: Any) -> bool:
    """Whether an argument is a node with one tensor for its value."""
    return isinstance(value, fx.Node) and isinstance(value.meta.get("val"), Tensor)


def _is_empty(labels: Any) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.numel() == 0 for leaf in pytree.tree_leaves(labels))


def _is_written(node: fx.Node) -> bool:
    targets = (user.target for user in node.users)
    return node.op == "get_attr" and any(isinstance(t, torch._ops.OpOverload) and t._schema.is_mutable for t in targets)
