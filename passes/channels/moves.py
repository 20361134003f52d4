"""How operators that only move elements are written for the channels that are left.

Owns :class:`Moves`: the shapes that are left, new numbers for reshapes, splits and slices, and the check that these
move what is left as before. It must not know why a channel goes, nor change the graph.

1. A reshape or an expansion gets the sizes that are left; an axis in which channels and the batch are one gets -1.
2. A split gets the sizes of its parts that are left, even if they were equal before.
3. A slice or a selection starts where as many are left before it as were before.
4. Everything else moves what is left with its old numbers.
5. All of them are tried: run on the groups of what is left, each must make the groups of what is left of its result.
6. One that only changes the order along an axis, or picks from it, and fails, becomes the list of the positions that it
   picks from what is left.
7. Where that fails too, the channels stay.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from srigl_fx.passes.channels.coupling import FIXED, kept_shape
from srigl_fx.passes.channels.decision import RemovalDecision
from srigl_fx.passes.channels.flow import Flow
from srigl_fx.passes.channels.shapes import concrete, concrete_number, execute, index_values, shape_of
from srigl_fx.passes.operators import operator_of, plain_name
from srigl_fx.passes.program import Program, arguments

aten = torch.ops.aten
_PICKING = frozenset({"order", "shuffle", "part", "pick"})  # families of rule 6
_COUNTING = frozenset({"part", "split", "put", "window", "diagonal"})  # families with positions for arguments; and roll
_RESHAPES = {"view": "size", "reshape": "shape", "_unsafe_view": "size", "unflatten": "sizes"}


Plan = tuple[Any, tuple[Any, ...], dict[str, Any]]
"""An operator, its arguments and keyword arguments."""


class _Impossible(Exception):  # noqa: N818 - caught here; what it says is that channels must stay
    """An operator cannot be written for the channels that are left."""


@dataclass
class Moves:
    """What is left of the values of a program by one decision, and the operators that move it.

    Attributes:
        program: The program, which is not changed.
        flow: Its channels.
        decision: What goes.
        plans: For each operator that is touched: the operator, arguments and keyword arguments to put in its place;
            filled in by :meth:`conflicts`. A tensor among the arguments is a constant that is to be made.
    """

    program: Program
    flow: Flow
    decision: RemovalDecision
    plans: dict[fx.Node, Plan] = field(default_factory=dict)

    def kept(self, labels: Tensor) -> Tensor:
        """Which elements of an array of labels stay."""
        return ~self.decision.gone(labels)

    def shape(self, full: Sequence[int], labels: Tensor) -> list[int]:
        """The shape that a value of shape ``full`` has left."""
        left = kept_shape(self.kept(labels))
        if left is None:
            raise _Impossible
        return [after if labels.shape[axis] > 1 else full[axis] for axis, after in enumerate(left)]

    def reduced(self, full: Sequence[int], labels: Tensor) -> Tensor:
        """The groups of what is left of a value, at its shape."""
        kept = self.kept(labels)
        shape = kept_shape(kept)
        if shape is None:
            raise _Impossible
        return self.decision.groups.of(labels)[kept].reshape(shape).expand(self.shape(full, labels))

    def _touched(self, node: fx.Node) -> bool:
        return any(
            bool(self.decision.gone(labels).any())
            for operand in (node, *node.all_input_nodes)
            for labels in pytree.tree_leaves(self.flow.labels.get(operand))
            if isinstance(labels, Tensor)
        )

    def conflicts(self) -> list[fx.Node]:
        """Plan all operators that move elements; those for which that fails."""
        failed = []
        for node in self.program.module.graph.nodes:
            row = operator_of(node.target)
            if row.does in {"moves", "pads"} and not row.axes and self._touched(node):
                for plan in (self._with_new_numbers, self._by_positions):
                    try:
                        self.plans[node] = plan(node)
                        break
                    except (_Impossible, RuntimeError, IndexError):
                        continue
                else:
                    failed.append(node)  # rule 7
        return failed

    def _with_new_numbers(self, node: fx.Node) -> Plan:
        """Rules 1 to 5."""
        target, given = self._new_arguments(node)
        schema = target._schema.arguments
        args = tuple(given[a.name] for a in schema if not a.kwarg_only)
        kwargs = {a.name: given[a.name] for a in schema if a.kwarg_only and given[a.name] != a.default_value}

        def value(operand: fx.Node) -> Tensor:
            return self.reduced(shape_of(operand), self.flow.labels[operand])

        name = plain_name(node.target)
        if operator_of(node.target).does == "pads":
            out = [self._padded(node, given, value(given["self"]))]
        elif name in {"index", "index_select"}:
            indices = index_values(self.program, given, self.flow.labels[given["self"]])
            out = [aten.index.Tensor(value(given["self"]), indices)]
        else:
            out = pytree.tree_leaves(execute(target, args, kwargs, value))
        labels, values = pytree.tree_leaves(self.flow.labels[node]), pytree.tree_leaves(node.meta["val"])
        for one, each, meta in zip(out, labels, values, strict=True):  # rule 5
            if not torch.equal(one, self.reduced(concrete(meta.shape), each)):
                raise _Impossible
        return target, args, kwargs

    def _by_positions(self, node: fx.Node) -> Plan:
        """Rule 6: the operator is run on the positions that the channels left have in their new axis."""
        given = arguments(node)
        data = given.get("self")
        picking = operator_of(node.target).family in _PICKING and isinstance(node.meta["val"], Tensor)
        if not picking or not isinstance(data, fx.Node) or _turns_batch(given, data):
            raise _Impossible
        labels = self.flow.labels[data]
        before = self.shape(shape_of(data), labels)
        after = self.shape(shape_of(node), self.flow.labels[node])
        left = self.kept(labels).expand(shape_of(data))
        numbers = torch.full(left.shape, -1)
        numbers[left] = torch.arange(1, int(left.sum()) + 1)  # from one: an operator may put zeros in between
        if plain_name(node.target) in {"index", "index_select"}:
            moved = aten.index.Tensor(numbers, self._one_index(given, labels))
        else:
            moved = execute(node.target, node.args, node.kwargs, lambda _: numbers)
        picked = moved[self.kept(self.flow.labels[node]).expand(shape_of(node))].reshape(after) - 1
        everything = torch.arange(int(left.sum())).reshape(before)
        for axis, size in enumerate(data.meta["val"].shape):
            if isinstance(size, int) and before[:axis] + before[axis + 1 :] == after[:axis] + after[axis + 1 :]:
                first = picked.movedim(axis, 0).reshape(after[axis], -1)[:, 0]
                index = first // everything.stride(axis) % before[axis]
                if torch.equal(everything.index_select(axis, index), picked):
                    return aten.index_select.default, (data, axis, index), {}
        raise _Impossible

    def _one_index(self, given: dict[str, Any], labels: Tensor) -> list[Any]:
        """The values of an index of one axis, the one with channels."""
        indices = index_values(self.program, given, labels)
        picks = [axis for axis, index in enumerate(indices or []) if index is not None]
        if indices is None or len(picks) != 1 or labels.shape[picks[0]] == 1:
            raise _Impossible
        return indices

    def _padded(self, node: fx.Node, given: dict[str, Any], left: Tensor) -> Tensor:
        labels = self.flow.labels[node]
        if self.flow.labels[given["self"]].shape == labels.shape:  # no channels are added
            return self.reduced(shape_of(node), labels)
        return torch.nn.functional.pad(left, list(given["pad"]), value=self.decision.groups.number[FIXED].item())

    def _new_arguments(self, node: fx.Node) -> tuple[Any, dict[str, Any]]:
        """Operator and arguments that move what is left as ``node`` moved all."""
        name, given = plain_name(node.target), dict(arguments(node))
        target: Any = node.target
        if "self" not in given:  # several tensors in a list: what joins them has no sizes of its own
            return target, given
        data = given["self"]
        before, after = shape_of(data), self.shape(shape_of(data), self.flow.labels[data])
        if name in _RESHAPES or name == "expand":  # rule 1
            key = _RESHAPES.get(name, "size")
            full, out = node.meta["val"].shape, self.shape(shape_of(node), self.flow.labels[node])
            span = slice(None)
            if name == "unflatten":
                span = slice(given["dim"] % len(before), given["dim"] % len(before) + len(given[key]))
            given[key] = _new_sizes(given[key], full[span], out[span], keep=name == "expand")
        elif self._counts_batch(node, given):
            raise _Impossible
        elif operator_of(target).family == "split" and "dim" in given and name != "unbind" and before != after:
            # Rule 2.
            values = zip(node.meta["val"], self.flow.labels[node], strict=True)
            axis = given["dim"] % len(before)
            sizes = [self.shape(concrete(value.shape), labels)[axis] for value, labels in values]
            target, given = aten.split_with_sizes.default, {"self": data, "split_sizes": sizes, "dim": axis}
        elif name in {"slice", "select", "narrow"}:  # rule 3
            self._new_positions(node, name, given, before, after)
        elif name in {"index", "index_select"}:  # rule 4, but for positions that are counted from what was: rule 6
            indices = given["indices"] if name == "index" else [None] * (given["dim"] % len(before)) + [given["index"]]
            lost = [b != a for b, a in zip(before, after, strict=True)]
            if any(index is not None and one for index, one in zip(indices, lost, strict=False)):
                raise _Impossible
        return target, given

    def _counts_batch(self, node: fx.Node, given: dict[str, Any]) -> bool:
        """Whether an operator counts positions along an axis that loses channels and that the batch is part of.

        Numbers that do what they should at a batch of two may do something else at another.
        """
        family, data = operator_of(node.target).family, given["self"]
        sizes, left = data.meta["val"].shape, self.shape(shape_of(data), self.flow.labels[data])
        axes = [given["dim"] % len(sizes)] if family in {"part", "split"} and "dim" in given else range(len(sizes))
        return (family in _COUNTING or plain_name(node.target) == "roll") and any(
            not isinstance(sizes[axis], int) and concrete_number(sizes[axis]) != left[axis] for axis in axes
        )

    def _new_positions(
        self, node: fx.Node, name: str, given: dict[str, Any], before: list[int], after: list[int]
    ) -> None:
        axis = given["dim"] % len(before)
        if before[axis] == after[axis]:
            return
        if given.get("step", 1) != 1:  # steps over what is left are no steps over what was: rule 6
            raise _Impossible
        kept = self.kept(self.flow.labels[given["self"]]).movedim(axis, -1).reshape(-1, before[axis])
        row = kept[kept.any(1)][0]  # any that has something left: rule 5 finds out whether others differ
        if name == "select":
            index = given["index"] % before[axis]
            if not bool(row[index]):  # what it selects is gone
                raise _Impossible
            given["index"] = int(row[:index].sum())
            return
        start = given["start"] if isinstance(given["start"], int) else 0
        first = int(row[: slice(start, None).indices(before[axis])[0]].sum())
        length = self.shape(shape_of(node), self.flow.labels[node])[axis]
        given["start"] = first
        if name == "slice":
            given["end"] = first + length
        else:
            given["length"] = length


def _turns_batch(given: dict[str, Any], data: fx.Node) -> bool:
    """Whether a roll reaches an axis whose size is not known: one size does not show how far it turns there."""
    if "shifts" not in given:
        return False
    sizes = data.meta["val"].shape
    return not given["dims"] or not all(isinstance(sizes[axis], int) for axis in given["dims"])


def _new_sizes(sizes: Any, before: Sequence[Any], after: Sequence[int], *, keep: bool) -> list[Any]:
    """Sizes of a reshape, or of an expansion (``keep``), for what is left.

    ``before`` has the symbol of the batch where there is one, ``after`` is for a batch of two: it is no size to write
    down for an axis that the batch is part of.
    """
    new: list[Any] = []
    for size, old, now in zip(sizes, before, after, strict=True):
        if concrete([old]) == [now] or (size == -1 and keep):
            new.append(size)
        else:
            new.append(now if isinstance(old, int) else -1)
    if not keep and new.count(-1) > 1:  # a size that is computed takes the one -1 that there may be
        new = [
            now if size == -1 and isinstance(old, int) else size
            for size, old, now in zip(new, before, after, strict=True)
        ]
        if new.count(-1) > 1:
            raise _Impossible
    return new
