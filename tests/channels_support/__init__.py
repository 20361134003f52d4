"""Graphs and labels that are written by hand: what the rooms of ``passes/channels`` are tested with.

Nothing is captured: every value is a tensor, and the batch is its first axis, of size two.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from srigl_fx.passes.channels.coupling import Groups
from srigl_fx.passes.channels.cut import Cut
from srigl_fx.passes.channels.decision import RemovalDecision
from srigl_fx.passes.channels.flow import Flow
from srigl_fx.passes.channels.moves import Moves
from srigl_fx.passes.channels.propagate import Propagation
from srigl_fx.passes.channels.rules import rule_of
from srigl_fx.passes.constness import Constant
from srigl_fx.passes.program import Program, new_buffer
from srigl_fx.passes.sizes import Sizes

aten = torch.ops.aten


class Labelled(Propagation):
    """A propagation that begins with labels at some of the model's inputs."""

    def __init__(self, program: Program, given: dict[fx.Node, Tensor]) -> None:
        super().__init__(program, frozenset(), rule_of)
        self.given = given
        self.count = max((int(labels.max()) for labels in given.values()), default=0)
        self.channels.fresh(self.count, "given")

    def fixed(self, node: fx.Node) -> Any:
        return self.given[node] if node in self.given else super().fixed(node)


class Builder:
    """A graph in the making: inputs (with labels, if any), constants and calls, each a node with its value."""

    def __init__(self) -> None:
        self.module = fx.GraphModule(nn.Module(), fx.Graph())
        self.given: dict[fx.Node, Tensor] = {}
        self.inputs: list[Tensor] = []

    def input(self, value: Tensor, labels: Any = None) -> fx.Node:
        """An input; its labels are a list nested as deep as it has axes, of size 1 where they do not vary."""
        node = self.module.graph.placeholder(f"x{len(self.inputs)}")
        node.meta["val"] = value
        self.inputs.append(value)
        if labels is not None:
            self.given[node] = torch.tensor(labels)
        return node

    def constant(self, value: Tensor, name: str = "c") -> fx.Node:
        return new_buffer(self.module, name, value)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.module.graph.call_function(target, args, kwargs)
        values = fx.node.map_arg((args, kwargs), lambda operand: operand.meta["val"])
        node.meta["val"] = target(*values[0], **values[1])
        if isinstance(node.meta["val"], tuple):
            node.meta["val"] = list(node.meta["val"])
        return node

    def finish(self, *outputs: fx.Node) -> Program:
        self.module.graph.output(outputs[0] if len(outputs) == 1 else outputs)
        self.module.recompile()
        return Program(
            module=self.module,
            model=self.module,
            args=tuple(self.inputs),
            kwargs={},
            sizes=Sizes.of_batch((False,) * len(self.inputs)),
            how="by hand",
        )

    def propagate(self, *outputs: fx.Node) -> Labelled:
        """Labels for all values; what is returned stays, so leave it out to see what operators alone say."""
        propagation = Labelled(self.finish(*outputs), self.given)
        propagation.run()
        return propagation


class Removal:
    """A graph, its labels, what goes of it, and its operators for what is left."""

    def __init__(self, propagation: Propagation, known: dict[fx.Node, Constant] | None = None) -> None:
        self.program, self.flow = propagation.program, propagation.flow
        self.known = known or {}
        self.groups: Groups = self.flow.channels.resolve()
        self.decision = RemovalDecision(self.program, self.flow, self.groups, self.known)
        self.moves = Moves(self.program, self.flow, self.decision)

    def force(self, labels: list[int]) -> None:
        """Exactly the groups of these labels go."""
        self.decision.removed[:] = False
        self.decision.removed[self.groups.of(torch.tensor(labels, dtype=torch.long))] = True

    def cut(self) -> None:
        """Rewrite the graph; every operator must be possible."""
        assert self.moves.conflicts() == []
        Cut(self.program, self.flow, self.decision, self.moves, self.known).apply()
        self.program.module.graph.lint()
        self.program.module.recompile()

    def left(self, node: fx.Node, value: Tensor | None = None) -> Tensor:
        """What stays of a node's value, as an array."""
        value = node.meta["val"] if value is None else value
        kept = self.moves.kept(self.flow.labels[node])
        return value[kept.expand(value.shape)].reshape(self.moves.shape(list(value.shape), self.flow.labels[node]))


def run_flow(build: Callable[[Builder], fx.Node]) -> tuple[fx.Node, Labelled]:
    """The node that ``build`` makes, and the labels; nothing is returned by the graph but a constant."""
    builder = Builder()
    node = build(builder)
    return node, builder.propagate(builder.constant(torch.zeros(1), "nothing"))


def partition(flow: Flow, count: int) -> list[list[int]]:
    """Which of the labels 1 to ``count`` are coupled with each other: the groups of more than one."""
    number = flow.channels.resolve().of(torch.arange(count + 1)).tolist()
    groups: dict[int, list[int]] = {}
    for label in range(1, count + 1):
        groups.setdefault(number[label], []).append(label)
    return [labels for labels in groups.values() if len(labels) > 1]


def pinned(flow: Flow, count: int) -> list[int]:
    """Which of the labels 1 to ``count`` must stay."""
    groups = flow.channels.resolve()
    return [label for label in range(1, count + 1) if bool(groups.pinned[groups.number[label]])]


def flat(labels: Any) -> list[Any]:
    """Labels of one value as a list, of several as a list of lists."""
    leaves = [leaf.reshape(-1).tolist() for leaf in pytree.tree_leaves(labels) if isinstance(leaf, Tensor)]
    return leaves[0] if isinstance(labels, Tensor) else leaves
