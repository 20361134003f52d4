"""A graph without the channels that go: new constants, new numbers, and what makes up for constant channels.

Owns :class:`Cut`, the rewriting. It must not know why a channel goes.

1. Operators that move elements are put as :class:`~srigl_fx.passes.channels.moves.Moves` has planned them.
2. A weight keeps the rows and columns that stay: W' = W[rows, columns], and its mask with it.
3. Columns of a constant v that go into the bias: b' = b + sum over c of W[:, c] v[c], in float64.
4. Columns that another one, a, carries: W'[:, a] = W[:, a] + sum over c of W[:, c] v[c] / v[a].
5. Columns of constants that vary over positions: y' = y + W[:, c] * x[c], computed once for one sample.
6. Other constants lose what the values lose that they are combined with.
7. Attention that scales by 1 / sqrt(d) on its own is told the d that it had.
8. A mean over n channels, of which m stay, is scaled by m / n: those that went were zero. A root mean square has
   sqrt(sum / m + eps) for sqrt(sum / n + eps) = sqrt(m / n) sqrt(sum / m + eps n / m): the gain takes sqrt(n / m), and
   eps becomes eps n / m. A sum needs nothing.
9. A group norm has as many groups as are left of it.
"""

from typing import Any

import torch
from torch import Tensor, fx

from srigl_fx.passes.channels.coupling import kept_shape
from srigl_fx.passes.channels.decision import Fold, RemovalDecision, known_of
from srigl_fx.passes.channels.flow import Flow, Reading, Site
from srigl_fx.passes.channels.moves import Moves
from srigl_fx.passes.channels.shapes import align, padded, shape_of
from srigl_fx.passes.constness import Constant
from srigl_fx.passes.operators import operator_of, plain_name
from srigl_fx.passes.program import MaskedTensor, Program, arguments, new_buffer, tensor_at

aten = torch.ops.aten


class Cut:
    """The rewriting of one program by one decision."""

    def __init__(
        self, program: Program, flow: Flow, decision: RemovalDecision, moves: Moves, known: dict[fx.Node, Constant]
    ) -> None:
        self.program, self.flow, self.decision, self.moves, self.known = program, flow, decision, moves, known
        self._made: dict[Any, str] = {}
        # What nodes put in between would hide: the data of a node is the one that the flow knows only until then.
        self._maps = {site.node: self._map(site) for site in flow.sites if site.data is not None and not site.coupled}
        self._norms = [node for node in program.module.graph.nodes if plain_name(node.target) == "group_norm"]

    def apply(self) -> None:
        """Rewrite the graph, rule by rule."""
        for node, (target, args, kwargs) in self.moves.plans.items():
            made = [self._buffer(node, f"{node.name}_positions", a) if isinstance(a, Tensor) else a for a in args]
            node.target, node.args, node.kwargs = target, tuple(made), kwargs  # rule 1
        for site in self.flow.sites:  # rules 2 to 5
            self._site(site)
        for constant, reader, labels in self.flow.adopted:  # rule 6
            self._constant(constant, reader, labels)
        for pairing in self.flow.pairings:  # rule 7
            if plain_name(pairing.node.target) == "scaled_dot_product_attention":
                width = shape_of(pairing.left)[-1]
                if self._left(pairing.left)[-1] != width and arguments(pairing.node)["scale"] is None:
                    pairing.node.kwargs = {**pairing.node.kwargs, "scale": width**-0.5}
        for reading in self.flow.readings:  # rule 8
            self._reading(reading)
        for node in self._norms:  # rule 9
            before, after = shape_of(node)[1], self._left(node)[1]
            if before != after:
                groups = arguments(node)["num_groups"] * after // before
                node.args = (node.args[0], groups, *node.args[2:])

    def _left(self, node: fx.Node) -> list[int]:
        return self.moves.shape(shape_of(node), self.flow.labels[node])

    def _buffer(self, before: fx.Node, like: str, tensor: Tensor, mask: Tensor | None = None) -> fx.Node:
        """A constant read before a node; equal ones made from one tensor are one buffer, so that tied stays tied."""
        module = self.program.module
        content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()  # of any type
        key = (like, tuple(tensor.shape), tensor.dtype, hash(content))
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
        rows, columns = self.moves.kept(site.rows), self.moves.kept(site.columns)
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
            shift, post = self._contribution(site, fold, matrix), self._maps[site.node]
            matrix, mask = self._carry(site, fold, matrix, mask)
        cut = _cut(matrix, rows, columns)
        new_mask = None if mask is None else site.tensor(_cut(mask, rows, columns), kernel)
        node = site.node
        node.replace_input_with(site.weight, self._buffer(node, target, site.tensor(cut, kernel), new_mask))
        if operator_of(node.target).family in {"convolution", "transposed convolution"}:
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
        """Rule 3, (groups, rows): what uniform constant channels add to every element of a row."""
        if not bool(fold.bias.any()):
            return None
        value = torch.where(fold.bias, self.decision.arriving(site).value, 0)
        return torch.einsum("grck,gc->gr", matrix.double(), value)

    def _carry(self, site: Site, fold: Fold, matrix: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Rule 4."""
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

    def _map(self, site: Site) -> Tensor | None:
        """Rule 5: the layer itself, run on the constant channels alone, for batch 1."""
        fold = self.decision.fold(site)
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
        given = {k: fx.node.map_arg(v, lambda operand: operands.get(operand, operand)) for k, v in given.items()}
        assert isinstance(site.node.target, torch._ops.OpOverload)
        schema = site.node.target._schema.arguments
        args = [given[a.name] for a in schema if not a.kwarg_only]
        out: Tensor = site.node.target(*args, **{a.name: given[a.name] for a in schema if a.kwarg_only})
        return out.index_select(site.axis, self.moves.kept(site.rows).reshape(-1).nonzero().flatten())

    def _constant(self, constant: fx.Node, reader: fx.Node, labels: Tensor) -> None:
        kept = self.moves.kept(labels)
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
            kept = self.moves.kept(self.flow.labels[reading.data]).reshape(-1)
            like = f"{node.name}_gain"
            if given["weight"] is not None:
                like = str(given["weight"].target)
                gain = tensor_at(self.program.module, like).detach()
            gain = gain[kept] * (before / after) ** 0.5
            eps = given["eps"] if given["eps"] is not None else torch.finfo(node.meta["val"].dtype).eps
            node.args = (given["input"], [after], self._buffer(node, like, gain), eps * before / after)
            node.kwargs = {}


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
    left = kept_shape(inner)
    assert left is not None
    out = ordered[inner].reshape(*left, *[whole.shape[axis] for axis in others])
    back = sorted(range(rank), key=(active + others).__getitem__)
    out = out.permute(back)
    lead = next((axis for axis in range(rank) if out.shape[axis] > 1), rank - 1)
    return out.reshape(out.shape[min(lead, rank - tensor.dim()) :])
