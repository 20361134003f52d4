"""Sizes of values, and operators run on something else than their operands, at a batch of two.

Owns the sizes that stand for any other (two samples, the rest as in the example), and what operators are asked for
beside their rules: indices, axes, results. It must not know how operators pass channels on, nor what is removed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx

from srigl_fx.passes.operators import operator_of, plain_name
from srigl_fx.passes.program import Program, arguments, tensor_at

_BATCH = 2  # one would broadcast, and could not be told from an axis of size 1
_JOINED = {"vstack": 0, "row_stack": 0, "hstack": 1, "column_stack": 1, "dstack": 2}


def index_values(program: Program, given: dict[str, Any], labels: Tensor) -> list[Any] | None:
    """The indices of ``index`` or ``index_select``, one for each axis; None where one that varies picks channels.

    Along an axis without channels any index will do.
    """
    nodes = given["indices"] if "indices" in given else [None] * (given["dim"] % labels.dim()) + [given["index"]]
    if sum(node is not None and labels.shape[axis] > 1 for axis, node in enumerate(nodes)) > 1:
        return None
    values: list[Any] = []
    for axis, node in enumerate(nodes):
        if node is None:
            values.append(None)
        elif node.meta["val"].dtype in (torch.bool, torch.uint8):
            return None
        elif labels.shape[axis] == 1:
            values.append(torch.zeros(shape_of(node), dtype=torch.long))
        elif node.op == "get_attr":
            values.append(tensor_at(program.module, str(node.target)))
        else:
            return None
    return values


def joined_axis(node: fx.Node) -> int | None:
    """The axis along which an operator puts tensors of the result's rank behind each other; None for any other.

    Example:
        >>> graph = fx.Graph()
        >>> x = graph.placeholder("x")
        >>> node = graph.call_function(torch.ops.aten.hstack.default, ([x, x],))
        >>> x.meta["val"], node.meta["val"] = torch.ones(2, 3), torch.ones(2, 6)
        >>> joined_axis(node), joined_axis(x)
        (1, None)
    """
    if operator_of(node.target).family != "join" or plain_name(node.target) == "stack":
        return None
    given, rank = arguments(node), len(shape_of(node))
    axis = given["dim"] % rank if "dim" in given else _JOINED[plain_name(node.target)]
    same = all(len(shape_of(part)) == rank for part in given["tensors"])
    return axis if same and axis < rank else None


def execute(target: Any, args: Any, kwargs: Any, value: Callable[[fx.Node], Any]) -> Any:
    """Run an operator that moves elements on something else than its operands."""

    def one(operand: fx.Node) -> Any:
        meta = operand.meta.get("val")
        return value(operand) if isinstance(meta, Tensor | list | tuple) else concrete_number(meta)

    mapped_args, mapped_kwargs = fx.node.map_arg((args, kwargs), one)
    return target(*mapped_args, **mapped_kwargs)


_OTHERS: ContextVar[Mapping[str, int]] = ContextVar("sizes that are not the batch", default=MappingProxyType({}))


@contextmanager
def sizes_beside_the_batch(sizes: Mapping[str, int]) -> Iterator[None]:
    """Meanwhile, set these symbols to these numbers: at two pixels, say, many a model cannot run."""
    token = _OTHERS.set(sizes)
    try:
        yield
    finally:
        _OTHERS.reset(token)


def concrete_number(value: Any) -> Any:
    """A size with its symbols set to 2, as are those of the batch, but for those of other sizes that are known."""
    if not isinstance(value, torch.SymInt):
        return value
    expression, others = value.node.expr, _OTHERS.get()
    return int(expression.xreplace({symbol: others.get(str(symbol), _BATCH) for symbol in expression.free_symbols}))


def concrete(shape: Sequence[Any]) -> list[int]:
    """A shape with its symbols (the batch) set to 2."""
    return [size if isinstance(size, int) else concrete_number(size) for size in shape]


def shape_of(node: fx.Node) -> list[int]:
    """The shape of a node's value at batch 2."""
    return concrete(node.meta["val"].shape)


def tensor_count(shape: Sequence[int]) -> int:
    """The number of elements of a shape."""
    return int(torch.Size(shape).numel())


def padded(shape: Sequence[int], rank: int) -> list[int]:
    """``shape`` with axes of size 1 in front."""
    return [1] * (rank - len(shape)) + list(shape)


def align(labels: Tensor, rank: int) -> Tensor:
    """``labels`` with axes of size 1 in front."""
    return labels.reshape(padded(labels.shape, rank))
