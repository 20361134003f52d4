"""What stands between convolutions with samples innermost, and which operators of arranged tensors do the same.

Owns the forms of pooling, padding, concatenation and batch norms. It must not know which tensors are arranged.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from srigl_fx.passes.condensed_nodes import AFFINE, CONCAT, PAD, POOL
from srigl_fx.passes.fold_batch_norm import NORMS, TUPLE_NORM, is_norm, scale_and_shift
from srigl_fx.passes.program import arguments, new_buffer

_aten = torch.ops.aten
_WHOLE = (_aten.mean.dim, _aten.adaptive_avg_pool1d.default, _aten.adaptive_avg_pool2d.default)  # of all positions
# Which operators pool, and whether that is a mean.
_POOLING: dict[Any, bool] = {
    _aten.max_pool1d.default: False,
    _aten.max_pool2d.default: False,
    _aten.avg_pool1d.default: True,
    _aten.avg_pool2d.default: True,
    **dict.fromkeys(_WHOLE, True),
}
_PADS = (_aten.pad.default, _aten.constant_pad_nd.default)


class Form(NamedTuple):
    """How a node is computed from arranged tensors.

    Attributes:
        tensors: The nodes that must be arranged, as the result then is.
        keeps_size: Whether the result has as many numbers, or more.
        rewrite: Makes the node read them so.
    """

    tensors: tuple[fx.Node, ...]
    keeps_size: bool
    rewrite: Callable[[fx.GraphModule, fx.Node], None]


def taker(node: fx.Node) -> fx.Node:
    """The node that reads the operands of another: the other, but a batch norm of whose results it takes the first."""
    source = node.args[0] if node.target is operator.getitem else None
    return source if isinstance(source, fx.Node) and source.target is TUPLE_NORM else node


def readers(node: fx.Node) -> list[fx.Node]:
    """The nodes that read a node; what takes the one result that is used of a batch norm stands for both."""
    return [
        next(iter(user.users)) if user.target is TUPLE_NORM and len(user.users) == 1 else user for user in node.users
    ]


def arranged_form(module: fx.GraphModule, node: fx.Node) -> Form | None:
    """The form of a node for arranged samples, if there is one."""
    source = taker(node)
    inputs = [one for one in source.all_input_nodes if one.op != "get_attr"]
    values = [one.meta.get("val") for one in (*inputs, node)]
    tensors = [value for value in values if isinstance(value, Tensor) and value.dtype is torch.float32]
    if not inputs or len(tensors) < len(values) or any(one.dim() < 3 for one in tensors[:-1]):
        return None
    x, y, given = tensors[0], tensors[-1], arguments(source)
    if node.target in _POOLING:
        pooling = _pooling(node, x, y)
        return None if pooling is None else Form((inputs[0],), False, lambda _, node: _pool(node, pooling))
    if node.target in _PADS:
        pads, mode, value = given["pad"], given.get("mode", "constant"), given.get("value") or 0.0
        fits = len(pads) % 2 == 0 and len(pads) <= 2 * (x.dim() - 2) <= 4
        if not fits or mode != "constant" or any(not isinstance(pad, int) or pad < 0 for pad in pads):
            return None
        return Form((inputs[0],), True, lambda _, node: _pad(node, x.dim() - 2, pads, value))
    if node.target is _aten.cat.default:
        parts = tuple(given["tensors"])
        joins = len(parts) > 1 and given.get("dim", 0) in (1, 1 - x.dim())
        return Form(parts, True, lambda _, node: _concat(node, parts)) if joins else None
    if source.target in NORMS and is_norm(module, source) and len(inputs) == 1:
        return Form((inputs[0],), True, _normalise)
    return None


def _pool(node: fx.Node, settings: tuple[list[int], list[int], list[int], list[int], bool]) -> None:
    node.args, node.kwargs, node.target = (node.all_input_nodes[0], *settings), {}, POOL


def _pad(node: fx.Node, axes: int, pads: Sequence[int], value: float) -> None:
    pairs = [*pads, *[0] * (2 * axes - len(pads))]  # from the last axis to the first
    before, after = pairs[::2][::-1], pairs[1::2][::-1]
    node.args, node.kwargs, node.target = (node.all_input_nodes[0], before, after, float(value)), {}, PAD


def _concat(node: fx.Node, parts: Sequence[fx.Node]) -> None:
    """Two tensors after the other; what concatenations begin with alike, as in a DenseNet, is made once."""
    parts = arguments(node)["tensors"]  # arranged ones by now
    joined = parts[0]
    for part in parts[1:-1]:
        known = (user for user in joined.users if user.target is CONCAT and user.args == (joined, part))
        found = next(known, None)
        if found is None:
            with node.graph.inserting_before(node):
                found = node.graph.call_function(CONCAT, (joined, part))
            found.meta = {**node.meta, "val": CONCAT(joined.meta["val"], part.meta["val"])}
        joined = found
    node.args, node.kwargs, node.target = (joined, parts[-1]), {}, CONCAT


def _normalise(module: fx.GraphModule, node: fx.Node) -> None:
    norm = taker(node)
    given = arguments(norm)
    name = str(given["running_mean"].target).rpartition(".")[0]
    numbers = zip(("scale", "shift"), scale_and_shift(module, given), strict=True)
    with node.graph.inserting_before(node):
        buffers = [new_buffer(module, f"{name}.{part}".lstrip("."), tensor.float()) for part, tensor in numbers]
    node.args, node.kwargs, node.target = (given["input"], *buffers), {}, AFFINE
    if norm is not node:
        node.graph.erase_node(norm)


def _pooling(node: fx.Node, x: Tensor, y: Tensor) -> tuple[list[int], list[int], list[int], list[int], bool] | None:
    """What :data:`POOL` does as a node does, by its arguments: window, stride, padding, dilation, mean."""
    axes, means, given = x.dim() - 2, _POOLING[node.target], arguments(node)
    if axes not in (1, 2) or y.dim() != x.dim():
        return None
    if node.target in _WHOLE:
        dims = given.get("dim", range(2, x.dim()))  # None for all
        sizes = [given["output_size"]] if "output_size" in given else []
        if any(size != 1 for one in sizes for size in ([one] if isinstance(one, int) else one)):
            return None
        whole = [size for size in x.shape[2:] if isinstance(size, int)]
        if dims is None or {dim % x.dim() for dim in dims} != set(range(2, x.dim())) or len(whole) < axes:
            return None
        return whole, whole, [0] * axes, [1] * axes, True
    plain = not given["ceil_mode"] and given.get("divisor_override") is None
    settings = [
        _each(given[name] or default, axes)
        for name, default in (("kernel_size", 1), ("stride", given["kernel_size"]), ("padding", 0))
    ]
    if not plain or (means and any(settings[2]) and not given["count_include_pad"]):
        return None
    window, stride, padding = settings
    return window, stride, padding, _each(given.get("dilation", 1), axes), means


def _each(given: int | Sequence[int], axes: int) -> list[int]:
    """A number for each axis, where one alone is meant for all."""
    numbers = [given] if isinstance(given, int) else list(given)
    return numbers * axes if len(numbers) == 1 else numbers
