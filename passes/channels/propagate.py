"""How channels travel through a graph: classes for the elements of every value.

Owns :class:`Transport`: operators that move elements are run on the classes, operators that combine elements couple
them. It must not know contractions (they are a rule it is given), masks, values of weights, nor what is removed.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from srigl_fx.passes.channels.flow import (
    Flow,
    Reading,
    align,
    concrete,
    execute,
    index_values,
    joined_axis,
    padded,
    shape_of,
    tensor_count,
)
from srigl_fx.passes.channels.groups import FIXED, compress
from srigl_fx.passes.operators import operator_of, plain_name
from srigl_fx.passes.program import Program, arguments

_LARGEST_CONSTANT = 1 << 21


class Transport:
    """Carries classes through a graph whose constants have one user each."""

    def __init__(
        self,
        program: Program,
        constant: frozenset[fx.Node],
        contract: Callable[["Transport", fx.Node], Any] = lambda transport, node: None,
    ) -> None:
        self.program = program
        self._contract = contract
        self.constant = constant
        self.flow = Flow()
        self.channels = self.flow.channels
        self.weights: dict[str, tuple[Tensor, Tensor]] = {}
        self.written = {str(node.target) for node in program.module.graph.nodes if _is_written(node)}

    def run(self) -> Flow:
        """Visit every node."""
        for node in self.program.module.graph.nodes:
            if node.op == "output":
                for operand in node.all_input_nodes:
                    self.pin(operand, "it is an output of the model")
            elif node.op == "placeholder":
                self.flow.ids[node] = self.fixed(node)
            elif node.op == "get_attr":
                continue
            elif not isinstance(node.meta.get("val"), Tensor | tuple | list) and node.target is not operator.getitem:
                self.number(node)
            else:
                ids = self._contract(self, node)
                ids = self.visit(node) if ids is None else ids
                self.flow.ids[node] = self.unknown(node) if ids is None or _is_empty(ids) else ids
        return self.flow

    # -- values ---------------------------------------------------------------------------------------------------

    def ids(self, node: fx.Node) -> Any:
        """The classes of a node; a constant gets one for every element when it is first asked for."""
        if node not in self.flow.ids:
            shape = shape_of(node)
            count = tensor_count(shape)
            own = self.fixed(node)
            if self.is_constant(node) and node.op == "get_attr" and 1 < count <= _LARGEST_CONSTANT:
                own = self.channels.fresh(count, node.name).reshape(shape)
                self.flow.adopted.append((node, node, own))
            self.flow.ids[node] = own
        return self.flow.ids[node]

    def full(self, node: fx.Node) -> Tensor:
        """The classes of a node's value, at full shape."""
        ids: Tensor = self.ids(node)
        return ids.expand(shape_of(node))

    def fixed(self, node: fx.Node) -> Any:
        """The fixed class for every value of a node."""
        return pytree.tree_map(
            lambda value: torch.full((1,) * value.dim(), FIXED) if isinstance(value, Tensor) else None, node.meta["val"]
        )

    def pin(self, node: fx.Node, reason: str) -> None:
        """Nothing of a node's value may be removed."""
        if node.op == "get_attr" and node not in self.flow.ids:
            return
        for ids in pytree.tree_leaves(self.ids(node)):
            if isinstance(ids, Tensor):
                self.channels.pin(ids, reason)

    def pin_others(self, node: fx.Node, *handled: fx.Node | None) -> None:
        """Keep all operands but those given: they are read in a way of their own."""
        for operand in _operands(node):
            if operand not in handled:
                self.pin(operand, f"it is a setting of {node.name}")

    def adopt(self, constant: fx.Node | None, ids: Tensor, reader: fx.Node) -> None:
        """Let an operand that may be a constant follow ``ids``."""
        if not isinstance(constant, fx.Node):
            return
        if self.is_constant(constant):
            self.flow.adopted.append((constant, reader, ids))
        else:
            own = self.ids(constant)
            self.channels.couple(align(own, ids.dim()), ids)

    def is_constant(self, node: fx.Node) -> bool:
        """Whether a node can be replaced by a buffer where it is read."""
        if node.op == "get_attr":
            return node not in self.flow.ids and str(node.target) not in self.written
        return node in self.constant and not bool(self.flow.ids[node].any())  # not made of classes of its own

    # -- operators ------------------------------------------------------------------------------------------------

    def visit(self, node: fx.Node) -> Any:
        """The classes of the result of an operator that contracts no channels; None where it is unknown."""
        if node.target is operator.getitem:
            source, index = node.args
            found = self.ids(source) if isinstance(source, fx.Node) else None
            return found[index] if isinstance(found, list | tuple) and isinstance(index, int) else None
        name = plain_name(node.target)
        if not name:
            return None
        given, row = arguments(node), operator_of(node.target)
        first = next((value for value in given.values() if _is_tensor(value)), None)
        shaped = row.does == "copies" or row.family in {"like", "filled"}
        if shaped and first is not None and first.op != "get_attr":
            if row.family != "cast":  # of the other operand of a cast, only the type matters
                self.pin_others(node, first)
            return self.ids(first)
        if row.family == "new" or row.does == "measures":
            return self.fixed(node)
        if row.does in {"pointwise", "copies"}:
            return self.pointwise(node) if isinstance(node.meta["val"], Tensor) else None
        special: Callable[[fx.Node, dict[str, Any]], Any] | None = getattr(self, f"_{name.strip('_')}", None)
        if special is not None:
            return special(node, given)
        if row.does == "moves" and not row.axes:
            return self.layout(node)
        if first is None:  # none, or some in a list
            return None
        rank = len(shape_of(first))
        self.pin_others(node, first)
        if row.does == "pads":
            return self._padded(node, given, first)
        axes = rank - 2 if row.family == "sample" else row.axes  # a grid samples all but batch and channels
        if axes:
            ids = self.channels.merge(self.ids(first), range(rank - axes, rank))
            return pytree.tree_map(lambda _: ids, node.meta["val"])
        if row.does == "along" and isinstance(given.get("dim"), int):
            ids = self.channels.merge(self.ids(first), [given["dim"] % rank])
            return pytree.tree_map(lambda _: ids, node.meta["val"])
        if row.does == "reduces" and row.family != "matrix":
            dims = given.get("dim")
            dims = [dims] if isinstance(dims, int) else list(dims) if dims else list(range(rank))
            return self._reduced(node, first, [dim % rank for dim in dims], bool(given.get("keepdim")))
        return None

    def unknown(self, node: fx.Node) -> Any:
        """Keep everything around an operator that is not understood."""
        name = str(node.target).removesuffix(".default")
        for operand in node.all_input_nodes:
            self.pin(operand, f"{name} mixes channels, or is not known")
        return self.fixed(node)

    def number(self, node: fx.Node) -> None:
        """A size: whatever axis it measures must keep it."""
        self.flow.ids[node] = None
        for operand in node.all_input_nodes:
            ids = self.flow.ids.get(operand)
            if not isinstance(ids, Tensor):
                continue
            if plain_name(node.target) == "sym_size":
                axis = arguments(node)["dim"]
                ids = ids if ids.shape[axis] > 1 else torch.tensor([FIXED])
            self.channels.pin(ids, "its number is computed with")

    def join(self, one: Tensor, one_shape: Sequence[int], other: Tensor, other_shape: Sequence[int]) -> Tensor:
        """The classes of an element-wise combination of two values of equal rank, of which axes may have size 1."""
        active = [max(a, b) > 1 for a, b in zip(one.shape, other.shape, strict=True)]
        both = [a > 1 and b > 1 for a, b in zip(one_shape, other_shape, strict=True)]
        if any(a and b for a, b in zip(active, both, strict=True)):
            self.channels.couple(one, other)
            return one if one.numel() >= other.numel() else other
        if one.numel() > 1 and other.numel() > 1:
            for ids in (one, other):
                self.channels.pin(ids, "it is combined with channels of another axis")
            return torch.full((1,) * one.dim(), FIXED)
        if one.numel() == other.numel() and list(one_shape) == list(other_shape):
            self.channels.couple(one, other)
        return one if one.numel() > 1 or other.numel() == 1 else other

    def pointwise(self, node: fx.Node) -> Tensor:
        """Element by element: the operands are coupled, constants follow."""
        rank = len(shape_of(node))
        ids: Tensor | None = None
        shape: list[int] = []
        constants = []
        for operand in _operands(node):
            if self.is_constant(operand):
                constants.append(operand)
                continue
            other, other_shape = align(self.ids(operand), rank), padded(shape_of(operand), rank)
            if ids is None:
                ids, shape = other, other_shape
            else:
                ids = self.join(ids, shape, other, other_shape)
                shape = [max(a, b) for a, b in zip(shape, other_shape, strict=True)]
        if ids is None:
            return torch.full((1,) * rank, FIXED)
        for constant in constants:
            self.adopt(constant, ids, node)
        return ids

    def layout(self, node: fx.Node) -> Any:
        """Elements change places: run the operator on the classes."""
        given = arguments(node)
        if plain_name(node.target) in {"index", "index_select"}:
            return self._indexed(node, given)
        axis = joined_axis(node)
        if axis is not None:
            parts = [self.ids(part) for part in given["tensors"]]
            if all(part.shape[axis] == 1 for part in parts) and any(part.numel() > 1 for part in parts):
                for part in parts[1:]:
                    self.channels.couple(parts[0], part)
                return max(parts, key=Tensor.numel)
        elif "dtype" in given or any(_is_tensor(value) for key, value in given.items() if key != "self"):
            return None
        assert isinstance(node.target, torch._ops.OpOverload)
        out = execute(node.target, node.args, node.kwargs, self.full)
        return pytree.tree_map(compress, out)

    def _indexed(self, node: fx.Node, given: dict[str, Any]) -> Any:
        self.pin_others(node, given["self"])
        indices = index_values(self.program, given, self.ids(given["self"]))
        return None if indices is None else compress(torch.ops.aten.index.Tensor(self.full(given["self"]), indices))

    def _padded(self, node: fx.Node, given: dict[str, Any], first: fx.Node) -> Any:
        ids = self.ids(first)
        amounts: list[int] = list(given["pad"] if "pad" in given else given["padding"])
        if not all(isinstance(amount, int) and amount >= 0 for amount in amounts):
            return None  # it cuts, which fake tensors of a symbolic size cannot do again
        axes = [ids.dim() - 1 - i // 2 for i, amount in enumerate(amounts) if amount != 0]
        if all(ids.shape[axis] == 1 for axis in axes):
            return ids
        if given.get("mode", "constant") != "constant":
            return None
        return compress(torch.nn.functional.pad(self.full(first), amounts, value=FIXED))

    def _reduced(self, node: fx.Node, first: fx.Node, dims: list[int], keepdim: bool) -> Any:
        ids = self.ids(first)
        active = [axis for axis, size in enumerate(ids.shape) if size > 1]
        static = all(isinstance(first.meta["val"].shape[axis], int) for axis in active)
        if plain_name(node.target) in {"mean", "sum"} and len(active) == 1 and active[0] in dims and static:
            self.flow.readings.append(Reading(node, first, active[0] - ids.dim()))
            ids = torch.full((1,) * ids.dim(), FIXED)
        ids = self.channels.merge(ids, dims)
        if not keepdim:
            for dim in sorted(dims, reverse=True):
                ids = ids.squeeze(dim)
        return pytree.tree_map(lambda _: ids, node.meta["val"])

    def _glu(self, node: fx.Node, given: dict[str, Any]) -> Tensor:
        halves = self.full(given["self"]).chunk(2, given["dim"])
        one, other = (compress(half) for half in halves)
        self.channels.couple(one, other)
        return one if one.numel() >= other.numel() else other

    def _layer_norm(self, node: fx.Node, given: dict[str, Any]) -> Any:
        self.pin_others(node, given["input"])
        rank = len(shape_of(given["input"]))
        ids = self.ids(given["input"])
        return self.channels.merge(ids, range(rank - len(given["normalized_shape"]), rank))

    def _rms_norm(self, node: fx.Node, given: dict[str, Any]) -> Any:
        ids = self.ids(given["input"])
        gain = given["weight"]
        one_axis = len(given["normalized_shape"]) == 1 and ids.numel() == ids.shape[-1] > 1
        if one_axis and (gain is None or gain.op == "get_attr"):
            self.flow.readings.append(Reading(node, given["input"], -1))
            return ids
        return self._layer_norm(node, given)

    def _group_norm(self, node: fx.Node, given: dict[str, Any]) -> Any:
        ids = self.channels.merge(self.ids(given["input"]), range(2, len(shape_of(given["input"]))))
        count = shape_of(given["input"])[1]
        grouped = ids.expand(-1, count, *ids.shape[2:]).reshape(ids.shape[0], given["num_groups"], -1)
        merged = self.channels.merge(grouped, [2]).expand(grouped.shape)
        out = compress(merged.reshape(ids.shape[0], count, *ids.shape[2:]))
        for constant in (given["weight"], given["bias"]):
            self.adopt(constant, out.reshape(-1), node)
        return out

    def _batch_norm(self, node: fx.Node, given: dict[str, Any]) -> Any:
        """Any norm with statistics by channel, given or over the other axes."""
        data = given["input"]
        ids = self.ids(data)
        if given.get("training") or given.get("use_input_stats"):
            ids = self.channels.merge(ids, range(2, ids.dim()))
        vector = self.channels.merge(ids, [axis for axis in range(ids.dim()) if axis != 1]).reshape(-1)
        for key in ("weight", "bias", "running_mean", "running_var"):
            self.adopt(given.get(key), vector, node)
        value = node.meta["val"]
        if isinstance(value, Tensor):
            return ids
        statistics = zip(value[1:], self.fixed(node)[1:], strict=True)
        by_channel = [shape_of(data)[1]]
        return [ids, *(vector if concrete(one.shape) == by_channel else fixed for one, fixed in statistics)]

    _native_batch_norm_legit_no_training = _batch_norm
    _native_batch_norm_legit = _batch_norm
    _instance_norm = _batch_norm

    def _prelu(self, node: fx.Node, given: dict[str, Any]) -> Any:
        ids = self.ids(given["self"])
        if shape_of(given["weight"]) != [1]:
            vector = self.channels.merge(ids, [axis for axis in range(ids.dim()) if axis != 1]).reshape(-1)
            self.adopt(given["weight"], vector, node)
        return ids

    def _im2col(self, node: fx.Node, given: dict[str, Any]) -> Any:
        ids = self.channels.merge(self.ids(given["self"]), range(2, 4)).squeeze(3)
        window = given["kernel_size"][0] * given["kernel_size"][1]
        return compress(ids.expand(-1, shape_of(given["self"])[1], -1).repeat_interleave(window, 1))


def _is_tensor(value: Any) -> bool:
    return isinstance(value, fx.Node) and isinstance(value.meta.get("val"), Tensor)


def _is_empty(ids: Any) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.numel() == 0 for leaf in pytree.tree_leaves(ids))


def _is_written(node: fx.Node) -> bool:
    targets = (user.target for user in node.users)
    return node.op == "get_attr" and any(isinstance(t, torch._ops.OpOverload) and t._schema.is_mutable for t in targets)


def _operands(node: fx.Node) -> list[fx.Node]:
    return [leaf for leaf in pytree.tree_leaves((node.args, node.kwargs)) if _is_tensor(leaf)]
