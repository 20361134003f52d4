"""Channels that ablation made constant or unused leave the graph.

Owns :class:`RemoveDead`: the order of the steps and what is told about them. How channels travel, which of them can go
and how a graph is cut are in modules of their own.
"""

from collections import Counter
from typing import Any

from torch import Tensor, fx
from torch._subclasses import FakeTensor
from torch.utils import _pytree as pytree

from srigl_fx.errors import PassError
from srigl_fx.passes.base import Note, Pass, PassResult, brief
from srigl_fx.passes.channels.cut import Cut
from srigl_fx.passes.channels.decision import RemovalDecision, count_reasons
from srigl_fx.passes.channels.flow import Flow, Site
from srigl_fx.passes.channels.links import removal_links
from srigl_fx.passes.channels.moves import Moves
from srigl_fx.passes.channels.propagate import Propagation
from srigl_fx.passes.channels.rules import rule_of
from srigl_fx.passes.channels.shapes import concrete, sizes_beside_the_batch
from srigl_fx.passes.constness import Constant, constants
from srigl_fx.passes.fake_values import fake_result
from srigl_fx.passes.free_sizes import example_symbols
from srigl_fx.passes.operators import operator_of, plain_name
from srigl_fx.passes.program import Program, tensor_at
from srigl_fx.passes.removal import Removal, Removals

_READERS = frozenset({"mean", "sum", "rms_norm"})  # of channels one by one, besides products


class RemoveDead(Pass[Program]):
    """Remove channels from producers and consumers, exactly.

    With W1 (rows, inputs) and W2 (outputs, rows), and rows R that are left of what was d rows::

        W2 act(W1 x + b1) + b2  =  W2[:, R] act(W1[R] x + b1[R]) + b2'

    for b2' = b2 + sum over the rows c that go of W2[:, c] act(b1[c]).

    A channel is a row of a contraction's weight and all that is computed from it, element by element, up to the
    contractions that read it. Channels that are combined go together or stay together (a residual stream, a gate and
    what it gates, queries and keys, a tied weight). In exact arithmetic, for finite activations:

    1. A channel that no row that stays reads, by the zeros of its column, goes.
    2. A channel that does not depend on the input goes; its uniform constant goes into the bias of what reads it, which
       gets one if it has none. Zero leaves nothing.
    3. In front of a convolution with zero padding, or a transposed one, where a uniform constant does not contribute
       uniformly, one constant channel stays and carries the weights of all others, scaled.
    4. A constant that is not uniform (behind a padded depthwise convolution, or with a position) becomes a constant
       that is added, where that is smaller than what goes.
    5. Attention: a channel of the values goes as any other; a channel of queries and keys goes where the key does not
       vary over the positions, or either is zero, and the scale stays; a whole head goes with its queries, keys, values
       and outputs. Channels that are left are equally many in every head.
    6. The mean, and the root mean square norm, over an axis that loses channels that are zero keep its length.
    7. A group of a grouped convolution, or of a group norm, goes as a whole; in the groups of a convolution that stay,
       as many channels go from each.
    8. What a norm, a softmax or a sort over the channels, an output of the model or an unknown operator reads stays.
       No axis becomes empty.
    9. Every operator that moves elements is run on the channels that are left, and must move them as before; else they
       stay.
    """

    only_improves = True

    def run(self, subject: Program) -> PassResult[Program]:
        """Rewrite the graph in place and enter what was removed in ``subject.removals``."""
        with sizes_beside_the_batch(example_symbols(subject)):
            return self._run(subject)

    def _run(self, subject: Program) -> PassResult[Program]:
        module = subject.module
        one_user_each(module)
        before = _size(subject)
        flow, decision, moves, known = _decide(subject)
        expected = _expected(flow, moves)
        changed = bool(decision.removed.any())
        entries = [_removal(subject, site, decision) for site in flow.sites]
        links = removal_links(flow.sites, decision)
        rows = sum(site.rows.numel() for site in flow.sites), 0
        if changed:
            Cut(subject, flow, decision, moves, known).apply()
            _refresh(subject, expected)
        _merge_readers(module)
        module.graph.eliminate_dead_code()
        module.graph.lint()
        module.recompile()
        after = _size(subject)
        left = sum(int((~decision.gone(site.rows)).sum()) for site in flow.sites)
        flops = _flops(flow, None), _flops(flow, decision)
        subject.removals = Removals(
            weights=tuple(entries), channels=(rows[0], left), parameters=(before, after), flops=flops, links=links
        )
        return PassResult(subject=subject, changed=changed, notes=tuple(_notes(entries)))


def _decide(program: Program) -> tuple[Flow, RemovalDecision, Moves, dict[fx.Node, Constant]]:
    """Find out what goes and what becomes of operators that move it; the graph is only read."""
    known, independent = known_values(program)
    flow = Propagation(program, independent, rule_of).run()
    decision = RemovalDecision(program, flow, flow.channels.resolve(), known)
    return flow, decision, _feasible(program, flow, decision), known


def one_user_each(module: fx.GraphModule) -> None:
    """Read a constant anew for every operator, so that each use can be cut by itself."""
    for node in list(module.graph.nodes):
        if node.op != "get_attr":
            continue
        for user in list(node.users)[1:]:
            with module.graph.inserting_before(node):
                again = module.graph.node_copy(node)
            user.replace_input_with(node, again)


def _merge_readers(module: fx.GraphModule) -> None:
    """Read each constant once, first of all, as a captured graph does."""
    first: dict[str, fx.Node] = {}
    start = next(iter(module.graph.nodes))
    for node in list(module.graph.nodes):
        if node.op != "get_attr":
            continue
        if str(node.target) in first:
            node.replace_all_uses_with(first[str(node.target)])
            module.graph.erase_node(node)
        else:
            first[str(node.target)] = node
            if node is not start:
                start.prepend(node)


def known_values(program: Program) -> tuple[dict[fx.Node, Constant], frozenset[fx.Node]]:
    """What is constant where it is read, and the nodes that depend on nothing but the batch size."""
    independent: set[fx.Node] = set()
    wanted: set[fx.Node] = set()
    for node in program.module.graph.nodes:
        row = operator_of(node.target)
        if node.op == "get_attr" or (
            node.op == "call_function"
            and (
                row.family == "new"
                or row.does == "measures"
                or all(operand in independent for operand in node.all_input_nodes)
            )
        ):
            independent.add(node)
        if row.does == "multiplies" or plain_name(node.target) in _READERS:
            wanted.update(node.all_input_nodes)
    kept = wanted | independent
    known = constants(program, lambda node: node.op != "get_attr" and node in kept).known
    return known, frozenset(node for node in independent if node in known and bool(known[node].fixed.all()))


def _feasible(program: Program, flow: Flow, decision: RemovalDecision) -> Moves:
    """Settle, and take back what an operator cannot be rewritten for, until all can."""
    while True:
        decision.settle()
        moves = Moves(program, flow, decision)
        conflicts = moves.conflicts()
        if not conflicts:
            return moves
        for node in conflicts:
            for operand in (node, *node.all_input_nodes):
                for labels in pytree.tree_leaves(flow.labels.get(operand)):
                    if isinstance(labels, Tensor):
                        decision.keep(decision.groups.of(labels).flatten(), f"cannot be cut out of {node.name}")


def _expected(flow: Flow, moves: Moves) -> dict[fx.Node, list[list[int]]]:
    """The shapes that all values will have at batch 2."""
    found = {}
    for node, labels in flow.labels.items():
        values = [v for v in pytree.tree_leaves(node.meta.get("val")) if isinstance(v, Tensor)]
        arrays = [leaf for leaf in pytree.tree_leaves(labels) if isinstance(leaf, Tensor)]
        found[node] = [moves.shape(concrete(v.shape), i) for v, i in zip(values, arrays, strict=True)]
    return found


def _refresh(program: Program, expected: dict[fx.Node, list[list[int]]]) -> None:
    """Compute the metadata of all nodes that changed anew, and compare the shapes with those expected."""
    graph = program.module.graph
    leaves = (leaf for node in graph.nodes for leaf in pytree.tree_leaves(node.meta.get("val")))
    mode = next(leaf.fake_mode for leaf in leaves if isinstance(leaf, FakeTensor))
    changed: set[fx.Node] = set()
    for node in graph.nodes:
        value: Any = node.meta.get("val")
        if node.op == "get_attr" and isinstance(value, Tensor) and not isinstance(value, FakeTensor):
            node.meta["val"] = mode.from_tensor(value.detach(), static_shapes=True)
            changed.add(node)
        elif node.op == "call_function" and not changed.isdisjoint(node.all_input_nodes):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda operand: operand.meta.get("val"))
            assert callable(node.target)
            try:
                node.meta["val"] = fake_result(mode, node.target, args, kwargs)
            except Exception as error:
                raise PassError(
                    f"removing channels left {node.name} ({node.target}) with operands it cannot take "
                    f"({brief(error)}); this is a defect: please report it with the model, or leave RemoveDead "
                    "out"
                ) from error
            if any(was and not still for was, still in zip(_free(value), _free(node.meta["val"]), strict=True)):
                raise PassError(
                    f"removing channels fixed the batch size of {node.name} ({node.target}); this is a defect: please "
                    "report it with the model, or leave RemoveDead out"
                )
            if _shapes(value) != _shapes(node.meta["val"]):
                changed.add(node)
        if node.op == "call_function" and node in expected and _shapes(node.meta["val"]) != expected[node]:
            raise PassError(
                f"removing channels gave {node.name} ({node.target}) the shape {_shapes(node.meta['val'])}, not "
                f"{expected[node]}; this is a defect: please report it with the model, or leave RemoveDead out"
            )


def _shapes(value: Any) -> list[list[int]]:
    return [concrete(leaf.shape) for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _free(value: Any) -> list[bool]:
    """Of which axes of its tensors the batch is part; one that is not any more has a size for a batch of two."""
    leaves = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
    return [not isinstance(size, int) for leaf in leaves for size in leaf.shape]


def _size(program: Program) -> int:
    nodes = [node for node in program.module.graph.nodes if node.op == "get_attr" and node.users]
    tensors = [tensor_at(program.module, str(n.target)) for n in nodes if isinstance(n.meta.get("val"), Tensor)]
    return sum({id(tensor): tensor.numel() for tensor in tensors}.values())


def _flops(flow: Flow, decision: RemovalDecision | None) -> int:
    """Two for every multiplication and addition of a weight with one sample, by the shapes before the removal."""
    total = 0
    for site in flow.sites:
        if site.data is None:
            continue
        places = site.places
        if decision is None:
            total += 2 * places * site.rows.numel() * site.columns.shape[1]
        else:
            rows, columns = ~decision.gone(site.rows), ~decision.gone(site.columns)
            total += 2 * places * int((rows.sum(1) * columns.sum(1)).sum())
    return total


def _removal(program: Program, site: Site, decision: RemovalDecision) -> Removal:
    target = str(site.weight.target)
    masked = program.masked.get(target)
    rows, columns = decision.gone(site.rows), decision.gone(site.columns)
    folded: Counter[str] = Counter()
    kept: dict[str, int] = {}
    ablated = 0
    if site.data is not None and not site.coupled:
        fold = decision.fold(site)
        folded["bias"], folded["map"] = int(fold.bias.sum()), int(fold.mapped.sum())
        folded["carrier"] = int(fold.carried.sum())
        folded["zero"] = int(columns.sum()) - folded.total()
    if masked is not None:
        dead = ~site.matrix(masked.mask).any(-1).any(-1)
        ablated = int(dead.sum())
        kept = dict(count_reasons(decision, site.rows[dead]))
    return Removal(
        fqn=target if masked is None else masked.fqn,
        rows=rows.numel(),
        ablated=ablated,
        rows_removed=int(rows.sum()),
        columns=columns.numel(),
        columns_removed=0 if site.data is None else int(columns.sum()),
        folded={how: count for how, count in folded.items() if count},
        kept=kept,
    )


def _notes(entries: list[Removal]) -> list[Note]:
    """One for each weight with ablated rows that stay."""
    return [
        Note(
            where=entry.fqn,
            reason=f"{sum(entry.kept.values())} of {entry.ablated} ablated rows stay in the graph: "
            + "; ".join(f"{count} because {reason}" for reason, count in entry.kept.items()),
        )
        for entry in entries
        if entry.kept
    ]
