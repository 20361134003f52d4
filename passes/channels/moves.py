"""How operators that only move elements are written for the channels that are left.

Owns :class:`Moves`: the shapes that are left, new numbers for reshapes, splits and slices, and the check that these
move what is left as before. It must not know why a channel goes, nor change the graph.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from srigl_fx.passes.channels.flow import Flow, concrete, execute, index_values, shape_of
from srigl_fx.passes.channels.groups import FIXED, kept_shape
from srigl_fx.passes.channels.removable import Removable
from srigl_fx.passes.operators import operator_of, plain_name
from srigl_fx.passes.program import Program, arguments

aten = torch.ops.aten
_RESHAPES = {"view": "size", "reshape": "shape", "_unsafe_view": "size", "unflatten": "sizes"}


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
            filled in by :meth:`conflicts`.
    """

    program: Program
    flow: Flow
    decision: Removable
    plans: dict[fx.Node, tuple[Any, tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)

    def kept(self, ids: Tensor) -> Tensor:
        """Which elements of an array of classes stay."""
        return ~self.decision.gone(ids)

    def shape(self, full: Sequence[int], ids: Tensor) -> list[int]:
        """The shape that a value of shape ``full`` has left."""
        left = kept_shape(self.kept(ids))
        if left is None:
            raise _Impossible
        return [after if ids.shape[axis] > 1 else full[axis] for axis, after in enumerate(left)]

    def reduced(self, full: Sequence[int], ids: Tensor) -> Tensor:
        """The groups of what is left of a value, at its shape."""
        kept = self.kept(ids)
        shape = kept_shape(kept)
        if shape is None:
            raise _Impossible
        return self.decision.groups.of(ids)[kept].reshape(shape).expand(self.shape(full, ids))

    def _touched(self, node: fx.Node) -> bool:
        return any(
            bool(self.decision.gone(ids).any())
            for operand in (node, *node.all_input_nodes)
            for ids in pytree.tree_leaves(self.flow.ids.get(operand))
            if isinstance(ids, Tensor)
        )

    def conflicts(self) -> list[fx.Node]:
        """Plan all operators that move elements; those for which that fails."""
        failed = []
        for node in self.program.module.graph.nodes:
            row = operator_of(node.target)
            if row.does in {"moves", "pads"} and not row.axes and self._touched(node):
                try:
                    self._plan(node)
                except (_Impossible, RuntimeError, IndexError):
                    failed.append(node)
        return failed

    def _plan(self, node: fx.Node) -> None:
        target, given = self._new_arguments(node)
        schema = target._schema.arguments
        args = tuple(given[a.name] for a in schema if not a.kwarg_only)
        kwargs = {a.name: given[a.name] for a in schema if a.kwarg_only and given[a.name] != a.default_value}

        def value(operand: fx.Node) -> Tensor:
            return self.reduced(shape_of(operand), self.flow.ids[operand])

        name = plain_name(node.target)
        if operator_of(node.target).does == "pads":
            out = [self._padded(node, given, value(given["self"]))]
        elif name in {"index", "index_select"}:
            indices = index_values(self.program, given, self.flow.ids[given["self"]])
            out = [aten.index.Tensor(value(given["self"]), indices)]
        else:
            out = pytree.tree_leaves(execute(target, args, kwargs, value))
        ids, values = pytree.tree_leaves(self.flow.ids[node]), pytree.tree_leaves(node.meta["val"])
        for one, each, meta in zip(out, ids, values, strict=True):
            if not torch.equal(one, self.reduced(concrete(meta.shape), each)):
                raise _Impossible
        self.plans[node] = (target, args, kwargs)

    def _padded(self, node: fx.Node, given: dict[str, Any], left: Tensor) -> Tensor:
        ids = self.flow.ids[node]
        if self.flow.ids[given["self"]].shape == ids.shape:  # no channels are added
            return self.reduced(shape_of(node), ids)
        return torch.nn.functional.pad(left, list(given["pad"]), value=self.decision.groups.label[FIXED].item())

    def _new_arguments(self, node: fx.Node) -> tuple[Any, dict[str, Any]]:
        """Operator and arguments that move what is left as ``node`` moved all."""
        name, given = plain_name(node.target), dict(arguments(node))
        target: Any = node.target
        if "self" not in given:  # several tensors in a list: what joins them has no sizes of its own
            return target, given
        data = given["self"]
        before, after = shape_of(data), self.shape(shape_of(data), self.flow.ids[data])
        if name in _RESHAPES or name == "expand":
            key = _RESHAPES.get(name, "size")
            out = shape_of(node), self.shape(shape_of(node), self.flow.ids[node])
            if name == "unflatten":
                span = slice(given["dim"] % len(before), given["dim"] % len(before) + len(given[key]))
                out = out[0][span], out[1][span]
            given[key] = _new_sizes(given[key], *out, keep=name == "expand")
        elif operator_of(target).family == "split" and "dim" in given and name != "unbind" and before != after:
            values = zip(node.meta["val"], self.flow.ids[node], strict=True)
            axis = given["dim"] % len(before)
            sizes = [self.shape(concrete(value.shape), ids)[axis] for value, ids in values]
            target, given = aten.split_with_sizes.default, {"self": data, "split_sizes": sizes, "dim": axis}
        elif name in {"slice", "select", "narrow"}:
            self._new_positions(node, name, given, before, after)
        elif name in {"index", "index_select"}:
            indices = given["indices"] if name == "index" else [None] * (given["dim"] % len(before)) + [given["index"]]
            lost = [b != a for b, a in zip(before, after, strict=True)]
            if any(index is not None and one for index, one in zip(indices, lost, strict=False)):
                raise _Impossible
        return target, given

    def _new_positions(
        self, node: fx.Node, name: str, given: dict[str, Any], before: list[int], after: list[int]
    ) -> None:
        axis = given["dim"] % len(before)
        if before[axis] == after[axis]:
            return
        if given.get("step", 1) != 1:
            raise _Impossible
        kept = self.kept(self.flow.ids[given["self"]]).movedim(axis, -1).reshape(-1, before[axis])
        row = kept[kept.any(1)][0]
        if name == "select":
            index = given["index"] % before[axis]
            if not bool(row[index]):
                raise _Impossible
            given["index"] = int(row[:index].sum())
            return
        start = given["start"] if isinstance(given["start"], int) else 0
        first = int(row[: slice(start, None).indices(before[axis])[0]].sum())
        length = self.shape(shape_of(node), self.flow.ids[node])[axis]
        given["start"] = first
        if name == "slice":
            given["end"] = first + length
        else:
            given["length"] = length


def _new_sizes(sizes: Any, before: Sequence[int], after: Sequence[int], *, keep: bool) -> list[Any]:
    """Sizes of a reshape, or of an expansion (``keep``), for what is left."""
    new: list[Any] = []
    for size, old, now in zip(sizes, before, after, strict=True):
        if old == now or (size == -1 and keep):
            new.append(size)
        elif isinstance(size, int):
            new.append(now)
        else:
            new.append(-1)
    if not keep and new.count(-1) > 1:
        new = [
            now if size == -1 and isinstance(old, int) else size
            for size, old, now in zip(new, sizes, after, strict=True)
        ]
        if new.count(-1) > 1:
            raise _Impossible
    return new
