"""The captured graph in the one form the later passes expect.

Owns :class:`Normalize`. It must not know masks or weights.
"""

from typing import Any, cast

import torch
from torch import Tensor, fx

from srigl_fx.passes.base import Pass, PassResult
from srigl_fx.passes.operators import operator_of, plain_name
from srigl_fx.passes.program import Program, arguments, tensor_at

aten = torch.ops.aten

_VIEWS = frozenset({aten.view.default, aten._unsafe_view.default})
_NUMBERED = {
    aten.conv1d.padding: aten.conv1d.default,
    aten.conv2d.padding: aten.conv2d.default,
    aten.conv3d.padding: aten.conv3d.default,
}
_COPIES = frozenset({aten.clone.default, aten._to_copy.default, aten.lift_fresh_copy.default})
_WHOLE = 1 << 62  # from here on, the end of a slice means "to the last"


class Normalize(Pass[Program]):
    """Bring a captured graph into normal form.

    1. Assertions about metadata, sizes and ranges are dropped: the lowered module checks its inputs once.
    2. ``view`` and ``_unsafe_view`` become ``reshape``: a view was recorded for the strides that one particular kernel
       gave its output, and any replacement of that kernel would break it.
    3. A 1d to 3d convolution with the padding "valid", or "same" where that is symmetric, gets its numbers.
    4. What returns its operand goes: ``alias``, ``detach``, dropout that is off, slices of everything.
    5. A copy of the same type and layout goes, unless its memory could be told from its operand's: where it reaches an
       output through nothing but views, or where the graph reads strides.
    6. Empty tensors of one dimension are not concatenated: torch passes over them, whatever the others' sizes are. A
       cache begins with one.
    7. Nodes without users or effects go.
    """

    only_improves = True

    def run(self, subject: Program) -> PassResult[Program]:
        """Rewrite the graph in place."""
        graph = subject.module.graph
        escaping = _escaping(graph)
        reads_strides = any(plain_name(node.target) in {"as_strided", "sym_stride"} for node in graph.nodes)
        changed = False
        for node in list(graph.nodes):
            if node.op != "call_function":
                continue
            if operator_of(node.target).does == "checks":
                graph.erase_node(node)
            elif node.target in _VIEWS:
                node.target = aten.reshape.default
            elif _returns_its_operand(node) or (
                node.target in _COPIES and node not in escaping and not reads_strides and _copies_nothing_new(node)
            ):
                node.replace_all_uses_with(node.all_input_nodes[0])
                graph.erase_node(node)
            elif node.target is aten.cat.default:
                if not _drop_empty(node):
                    continue
            elif node.target not in _NUMBERED or not _number_padding(subject.module, node):
                continue
            changed = True
        changed |= graph.eliminate_dead_code()
        graph.lint()
        subject.module.recompile()
        return PassResult(subject=subject, changed=changed)

    def ensures(self, subject: Program) -> None:
        """Neither views nor assertions are left."""
        nodes = subject.module.graph.nodes
        assert not any(node.target in _VIEWS or operator_of(node.target).does == "checks" for node in nodes)


def _escaping(graph: fx.Graph) -> set[fx.Node]:
    """The nodes whose memory an output may share."""
    escaping: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or (node in escaping and _may_alias(node)):
            escaping.update(node.all_input_nodes)
    return escaping


def _may_alias(node: fx.Node) -> bool:
    """Whether the value of ``node`` may share its operands' memory."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return True
    schema = node.target._schema
    return operator_of(node.target).family == "dropout" or any(value.alias_info is not None for value in schema.returns)


def _returns_its_operand(node: fx.Node) -> bool:
    if operator_of(node.target).family == "dropout":
        return arguments(node)["train"] is False
    if node.target is aten.slice.Tensor:
        given = arguments(node)
        end = given["end"]
        return (
            given["start"] in (None, 0)
            and (end is None or (isinstance(end, int) and end >= _WHOLE))
            and given["step"] == 1
        )
    return operator_of(node.target).family == "same"


def _copies_nothing_new(node: fx.Node) -> bool:
    """Whether a copy has its operand's type, device and layout."""
    before, after = node.all_input_nodes[0].meta.get("val"), node.meta.get("val")
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    kept = arguments(node).get("memory_format") in (None, torch.preserve_format)
    same_layout = kept or str(before.stride()) == str(after.stride())  # by name: sizes may be unknown
    return same_layout and (before.dtype, before.device) == (after.dtype, after.device)


def _drop_empty(node: fx.Node) -> bool:
    """Take the operands that a concatenation passes over out of it; whether there were any."""
    operands = cast(list[fx.Node], arguments(node)["tensors"])
    kept = [one for one in operands if not _is_empty(one.meta.get("val"))] or operands[:1]
    if len(kept) == len(operands):
        return False
    node.args = (kept, *node.args[1:])
    return True


def _is_empty(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 1 and isinstance(value.shape[0], int) and value.shape[0] == 0


def _number_padding(module: fx.GraphModule, node: fx.Node) -> bool:
    """Give a convolution its padding as numbers; False where it has none that are symmetric."""
    given = arguments(node)
    weight = cast(fx.Node, given["weight"])
    value = tensor_at(module, str(weight.target)) if weight.op == "get_attr" else weight.meta["val"]
    kernel = value.shape[2:]
    stride, dilation = (_numbers(given[name], len(kernel)) for name in ("stride", "dilation"))
    padding = [0] * len(kernel)
    if given["padding"] == "same":
        totals = [d * (size - 1) for d, size in zip(dilation, kernel, strict=True)]
        if any(total % 2 for total in totals):
            return False
        padding = [total // 2 for total in totals]
    node.target = _NUMBERED[cast(Any, node.target)]
    node.args = (given["input"], weight, given["bias"], stride, padding, dilation, given["groups"])
    node.kwargs = {}
    return True


def _numbers(value: Any, count: int) -> list[int]:
    """A setting for each dimension: it may be stored as one number for all."""
    numbers = [value] if isinstance(value, int) else list(value)
    return numbers * count if len(numbers) == 1 else numbers
