"""How a torch.fx graph uses its weights.

Owns the data-flow rules from a ``get_attr`` node to the contraction that reads it; it must not know which module the
graph came from, nor what will be done to the weight.

Rules:
    1. A parameter that reaches the weight operand of a linear, convolution, transposed convolution, ``matmul`` or
       ``addmm`` directly, or through transposes, casts, ``contiguous`` and ``clone`` only, is a contraction weight; the
       number of transposes decides whether its neurons are its rows or its columns.
    2. One that reaches a weight operand through any other operation is *transformed*: masking the stored values is not
       masking what the contraction reads.
    3. One that a lookup (``embedding``) reads is a table.
    4. One that only meets a contraction as data, or meets none, is no weight.
"""

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import fx

from srigl_fx.masks.records import Kind

aten = torch.ops.aten

_LINEAR: set[Any] = {F.linear, aten.linear.default}
_CONVS: dict[Any, Kind] = {
    F.conv1d: "conv1d",
    F.conv2d: "conv2d",
    F.conv3d: "conv3d",
    aten.conv1d.default: "conv1d",
    aten.conv2d.default: "conv2d",
    aten.conv3d.default: "conv3d",
    aten.conv1d.padding: "conv1d",
    aten.conv2d.padding: "conv2d",
    aten.conv3d.padding: "conv3d",
    F.conv_transpose1d: "conv_transpose1d",
    F.conv_transpose2d: "conv_transpose2d",
    F.conv_transpose3d: "conv_transpose3d",
    aten.conv_transpose1d.default: "conv_transpose1d",
    aten.conv_transpose2d.input: "conv_transpose2d",
    aten.conv_transpose3d.input: "conv_transpose3d",
}
_MATMULS: set[Any] = {operator.matmul, torch.matmul, torch.mm, aten.matmul.default, aten.mm.default, "matmul", "mm"}
_ADDMMS: set[Any] = {torch.addmm, aten.addmm.default}
_LOOKUPS: set[Any] = {F.embedding, F.embedding_bag, aten.embedding.default, torch.embedding}
_OTHER_CONTRACTIONS: set[Any] = {
    torch.einsum,
    torch.bmm,
    torch.baddbmm,
    torch.tensordot,
    F.bilinear,
    F.multi_head_attention_forward,
    aten.einsum.default,
    aten.bmm.default,
    aten.baddbmm.default,
    "bmm",
    "baddbmm",
}
_TRANSPOSES: set[Any] = {"t", aten.t.default, torch.t}
_SWAPS: set[Any] = {"transpose", torch.transpose, aten.transpose.int}
_PERMUTES: set[Any] = {"permute", torch.permute, aten.permute.default}
_PASS_THROUGH: set[Any] = {
    "to",
    "type_as",
    "contiguous",
    "clone",
    "float",
    "half",
    "bfloat16",
    torch.clone,
    aten.clone.default,
    aten.contiguous.default,
    aten.to.dtype,
    aten._to_copy.default,
}

UseKind = Literal["weight", "transformed", "lookup", "unsupported", "none"]


@dataclass(frozen=True, kw_only=True)
class Use:
    """One way a graph uses a parameter.

    Attributes:
        kind: What sort of use it is, by the rules above.
        layout: For a weight, how its neurons lie.
        groups: For a convolution weight, its groups.
        node: The node that reads it.
        detail: A few words for the report.
    """

    kind: UseKind
    node: fx.Node
    layout: Kind = "other"
    groups: int = 1
    detail: str = ""


def _argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _operands(node: fx.Node) -> tuple[fx.Node | Any, ...]:
    return (*node.args, *node.kwargs.values())


def weight_operand(node: fx.Node) -> tuple[Any, Kind, int] | None:
    """The (operand, layout, groups) that ``node`` contracts its data with, or None where it is no such contraction.

    ``layout`` supposes the operand is the parameter itself, untransposed.
    """
    target = node.target
    if node.op not in ("call_function", "call_method"):
        return None
    if target in _LINEAR:
        return _argument(node, 1, "weight"), "linear", 1
    if target in _CONVS:
        kind = _CONVS[target]
        transposed = kind.startswith("conv_transpose")
        groups = _argument(node, 6, "groups", 1)
        return _argument(node, 1, "weight"), kind, groups if isinstance(groups, int) else (1 if transposed else 0)
    if target in _ADDMMS:
        return _argument(node, 2, "mat2"), "linear_in_out", 1
    if target in _MATMULS:
        return _argument(node, 1, "other", _argument(node, 1, "mat2")), "linear_in_out", 1
    return None


def _is_matrix_transpose(node: fx.Node) -> bool:
    """Whether ``node`` swaps the two dimensions of a matrix (it is only asked of two-dimensional weights)."""
    if node.target in _TRANSPOSES:
        return True
    if node.target is getattr and node.args[1] in ("T", "mT"):
        return True
    if node.target in _SWAPS:
        return {_argument(node, 1, "dim0"), _argument(node, 2, "dim1")} in ({0, 1}, {-1, -2}, {0, -1}, {1, -2})
    if node.target in _PERMUTES:
        dims = node.args[1:] if len(node.args) > 2 else _argument(node, 1, "dims")
        return tuple(dims) in ((1, 0), (-1, 0), (1, -2), (-1, -2)) if isinstance(dims, tuple | list) else False
    return False


def uses_of(source: fx.Node, dimensions: int) -> list[Use]:
    """Every use of the parameter that the ``get_attr`` node ``source`` reads; it has this many dimensions."""
    return list(_follow(source, source, dimensions, flipped=False, transformed=False, seen=set()))


def _follow(
    source: fx.Node,
    value: fx.Node,
    dimensions: int,
    *,
    flipped: bool,
    transformed: bool,
    seen: set[tuple[fx.Node, bool]],
) -> Iterator[Use]:
    for user in value.users:
        if (user, transformed) in seen:
            continue
        seen.add((user, transformed))
        contraction = weight_operand(user)
        if contraction is not None and contraction[0] is value:
            yield _weight_use(user, contraction[1], contraction[2], dimensions, flipped, transformed)
        elif contraction is not None and user.target in _MATMULS and user.args[0] is value and not transformed:
            # weight @ data: the rows of the left operand are the neurons.
            yield _weight_use(user, "linear_in_out", 1, dimensions, not flipped, transformed)
        elif contraction is not None or user.op == "output":
            yield Use(kind="none", node=user)
        elif user.target in _LOOKUPS:
            yield Use(kind="lookup", node=user)
        elif user.target in _OTHER_CONTRACTIONS:
            yield Use(kind="unsupported", node=user, detail=f"{_name(user.target)} on a weight is not supported yet")
        elif user.op == "call_module":
            yield Use(kind="none", node=user)
        elif user.target in _PASS_THROUGH:
            yield from _follow(source, user, dimensions, flipped=flipped, transformed=transformed, seen=seen)
        elif dimensions == 2 and not transformed and _is_matrix_transpose(user):
            yield from _follow(source, user, dimensions, flipped=not flipped, transformed=False, seen=seen)
        else:
            reached = _follow(source, user, dimensions, flipped=flipped, transformed=True, seen=seen)
            uses = [use for use in reached if use.kind in ("transformed", "unsupported")]
            yield from uses or [Use(kind="none", node=user)]


def _weight_use(node: fx.Node, layout: Kind, groups: int, dimensions: int, flipped: bool, transformed: bool) -> Use:
    if transformed:
        return Use(
            kind="transformed", node=node, detail=f"the weight is transformed before {_name(node.target)} reads it"
        )
    if layout in ("linear", "linear_in_out"):
        if dimensions != 2:
            return Use(
                kind="unsupported", node=node, detail=f"a stack of {dimensions - 1}-D weights is not supported yet"
            )
        if flipped:
            layout = "linear_in_out" if layout == "linear" else "linear"
    elif flipped or groups == 0:
        return Use(kind="unsupported", node=node, detail="a convolution whose layout is not known statically")
    return Use(kind="weight", node=node, layout=layout, groups=groups)


def _name(target: str | Callable[..., Any]) -> str:
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))
