"""The captured graph in the one form the later passes expect.

Owns :class:`Normalize`. It must not know masks or weights.
"""

from typing import Any, cast

import torch
from torch import Tensor, fx

from srigl_fx.passes.base import Pass, PassResult
from srigl_fx.passes.operators import first_named, operator_of, plain_name
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
    8. An operator that goes by a second name gets its first one (``multiply`` is ``mul``).
    9. A channel shuffle that is written out becomes one operator: with channels c = group * size + place,
       ``x.reshape(n, groups, size, ...).transpose(1, 2).reshape(x.shape)`` is ``channel_shuffle(x, groups)``.
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
            changed |= _rename(node)  # rule 8
            if operator_of(node.target).does == "checks":  # rule 1
                graph.erase_node(node)
            elif _shuffle(node):  # rule 9
                pass
            elif node.target in _VIEWS:  # rule 2
                node.target = aten.reshape.default
            elif _returns_its_operand(node) or (
                node.target in _COPIES and node not in escaping and not reads_strides and _copies_nothing_new(node)
            ):  # rules 4 and 5
                node.replace_all_uses_with(node.all_input_nodes[0])
                graph.erase_node(node)
            elif node.target is aten.cat.default:  # rule 6
                if not _drop_empty(node):
                    continue
            elif node.target not in _NUMBERED or not _number_padding(subject.module, node):  # rule 3
                continue
            changed = True
        changed |= graph.eliminate_dead_code()  # rule 7
        graph.lint()
        subject.module.recompile()
        return PassResult(subject=subject, changed=changed)

    def ensures(self, subject: Program) -> None:
        """Neither views nor assertions are left."""
        nodes = subject.module.graph.nodes
        assert not any(node.target in _VIEWS or operator_of(node.target).does == "checks" for node in nodes)


def _rename(node: fx.Node) -> bool:
    """Call an operator by its first name; whether it had another one."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    first = first_named(node.target)
    if first is node.target:
        return False
    given = list(arguments(node).values())  # by position: names of arguments may differ
    positional = sum(not argument.kwarg_only for argument in first._schema.arguments)
    rest = zip(first._schema.arguments[positional:], given[positional:], strict=True)
    node.target, node.args = first, tuple(given[:positional])
    node.kwargs = {argument.name: value for argument, value in rest if value != argument.default_value}
    return True


def _shuffle(node: fx.Node) -> bool:
    """Make one operator of a shuffle of channels that ends at ``node``; whether there was one."""
    turned = _written_out(node, "reshape")
    parted = _written_out(turned, "axes")
    data = _written_out(parted, "reshape")
    if turned is None or parted is None or data is None:
        return False
    before, apart, crossed, after = (list(each.meta["val"].shape) for each in (data, parted, turned, node))
    if len(before) < 3 or len(apart) != len(before) + 1 or not all(isinstance(size, int) for size in apart[1:3]):
        return False
    groups, size = apart[1:3]
    order = [0, 2, 1, *range(3, len(apart))]
    # By name, since sizes may be unknown; with one group or one place, the operator would copy what may be a view.
    same = str(before) == str(after) and str(apart) == str([before[0], groups, size, *before[2:]])
    if not same or min(groups, size) == 1 or str(crossed) != str([apart[axis] for axis in order]):
        return False
    given = arguments(turned)
    if given.get("dims") is not None:
        swaps = [dim % len(apart) for dim in given["dims"]] == order
    else:
        swaps = {given["dim0"] % len(apart), given["dim1"] % len(apart)} == {1, 2} if "dim0" in given else False
    if swaps:
        node.target, node.args, node.kwargs = aten.channel_shuffle.default, (data, groups), {}
    return swaps


def _written_out(node: fx.Node | None, family: str) -> fx.Node | None:
    """What an operator of a family is applied to, copies between left out; None where ``node`` is no such operator."""
    if node is None or operator_of(node.target).family != family:
        return None
    source = node.all_input_nodes[0]
    while operator_of(source.target).family == "copy":
        source = source.all_input_nodes[0]
    return source if isinstance(source.meta.get("val"), Tensor) else None


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
