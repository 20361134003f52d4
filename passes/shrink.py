"""A graph without the channels that go: new constants, new numbers in operators that move elements.

Owns :class:`Shrink`: the check that every rewritten operator moves the channels that are left as before, and the
rewriting. It must not know why a channel goes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from srigl_fx.passes.channel_flow import Flow, Reading, Site, align, concrete, execute, padded, shape_of
from srigl_fx.passes.channel_groups import kept_shape
from srigl_fx.passes.constness import Constant
from srigl_fx.passes.op_table import CONVOLUTIONS, LAYOUT, PADS, TRANSPOSED, plain_name
from srigl_fx.passes.program import MaskedTensor, Program, arguments, new_buffer, tensor_at
from srigl_fx.passes.removable import Fold, Removable, known_of

aten = torch.ops.aten
_RESHAPES = {"view": "size", "reshape": "shape", "_unsafe_view": "size", "unflatten": "sizes"}


class Infeasible(Exception):
    """An operator cannot be rewritten for the channels that are left."""


class Shrink:
    """The rewriting of one program by one decision."""

    def __init__(self, program: Program, flow: Flow, decision: Removable, known: dict[fx.Node, Constant]) -> None:
        self.program, self.flow, self.decision, self.known = program, flow, decision, known
        self._plans: dict[fx.Node, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {}
        self._made: dict[Any, str] = {}

    # -- reduced values -------------------------------------------------------------------------------------------

    def kept(self, ids: Tensor) -> Tensor:
        """Which elements of an array of classes stay."""
        return ~self.decision.gone(ids)

    def shape(self, full: Sequence[int], ids: Tensor) -> list[int]:
        """The shape that a value of shape ``full`` has left."""
        left = kept_shape(self.kept(ids))
        if left is None:
            raise Infeasible
        return [after if ids.shape[axis] > 1 else full[axis] for axis, after in enumerate(left)]

    def reduced(self, full: Sequence[int], ids: Tensor) -> Tensor:
        """The groups of what is left of a value, at its shape."""
        kept = self.kept(ids)
        shape = kept_shape(kept)
        if shape is None:
            raise Infeasible
        return self.decision.groups.of(ids)[kept].reshape(shape).expand(self.shape(full, ids))

    def _touched(self, node: fx.Node) -> bool:
        return any(
            bool(self.decision.gone(ids).any())
            for operand in (node, *node.all_input_nodes)
            for ids in pytree.tree_leaves(self.flow.ids.get(operand))
            if isinstance(ids, Tensor)
        )

    # -- the check ------------------------------------------------------------------------------------------------

    def conflicts(self) -> list[fx.Node]:
        """Plan all operators that move elements; those for which that fails."""
        failed = []
        for node in self.program.module.graph.nodes:
            if plain_name(node.target) in LAYOUT | PADS and self._touched(node):
                try:
                    self._plan(node)
                except (Infeasible, RuntimeError, IndexError):
                    failed.append(node)
        return failed

    def _plan(self, node: fx.Node) -> None:
        target, given = self._new_arguments(node)
        schema = target._schema.arguments
        args = tuple(given[a.name] for a in schema if not a.kwarg_only)
        kwargs = {a.name: given[a.name] for a in schema if a.kwarg_only and given[a.name] != a.default_value}

        def value(operand: fx.Node) -> Any:
            if operand not in self.flow.ids:  # an index
                return tensor_at(self.program.module, str(operand.target))
            return self.reduced(shape_of(operand), self.flow.ids[operand])

        if plain_name(node.target) not in PADS and plain_name(node.target) not in {"index", "index_select"}:
            out = pytree.tree_leaves(execute(target, args, kwargs, value))
        elif plain_name(node.target) in PADS:
            out = self._pad_out(node, given, value)
        else:
            out = self._index_out(node, given, value)
        ids, values = pytree.tree_leaves(self.flow.ids[node]), pytree.tree_leaves(node.meta["val"])
        for one, each, meta in zip(out, ids, values, strict=True):
            if not torch.equal(one, self.reduced(concrete(meta.shape), each)):
                raise Infeasible
        self._plans[node] = (target, args, kwargs)

    def _pad_out(self, node: fx.Node, given: dict[str, Any], value: Any) -> list[Tensor]:
        ids = self.flow.ids[node]
        first = given["self"]
        if bool((self.flow.ids[first].numel() == ids.numel()) and self.flow.ids[first].shape == ids.shape):
            return [self.reduced(shape_of(node), ids)]
        return [torch.nn.functional.pad(value(first), list(given["pad"]), value=0)]

    def _index_out(self, node: fx.Node, given: dict[str, Any], value: Any) -> list[Tensor]:
        data = value(given["self"])

        def index(operand: Any, axis: int) -> Any:
            if not isinstance(operand, fx.Node):
                return operand
            if self.flow.ids[given["self"]].shape[axis] == 1:
                return torch.zeros(shape_of(operand), dtype=torch.long)
            return tensor_at(self.program.module, str(operand.target))

        if "indices" in given:
            out = aten.index.Tensor(data, [index(operand, axis) for axis, operand in enumerate(given["indices"])])
        else:
            out = data.index_select(given["dim"], index(given["index"], given["dim"]))
        return [out]

    def _new_arguments(self, node: fx.Node) -> tuple[Any, dict[str, Any]]:
        """Operator and arguments that move what is left as ``node`` moved all."""
        name, given = plain_name(node.target), dict(arguments(node))
        target: Any = node.target
        if name in {"cat", "concat", "stack"}:
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
        elif name in {"split", "split_with_sizes", "chunk"} and before != after:
            values = zip(node.meta["val"], self.flow.ids[node], strict=True)
            axis = given["dim"] % len(before)
            sizes = [self.shape(concrete(value.shape), ids)[axis] for value, ids in values]
            target, given = aten.split_with_sizes.default, {"self": data, "split_sizes": sizes, "dim": axis}
        elif name in {"slice", "select", "narrow"}:
            self._new_positions(node, name, given, before, after)
        elif name == "index_select" and before[given["dim"]] != after[given["dim"]]:
            raise Infeasible
        elif name == "index":
            changed = [b != a for b, a in zip(before, after, strict=True)]
            if any(index is not None and c for index, c in zip(given["indices"], changed, strict=False)):
                raise Infeasible
        return target, given

    def _new_positions(
        self, node: fx.Node, name: str, given: dict[str, Any], before: list[int], after: list[int]
    ) -> None:
        axis = given["dim"] % len(before)
        if before[axis] == after[axis]:
            return
        if given.get("step", 1) != 1:
            raise Infeasible
        kept = self.kept(self.flow.ids[given["self"]]).movedim(axis, -1).reshape(-1, before[axis])
        row = kept[kept.any(1)][0]
        if name == "select":
            index = given["index"] % before[axis]
            if not bool(row[index]):
                raise Infeasible
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

    # -- the rewriting --------------------------------------------------------------------------------------------

    def apply(self) -> None:
        """Rewrite the graph."""
        for node, (target, args, kwargs) in self._plans.items():
            node.target, node.args, node.kwargs = target, args, kwargs
        for site in self.flow.sites:
            self._site(site)
        for constant, reader, ids in self.flow.adopted:
            self._constant(constant, reader, ids)
        for pairing in self.flow.pairings:
            if plain_name(pairing.node.target) == "scaled_dot_product_attention":
                width = shape_of(pairing.left)[-1]
                if self._left(pairing.left)[-1] != width and arguments(pairing.node)["scale"] is None:
                    pairing.node.kwargs = {**pairing.node.kwargs, "scale": width**-0.5}
        for reading in self.flow.readings:
            self._reading(reading)
        for node in list(self.program.module.graph.nodes):
            if plain_name(node.target) == "group_norm":
                data = arguments(node)["input"]
                before, after = shape_of(data)[1], self._left(data)[1]
                if before != after:
                    groups = arguments(node)["num_groups"] * after // before
                    node.args = (node.args[0], groups, *node.args[2:])

    def _left(self, node: fx.Node) -> list[int]:
        return self.shape(shape_of(node), self.flow.ids[node])

    def _buffer(self, before: fx.Node, like: str, tensor: Tensor, mask: Tensor | None = None) -> fx.Node:
        """A constant read before a node; equal ones made from one tensor are one buffer, so that tied stays tied."""
        module = self.program.module
        key = (like, tuple(tensor.shape), tensor.dtype, hash(tensor.contiguous().numpy().tobytes()))
        with module.graph.inserting_before(before):
            if key in self._made:
                node = module.graph.get_attr(self._made[key])
            else:
                node = new_buffer(module, like, tensor)
                self._made[key] = str(node.target)
        node.meta["val"] = tensor_at(module, str(node.target))
        if mask is not None:
            fqn = self.program.masked[like].fqn
            self.program.masked[str(node.target)] = MaskedTensor(fqn=fqn, mask=mask.contiguous())
        return node

    def _site(self, site: Site) -> None:
        rows, columns = self.kept(site.rows), self.kept(site.columns)
        if bool(rows.all()) and bool(columns.all()):
            return
        target = str(site.weight.target)
        weight = tensor_at(self.program.module, target).detach()
        masked = self.program.masked.get(target)
        kernel = weight.shape[2:]
        matrix = site.matrix(weight)
        mask = None if masked is None else site.matrix(masked.mask)
        fold = None if site.data is None or site.coupled else self.decision.fold(site)
        shift = post = None
        if fold is not None:
            shift, post = self._contribution(site, fold, matrix), self._map(site, fold)
            matrix, mask = self._carry(site, fold, matrix, mask)
        cut = _cut(matrix, rows, columns)
        new_mask = None if mask is None else site.tensor(_cut(mask, rows, columns), kernel)
        node = site.node
        node.replace_input_with(site.weight, self._buffer(node, target, site.tensor(cut, kernel), new_mask))
        if plain_name(node.target) in CONVOLUTIONS | TRANSPOSED:
            given = arguments(node)
            given["groups"] = cut.shape[0]
            node.args, node.kwargs = tuple(given.values()), {}
        self._bias(site, rows, shift, post, weight.dtype)

    def _bias(self, site: Site, rows: Tensor, shift: Tensor | None, post: Tensor | None, dtype: torch.dtype) -> None:
        """Cut the bias, with what the folded channels contributed (groups, rows); add the map, if any."""
        node = site.node
        if site.bias is not None:
            name = str(site.bias.target)
            old = tensor_at(self.program.module, name).detach()
            new = old.double() if shift is None else old.double() + shift.reshape(-1)
            if not bool(rows.all()) or shift is not None:
                node.replace_input_with(site.bias, self._buffer(node, name, new[rows.reshape(-1)].to(dtype)))
        elif shift is not None:
            value = shift.reshape(-1)[rows.reshape(-1)].to(dtype)
            owner = str(site.weight.target).rpartition(".")[0]
            buffer = self._buffer(node, f"{owner}.bias" if owner else "bias", value)
            if "bias" in arguments(node) and arguments(node)["bias"] is None:
                given = {**arguments(node), "bias": buffer}
                node.args, node.kwargs = tuple(given.values()), {}
            else:
                rank = len(shape_of(node))
                self._add_after(node, buffer if site.axis == -1 else self._spread(buffer, -site.axis, rank))
        if post is not None:
            self._add_after(node, self._buffer(node, f"{node.name}_constant", post.to(dtype)))

    def _spread(self, buffer: fx.Node, trailing: int, rank: int) -> fx.Node:
        tensor = tensor_at(self.program.module, str(buffer.target))
        return self._buffer(buffer, str(buffer.target), tensor.reshape(-1, *[1] * (trailing - 1)))

    def _add_after(self, node: fx.Node, constant: fx.Node) -> None:
        graph = self.program.module.graph
        users = list(node.users)
        with graph.inserting_after(node):
            total = graph.call_function(aten.add.Tensor, (node, constant))
        total.meta = dict(node.meta)
        for user in users:
            user.replace_input_with(node, total)

    def _contribution(self, site: Site, fold: Fold, matrix: Tensor) -> Tensor | None:
        """(groups, rows): what uniform constant channels add to every element of a row."""
        if not bool(fold.bias.any()):
            return None
        value = torch.where(fold.bias, self.decision.arriving(site).value, 0)
        return torch.einsum("grck,gc->gr", matrix.double(), value)

    def _carry(self, site: Site, fold: Fold, matrix: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Add the columns of constant channels to that of the constant channel that stays."""
        value = self.decision.arriving(site).value
        for group, carrier in enumerate(fold.carrier.tolist()):
            if carrier < 0:
                continue
            carried = fold.carried[group]
            matrix = matrix.clone()
            share = value[group, carried] / value[group, carrier]
            extra = torch.einsum("rck,c->rk", matrix[group][:, carried].double(), share)
            matrix[group, :, carrier] = (matrix[group, :, carrier].double() + extra).to(matrix.dtype)
            if mask is not None:
                mask = mask.clone()
                mask[group, :, carrier] |= mask[group][:, carried].any(1)
        return matrix, mask

    def _map(self, site: Site, fold: Fold) -> Tensor | None:
        """What constant channels that are not uniform contribute, for batch 1."""
        if not bool(fold.mapped.any()) or site.data is None:
            return None
        constant = known_of(site.data, self.known)
        assert constant is not None
        shape = [1] * constant.value.dim()
        shape[site.axis] = -1
        data = torch.where(fold.mapped.reshape(shape), constant.value.double(), 0.0)
        given = {**arguments(site.node)}
        weight = tensor_at(self.program.module, str(site.weight.target)).detach().double()
        operands = {site.data: data, site.weight: weight}
        if site.bias is not None:
            operands[site.bias] = torch.zeros(1, dtype=torch.float64).expand(site.rows.numel())
        given = {k: operands.get(v, v) if isinstance(v, fx.Node) else v for k, v in given.items()}
        assert isinstance(site.node.target, torch._ops.OpOverload)
        schema = site.node.target._schema.arguments
        args = [given[a.name] for a in schema if not a.kwarg_only]
        out: Tensor = site.node.target(*args, **{a.name: given[a.name] for a in schema if a.kwarg_only})
        return out.index_select(site.axis, self.kept(site.rows).reshape(-1).nonzero().flatten())

    def _constant(self, constant: fx.Node, reader: fx.Node, ids: Tensor) -> None:
        kept = self.kept(ids)
        if bool(kept.all()):
            return
        masked = None
        if constant.op == "get_attr":
            name = str(constant.target)
            tensor, masked = tensor_at(self.program.module, name).detach(), self.program.masked.get(name)
        else:
            known = known_of(constant, self.known)
            assert known is not None
            name, tensor = f"{constant.name}_constant", known.value
        cut = cut_constant(tensor, kept)
        if cut.shape == tensor.shape and torch.equal(cut, tensor):
            return
        mask = None if masked is None else cut_constant(masked.mask, kept)
        if reader is constant:
            constant.replace_all_uses_with(self._buffer(constant, name, cut, mask))
        else:
            reader.replace_input_with(constant, self._buffer(reader, name, cut, mask))

    def _reading(self, reading: Reading) -> None:
        node, graph = reading.node, self.program.module.graph
        before, after = (shape[reading.axis] for shape in (shape_of(reading.data), self._left(reading.data)))
        if before == after:
            return
        name, given = plain_name(node.target), arguments(node)
        if name == "mean":
            users = list(node.users)
            with graph.inserting_after(node):
                scaled = graph.call_function(aten.mul.Tensor, (node, after / before))
            scaled.meta = dict(node.meta)
            for user in users:
                user.replace_input_with(node, scaled)
        elif name == "rms_norm":
            gain = torch.ones(before, dtype=node.meta["val"].dtype)
            kept = self.kept(self.flow.ids[reading.data]).reshape(-1)
            like = f"{node.name}_gain"
            if given["weight"] is not None:
                like = str(given["weight"].target)
                gain = tensor_at(self.program.module, like).detach()
            gain = gain[kept] * (after / before) ** 0.5
            eps = given["eps"] if given["eps"] is not None else torch.finfo(node.meta["val"].dtype).eps
            node.args = (given["input"], [after], self._buffer(node, like, gain), eps * before / after)
            node.kwargs = {}


def _new_sizes(sizes: Any, before: Sequence[int], after: Sequence[int], *, keep: bool) -> list[Any]:
    """Sizes of a reshape, or of an expansion (``keep``), for what is left."""
    new: list[Any] = []
    for size, old, now in zip(sizes, before, after, strict=True):
        if old == now or size == -1 and keep:
            new.append(size)
        elif isinstance(size, int):
            new.append(now)
        else:
            new.append(-1)
    if not keep and new.count(-1) > 1:
        new = [now if size == -1 and isinstance(old, int) else size for size, old, now in zip(new, sizes, after, strict=True)]
        if new.count(-1) > 1:
            raise Infeasible
    return new


def _cut(matrix: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The kept (groups, rows, columns, kernel) of a weight."""
    groups = rows.any(1)
    row = torch.stack([r.nonzero().flatten() for r in rows[groups]])
    column = torch.stack([c.nonzero().flatten() for c in columns[groups]])
    left = groups.nonzero()
    return matrix[left[:, :, None], row[:, :, None], column[:, None, :]]


def cut_constant(tensor: Tensor, kept: Tensor) -> Tensor:
    """What is left of a constant that is combined with values of which ``kept`` stays.

    Args:
        tensor: Broadcasts against the values.
        kept: bool; broadcasts to them too.

    Example:
        >>> cut_constant(torch.tensor([5, 6, 7]), torch.tensor([[True, False, True]])).tolist()
        [5, 7]
        >>> cut_constant(torch.tensor([5, 6]), torch.tensor([[True, False], [False, True]])).tolist()
        [[5], [6]]
    """
    rank = max(tensor.dim(), kept.dim())
    whole, kept = tensor.reshape(padded(tensor.shape, rank)), align(kept, rank)
    active = [axis for axis in range(rank) if kept.shape[axis] > 1]
    touched = [axis for axis in active if whole.shape[axis] > 1]
    if not touched:
        return tensor
    each = {axis: kept.movedim(axis, 0).reshape(kept.shape[axis], -1).any(1) for axis in active}
    product = torch.ones((), dtype=torch.bool)
    for axis in active:
        shape = [1] * rank
        shape[axis] = -1
        product = product & each[axis].reshape(shape)
    if torch.equal(product.expand(kept.shape), kept):
        for axis in touched:
            whole = whole.index_select(axis, each[axis].nonzero().flatten())
        return whole.reshape(whole.shape[rank - tensor.dim() :])
    others = [axis for axis in range(rank) if axis not in active]
    sizes = [kept.shape[axis] if axis in active else whole.shape[axis] for axis in range(rank)]
    ordered = whole.expand(sizes).permute(active + others)
    inner = kept.permute(active + others).reshape([kept.shape[axis] for axis in active])
    shape = kept_shape(inner)
    assert shape is not None
    out = ordered[inner].reshape(*shape, *[whole.shape[axis] for axis in others])
    back = sorted(range(rank), key=(active + others).__getitem__)
    out = out.permute(back)
    lead = next((axis for axis in range(rank) if out.shape[axis] > 1), rank - 1)
    return out.reshape(out.shape[min(lead, rank - tensor.dim()) :])

