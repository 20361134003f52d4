"""What takes the place, in a graph from a file, of operators that check too little.

Owns the replacements: batch normalisation becomes the public operator, which compares the sizes of its weights; a
recurrent layer's weights are checked, and its input and state brought to the sizes that these weights have, or refused
when it runs. Graphs compute the same as before. It must not know the file format.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from srigl_fx.graph_ops import GUARDED, function_name
from srigl_fx.passes.condensed_nodes import set_arguments
from srigl_fx.passes.program import arguments

_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


def guard(graph: fx.Graph, tensor_at: Callable[[str], Tensor]) -> None:
    """Replace the guarded operators of a graph, in place.

    Args:
        graph: A graph of a file.
        tensor_at: The tensor that a ``get_attr`` node names.

    Raises:
        ValueError: The arguments of one cannot be right; the message names its node.
    """
    for node in list(graph.nodes):
        if node.op == "call_function" and function_name(node.target) in GUARDED:
            try:
                name = node.target.overloadpacket.__name__
                if "batch_norm" in name:
                    _guard_batch_norm(graph, node)
                else:
                    _guard_recurrent(graph, node, _GATES[name], tensor_at)
            except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
                raise ValueError(f"node {node.name}: {error}") from error


def _guard_batch_norm(graph: fx.Graph, node: fx.Node) -> None:
    given = arguments(node)
    for user in node.users:
        if function_name(user.target) != "_operator.getitem" or user.args != (node, 0):
            raise ValueError("only the normalised result of a batch normalisation can be read")
    statistics = given.get("running_mean"), given.get("running_var")
    training = given.get("training", False)
    if (None in statistics) is not bool(training) or not isinstance(training, bool):
        raise ValueError("a batch normalisation needs its statistics, and none where it takes those of the batch")
    operands = given["input"], given["weight"], given["bias"], *statistics
    with graph.inserting_before(node):
        settings = training, given["momentum"], given["eps"], False
        normal = graph.call_function(torch.ops.aten.batch_norm.default, (*operands, *settings))
    for user in list(node.users):
        user.replace_all_uses_with(normal)
        graph.erase_node(user)
    graph.erase_node(node)


def _guard_recurrent(graph: fx.Graph, node: fx.Node, gates: int, tensor_at: Callable[[str], Tensor]) -> None:
    given = arguments(node)
    flags = [given[name] for name in ("has_biases", "train", "bidirectional", "batch_first")]
    biases, train, both, first = flags
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

    def sized(value: fx.Node, sizes: list[Any]) -> fx.Node:
        return graph.call_function(torch.ops.aten.expand.default, (value, sizes))

    states = list(given["hx"]) if gates == 4 else [given["hx"]]
    if len(states) != (2 if gates == 4 else 1):
        raise ValueError("a recurrent layer has another number of states")
    with graph.inserting_before(node):
        x = sized(given["input"], [-1, -1, width])
        batch = graph.call_function(torch.ops.aten.sym_size.int, (x, 0 if first else 1))
        states = [sized(state, [layers * ways, batch, hidden]) for state in states]
        states = [graph.call_function(torch.ops.aten.clone.default, (state,)) for state in states]
    set_arguments(node, input=x, hx=states if gates == 4 else states[0])
