"""What is asked, of a graph for a file, of operators that check too little themselves.

Owns the checks, made when a graph is saved and when it is loaded, and what takes the place of an operator in a graph
from a file: batch and group normalisation become the public operators, which compare the sizes of weights; the input
and state of a recurrent layer are brought to the sizes that its weights have, the heads of attention in groups are
counted, and the rows of bags looked at, or refused when it runs. Graphs compute the same as before; one that has been
guarded already, and saved again, gets nothing more. It must not know the file format.
"""

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from srigl_fx.lowering.file_operators import GUARDED, function_name
from srigl_fx.passes.condensed_nodes import set_arguments
from srigl_fx.passes.program import arguments

_ATTENTION = "scaled_dot_product_attention"
_BAGS = "embedding_bag"
_GROUPS = "native_group_norm"
_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
_SMALLEST, _LARGEST = 1e-12, 2**31 - 1  # of numbers that sizes are made of
_MOST_PLACES = 1 << 24  # of an adaptive pooling's output, for each channel; and that a border or a step takes
_RANGES = {None, torch.int64, torch.int32, torch.float32, torch.float64}


def check(node: fx.Node, tensor_at: Callable[[str], Tensor]) -> None:
    """Ask of a node's arguments what a guarded operator does not; nothing of other nodes.

    Args:
        node: A node of the graph.
        tensor_at: The tensor that a ``get_attr`` node names.

    Raises:
        ValueError: They cannot be right, or cannot be told to be; the message names the node.
    """
    if node.op != "call_function" or function_name(node.target) not in GUARDED:
        return
    name = _packet(node)
    try:
        if "batch_norm" in name:
            _check_batch_norm(node)
        elif name == _GROUPS:
            _check_only_the_first_is_read(node, "group normalisation")
        elif "pad" in name or name == "col2im":
            _check_extents(node)
        elif name == "arange":
            _check_range(node)
        elif name.startswith("adaptive"):
            _check_adaptive_pooling(node)
        elif "max_pool" in name:
            _check_pooling(node)
        elif name == _ATTENTION:
            _check_attention(node)
        elif name == _BAGS:
            _check_bags(node)
        elif name in _GATES:
            _check_recurrent(node, _GATES[name], tensor_at)
        else:
            _check_divisor(node)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"node {node.name}: {error}") from error


def guard(graph: fx.Graph, tensor_at: Callable[[str], Tensor]) -> None:
    """Check all nodes of a graph from a file, and replace the operators that would check too little, in place.

    Raises:
        ValueError: As :func:`check`.
    """
    for node in list(graph.nodes):
        check(node, tensor_at)
        if node.op == "call_function" and function_name(node.target) in GUARDED:
            if "batch_norm" in _packet(node):
                _replace_batch_norm(graph, node)
            elif _packet(node) == _GROUPS:
                _replace_group_norm(graph, node)
            elif _packet(node) == _ATTENTION and arguments(node).get("enable_gqa"):
                _count_heads(graph, node)
            elif _packet(node) == _BAGS:
                _bound_bags(graph, node)
            elif _packet(node) in _GATES:
                _size_recurrent(graph, node, _GATES[_packet(node)], tensor_at)


def _called(graph: fx.Graph, before: fx.Node, target: Callable[..., Any], args: tuple[Any, ...]) -> fx.Node:
    """The call of ``target`` that there is above ``before`` already, else a new one right above it."""
    operand: fx.Node = args[0]
    for user in operand.users:
        if user.target is target and user < before and not user.kwargs and _same(user.args, args):
            return user
    with graph.inserting_before(before):
        return graph.call_function(target, args)


def _same(one: Any, other: Any) -> bool:
    """Whether two arguments are equal, and a number is not taken for a truth value; lists and tuples are alike."""
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return type(one) is type(other) and bool(one == other)


def _packet(node: fx.Node) -> str:
    assert isinstance(node.target, torch._ops.OpOverload)
    return str(node.target.overloadpacket.__name__)


def _check_range(node: fx.Node) -> None:
    given = arguments(node)
    step, dtype = given["step"], given.get("dtype")
    kinds: Any = int if dtype in (torch.int64, torch.int32) else int | float
    if dtype not in _RANGES:
        raise ValueError(f"a range of {dtype}")
    if isinstance(step, bool) or not isinstance(step, kinds) or not _SMALLEST <= abs(step) <= _LARGEST:
        raise ValueError(f"a range in steps of {step!r}")


def _check_adaptive_pooling(node: fx.Node) -> None:
    """PyTorch goes through all places of the output, also where it has no channels and so no elements."""
    sizes = arguments(node)["output_size"]
    numbers = sizes if isinstance(sizes, list | tuple) else [sizes]
    plain = all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in numbers)
    if not plain or math.prod(numbers) > _MOST_PLACES:
        raise ValueError(f"pooling to {sizes} places")


def _check_pooling(node: fx.Node) -> None:
    given = arguments(node)
    for name, least in (("kernel_size", 1), ("stride", 1), ("padding", 0), ("dilation", 1)):
        numbers = given.get(name, ())
        for number in numbers if isinstance(numbers, list | tuple) else [numbers]:
            if isinstance(number, bool) or not isinstance(number, int) or not least <= number <= _LARGEST:
                raise ValueError(f"pooling with a {name} of {numbers}")


def _check_extents(node: fx.Node) -> None:
    """PyTorch multiplies and adds these before it compares them with sizes, and what overflows passes for small."""
    given = arguments(node)
    if given.get("mode", "") == "constant":
        return
    for name in ("output_size", "kernel_size", "dilation", "padding", "pad", "stride"):
        for number in given.get(name, ()):
            if isinstance(number, bool) or not isinstance(number, int) or abs(number) > _MOST_PLACES:
                raise ValueError(f"{_packet(node)} with a {name} of {given[name]}")


def _check_attention(node: fx.Node) -> None:
    grouped = arguments(node).get("enable_gqa", False)
    if not isinstance(grouped, bool):
        raise ValueError(f"attention with enable_gqa={grouped}")


def _count_heads(graph: fx.Graph, node: fx.Node) -> None:
    """Divide the heads of queries by those of keys and of values, as the operator does: by none is an error here."""
    given = arguments(node)
    queries, *others = (
        _called(graph, node, torch.ops.aten.sym_size.int, (given[name], -3)) for name in ("query", "key", "value")
    )
    for heads in others:
        _called(graph, node, operator.floordiv, (queries, heads))


def _check_bags(node: fx.Node) -> None:
    given = arguments(node)
    flags = [given.get(name, False) for name in ("scale_grad_by_freq", "sparse", "include_last_offset")]
    numbers = [given.get("mode", 0), given.get("padding_idx")]
    if not all(isinstance(flag, bool) for flag in flags) or flags[1]:
        raise ValueError("the settings of an embedding bag are not those of one")
    if any(isinstance(number, bool) for number in numbers) or numbers[0] not in (0, 1, 2):
        raise ValueError(f"an embedding bag with mode {numbers[0]} and padding_idx {numbers[1]}")
    if not isinstance(numbers[1], int | None):
        raise ValueError(f"an embedding bag with padding_idx {numbers[1]}")
    for user in node.users:
        if user.target is not operator.getitem or user.args != (node, 0):
            raise ValueError("only the sums of an embedding bag can be read")


def _bound_bags(graph: fx.Graph, node: fx.Node) -> None:
    """Look up what the operator takes for granted: rows of the table, one bag or more, which begin in order in it."""
    given = arguments(node)
    lookup = torch.ops.aten.index_select.default  # an error where an index is no integer, or out of range
    column = _called(graph, node, torch.ops.aten.select.int, (given["weight"], 1, 0))
    _called(graph, node, lookup, (column, 0, given["indices"]))
    ends = _called(graph, node, torch.ops.aten.constant_pad_nd.default, (given["indices"], [0, 1]))
    lengths = _called(graph, node, torch.ops.aten.diff.default, (given["offsets"],))
    _called(graph, node, torch.ops.aten.select.int, (given["offsets"], 0, int(given.get("include_last_offset", 0))))
    for places in (given["offsets"], lengths):
        _called(graph, node, lookup, (ends, 0, places))


def _check_divisor(node: fx.Node) -> None:
    divisor = arguments(node)["other"]
    if isinstance(divisor, bool) or not isinstance(divisor, int | float) or divisor in (0, -1) or divisor != divisor:
        raise ValueError(f"whole division by {divisor}, where a number other than 0 and -1 can be checked")


def _check_batch_norm(node: fx.Node) -> None:
    given = arguments(node)
    _check_only_the_first_is_read(node, "batch normalisation")
    training = given.get("training", False)
    if not isinstance(training, bool) or (None in _statistics(given)) is not training:
        raise ValueError("a batch normalisation needs its statistics, and none where it takes those of the batch")


def _check_only_the_first_is_read(node: fx.Node, what: str) -> None:
    for user in node.users:
        if function_name(user.target) != "_operator.getitem" or user.args != (node, 0):
            raise ValueError(f"only the normalised result of a {what} can be read")


def _statistics(given: dict[str, Any]) -> tuple[Any, Any]:
    return given.get("running_mean"), given.get("running_var")


def _replace_batch_norm(graph: fx.Graph, node: fx.Node) -> None:
    given = arguments(node)
    operands = given["input"], given["weight"], given["bias"], *_statistics(given)
    with graph.inserting_before(node):
        settings = given.get("training", False), given["momentum"], given["eps"], False
        normal = graph.call_function(torch.ops.aten.batch_norm.default, (*operands, *settings))
    _put_in_place(graph, node, normal)


def _replace_group_norm(graph: fx.Graph, node: fx.Node) -> None:
    """The public operator takes the sizes from its input, where this one believes those that it is told."""
    given = arguments(node)
    operands = given["input"], given["group"], given["weight"], given["bias"], given["eps"]
    with graph.inserting_before(node):
        normal = graph.call_function(torch.ops.aten.group_norm.default, operands)
    _put_in_place(graph, node, normal)


def _put_in_place(graph: fx.Graph, node: fx.Node, normal: fx.Node) -> None:
    """Let what reads the first result of a normalisation read ``normal``."""
    for user in list(node.users):
        user.replace_all_uses_with(normal)
        graph.erase_node(user)
    graph.erase_node(node)


def _check_recurrent(node: fx.Node, gates: int, tensor_at: Callable[[str], Tensor]) -> None:
    given = arguments(node)
    flags = [given[name] for name in ("has_biases", "train", "bidirectional", "batch_first")]
    biases, train, both, _ = flags
    layers, ways = given["num_layers"], 2 if both else 1
    weights = [tensor_at(str(weight.target)) for weight in given["params"] if weight.op == "get_attr"]
    if not all(isinstance(flag, bool) for flag in flags) or train or not isinstance(layers, int) or layers < 1:
        raise ValueError("the settings of a recurrent layer are not those of one")
    width, hidden = int(weights[0].shape[1]), int(weights[1].shape[1])
    wanted = []
    for layer in range(layers):
        rows, columns = gates * hidden, width if layer == 0 else hidden * ways
        one = [(rows, columns), (rows, hidden), *([(rows,), (rows,)] if biases else [])]
        wanted += one * ways
    fit = [tuple(weight.shape) for weight in weights] == wanted and len(given["params"]) == len(wanted)
    if not fit or min(width, hidden) < 1 or any(weight.dtype is not torch.float32 for weight in weights):
        raise ValueError("the weights of a recurrent layer have other shapes than its settings ask for")
    if gates == 4 and len(given["hx"]) != 2:
        raise ValueError("a recurrent layer has another number of states")


def _size_recurrent(graph: fx.Graph, node: fx.Node, gates: int, tensor_at: Callable[[str], Tensor]) -> None:
    given = arguments(node)
    width, hidden = (int(tensor_at(str(weight.target)).shape[1]) for weight in given["params"][:2])
    rows = given["num_layers"] * (2 if given["bidirectional"] else 1)

    def called(target: Callable[..., Any], *args: Any) -> fx.Node:
        return _called(graph, node, target, args)

    def is_sized(value: Any, sizes: list[Any]) -> bool:
        expands = isinstance(value, fx.Node) and value.target is torch.ops.aten.expand.default and not value.kwargs
        return expands and _same(value.args[1:], (sizes,))

    def sized(value: fx.Node, sizes: list[Any]) -> fx.Node:
        return value if is_sized(value, sizes) else called(torch.ops.aten.expand.default, value, sizes)

    def copied(value: fx.Node, sizes: list[Any]) -> fx.Node:
        copies = value.target is torch.ops.aten.clone.default and not value.kwargs
        if copies and is_sized(value.args[0], sizes):
            return value
        return called(torch.ops.aten.clone.default, sized(value, sizes))

    x = sized(given["input"], [-1, -1, width])
    batch = called(torch.ops.aten.sym_size.int, x, 0 if given["batch_first"] else 1)
    states = [copied(state, [rows, batch, hidden]) for state in (given["hx"] if gates == 4 else [given["hx"]])]
    set_arguments(node, input=x, hx=states if gates == 4 else states[0])
