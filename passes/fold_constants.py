"""What depends on no input is computed once, and what is masked stays known through it.

Owns :class:`FoldConstants`: where the graph reads mask-managed weights, the evaluation of constant subgraphs, and the
masks of what comes out of them. It must not know contractions, nor what is decided for a layer.
"""

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from srigl_fx.errors import InvariantError, LoweringError
from srigl_fx.masks.records import SparseWeight, sparse_weights
from srigl_fx.passes.base import Note, Pass, PassResult
from srigl_fx.passes.operators import operator_of
from srigl_fx.passes.program import MaskedTensor, Program, attribute_at, enter_masks, new_buffer, tensor_at

aten = torch.ops.aten

_PLACES = frozenset({"moves", "pads", "looks up"})  # run on a mask, they give the mask of what they return
_LARGEST = 1 << 26  # elements of a folded tensor that is larger than what it is made of


class FoldConstants(Pass[Program]):
    """Evaluate what depends on no input.

    1. Each mask-managed weight that the graph reads is entered in ``program.masked``, by its parameter: a tied weight
       under every name the graph has for it.
    2. Every largest subgraph that depends on no input and reads a parameter or buffer is replaced by a buffer with its
       value. What only makes numbers (``arange``, ``zeros``) is left to run, as is what draws random ones, what is
       written to, and what would be larger than 64 Mi elements and than everything it reads.
    3. A value made from one masked tensor is masked too: through operators that move elements the mask moves along;
       through others it stays as it is where they keep the shape. Where the value is not zero off that mask, or the
       shape changes, it counts as dense, with a note.
    """

    only_improves = True

    def requires(self, subject: Program) -> None:
        """The model must have masks, float32 weights on the CPU, no values off the mask, and a constant fan-in."""
        weights = sparse_weights(subject.model)
        if not weights:
            raise LoweringError(
                f"{type(subject.model).__name__} has no mask-managed weight, so there is nothing to lower: call "
                "sparsify(model) and train it first, or adopt(model) where its weights hold zeros already"
            )
        for handle in weights:
            _check(handle)
        off = [w.fqn for w in weights if bool((w.weight.detach().ne(0) & ~w.mask).any())]
        if off:
            raise InvariantError(
                f"values off the mask in {', '.join(off)}: the weights were changed without the trainer (an average of "
                "models, another optimizer); call srigl_fx.masks.apply(model) to set them to zero"
            )

    @torch.no_grad()
    def run(self, subject: Program) -> PassResult[Program]:
        """Rewrite the graph in place."""
        module, graph = subject.module, subject.module.graph
        enter_masks(subject)  # rule 1
        frozen = _Frozen(module, _written(graph))
        folds = [node for node in graph.nodes if frozen.folds(node)]
        notes = []
        for node in folds:
            made = frozen.value(node)
            masked, problem = self._mask(subject, frozen, node, made)
            name = f"{masked.fqn}_{node.name}" if masked else f"{node.name}_folded"
            with graph.inserting_before(node):
                new = new_buffer(module, name, made)
            new.meta = {**node.meta, "val": node.meta.get("val", made)}
            node.replace_all_uses_with(new)
            if masked is not None:
                subject.masked[str(new.target)] = masked
            elif problem:
                notes.append(Note(where=str(new.target), reason=problem))
        graph.eliminate_dead_code()
        graph.lint()
        module.recompile()
        return PassResult(subject=subject, changed=bool(folds), notes=tuple(notes))

    def ensures(self, subject: Program) -> None:
        """Every masked tensor of the graph is zero off its mask."""
        for node in subject.module.graph.find_nodes(op="get_attr"):
            if masked := subject.masked.get(str(node.target)):
                tensor = tensor_at(subject.module, str(node.target))
                assert tensor.shape == masked.mask.shape
                assert not bool((tensor.detach().ne(0) & ~masked.mask).any())

    def _mask(
        self, subject: Program, frozen: "_Frozen", node: fx.Node, made: Tensor
    ) -> tuple[MaskedTensor | None, str]:
        """The mask of a folded value, or why a function of masked weights has none."""
        targets = {str(source.target) for source in _reads(node)}
        sources = {target: subject.masked[target] for target in targets if target in subject.masked}
        if not sources:
            return None, ""
        names = ", ".join(sorted({source.fqn for source in sources.values()}))
        (target, source), *others = sources.items()
        mask = None if others else frozen.mask(node, target, source.mask)
        # Rule 3.
        if others:
            problem = f"made from several masked weights ({names})"
        elif mask is None or mask.shape != made.shape:
            problem = f"made from {names} by operators whose zeros are not those of the mask"
        elif bool((made.ne(0) & ~mask).any()):
            problem = f"made from {names}, but not zero where that is masked"
        else:
            return MaskedTensor(fqn=source.fqn, mask=mask), ""
        for source in sources.values():
            subject.folded[source.fqn] = (
                "it only meets constants: the result is computed once and stored, without a mask"
            )
        return None, f"{problem}: it counts as dense"


def _check(handle: SparseWeight) -> None:
    weight, mask, record = handle.weight, handle.mask, handle.record
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        raise LoweringError(
            f"{handle.fqn} is {weight.dtype} on {weight.device}; only float32 on the CPU can be lowered: lower a copy, "
            "lower(copy.deepcopy(model).float().cpu(), ...)"
        )
    if mask.shape != weight.shape or mask.device != weight.device:
        raise InvariantError(
            f"{handle.mask_fqn} is {tuple(mask.shape)} on {mask.device}, its weight {tuple(weight.shape)} on "
            f"{weight.device}; sparsify the model again"
        )
    if record.structure != "constant_fan_in":
        return
    counts = record.site.to_matrix(mask).sum(1)
    for block in record.site.blocks:
        found = counts[block.start : block.stop]
        kept = sorted(set(found[found > 0].tolist()))
        if len(kept) > 1:
            raise InvariantError(
                f"{handle.fqn} does not have a constant fan-in: its rows {block.start} to {block.stop - 1} keep from "
                f"{kept[0]} to {kept[-1]} weights; the mask was changed by hand: sparsify the model again"
            )


def _written(graph: fx.Graph) -> set[str]:
    """The targets of tensors that the graph itself writes to."""
    return {
        str(source.target)
        for node in graph.find_nodes(op="call_function", target=aten.copy_.default)
        for source in node.all_input_nodes[:1]
        if source.op == "get_attr"
    }


def _reads(node: fx.Node) -> Iterator[fx.Node]:
    """The ``get_attr`` nodes that ``node`` is made from."""
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        if current.op == "get_attr":
            yield current
        following = [source for source in current.all_input_nodes if source not in seen]
        seen.update(following)
        pending += following


class _Frozen:
    """Which nodes of a graph depend on no input, and their values."""

    def __init__(self, module: fx.GraphModule, written: set[str]) -> None:
        self.module = module
        self.constant: dict[fx.Node, bool] = {}  # whether a parameter or buffer is among a constant node's sources
        self._values: dict[fx.Node, Any] = {}
        for node in module.graph.nodes:
            if node.op == "get_attr":
                if str(node.target) not in written and isinstance(attribute_at(module, str(node.target)), Tensor):
                    self.constant[node] = True
            elif node.op == "call_function" and _pure(node) and all(n in self.constant for n in node.all_input_nodes):
                self.constant[node] = any(self.constant[source] for source in node.all_input_nodes)

    def folds(self, node: fx.Node) -> bool:
        """Whether ``node`` is the end of a subgraph worth a buffer: the next ones read inputs too."""
        if not self.constant.get(node) or node.op == "get_attr" or not node.users:
            return False
        value = node.meta["val"] if "val" in node.meta else self.value(node)
        if not isinstance(value, Tensor):
            return False
        read = sum(tensor_at(self.module, str(source.target)).numel() for source in _reads(node))
        if value.numel() > max(_LARGEST, read):
            del self.constant[node]  # its users are not constant either
            return False
        return not all(user in self.constant for user in node.users)

    def value(self, node: fx.Node) -> Any:
        """What ``node`` computes."""
        if node not in self._values:
            if node.op == "get_attr":
                self._values[node] = tensor_at(self.module, str(node.target)).detach()
            else:
                self._values[node] = _call(node, self.value)
        return self._values[node]

    def mask(self, node: fx.Node, target: str, mask: Tensor) -> Tensor | None:
        """The mask of ``node``'s value where it is made from the masked tensor ``target`` alone; None where unknown."""
        found = self._mask(node, target, mask, {})
        return found if isinstance(found, Tensor) else None

    def _mask(self, node: fx.Node, target: str, mask: Tensor, known: dict[fx.Node, Any]) -> Any:
        if node not in known:
            known[node] = self._mask_of(node, target, mask, known)
        return known[node]

    def _mask_of(self, node: fx.Node, target: str, mask: Tensor, known: dict[fx.Node, Any]) -> Any:
        if node.op == "get_attr":
            return mask if node.target == target else None
        masks = {source: self._mask(source, target, mask, known) for source in node.all_input_nodes}
        masked = [source for source in node.all_input_nodes if masks[source] is not None]
        if not masked:
            return None
        if _moves(node) and len(masked) == 1 and node.args[0] is masked[0]:
            return _moved(node, lambda source: masks[source] if source in masked else self.value(source))
        shape = getattr(self.value(node), "shape", None)
        fitting = [masks[s] for s in masked if isinstance(masks[s], Tensor) and masks[s].shape == shape]
        if fitting:
            # What keeps the shape keeps the zeros; that it does is checked on the values in the end.
            return torch.stack(fitting).any(0)
        results = self.value(node)
        if isinstance(results, tuple | list):  # the first result of an operator with several, if it keeps the shape
            return tuple(
                next((masks[s] for s in masked if getattr(masks[s], "shape", 0) == r.shape), None) for r in results
            )
        return None


def _moves(node: fx.Node) -> bool:
    row = operator_of(node.target)
    return row.does in _PLACES or row.family in {"copy", "same"} or node.target is operator.getitem


def _moved(node: fx.Node, given: Callable[[fx.Node], Any]) -> Any:
    """The mask of what a node that moves elements returns; ``given`` has the mask in place of its first operand.

    It is moved as numbers: some operators take no booleans.
    """
    if node.target is operator.getitem:
        return _call(node, given)

    def number(source: fx.Node) -> Any:
        return given(source).float() if source is node.args[0] else given(source)

    moved = _call(node, number)
    return pytree.tree_map(lambda leaf: leaf != 0, moved)


def _pure(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return getattr(target, "__name__", "") == "getitem"
    return not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags


def _call(node: fx.Node, value_of: Any) -> Any:
    assert callable(node.target)
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), value_of)
    result = node.target(*args, **kwargs)
    return pytree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, result)
