"""Where the captured graph reads each mask-managed weight.

Owns :class:`MatchWeights`: from a weight's parameter to the nodes that contract with it, through the slices that a
packed attention projection is cut into. It must not know formats, kernels or timings.
"""

import operator
from typing import Any

import torch
from torch import Tensor, fx

from srigl_fx.errors import InvariantError, LoweringError
from srigl_fx.masks.records import SparseWeight, sparse_weights
from srigl_fx.passes.base import Note, Pass, PassResult
from srigl_fx.passes.program import Layer, Program, Use, arguments, tensor_at

aten = torch.ops.aten

_CONTRACTIONS: dict[Any, frozenset[str]] = {
    aten.linear.default: frozenset({"linear", "attention_in"}),
    aten.conv2d.default: frozenset({"conv2d"}),
}
_NO_OPERATOR = "{} weights have no condensed operator yet"


class MatchWeights(Pass[Program]):
    """Make one :class:`~srigl_fx.passes.program.Layer` of every mask-managed weight.

    1. A weight is found by its parameter, so tied weights are found under whatever name the graph has for them.
    2. ``linear`` and batched ``conv2d`` nodes on the whole weight, and ``linear`` nodes on rows of it (``split``,
       ``chunk`` or ``slice`` along dimension 0), are uses that can be condensed.
    3. Any other node that reads the weight is remembered by its operator; it keeps the dense parameter.
    4. A weight without a use that can be condensed stays dense, and its layer says why.
    """

    def requires(self, subject: Program) -> None:
        """The model must have masks, float32 weights on the CPU, and no values off the mask."""
        weights = sparse_weights(subject.model)
        if not weights:
            raise LoweringError(
                f"{type(subject.model).__name__} has no mask-managed weight, so there is nothing to lower: call "
                "sparsify(model) and train it first"
            )
        for handle in weights:
            if handle.weight.device.type != "cpu" or handle.weight.dtype != torch.float32:
                raise LoweringError(
                    f"{handle.fqn} is {handle.weight.dtype} on {handle.weight.device}; only float32 on the CPU can be "
                    "lowered: lower a copy, lower(copy.deepcopy(model).float().cpu(), ...)"
                )
            if handle.mask.shape != handle.weight.shape or handle.mask.device != handle.weight.device:
                raise InvariantError(
                    f"{handle.mask_fqn} is {tuple(handle.mask.shape)} on {handle.mask.device}, its weight "
                    f"{tuple(handle.weight.shape)} on {handle.weight.device}; sparsify the model again"
                )
        off = [w.fqn for w in weights if bool((w.weight.detach().ne(0) & ~w.mask).any())]
        if off:
            raise InvariantError(
                f"values off the mask in {', '.join(off)}: the weights were changed without the trainer (an average of "
                "models, another optimizer); call srigl_fx.masks.apply(model) to set them to zero"
            )

    def run(self, subject: Program) -> PassResult[Program]:
        """Fill in ``subject.layers``."""
        readers: dict[int, list[fx.Node]] = {}
        for node in subject.module.graph.nodes:
            if node.op == "get_attr":
                readers.setdefault(id(tensor_at(subject.module, str(node.target))), []).append(node)
        subject.layers = [
            _match(handle, readers.get(id(handle.weight), [])) for handle in sparse_weights(subject.model)
        ]
        notes = tuple(Note(where=layer.weight.fqn, reason=layer.reason) for layer in subject.layers if layer.reason)
        return PassResult(subject=subject, changed=False, notes=notes)


def _match(handle: SparseWeight, readers: list[fx.Node]) -> Layer:
    layer = Layer(weight=handle)
    site, structure = handle.record.site, handle.record.structure
    refused: list[str] = []
    for reader in readers:
        for node, start, stop in _rows(reader, 0, site.shape[0]):
            for user in node.users:
                problem = _refusal(user, node, handle, whole=stop - start == site.shape[0])
                if problem is None:
                    layer.uses.append(Use(user, start, stop))
                elif not _is_rows(user):
                    layer.others.append(str(user.target).removesuffix(".default"))
                    refused.append(problem)
    if not readers:
        layer.reason = "not used by the captured graph"
    elif structure == "unstructured":
        layer.reason = "unstructured masks have no condensed form"
    elif not layer.uses:
        layer.reason = refused[0] if refused else "read by nothing the captured graph computes"
    if layer.reason:
        layer.others += [str(use.node.target).removesuffix(".default") for use in layer.uses]
        layer.uses = []
    return layer


def _is_rows(node: fx.Node) -> bool:
    """Whether a node takes rows of a tensor: a slice, split or item along dimension 0."""
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return isinstance(node.args[0], fx.Node) and _is_rows(node.args[0])
    if node.target in {aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.slice.Tensor}:
        given = arguments(node)
        return bool(given["dim"] == 0 and given.get("step", 1) == 1)
    return False


def _rows(node: fx.Node, start: int, stop: int) -> list[tuple[fx.Node, int, int]]:
    """``node`` and every node that is rows of it, with the rows each one holds."""
    found = [(node, start, stop)]
    for user in node.users:
        if not _is_rows(user) or user.target is operator.getitem:
            continue
        given = arguments(user)
        size = stop - start
        if user.target is aten.slice.Tensor:
            first, last, _ = slice(given["start"], given["end"]).indices(size)
            found += _rows(user, start + first, start + max(first, last))
            continue
        if user.target is aten.split_with_sizes.default:
            sizes = list(given["split_sizes"])
        else:
            step = given["split_size"] if user.target is aten.split.Tensor else -(-size // given["chunks"])
            sizes = [min(step, size - first) for first in range(0, size, step)]
        for item in user.users:
            index = int(item.args[1]) if item.target is operator.getitem else 0  # type: ignore[arg-type]
            first = start + sum(sizes[:index])
            found += _rows(item, first, first + sizes[index])
    return found


def _refusal(user: fx.Node, operand: fx.Node, handle: SparseWeight, *, whole: bool) -> str | None:
    """Why ``user`` cannot read ``operand`` condensed, or None if it can."""
    kind = handle.record.site.kind
    if user.target is aten.conv2d.padding and kind == "conv2d":
        return "an even kernel with padding 'same' pads unevenly; give the padding in numbers"
    kinds = _CONTRACTIONS.get(user.target)
    if kinds is None or kind not in kinds:
        known = {"linear": "linear", "attention_in": "linear", "conv2d": "conv2d"}.get(kind)
        if known is None:
            return _NO_OPERATOR.format("Conv1D (in, out)" if kind == "linear_in_out" else kind)
        return f"read by {str(user.target).removesuffix('.default')}, which has no condensed form"
    given = arguments(user)
    if given["weight"] is not operand or operand in (given["input"], given["bias"]):
        return "also the data of the operator that reads it"
    value: Any = given["input"].meta.get("val")
    if not isinstance(value, Tensor) or value.dtype != torch.float32:
        return "its input is not float32"
    if user.target is aten.conv2d.default and (value.dim() != 4 or not whole):
        return "its input has no batch dimension" if whole else "a convolution with some rows of a weight"
    return None
